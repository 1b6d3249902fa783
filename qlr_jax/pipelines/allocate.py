"""What `qlr allocate` and `qlr frontier` do with a saved option table, without the model: one budget, and all of them.

Nothing here needs JAX; the results are plain values that JSON can hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import allocators
from allocators import AllocationError, Infeasible, OptionTable
from allocators.strategies import CONTROL, DEFAULT, compared, solved_strategies
from qlr_jax.errors import QLRError
from qlr_jax.formats.files import replace_text, write_json
from qlr_jax.paths import local, output_folder

TABLE = "table.json"
GAP, SECONDS, POINTS = 1e-4, 10.0, 200


def read_table(source: str | Path) -> OptionTable:
    """The option table in a file, or in the file table.json of a folder.

    Raises:
        QLRError: where there is none.
        AllocationError: where it is something else, or of another version.
    """
    path = local(source)
    path = path / TABLE if path.is_dir() else path
    try:
        text = path.read_bytes()
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise QLRError(f"option table {path} {why}; pass a table.json or its folder, as qlr sensitivity writes it") from None
    try:
        return OptionTable.from_json(text)
    except AllocationError as error:
        raise AllocationError(f"{path}: {error}") from None


def plan(
    table: OptionTable,
    budgets: Sequence[str],
    *,
    gap: float = GAP,
    seconds: float = SECONDS,
    seed: int = 0,
    strategy: str = DEFAULT,
) -> list[dict[str, Any]]:
    """The allocation of every budget, and what it is compared with.

    Args:
        table: matrices × options.
        budgets: `2.25bpw`, `900MB` or `device:8GiB,context=8192` each.
        gap: relative gap at which the exact search may stop.
        seconds: time for the search.
        seed: of the random strategy.
        strategy: whose allocation it is, a name of `allocators.STRATEGIES`; the others' are beside it.

    Returns:
        One dict a budget: `Allocation.to_dict` with the budget, what its limit is made of (`items`, bytes), how many options are
        dominated, and for every other strategy the `ratio` of its damage to this one's (null where nothing is damaged).

    Raises:
        AllocationError: for a budget that cannot be met, naming both ends, or a strategy that does not exist.

    Example:
        >>> from allocators import Option, Row
        >>> table = OptionTable((Row("q", 64, (Option("int-2", 16, 3.0), Option("int-3", 24, 1.5), Option("int-4", 32, 1.0))),
        ...                      Row("k", 64, (Option("int-2", 16, 3.0), Option("int-3", 24, 1.5), Option("int-4", 32, 1.0)))))
        >>> found = plan(table, ["3.5bpw"])[0]
        >>> found["specs"], found["baselines"]["uniform"]["spec"], found["baselines"]["uniform"]["ratio"]
        ({'q': 'int-4', 'k': 'int-3'}, 'int-3', 1.2)
    """
    problems = [allocators.Budget.parse(budget).on(table) for budget in budgets]  # all of them are refused before any is solved
    settings = {"gap": gap, "seconds": seconds, "seed": seed, "strategy": strategy}
    return [_planned(problem, settings) for problem in problems]


def _planned(problem: allocators.Problem, settings: dict[str, Any]) -> dict[str, Any]:
    table = problem.table
    best = compared(table, problem.limit, **settings)
    plain = best.to_dict()
    for other in plain["baselines"].values():
        other["ratio"] = other["damage"] / best.damage if best.damage else None
    dropped = len(allocators.prune(table).dropped)
    return {
        "budget": str(problem.budget),
        "strategy": settings["strategy"],
        **plain,
        "items": problem.items,
        "explain": best.status.explain,
        "everything_fits": problem.everything_fits,
        "keeps_original": problem.keeps_original,
        "pruned": {"options": sum(len(row.options) for row in table.rows), "dropped": dropped},
    }


def curves(table: OptionTable, points: int = POINTS) -> dict[str, Any]:
    """Size against damage: the whole hull, and that without rank where every row offers rank 0 and some row offers more.

    Args:
        table: matrices × options.
        points: corners of each curve, at most.

    Raises:
        QLRError: for fewer than two points.

    Example:
        >>> from allocators import Option, Row
        >>> options = (Option("int-2", 16, 3.0), Option("int-2+r4@bf16", 24, 1.0), Option("int-4", 32, 1.5))
        >>> found = curves(OptionTable((Row("q", 64, options),)))
        >>> [corner["bytes"] for corner in found["all"]], [corner["damage"] for corner in found["rank0"]]
        ([16, 24], [3.0, 1.5])
    """
    if points < 2:
        raise QLRError(f"points is {points}; pass at least 2")
    return {
        "weights": table.weights(),
        "all_counted": all(row.counted for row in table.rows),
        "corners": len(allocators.frontier(table)),
        "all": _corners(table, points),
        CONTROL: _without_rank(table, points),
    }


def _corners(table: OptionTable, points: int) -> list[dict[str, Any]]:
    """Corners of the hull, each with the damage that a further byte saves (`price`; null at the last)."""
    curve, found = allocators.frontier(table), []
    for at in curve.subsample(points):
        price = float(curve.price[at]) if at < len(curve.price) else None
        bits = curve.allocation(at).bits_per_weight
        found.append({"bytes": int(curve.bytes[at]), "bits_per_weight": bits, "damage": float(curve.damage[at]), "price": price})
    return found


def _without_rank(table: OptionTable, points: int) -> list[dict[str, Any]] | None:
    if not any(option.rank for row in table.rows for option in row.options):
        return None
    try:
        return _corners(table.restrict(lambda row, option: option.rank == 0, "leaving out every rank"), points)
    except Infeasible:
        return None


def measured_points(table: OptionTable, folders: Sequence[str | Path] = ()) -> list[dict[str, Any]]:
    """Models that were built and measured: those in the table's notes, then those of compressed folders.

    The KL is that on the calibration text where it is known, which is what the table predicts; `on` says so. A folder's model that
    the notes have as well is listed once.

    Args:
        table: whose matrices the models are of.
        folders: written by qlr compress.

    Raises:
        QLRError: for a folder without a report, or of other matrices.
    """
    found = []
    for row in table.notes.get("measured") or ():
        if _is_number(row.get("bytes")) and _is_number(row.get("kl")):
            found.append({"label": row.get("label") or row.get("kind"), **row})
    given = [point for folder in folders for point in _report_points(table, local(folder))]
    known = {(point["kind"], point["bytes"], point["kl"]) for point in given}
    return [row for row in found if (row.get("kind"), row["bytes"], row["kl"]) not in known] + given


def _report_points(table: OptionTable, folder: Path) -> list[dict[str, Any]]:
    path = folder / "report.json" if folder.is_dir() else folder
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QLRError(f"{path} does not exist; pass --with the folder of a compressed model") from None
    except (OSError, ValueError) as error:
        raise QLRError(f"{path} cannot be read ({error}); pass --with the folder of a compressed model") from None
    if not isinstance(report, Mapping):
        raise QLRError(f"{path} is no report; pass --with the folder of a compressed model")
    names = {row.get("name") for row in report.get("matrices") or ()}
    if names and names != set(table.index):
        odd = sorted(str(name) for name in names ^ set(table.index))[0]
        raise QLRError(f"{path} is of other matrices than the table ({odd} is in one of them only); pass one of the same model")
    calibration, held_out = report.get("calibration_kl") or {}, report.get("kl") or {}
    points, found = report.get("points") or {}, []
    for kind in solved_strategies():
        point = points.get(kind) or {}
        kl = calibration.get(kind) if _is_number(calibration.get(kind)) else held_out.get(kind)
        if _is_number(point.get("bytes")) and _is_number(kl):
            on = "calibration" if _is_number(calibration.get(kind)) else "held-out"
            quick = ", quick" if kind != DEFAULT and (report.get("controls") or {}).get("mode") == "quick" else ""
            row = {"label": f"{kind}{quick} ({folder.name})", "kind": kind, "bytes": point["bytes"], "kl": kl, "on": on}
            row |= {"bits_per_weight": point.get("bits_per_weight"), "predicted": point.get("damage")}
            found.append(row | {"held_out_kl": held_out.get(kind), "delivered": kind == report.get("delivered")})
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def write_plans(path: str | Path, plans: Sequence[Mapping[str, Any]]) -> Path:
    """Write allocations, as `plan` returns them, as JSON.

    Raises:
        QLRError: where the place cannot be written.
    """
    return write_json(local(path), plans, indent=1, allow_nan=False)


def write_frontier(out: str | Path, found: Mapping[str, Any]) -> list[Path]:
    """Write frontier.json and, drawn of it, frontier.svg into a folder, which is made where it is missing.

    Args:
        out: the folder.
        found: what `curves` returns, with the `measured_points` under "measured".

    Raises:
        QLRError: where the folder's name is taken by something else.
    """
    from qlr_jax.report.html.drawings.frontier import frontier_svg
    from qlr_jax.report.html.drawings.svg import standalone

    path = output_folder(out, keep=None)
    path.mkdir(parents=True, exist_ok=True)
    drawing = standalone(frontier_svg(found, found.get("measured") or ()))
    data = write_json(path / "frontier.json", found, indent=1, allow_nan=False)
    return [data, replace_text(path / "frontier.svg", drawing)]
