"""The tables and pictures of a study, from its records alone."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from allocators.strategies import BASELINE, CONTROL, DEFAULT, STRATEGIES, solved_strategies
from qlr_jax.core.spec import Spec
from qlr_jax.evaluation import bootstrap
from qlr_jax.models.sites import KINDS

Record = dict[str, Any]


def read(folder: Path) -> list[Record]:
    """What a study kept."""
    path = folder / "records.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def ratio(one: Record, other: Record, text: str) -> tuple[float, bootstrap.Interval]:
    """KL of one model over that of another on the same windows, which are resampled together."""
    a, b = (np.array(record["texts"][text]["windows"])[:, None] for record in (one, other))
    counts = bootstrap.draws(len(a))
    samples = bootstrap.of_mean(a, counts) / bootstrap.of_mean(b, counts)
    return float(a.mean() / b.mean()), bootstrap.interval(samples)


def tables(folder: Path) -> str:
    """All tables of what there is, in Markdown."""
    records = read(folder)
    if not records:
        return "nothing is kept yet"
    texts = next((list(record["texts"]) for record in records if "texts" in record), [])
    parts = [part(records, texts) for part in (_sizes, _ranks, _uniform, _peers, _settings, _adapted)]
    return "\n\n".join(part for part in parts if part)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: list[float], digits: int = 4) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _by_budget(records: list[Record]) -> dict[str, dict[int, dict[str, Record]]]:
    """Budget -> seed -> name of the strategy -> record, where all of them are there."""
    found: dict[str, dict[int, dict[str, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record["part"] == "sizes":
            found[record["budget"]][record["seed"]][record["name"]] = record
    wanted = set(solved_strategies())
    whole = {budget: {seed: own for seed, own in seeds.items() if wanted <= set(own)} for budget, seeds in found.items()}
    return {budget: seeds for budget, seeds in sorted(whole.items(), key=lambda i: float(i[0].removesuffix("bpw"))) if seeds}


def _sizes(records: list[Record], texts: list[str]) -> str:
    rows = []
    for budget, seeds in _by_budget(records).items():
        for text in texts:
            own = list(seeds.values())
            cells = [_spread([s[name]["texts"][text]["kl"] for s in own]) for name in (DEFAULT, CONTROL, BASELINE)]
            against = []
            for name in (CONTROL, BASELINE):
                found = [ratio(s[DEFAULT], s[name], text) for s in own]
                low, high = (mean(f[1][i] for f in found) for i in (0, 1))
                against.append(f"{mean(f[0] for f in found):.3f} ({low:.3f} to {high:.3f})")
            first = own[0][DEFAULT]["texts"][text]
            perplexity = f"{first['perplexity']:.2f} ({first['perplexity_original']:.2f})"
            foretold = mean(s[DEFAULT]["texts"][text]["kl"] / s[DEFAULT]["predicted"] for s in own)
            rows.append([budget.removesuffix("bpw"), text, *cells, *against, perplexity, f"{foretold:.2f}"])
    labels = [STRATEGIES[name].label for name in (DEFAULT, CONTROL, BASELINE)]
    header = ["bits", "text", *(f"KL, {label}" for label in labels), *(f"allocated / {label}" for label in labels[1:])]
    return _markdown([*header, "perplexity (original)", "KL / predicted"], rows) if rows else ""


def _ranks(records: list[Record], texts: list[str]) -> str:
    """Where rank was given, by kind of matrix."""
    rows = []
    for budget, seeds in _by_budget(records).items():
        specs = [(name, Spec.parse(spec)) for own in seeds.values() for name, spec in own[DEFAULT]["specs"].items()]
        cells = []
        for kind in KINDS:
            own = [spec for name, spec in specs if name.endswith(f".{kind}") or name.endswith(f".{kind}_proj")]
            ranks = [spec.rank for spec in own]
            bits = [spec.quantizer().bits for spec in own]
            cells.append(f"{mean(bits):.2f}, {sum(r > 0 for r in ranks)} of {len(ranks)}, {mean(ranks):.1f}" if own else "")
        rows.append([budget.removesuffix("bpw"), *cells])
    return _markdown(["bits", *(f"{kind}: backbone bits, with rank, mean rank" for kind in KINDS)], rows) if rows else ""


def _peers(records: list[Record], texts: list[str]) -> str:
    ours = {record["name"]: record for record in records if record["part"] == "ours"}
    rows = []
    for record in records:
        if record["part"] != "peers":
            continue
        own, cells = ours.get(record["name"]), []
        for text in texts:
            cells.append(f"{record['texts'][text]['kl']:.4f}")
            if own:
                value, (low, high) = ratio(own, record, text)
                cells += [f"{own['texts'][text]['kl']:.4f}", f"{value:.2f} ({low:.2f} to {high:.2f})"]
            else:
                cells += ["", ""]
        rows.append([record["name"], f"{record['bits']:.3f}", f"{own['bits']:.3f}" if own else "", *cells, record["note"]])
    columns = [cell for text in texts for cell in (f"KL, {text}", "ours", "ratio")]
    return _markdown(["", "bits", "ours", *columns, "stored as"], rows) if rows else ""


def _adapted(records: list[Record], texts: list[str]) -> str:
    """What adaptation won back, on the same windows."""
    before = {
        (record["seed"], record["budget"]): record for record in records if record["part"] == "sizes" and record["name"] == DEFAULT
    }
    rows = []
    for record in records:
        if record["part"] != "adapted" or not (old := before.get((record["seed"], record["budget"]))):
            continue
        cells = []
        for text in texts:
            value, (low, high) = ratio(record, old, text)
            kls = f"{old['texts'][text]['kl']:.4f} to {record['texts'][text]['kl']:.4f}"
            cells += [kls, f"{value:.3f} ({low:.3f} to {high:.3f})", f"{record['texts'][text]['perplexity']:.2f}"]
        steps = f"{record['name']}, {record['seconds'] / 60:.0f} min"
        rows.append([record["budget"].removesuffix("bpw"), str(record["seed"]), steps, *cells])
    header = ["bits", "seed", "adapted", *(c for text in texts for c in (f"KL, {text}", "ratio", "perplexity"))]
    return _markdown(header, rows) if rows else ""


def _settings(records: list[Record], texts: list[str]) -> str:
    """One setting changed at a time, of allocated models."""
    return _changes([record for record in records if record["part"] == "settings"], texts)


def _uniform(records: list[Record], texts: list[str]) -> str:
    """One thing changed at a time, of models with one spec."""
    return _changes([record for record in records if record["part"] == "uniform"], texts)


def _changes(records: list[Record], texts: list[str]) -> str:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record["name"]].append(record)
    base = {record["seed"]: record for record in found.get("as it is", [])}
    rows = []
    for name, own in found.items():
        cells = [str(len(own)), _spread([record["cpu"] for record in own], 0) if "cpu" in own[0] else ""]
        for text in texts:
            cells.append(_spread([record["texts"][text]["kl"] for record in own]))
            pairs = [ratio(record, base[record["seed"]], text) for record in own if record["seed"] in base]
            low, high = (mean(p[1][i] for p in pairs) if pairs else 0.0 for i in (0, 1))
            cells.append(f"{mean(p[0] for p in pairs):.3f} ({low:.3f} to {high:.3f})" if pairs else "")
        rows.append([name, *cells])
    columns = [cell for text in texts for cell in (f"KL, {text}", "over as it is")]
    return _markdown(["", "seeds", "CPU s of solving", *columns], rows) if rows else ""


def pictures(folder: Path, to: Path) -> None:
    """KL against size: the three allocations, and every peer a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read(folder)
    text = next(iter(records[0]["texts"]))
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), dpi=130)
    styles = {BASELINE: ("s", "#8a8a8a"), CONTROL: ("^", "#c25a00"), DEFAULT: ("o", "#0b57a4")}
    for name, (mark, colour) in styles.items():
        points = [
            (mean(s[name]["bits"] for s in seeds.values()), mean(s[name]["texts"][text]["kl"] for s in seeds.values()))
            for seeds in _by_budget(records).values()
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=mark, label=STRATEGIES[name].label)
    for record in records:
        if record["part"] == "peers":
            x, y = record["bits"], record["texts"][text]["kl"]
            axes.plot([x], [y], "x", color="#444444", markersize=5)
            axes.annotate(record["name"], (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight of the linear layers, everything stored counted")
    axes.set_ylabel(f"KL from the original, nats a token ({text})")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.tight_layout()
    to.mkdir(parents=True, exist_ok=True)
    figure.savefig(to / "real-model.png")


__all__ = ["pictures", "ratio", "read", "tables"]
