"""The configuration of a model that may be anywhere: a folder, the bundled one, a well-known name, the hub."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from qlr_jax.errors import QLRError
from qlr_jax.models import LlamaConfig, hub
from qlr_jax.models.bundled import BUNDLED, BUNDLED_NAME
from qlr_jax.models.checkpoint import weight_files
from qlr_jax.models.gguf.file import find_gguf, read_gguf
from qlr_jax.models.known import KNOWN
from qlr_jax.paths import local


def find_config(model: str | Path, ignore: Collection[str] = ()) -> tuple[LlamaConfig, int | None]:
    """The configuration of a folder or GGUF file, of "bundled", or of a hub name, and the bytes of its weights where they are here.

    A name is looked for among the well-known models; of any other on the hub, config.json alone is fetched.

    Args:
        model: folder, file, name.
        ignore: attributes of its config.json to go on without.

    Raises:
        QLRError: nothing of that name.

    Example:
        >>> find_config("meta-llama/Meta-Llama-3-8B-Instruct")[0].num_hidden_layers
        32
    """
    text = str(model)
    folder = BUNDLED if text == BUNDLED_NAME else local(text)
    if (gguf := find_gguf(folder)) is not None:
        return LlamaConfig.from_hf(gguf, ignore), sum(path.stat().st_size for path in read_gguf(gguf).paths)
    if folder.is_dir():
        return LlamaConfig.from_hf(folder, ignore), sum(path.stat().st_size for path in weight_files(folder)) or None
    if folder.is_file():
        return LlamaConfig.from_hf(folder, ignore), None
    name = re.sub(r"^meta-|-(hf|instruct|chat)\b", "", text.rpartition("/")[2].lower())
    if known := {key.lower(): config for key, config in KNOWN.items()}.get(name):
        return known, None
    if hub.parts(text) is not None:
        try:
            file = hub.config_file(text)
        except QLRError as error:
            raise QLRError(f"{error}; pass a folder that holds one, or one of {', '.join(KNOWN)}") from None
        return LlamaConfig.from_hf(file, ignore), None
    raise QLRError(
        f"model {text!r} is not known; pass a folder with a config.json, a hub name owner/name, or one of {', '.join(KNOWN)}"
    )
