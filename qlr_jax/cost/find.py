"""The configuration of a model that may be anywhere: a folder, the bundled one, a well-known name, the hub."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from qlr_jax.errors import QLRError
from qlr_jax.models import LlamaConfig
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
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        from huggingface_hub import hf_hub_download

        try:
            return LlamaConfig.from_hf(Path(hf_hub_download(text, "config.json")), ignore), None
        except QLRError:
            raise
        except Exception as error:  # the hub raises many kinds; each means that nothing was found
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise QLRError(
                f"{text} is no folder, and the hub does not deliver its config.json ({why}); pass a folder that holds one, "
                f"or one of {', '.join(KNOWN)}"
            ) from None
    raise QLRError(
        f"model {text!r} is not known; pass a folder with a config.json, a hub name owner/name, or one of {', '.join(KNOWN)}"
    )
