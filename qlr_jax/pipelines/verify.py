"""The acceptance gate: is a compressed folder whole, the same in JAX and PyTorch, and near enough to its original."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.formats.checksums import check_files
from qlr_jax.formats.qlr.packed import load, read_config
from qlr_jax.paths import local
from qlr_jax.pipelines.evaluate import evaluate
from qlr_jax.progress import Progress, silent
from qlr_jax.report.words import number
from qlr_jax.settings.thresholds import Thresholds

PARITY_TOKENS, RECIPE = 64, "recipe.yaml"


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: `value` None where it could not be made; `margin` is the distance to the threshold, negative beyond it."""

    name: str
    value: float | None
    threshold: float | bool
    passed: bool
    margin: float | None
    says: str


# most of the lines say what the arguments are
def verify(
    out: str | Path,
    *,
    text: Sequence[str | Path] | None = None,
    original: str | Path | None = None,
    thresholds: Thresholds | Mapping[str, Any] | str | Path | None = None,
    windows: int | None = None,
    chat: bool = False,
    progress: Progress | None = None,
    ignore_config: Sequence[str] = (),
) -> dict[str, Any]:
    """Whether a compressed folder may be used: every threshold checked, each with its margin.

    Where checksums fail nothing else is run, and every other check counts as failed: damaged files are not worth measuring,
    and the parity check would run code from them. That check runs the folder's modeling_qlr.py: verify folders whose source
    you trust, or set `parity` to None.

    Args:
        out, text, original, windows, chat, ignore_config: as for `evaluate`; the first three are needed for all but files and
            parity.
        thresholds: a Thresholds, a mapping, or a YAML file (a recipe too); where not given those that the folder was compressed
            with (recipe.yaml), else the defaults.

    Returns:
        passed; checks: [{name, value, threshold, passed, margin, says}]; evaluation: what `evaluate` gave, None where no
        threshold needed it.

    Raises:
        QLRError: `out` is no compressed folder, or what `evaluate` asks for is missing.
    """
    progress = progress or silent()
    if thresholds is None and (own := local(out) / RECIPE).is_file():
        thresholds = own
    if not isinstance(thresholds, Thresholds | Mapping | None):
        thresholds = Thresholds.from_yaml(thresholds)
    asked = thresholds if isinstance(thresholds, Thresholds) else Thresholds.of(thresholds or {})
    read_config(out)
    checks, whole, found = [], True, None
    if asked.checksums:
        with progress.stage("checking files"):
            checks.append(_checksums(out))
        whole = checks[0].passed
    if not whole:
        names = [f.name for f in dataclasses.fields(asked) if f.name != "checksums" and getattr(asked, f.name) is not None]
        checks += [_unknown(name, getattr(asked, name), "not measured, since the files are damaged") for name in names]
    else:
        if asked.relative_error is not None:
            checks.append(_relative_error(out, asked.relative_error))
        if asked.parity is not None:
            with progress.stage("comparing JAX and PyTorch"):
                checks.append(_parity(out, asked.parity))
        if any(limit is not None for limit in (asked.kl, asked.perplexity_ratio, asked.agreement, asked.drift)):
            wants = {"text": text, "original": original, "windows": windows, "progress": progress}
            wants |= {"ignore_config": ignore_config, "chat": chat}
            found = evaluate(out, drift=asked.drift is not None, **wants)
            checks += _measured(found, asked)
    order = [field.name for field in dataclasses.fields(asked)]
    checks.sort(key=lambda check: order.index(check.name))
    return {
        "passed": all(check.passed for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
        "evaluation": found,
    }


def _limited(name: str, value: float, threshold: float, says: str) -> Check:
    """At most the threshold, or at least for agreement; NaN fails."""
    margin = value - threshold if name == "agreement" else threshold - value
    return Check(name, value, threshold, margin >= 0, margin, says)


def _unknown(name: str, threshold: Any, why: str) -> Check:
    return Check(name, None, threshold, False, None, why)


def _checksums(out: str | Path) -> Check:
    try:
        count = check_files(out)
    except QLRError as error:
        return Check("checksums", None, True, False, None, str(error))
    return Check("checksums", float(count), True, True, None, f"{count} files are as they were written")


def _relative_error(out: str | Path, threshold: float) -> Check:
    try:
        report = json.loads((local(out) / "report.json").read_text(encoding="utf-8"))
        errors = {row["name"]: float(row["relative_error"]) for row in report["matrices"]}
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    except (OSError, ValueError, KeyError, TypeError):
        return _unknown("relative_error", threshold, "report.json names no errors of matrices; set relative_error to null")
    return _limited("relative_error", errors[worst], threshold, f"worst matrix {worst}")


def _parity(out: str | Path, threshold: float) -> Check:
    if importlib.util.find_spec("torch") is None:
        return _unknown("parity", threshold, "skipped, torch is not installed: pip install 'qlr-jax[torch]', or set parity to null")
    import torch
    from transformers import AutoModelForCausalLM

    model = load(out).densified()
    length = min(PARITY_TOKENS, model.config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length)).astype(np.int32)
    ours = np.asarray(model(jnp.asarray(tokens)))
    other = AutoModelForCausalLM.from_pretrained(str(out), trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        theirs = other(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    return _limited("parity", difference, threshold, f"largest difference of logits over the largest logit, {length} tokens")


def _measured(found: Mapping[str, Any], asked: Thresholds) -> list[Check]:
    """The checks on what `evaluate` found, each with its interval in words."""
    checks = []
    for name in ("kl", "perplexity_ratio", "agreement"):
        if (threshold := getattr(asked, name)) is not None:
            low, high = found["intervals"].get(name, (None, None))
            sure = "too few windows for an interval" if low is None else f"95 % interval {number(low)} to {number(high)}"
            checks.append(_limited(name, found[name], threshold, f"{found['tokens']:,} tokens, {sure}"))
    if asked.drift is not None:
        drift = found["drift"]
        checks.append(
            _limited("drift", drift["worst"], asked.drift, f"worst block {drift['worst_layer']}, {drift['tokens']:,} tokens")
        )
    return checks
