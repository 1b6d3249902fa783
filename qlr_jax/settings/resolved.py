"""What a recipe means for one model on one machine: each setting resolved once, for the job, its plan and its report."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass

from allocators.budget import Budget
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.quantizers import parse_quantizer
from qlr_jax.core.spec import expand_backbones
from qlr_jax.errors import QLRError
from qlr_jax.formats.targets import Target, find_target
from qlr_jax.models import LlamaConfig, linear_names, parameter_count, shape_of, vocabulary_names
from qlr_jax.settings.limits import OUTPUTS_SHARE, WEIGHTS_SHARE, machine_memory
from qlr_jax.settings.recipe import Recipe

VOCABULARY_TOKENS = 8192  # the metrics of two matrices need fewer than those of all
LONGEST = 2048  # tokens of a sequence where nothing else is asked for
QUICK_STATE_BITS = 8  # of controls that are solved for the report alone


@dataclass(frozen=True)
class Settings:
    """A recipe, resolved.

    Attributes:
        matrices: name -> (out, in) of the linear layers to compress.
        vocabulary: name -> (rows, columns) of the embedding and the head, where they are to be compressed too.
        sequence_length: tokens of one sequence of text.
        streaming: whether weights and statistics stay on disk and are read block by block.
        output_bytes: that the output Hessians of all matrices take in memory while they are summed.
        outputs_fit: whether that is within their share of the machine's memory.
        target: the format to compress for.
        solver: of the final solves.
        search: of the solves while options are measured.
        controls: of the final solves of uniform and rank 0; None where they are not solved. The same as `solver` where fewer state
            bits would change nothing.
    """

    matrices: dict[str, tuple[int, int]]
    vocabulary: dict[str, tuple[int, int]]
    sequence_length: int
    streaming: bool
    output_bytes: int
    outputs_fit: bool
    target: Target
    solver: SolverConfig
    search: SolverConfig
    controls: SolverConfig | None

    @classmethod
    def of(cls, recipe: Recipe, config: LlamaConfig, memory: int | None = None, whole: bool | None = None) -> Settings:
        """The recipe's settings for a model.

        Args:
            config: the model's shapes.
            memory: bytes that the machine has; None: this one's.
            whole: whether embedding and head are compressed too, as far as other grids than bf16 are offered for them; None: where
                the budget counts them.

        Raises:
            QLRError: a recipe whose patterns leave no matrix to compress.

        Example:
            >>> config = LlamaConfig(512, 64, 96, num_hidden_layers=1, num_attention_heads=2)
            >>> settings = Settings.of(Recipe(), config, memory=2**34)
            >>> settings.sequence_length, settings.streaming, settings.solver.state_bits, len(settings.matrices)
            (2048, False, 14, 7)
        """
        memory = machine_memory() if memory is None else memory
        matrices = _matrices(recipe, config)
        output_bytes = sum(2 * 4 * rows**2 for rows, _ in matrices.values())  # the sums, and what they become
        weights = 4 * parameter_count(config)
        whole = Budget.parse(recipe.budget).counts_all if whole is None else whole
        vocabulary = _vocabulary(recipe, config) if whole else {}
        return cls(
            matrices,
            vocabulary,
            sequence_length(config, recipe.sequence_length),
            weights > WEIGHTS_SHARE * memory if recipe.streaming is None else recipe.streaming,
            output_bytes,
            output_bytes <= OUTPUTS_SHARE * memory,
            find_target(recipe.target),
            _solver(recipe, recipe.state_bits),
            _solver(recipe, recipe.search_state_bits),
            _controls(recipe, vocabulary),
        )


def sequence_length(config: LlamaConfig, asked: int | None = None) -> int:
    """Tokens of a sequence or window: what is asked for, or as many as the model takes, 2048 at most.

    Example:
        >>> small = LlamaConfig(512, 64, 96, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256)
        >>> sequence_length(small), sequence_length(small, 128)
        (256, 128)
    """
    return asked or min(LONGEST, config.max_position_embeddings)


def vocabulary_tokens(config: LlamaConfig, recipe: Recipe) -> int:
    """Tokens of calibration text at most that the metrics of embedding and head are measured on: four a column at least.

    Example:
        >>> vocabulary_tokens(LlamaConfig(512, 64, 96, num_hidden_layers=1, num_attention_heads=2), Recipe(output_tokens=4096))
        4096
    """
    return min(recipe.output_tokens, max(VOCABULARY_TOKENS, 4 * config.hidden_size))


def _chosen(recipe: Recipe, name: str) -> bool:
    """Whether a name matches a pattern of `include`, if there is any, and none of `exclude`."""
    inside = not recipe.include or any(fnmatch.fnmatch(name, p) for p in recipe.include)
    return inside and not any(fnmatch.fnmatch(name, p) for p in recipe.exclude)


def _vocabulary(recipe: Recipe, config: LlamaConfig) -> dict[str, tuple[int, int]]:
    if recipe.backbone_from or set(recipe.vocabulary) == {"bf16"}:
        return {}
    return {name: shape_of(config, name) for name in vocabulary_names(config) if _chosen(recipe, name)}


def _matrices(recipe: Recipe, config: LlamaConfig) -> dict[str, tuple[int, int]]:
    names = linear_names(config)
    found = {name: shape_of(config, name) for name in names if _chosen(recipe, name)}
    if not found:
        patterns = f"include {list(recipe.include)}, exclude {list(recipe.exclude)}"
        raise QLRError(f"no linear layer is left by {patterns}; pass other patterns: names look like {names[0]}")
    return found


def _controls(recipe: Recipe, vocabulary: Collection[str]) -> SolverConfig | None:
    if recipe.controls == "none":
        return None
    full, fewer = recipe.state_bits, min(QUICK_STATE_BITS, recipe.state_bits)
    offered = expand_backbones([*recipe.backbones, *(recipe.vocabulary if vocabulary else ())])
    factors = [name for pair in recipe.factors for name in pair.split(",")] if any(recipe.ranks) else []
    grids = [parse_quantizer(name.partition("/")[0]) for name in (*offered, *factors)]
    quicker = any(grid.with_settings(state_bits=full) != grid.with_settings(state_bits=fewer) for grid in grids)
    return _solver(recipe, fewer if recipe.controls == "quick" and quicker else full)


def _solver(recipe: Recipe, state_bits: int) -> SolverConfig:
    options = {"damping": recipe.damping, "state_bits": state_bits, "rotation_block": recipe.rotation_block}
    return SolverConfig.make(options | ({"iterations": recipe.iterations} if recipe.iterations else {}), recipe.preset)
