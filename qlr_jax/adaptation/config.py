"""Settings of an adaptation, checked when made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qlr_jax.core.quantizers import parse_quantizer
from qlr_jax.errors import QLRError

TRAINABLE = ("factors", "norms", "scales", "signs", "embeddings", "backbone")
LOSSES = ("text", "kl", "mix")
COMPUTE = ("float32", "bf16")
ADDED_GRID = "trellis-4"
_RANGES: Mapping[str, tuple[float, float]] = {
    "weight": (0.0, 1.0),
    "states": (0.0, 1e4),
    "steps": (1, 10**8),
    "batch": (1, 2**20),
    "accumulate": (1, 2**20),
    "learning_rate": (1e-8, 10.0),
    "vector_rate": (1e-8, 10.0),
    "embedding_rate": (1e-8, 10.0),
    "backbone_rate": (1e-8, 10.0),
    "warmup": (0.0, 0.9),
    "clip": (1e-6, 1e9),
    "evaluate_every": (1, 10**8),
    "reround_backbone": (1, 10**8),
    "patience": (1, 10**6),
    "seed": (0, 2**32 - 1),
}


@dataclass(frozen=True)
class AdaptConfig:
    """What is trained, on which loss, how long, and how the result is stored.

    Attributes:
        train: of "factors" (L and R), "norms" (weights of RMSNorm, stored in bf16 as before), "scales" (g, component scales and
            the group scales of backbones that have such), "signs" (the sign vectors of the rotations, relaxed to real numbers and
            then stored in float16, 16 / m + 16 / n bits a weight of a matrix (m, n)) and "embeddings" (the embedding and, where it
            is not tied, lm_head, stored in bf16 as before): all but factors and signs cost no byte. Embeddings take 24 bytes of
            memory a number while they are trained. And "backbone": Q, re-quantized on its own grid, at no byte, for 28 bytes of
            memory a weight.
        rank: only the first so many components of every matrix, the largest ones; None: all.
        fresh: added components, given to the matrices whose gradient asks for them: all that they may take, in bits a compressed
            weight ("0.05bpw") or bytes ("20kB").
        fresh_grid: grid of the factors of matrices that are given components, the old ones with them, or "same": each its own.
        factors: grid of the stored factors: "same" as each matrix has, or one for all, e.g. "bf16", "trellis-4", "int-8".
        loss: "text" (next token), "kl" (to the original model) or "mix" (weight · KL + (1 − weight) · text).
        weight: of KL in "mix".
        top: the teacher's likeliest tokens that are computed once and kept, a position; None: it runs beside the student.
        states: weight of hidden-state distillation: the difference of the hidden states that leave the blocks from the teacher's,
            each in the metric of its gradients, a mean over blocks in nats a token. It learns more from fewer tokens, most of all
            where backbones are trained; the teacher runs beside the student then, whatever `top` is. 0 leaves it out.
        steps: of the optimizer, all phases together.
        batch, accumulate: sequences of one pass, and passes that one step adds up.
        learning_rate: peak of the factors', in units of their size.
        vector_rate: peak of norms, scales and signs, which are near 1 (signs: near 1 of what they were).
        embedding_rate: peak of the embeddings', in units of their size; rows of rare tokens go slower.
        backbone_rate: peak of the backbone's, in units of the spread of its grid.
        warmup: share of each phase's steps in which the rate rises; then it falls as a cosine.
        clip: largest norm of a gradient.
        evaluate_every: steps between validation steps, each the loss on held-out text.
        patience: validation steps without a gain after which a phase ends; the best is kept in any case.
        reround: where factors are quantized to few bits, train them quantized, with straight-through gradients, and re-quantize
            them after so many steps; None: train them as real numbers, then quantize R, train on, quantize L, and train on.
        reround_backbone: steps after which trained backbones are re-quantized, and before every validation step; between validation
            steps every sequence of a trellis keeps its tail-biting state, which takes half of the time.
        compute: "bf16" multiplies in bfloat16 and adds in float32, "float32" all of it.
        remat: compute a block's activations again in the backward pass: less memory, a third more time.
        devices: how many share a batch; None: as many as this process has and divide it.
        seed: of the order of the text.

    Raises:
        QLRError: for a value that cannot be used, naming it and what to give instead.

    Example:
        >>> AdaptConfig(factors="trellis-4").steps
        600
        >>> AdaptConfig(loss="mse")
        Traceback (most recent call last):
            ...
        qlr_jax.errors.QLRError: loss 'mse' is not known; pass text, kl or mix
    """

    train: tuple[str, ...] = ("factors", "norms", "scales")
    rank: int | None = None
    fresh: str | None = None
    fresh_grid: str = ADDED_GRID
    factors: str = "same"
    loss: str = "kl"
    weight: float = 0.5
    top: int | None = 64
    states: float = 0.0
    steps: int = 600
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 5e-3
    vector_rate: float = 3e-3
    embedding_rate: float = 3e-3
    backbone_rate: float = 1.5e-3
    warmup: float = 0.05
    clip: float = 1.0
    evaluate_every: int = 50
    patience: int = 4
    reround: int | None = 25
    reround_backbone: int = 20
    compute: str = "float32"
    remat: bool = False
    devices: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", tuple(self.train))
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise QLRError(f"{name} {getattr(self, name)} is out of range; pass {low:g} to {high:g}")
        for name, value, known in [("loss", self.loss, LOSSES), ("compute", self.compute, COMPUTE)]:
            if value not in known:
                raise QLRError(f"{name} {value!r} is not known; pass {_listed(known)}")
        for name in self.train:
            if name not in TRAINABLE:
                raise QLRError(f"{name!r} cannot be trained; pass {_listed(TRAINABLE)}")
        if not self.train:
            raise QLRError(f"nothing is to be trained; pass one or more of {_listed(TRAINABLE)}")
        for name in ("rank", "top", "devices", "reround"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise QLRError(f"{name} {value} is too small; pass at least 1, or leave it out")
        for name, grid in (("factors", self.factors), ("fresh_grid", self.fresh_grid)):
            if grid != "same" and parse_quantizer(grid).empty:
                raise QLRError(f"{name} cannot be stored as none; pass same, bf16, or a grid such as trellis-4")
        if self.states and self.loss == "text":
            raise QLRError(f"states {self.states:g} compares with the original model; choose loss 'kl' or 'mix', or pass 0")
        if self.factors != "same" and "factors" not in self.train:
            raise QLRError(f"factors {self.factors!r} puts factors on another grid untrained; add 'factors' to train")
        if self.factors != "same" and self.rank is not None:
            raise QLRError(f"rank {self.rank} keeps the other components as they are, so factors must stay 'same'; leave one out")
        if self.fresh is not None:
            if self.rank is not None:
                raise QLRError(f"fresh {self.fresh!r} adds components to those that rank {self.rank} leaves alone; leave one out")
            added_bytes(self.fresh, 8)
            if "factors" not in self.train:
                raise QLRError(f"fresh {self.fresh!r} adds factors that are not trained; add 'factors' to train")

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> AdaptConfig:
        """From options by name.

        Raises:
            QLRError: an option that is no setting.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise QLRError(f"{name!r} is no setting of an adaptation; pass one of {', '.join(known)}")
        return cls(**options)


def added_bytes(text: str, weights: int) -> int:
    """Bytes that a text such as `0.05bpw`, `20kB` or `2MiB` allows for `weights` compressed weights.

    Raises:
        QLRError: the text is no size.

    Example:
        >>> added_bytes("0.05bpw", 8000), added_bytes("20kB", 8000), added_bytes("1 KiB", 8000)
        (50, 20000, 1024)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*(bpw|B|kB|KB|MB|GB|KiB|MiB|GiB)\s*", text)
    if not match or float(match[1]) <= 0:
        raise QLRError(f"fresh {text!r} is no size; pass bits a weight (0.05bpw) or bytes (20kB)")
    size, unit = float(match[1]), match[2]
    if unit == "bpw":
        return int(size * weights / 8)
    return int(size * (1024 if "i" in unit else 1000) ** "BKMG".index(unit[0].upper()))


def _listed(names: tuple[str, ...]) -> str:
    *first, last = names
    return " or ".join([", ".join(first), last] if first else [last])
