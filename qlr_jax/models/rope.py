"""Which rotary embedding a config.json asks for: its several spellings, resolved as transformers 5 resolves them."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from qlr_jax.errors import QLRError

THETA = 10000.0
ORIGINAL = "original_max_position_embeddings"

KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are scaled: `linear` (all by `factor`) or `llama3` (low frequencies only)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def resolve_rope(raw: Mapping[str, Any], positions: int, ignore: Collection[str] = ()) -> tuple[float, RopeScaling | None]:
    """Theta and scaling of a config.json.

    `rope_scaling` (version 4) counts before `rope_parameters` (version 5) unless it is empty, and in either `rope_type` before
    `type`, and a theta in it before `rope_theta` beside it.

    Args:
        raw: the content of config.json.
        positions: its max_position_embeddings, which llama3 takes where no original number is given.
        ignore: names of parameters to leave out.

    Raises:
        QLRError: a type or a parameter that is not known, a number that is none, or two that contradict each other.

    Example:
        >>> resolve_rope({"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {}}, 2048)
        (20000.0, RopeScaling(kind='linear', factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192))
    """  # noqa: E501  a doctest's result stands on one line
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise QLRError(f"config: rope parameters {found!r} are not supported; an object with a rope_type is needed")
    given = dict(found)
    theta = _number("rope_theta", given.pop("rope_theta", raw.get("rope_theta", THETA)))
    kind = given.pop("type", "default")
    kind = given.pop("rope_type", kind)
    if not isinstance(kind, str) or kind not in KEYS:
        raise QLRError(f"rope type {kind!r} is not supported; known are {', '.join(KEYS)}")
    if given.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise QLRError("partial_rotary_factor other than 1.0 is not supported")
    # Some files carry a factor of 1.0 beside the default type; nothing else may be left over.
    if kind == "default" and given.get("factor", 1.0) in (1.0, None):
        given.pop("factor", None)
    unknown = [key for key in given if key not in KEYS[kind] and key not in ignore]
    if unknown:
        raise QLRError(
            f"rope parameter {unknown[0]!r} is unknown for rope type {kind!r}; to go on without it: --ignore-config {unknown[0]}"
        )
    if kind == "llama3":
        given[ORIGINAL] = _original(given.get(ORIGINAL), raw.get(ORIGINAL), positions)
    missing = [key for key in KEYS[kind] if given.get(key) is None]
    if missing:
        raise QLRError(f"rope type {kind!r} needs {missing[0]!r}, which the config does not give")
    scaling = {key: _number(key, given[key]) for key in KEYS[kind]}
    return theta, None if kind == "default" else RopeScaling(kind, **scaling)


def rope_note(raw: Mapping[str, Any]) -> str:
    """Which of two spellings counts, where both are there and differ; empty elsewhere."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    if not (scaling and parameters) or _meaning(scaling, raw) == _meaning(parameters, raw):
        return ""
    return "config.json has rope_scaling and other rope_parameters: rope_scaling counts, as in transformers"


def _meaning(found: Any, raw: Mapping[str, Any]) -> Any:
    try:
        return resolve_rope({**raw, "rope_scaling": None, "rope_parameters": found}, 0)
    except QLRError:
        return found


def _original(nested: Any, beside: Any, positions: int) -> Any:
    # transformers 4 looks at the nested one alone, 5 at the other first
    if None not in (nested, beside) and nested != beside:
        raise QLRError(
            f"config: {ORIGINAL} is {beside!r}, and {nested!r} among the rope parameters; versions of transformers differ in which "
            "they take, so give one of them"
        )
    return next((value for value in (nested, beside) if value is not None), positions)


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise QLRError(f"config: {name} is {value!r}; a number above 0 is needed")
    return float(value) if name == "rope_theta" else value
