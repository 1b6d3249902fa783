"""What a compressed folder must keep to; read by the gate, and a part of recipes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qlr_jax.errors import QLRError
from qlr_jax.paths import local


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What a folder must keep to; None leaves a check out. The defaults catch what is broken or compressed too far.

    Attributes:
        kl: mean KL(original ‖ compressed), nats a token, at most. At 0.1 the two distributions differ by at most
            √(0.1 / 2) = 0.22 in total variation on average (Pinsker); the bundled model is at 0.03 with 2.25 bits per weight
            and at 0.07 with 1.8.
        perplexity_ratio: compressed over original, at most. 1.1 goes with a KL of 0.1: ln 1.1 = 0.095 nats a token.
        agreement: share of positions with the same likeliest token, at least. The bundled model has 0.89 with 2.25 bits
            per weight, 0.86 with 1.8.
        drift: mean ‖x̂ − x‖/‖x‖ of the hidden state after the worst block, at most. 0.5: the error is half as large as the
            state; unrelated states of one size are √2 apart. The bundled model: 0.16 with 2.25 bits per weight, 0.23 with 1.8.
        relative_error: √(tr(E H Eᵀ)/tr(W H Wᵀ)) of the worst matrix in report.json, at most. 0.6: the best possible code of
            1 bit gives 0.5 on a matrix without structure, so a larger error means a solve that went wrong.
        checksums: True: every file is as checksums.json has it.
        parity: largest difference of the logits in PyTorch (the folder's own runtime, float32) and in JAX, over the largest
            logit, at most. Rounding gives 1e-6 to 1e-5, a wrong code or sign about 1. Needs torch: where it is not
            installed the check fails.

    Raises:
        QLRError: a threshold that is no number in its range.
    """

    kl: float | None = 0.1
    perplexity_ratio: float | None = 1.1
    agreement: float | None = 0.8
    drift: float | None = 0.5
    relative_error: float | None = 0.6
    checksums: bool | None = True
    parity: float | None = 1e-4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "checksums":
                if value not in (True, False, None) or isinstance(value, int) != isinstance(value, bool):
                    raise QLRError(f"threshold checksums is {value!r}; give true, or null to leave the check out")
            elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf):
                raise QLRError(f"threshold {field.name} is {value!r}; give a number of at least 0, or null to leave the check out")
        if self.agreement is not None and self.agreement > 1:
            raise QLRError(f"threshold agreement is {self.agreement}; it is a share of positions, so give at most 1")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Thresholds:
        """Read thresholds from a YAML file, at its top or under `thresholds:`, as a recipe has them; the defaults for one without.

        Raises:
            QLRError: no such file, no YAML mapping, an unknown name, a value out of its range.
        """
        file = local(path)
        try:
            raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError:
            raise QLRError(f"thresholds file {file} cannot be read; give a YAML file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise QLRError(f"thresholds file {file} is not valid YAML ({str(error).splitlines()[0]})") from None
        recipe = isinstance(raw, Mapping) and raw.keys() & {"thresholds", "budget"}
        found = raw.get("thresholds") if recipe else raw
        return cls.of(found if found is not None else {}, str(file))

    @classmethod
    def of(cls, values: Any, where: str = "thresholds") -> Thresholds:
        """Thresholds from a mapping; what it does not name keeps its default.

        Example:
            >>> Thresholds.of({"kl": 0.05, "parity": None}).kl
            0.05
            >>> Thresholds.of({"kld": 0.05})
            Traceback (most recent call last):
                ...
            qlr_jax.errors.QLRError: thresholds: 'kld' is unknown; known are kl, perplexity_ratio, agreement, drift, ...
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise QLRError(f"{where}: a mapping of {', '.join(names)} is needed, not {values!r}")
        for name in values:
            if name not in names:
                raise QLRError(f"{where}: {name!r} is unknown; known are {', '.join(names)}")
        return cls(**values)
