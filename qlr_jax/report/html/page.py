"""report.html: one self-contained page of a finished job, its figures drawn here, no script and nothing loaded from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from allocators.strategies import STRATEGIES, solved_strategies
from qlr_jax.progress import duration
from qlr_jax.report.html.adapted import adapted_section, commands, won_back
from qlr_jax.report.html.allocation import heat_map
from qlr_jax.report.html.figures import proof_section
from qlr_jax.report.html.fit import fit_section, needs
from qlr_jax.report.html.sizes import size_section
from qlr_jax.report.html.spectra import why_section
from qlr_jax.report.html.style import CSS
from qlr_jax.report.terminal.table import delivery_note, evaluated_on
from qlr_jax.report.words import (
    MISSING,
    MODELS,
    bits,
    delivered_key,
    is_number,
    listed,
    model_label,
    model_name,
    number,
    part_of,
    percent,
    rank_paid,
    refined_line,
    size,
    strategy_of,
    times,
)

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
    """A page of `report` (the content of report.json), in the order in which one who decides asks.

    Memory saved, whether it fits, quality lost, what adaptation won back, what it cost, where bits and rank went and why, what is
    proved, how to make it again and load it. Whatever is missing or null is left out or shown as a dash.

    Example:
        >>> report_html({"bits_per_weight": 2.25}).startswith("<!doctype html>")
        True
    """
    name = model_name(report)
    sections = [
        _headline(report, name),
        size_section(report),
        fit_section(report),
        _quality(report),
        adapted_section(report),
        _cost(report),
        heat_map(report),
        why_section(report),
        proof_section(report),
        _again(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} at {bits(report.get('bits_per_weight'))} bits per weight</title>\n"
        f"<style>{CSS}</style></head>\n<body><main>\n" + "\n".join(part for part in sections if part) + "\n</main></body></html>\n"
    )


def _headline(report: Mapping[str, Any], name: str) -> str:
    before, after = (part_of(report, "bytes").get(key) for key in ("before", "after"))
    chosen = delivered_key(report)
    perplexity = part_of(report, "perplexity")
    original, held_out = perplexity.get("original"), part_of(report, "kl").get(chosen)
    smaller = f", {before / after:.2f} times smaller" if is_number(before) and is_number(after) and after else ""
    budget = f" Budget: {report['budget']}." if report.get("budget") else ""
    counted = "of the factors alone" if report.get("target") == "adapter" else "as stored"
    tiles = [
        (size(after), f"before: {size(before)}{smaller}"),
        (
            bits(report.get("bits_per_weight")),
            f"bits per weight {counted}; whole model {bits(report.get('whole_model_bits_per_weight'))}",
        ),
    ]
    if need := needs(report).get("after"):
        tiles.append(("fits" if need.fits else "too large", f"{size(need.total)} needed of {size(need.limit)}"))
    tiles += [
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
    ]
    if is_number(share := won_back(report)):
        tiles.append((percent(max(share, 0.0)), "of its KL won back by adaptation"))
    cells = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(says)}</span></div>' for value, says in tiles)
    how = strategy_of(report, chosen).text
    return (
        f'<header><h1>{escape(name)}</h1><p class="soft">Compressed by qlr-jax as W ≈ Q + L R, {how}.{escape(budget)}</p></header>'
        f'<div class="tiles">{cells}</div>'
    )


def _quality(report: Mapping[str, Any]) -> str:
    """Perplexity, KL and agreement of the four models; KL also as bars, so that they compare at a glance."""
    names = ("perplexity", "kl", "calibration_kl", "agreement")
    found = {key: [part_of(report, name).get(key) for name in names] for key in MODELS}
    found = {key: values for key, values in found.items() if any(is_number(value) for value in values)}
    out = ['<section id="quality"><h2>What quality was lost</h2>']
    if not found:
        return (
            out[0] + '<p class="note">Not evaluated: perplexity and KL are not known. Measure them with qlr evaluate.</p></section>'
        )
    worst = max([value for values in found.values() for value in values[1:3] if is_number(value)], default=0) or 1
    original = part_of(report, "perplexity").get("original")
    heads = ("model", "perplexity", "KL held out", "KL cali\u00adbration", "same top token")
    out.append('<div class="scroll"><table><thead><tr>' + "".join(f"<th>{head}</th>" for head in heads) + "</tr></thead><tbody>")
    for key, (perplexity, kl, calibration, agreement) in found.items():
        delivered = key == report.get("delivered")
        tag = ' <span class="tag">delivered</span>' if delivered else ""
        cells = [f"{_breakable(model_label(key, report))}{tag}", number(perplexity, 4)]
        if key == "original":
            cells += [""] * 3
        else:
            cells[1] += f" <small>{times(perplexity, original)}</small>"
            cells += [*[f"{number(value)}{_meter(value, worst, key)}" for value in (kl, calibration)], percent(agreement)]
        out.append(f"<tr{' class=chosen' if delivered else ''}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    out.append("</tbody></table></div>")
    if verdict := rank_paid(report):
        out.append(f"<p><b>{escape(verdict)}</b></p>")
    if refined := refined_line(report):
        out.append(f"<p>{escape(refined[:1].upper() + refined[1:])}.</p>")
    if note := delivery_note(report):
        out.append(f'<p class="note">{escape(note)}</p>')
    where = evaluated_on(report)
    out.append(
        f'<p class="soft">{escape(where[:1].upper() + where[1:] + ". ") if where else ""}KL is KL(original ‖ compressed) in nats a '
        "token, mean over positions. "
        + " ".join(f"<i>{escape(s.label)}</i>: {escape(s.text)}." for s in [STRATEGIES[name] for name in solved_strategies()[1:]])
        + "</p></section>"
    )
    return "".join(out)


def _meter(value: Any, worst: float, colour: str) -> str:
    width = 100 * value / worst if is_number(value) else 0
    bar = f'<i style="width:{max(width, 1):.0f}%;background:var(--{colour})"></i>'
    return f'<span class="meter">{bar}</span>' if width > 0 else ""


def _breakable(label: str) -> str:
    """A model's name that may break where its spec has a joint, so that a phone's table holds a long one."""
    return re.sub(r"([+/@])", r"<wbr>\1", escape(label))


def stage_rows(report: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The stages with their seconds; an adaptation, which came after, last."""
    stages = [(str(name), value) for name, value in part_of(report, "seconds", "stages").items() if is_number(value)]
    adapted = part_of(report, "adapted").get("seconds")
    return [*stages, ("adaptation, afterwards", adapted)] if is_number(adapted) else stages


def machine_line(report: Mapping[str, Any]) -> str:
    """Time in all, peak memory, and what it ran on; empty where nothing of it is known."""
    seconds, memory, cores = part_of(report, "seconds").get("total"), report.get("peak_rss_bytes"), report.get("cores")
    device = str(report.get("device") or "")
    words = [duration(seconds)] if is_number(seconds) else []
    words += [f"peak memory {size(memory)}"] if is_number(memory) else []
    words += [f"on {'the CPU' if device == 'cpu' else device}"] if device else []
    words += (
        [f"{cores} {'core' if cores == 1 else 'cores'}{'' if device in ('', 'cpu') else ' beside it'}"] if is_number(cores) else []
    )
    return ", ".join(words)


def _cost(report: Mapping[str, Any]) -> str:
    """Time by stage, peak memory, device; empty where nothing of it is known."""
    rows, machine = stage_rows(report), machine_line(report)
    if not rows and not machine:
        return ""
    out = ['<section id="cost"><h2>What it cost</h2>' + (f"<p>{escape(machine)}.</p>" if machine else "")]
    if rows:
        longest = max(value for _, value in rows) or 1
        body = "".join(
            f"<tr><td>{escape(name)}</td><td>{duration(value)}</td><td>{_meter(value, longest, 'rest')}</td></tr>"
            for name, value in rows
        )
        out.append(f"<table><thead><tr><th>stage</th><th>time</th><th></th></tr></thead><tbody>{body}</tbody></table>")
    return "".join(out) + "</section>"


def _again(report: Mapping[str, Any]) -> str:
    """How to make the same model again, and how to load it."""
    out = ['<section id="again"><h2>Do it again</h2>']
    if typed := commands(report):
        out.append(f"<h3>Command</h3><pre>{escape(typed)}</pre>")
    recipe = part_of(report, "recipe")
    if recipe:
        import yaml

        text = yaml.safe_dump(listed(recipe), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
        out.append(f"<h3>Recipe (seed {escape(str(recipe.get('seed', MISSING)))})</h3><pre>{escape(text.strip())}</pre>")
    versions = ", ".join(f"{name} {value}" for name, value in part_of(report, "versions").items())
    if versions:
        out.append(f"<h3>Versions</h3><p>{escape(versions)}</p>")
    out = [*out, "</section>"] if len(out) > 1 else []
    out.append('<section id="load"><h2>Load it</h2>')
    out.append('<p class="soft">FOLDER is the folder that this page lies in.</p>')
    out += [f"<h3>{escape(where)}</h3><pre>{escape(code)}</pre>" for where, code in LOADING]
    return "".join(out) + "</section>"
