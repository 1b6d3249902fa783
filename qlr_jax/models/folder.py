"""Hugging Face folders in and out: config.json, safetensors (one file or shards) and the tokenizer; GGUF files in."""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # numpy learns bfloat16 before safetensors reads it
import numpy as np

from qlr_jax.core.lazy import Lazy
from qlr_jax.errors import QLRError
from qlr_jax.models.config import LlamaConfig
from qlr_jax.models.gguf.file import find_gguf, read_gguf
from qlr_jax.models.gguf.tensors import gguf_readers
from qlr_jax.models.gguf.tokenizer import write_companions
from qlr_jax.models.llama import Llama, unpacked
from qlr_jax.models.names import tensor_names
from qlr_jax.paths import local

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip

# Buffers that old checkpoints store although the config determines them.
_REDUNDANT = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")


def find_folder(source: str | Path) -> Path:
    """The local folder of a model: `source` itself, or the snapshot of a hub name such as "meta-llama/Llama-3.2-1B".

    Of a model in a GGUF file it is the file, whether that is given or the folder that holds it (and no safetensors).

    Raises:
        QLRError: neither is there.
    """
    path = local(source)
    if (gguf := find_gguf(path)) is not None:
        return gguf
    if path.is_dir():
        return path
    if path.is_file():
        raise QLRError(f"{source} is a file; give the folder that holds config.json and model.safetensors, or a GGUF file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith((".", "/")):
        raise QLRError(f"folder {source} does not exist; give the folder of a Hugging Face Llama model, or a hub name owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except Exception as error:  # the hub raises many kinds; each means that nothing was found
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QLRError(f"{source} is neither a local folder nor a model that the hub delivers ({why})") from error


def load_model(source: str | Path, dtype: Any = jnp.float32, *, on_disk: bool = False) -> Llama:
    """Import a folder (or hub name, or GGUF file) of a Llama or of a related family; weights are cast to `dtype`.

    With `on_disk` the blocks' tensors are read where they are used and not kept (`Llama.block`), so that memory does not grow with
    the number of blocks; what only reading would show is then found there.

    Args:
        source: the folder, or the hub's name.
        dtype: of weights and activations.
        on_disk: leave the blocks' tensors in their files.

    Raises:
        QLRError: in one sentence, for a missing folder or config, an architecture or attribute that is not known, a truncated file,
            tensors that are missing, unexpected or of another shape, and NaN or infinite weights.
    """
    folder = find_folder(source)
    config = LlamaConfig.from_hf(folder)
    readers = gguf_readers(read_gguf(folder), config) if folder.is_file() else open_tensors(folder)
    expected = tensor_names(config)
    if config.tie_word_embeddings:
        # Some folders store the tied head a second time; it must then be the embedding itself.
        tied = readers.pop("lm_head.weight", None)
        if tied is not None and not np.array_equal(tied(), readers["model.embed_tokens.weight"]()):
            raise QLRError(f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight")
    check_names(folder, set(readers), set(expected))
    # Shapes first and no memory for weights: each array is made once, from its file.
    model = jax.eval_shape(lambda: Llama(config, dtype=dtype))
    for name, param in model.tensors().items():

        def read(name: str = name) -> Any:
            return jnp.asarray(_checked(folder, name, readers[name](), expected[name])).astype(dtype)

        param.set_value(Lazy(expected[name], read, dtype) if on_disk and name.startswith("model.layers.") else read())
    return model


def _checked(folder: Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape:
        raise QLRError(f"{folder}: {name} has shape {array.shape}, but config.json says {shape}")
    if not np.issubdtype(array.dtype, np.floating) and array.dtype != jnp.bfloat16:
        raise QLRError(f"{folder}: {name} has type {array.dtype}; an unquantized model (float32, float16, bfloat16) is needed")
    if not np.isfinite(array.astype(np.float32)).all():
        raise QLRError(f"{folder}: {name} holds NaN or infinite values; the checkpoint is damaged, get it again")
    return array


def check_names(folder: Path, found: set[str], expected: set[str]) -> None:
    """Compare a checkpoint's tensors with those that its config asks for.

    Args:
        folder: for the message.
        found, expected: names of tensors.

    Raises:
        QLRError: tensors are missing or left over.
    """
    found = {name for name in found if not _REDUNDANT.fullmatch(name)}
    for what, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise QLRError(f"{folder}: the checkpoint {what} tensor {min(names)}{more}; config.json and weights do not match")


def open_tensors(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """For every tensor below `folder` a function that reads it. Files are opened here, so a damaged one fails early.

    Raises:
        QLRError: a file that is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (KeyError, ValueError, AttributeError) as error:
            raise QLRError(f"{index} is not a safetensors index ({type(error).__name__}: {error})") from None
    else:
        files = ["model.safetensors"]
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            other = [p.name for pattern in ("*.bin", "*.pth", "*.gguf") for p in folder.glob(pattern)]
            hint = f" (found {other[0]}; only safetensors are read)" if other else ""
            raise QLRError(f"{path} does not exist{hint}; give a folder with model.safetensors or all shards of its index")
        try:
            with safe_open(path, framework="numpy") as handle:
                readers |= {name: _reader(name, path) for name in handle.keys()}  # noqa: SIM118  safe_open is no mapping
        except (SafetensorError, OSError) as error:
            raise QLRError(f"{path} is truncated or no safetensors file ({error}); get it again") from None
    return readers


def _reader(name: str, path: Path) -> Callable[[], np.ndarray]:
    from safetensors import SafetensorError, safe_open

    def read() -> np.ndarray:
        try:
            # opened again: what of a mapped file was read counts as this process's memory until it is closed
            with safe_open(path, framework="numpy") as handle:
                return read_tensor(handle, path, name)
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            raise QLRError(f"{path}: tensor {name} cannot be read ({error})") from None

    return read


def read_tensor(handle: Any, path: Path, name: str) -> np.ndarray:
    """A tensor of an open safetensors file.

    Args:
        handle: of `safe_open`, framework "numpy", which reads all types but float8 (safetensors 0.8).
        path: of its file.
        name: of the tensor.
    """
    if handle.get_slice(name).get_dtype() != "F8_E4M3":
        return handle.get_tensor(name)
    _, shape, offset = locate_tensor(path, name)
    return np.fromfile(path, np.uint8, math.prod(shape), offset=offset).view(ml_dtypes.float8_e4m3fn).reshape(shape)


def locate_tensor(path: Path, name: str) -> tuple[str, tuple[int, ...], int]:
    """(safetensors' name of its type, its shape, the byte at which it begins) of a tensor, from the head of its file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    return entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]


def save_model(model: Llama, folder: str | Path, dtype: str = "bfloat16", tokenizer_from: str | Path | None = None) -> Path:
    """Write a folder of the model's architecture (config.json, generation_config.json, model.safetensors) for transformers.

    Args:
        model: packed weights are written dense.
        folder: where to.
        dtype: of the stored weights.
        tokenizer_from: a folder whose tokenizer files are copied beside the weights.

    Returns:
        The folder.
    """
    from safetensors.numpy import save_file

    out = local(folder)
    out.mkdir(parents=True, exist_ok=True)
    target = jnp.dtype(dtype)
    arrays = {}
    for name, param in model.tensors().items():
        # safetensors writes the bytes of non-contiguous arrays in memory order, silently wrong.
        arrays[name] = np.ascontiguousarray(np.asarray(unpacked(param.get_value())).astype(target))
    save_file(arrays, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    config = model.config.to_hf(dtype)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"_from_model_config": True, "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    if tokenizer_from is not None:
        for name in TOKENIZER_FILES:
            if (local(tokenizer_from) / name).is_file():
                shutil.copyfile(local(tokenizer_from) / name, out / name)
    return out


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model folder (transformers; torch is not needed).

    Raises:
        QLRError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = find_folder(source)
    if folder.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            write_companions(read_gguf(folder), Path(temporary))
            return load_tokenizer(temporary)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise QLRError(f"{folder} holds no tokenizer; give a folder with tokenizer.json")
    try:
        if not (folder / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged file
        raise QLRError(f"the tokenizer of {folder} cannot be read ({str(error).strip().splitlines()[0]})") from error
