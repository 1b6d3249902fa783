"""A folder against its configuration before vLLM loads it: of a quantized model vLLM itself does not miss what is not there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from qlr_jax.errors import QLRError
from qlr_jax.formats.qlr import modeling_qlr as runtime


def check_folder(folder: Path, config: Any, matrices: dict) -> None:
    """Compare names, shapes and types of all tensors with what the model has, and files with their checksums, as transformers does.

    Args:
        folder: with config.json and the weights.
        config: transformers' configuration of the model.
        matrices: how each matrix is packed.

    Raises:
        ValueError: the first thing that is wrong, by the runtime or as QLRError.
    """
    names = config.architectures or []
    # a folder has the plain name, unless transformers saved it
    made = next((plain for plain, packed in runtime.PACKED.items() if {plain.__name__, packed.__name__} & set(names)), None)
    if made is None:
        known = ", ".join(plain.__name__ for plain in runtime.PACKED)
        raise QLRError(f"a qlr folder holds one of {known}, not {', '.join(names)}; install a newer qlr-jax")
    with torch.device("meta"):
        model = made(copy.deepcopy(config))
        runtime.replace_linears(model, matrices)
    files = [str(path) for path in weight_files(folder)]
    runtime.check_tensors(model, files)
    runtime.check_sums(files)


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's weights are in."""
    index = folder / runtime.INDEX
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError):
        raise QLRError(f"{index} is damaged; get it again") from None
