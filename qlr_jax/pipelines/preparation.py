"""What every job begins with: the model, what of it is compressed, and what calibration text tells about it."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import allocators
from qlr_jax import calibration as calibrating
from qlr_jax import sensitivity as sensing
from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.lazy import Lazy
from qlr_jax.core.objective import checked_hessian, checked_weight
from qlr_jax.core.reconstruction import checked_backbone
from qlr_jax.core.solution import Solution
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Reference, reference
from qlr_jax.formats.targets import Target, find_target
from qlr_jax.models import Llama, LlamaConfig, find_folder, load_model, load_tokenizer, parameter_count
from qlr_jax.progress import Progress
from qlr_jax.settings.recipe import Recipe

# One compiled loop at a time: two that overlap on a CPU can wait for each other for ever in XLA's thread pool (seen with jaxlib
# 0.10.2). It takes effect only where no backend has started yet, as in the commands.
jax.config.update("jax_cpu_enable_async_dispatch", False)

BUNDLED, BUNDLED_NAME = Path(__file__).parents[1] / "bundled", "bundled"
OUTPUTS_SHARE = 0.4  # of the machine's memory that output Hessians may take
REFERENCE_BYTES = 4_000_000_000  # that the original's log-probabilities may take
WEIGHTS_SHARE = 0.5  # of it that weights in float32 may take, before they stay on disk


@dataclass(frozen=True)
class Source:
    """A model, and its matrices to compress.

    Attributes:
        folder: where it lies.
        weights: name -> W (out, in), checked.
        prices: the option table with its exact bytes, no damage yet.
        backbones: name -> Q, where the recipe takes them from another model.
        streaming: whether the model's weights stay on disk.
    """

    folder: Path
    model: Llama
    tokenizer: Any
    weights: Mapping[str, np.ndarray | Lazy]
    prices: allocators.OptionTable
    backbones: Mapping[str, np.ndarray | Lazy] = field(default_factory=dict)
    streaming: bool = False


def open_source(source: str | Path, recipe: Recipe) -> Source:
    """Load a model (folder, hub name, or "bundled") and price every option that the recipe offers."""
    folder = BUNDLED if str(source) == BUNDLED_NAME else find_folder(source)
    streaming = streams(folder, recipe)
    model, tokenizer = load_model(folder, on_disk=streaming), load_tokenizer(folder)
    weights = selected_weights(model, recipe)
    target = find_target(recipe.target)
    prices = sensing.price(
        model.config,
        {name: w.shape for name, w in weights.items()},
        lambda shape: sensing.options(recipe.backbones, recipe.ranks, recipe.factors, shape, target.nbytes, target.holds),
        target.nbytes,
    )
    backbones = {}
    if recipe.backbone_from:
        backbones = given_backbones(recipe.backbone_from, model, streaming)
        prices = replace(prices, model=replace(prices.model, fixed_bytes=0))  # a budget of bytes is the factors' alone
    return Source(folder, model, tokenizer, weights, tied(prices, target), backbones, streaming)


def streams(folder: Path, recipe: Recipe) -> bool:
    """Whether the model's weights stay on disk."""
    if recipe.streaming is not None:
        return recipe.streaming
    return 4 * parameter_count(LlamaConfig.from_hf(folder)) > WEIGHTS_SHARE * memory()


def given_backbones(source: str | Path, original: Llama, on_disk: bool) -> dict[str, np.ndarray | Lazy]:
    """Q of every linear layer: the weights of another model's folder, whose other tensors must be the original's."""
    other = load_model(source, on_disk=on_disk)
    theirs, ours, linears = other.tensors(), original.tensors(), original.linears()
    if list(theirs) != list(ours):
        raise QLRError(f"{source} is no model of the same tensors as the original; pass the dense weights of the same model")
    for name, param in ours.items():
        if name.removesuffix(".weight") in linears:
            continue
        one, two = (np.asarray(p.get_value(), np.float32) for p in (param, theirs[name]))
        if one.shape != two.shape or np.abs(one - two).max() > 0.02 * np.abs(one).max():
            raise QLRError(
                f"{source}: {name} is not the original's, so its linear layers do not stand for the same matrices; "
                "undo what was folded into it, or pass a dump of the same embeddings, norms and head"
            )
    shapes = {name: linear.weight.get_value().shape for name, linear in linears.items()}
    return {n: _held(lin.weight.get_value(), lambda w, n=n: checked_backbone(w, shapes[n])) for n, lin in other.linears().items()}


def _held(value: Any, check: Callable[[Any], np.ndarray]) -> np.ndarray | Lazy:
    """The checked array, or where the model's is read when it is used, one that is read and checked then."""
    return Lazy(value.shape, lambda: check(value.dense())) if isinstance(value, Lazy) else check(value)


def tied(table: allocators.OptionTable, target: Target) -> allocators.OptionTable:
    """The table under the ties of its target, as far as their matrices are to be compressed."""
    for patterns in target.ties:
        held = [p for p in patterns if any(fnmatch.fnmatch(name, p) for name in table.index)]
        with contextlib.suppress(allocators.AllocationError):  # no two of them belong together
            table = table.tie(*held) if len(held) > 1 else table
    return table


Spill = Callable[[str], Callable[[str, np.ndarray], np.ndarray]]
"""kind -> (name, array) -> the same array, on disk."""


def calibrate(
    source: Source, text: str, recipe: Recipe, progress: Progress, spill: Spill | None = None
) -> tuple[sensing.Statistics, Reference]:
    """Hessians of inputs and outputs, and the original's log-probabilities on a part of the text.

    Sequences on which the original is not finite are left out of all of them, and told: `left_out` of both kinds of Hessians
    (`calibration.Found`) has each with its place.

    Args:
        spill: puts Hessians on disk; used where the model streams.

    Raises:
        QLRError: where there are more of them than 1 %.
    """
    keep = spill if spill is not None and source.streaming else lambda kind: lambda name, array: array
    model, names = source.model, list(source.weights)
    tokens = calibration_tokens(text, source.tokenizer, model, recipe, source.weights)
    if recipe.hessians_from:
        sizes = {name: w.shape[1] for name, w in source.weights.items()}
        hessians = calibrating.read_hessians(recipe.hessians_from, sizes, keep("hessians"))
    else:
        hessians = calibrating.matrix_hessians(model, tokens, names, recipe.hessians, progress, keep("hessians"))
        tokens = np.delete(tokens, list(hessians.left_out), axis=0)
    outputs = {}
    needed, room = outputs_bytes(source.weights), OUTPUTS_SHARE * memory()
    if recipe.outputs == "fisher" and needed > room and not (source.streaming and spill):
        progress.say(
            f"the output Hessians would take {needed / 1e9:.1f} GB, more than {room / 1e9:.1f} GB (0.4 of this machine's memory): "
            "all outputs count alike"
        )
    elif recipe.outputs == "fisher":
        with progress.stage("calibrating: outputs", total=model.config.num_hidden_layers) as stage:
            kept = keep("outputs")
            outputs = calibrating.output_hessians(
                model,
                calibrating.thinned(tokens, recipe.output_tokens),
                names,
                seed=recipe.seed,
                progress=stage.advance,
                keep=lambda name, g: kept(name, checked_hessian(g, len(g), "outputs")),
            )
        if outputs.left_out:
            progress.say(f"calibrating: outputs: {outputs.told()}")
    sample = reference(model, calibrating.thinned(tokens, recipe.measure_tokens), max_bytes=REFERENCE_BYTES)
    if np.isnan(sample.perplexity):
        raise QLRError(
            "the original's logits on the calibration text are not finite, so that nothing can be compared with it; load it in "
            "float32, check its weights, or give other text"
        )
    return sensing.Statistics(source.weights, hessians, outputs, source.backbones), sample


def sense(
    source: Source,
    found: sensing.Statistics,
    sample: Reference,
    recipe: Recipe,
    progress: Progress,
    solver: Callable[..., Mapping[tuple[str, str], Solution]] = solve_many,
) -> sensing.Sensitivity:
    """The option table with its damages, and what they follow from."""
    method = recipe.attribution
    if method == "kronecker" and not found.outputs:
        progress.say("without output Hessians damage is measured by each matrix alone")
        method = "alone"
    if source.backbones:
        return sensing.measure_given(
            source.model,
            found,
            sample,
            source.prices,
            config=solver_config(recipe),
            seed=recipe.seed,
            method=method,
            progress=progress,
        )
    return sensing.measure(
        source.model,
        found,
        sample,
        source.prices,
        config=solver_config(recipe),
        search=solver_config(recipe, recipe.search_state_bits),
        seed=recipe.seed,
        method=method,
        progress=progress,
        solver=solver,
    )


def outputs_bytes(weights: Mapping[str, np.ndarray | Lazy]) -> int:
    """Bytes of the output Hessians of these matrices while they are summed and after."""
    return sum(2 * 4 * w.shape[0] ** 2 for w in weights.values())


def memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def selected_weights(model: Llama, recipe: Recipe) -> dict[str, np.ndarray | Lazy]:
    """The linear layers that the recipe compresses, checked: name -> W (out, in)."""

    def wanted(name: str) -> bool:
        inside = not recipe.include or any(fnmatch.fnmatch(name, p) for p in recipe.include)
        return inside and not any(fnmatch.fnmatch(name, p) for p in recipe.exclude)

    linears = model.linears()
    found = {name: _held(linear.weight.get_value(), checked_weight) for name, linear in linears.items() if wanted(name)}
    if not found:
        patterns = f"include {list(recipe.include)}, exclude {list(recipe.exclude)}"
        raise QLRError(f"no linear layer is left by {patterns}; names look like {next(iter(linears))}")
    return found


def sequence_length(model: Llama, recipe: Recipe) -> int:
    """Tokens of one sequence: the recipe's, or as many as the model takes, 2048 at most."""
    return recipe.sequence_length or min(2048, model.config.max_position_embeddings)


def calibration_tokens(text: str, tokenizer: Any, model: Llama, recipe: Recipe, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Sequences of calibration text: as many as the recipe wants or the text gives, refused where a Hessian would be singular."""
    length = sequence_length(model, recipe)
    if not text.strip():
        raise QLRError("the calibration text is empty; give text that resembles what the model will read")
    available = len(calibrating.encode(text, tokenizer)) // (length - 1 if tokenizer.bos_token_id is not None else length)
    sequences, inputs = min(recipe.sequences, available), max(w.shape[1] for w in weights.values())
    if sequences < 1 or (sequences * length < inputs and not recipe.force):
        raise QLRError(
            f"the calibration text gives {sequences} sequences of {length} tokens, fewer tokens than the {inputs} inputs of the "
            "widest matrix; give more text" + ("" if sequences < 1 else ", or force it (--force)")
        )
    return calibrating.calibration_tokens(text, tokenizer, sequences, length)


def solver_config(recipe: Recipe, state_bits: int | None = None) -> SolverConfig:
    """The solver's part of a recipe."""
    options = {"damping": recipe.damping, "state_bits": state_bits or recipe.state_bits, "rotation_block": recipe.rotation_block}
    return SolverConfig.make(options | ({"iterations": recipe.iterations} if recipe.iterations else {}), recipe.preset)
