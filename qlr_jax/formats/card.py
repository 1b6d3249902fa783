"""The model card: README.md of a folder that is passed on, with the facts recorded of the model and nothing else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml

import qlr_jax
from allocators.strategies import DEFAULT
from qlr_jax.errors import QLRError
from qlr_jax.paths import local

CARD = "README.md"
LIBRARIES = {"gguf": "gguf", "orbax": "jax"}  # by target; transformers loads the others
FORMATS = {
    "qlr": "Packed: codes, scales and factors as they were compressed, decoded by the `modeling_qlr.py` that lies beside them.",
    "dense": "Dense: every weight decoded, a plain Llama folder for any tool that reads one.",
    "peft": "Backbones as the base model, low-rank factors beside them as a LoRA adapter.",
    "compressed-tensors": "Backbones as packed integers in the compressed-tensors format.",
    "gguf": "Backbones as GGUF blocks, for llama.cpp.",
    "orbax": "Packed, as an Orbax checkpoint that qlr-jax restores on a mesh of devices.",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def card_text(out: str | Path, *, target: str, snippet: str, notes: Sequence[str] = (), size: int | None = None) -> str:
    """The card of a packed folder's export: `card_of` with the facts in config.json and report.json of `out`.

    Args:
        out: the packed folder; facts that it lacks (no config of ours, no readable report) the card leaves out.
        target: the export's format, one of FORMATS.
        snippet: Python that loads the export.
        notes: sentences on this export, one a list item.
        size: bytes of the export's weights.

    Returns:
        Markdown, for README.md.
    """
    from qlr_jax.formats.qlr.packed import read_config  # brings JAX along, which `card_of` does not need

    try:
        quantization = read_config(out)[1]
    except QLRError:
        quantization = {}
    try:
        report = json.loads((local(out) / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = None
    base = _part(quantization, "settings").get("base_model")
    made_by = quantization.get("qlr_version", "")
    return card_of(report, base, target=target, snippet=snippet, notes=notes, size=size, version=made_by)


def card_of(
    report: Mapping[str, Any] | None,
    base: str | None,
    *,
    target: str,
    snippet: str,
    notes: Sequence[str] = (),
    size: int | None = None,
    version: str = "",
) -> str:
    """The card of a model with this report; what the report lacks the card leaves out.

    Args:
        report: what report.json holds, or None.
        base: folder or hub name of the original; the report's "model" where None.
        target: as in `card_text`, and so are `snippet`, `notes` and `size`.
        snippet: Python that loads the model.
        notes: sentences on this export.
        size: bytes of its weights.
        version: of the qlr-jax that compressed it, where the report has none.

    Returns:
        Markdown with a YAML head.

    Example:
        >>> text = card_of({"bits_per_weight": 2.25, "budget": "2.25bpw"}, "org/llama", target="dense", snippet="...")
        >>> [line for line in text.splitlines() if line.startswith(("base_model:", "# ", "| Budget"))]
        ['base_model: org/llama', '# llama at 2.25 bits a weight', '| Budget | `2.25bpw` |']
    """
    report = report if isinstance(report, Mapping) else {}
    base = base or report.get("model")
    base = base if isinstance(base, str) else None
    if base and _on_hub(name := base.partition("@")[0]):
        base = name  # the hub links models, not revisions of them
    bits = report.get("bits_per_weight")
    title = f"# {_name(base)}" + (f" at {bits:.4g} bits a weight" if _is_number(bits) else ", compressed")
    about = "Compressed by qlr-jax, which keeps linear layers as W ≈ g · Uᵀ (Q + L diag(s) R) V."
    blocks = [_head(base, target), title, f"{about} {FORMATS.get(target, '')}".rstrip(), _facts(report, base, size)]
    if quality := _quality(report):
        blocks += ["## Quality", quality]
    blocks += ["## How to load it", _fenced(snippet, "python")]
    if notes:
        blocks += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    blocks += ["## How it was made", _made(report, target, version)]
    return "\n\n".join(blocks) + "\n"


def _head(base: str | None, target: str) -> str:
    head: dict[str, Any] = {"library_name": LIBRARIES.get(target, "transformers"), "pipeline_tag": "text-generation"}
    if _on_hub(base):
        head |= {"base_model": base, "base_model_relation": "quantized"}
    head["tags"] = ["llama", "qlr-jax", "quantized", *([target] if target in FORMATS and target != "qlr" else [])]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _facts(report: Mapping[str, Any], base: str | None, size: int | None) -> str:
    named = f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else _name(base) if base else None
    budget, sizes = report.get("budget"), _part(report, "bytes")
    before, after = (_size(sizes.get(key)) for key in ("before", "after"))
    rows = {
        "Base model": named,
        "Budget": f"`{budget}`" if budget else None,
        "Bits a weight, of the compressed matrices": _number(report.get("bits_per_weight"), 5),
        "Bits a weight, of the whole model": _number(report.get("whole_model_bits_per_weight"), 5),
        "Size as compressed": f"{before} → {after}" if before and after else None,
        "Size of the weights in this folder": _size(size),
    }
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else "Nothing more is recorded of it."


def _quality(report: Mapping[str, Any]) -> str:
    """The delivered model beside the original, on held-out text; on calibration text where there is no other; else empty."""
    mine = report.get("delivered") or DEFAULT
    perplexity, evaluation = _part(report, "perplexity"), _part(report, "evaluation")
    agreement = _part(report, "agreement").get(mine)
    same = f"{100 * agreement:.1f} %" if _is_number(agreement) else None
    rows = {
        "Perplexity": (_number(perplexity.get("original"), 4), _number(perplexity.get(mine), 4)),
        "KL(original ‖ compressed), nats a token": ("0", _number(_part(report, "kl").get(mine), 3)),
        "Same most likely token": ("100 %", same),
    }
    lines = [f"| {key} | {a or '–'} | {b} |" for key, (a, b) in rows.items() if b]
    if lines:
        units = {"tokens": "tokens", "window": "a window"}
        counts = [f"{evaluation[key]} {unit}" for key, unit in units.items() if evaluation.get(key)]
        on = f"on {_cell(evaluation['text'])}" if evaluation.get("text") else "on held-out text"
        how = f"Measured on the packed model, in float32, {on}" + (f" ({', '.join(counts)})" if counts else "") + "."
        return "\n".join([how, "", "| | original | this model |", "| --- | --- | --- |", *lines])
    kl = _number(_part(report, "calibration_kl").get(mine), 3)
    return f"KL(original ‖ compressed) is {kl} nats a token on the calibration text; held-out text was not measured." if kl else ""


def _made(report: Mapping[str, Any], target: str, version: str) -> str:
    by = _part(report, "versions").get("qlr-jax") or version
    steps = [f"Compressed with qlr-jax {by}"] if by else []
    steps += [f"written as {target} with qlr-jax {qlr_jax.__version__}"] if target != "qlr" else []
    text = (", ".join(steps) or f"qlr-jax {qlr_jax.__version__}").strip()
    command = report.get("command")
    return f"{text[0].upper()}{text[1:]}." + (f"\n\n{_fenced(command, 'sh')}" if command else "")


def _on_hub(base: str | None) -> bool:
    """Whether this has the form owner/name and is no folder of this machine."""
    return bool(base and _HUB_NAME.fullmatch(base) and not Path(base).exists())


def _name(base: str | None) -> str:
    return Path(base).name or base if base else "A Llama"


def _part(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = of.get(key)
    return found if isinstance(found, Mapping) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any, digits: int) -> str | None:
    return f"{value:.{digits}g}" if _is_number(value) else None


def _size(value: Any) -> str | None:
    if not _is_number(value):
        return None
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value} B"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _fenced(text: str, language: str) -> str:
    """A code block; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"
