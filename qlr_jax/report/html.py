"""report.html: one self-contained page of a finished job, its figures drawn here, no script and nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from qlr_jax.progress import duration
from qlr_jax.report.allocation import heat_map
from qlr_jax.report.figures import predicted_final, size_damage
from qlr_jax.report.sizes import size_section
from qlr_jax.report.style import CSS
from qlr_jax.report.table import delivery_note, evaluated_on
from qlr_jax.report.words import (
    MISSING,
    MODELS,
    bits,
    is_number,
    median_ratio,
    model_label,
    number,
    part_of,
    percent,
    predicted,
    rank_paid,
    refined_line,
    rows_of,
    size,
    times,
)

HOW = {
    "allocated": "rank and bits of every matrix chosen together",
    "uniform": "one spec everywhere",
    "rank0": "bits of every matrix chosen together, no rank",
}
LOADING = (
    ("JAX", "import qlr_jax as qlr\n\nmodel = qlr.load(FOLDER)\nlogits = model(tokens)  # tokens: integers, (batch, length)"),
    (
        "PyTorch, with transformers alone",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
    ),
)


def report_html(report: Mapping[str, Any]) -> str:
    """A page of `report` (the content of report.json): sizes, figures of merit, the allocation, how to do it again.

    Whatever is missing or null in it is left out or shown as a dash.

    Example:
        >>> report_html({"bits_per_weight": 2.25}).startswith("<!doctype html>")
        True
    """
    name = str(report.get("model") or "Llama model").rstrip("/")
    name = name.rpartition("/")[2] if name.startswith("/") else name  # of a folder, its own name
    sections = [_headline(report, name), size_section(report), _quality(report), heat_map(report), _curves(report), _again(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} at {bits(report.get('bits_per_weight'))} bits per weight</title>\n"
        f"<style>{CSS}</style></head>\n<body><main>\n" + "\n".join(part for part in sections if part) + "\n</main></body></html>\n"
    )


def _headline(report: Mapping[str, Any], name: str) -> str:
    before, after = (part_of(report, "bytes").get(key) for key in ("before", "after"))
    chosen = str(report.get("delivered") or "allocated")
    perplexity = part_of(report, "perplexity")
    original, held_out = perplexity.get("original"), part_of(report, "kl").get(chosen)
    smaller = f", {before / after:.2f} times smaller" if is_number(before) and is_number(after) and after else ""
    budget = f" (budget {report['budget']})" if report.get("budget") else ""
    tiles = (
        (
            bits(report.get("bits_per_weight")),
            f"bits per weight as stored{budget}; whole model {bits(report.get('whole_model_bits_per_weight'))}",
        ),
        (size(after), f"before: {size(before)}{smaller}"),
        (
            number(perplexity.get(chosen), 4),
            f"perplexity; original {number(original, 4)}, {times(perplexity.get(chosen), original)}"
            if is_number(original)
            else "perplexity: no held-out text was given",
        ),
        (
            number(held_out if is_number(held_out) else part_of(report, "calibration_kl").get(chosen)),
            f"KL from the original, nats a token, {'held out' if is_number(held_out) else 'on the calibration text'}",
        ),
    )
    cells = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(says)}</span></div>' for value, says in tiles)
    how = HOW.get(chosen, HOW["allocated"])
    return (
        f'<header><h1>{escape(name)}</h1><p class="soft">Compressed by qlr-jax as W ≈ Q + L R, {how}.</p></header>'
        f'<div class="tiles">{cells}</div>'
    )


def _quality(report: Mapping[str, Any]) -> str:
    """Perplexity, KL and agreement of the four models; KL also as bars, so that they compare at a glance."""
    names = ("perplexity", "kl", "calibration_kl", "agreement")
    found = {key: [part_of(report, name).get(key) for name in names] for key in MODELS}
    found = {key: values for key, values in found.items() if any(is_number(value) for value in values)}
    out = ['<section id="quality"><h2>What it costs in quality</h2>']
    if not found:
        return (
            out[0] + '<p class="note">Not evaluated: perplexity and KL are not known. Measure them with qlr evaluate.</p></section>'
        )
    worst = max([value for values in found.values() for value in values[1:3] if is_number(value)], default=0) or 1
    original = part_of(report, "perplexity").get("original")
    heads = ("model", "perplexity", "ratio", "KL held out", "KL cali\u00adbration", "same top token")
    out.append('<div class="scroll"><table><thead><tr>' + "".join(f"<th>{head}</th>" for head in heads) + "</tr></thead><tbody>")
    for key, (perplexity, kl, calibration, agreement) in found.items():
        delivered = key == report.get("delivered")
        tag = '<span class="tag">delivered</span>' if delivered else ""
        cells = [f"{escape(model_label(key, report))} {tag}", number(perplexity, 4)]
        if key == "original":
            cells += [""] * 4
        else:
            bars = [f"{number(value)}{_meter(value, worst, key)}" for value in (kl, calibration)]
            cells += [times(perplexity, original), *bars, percent(agreement)]
        out.append(f"<tr{' class=chosen' if delivered else ''}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    out.append("</tbody></table></div>")
    if verdict := rank_paid(report):
        out.append(f"<p><b>{escape(verdict)}</b></p>")
    if known := [key for key in MODELS if is_number(predicted(report, key))]:
        pairs = [
            f"{model_label(key, report)} {number(predicted(report, key))} → {number(found[key][2])}"
            for key in known
            if key in found
        ]
        out.append(
            f"<p>KL on the calibration text, predicted before any solve → measured: {escape(', '.join(pairs))}.</p>"
            if pairs
            else ""
        )
    if refined := refined_line(report):
        out.append(f"<p>{escape(refined[:1].upper() + refined[1:])}.</p>")
    if note := delivery_note(report):
        out.append(f'<p class="note">{escape(note)}</p>')
    where = evaluated_on(report)
    out.append(
        f'<p class="soft">{escape(where[:1].upper() + where[1:] + ". ") if where else ""}KL is KL(original ‖ compressed) in nats a '
        "token, mean over positions. <i>uniform</i>: one "
        "spec everywhere, the best that fits the budget. <i>rank 0</i>: the allocation of the same budget without low-rank "
        "terms.</p></section>"
    )
    return "".join(out)


def _meter(value: Any, worst: float, colour: str) -> str:
    width = 100 * value / worst if is_number(value) else 0
    bar = f'<i style="width:{max(width, 1):.0f}%;background:var(--{colour})"></i>'
    return f'<span class="meter">{bar}</span>' if width > 0 else ""


def _curves(report: Mapping[str, Any]) -> str:
    """Damage against size, and predicted against final error, side by side where there is room."""
    damage, prediction = size_damage(report), predicted_final(report)
    out = []
    if damage:
        gap = part_of(report, "allocation").get("gap")
        proved = (
            f" No allocation of this size can do less damage by more than {100 * max(gap, 1e-6):.2g} %." if is_number(gap) else ""
        )
        says = f"Line: the least predicted damage at every size. Marks: circle allocated, square uniform, triangle rank 0.{proved}"
        out.append(
            f'<section id="frontier"><h2>Damage against size</h2><figure>{damage}<figcaption>{says}</figcaption></figure></section>'
        )
    if prediction:
        ratio = median_ratio(rows_of(report, "matrices"))
        says = (
            f"One mark a matrix (circle attention, square MLP); on the dashed line the prediction was exact. "
            f"Final over predicted, median: {number(ratio)}."
        )
        out.append(f'<section id="prediction"><h2>Predicted and final error</h2><figure>{prediction}')
        out[-1] += f"<figcaption>{says}</figcaption></figure></section>"
    return f'<div class="pair">{"".join(out)}</div>' if len(out) == 2 else "".join(out)


def _again(report: Mapping[str, Any]) -> str:
    """How to make the same model again, what it took, and how to load it."""
    out = ['<section id="again"><h2>Do it again</h2>']
    if report.get("command"):
        out.append(f"<h3>Command</h3><pre>{escape(str(report['command']))}</pre>")
    recipe = part_of(report, "recipe")
    if recipe:
        import yaml

        text = yaml.safe_dump(_listed(recipe), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
        out.append(f"<h3>Recipe (seed {escape(str(recipe.get('seed', MISSING)))})</h3><pre>{escape(text.strip())}</pre>")
    versions = ", ".join(f"{name} {value}" for name, value in part_of(report, "versions").items())
    if versions:
        out.append(f"<h3>Versions</h3><p>{escape(versions)}</p>")
    seconds = part_of(report, "seconds").get("total")
    if is_number(seconds):
        memory = report.get("peak_rss_bytes")
        stages = part_of(report, "seconds", "stages").items()
        out.append(f"<h3>Time</h3><p>{duration(seconds)}" + (f", peak memory {size(memory)}" if is_number(memory) else ""))
        spent = "; ".join(f"{name} {duration(value)}" for name, value in stages if is_number(value))
        out.append((f": {escape(spent)}" if spent else "") + ".</p>")
    out = [*out, "</section>"] if len(out) > 1 else []
    out.append('<section id="load"><h2>Load it</h2>')
    out.append('<p class="soft">FOLDER is the folder that this page lies in.</p>')
    out += [f"<h3>{escape(where)}</h3><pre>{escape(code)}</pre>" for where, code in LOADING]
    return "".join(out) + "</section>"


def _listed(value: Any) -> Any:
    """`value` with tuples as lists and unknown things as text, as YAML writes them safely."""
    if isinstance(value, Mapping):
        return {str(key): _listed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
