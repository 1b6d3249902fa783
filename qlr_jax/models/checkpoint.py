"""Which files of a folder are the model, as transformers chooses them, and how their tensors are read."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # numpy learns bfloat16 before safetensors reads it
import numpy as np

from qlr_jax.errors import QLRError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMED = "transformers_weights"
"""The attribute of config.json that names the file of weights, or their index, in place of these two."""

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
"""Files that belong to a model beside its weights: its tokenizer's, its chat template's, and how it generates."""

Reader = Callable[[], np.ndarray]

# As safetensors names them; its numpy reader knows none of them (0.8).
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu}

# Other checkpoints that may lie beside the model: PyTorch's, Meta's, TensorFlow's, llama.cpp's.
_OTHERS = ("pytorch_model*.bin", "consolidated*.pt*", "tf_model.h5", "flax_model.msgpack", "*.gguf", "original")
_UNREAD = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The files that hold a folder's model, in the order in which they are read.

    Attributes:
        files: safetensors; of a tensor that several hold, the last one's counts.
        beside: names of other checkpoints in the folder, which are not read.
    """

    files: tuple[Path, ...]
    beside: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """Which of several checkpoints is read; empty where there is one."""
        if not self.beside:
            return ""
        first = self.files[0].name if len(self.files) == 1 else f"{self.files[0].name} and {len(self.files) - 1} more"
        others = ", ".join(self.beside[:3]) + (f" and {len(self.beside) - 3} more" if len(self.beside) > 3 else "")
        return f"{self.files[0].parent} holds several checkpoints: {first} is read, as transformers does; {others} not"


def find_checkpoint(folder: Path) -> Checkpoint:
    """The files that transformers' `from_pretrained` reads: what config.json names, else model.safetensors, else an index's shards.

    Raises:
        QLRError: there are none, one of them is missing, or the folder is of another kind; says what it is.
    """
    if any(_DISTRIBUTED.fullmatch(path.name) for path in folder.iterdir()):
        raise QLRError(f"{folder} holds a distributed checkpoint (shard-*-model-*.safetensors); save it with save_pretrained first")
    if (folder / "adapter_config.json").is_file():
        raise QLRError(
            f"{folder} holds a LoRA adapter (adapter_config.json), which is no model by itself and changes the one beside it; "
            "merge it into its base with peft (merge_and_unload, then save_pretrained) and give that folder"
        )
    name = named_weights(folder) or (SINGLE if (folder / SINGLE).is_file() else INDEX if (folder / INDEX).is_file() else SINGLE)
    names = shards_of(folder / name) if name.endswith(".index.json") else [name]
    for file in names:
        if not (folder / file).is_file():
            raise QLRError(f"{folder / file} does not exist{_hint(folder)}; give a folder with {SINGLE} or all shards of its index")
    safetensors = [path.name for path in folder.glob("*.safetensors") if path.name not in names]
    indices = [INDEX] if name != INDEX and (folder / INDEX).is_file() else []
    others = [path.name for pattern in _OTHERS for path in folder.glob(pattern)]
    return Checkpoint(tuple(folder / file for file in names), tuple(sorted({*safetensors, *indices, *others})))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of `find_checkpoint`, none where it would refuse."""
    try:
        return find_checkpoint(folder).files
    except QLRError:
        return ()


def named_weights(folder: Path) -> str | None:
    """The file of weights, or their index, that config.json names; None where it names none.

    Raises:
        QLRError: it names something else.
    """
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(NAMED)
    except (OSError, ValueError, AttributeError):
        return None  # who reads the config says what is wrong with it
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")) or Path(name).name != name:
        raise QLRError(f"config attribute {NAMED!r} is {name!r}; the name of a safetensors file or index in the folder is needed")
    return name


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index lists, in the order in which they are read.

    Raises:
        QLRError: it is no index.
    """
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise QLRError(f"{index} is not a safetensors index ({type(error).__name__}: {error})") from None


def _hint(folder: Path) -> str:
    """What lies there instead of safetensors."""
    if variants := sorted(path.name for path in folder.glob("model.*.safetensors*") if path.name != INDEX):
        return f" (found the variant {variants[0]}, which is read under the name {SINGLE} only)"
    if other := sorted(path.name for path in folder.glob("*.safetensors")):
        return f" (found {other[0]}, in another naming than transformers')"
    if other := [path.name for pattern in _UNREAD for path in sorted(folder.glob(pattern))]:
        rest = "convert it with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new folder)"
        return f" (found {other[0]}; only safetensors are read, {rest})"
    return ""


def open_tensors(folder: Path) -> dict[str, Reader]:
    """For every tensor of a folder's model a function that reads it. Files are opened here, so a damaged one fails early.

    Raises:
        QLRError: a file that is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    readers: dict[str, Reader] = {}
    for path in find_checkpoint(folder).files:
        if is_pointer(path):
            raise QLRError(f"{path} is a pointer of Git LFS, not the weights; get them with `git lfs pull`, or from the hub")
        try:
            with safe_open(path, framework="numpy") as handle:
                readers |= {name: _reader(name, path) for name in handle.keys()}  # noqa: SIM118  safe_open is no mapping
        except (SafetensorError, OSError) as error:
            raise QLRError(f"{path} is truncated or no safetensors file ({error}); get it again") from None
    return readers


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one that was not fetched.

    Example:
        >>> is_pointer(Path(__file__))
        False
    """
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."


def _reader(name: str, path: Path) -> Reader:
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
    kind = handle.get_slice(name).get_dtype()
    if kind not in _FLOAT8:
        return handle.get_tensor(name)
    _, shape, offset = locate_tensor(path, name)
    return np.fromfile(path, np.uint8, math.prod(shape), offset=offset).view(_FLOAT8[kind]).reshape(shape)


def locate_tensor(path: Path, name: str) -> tuple[str, tuple[int, ...], int]:
    """(safetensors' name of its type, its shape, the byte at which it begins) of a tensor, from the head of its file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    return entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
