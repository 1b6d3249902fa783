"""Recipe: round trips, defaults, and one clear sentence for every setting that cannot be used."""

import dataclasses

import pytest

from qlr_jax.core.config import SolverConfig
from qlr_jax.core.matrix import Layout
from qlr_jax.core.quantizers import DEFAULT_STATE_BITS
from qlr_jax.errors import QLRError
from qlr_jax.settings.recipe import Recipe, read_settings

CHANGED = Recipe(
    budget="900MB",
    seed=7,
    backbones=("trellis-2", "int-4g32"),
    ranks=(0, 64),
    factors="int-8,bf16",
    include=("*.mlp.*",),
    sequence_length=512,
    damping=1e-3,
    force=True,
    hessians="loss-by-matrix",
    thresholds={"kl": 0.05, "parity": None},
)


@pytest.mark.parametrize("recipe", [Recipe(), CHANGED], ids=["defaults", "changed"])
def test_yaml_round_trip(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(recipe.to_yaml()) == Recipe.from_yaml(file) == Recipe.from_yaml(str(file)) == recipe
    assert set(read_settings(file)) == {field.name for field in dataclasses.fields(Recipe)}


def test_only_what_is_named_changes():
    recipe = Recipe.from_yaml("seed: 3")
    assert recipe == Recipe(seed=3)
    assert read_settings("seed: 3") == {"seed": 3}
    assert Recipe.from_yaml("# nothing\n") == Recipe()


def test_values_are_converted():
    recipe = Recipe.from_yaml("damping: 1e-2\ninclude: '*.q_proj'\nranks: [0, 8]\nbackbones: trellis-2")
    assert (recipe.damping, recipe.include, recipe.ranks, recipe.backbones) == (0.01, ("*.q_proj",), (0, 8), ("trellis-2",))
    assert Recipe(ranks=[0, 4]).ranks == (0, 4)


def test_updated_checks_again():
    assert Recipe().updated(seed=5).seed == 5
    with pytest.raises(QLRError, match="state_bits 99 is out of range; give 6 to 16"):
        Recipe().updated(state_bits=99)
    with pytest.raises(QLRError, match="no setting 'sed'; did you mean seed"):
        Recipe().updated(sed=5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bugdet: 2bpw", "no setting 'bugdet'; did you mean budget"),
        ("zzzz: 1", "no setting 'zzzz'; there are budget"),
        ("budget: 2.25", "budget is 2.25; give a text such as 2.25bpw"),
        ("budget: 2.25bits", "2.25bits"),
        ("seed: true", "seed is True; give a whole number"),
        ("seed: 1.5", "seed is 1.5"),
        ("iterations: 0", "iterations 0 is out of range"),
        ("preset: quick", "preset 'quick' is not known; pass one of 'paper'"),
        ("rotation_block: 96", "no power of two"),
        ("damping: lots", "damping is 'lots'; give a number"),
        ("damping: .nan", "damping is nan"),
        ("force: maybe", "give true or false"),
        ("ranks: [8, 16]", "lacks 0"),
        ("ranks: [0, -1]", "ranks of 0 and more"),
        ("ranks: [0, 8, 8]", "8 twice"),
        ("ranks: 8.5", "give a list such as"),
        ("ranks: []", "ranks is empty"),
        ("target: onnx", "qlr, compressed-tensors, gguf"),
        ("{target: gguf, backbones: [trellis-2]}", "int-4g32"),
        ("{target: gguf, factors: [trellis-2]}", "factors: [bf16]"),
        ("backbones: [trellis-9]", "trellis-9"),
        ("backbones: [trellis-2+r8@trellis-4]", "rank of its own"),
        ("factors: none", "factors cannot be none"),
        ("hessians: gptq", "hessians 'gptq' is not known; give one of plain, loss, loss-by-matrix"),
        ("hessians: 2", "hessians is 2; give a text such as plain"),
        ("sequence_length: 1", "sequence_length 1 is out of range"),
        ("[1, 2]\n", "holds a list, not settings"),
        ("a: [1\n", "is not YAML"),
        ("no_such_file.yaml", "no_such_file.yaml cannot be read"),
    ],
)
def test_refusals(text, says):
    with pytest.raises(QLRError) as caught:
        Recipe.from_yaml(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_solver_has_the_same_defaults():
    """The recipe says them itself, so that to read one does not import JAX."""
    assert (Recipe().state_bits, Recipe().damping) == (SolverConfig().state_bits, SolverConfig().damping)
    assert Recipe().state_bits == DEFAULT_STATE_BITS == Layout("trellis-2", (1, 1)).state_bits
