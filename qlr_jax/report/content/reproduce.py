"""How to make the same model again, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.report.words import MISSING, delivered_key, listed, part_of, strategy_of

LOADING = (
    ("JAX", "import qlr_jax as qlr\n\nmodel = qlr.load(FOLDER)\nlogits = model(tokens)  # tokens: integers, (batch, length)"),
    (
        "PyTorch, with transformers alone",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
    ),
)
FOLDER = "FOLDER is the folder that this page lies in."


def compressed_as(report: Mapping[str, Any]) -> str:
    """How the bits and ranks of what is delivered were chosen, in words."""
    return strategy_of(report, delivered_key(report)).text


def commands(report: Mapping[str, Any]) -> str:
    """What was typed to make the folder, a line a command, in order.

    >>> commands({"command": "qlr demo", "adapted": {"command": "qlr adapt a b"}})
    'qlr demo\\nqlr adapt a b'
    """
    return "\n".join(str(found) for found in (report.get("command"), part_of(report, "adapted").get("command")) if found)


def import_notes(report: Mapping[str, Any]) -> list[str]:
    """What a person should know of how the original's folder was read, a sentence each."""
    return [f"{line}." for line in report.get("import_notes") or ()]


def recipe_title(report: Mapping[str, Any]) -> str:
    """The heading of the recipe."""
    return f"Recipe (seed {part_of(report, 'recipe').get('seed', MISSING)})"


def recipe_text(report: Mapping[str, Any]) -> str:
    """The recipe as YAML; empty where it is not known."""
    if not (recipe := part_of(report, "recipe")):
        return ""
    import yaml

    return yaml.safe_dump(listed(recipe), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True).strip()


def versions(report: Mapping[str, Any]) -> str:
    """The versions of what the job ran with, in a line; empty where they are not known."""
    return ", ".join(f"{name} {value}" for name, value in part_of(report, "versions").items())
