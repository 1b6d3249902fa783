"""Recipe: every setting of a compression job in one frozen value, YAML in and out."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocators.strategies import DEFAULT, STRATEGIES
from qlr_jax.errors import QLRError
from qlr_jax.paths import local
from qlr_jax.settings.thresholds import Thresholds

if TYPE_CHECKING:
    from qlr_jax.formats.targets import Target

OUTPUTS = ("fisher", "alike")
CONTROLS = ("full", "quick", "none")
DIVISIBLE = (1024, 1024)  # a shape of which every group and block is a divisor


def _field(default: Any, says: str) -> Any:
    return field(default=default, metadata={"says": says})


@dataclass(frozen=True)
class Recipe:
    """The settings of one job, checked when made; the same recipe and seed give the same model again.

    Raises:
        QLRError: for a value that cannot be used, naming the field, the value and what to give instead.

    Example:
        >>> recipe = Recipe.from_yaml("budget: 2.5bpw\\nranks: [0, 16]")
        >>> recipe.budget, recipe.ranks, recipe.updated(seed=1).seed
        ('2.5bpw', (0, 16), 1)
    """

    budget: str = _field(
        "2.25bpw",
        "bits per weight, of linear layers (2.25bpw) or of all (2.5bpw:all); bytes (900MB); a device (device:8GiB,context=8192)",
    )
    seed: int = _field(0, "of the rotations' signs and of every sample")
    state_bits: int = _field(14, "of the trellis in the final solve, 6 to 16: more is better and slower, time grows with 2^bits")
    search_state_bits: int = _field(8, "of the trellis while options are measured")
    rotation_block: int = _field(0, "width of the Hadamard blocks, 0 = the whole width")
    preset: str | None = _field(None, "of the solver; paper = CALDERA as published, for backbones [e8-2] and factors e8-4")
    iterations: int | None = _field(None, "alternations between Q and L R, at most; null = the preset's (4; paper 15)")
    damping: float = _field(0.01, "share of the Hessian's mean diagonal that is added to it")
    target: str = _field(
        "qlr", "the format to compress for: qlr (packed), compressed-tensors or gguf; it restricts backbones, factors"
    )
    backbones: tuple[str, ...] = _field(
        (), "the grids of Q to choose among; a..b is every sixteenth of a bit; empty = all that the target offers"
    )
    ranks: tuple[int, ...] = _field((0, 4, 8, 16, 32, 64), "of L R to choose among; 0 is always one of them")
    factors: tuple[str, ...] = _field(
        (), "grids of L and R to choose among, or pairs: 'int-8,bf16'; empty = all that the target offers"
    )
    vocabulary: tuple[str, ...] = _field(
        (),
        "grids of the embedding and the head to choose among, under a budget that counts them (bytes, device, bpw:all); "
        "[bf16] = kept; empty = all that the target offers",
    )
    include: tuple[str, ...] = _field((), "patterns of the linear layers to compress, e.g. '*.mlp.*'; empty = all")
    exclude: tuple[str, ...] = _field((), "patterns of the linear layers to leave as they are")
    ignore_config: tuple[str, ...] = _field((), "attributes of config.json that are not known here, to go on without")
    backbone_from: str | None = _field(None, "folder of another compression's dense weights: they are Q, and only L R is fitted")
    hessians_from: str | None = _field(None, "folder or file of Hessians made elsewhere, in place of the calibration's")
    hessians: str = _field("plain", "plain (tokens count alike), loss (by squared gradients of the loss) or loss-by-matrix")
    outputs: str = _field("fisher", "how errors of outputs count: fisher (by the end loss: one backward pass) or alike")
    output_tokens: int = _field(65536, "of calibration text at most, on which output Hessians are measured")
    output_shrinkage: float = _field(0.1, "share of a multiple of the identity in output Hessians, which are known from few tokens")
    attribution: str = _field("path", "how KL is attributed to matrices: path, alone, noise, second-order, kronecker or error")
    sequences: int = _field(256, "of calibration text, at most")
    sequence_length: int | None = _field(None, "in tokens; null = 2048, or what the model takes if that is less")
    measure_tokens: int = _field(4096, "of calibration text, on which KL is measured while options are compared")
    refine: int = _field(12, "other allocations, at most, that are built and measured after the first; 0 = none")
    refine_seconds: float = _field(600.0, "that these may take")
    sequential: bool = _field(
        False, "solve the delivered allocation again, each block behind the compressed ones before it; kept where KL falls"
    )
    evaluation_tokens: int = _field(32768, "of held-out text at most, for the figures of the report")
    streaming: bool | None = _field(
        None, "weights and statistics stay on disk and are read block by block; null = where the weights would take half the memory"
    )
    force: bool = _field(False, "go on with less calibration text than a matrix has inputs")
    thresholds: dict[str, Any] | None = _field(  # noqa: RUF009  as the others, and never changed
        None, "that qlr verify holds the result to, e.g. {kl: 0.05}; null = its defaults"
    )
    strategy: str = _field(
        DEFAULT,
        "of allocation, whose result is delivered: allocated (exact, refined by measuring) or, as it is, "
        + ", ".join(name for name in STRATEGIES if name != DEFAULT),
    )
    controls: str = _field(
        "full",
        "uniform and rank 0 beside it: full (solved as it is, and the best is delivered), quick (solved at 8 state bits, for the "
        "report alone) or none",
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _converted(item.name, str(item.type), getattr(self, item.name)))
        for name, low, high in (
            ("seed", 0, 2**32 - 1),
            ("state_bits", 6, 16),
            ("search_state_bits", 6, 16),
            ("rotation_block", 0, 2**20),
            ("iterations", 1, 1000),
            ("damping", 0.0, 1.0),
            ("sequences", 1, 2**24),
            ("sequence_length", 2, 2**24),
            ("measure_tokens", 2, 2**24),
            ("output_tokens", 2, 2**31),
            ("output_shrinkage", 0.0, 1.0),
            ("refine", 0, 10000),
            ("refine_seconds", 1.0, 1e9),
            ("evaluation_tokens", 2, 2**31),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise QLRError(f"recipe: {name} {value} is out of range; give {low:g} to {high:g}")
        if self.rotation_block & (self.rotation_block - 1):
            raise QLRError(
                f"recipe: rotation_block {self.rotation_block} is no power of two; give 64, 128, 256, or 0 (the whole width)"
            )
        Thresholds.of(self.thresholds or {}, "recipe: thresholds")
        _check_preset(self.preset)
        _check_choices(self)
        if self.backbone_from and (self.target not in ("qlr", "adapter") or self.include or self.exclude):
            what = "include and exclude" if self.include or self.exclude else f"target {self.target}"
            raise QLRError(
                f"recipe: {what} cannot be had with backbone_from; leave out either (a lock to bf16 keeps a matrix's Q as it is)"
            )
        if self.sequential and self.backbone_from:
            raise QLRError("recipe: sequential solves backbones too, which backbone_from gives; leave out either")
        if self.target == "adapter" and not self.backbone_from:
            raise QLRError("recipe: target adapter is for the factors of a given backbone; give backbone_from")
        object.__setattr__(self, "target", "adapter" if self.backbone_from else self.target)
        target = _target(self.target)
        for name, offered in (("backbones", target.backbones), ("factors", target.factors), ("vocabulary", target.vocabulary)):
            object.__setattr__(self, name, getattr(self, name) or offered)
        _check_options(self.backbones, self.ranks, self.factors, target)
        _check_vocabulary(self.vocabulary, target)
        _check_budget(self.budget)

    @property
    def refines(self) -> bool:
        """Whether other allocations are measured: never where a strategy was asked for by name, which is delivered as it is."""
        return self.refine > 0 and self.strategy == DEFAULT

    @classmethod
    def of(cls, recipe: Recipe | str | Path | None = None, budget: str | None = None) -> Recipe:
        """A recipe that is given as such or as a YAML file, the defaults where none is, with another budget where one is given."""
        found = recipe if isinstance(recipe, Recipe) else cls.from_yaml(local(recipe)) if recipe else cls()
        return found.updated(budget=budget) if budget else found

    def located(self) -> Recipe:
        """This recipe with whole paths, so that it means the same files wherever it is used again."""
        named = {name: getattr(self, name) for name in ("backbone_from", "hessians_from")}
        # where there is no such file it may be a name on the hub
        return dataclasses.replace(self, **{k: str(local(v)) for k, v in named.items() if v and local(v).exists()})

    @classmethod
    def from_yaml(cls, source: str | Path) -> Recipe:
        """A recipe from a YAML file or text; settings that it does not name keep their defaults."""
        return cls(**read_settings(source))

    def to_yaml(self) -> str:
        """All settings, one a line, each with what it means; `Recipe.from_yaml(recipe.to_yaml()) == recipe`."""
        import yaml

        lines = ["# A recipe of qlr-jax: qlr compress MODEL OUT --recipe THIS_FILE"]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            value = list(value) if isinstance(value, tuple) else value
            flow = None if isinstance(value, list) else False  # a list stays on its line
            text = yaml.safe_dump({item.name: value}, default_flow_style=flow, width=10**6, allow_unicode=True).strip()
            lines.append(f"{text}  # {item.metadata['says']}")
        return "\n".join(lines) + "\n"

    def updated(self, **changes: Any) -> Recipe:
        """This recipe with some settings changed, checked again. Raises QLRError for a setting that does not exist."""
        _check_names(changes)
        # another target, another default of what is chosen among
        old = _target(self.target)
        defaults = {name: () for name in ("backbones", "factors", "vocabulary") if getattr(self, name) == getattr(old, name)}
        return dataclasses.replace(self, **(defaults | changes))


def read_settings(source: str | Path) -> dict[str, Any]:
    """The settings that a YAML file or text names itself, unconverted; one that does not exist is refused by its name.

    A text is YAML if it holds a newline or starts like `name: value`; any other is the path of a file.
    """
    import yaml

    what = "recipe"
    if isinstance(source, Path) or not ("\n" in source or re.match(r"\s*(\w+\s*:(\s|$)|\{|#|$)", source)):
        what = f"recipe {source}"
        try:
            source = local(source).read_text(encoding="utf-8")
        except OSError as error:
            raise QLRError(f"recipe file {source} cannot be read: {error.strerror or error}; give a YAML file") from None
        except UnicodeDecodeError:
            raise QLRError(f"recipe file {source} is not UTF-8 text; give a YAML file") from None
    try:
        settings = yaml.safe_load(source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise QLRError(f"{what} is not YAML: {problem}{where}; write one 'name: value' a line") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise QLRError(f"{what} holds a {type(settings).__name__}, not settings; write one 'name: value' a line")
    _check_names(settings, what)
    return settings


def gathered(file: Path | None, **given: Any) -> dict[str, Any]:
    """The settings of a recipe's file, and over them those of a command line that were given (not None, not empty).

    >>> gathered(None, seed=1, include=[], state_bits=None)
    {'seed': 1}
    """
    return (read_settings(file) if file else {}) | {name: value for name, value in given.items() if value not in (None, [])}


def _check_names(settings: dict[str, Any], what: str = "recipe") -> None:
    known = [item.name for item in dataclasses.fields(Recipe)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            instead = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise QLRError(f"{what} has no setting {name!r}; {instead}")


def _converted(name: str, kind: str, value: Any) -> Any:
    """`value` as the field's type has it: lists become tuples, one pattern a tuple of one, '1e-2' (text to YAML) a number."""
    if kind.endswith("None") and value is None:
        return None
    if kind.startswith("tuple"):
        if isinstance(value, str):
            value = (value,)
        if isinstance(value, list | tuple):
            return tuple(_converted(name, "int" if "int" in kind else "str", entry) for entry in value)
        wanted = "a list such as " + {
            "ranks": "[0, 8, 16]",
            "backbones": "[trellis-2, trellis-3]",
            "factors": "[trellis-2]",
            "ignore_config": "[qk_norm]",
            "vocabulary": "[bf16, int-8g32]",
        }.get(name, "['*.mlp.*']")
    elif kind.startswith("dict"):
        if isinstance(value, dict):
            return dict(value)
        wanted = "a mapping such as {kl: 0.05}"
    elif kind == "float":
        try:
            if not isinstance(value, bool) and math.isfinite(float(value)):
                return float(value)
        except (TypeError, ValueError):
            pass
        wanted = "a number such as 0.01"
    elif kind.startswith("int"):
        if not isinstance(value, bool) and hasattr(value, "__index__"):
            return int(value)
        wanted = "a whole number"
    elif kind.startswith("bool"):
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    else:
        if isinstance(value, str) and value.strip():
            return value.strip()
        examples = {"budget": "2.25bpw", "hessians": "plain", "outputs": "fisher", "attribution": "alone", "strategy": DEFAULT}
        examples["controls"] = CONTROLS[0]
        wanted = "a text such as " + examples.get(name, "'*.mlp.*'")
    raise QLRError(f"recipe: {name} is {value!r}; give {wanted}")


def _check_preset(preset: str | None) -> None:
    from qlr_jax.core.config import SolverConfig

    try:
        SolverConfig.make({}, preset)
    except QLRError as error:
        raise QLRError(f"recipe: {error}") from None


def _check_choices(recipe: Recipe) -> None:
    from qlr_jax.calibration import WEIGHTINGS  # brings JAX along, which a recipe's mere definition does not need
    from qlr_jax.sensitivity import ATTRIBUTIONS

    for name, known in (
        ("hessians", WEIGHTINGS),
        ("outputs", OUTPUTS),
        ("attribution", tuple(ATTRIBUTIONS)),
        ("strategy", tuple(STRATEGIES)),
        ("controls", CONTROLS),
    ):
        if (value := getattr(recipe, name)) not in known:
            raise QLRError(f"recipe: {name} {value!r} is not known; give one of {', '.join(known)}")
    if recipe.attribution == "kronecker" and recipe.outputs != "fisher":
        raise QLRError("recipe: attribution kronecker needs outputs: fisher; give that, or attribution: alone")


def _target(name: str) -> Target:
    from qlr_jax.formats.targets import find_target  # brings JAX along, as above

    try:
        return find_target(name)
    except QLRError as error:
        raise QLRError(f"recipe: {error}") from None


def _check_options(backbones: tuple[str, ...], ranks: tuple[int, ...], factors: tuple[str, ...], target: Target) -> None:
    from qlr_jax.core.spec import Spec, expand_backbones  # brings JAX along, as above

    for name, values in (("backbones", backbones), ("ranks", ranks), ("factors", factors)):
        if not values:
            raise QLRError(f"recipe: {name} is empty; give at least one")
        if twice := [value for value in values if values.count(value) > 1]:
            raise QLRError(f"recipe: {name} names {twice[0]} twice; give it once")
    if bad := [rank for rank in ranks if rank < 0]:
        raise QLRError(f"recipe: ranks has {bad[0]}; give ranks of 0 and more")
    if 0 not in ranks:
        raise QLRError(f"recipe: ranks {list(ranks)} lacks 0; add it, since a result without rank stands beside every other")
    for backbone in backbones:
        try:
            if "+" in backbone:
                raise QLRError(f"{backbone!r} has a rank of its own; give the backbone alone, and the ranks in 'ranks'")
            for single in expand_backbones([backbone]):
                for grids in factors:
                    ranked = Spec.parse(f"{single}+r8@{grids}")
                    if single != "none":
                        target.check("backbones", Spec.parse(single), DIVISIBLE)
                    if any(ranks) and not target.holds(ranked, DIVISIBLE):
                        held = ", ".join(target.factors)
                        raise QLRError(f"{target.name} cannot hold {ranked} exactly; give ranks: [0], or factors: [{held}]")
        except QLRError as error:
            raise QLRError(f"recipe: {error}") from None


def _check_vocabulary(grids: tuple[str, ...], target: Target) -> None:
    from qlr_jax.core.spec import Spec, expand_backbones  # brings JAX along, as above

    try:
        for spec in (Spec.parse(text) for grid in grids for text in expand_backbones([grid])):
            if spec.rotated or spec.rank:
                rows = " (trellis-3/rows is)" if spec.quantizer().unit_scale else ""
                raise QLRError(
                    f"single rows of an embedding cannot be read from {spec}{rows}; give e.g. [bf16, int-8g32, int-4g32]"
                )
            target.check("vocabulary", spec, DIVISIBLE)
    except QLRError as error:
        raise QLRError(f"recipe: vocabulary: {error}") from None


def _check_budget(budget: str) -> None:
    from allocators.budget import Budget
    from allocators.errors import AllocationError

    try:
        Budget.parse(budget)
    except AllocationError as error:
        raise QLRError(str(error)) from None


DEMO = Recipe(sequences=128, ranks=(0, 4, 8, 16, 32), state_bits=10, search_state_bits=10, measure_tokens=8192, refine=0)
"""For the bundled model: minutes on two CPU cores. Refining never gained anything on it, and took a seventh of them."""
