"""What `qlr evaluate`, `qlr verify` and `qlr adapt` found, as plain text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.report.terminal.columns import columns
from qlr_jax.report.words import number, percent


def evaluation(result: Mapping[str, Any]) -> str:
    """The figures of `evaluate` as tables for the terminal: on text, by layer, by task, each with its protocol."""
    parts = []
    if "kl" in result:
        names = {
            "perplexity_original": "perplexity of the original",
            "perplexity": "perplexity",
            "perplexity_ratio": "ratio to the original",
            "kl": "KL, mean (nats a token)",
            "kl_p99": "KL, 99th percentile",
            "agreement": "same top token",
        }

        def shown(key: str, value: float) -> str:
            return percent(value) if key == "agreement" else number(value, 4)

        found = result.get("intervals") or {}
        rows = [
            [label, shown(key, result[key]), " to ".join(shown(key, end) for end in found[key]) if key in found else ""]
            for key, label in names.items()
        ]
        parts.append(columns([f"{result['tokens']:,} tokens", "", "95 % interval" if found else ""], rows))
        worst = result["worst"]
        where = f"worst token: KL {number(worst['kl'])} after position {worst['position']} of window {worst['window']}"
        likeliest = f"original {worst['original']!r}, compressed {worst['compressed']!r}"
        parts.append(f"{where}, {worst['before'][-48:]!r}; text {worst['next']!r}, {likeliest}")
    if drift := result.get("drift"):
        layers = " ".join(number(value) for value in drift["layers"])
        parts.append(f"drift of the hidden state after each block (mean of ‖x̂ − x‖/‖x‖, {drift['tokens']:,} tokens):\n{layers}")
    if "protocol" in result:
        parts.append(f"protocol: {result['protocol']}")
    if tasks := result.get("zero_shot"):
        rows = [
            [
                task,
                metric,
                *(number(f[key], 4) for key in ("original", "compressed")),
                f"{f['difference']:+.4f}",
                number(f["stderr"]),
            ]
            for task, row in tasks["tasks"].items()
            for metric, f in row["metrics"].items()
        ]
        parts.append(columns(["task", "metric", "original", "compressed", "difference", "its std. error"], rows))
        parts.append(f"protocol: {tasks['protocol']}")
    return "\n\n".join(parts)


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """The checks as a table for the terminal, the verdict last."""
    checks = verdict["checks"]
    rows = [
        [
            check["name"].replace("_", " "),
            "yes" if check["passed"] else "NO",
            number(check["value"]),
            ("≥ " if check["name"] == "agreement" else "≤ ") + number(check["threshold"]) if check["name"] != "checksums" else "",
            number(check["margin"]),
        ]
        for check in checks
    ]
    failed = [check for check in checks if not check["passed"]]
    lines = [columns(["check", "passed", "value", "threshold", "margin"], rows)] if rows else ["nothing was asked for"]
    lines += [f"{check['name'].replace('_', ' ')}: {check['says']}" for check in failed or checks]
    lines.append(f"failed: {len(failed)} of {len(checks)} checks" if failed else f"passed: {len(checks)} checks")
    return "\n".join(lines)


def adapted_text(result: Mapping[str, Any]) -> str:
    """What an adaptation changed, measured before and after, and how it ended."""
    names = {"kl": "KL, mean (nats a token)", "perplexity": "perplexity", "agreement": "same top token"}
    before, after = result["before"], result["after"]

    def shown(key: str, value: float) -> str:
        return percent(value) if key == "agreement" else number(value, 4)

    rows = [[label, shown(key, before[key]), shown(key, after[key])] for key, label in names.items() if key in before]
    rows.append(["bits per weight, as stored", number(result["bits_per_weight_before"], 5), number(result["bits_per_weight"], 5)])
    lines = [columns([f"{result['tokens']:,} tokens of {result['judged_on']}", "before", "after"], rows)]
    if before.get("kl"):
        lines.append(f"{percent(1 - after['kl'] / before['kl'])} of the KL is won back in {result['steps']} steps")
    return "\n".join([*lines, result["verdict"], f"written: {result['dest']}"])
