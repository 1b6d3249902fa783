"""The amounts of work of every stage."""

from __future__ import annotations

import math

from qlr_jax.core.ldlq import row_group
from qlr_jax.core.low_rank import bucket
from qlr_jax.cost.counted import Counted
from qlr_jax.cost.rates import Work
from qlr_jax.cost.solves import plan_solves, probe_solves, vocabulary_solves
from qlr_jax.models import parameter_count
from qlr_jax.models.forward import TOGETHER

COMPILED = {"load": 8, "calibrate": 24, "shape": 3}  # functions: in a stage as such, for a shape that is measured


def work(job: Counted) -> dict[str, Work]:
    """The amounts of every stage's work."""
    config, attention = job.config, 4 * job.config.num_hidden_layers * job.config.num_attention_heads * job.config.head_dim
    head = 2 * config.vocab_size * config.hidden_size
    body = 2 * job.linear_weights + attention * job.length  # operations a token
    soft = 6 * config.num_hidden_layers * config.num_attention_heads * job.length + 10 * config.num_hidden_layers * (
        config.hidden_size + config.intermediate_size
    )
    tokens, measured = job.tokens, job.measured
    inputs = Work(products=(body + 2 * sum(n * n for n in job.inputs)) * tokens, passed=(soft + 2 * sum(job.inputs)) * tokens)
    inputs += Work(checked=sum(n**3 for n in job.inputs) / 3, passed=12 * job.hessians / 4, compiled=COMPILED["calibrate"] / 2)
    loaded = job.outside_blocks if job.streaming else parameter_count(config)
    found = {"load": Work(passed=6 * loaded, compiled=COMPILED["load"]), "calibrate: inputs": inputs}
    if job.recipe.hessians != "plain":
        found["calibrate: gradients"] = Work(products=(3 * body + 2 * head) * tokens, passed=3 * soft * tokens)
    if job.outputs:
        # through the body: up, unless the pass for the inputs has been that way, each block once more, and back
        ways = 2 if job.one_pass else 3
        found["calibrate: outputs"] = Work(
            products=(ways * body + 2 * head + job.outputs / 2) * job.output_sequences * job.length,
            passed=(ways * soft + 40 * config.vocab_size) * job.output_sequences * job.length + 12 * job.outputs / 4,
            checked=sum(m**3 for m, _ in job.shapes.values()) / 3,
            compiled=COMPILED["calibrate"] / 2,
        )
    score = Work(products=(body + head) * measured, passed=(soft + 20 * config.vocab_size) * measured)
    found["calibrate: reference"] = score
    found["measure: spectra"] = sum((_profile(job, shape) * count for (_, shape), count in job.groups.items()), Work())
    found["measure: probes"] = probe_solves(job)
    if job.settings.vocabulary and not job.outputs:  # else they come of the pass of the output Hessians
        found["calibrate: vocabulary"] = Work(
            products=(3 * body + 2 * head) * job.vocabulary_tokens,
            passed=(3 * soft + 60 * config.vocab_size) * job.vocabulary_tokens,
            compiled=COMPILED["calibrate"] / 2,
        )
    found["measure: attribution"] = _attribution(job, body, head, soft, score)
    solves = (plan_solves(job, name, bits) + vocabulary_solves(job, bits) for name, bits in job.plans.items())
    found["solve"] = sum(solves, Work())
    decode, models = Work(decoded=job.weights), len(job.plans)
    found["judge"] = (score + decode) * models
    evaluated = job.recipe.evaluation_tokens
    compared = Work(products=(body + 2 * head) * evaluated, passed=(soft + 40 * config.vocab_size) * evaluated)
    found["evaluate"] = Work(products=body * evaluated, passed=soft * evaluated) + (decode + compared) * models
    found["save"] = Work(passed=4 * (parameter_count(config) - job.weights))
    for name, times in reads(job).items():
        found[name] += Work(passed=6 * times * job.linear_weights)
    return found


def reads(job: Counted) -> dict[str, int]:
    """How often a stage reads the linear layers from disk."""
    if not job.streaming:
        return {}
    passes = {"path": 8, "alone": len(job.shapes), "noise": len(job.shapes), "kronecker": 1, "error": 2}
    return {
        **({"calibrate: gradients": 2} if job.recipe.hessians != "plain" else {}),
        "calibrate: inputs": 1,
        **({"calibrate: outputs": 2} if job.outputs else {}),
        "calibrate: reference": 1,
        "measure: spectra": 1,
        "measure: probes": 1,
        "measure: attribution": passes.get(job.recipe.attribution, 0),  # up and down at two nodes, and as often for the errors
        "solve": len(job.plans),
        "evaluate": 1,
    }


def _profile(job: Counted, shape: tuple[int, int]) -> Work:
    """`sensitivity.predict.profile` of one matrix."""
    (m, n), k = shape, bucket(max(1, *job.recipe.ranks), min(shape))
    spectra = 6 * (4 * m * n * k + 2 * n * n * k) + 2 * m * n * n
    sides = [n, *([m] if job.outputs else [])]
    found = Work(products=spectra, factored=sum(s**3 / 3 + 256 * s * s for s in sides), passed=sum(40 * s * s for s in sides))
    if job.outputs:
        group = row_group(-(-m // 64) * 64, 64)
        found += Work(products=3 * m * m * n, factored=2 * m**3 / 3, checked=20 * m * group**2)
    same = sum(count for (_, other), count in job.groups.items() if other == shape)
    return found + Work(compiled=COMPILED["shape"] / same)


def _attribution(job: Counted, body: float, head: float, soft: float, score: Work) -> Work:
    """`sensitivity.attribute`: passes through the model for KL's sake."""
    measured, count = job.measured, len(job.shapes)
    quadratics = sum(2 * m * n * n + (2 * m * m * n if job.outputs else 0) for m, n in job.shapes.values())
    moved = Work(passed=6 * job.weights * math.ceil(job.windows / TOGETHER), compiled=8)
    path = (
        Work(products=2 * (4 * body + 2 * head) * measured, passed=2 * (3 * soft + 30 * job.config.vocab_size) * measured)
        + moved * 2
        + Work(decoded=job.weights) * 4  # the probes are decoded on the way up and down
    )
    one = score + Work(passed=2 * job.weights / count)
    return {
        "path": path,
        "alone": one * count,
        "noise": one * count + Work(products=2 * quadratics),
        "second-order": one * (4 * count),
        "kronecker": Work(products=quadratics),
        "error": Work(products=2 * quadratics),
    }[job.recipe.attribution]
