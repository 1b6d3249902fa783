"""Hugging Face folders in and out: config.json, safetensors (one file or shards) and the tokenizer; GGUF files in."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core.lazy import Lazy
from qlr_jax.errors import QLRError
from qlr_jax.models import hub
from qlr_jax.models.checkpoint import COMPANIONS, Reader, find_checkpoint, is_pointer, open_tensors
from qlr_jax.models.config import LlamaConfig, ignored, read_config_json
from qlr_jax.models.float8 import dequantized
from qlr_jax.models.gguf.file import find_gguf, read_gguf
from qlr_jax.models.gguf.tensors import gguf_readers
from qlr_jax.models.gguf.tokenizer import write_companions
from qlr_jax.models.llama import Llama
from qlr_jax.models.names import tensor_names
from qlr_jax.models.parity import differs
from qlr_jax.models.products import unpacked
from qlr_jax.models.rope import rope_note
from qlr_jax.paths import local

TOKENIZER_FILES = COMPANIONS[:-1]

# Buffers that old checkpoints store although the config determines them.
_REDUNDANT = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


# How tensors end that no plain model has, though its config.json may not say so.
_FOREIGN = {
    ".qweight": "GPTQ and AWQ pack weights; give the model that it was made of",
    ".weight.absmax": "bitsandbytes packs weights; give the model that it was made of",
    ".weight_packed": "compressed-tensors packs weights; give the model that it was made of",
    ".lora_A.weight": "a LoRA adapter that is not merged has; merge it with peft (merge_and_unload, then save_pretrained)",
    ".lora_A.default.weight": "a LoRA adapter that is not merged has; merge it with peft (merge_and_unload, then save_pretrained)",
}


def find_folder(source: str | Path) -> Path:
    """The local folder of a model: `source` itself, or what the hub has of "owner/name" or "owner/name@revision".

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
    if hub.parts(str(source)) is None:
        raise QLRError(f"folder {source} does not exist; give the folder of a Hugging Face Llama model, or a hub name owner/name")
    return hub.snapshot(str(source))


def load_model(
    source: str | Path,
    dtype: Any = jnp.float32,
    *,
    on_disk: bool = False,
    ignore: Collection[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> Llama:
    """Import a folder (or hub name, or GGUF file) of a Llama or of a related family; weights are cast to `dtype`.

    With `on_disk` the blocks' tensors are read where they are used and not kept (`Llama.block`), so that memory does not grow with
    the number of blocks; what only reading would show is then found there.

    Args:
        source: the folder, or the hub's name.
        dtype: of weights and activations.
        on_disk: leave the blocks' tensors in their files.
        ignore: names of attributes of config.json to go on without; where torch is installed, the logits of the first blocks are
            then compared with transformers'.
        note: is given, a sentence at a time, what a person should know of how the folder was read.

    Raises:
        QLRError: in one sentence, for a missing folder or config, an architecture or attribute that is not known, a truncated file,
            tensors that are missing, unexpected or of another shape, NaN or infinite weights, and logits that an ignored attribute
            changes.
    """
    folder = find_folder(source)
    raw = read_config_json(folder)
    config = LlamaConfig.from_hf(raw, ignore)
    readers = _readers(folder, raw, config, note)
    expected = tensor_names(config)
    # Shapes first and no memory for weights: each array is made once, from its file.
    model = jax.eval_shape(lambda: Llama(config, dtype=dtype))
    for name, param in model.tensors().items():

        def read(name: str = name) -> Any:
            # numpy converts: JAX would compile that for every shape
            return jax.device_put(np.asarray(_checked(folder, name, readers[name](), expected[name])).astype(dtype))

        param.set_value(Lazy(expected[name], read, dtype) if on_disk and name.startswith("model.layers.") else read())
    if without := ignored(raw, ignore):
        note(_compared(model, folder, raw, without))
    return model


def _readers(folder: Path, raw: dict[str, Any], config: LlamaConfig, note: Callable[[str], None]) -> dict[str, Reader]:
    """What reads each tensor of the model; nothing is missing or left over."""
    if folder.is_file():
        readers, scaled, checkpoint = gguf_readers(read_gguf(folder), config), [], ""
    else:
        block = (raw.get("quantization_config") or {}).get("weight_block_size")
        readers, scaled = dequantized(open_tensors(folder), block)
        checkpoint = find_checkpoint(folder).note
    expected = set(tensor_names(config))
    embedding = "model.embed_tokens.weight"
    if config.tie_word_embeddings and "lm_head.weight" in readers:
        # Some folders store the tied head a second time, some it alone; where both are there they must be one.
        tied = readers.pop("lm_head.weight")
        if not np.array_equal(tied(), readers.setdefault(embedding, tied)()):
            raise QLRError(f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from {embedding}")
    zeros = [name for name in readers if name.endswith(".bias") and name not in expected]
    for name in zeros:
        if np.any(readers.pop(name)()):
            raise QLRError(
                f"{folder}: {name} is stored and not zero, but config.json gives the model no such bias, so transformers would "
                "leave it out; set attention_bias or mlp_bias to true where the model has one, or take the tensors out"
            )
    check_names(folder, set(readers), expected)
    for line in (checkpoint, rope_note(raw)):
        if line:
            note(line)
    if scaled:
        note(f"{len(scaled)} weights are stored as float8 and read as what they and their scales multiply to")
    if zeros:
        note(f"{len(zeros)} biases are stored that config.json does not have, such as {zeros[0]}; all are zero and left out")
    return readers


def _compared(model: Llama, folder: Path, raw: dict[str, Any], without: dict[str, Any]) -> str:
    """That attributes were ignored, and what transformers says to it."""
    named = ", ".join(f"{name} ({value!r})" for name, value in without.items())
    try:
        found, why = differs(model, folder), "torch is not installed"
    except QLRError as error:
        found, why = None, str(error)
    if found is None:
        return f"config.json's {named} ignored as asked; the logits were not compared with transformers', because {why}"
    blocks, difference, limit = found
    if difference > limit:
        raise QLRError(
            f"{folder}: without config.json's {named} the logits of the first {blocks} blocks differ from transformers' by "
            f"{difference:.1e} of the largest, so the attribute counts; give a model that does without it"
        )
    own = "; the model's own code (auto_map) was not run" if raw.get("auto_map") else ""
    return (
        f"config.json's {named} ignored as asked; the logits of the first {blocks} blocks equal transformers' to {difference:.1e} "
        f"of the largest{own}"
    )


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
    foreign = {end: why for end, why in _FOREIGN.items() if any(name.endswith(end) for name in found - expected)}
    if foreign:
        end, why = next(iter(foreign.items()))
        raise QLRError(f"{folder}: the checkpoint has tensors *{end}, as {why}")
    for what, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise QLRError(f"{folder}: the checkpoint {what} tensor {min(names)}{more}; config.json and weights do not match")


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


PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # one class: that of tokenizer.json as it is


def _tokenizer_class(folder: Path) -> object:
    """What tokenizer_config.json names; None where it names nothing or code of the folder's own."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return None if "auto_map" in config else config.get("tokenizer_class")


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model folder (transformers; torch is not needed).

    Raises:
        QLRError: there is none, or it cannot be read.
    """
    from transformers import PreTrainedTokenizerFast

    folder = find_folder(source)
    if folder.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            write_companions(read_gguf(folder), Path(temporary))
            return load_tokenizer(temporary)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise QLRError(f"{folder} holds no tokenizer; give a folder with tokenizer.json")
    try:
        if not (folder / "tokenizer_config.json").is_file() and (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        if _tokenizer_class(folder) in PLAIN_TOKENIZERS:
            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        from transformers import AutoTokenizer  # here: it imports torch where that is installed, which takes some seconds

        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged file
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            raise QLRError(
                f"{folder} has its tokenizer as tokenizer.model alone, which could not be converted ({why}); install sentencepiece "
                "and protobuf, or put the tokenizer.json of the same model beside it"
            ) from error
        if pointers := [name for name in TOKENIZER_FILES if (folder / name).is_file() and is_pointer(folder / name)]:
            why = f"{pointers[0]} is a pointer of Git LFS; get it with `git lfs pull`, or from the hub"
        raise QLRError(f"the tokenizer of {folder} cannot be read ({why})") from error
