"""Every part of memory and of disk that matters, in the order in which it is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import allocators
from qlr_jax.core.batch import SMALL
from qlr_jax.cost.counted import Counted
from qlr_jax.models import linear_names, parameter_count
from qlr_jax.models.forward import AT_ONCE, TOGETHER
from qlr_jax.settings.limits import REFERENCE_BYTES


@dataclass(frozen=True)
class Part:
    """Bytes that one thing takes.

    Attributes:
        stage: in which it is made.
        what: in words.
        host, device: where it lies; a CPU's device is its host.
        kept: whether it stays for later stages.
        disk: bytes of it that lie in files: in job/ if kept, else in the temporary folder.
    """

    stage: str
    what: str
    host: int = 0
    device: int = 0
    kept: bool = False
    disk: int = 0


STAGES = (
    "load", "calibrate: gradients", "calibrate: inputs", "calibrate: outputs", "calibrate: vocabulary", "calibrate: reference",
    "measure: spectra", "measure: probes", "measure: attribution", "solve", "judge", "refine", "evaluate", "save",
)  # fmt: skip
RUNTIME = 520_000_000  # bytes of Python, JAX and what loading a model imports
CODE = 3_300_000  # bytes that one compiled function keeps, on a CPU
# Copies of float32 arrays at once while a batch is solved: of the weights (b, m, n), of H (n, n), of G (b, m, m).
COPIES = {"weights": 14.0, "hessian": 8.0, "output": 7.5}


def memory(job: Counted) -> list[Part]:
    """All parts of all stages."""
    return [
        *_load(job),
        *_inputs(job),
        *_outputs(job),
        *_vocabulary(job),
        *_reference(job),
        *_measure(job),
        *_solve(job),
        *_comparisons(job),
    ]


def temporary(job: Counted) -> int:
    """Bytes of the temporary folder, where most is in it."""
    return max((part.disk for part in memory(job) if not part.kept), default=0)


def _load(job: Counted) -> Iterator[Part]:
    if job.streaming:
        yield Part("load", "embeddings, last norm and head, float32", device=4 * job.outside_blocks, kept=True)
        # two blocks lie there while one gives way to the next, but then nothing of a batch does
        block = 4 * job.block + 7 * job.largest
        yield Part("load", "one block's weights, float32, and a matrix as it is read", device=block, kept=True)
        return
    yield Part("load", "the model's weights, float32", device=4 * parameter_count(job.config), kept=True)
    yield Part("load", "the matrices to compress, a float32 copy", host=4 * job.weights, kept=True)
    if job.recipe.backbone_from:
        yield Part("load", "the backbones that are given", host=4 * job.linear_weights, kept=True)


def _inputs(job: Counted) -> Iterator[Part]:
    stage, recipe, widest = "calibrate: inputs", job.recipe, max(job.inputs)
    block = job.hessians // job.config.num_hidden_layers
    if recipe.hessians != "plain":
        squares = "squared gradients of every token, and weights made of them", 8 * job.tokens * len(linear_names(job.config))
        yield Part("calibrate: gradients", *squares)
        yield from _backward(job, "calibrate: gradients", recipe.sequences)
        yield Part(stage, *squares)
    yield Part(stage, "hidden states of all sequences", host=4 * job.tokens * job.config.hidden_size)
    if job.one_pass:
        yield _boundaries(job, stage, job.output_sequences)
    yield Part(stage, "one layer's activations", device=_activations(job, min(TOGETHER, recipe.sequences) * job.length))
    yield Part(stage, "one layer's sums of x xᵀ", device=2 * block)
    if job.streaming and not recipe.hessians_from:
        yield Part(stage, "Hessians H of the inputs, in files", kept=True, disk=job.hessians)
    else:
        yield Part(stage, "Hessians H of the inputs", host=job.hessians, kept=True)
    yield Part(stage, "copies of the widest H in float64 while it is checked", host=24 * widest**2)


def _outputs(job: Counted) -> Iterator[Part]:
    if not job.outputs:
        return
    stage, sizes = "calibrate: outputs", {m for m, _ in job.shapes.values()}
    if job.streaming:
        yield Part(stage, "output Hessians G, in files", kept=True, disk=job.outputs)
    else:
        yield Part(stage, "output Hessians G", host=job.outputs, kept=True)
    # the sums, what a batch adds, and the mean
    summed = 4 * sum(m * m for m in sizes) + 3 * job.outputs // job.config.num_hidden_layers
    yield Part(stage, "G of one block while summed", device=summed)
    yield Part(stage, "copies of the largest G in float64 while it is checked", host=24 * max(sizes) ** 2)
    yield from _backward(job, stage, job.output_sequences)


def _vocabulary(job: Counted) -> Iterator[Part]:
    sizes = [m * n for m, n in job.settings.vocabulary.values()]
    if not sizes:
        return
    yield Part("load", "embedding and head, a float32 copy", host=4 * sum(sizes), kept=True)
    if not job.outputs:
        yield from _backward(job, "calibrate: vocabulary", max(1, job.vocabulary_tokens // job.length))
    yield Part(
        "measure: attribution",
        "errors of embedding and head, and what they are moved to",
        host=12 * max(sizes),
        device=8 * max(sizes),
    )


def _reference(job: Counted) -> Iterator[Part]:
    bytes_ = 4 * job.measured * job.config.vocab_size
    kept = bytes_ if bytes_ <= REFERENCE_BYTES else bytes_ // 2
    yield Part("calibrate: reference", "the original's log-probabilities", host=kept, kept=True)
    yield _states(job, "calibrate: reference", job.measured)
    yield _larger("calibrate: reference", *_pass(job))


def _measure(job: Counted) -> Iterator[Part]:
    m, n = max(job.shapes.values(), key=lambda shape: shape[0] * shape[1] + sum(side**2 for side in shape))
    one = 4 * (6 * m * n + 8 * n * n + (8 * m * m if job.outputs else 0))
    yield Part("measure: spectra", "one matrix, its H and G and their factors", device=one)
    yield Part("measure: probes", "the largest batch of a solve", *solving(job))
    stage, method, layers = "measure: attribution", job.recipe.attribution, job.config.num_hidden_layers
    if method == "path":
        errors = 4 * job.linear_weights // layers
        # two blocks' errors while one gives way to the next; in a pass the moved weights and their gradients, and a copy
        yield Part(stage, "errors of two blocks, and passes' copies of one's", host=2 * errors, device=3 * errors)
        yield from _backward(job, stage, job.windows, compared=True)
        return
    if method == "second-order":
        yield Part(stage, "errors of all matrices", device=4 * job.weights)
        whole = 12 * min(TOGETHER, job.windows) * job.length * job.config.vocab_size  # logits of a batch, for its derivatives
        yield Part(stage, "passes for second-order", device=_pass(job)[0][1] + whole)
        return
    yield Part(stage, "one matrix's error", host=8 * m * n)
    if method in ("alone", "noise"):
        yield _states(job, stage, job.measured)
        yield _larger(stage, *_pass(job))


def _solve(job: Counted) -> Iterator[Part]:
    yield Part("solve", "the largest batch of a solve", *solving(job))


def _comparisons(job: Counted) -> Iterator[Part]:
    """Comparing compressed models with the original, on calibration text and on held-out text, and refining by that."""
    decoded = 20 * max(m * n for m, n in job.shapes.values())
    what = "one compressed model, decoded"
    if job.streaming:  # a block of it takes the place of the original's
        what = "a matrix that is decoded"
    else:
        decoded += 4 * job.weights
    batch = TOGETHER * job.length
    logits = "logits of some positions of both", 12 * AT_ONCE * job.config.vocab_size
    yield Part("judge", what, device=decoded)
    yield _states(job, "judge", job.measured)
    yield _larger("judge", *_pass(job))
    yield Part("evaluate", what, device=decoded)
    yield _states(job, "evaluate", 2 * job.recipe.evaluation_tokens)
    yield _larger("evaluate", ("one layer's activations", _activations(job, batch)), logits)
    yield Part("save", "a tensor in bf16", host=4 * job.config.vocab_size * job.config.hidden_size)
    if job.recipe.refines:  # a trial is solved, and then compared
        compared = [Part("refine", what, device=decoded), _states(job, "refine", job.measured), _larger("refine", *_pass(job))]
        solved = [Part("refine", "the largest batch of a solve", *solving(job))]
        yield from max(compared, solved, key=lambda parts: sum(part.host + part.device for part in parts))


def _states(job: Counted, stage: str, tokens: int) -> Part:
    """Hidden states in `models.forward.last_states`."""
    return Part(stage, "hidden states of all windows", host=4 * tokens * job.config.hidden_size)


def _backward(job: Counted, stage: str, sequences: int, compared: bool = False) -> Iterator[Part]:
    """Memory of `calibration.backward`; where it compares, with the original's log-probabilities of a batch."""
    config, batch = job.config, min(TOGETHER, sequences) * job.length
    yield _boundaries(job, stage, sequences)
    attention = config.num_attention_heads * job.length
    layer = 4 * batch * (14 * config.hidden_size + 8 * config.intermediate_size + 5 * attention)
    top = "logits of some positions and their gradient", (20 * AT_ONCE + 8 * batch * compared) * config.vocab_size
    yield _larger(stage, ("one layer's activations and gradients", layer), top)


def _boundaries(job: Counted, stage: str, sequences: int) -> Part:
    """What enters every block, of a pass that goes back."""
    if job.in_file(sequences):
        return Part(stage, "hidden states at all blocks, in a temporary file", disk=job.boundaries(sequences))
    return Part(stage, "hidden states at all blocks", host=job.boundaries(sequences))


def _activations(job: Counted, tokens: int) -> int:
    config = job.config
    return 4 * tokens * (8 * config.hidden_size + 5 * config.intermediate_size + 3 * config.num_attention_heads * job.length)


def _larger(stage: str, *parts: tuple[str, int]) -> Part:
    """Of what is never there at the same time: all blocks have run before the first logits are made."""
    what, device = max(parts, key=lambda part: part[1])
    return Part(stage, what, device=device)


def _pass(job: Counted) -> tuple[tuple[str, int], tuple[str, int]]:
    """Memory of a forward pass of a batch, first and last."""
    batch = min(TOGETHER, job.windows) * job.length
    return ("one layer's activations", _activations(job, batch)), ("logits of some positions", 12 * AT_ONCE * job.config.vocab_size)


def solving(job: Counted) -> tuple[int, int]:
    """(host, device) bytes of the largest batch while it is solved."""
    found = [(0, 0)]
    bits = max(job.recipe.state_bits, job.recipe.search_state_bits)
    states = job.backbone.for_backbone(state_bits=bits).search_cost.states
    sequences = 32 if job.machine.kind == "cpu" else min(2048, 2**23 // max(states, 1))
    viterbi = sequences * states * (128 + 24)  # a byte for half of the states at every weight, and some float32 costs
    for kind, (m, n) in job.groups:
        b = job.batch_size(kind, (m, n))
        metrics = b if m < SMALL else 1
        device = 4 * (COPIES["weights"] * b * m * n + COPIES["hessian"] * metrics * n * n)
        device += 4 * COPIES["output"] * b * m * m if job.outputs else 0
        found.append((4 * b * m * (2 * n + (m if job.outputs else 0)), int(device) + viterbi))
    return max(found, key=sum)


def of_a_worker(job: Counted) -> int:
    """Bytes that a worker of a cluster needs: Python and JAX, the model or a block of it, the largest batch of a solve."""
    resident = 4 * (job.outside_blocks + job.weights // job.config.num_hidden_layers) if job.streaming else 4 * job.weights
    return RUNTIME + resident + sum(solving(job))


def packed(job: Counted) -> int:
    """Bytes of one plan's solutions, at the budget where it is one of bits, at three bits a weight elsewhere."""
    bits = allocators.Budget.parse(job.recipe.budget).bits
    return int(job.weights * float(bits if bits is not None else 3) / 8)


def probed(job: Counted) -> int:
    """Bytes of the probes' solutions: two bits a weight and some with factors; of a target without such grids a plan's."""
    return int(job.weights * 2.2 / 8) if job.recipe.target == "qlr" else packed(job)
