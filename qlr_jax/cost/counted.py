"""A job's sizes, from its configuration and recipe: what memory, disk and time are counted from."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from allocators.strategies import CONTROL, DEFAULT, solved_strategies
from qlr_jax.calibration.backward import SPILLED
from qlr_jax.core.batch import FACTORED_TOGETHER, ROWS_TOGETHER, SMALL
from qlr_jax.core.low_rank import bucket
from qlr_jax.core.quantizers import Quantizer, parse_quantizer
from qlr_jax.core.spec import expand_backbones
from qlr_jax.cost.machine import Machine
from qlr_jax.cost.rates import RATES, Rates
from qlr_jax.models import LlamaConfig, input_of, kind_of, linear_names, parameter_count, shape_of, tensor_names
from qlr_jax.models.forward import TOGETHER
from qlr_jax.models.sites import siblings
from qlr_jax.settings.recipe import Recipe
from qlr_jax.settings.resolved import Settings, vocabulary_tokens


@dataclass(frozen=True)
class Counted:
    """A job's sizes, from its configuration and recipe; and the rates of its machine, where they were measured."""

    config: LlamaConfig
    recipe: Recipe
    machine: Machine
    own_rates: Rates | None = None

    @property
    def rates(self) -> Rates:
        """Seconds of each kind of work: measured, or those that are known of such a machine."""
        return self.own_rates or RATES[self.machine.kind]

    @cached_property
    def settings(self) -> Settings:
        """The recipe as the job resolves it on such a machine."""
        return Settings.of(self.recipe, self.config, self.machine.host)

    @property
    def streaming(self) -> bool:
        """Whether the model's weights stay on disk."""
        return self.settings.streaming

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of the matrices to compress."""
        return self.settings.matrices

    @cached_property
    def groups(self) -> Counter[tuple[str, tuple[int, int]]]:
        """(kind, shape) -> how many matrices."""
        return Counter((kind_of(name), shape) for name, shape in self.shapes.items())

    @cached_property
    def weights(self) -> int:
        """Weights of the matrices to compress."""
        return sum(m * n for m, n in self.shapes.values())

    @cached_property
    def linear_names(self) -> frozenset[str]:
        """Names of all linear layers, compressed or not."""
        return frozenset(linear_names(self.config))

    @cached_property
    def linear_weights(self) -> int:
        """Weights of all linear layers, compressed or not."""
        return sum(math.prod(shape_of(self.config, name)) for name in linear_names(self.config))

    @cached_property
    def outside_blocks(self) -> int:
        """Parameters outside the blocks: embeddings, last norm, head."""
        tensors = tensor_names(self.config).items()
        return sum(math.prod(shape) for name, shape in tensors if not name.startswith("model.layers."))

    @cached_property
    def block(self) -> int:
        """Parameters of one block."""
        return (parameter_count(self.config) - self.outside_blocks) // self.config.num_hidden_layers

    @cached_property
    def largest(self) -> int:
        """Weights of the largest linear layer."""
        return max(math.prod(shape_of(self.config, name)) for name in self.linear_names)

    @cached_property
    def inputs(self) -> list[int]:
        """Widths of all distinct inputs; calibration finds the Hessians of all, whatever is compressed."""
        names = list(self.shapes) if self.recipe.hessians == "loss-by-matrix" else linear_names(self.config)
        widths = {
            (name if self.recipe.hessians == "loss-by-matrix" else input_of(name)): shape_of(self.config, name)[1] for name in names
        }
        return list(widths.values())

    @cached_property
    def hessians(self) -> int:
        """Bytes of the Hessians of all inputs."""
        return sum(4 * n * n for n in self.inputs)

    @cached_property
    def outputs(self) -> int:
        """Bytes of the output Hessians once; 0 where they are not made."""
        fits = self.streaming or self.settings.outputs_fit
        return self.settings.output_bytes // 2 if self.recipe.outputs == "fisher" and fits else 0

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.settings.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of calibration text."""
        return self.recipe.sequences * self.length

    @property
    def windows(self) -> int:
        """Windows of calibration text on which KL is measured."""
        return max(1, min(self.recipe.sequences, self.recipe.measure_tokens // self.length))

    @property
    def measured(self) -> int:
        """Tokens on which KL is measured."""
        return self.windows * self.length

    @property
    def vocabulary_tokens(self) -> int:
        """Tokens on which the metrics of embedding and head are measured."""
        return max(1, vocabulary_tokens(self.config, self.recipe) // self.length) * self.length

    @property
    def output_sequences(self) -> int:
        """Sequences on which output Hessians are measured."""
        return max(1, min(self.recipe.sequences, self.recipe.output_tokens // self.length))

    @property
    def one_pass(self) -> bool:
        """Whether the pass for the inputs' Hessians is the way up of that for the outputs' as well."""
        return bool(self.outputs) and not self.recipe.hessians_from and self.output_sequences == self.recipe.sequences

    def boundaries(self, sequences: int) -> int:
        """Bytes of the hidden states before, between and after all blocks, for a backward pass of so many sequences, its batches
        filled up; gradients take their places."""
        batch = min(TOGETHER, sequences)
        rows = -(-sequences // batch) * batch
        return 4 * (self.config.num_hidden_layers + 1) * rows * self.length * self.config.hidden_size

    def in_file(self, sequences: int) -> bool:
        """Whether they lie in a temporary file."""
        return self.boundaries(sequences) > SPILLED

    @cached_property
    def plans(self) -> dict[str, int]:
        """Strategies whose allocations are solved and measured -> the state bits of their solves; what is the same counts once."""
        beside, asked = self.settings.controls, self.recipe.strategy
        others = {name: beside.state_bits for name in solved_strategies() if name != DEFAULT} if beside else {}
        if not self.has_factors and asked == DEFAULT:
            others.pop(CONTROL, None)  # the allocation itself
        return {**others, asked: self.recipe.state_bits}

    @property
    def has_factors(self) -> bool:
        """Whether a rank above 0 is offered."""
        return any(self.recipe.ranks)

    @cached_property
    def backbone(self) -> Quantizer:
        """Of the backbones that the recipe offers the one whose search takes longest: what most of the searching is."""
        offered = [parse_quantizer(text.partition("/")[0]) for text in expand_backbones(self.recipe.backbones)]
        return max(offered, key=lambda quantizer: quantizer.search_cost.time, default=parse_quantizer("none"))

    def batch_size(self, kind: str, shape: tuple[int, int]) -> int:
        """Matrices in the largest batch of this kind: filled up where they are small, those of one input where they are large."""
        m, _ = shape
        size = ROWS_TOGETHER // m if m < SMALL else sum((other, shape) in self.groups for other in siblings(kind))
        if not self.has_factors:
            return size
        widest = bucket(max(self.recipe.ranks), min(shape))
        return max(1, min(size, FACTORED_TOGETHER // widest**2))
