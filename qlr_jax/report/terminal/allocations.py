"""Allocations of a saved table as text: what each budget buys, what else it could buy, and whether rank pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allocators.strategies import CONTROL, DEFAULT, STRATEGIES
from qlr_jax.report.content.allocation import rank_line
from qlr_jax.report.content.quality import NEAR, rank_verdict
from qlr_jax.report.terminal.columns import columns
from qlr_jax.report.words import MISSING, bits, number, part_of, percent, short_spec, times


def allocations_text(plans: Sequence[Mapping[str, Any]]) -> str:
    """Every budget's allocation, a row each; then one by one what it is compared with.

    Args:
        plans: of `pipelines.allocate.plan`.
    """
    header = ["budget", "bytes", "bits a weight", "damage", "bound", "gap", "status"]
    rows = [
        [
            str(plan.get("budget")),
            f"{plan['bytes']:,}",
            bits(plan.get("bits_per_weight")),
            number(plan["damage"], 4),
            number(plan.get("bound"), 4),
            _gap(plan.get("gap")),
            str(plan.get("status")),
        ]
        for plan in plans
    ]
    lines = [columns(header, rows), "damage: predicted KL, nats a token; no allocation within the budget does less than the bound"]
    lines += [f"{status}: {text}" for status, text in {str(plan["status"]): plan.get("explain") for plan in plans}.items() if text]
    for plan in plans:
        lines += ["", allocation_text(plan)]
    return "\n".join(lines)


def allocation_text(plan: Mapping[str, Any]) -> str:
    """What a budget's allocation is compared with, where its ranks went, and whether they pay."""
    mine = str(plan.get("strategy") or DEFAULT)
    rows = [[STRATEGIES[mine].label, number(plan["damage"], 4), "", f"{plan['bytes']:,}"]]
    for name, other in part_of(plan, "baselines").items():
        label = STRATEGIES[name].label + (f" ({short_spec(other['spec'])})" if other.get("spec") else "")
        rows.append([label, number(other["damage"], 4), times(other["damage"], plan["damage"]), f"{other['bytes']:,}"])
    for name, strategy in STRATEGIES.items():
        if name != mine and name not in part_of(plan, "baselines"):
            rows.append([strategy.label, MISSING, "", "does not fit"])
    lines = [columns([f"at {plan.get('budget')}", "damage", "ratio", "bytes"], rows)]
    items = {name: value for name, value in part_of(plan, "items").items() if value}
    if len(items) > 1:
        lines.append(f"limit: {plan['limit']:,} bytes: " + ", ".join(f"{name} {value:,}" for name, value in items.items()))
    lines.append(rank_line({"name": name, "spec": spec} for name, spec in part_of(plan, "specs").items()))
    lines.append(did_rank_pay(plan))
    pruned = part_of(plan, "pruned")
    if pruned:
        lines.append(
            f"{pruned['dropped']:,} of {pruned['options']:,} options are dominated: another of the same matrix takes no more bytes "
            "and does no more damage"
        )
    if plan.get("keeps_original"):
        lines.append("the budget holds the original as it is: nothing need be compressed")
    elif plan.get("everything_fits"):
        lines.append("the budget holds the largest option of every matrix: a smaller budget would use it up")
    return "\n".join(lines)


def did_rank_pay(plan: Mapping[str, Any]) -> str:
    """Predicted damage with rank over that of rank 0 at the same bytes, in words.

    >>> did_rank_pay({"damage": 0.0227, "baselines": {"rank0": {"damage": 0.0234}}})
    'did rank pay? yes: predicted damage 0.02270 against 0.02340 without at the same bytes, 3.0 % less'
    """
    damages = {name: row.get("damage") for name, row in part_of(plan, "baselines").items()}
    damages[mine := str(plan.get("strategy") or DEFAULT)] = plan.get("damage")
    damage, without = damages.get(mine if STRATEGIES[mine].ranks else DEFAULT), damages.get(CONTROL)
    verdict, how = rank_verdict(damage, without)
    if not verdict:
        return "did rank pay? not known: nothing without rank fits, or nothing is damaged"
    answer = {"paid": "yes", "made no difference": f"it makes no difference (within {100 * NEAR:g} %)"}.get(verdict, "no")
    compared = f"predicted damage {number(damage, 4)} against {number(without, 4)} without"
    return f"did rank pay? {answer}: {compared} at the same bytes, {how}"


def _gap(value: Any) -> str:
    return percent(value) if value is None or abs(value) >= 0.0005 or not value else f"{100 * value:.2g} %"
