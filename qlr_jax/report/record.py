"""What a finished job found, put together: the data of report.json and allocation.json."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import allocators
from allocators.budget import FIXED
from allocators.strategies import BASELINE, DEFAULT, solved_strategies
from qlr_jax.core.solution import Solution
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Comparison
from qlr_jax.formats.targets import find_target
from qlr_jax.models import EMBEDDING, HEAD, KINDS, LlamaConfig, is_linear, kind_of, layer_of, tensor_names
from qlr_jax.models.sites import kind_of_path
from qlr_jax.sensitivity import Sensitivity, final_error, prediction_quality
from qlr_jax.settings.recipe import Recipe

PACKAGES = ("qlr-jax", "jax", "flax", "numpy", "scipy", "transformers")
FRONTIER_POINTS = 60
OTHERS = "norms, biases"


@dataclass(frozen=True)
class Record:
    """Everything that a job found; `report()` is the content of report.json, `allocations()` that of allocation.json."""

    model: str
    command: str
    recipe: Recipe
    config: LlamaConfig
    plans: Mapping[str, allocators.Allocation]
    delivered: str
    solutions: Mapping[str, Solution]
    sensitivity: Sensitivity
    calibration: Mapping[str, Comparison]
    refined: allocators.Refined | None
    held_out: Mapping[str, Comparison]
    held_out_name: str
    window: int
    seconds: Mapping[str, float]
    started: float
    peak_rss: int
    problem: allocators.Problem
    device: str
    import_notes: tuple[str, ...]
    left_out: Mapping[str, Mapping[int, str]]
    original: Mapping[str, Any] = field(default_factory=dict)
    text_notes: Sequence[str] = ()
    controls: Mapping[str, Any] = field(default_factory=dict)

    def allocations(self) -> dict[str, Any]:
        """Every plan by its name, and which of them was delivered."""
        return {name: plan.to_dict() for name, plan in self.plans.items()} | {"delivered": self.delivered}

    def report(self) -> dict[str, Any]:
        """The content of report.json.

        Raises:
            QLRError: where other bytes are stored than the option table has.
        """
        plan = self.plans[self.delivered]
        rows = [self._matrix(name, spec) for name, spec in plan.specs.items()]
        stored, promised = sum(row["bytes"] for row in rows), plan.bytes
        if stored != promised:
            raise QLRError(f"{stored} bytes are stored but the table promised {promised}; this is a bug, please report it")
        linear = [row for row in rows if row["layer"] is not None]
        count = sum(row["shape"][0] * row["shape"][1] for row in linear)
        parts = self._parts(rows)
        before, after = sum(p["before"] for p in parts), sum(p["after"] for p in parts)
        whole = before // 2  # weights, at two bytes each
        everyone, comparisons, points = self.held_out, list(self.held_out.values()), self._points()
        return {
            "format": 1,
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "machine": f"{platform.machine()} {platform.system()}",
            "device": self.device,
            "cores": os.cpu_count(),
            "model": self.model,
            "original": dict(self.original),
            "text_notes": list(self.text_notes),
            "budget": self.recipe.budget,
            "target": self.recipe.target,
            "command": self.command,
            "bits_per_weight": 8 * sum(row["bytes"] for row in linear) / count,
            "whole_model_bits_per_weight": 8 * after / whole,
            "bytes": {"before": before, "after": after, "compressed": stored, "parts": parts},
            "perplexity": ({"original": comparisons[0].perplexity_original} if comparisons else {})
            | {name: c.perplexity for name, c in everyone.items()},
            "kl": {name: c.kl for name, c in everyone.items()},
            "kl_p99": {name: c.kl_p99 for name, c in everyone.items()},
            "agreement": {name: c.agreement for name, c in everyone.items()},
            "calibration_kl": {name: c.kl for name, c in self.calibration.items()},
            "delivered": self.delivered,
            "import_notes": list(self.import_notes),
            "left_out": {kind: {str(row): where for row, where in rows.items()} for kind, rows in self.left_out.items()},
            "refined": self._refined(),
            "fit": self._fit(),
            "spectra": self._spectra(),
            "evaluation": self._evaluation(comparisons),
            "seconds": {"total": time.perf_counter() - self.started, "stages": dict(self.seconds)},
            "peak_rss_bytes": self.peak_rss,
            "allocation": {"damage": plan.damage, "bound": plan.bound, "gap": plan.gap},
            "uniform_spec": next(iter(points[BASELINE].specs.values())) if BASELINE in points else None,
            "controls": dict(self.controls),
            "frontier": self._frontier(),
            "points": {
                name: {"bytes": p.bytes, "damage": p.damage, "bits_per_weight": p.bits_per_weight} for name, p in points.items()
            },
            "prediction": prediction_quality([(r["predicted_error"], r["felt_error"]) for r in rows]),
            "matrices": rows,
            "recipe": {**vars(self.recipe), **{k: list(v) for k, v in vars(self.recipe).items() if isinstance(v, tuple)}},
        }

    def _points(self) -> dict[str, allocators.Allocation]:
        """The plans, and of the controls that were left out what would have been theirs."""
        beside = self.plans[DEFAULT].baselines if DEFAULT in self.plans else {}
        return {name: beside[name] for name in solved_strategies() if name != DEFAULT and name in beside} | dict(self.plans)

    def _refined(self) -> dict[str, Any] | None:
        found = self.refined
        if found is None:
            return None
        values = {name: getattr(found, name) for name in ("measured", "start", "gained", "tried", "accepted", "seconds", "explain")}
        return values | {"history": [vars(trial) for trial in found.history]}

    def _fit(self) -> dict[str, Any] | None:
        """What a byte or device budget was made of, and what is stored against it."""
        if "counted rows" in self.problem.items:  # bits per weight
            return None
        items = self.problem.items
        fixed = -items.get(FIXED, 0)
        stored = self.plans[self.delivered].bytes
        fits = stored <= self.problem.limit
        return {"budget": str(self.problem.budget), "items": items, "weights": stored + fixed, "fits": fits}

    def _spectra(self) -> dict[str, list[float]]:
        """The leading shares of each matrix's energy in its metric, as the table has them."""
        noted = self.sensitivity.table.notes.get("matrices", {})
        return {name: note["spectrum"] for name, note in noted.items() if note.get("spectrum")}

    def _matrix(self, name: str, spec: str) -> dict[str, Any]:
        solution = self.solutions[name]
        m, n = solution.value.shape
        kept = all(option.spec != spec for option in self.sensitivity.table[name].options)  # the original fits as it is
        target = find_target(self.recipe.target)
        size = solution.value.nbytes if target.name == "qlr" else target.nbytes(Spec.parse(spec), (m, n))
        return {
            "name": name,
            "layer": layer_of(name) if is_linear(name) else None,
            "kind": kind_of(name),
            "shape": [m, n],
            "spec": spec,
            "bytes": size,
            "bits": 8 * size / (m * n),
            "relative_error": solution.stats["relative_error"],
            "felt_error": final_error(solution),
            "bound": solution.stats.get("bound"),
            "bound_note": solution.stats.get("bound_note"),
            "predicted_error": 0.0 if kept else self.sensitivity.error(name, spec),
            "predicted_damage": 0.0 if kept else self.sensitivity.damage(name, spec),
            "sensitivity": self.sensitivity.coefficient(name),
        }

    def _parts(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Bytes before (bf16) and after, by kind of matrix and by what is not compressed."""
        # a given backbone's own bytes are not known here: what it is decoded to stands for them
        given = 2 if self.recipe.target == "adapter" else 0
        after = {row["name"]: row["bytes"] + given * row["shape"][0] * row["shape"][1] for row in rows}
        parts = {kind: [0, 0] for kind in (*KINDS, "embeddings", "head", OTHERS)}
        for tensor, shape in tensor_names(self.config).items():
            name = tensor.removesuffix(".weight")
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            part = kind_of_path(name) or {EMBEDDING: "embeddings", HEAD: "head"}.get(name, OTHERS)
            parts[part][0] += size
            parts[part][1] += after.get(name, size)
        return [{"part": part, "before": b, "after": a} for part, (b, a) in parts.items() if b]

    def _evaluation(self, comparisons: list[Comparison]) -> dict[str, Any] | None:
        if not comparisons:
            return None
        return {"text": self.held_out_name, "tokens": comparisons[0].tokens, "window": self.window}

    def _frontier(self) -> list[dict[str, float]]:
        curve = allocators.frontier(self.sensitivity.table)
        return [{"bytes": int(curve.bytes[i]), "damage": float(curve.damage[i])} for i in curve.subsample(FRONTIER_POINTS)]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
