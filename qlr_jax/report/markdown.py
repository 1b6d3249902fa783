"""report.md: what report.html says, in the same order, as Markdown tables without the figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlr_jax.progress import duration
from qlr_jax.report.content.adapted import HEADS as ADAPTED_HEADS
from qlr_jax.report.content.adapted import adapted_rows, how_line, won_sentence
from qlr_jax.report.content.allocation import (
    KIND_HEADS,
    bound_line,
    by_layer_and_kind,
    kind_rows,
    rank_line,
    specified_matrices,
    spectra_line,
    vocabulary_line,
)
from qlr_jax.report.content.fit import HEADS as FIT_HEADS
from qlr_jax.report.content.fit import advice, fit_rows, fit_sentence
from qlr_jax.report.content.proof import certificate, predictions_line
from qlr_jax.report.content.quality import (
    KL_UNIT,
    NOT_EVALUATED,
    controls_note,
    delivery_note,
    evaluated_on,
    figures,
    rank_paid,
    refined_line,
)
from qlr_jax.report.content.reproduce import (
    FOLDER,
    LOADING,
    commands,
    compressed_as,
    import_notes,
    recipe_text,
    recipe_title,
    versions,
)
from qlr_jax.report.content.running import machine_line, stage_rows
from qlr_jax.report.content.sizes import HEADS as SIZE_HEADS
from qlr_jax.report.content.sizes import size_rows, target_note
from qlr_jax.report.words import bits, is_number, model_label, model_name, number, part_of, percent, sentence, short_spec, times

QUALITY_HEADS = ("model", "perplexity", "ratio", "KL held out", "KL calibration", "same top token")


def report_markdown(report: Mapping[str, Any]) -> str:
    """The content of report.json as Markdown; whatever is missing or null in it is left out or shown as a dash.

    Example:
        >>> report_markdown({"model": "tiny", "bits_per_weight": 2.25}).splitlines()[0]
        '# tiny at 2.25 bits per weight'
    """
    stored = [f"{bits(report.get('bits_per_weight'))} bits per weight"]
    stored += [f"whole model {bits(report['whole_model_bits_per_weight'])}"] if report.get("whole_model_bits_per_weight") else []
    stored += [f"budget {_plain(report['budget'])}"] if report.get("budget") else []
    about = f"Compressed by qlr-jax as W ≈ Q + L R, {compressed_as(report)}: {', '.join(stored)}."
    blocks = [f"# {_plain(model_name(report))} at {bits(report.get('bits_per_weight'))} bits per weight", about]
    sections = {
        "How much memory is saved": [
            _table(SIZE_HEADS, size_rows(report)),
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
        "Load it": [FOLDER] + [f"{where}:\n\n{_code(code, 'python')}" for where, code in LOADING],
    }
    for title, parts in sections.items():
        found = [part for part in parts if part]
        blocks += [f"## {title}", *found] if found else []
    return "\n\n".join(blocks) + "\n"


def _fit(report: Mapping[str, Any]) -> list[str]:
    rows = fit_rows(report)
    return [_plain(fit_sentence(report)), _table(FIT_HEADS, rows)] if rows else [advice(report)]


def _quality(report: Mapping[str, Any]) -> list[str]:
    rows, original = [], part_of(report, "perplexity").get("original")
    for key, row in figures(report).items():
        name = model_label(key, report) + (" (delivered)" if key == report.get("delivered") else "")
        compared = ["", "", "", ""]
        if key != "original":
            compared = [times(row["perplexity"], original), number(row["kl"]), number(row["calibration_kl"])]
            compared.append(percent(row["agreement"]))
        rows.append((name, number(row["perplexity"], 4), *compared))
    if not rows:
        return [NOT_EVALUATED]
    sentences = [rank_paid(report), sentence(refined_line(report)), delivery_note(report), controls_note(report)]
    where = _sentence(evaluated_on(report))
    return [_table(QUALITY_HEADS, rows), *map(_plain, sentences), f"{where} {KL_UNIT}".strip()]


def _adapted(report: Mapping[str, Any]) -> list[str]:
    verdict = str(part_of(report, "adapted").get("verdict") or "")
    table = _table(ADAPTED_HEADS, adapted_rows(report))
    return [_plain(won_sentence(report)), table, _plain(verdict), _sentence(how_line(report))]


def _allocation(report: Mapping[str, Any]) -> list[str]:
    matrices = specified_matrices(report)
    if not matrices:
        return [_plain(spectra_line(report))]
    layers, kinds, placed = by_layer_and_kind(matrices)
    specs = [[str(at), *[short_spec(placed.get((at, kind), {}).get("spec")) for kind in kinds]] for at in layers]
    lines = filter(None, (vocabulary_line(matrices), rank_line(matrices)))
    out = [*map(_sentence, lines), _table(KIND_HEADS, kind_rows(report)), _table(("layer", *kinds), specs)]
    meaning = "Errors, bounds and sensitivities are medians. Sensitivity: KL for each unit of squared relative error."
    known = any(is_number(matrix.get(key)) for matrix in matrices for key in ("relative_error", "sensitivity"))
    return [*out, meaning if known else "", _sentence(bound_line(matrices)), _plain(spectra_line(report))]


def _again(report: Mapping[str, Any]) -> list[str]:
    out = [_code(typed, "sh")] if (typed := commands(report)) else []
    out += [_plain(line) for line in import_notes(report)]
    if recipe := recipe_text(report):
        out.append(f"{recipe_title(report)}:\n\n{_code(recipe, 'yaml')}")
    return [*out, f"Versions: {_plain(found)}." if (found := versions(report)) else ""]


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
    return _plain(sentence(text))


def _code(text: str, language: str) -> str:
    """A block of code; its fence is longer than any within."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"
