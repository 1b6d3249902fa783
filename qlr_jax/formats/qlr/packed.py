"""The packed folder in JAX: writing the one that a job delivers, and loading it."""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

import qlr_jax
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.quantizers import Quantizer, trellis
from qlr_jax.core.quantizers import e8 as lattice
from qlr_jax.core.quantizers import search as codes
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.formats.checksums import check_weights, write_checksums
from qlr_jax.formats.files import SHARD_BYTES, Entry, copy_companions, staged, with_type, write_json, write_tensors
from qlr_jax.formats.qlr import placed
from qlr_jax.models import Llama, LlamaConfig, find_folder, is_linear, tensor_names
from qlr_jax.models.checkpoint import open_tensors
from qlr_jax.models.config import carried, read_config_json
from qlr_jax.models.families import FAMILIES
from qlr_jax.models.folder import check_names
from qlr_jax.models.products import unpacked
from qlr_jax.paths import local

FORMAT_VERSION = 1
RUNTIME = "modeling_qlr.py"
RUNTIME_CLASS = "QLRForCausalLM"
VOCABULARY_RUNTIME = 7  # the first runtime that reads a packed embedding or head
# Asked of the core, so that the runtime's own constants are seen to differ where one is changed.
TRELLIS = {
    "length": codes.LENGTH,
    "rows": list(trellis.TILE_ROWS),
    "factor_rows": trellis.FACTOR_ROWS,
    "multiplier": codes.MULTIPLIER,
    "addend": codes.ADDEND,
}
LATTICE = {
    "scales": {str(bits): list(scales) for bits, scales in lattice.SCALES.items()},
    "magnitudes": zlib.crc32((4 * lattice.magnitudes()).astype(np.int8).tobytes()),
    "roots": zlib.crc32((4 * lattice.roots()).astype(np.int8).tobytes()),
}
CODES = {"trellis": TRELLIS, "lattice": LATTICE}  # recorded in every folder
JOB = "job"  # finished matrices of a job under way: they may lie in the output folder already


def save_packed(
    out: str | Path,
    model: Llama,
    matrices: Mapping[str, QLRMatrix],
    *,
    source: str | Path,
    settings: Mapping[str, Any] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a compressed model as a folder that `load` and PyTorch read; all of it, or nothing.

    Args:
        out: the folder to write; it may exist if it is empty but for `job/`.
        model: the original, whose other tensors (embeddings, norms, head, linear layers not in `matrices`) are kept in bf16.
        matrices: name of a linear layer, of the embedding or of the head -> its compressed weight. One whose spec is
            `bf16` is stored as a plain weight.
        source: the original folder, or GGUF file: its config, tokenizer, chat template and generation config are taken over.
        settings: of what JSON has, recorded under "settings" in config.json's quantization_config, for people.
        extra_config: further top-level entries of config.json, e.g. {"base_model": …}.
        files: further text files, name -> content (report.json, recipe.yaml, …).
        shard_bytes: tensors of more bytes than this are split into shards with an index.

    Returns:
        The folder.

    Raises:
        QLRError: `out` has other files in it; a name in `matrices` that the model does not have; a shape that differs.
    """
    out, source = local(out), find_folder(source)
    with staged(out, keep=(JOB,)) as folder:
        write_tensors(folder, _entries(model, matrices), shard_bytes)
        copy_companions(source, folder)
        shutil.copyfile(Path(__file__).with_name(RUNTIME), folder / RUNTIME)
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        raw = carried(read_config_json(source), model.config)
        write_json(folder / "config.json", _config(raw, matrices, settings, extra_config))
        write_checksums(folder)
    return out


def load(out: str | Path, dtype: Any = jnp.float32, *, mesh: Mesh | None = None) -> Llama:
    """A compressed model in JAX: `logits = load(out)(tokens)`. Weights stay packed in memory and are decoded when used.

    Args:
        out: a folder that `save_packed` (or, in PyTorch, `save_pretrained`) wrote, or `qlr export --to orbax`.
        dtype: of activations and of the weights that are not packed.
        mesh: of devices along whose first axis every array is divided by its rows, of codes by rows of tiles, where that divides
            them; the others lie on all of them. None: one device.

    Returns:
        The model; `.densified()` decodes it once, for many calls.

    Raises:
        QLRError: not a qlr folder, a newer format, a missing shard or tensor, a truncated file, or one that differs from
            checksums.json. Comparing reads all weights once more; QLR_SKIP_CHECKSUMS=1 in the environment skips it.
    """
    folder, config, layouts = _open(out)
    readers = placed.readers(folder, mesh) if placed.is_checkpoint(folder) else open_tensors(folder)
    put = lambda array: jax.device_put(array, placed.row_sharding(array.shape, mesh)) if mesh else jnp.asarray(array)  # noqa: E731
    model = jax.eval_shape(lambda: Llama(config, dtype=dtype))  # shapes first, and no memory for weights
    _check(folder, config, layouts, set(readers))
    check_weights(folder)
    shapes = tensor_names(config)
    for name, param in model.tensors().items():
        linear = name.removesuffix(".weight")
        if linear in layouts:
            param.set_value(_matrix(folder, linear, layouts[linear], readers, put))
            continue
        array = readers[name]()
        if array.shape != shapes[name] or not np.isfinite(array.astype(np.float32)).all():
            raise QLRError(f"{folder}: {name} has shape {array.shape} for {shapes[name]}, or is not finite; the folder is damaged")
        param.set_value(put(array).astype(dtype))
    return model


def check_folder(out: str | Path) -> set[str]:
    """Refuse a packed folder that is damaged; the names of its tensors that are packed.

    Raises:
        QLRError: as `load`.
    """
    folder, config, layouts = _open(out)
    _check(folder, config, layouts, set(open_tensors(folder)))
    check_weights(folder)
    return {f"{name}.{key}" for name, layout in layouts.items() for key in array_shapes(layout)}


def read_matrices(out: str | Path) -> dict[str, QLRMatrix]:
    """Every compressed matrix of a packed folder by its linear layer's name, those stored as plain bf16 among them.

    Raises:
        QLRError: as `load`.
    """
    folder, config, layouts = _open(out, plain=True)
    readers = open_tensors(folder)
    _check(folder, config, {k: v for k, v in layouts.items() if v.spec != "bf16"}, set(readers))
    check_weights(folder)
    return {name: _matrix(folder, name, layout, readers) for name, layout in layouts.items()}


def read_config(out: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json as the original had it, quantization_config) of a packed folder.

    Raises:
        QLRError: not a qlr folder, or a newer format.
    """
    folder = local(out)
    if not folder.is_dir():
        raise QLRError(f"folder {out} does not exist; give a folder that `qlr compress` wrote")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantization = raw["quantization_config"]
        mine = quantization["quant_method"] == "qlr"
        version = quantization["format_version"] if mine else None
    except (OSError, ValueError, KeyError, TypeError):
        mine = version = False
    if not mine:
        raise QLRError(f"{folder} is not a qlr folder (no quant_method 'qlr' in config.json); give one that `qlr compress` wrote")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        reads = f"this qlr-jax reads up to {FORMAT_VERSION}"
        raise QLRError(f"{folder} has qlr format version {version}, but {reads}; install a newer one")
    for name, code in CODES.items():
        if quantization.get(name, code) != code:
            raise QLRError(f"{folder} uses another {name} code than this qlr-jax decodes; install the version that wrote it")
    for name in ("quantization_config", "auto_map", *quantization.get("extra_config", ())):
        raw.pop(name, None)
    family = FAMILIES.get(raw.get("model_type"))
    if family and raw.get("architectures") == [runtime_class(family.architecture)]:  # as transformers' save_pretrained writes it
        raw["architectures"] = [family.architecture]
    return raw, quantization


def runtime_class(architecture: str) -> str:
    """The class of the PyTorch runtime that stands in for transformers' own.

    Example:
        >>> runtime_class("LlamaForCausalLM"), runtime_class("MistralForCausalLM")
        ('QLRForCausalLM', 'QLRMistralForCausalLM')
    """
    return RUNTIME_CLASS if architecture == "LlamaForCausalLM" else f"QLR{architecture}"


def array_shapes(layout: Layout) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of every array that a matrix of this layout stores.

    Example:
        >>> {name: shape for name, (shape, _) in array_shapes(Layout("int-4g32", (8, 64))).items()}
        {'backbone.codes': (8, 32), 'backbone.scales': (8, 2), 'scale': (1,)}
    """
    (rows, cols), spec = layout.shape, Spec.parse(layout.spec)
    parts = {"backbone": (spec.quantizer(layout.state_bits, (rows, cols)), rows, cols)}
    if spec.rank:
        left, right = spec.factor_quantizers(layout.state_bits)
        parts |= {"left": (left, spec.rank, rows), "right": (right, spec.rank, cols)}
    found = {f"{part}.{key}": kind for part, (q, *size) in parts.items() for key, kind in q.stored(*size).items()}
    if spec.component_scales:
        found["component_scale"] = ((spec.rank,), np.dtype(np.float16))
    if spec.has_scale:
        found["scale"] = ((1,), np.dtype(np.float32))
    if spec.by_rows:
        found["row_scales"] = ((rows,), np.dtype(np.float16))
    if layout.signs:
        found |= {"output_signs": ((rows,), np.dtype(np.float16)), "input_signs": ((cols,), np.dtype(np.float16))}
    return found


def _entries(model: Llama, matrices: Mapping[str, QLRMatrix]) -> dict[str, Entry]:
    """Every tensor of the folder, in the order of the model."""
    tensors = model.tensors()
    known = model.matrices()
    entries: dict[str, Entry] = {}
    for name in matrices:
        if name not in known:
            raise QLRError(
                f"{name!r} is no linear layer of this model, nor embedding or head; its names are such as {next(iter(known))!r}"
            )
        if not is_linear(name) and not matrices[name].is_by_rows:
            raise QLRError(f"{name}: single rows cannot be read from {matrices[name].spec}; store it as e.g. int-4g32")
    for name, param in tensors.items():
        linear = name.removesuffix(".weight")
        value = matrices.get(linear, param.get_value())
        if isinstance(value, QLRMatrix) and linear in matrices:
            wanted = tensor_names(model.config)[name]
            if tuple(value.shape) != wanted:
                raise QLRError(f"{linear}: the compressed matrix has shape {tuple(value.shape)}, but the model's is {wanted}")
            for key, (shape, kind) in array_shapes(value.layout).items():
                array = np.asarray(value.arrays[key])
                if array.shape != shape or array.dtype != kind:
                    raise QLRError(f"{linear}: {key} is {array.dtype} {array.shape}, but {value.layout.spec} stores {kind} {shape}")
                stored = name if value.layout.spec == "bf16" else f"{linear}.{key}"
                entries[stored] = (array.nbytes, lambda array=array: array)
        else:
            entries[name] = (2 * math.prod(value.shape), lambda value=value: _bf16(value))
    return entries


def _bf16(value: Any) -> np.ndarray:
    return np.asarray(unpacked(value)).astype(ml_dtypes.bfloat16)


def _config(
    raw: dict[str, Any],
    matrices: Mapping[str, QLRMatrix],
    settings: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    fields = ("spec", "shape", "seed", "rotation_block", "state_bits", "signs")
    quantization: dict[str, Any] = {"quant_method": "qlr", "format_version": FORMAT_VERSION}
    quantization |= {"runtime_version": _runtime_version(matrices), "qlr_version": qlr_jax.__version__}
    if settings:
        quantization["settings"] = dict(settings)
    if extra:
        quantization["extra_config"] = sorted(extra)  # so that `read_config` knows what the original did not have
    quantization |= CODES
    quantization["matrices"] = {name: {f: getattr(m.layout, f) for f in fields} for name, m in matrices.items()}
    name = runtime_class(FAMILIES[raw["model_type"]].architecture if raw.get("model_type") in FAMILIES else "LlamaForCausalLM")
    classes = {"AutoConfig": "QLRModelConfig", "AutoModelForCausalLM": name}
    runtime = {"auto_map": {auto: f"{Path(RUNTIME).stem}.{own}" for auto, own in classes.items()}}
    return with_type(raw, "bfloat16") | dict(extra or {}) | runtime | {"quantization_config": quantization}


def _runtime_version(matrices: Mapping[str, QLRMatrix]) -> int:
    """Of the oldest runtime that reads all of them; one that is older still refuses the folder."""
    specs = [Spec.parse(spec) for spec in {matrix.layout.spec for matrix in matrices.values()}]
    quantizers = [q for spec in specs for q in (spec.quantizer(), *(spec.factor_quantizers() if spec.rank else ()))]
    vocabulary = [VOCABULARY_RUNTIME for name, m in matrices.items() if not is_linear(name) and m.layout.spec != "bf16"]
    return max([Quantizer.runtime_version, *(q.needs_runtime for q in quantizers), *vocabulary])


def _open(out: str | Path, plain: bool = False) -> tuple[Path, LlamaConfig, dict[str, Layout]]:
    raw, quantization = read_config(out)
    layouts = {}
    for name, entry in quantization.get("matrices", {}).items():
        try:
            layout = Layout(**{**entry, "shape": tuple(entry["shape"])})
            Spec.parse(layout.spec)
        except (TypeError, KeyError) as error:
            raise QLRError(f"{out}: config.json describes {name} in an unknown way ({error}); the folder is damaged") from None
        if plain or layout.spec != "bf16":
            layouts[name] = layout
    return local(out), LlamaConfig.from_hf(raw), layouts


def _check(folder: Path, config: LlamaConfig, layouts: Mapping[str, Layout], found: set[str]) -> None:
    """Refuse missing and unexpected tensors, and matrices that config.json makes up."""
    shapes = tensor_names(config)
    expected = {name for name in shapes if name.removesuffix(".weight") not in layouts}
    for name, layout in layouts.items():
        if shapes.get(f"{name}.weight") != layout.shape:
            raise QLRError(f"{folder}: config.json describes {name} {layout.shape}, which the model does not have; it is damaged")
        expected |= {f"{name}.{key}" for key in array_shapes(layout)}
    check_names(folder, found, expected)


def _matrix(
    folder: Path, name: str, layout: Layout, readers: Mapping[str, Any], put: Callable[[Any], jax.Array] = jnp.asarray
) -> QLRMatrix:
    arrays = {}
    for key, (shape, kind) in array_shapes(layout).items():
        stored = f"{name}.weight" if layout.spec == "bf16" else f"{name}.{key}"
        array = readers[stored]()
        if layout.spec == "bf16":  # a plain weight: PyTorch may have saved it in another type
            array = array.astype(kind)
        if array.shape != shape or array.dtype != kind:
            asked = f"{layout.spec} asks for {kind} {shape}"
            raise QLRError(f"{folder}: {stored} is {array.dtype} {array.shape}, but {asked}; the folder is damaged")
        arrays[key] = put(array)
    return QLRMatrix(arrays, layout)
