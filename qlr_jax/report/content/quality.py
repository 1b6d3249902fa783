"""What quality was lost: figures of the four models, whether rank paid, what refining brought, what was delivered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allocators.strategies import BASELINE, CONTROL, DEFAULT, solved_strategies
from qlr_jax.report.words import (
    MISSING,
    MODELS,
    is_number,
    model_label,
    number,
    part_of,
    percent,
    quick_state_bits,
    strategy_of,
    was_asked,
)

NEAR = 0.01  # KLs that differ by less are called equal: seeds alone make them differ by more
NOT_EVALUATED = "Not evaluated: perplexity and KL are not known. Measure them with qlr evaluate."
KL_UNIT = "KL is KL(original ‖ compressed) in nats a token, mean over positions."
FIGURES = ("perplexity", "kl", "calibration_kl", "agreement")


def figures(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Model -> its perplexity, kl, calibration_kl and agreement; models of which none is known are left out."""
    found = {key: {name: part_of(report, name).get(key) for name in FIGURES} for key in MODELS}
    return {key: row for key, row in found.items() if any(is_number(value) for value in row.values())}


def rank_verdict(with_rank: Any, without: Any) -> tuple[str, str]:
    """Whether rank paid, and by how much: two damages in words; both empty where one is not known.

    >>> rank_verdict(0.0308, 0.0335), rank_verdict(0.0310, 0.0311), rank_verdict(0.035, 0.0335)
    (('paid', '8.1 % less'), ('made no difference', '0.3 % less'), ('did not pay', '4.5 % more'))
    """
    if not (is_number(with_rank) and is_number(without) and without > 0):
        return "", ""
    less = 1 - with_rank / without
    how = f"{percent(abs(less))} {'less' if less > 0 else 'more'}" if less else "the same"
    return "made no difference" if abs(less) < NEAR else "paid" if less > 0 else "did not pay", how


def rank_paid(report: Mapping[str, Any]) -> str:
    """Whether low-rank terms paid at the bytes of a finished job, in a sentence; empty where it was not measured alike.

    >>> rank_paid({"kl": {"allocated": 0.0308, "rank0": 0.0335}})
    'At these bytes rank paid: KL 0.0308 against 0.0335 without, 8.1 % less (held-out).'
    """
    if quick_state_bits(report):
        return ""
    for name, where in (("kl", "held-out"), ("calibration_kl", "calibration text")):
        found = [part_of(report, name).get(key) for key in (DEFAULT, CONTROL)]
        verdict, how = rank_verdict(*found)
        if verdict and strategy_of(report, DEFAULT).ranks:
            start = f"At these bytes rank {verdict}" if verdict == "paid" else f"Rank {verdict}"
            return f"{start}: KL {number(found[0])} against {number(found[1])} without, {how} ({where})."
    return ""


def predicted(report: Mapping[str, Any], key: str) -> Any:
    """The KL on the calibration text that was predicted of a model before it was solved; None where that is not known."""
    value = part_of(report, "points", key).get("damage")
    if value is None and key == report.get("delivered"):
        value = part_of(report, "allocation").get("damage")
    return value


def refined_line(report: Mapping[str, Any]) -> str:
    """What refining by measuring other allocations brought, in a line; empty where the job did none.

    >>> refined_line({"refined": {"start": 0.025, "measured": 0.0246, "tried": 24, "accepted": 5}})
    'refined: 5 of 24 proposals accepted, calibration KL 1.6 % lower'
    >>> refined_line({"refined": {"start": 0.025, "measured": 0.025, "tried": 3, "accepted": 0}})
    'refined: nothing gained, other allocations built and measured: 3'
    """
    found = part_of(report, "refined")
    if not is_number(found.get("tried")):
        return ""
    if not found.get("accepted"):
        return f"refined: nothing gained, other allocations built and measured: {found['tried']}"
    line = f"refined: {found.get('accepted', MISSING)} of {found['tried']} proposals accepted"
    start, share, measured = (found.get(key) for key in ("start", "gained", "measured"))
    if is_number(start) and start > 0 and is_number(measured):
        share = 1 - measured / start
    return f"{line}, calibration KL {percent(max(share, 0.0))} lower" if is_number(share) else line


def delivery_note(report: Mapping[str, Any]) -> str:
    """A sentence where a strategy was asked for, or another model than the allocated one was delivered; else empty."""
    key, kl = report.get("delivered"), part_of(report, "calibration_kl")
    if key == DEFAULT and was_asked(report):
        strategy, found = strategy_of(report, key), [kl.get(name) for name in (DEFAULT, BASELINE)]
        above = is_number(found[0]) and is_number(found[1]) and found[0] > found[1]
        more = f"; its KL on the calibration text is above that of {model_label(BASELINE, report)}" if above else ""
        return f"Delivered as asked for: {strategy.label} ({strategy.text}){more}."
    if key not in solved_strategies() or key == DEFAULT:
        return ""
    name = model_label(key, report)
    return f"The allocation's KL on the calibration text was above that of {name}, so {name} is what was delivered."


def controls_note(report: Mapping[str, Any]) -> str:
    """How far uniform and rank 0 may be compared with what was delivered, where that is less than usual; else empty.

    >>> controls_note({"controls": {"mode": "none"}}).partition(":")[0]
    'Uniform and rank 0 were not solved (controls'
    """
    mode, kl = part_of(report, "controls").get("mode"), part_of(report, "calibration_kl")
    if mode == "none":
        return (
            "Uniform and rank 0 were not solved (controls: none): nothing here says what they would have reached. "
            "--controls full solves them as well."
        )
    if mode != "quick":
        return ""
    fewer = quick_state_bits(report)
    how = (
        f"Uniform and rank 0 were solved quickly, at {fewer} state bits in place of {part_of(report, 'recipe').get('state_bits')}: "
        "for that alone their KL is higher, and"
        if fewer
        else "Uniform and rank 0 were quick controls:"
    )
    note = f"{how} they decided nothing of what is delivered. --controls full solves them like it."
    better = [key for key in kl if key != DEFAULT and is_number(kl[key]) and is_number(kl.get(DEFAULT)) and kl[key] < kl[DEFAULT]]
    if better and not was_asked(report):
        names = " and ".join(model_label(key, report) for key in better)
        note += f" Even so {names} measured better on the calibration text, so that is worth doing here."
    return note


def evaluated_on(report: Mapping[str, Any]) -> str:
    """What a job was evaluated on, in a few words; empty where that is not known."""
    about = part_of(report, "evaluation")
    words = []
    if is_number(about.get("tokens")):
        words.append(f"{about['tokens']:,} tokens")
    if about.get("text"):
        words.append(f"of {about['text']}")
    if is_number(about.get("window")):
        words.append(f"in windows of {about['window']}")
    return "measured on " + " ".join(words) if words else ""
