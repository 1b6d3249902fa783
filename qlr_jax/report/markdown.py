"""report.md: what report.html says, in the same order, as Markdown tables without the figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlr_jax.progress import duration
from qlr_jax.report.html.adapted import adapted_rows, commands, how_line, won_sentence
from qlr_jax.report.html.figures import certificate, predictions_line
from qlr_jax.report.html.fit import ADVICE, fit_rows, fit_sentence
from qlr_jax.report.html.page import LOADING, machine_line, stage_rows
from qlr_jax.report.html.sizes import size_rows, target_note
from qlr_jax.report.html.spectra import LEADING, kind_rows, spectra_line
from qlr_jax.report.terminal.table import delivery_note, evaluated_on
from qlr_jax.report.words import (
    MISSING,
    MODELS,
    bits,
    delivered_key,
    is_number,
    kind_of,
    kind_order,
    listed,
    model_label,
    model_name,
    number,
    part_of,
    percent,
    rank_line,
    rank_paid,
    refined_line,
    rows_of,
    short_spec,
    strategy_of,
    times,
)


def report_markdown(report: Mapping[str, Any]) -> str:
    """The content of report.json as Markdown; whatever is missing or null in it is left out or shown as a dash.

    Example:
        >>> report_markdown({"model": "tiny", "bits_per_weight": 2.25}).splitlines()[0]
        '# tiny at 2.25 bits per weight'
    """
    stored = [f"{bits(report.get('bits_per_weight'))} bits per weight"]
    stored += [f"whole model {bits(report['whole_model_bits_per_weight'])}"] if report.get("whole_model_bits_per_weight") else []
    stored += [f"budget {_plain(report['budget'])}"] if report.get("budget") else []
    about = f"Compressed by qlr-jax as W ≈ Q + L R, {strategy_of(report, delivered_key(report)).text}: {', '.join(stored)}."
    blocks = [f"# {_plain(model_name(report))} at {bits(report.get('bits_per_weight'))} bits per weight", about]
    sections = {
        "How much memory is saved": [
            _table(("part", "before", "after", "after / before"), size_rows(report)),
            _plain(target_note(report)),
        ],
        "Does it fit?": _fit(report),
        "What quality was lost": _quality(report),
        "What adaptation won back": _adapted(report),
        "What it cost": [
            _sentence(machine_line(report)),
            _table(("stage", "time"), [(name, duration(value)) for name, value in stage_rows(report)]),
        ],
        "Where bits and rank went": _allocation(report),
        "What is proved": [_plain(" ".join(certificate(report))), _plain(predictions_line(report))],
        "Do it again": _again(report),
        "Load it": ["FOLDER is the folder that this page lies in."]
        + [f"{where}:\n\n{_code(code, 'python')}" for where, code in LOADING],
    }
    for title, parts in sections.items():
        found = [part for part in parts if part]
        blocks += [f"## {title}", *found] if found else []
    return "\n\n".join(blocks) + "\n"


def _fit(report: Mapping[str, Any]) -> list[str]:
    rows = fit_rows(report)
    if not rows:
        return [ADVICE] if str(report.get("budget") or "").strip().lower().endswith("bpw") else []
    return [_plain(fit_sentence(report)), _table(("", "before", "after"), rows)]


def _quality(report: Mapping[str, Any]) -> list[str]:
    rows, original = [], part_of(report, "perplexity").get("original")
    for key in MODELS:
        found = [part_of(report, name).get(key) for name in ("perplexity", "kl", "calibration_kl", "agreement")]
        if not any(is_number(value) for value in found):
            continue
        perplexity, kl, calibration, agreement = found
        name = model_label(key, report) + (" (delivered)" if key == report.get("delivered") else "")
        compared = (
            ["", "", "", ""]
            if key == "original"
            else [times(perplexity, original), number(kl), number(calibration), percent(agreement)]
        )
        rows.append((name, number(perplexity, 4), *compared))
    if not rows:
        return ["Not evaluated: perplexity and KL are not known. Measure them with qlr evaluate."]
    heads = ("model", "perplexity", "ratio", "KL held out", "KL calibration", "same top token")
    where = _sentence(evaluated_on(report))
    unit = "KL is KL(original ‖ compressed) in nats a token, mean over positions."
    said = [rank_paid(report), _sentence(refined_line(report)), delivery_note(report)]
    return [_table(heads, rows), *map(_plain, said), f"{where} {unit}".strip()]


def _adapted(report: Mapping[str, Any]) -> list[str]:
    verdict = str(part_of(report, "adapted").get("verdict") or "")
    table = _table(("", "before", "after", "change"), adapted_rows(report))
    return [_plain(won_sentence(report)), table, _plain(verdict), _sentence(how_line(report))]


def _allocation(report: Mapping[str, Any]) -> list[str]:
    matrices = [matrix for matrix in rows_of(report, "matrices") if matrix.get("spec")]
    if not matrices:
        return [_plain(spectra_line(report))]
    heads = ("kind", "bits per weight", "rank", "sensitivity, median", f"held by {LEADING} components")
    out = [_sentence(rank_line(matrices)), _table(heads, kind_rows(report))]
    placed = {(matrix["layer"], kind_of(matrix)): matrix for matrix in matrices if isinstance(matrix.get("layer"), int)}
    if placed:
        kinds = kind_order(kind for _, kind in placed)
        rows = [
            (str(layer), *[short_spec(placed.get((layer, kind), {}).get("spec")) for kind in kinds])
            for layer in sorted({layer for layer, _ in placed})
        ]
        out.append(_table(("layer", *kinds), rows))
    meaning = "Sensitivity: KL for each unit of squared relative error."
    return [*out, meaning if any(is_number(matrix.get("sensitivity")) for matrix in matrices) else "", _plain(spectra_line(report))]


def _again(report: Mapping[str, Any]) -> list[str]:
    out = [_code(typed, "sh")] if (typed := commands(report)) else []
    recipe = part_of(report, "recipe")
    if recipe:
        import yaml

        text = yaml.safe_dump(listed(recipe), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
        out.append(f"Recipe (seed {recipe.get('seed', MISSING)}):\n\n{_code(text, 'yaml')}")
    versions = ", ".join(f"{name} {value}" for name, value in part_of(report, "versions").items())
    return [*out, f"Versions: {_plain(versions)}." if versions else ""]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right; empty without rows."""
    if not rows:
        return ""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *[[_plain(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: Any) -> str:
    r"""Text that Markdown shows as it is, on one line, in a table too.

    >>> print(_plain("a|b <i> \n*c*"))
    a\|b \<i> \*c\*
    """
    return re.sub(r"([\\`*_|<\[])", r"\\\1", " ".join(str(text).split()))


def _sentence(text: str) -> str:
    """A line as a sentence of its own; empty for an empty one."""
    return _plain(text[:1].upper() + text[1:]) + "." if text else ""


def _code(text: str, language: str) -> str:
    """A block of code; its fence is longer than any within."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"
