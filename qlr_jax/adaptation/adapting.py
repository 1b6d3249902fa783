"""One adaptation, as a story: take the model apart, train, put the factors on their grids, judge what will be stored."""

from __future__ import annotations

import dataclasses
import enum
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax import calibration
from qlr_jax.adaptation import checkpoint as saving
from qlr_jax.adaptation import rounding
from qlr_jax.adaptation.config import AdaptConfig, fresh_bytes
from qlr_jax.adaptation.fresh import fresh_factors
from qlr_jax.adaptation.losses import TeacherLogits, teacher_logits
from qlr_jax.adaptation.phases import SIDES, Extent, State, coarse, plan_phases, round_sides, run_phase, shifting
from qlr_jax.adaptation.student import TABLES, Student, Values, packed_matrices, table, take_apart
from qlr_jax.adaptation.train import Text, joined, mean_loss, trainer, weight_gradients
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.hadamard import INPUT, OUTPUT
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.metric import Metric
from qlr_jax.core.requantize import Regrid
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.models import SITES, Llama, input_of
from qlr_jax.progress import Progress, silent

GRADIENT_TOKENS, METRIC_TOKENS, JUDGED_ROWS = 8192, 16384, 64


class Verdict(enum.Enum):
    """How an adaptation ended; `str(verdict)` says what that means and what to do about it."""

    IMPROVED = "the loss fell and was still falling or level at the end; more steps may gain a little more"
    STOPPED_EARLY = "the loss on held-out text stopped falling, so training ended and the best was kept; more text would help"
    NOT_IMPROVED = (
        "the stored model is no better than before, so it is handed back unchanged; "
        "pass a lower learning rate, more steps, more text, or factors of more bits"
    )

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Adapted:
    """What `adapt` returns.

    Attributes:
        value: the adapted model, packed: QLRMatrix values of the new specs inside, new norms and embeddings (as bf16 holds them).
        verdict: how it ended.
        stats: `before`, `after`: the loss, nats a token, of what was and is stored, on held-out text (on some training
            sequences where none was given); `bits_per_weight_before`, `bits_per_weight`; `bytes_before`, `bytes`; `trained`, how
            many numbers; `steps`; `seconds`; `history`: phase, step, loss and, where it was looked at, held_out.
    """

    value: Llama
    verdict: Verdict
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def matrices(self) -> dict[str, QLRMatrix]:
        """Every packed matrix by its linear layer's name, as `save_packed` takes them."""
        found = {name: linear.weight.get_value() for name, linear in self.value.linears().items()}
        return {name: value for name, value in found.items() if isinstance(value, QLRMatrix)}

    @property
    def norms(self) -> dict[str, jax.Array]:
        """The weights of all norms by tensor name."""
        return {n: p.get_value() for n, p in self.value.tensors().items() if n.endswith("norm.weight")}

    @property
    def embeddings(self) -> dict[str, jax.Array]:
        """The embedding and, where it is not tied, lm_head by tensor name, (vocab, hidden)."""
        return {n: p.get_value() for n, p in self.value.tensors().items() if n in TABLES}


def adapt(
    model: Llama,
    tokens: Any,
    config: AdaptConfig | None = None,
    *,
    teacher: Llama | TeacherLogits | None = None,
    held_out: Any = None,
    held_out_teacher: TeacherLogits | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Adapted:
    """Train parts of a compressed model on text, and store them on their grids again.

        minimise over L, R, scales, signs, norms, embeddings, Q:
            w · KL(teacher ‖ student) + (1 − w) · next-token loss + states · mean over blocks of ½ E[δᵀ G δ]

    δ is what the hidden state that leaves a block differs by from the teacher's, G = E[g gᵀ] of the gradients there.

    Low-bit factors are trained rounded, with straight-through gradients, and rounded anew every `reround` steps; or, without it, in
    three phases: all parts; R rounded and fixed, the rest trained on; L rounded and fixed, all else trained on. A backbone keeps
    its codes unless it is asked for; then it is trained rounded as well, its codes found anew in the metrics H and G that the text
    gives, its scales as they are. What is judged is the model as it will be stored.

    Args:
        model: a compressed model, packed (what `qlr.load` returns).
        tokens: (rows, length) of the text to adapt to.
        config: what is trained and how.
        teacher: the original model, or its kept logits over `tokens`; for losses "kl" and "mix".
        held_out: (rows, length) of other text: training stops when the loss on it no longer falls, and the best is kept.
        held_out_teacher: where `teacher` is kept logits, those over `held_out`.
        checkpoint: a folder; training goes on from what it holds, and ends as if it had not been interrupted.

    Raises:
        QLRError: a model with nothing packed, tokens that do not fit it, a loss without its teacher, a checkpoint of other
            settings, a loss that is no number.

    Source: LoRA, arXiv 2106.09685; from a compressed backbone: CALDERA, arXiv 2405.18886, section 4; LQ-LoRA, arXiv 2311.12023;
        codes trained as well: PV-Tuning, arXiv 2405.14852 (the way in which they change here is ours); states: BRECQ, 2102.05426.

    Example:
        adapted = adapt(qlr.load("out"), tokens, AdaptConfig(loss="kl"), teacher=load_model("original"), held_out=others)
        save_packed("adapted", adapted.value, adapted.matrices, source="out")
    """
    config, progress, started = config or AdaptConfig(), progress or silent(), time.perf_counter()
    originals = packed_matrices(model)
    text, others = _texts(model, tokens, held_out, teacher, held_out_teacher, config, progress)
    grid, fresh_grid = (None if g == "same" else g for g in (config.factors, config.fresh_grid))
    fresh = {}
    if config.fresh is not None:
        with progress.stage("placing fresh factors"):
            budget = fresh_bytes(config.fresh, sum(m.shape[0] * m.shape[1] for m in originals.values()))
            gradients = weight_gradients(model, text.part(GRADIENT_TOKENS // text.tokens.shape[1]), config)
            fresh = fresh_factors(originals, gradients, budget, fresh_grid, seed=config.seed)
    student, values, frame = take_apart(model, config.train, config.rank, fresh, grid, fresh_grid)
    hessians, regrids, metrics = _metrics(model, originals, student, values, text.tokens, config, progress)

    folder = Path(checkpoint).expanduser() if checkpoint else None
    fingerprint = _fingerprint(originals, text.tokens, config)
    found = saving.load(folder, fingerprint) if folder else None
    run = found[2] if found else {"phase": 0, "step": 0, "best": None, "since": 0, "history": [], "fingerprint": fingerprint}
    phases, first = plan_phases(student, values, config), run["phase"]
    tools = trainer(student, frame, phases[0].trained, text, config, metrics)
    rounded: rounding.Rounded = {}
    straight, stopped = hessians if config.reround and coarse(student, config) else {}, False
    with progress.stage("adapting", total=sum(phase.steps for phase in phases)) as stage:
        for number, phase in enumerate(phases[first:], first):
            resumed = found is not None and number == first
            if resumed:
                trees, leaves, _ = found
                values, rounded = joined(joined(values, trees.get("fixed", {})), trees["trained"]), trees.get("rounded", {})
            elif number:
                values, rounded = round_sides(student, values, rounded, hessians, phase.rounded)
                run |= {"phase": number, "step": 0, "best": None, "since": 0}
            trained, fixed, optimizer = tools.init(values)
            shift = shifting(student, rounded, straight, regrids) if straight or regrids else None
            if shift is not None and not resumed:
                fixed = shift(trained, fixed, Extent.ALL)
            state = State(trained, fixed, trained, optimizer, rounded, run)
            if resumed:
                state.best, state.optimizer = trees["best"], jax.tree.unflatten(jax.tree.structure(optimizer), leaves)
                stage.advance(run["step"] + sum(before.steps for before in phases[:first]))
            stopped |= run_phase(state, tools, phase, text, others, config, folder, stage, shift)
            values = joined(state.best, fixed)
    history = run["history"]
    values, rounded = round_sides(student, values, rounded, hessians, SIDES)

    with progress.stage("judging what is stored"):
        adapted = _assembled(model, student, originals, values, rounded, regrids, config.train)
        judged = others or text.part(JUDGED_ROWS)
        before, after = mean_loss(model, judged, config), mean_loss(adapted, judged, config)
    verdict = Verdict.STOPPED_EARLY if stopped else Verdict.IMPROVED
    if not after < before:
        verdict, adapted = Verdict.NOT_IMPROVED, model
    weights, bytes_before = sum(m.shape[0] * m.shape[1] for m in originals.values()), sum(m.nbytes for m in originals.values())
    result = Adapted(adapted, verdict, {})
    after_bytes = sum(m.nbytes for name, m in result.matrices.items() if name in originals)
    stats = {
        "before": before,
        "after": after,
        "bits_per_weight_before": 8 * bytes_before / weights,
        "bits_per_weight": 8 * after_bytes / weights,
        "bytes_before": bytes_before,
        "bytes": after_bytes,
        "trained": sum(int(values[n][k].size) for n, k in phases[0].trained),
        "steps": sum("loss" in entry for entry in history),
        "seconds": time.perf_counter() - started,
        "history": history,
    }
    return replace(result, stats=stats)


def _texts(
    model: Llama,
    tokens: Any,
    held_out: Any,
    teacher: Llama | TeacherLogits | None,
    held_out_teacher: TeacherLogits | None,
    config: AdaptConfig,
    progress: Progress,
) -> tuple[Text, Text | None]:
    """The text to train on and the one held out, with what the teacher says about them where the loss asks for it."""
    rows = _checked(model, tokens, "tokens")
    others = None if held_out is None else _checked(model, held_out, "held_out")
    if config.loss == "text":
        return Text(rows, None), None if others is None else Text(others, None)
    if teacher is None:
        raise QLRError(f"loss {config.loss!r} compares with the original model; pass it as teacher, or choose loss 'text'")
    if isinstance(teacher, TeacherLogits):
        if config.states:
            raise QLRError(
                f"states {config.states:g} needs the original's hidden states; pass the model itself as teacher, or states=0"
            )
        for given, kept, name in ((rows, teacher, "tokens"), (others, held_out_teacher, "held_out")):
            if given is not None and (kept is None or not np.array_equal(kept.tokens, given)):
                raise QLRError(f"the teacher's kept logits are not those of {name}; pass teacher_logits(original, {name}, top)")
        return Text(rows, teacher), None if others is None else Text(others, held_out_teacher)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise QLRError(
            f"the teacher has {teacher.config.vocab_size} tokens in its vocabulary, the model {model.config.vocab_size}; "
            "pass the original of this model"
        )
    if config.top is None or config.states:
        return Text(rows, teacher), None if others is None else Text(others, teacher)
    kept = [None if t is None else teacher_logits(teacher, t, config.top, progress=progress) for t in (rows, others)]
    return Text(rows, kept[0]), None if others is None else Text(others, kept[1])


def _checked(model: Llama, tokens: Any, name: str) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise QLRError(f"{name} has shape {tokens.shape}; pass (rows, length) with at least one row of two tokens")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise QLRError(f"{name} holds ids outside the vocabulary of {model.config.vocab_size}; use the model's own tokenizer")
    return tokens.astype(np.int32)


def _metrics(
    model: Llama,
    originals: Mapping[str, QLRMatrix],
    student: Student,
    values: Values,
    tokens: np.ndarray,
    config: AdaptConfig,
    progress: Progress,
) -> tuple[dict[str, np.ndarray], dict[str, Regrid], list[jax.Array]]:
    """On the text that is adapted to: H of the inputs of matrices whose factors are rounded, the grids of trained backbones, and G
    of the hidden states where they are compared."""
    factors = [name for name, site in student.sites.items() if site.rank and "factors" in config.train]
    bodies = [name for name in student.sites if "body" in values[name]]
    if config.states and model.config.traits.norms.after_mlp:
        raise QLRError(
            f"states {config.states:g} weighs hidden states by the gradients at a block's last matrix, but a "
            f"{model.config.traits.architecture} normalises what that puts out; pass states 0"
        )
    # what the last matrix of a block puts out is added to the hidden state, so that its G is the state's
    last = [f"model.layers.{i}.{SITES[-1].path}" for i in range(model.config.num_hidden_layers)] if config.states else []
    if not (factors or bodies or last):
        return {}, {}, []
    dense, inputs, outputs = model.densified(), {}, {}
    rows = calibration.subsample(tokens, METRIC_TOKENS)
    if factors or bodies:
        with progress.stage("metrics: inputs"):
            inputs = calibration.hessians(dense, rows)
    if bodies or last:
        with progress.stage("metrics: outputs", total=model.config.num_hidden_layers) as stage:
            named = list(dict.fromkeys((*bodies, *last)))
            outputs = calibration.output_hessians(dense, rows, named, seed=config.seed, progress=stage.advance)
    regrids: dict[str, Regrid] = {}
    shared: dict[Any, Metric] = {}
    for name in bodies:
        layout, own, of = originals[name].layout, values[name], input_of(name)
        key = of, layout.seed, layout.rotation_block, student.sites[name].rotated, name if "columns" in own else ""
        if key not in shared:
            shared[key] = _metric(inputs[of], own.get("columns"), layout, INPUT)
        regrids[name] = Regrid.of(originals[name], shared[key], _metric(outputs[name], own.get("rows"), layout, OUTPUT))
    return {name: inputs[input_of(name)] for name in factors}, regrids, [jnp.asarray(outputs[name], jnp.float32) for name in last]


def _metric(hessian: np.ndarray, relaxed: Any, layout: Layout, side: int) -> Metric:
    """H or G as Q feels it."""
    config = SolverConfig(rotation_block=layout.rotation_block)
    return Metric.make(
        np.asarray(rounding.behind(hessian, relaxed))[None], layout.seed, config, Spec.parse(layout.spec).rotated, side
    )


def _assembled(
    model: Llama,
    student: Student,
    originals: Mapping[str, QLRMatrix],
    values: Values,
    rounded: rounding.Rounded,
    regrids: Mapping[str, Regrid],
    train: tuple[str, ...],
) -> Llama:
    """The model as it is stored: packed matrices in place, norms and embeddings as bf16 holds them."""
    adapted: Llama = jax.tree.map(lambda leaf: leaf, model)
    linears, tensors = adapted.linears(), adapted.tensors()
    for name, matrix in originals.items():
        new = rounding.stored(matrix, student.sites[name], values[name], rounded.get(name, {}), regrids.get(name))
        linears[name].weight.set_value(jax.tree.map(jnp.asarray, new))
    for name in student.norms if "norms" in train else ():
        kind = tensors[name].get_value().dtype
        tensors[name].set_value(values[name]["norm"].astype(jnp.bfloat16).astype(kind))
    for name in student.tables:
        kind = tensors[name].get_value().dtype
        tensors[name].set_value(table(values[name]).astype(jnp.bfloat16).astype(kind))
    return adapted


def _fingerprint(matrices: Mapping[str, QLRMatrix], tokens: np.ndarray, config: AdaptConfig) -> str:
    """Differs where a checkpoint cannot be gone on with."""
    found = zlib.crc32(np.ascontiguousarray(tokens).tobytes())
    for name, matrix in matrices.items():
        found = zlib.crc32(f"{name} {matrix.layout}".encode(), found)
        found = zlib.crc32(np.ascontiguousarray(matrix.arrays["scale"]).tobytes(), found)
    return f"{found:08x} {dataclasses.asdict(config)}"
