"""What adaptation won back: before and after, how it was trained, and the losses on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.progress import duration
from qlr_jax.report.words import bits, is_number, number, part_of, percent, rows_of, size

HEADS = ("", "before", "after", "change")
LOSSES = {"kl": "KL to the original", "text": "the next token's loss", "mix": "KL to the original and the next token's loss"}


def won_back(report: Mapping[str, Any]) -> float | None:
    """The share of the KL from the original that adaptation took away, below 0 where it rose; None where it is not known.

    >>> round(won_back({"adapted": {"before": {"kl": 0.05}, "after": {"kl": 0.04}}}), 3)
    0.2
    """
    before, after = (part_of(report, "adapted", key).get("kl") for key in ("before", "after"))
    return 1 - after / before if is_number(before) and is_number(after) and before > 0 else None


def won_sentence(report: Mapping[str, Any]) -> str:
    """`won_back` as a sentence; empty where it is not known."""
    share = won_back(report)
    if share is None:
        return ""
    before, after = (number(part_of(report, "adapted", key).get("kl")) for key in ("before", "after"))
    if share <= 0:
        return f"Adaptation won nothing back: KL {before} before, {after} after."
    return f"Adaptation won back {percent(share)} of the KL that compression had cost: {before} before, {after} after."


def adapted_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Figure, before, after, change; only those that are known."""
    found = part_of(report, "adapted")
    before, after = part_of(found, "before"), part_of(found, "after")
    rows = []
    for key, name, written in (
        ("kl", "KL, nats a token", number),
        ("perplexity", "perplexity", _four),
        ("agreement", "same top token", percent),
    ):
        old, new = before.get(key), after.get(key)
        if is_number(old) or is_number(new):
            rows.append((name, written(old), written(new), _points(old, new) if key == "agreement" else _change(old, new)))
    old, new = found.get("bits_per_weight_before"), found.get("bits_per_weight")
    if is_number(old) or is_number(new):
        rows.append(("bits per weight", bits(old), bits(new), _change(old, new)))
    if weights := _weights(report):
        stored = [value * weights / 8 if is_number(value) else None for value in (old, new)]
        if any(is_number(value) for value in stored):
            rows.append(("matrices, stored", size(stored[0]), size(stored[1]), _change(*stored)))
    return rows


def how_line(report: Mapping[str, Any]) -> str:
    """What was trained, on which loss, how long, and on what text it was evaluated; empty where nothing of it is known."""
    found = part_of(report, "adapted")
    trained, words = found.get("trained"), []
    if isinstance(trained, list | tuple) and trained:
        words.append(f"trained: {', '.join(str(part) for part in trained)}")
    if found.get("loss"):
        words.append(f"on {LOSSES.get(str(found['loss']), str(found['loss']))}")
    if is_number(found.get("steps")):
        words.append(f"{found['steps']:,} steps")
    if is_number(found.get("seconds")):
        words.append(f"in {duration(found['seconds'])}")
    text = f"{found['tokens']:,} tokens" if is_number(found.get("tokens")) else ""
    text += (" of " if text else "") + str(found["text"]) if found.get("text") else ""
    words += [f"evaluated on {text}"] if text else []
    return ", ".join(words)


def points_of(report: Mapping[str, Any]) -> tuple[list[tuple[float, float]], list[tuple[float, float]], list[tuple[float, str]]]:
    """(step, loss), (step, held-out loss), (step at which it begins, phase); steps counted on from phase to phase."""
    trained, held_out, starts = [], [], []
    offset = last = 0.0
    for entry in rows_of(report, "adapted", "history"):
        if not is_number(entry.get("step")):
            continue
        name = str(entry.get("phase") or "")
        if not starts or starts[-1][1] != name:
            offset = last
            starts.append((offset, name))
        last = offset + entry["step"]
        if is_number(entry.get("loss")):
            trained.append((last, entry["loss"]))
        if is_number(entry.get("held_out")):
            held_out.append((last, entry["held_out"]))
    return trained, held_out, starts


def _weights(report: Mapping[str, Any]) -> int:
    """How many weights the compressed matrices have; 0 where one's shape is not known."""
    shapes = [matrix.get("shape") for matrix in rows_of(report, "matrices")]
    known = [
        shape[0] * shape[1]
        for shape in shapes
        if isinstance(shape, list | tuple) and len(shape) == 2 and all(map(is_number, shape))
    ]
    return sum(known) if len(known) == len(shapes) else 0


def _four(value: Any) -> str:
    return number(value, 4)


def _change(old: Any, new: Any) -> str:
    if not (is_number(old) and is_number(new) and old):
        return ""
    share = new / old - 1
    return "the same" if abs(share) < 5e-5 else f"{'+' if share > 0 else '−'}{100 * abs(share):.3g} %"


def _points(old: Any, new: Any) -> str:
    """The difference of two shares, in points of a percent."""
    return f"{100 * (new - old):+.1f} points".replace("-", "−") if is_number(old) and is_number(new) else ""
