"""Packed layers of the PyTorch runtime by the C++ library of qlr_jax.native, on a processor.

The runtime asks for this module where qlr-jax is installed (`modeling_qlr.native_products`), and goes on without it elsewhere. A
few tokens are multiplied straight from the codes; for more, rows are decoded by the library and a dense product takes them. Sums
are those of the runtime's own path to 1e-5 where x is float32; where it is of 16 bits, activations of up to 8 tokens are rounded to
16 bits within the product, which adds 2e-5: less than a hundredth of what rounding the result to bfloat16 does.
"""

from __future__ import annotations

import copy
import ctypes
import json
import math
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from qlr_jax.native import product
from qlr_jax.native.product import MOST_TOKENS, Kind, Layer, Type

INTERFACE = 1  # of `multiplied`, `decoded` and `backend`: a folder's runtime may be older or newer than this
TILE_WEIGHTS = 2**18  # about as many as the runtime decodes at a time
TYPES = {torch.float32: Type.FLOAT32, torch.bfloat16: Type.BFLOAT16, torch.float16: Type.FLOAT16}


class Known:
    """A layer, or one of its parts, as the library takes it, and the arrays that it points to.

    Attributes:
        structure: None where the library has no product for it.
    """

    def __init__(self, module: torch.nn.Module, make: Callable[[Any, Known], Any]):
        self.buffers = [part._buffers for part in module.modules()]  # and no module, whose end would never come then
        self.kept: list[torch.Tensor] = []
        arrays = self._arrays()
        self.addresses = [array.data_ptr() for array in arrays]
        usable = all(array.device.type == "cpu" and array.is_contiguous() for array in arrays)
        self.structure = make(module, self) if usable else None

    def _arrays(self) -> list[torch.Tensor]:
        return [array for buffers in self.buffers for array in buffers.values() if array is not None]

    def moved(self) -> bool:
        """Whether an array is another now, as after a cast, a move or a load."""
        return self.addresses != [array.data_ptr() for array in self._arrays()]

    def at(self, array: torch.Tensor | None) -> int | None:
        """The address of an array, which is kept as long as this is."""
        if array is None:
            return None
        self.kept.append(array)
        return array.data_ptr()


_layers: WeakKeyDictionary[Any, Known] = WeakKeyDictionary()
_parts: WeakKeyDictionary[Any, Known] = WeakKeyDictionary()


def multiplied(linear: Any, x: torch.Tensor) -> torch.Tensor | None:
    """W x (…, out) in x's type, without the bias; None where the layer's own forward has to do it.

    Args:
        linear: a QLRLinear.
        x: (…, in).
    """
    if torch.compiler.is_compiling():
        return _compiled(linear, x)
    if not _plain(x) or x.dtype not in TYPES or x.device.type != "cpu":
        return None
    tokens = x.numel() // linear.in_features
    if not 0 < tokens <= MOST_TOKENS:
        return None
    layer = _known(_layers, linear, _layer)
    if layer is None:
        return None
    return _by_library(layer, x, linear.out_features)


def _by_library(layer: Layer, x: torch.Tensor, outputs: int) -> torch.Tensor | None:
    x = x.detach().contiguous()
    y, tokens = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype), x.numel() // layer.inputs
    of = (TYPES[x.dtype], torch.get_num_threads(), team())
    wrong = product.multiply(layer, x.data_ptr(), y.data_ptr(), tokens, *of, exact=x.dtype == torch.float32)
    return None if wrong else y


# ------------------------------------------------------------------ inside torch.compile


_linear_class: Callable[..., Any]


def register_linear(linear: Callable[..., Any]) -> None:
    """Let descriptions of layers be read by a runtime's QLRLinear."""
    global _linear_class
    _linear_class = linear


def _compiled(linear: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The product as one operator of the layer's arrays: what is compiled may outlive the layer, or serve a copy of it."""
    form = getattr(linear, "description", None)  # older runtimes have none
    watched = x.requires_grad and torch.is_grad_enabled()
    if form is None or watched or x.dtype not in TYPES or x.device.type != "cpu" or not _has_product(form):
        return None
    if not 0 < x.numel() // linear.in_features <= MOST_TOKENS:
        return None
    names, arrays = [], []
    for name, array in linear.named_buffers():
        names.append(name)
        arrays.append(array)
    return _operator(x, arrays, " ".join(names), form, linear.out_features)


@torch.compiler.assume_constant_result
def _has_product(form: str) -> bool:
    return _known(_layers, _described(form), _layer) is not None


@lru_cache(maxsize=1024)
def _described(form: str) -> Any:
    """A layer as described, its arrays of no meaning."""
    return _linear_class(**json.loads(form))


_by_arrays: dict[tuple[str, tuple[int, ...]], Known] = {}
"""Of compiled calls. A call brings the arrays, so that their addresses are good; they themselves are not kept here."""
MOST_KNOWN = 8192


@torch.library.custom_op("qlr_jax::product", mutates_args=())
def _operator(x: torch.Tensor, arrays: list[torch.Tensor], names: str, form: str, outputs: int) -> torch.Tensor:
    at = form, tuple(array.data_ptr() for array in arrays)
    known = _by_arrays.get(at)
    if known is None:
        known = Known(_assembled(form, names, arrays), _layer)
        known.buffers, known.kept = [], [array for array in known.kept if array.data_ptr() not in at[1]]
        if len(_by_arrays) >= MOST_KNOWN:
            _by_arrays.clear()
        _by_arrays[at] = known
    found = None if known.structure is None else _by_library(known.structure, x, outputs)
    return _assembled(form, names, arrays)(x) if found is None else found  # by the runtime, where arrays lie in pieces


def _assembled(form: str, names: str, arrays: list[torch.Tensor]) -> Any:
    """The layer that these arrays are of."""
    linear = copy.deepcopy(_described(form))
    for name, array in zip(names.split(), arrays, strict=True):
        owner, _, own = name.rpartition(".")
        linear.get_submodule(owner)._buffers[own] = array
    return linear


@_operator.register_fake
def _(x: torch.Tensor, arrays: list[torch.Tensor], names: str, form: str, outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


# ------------------------------------------------------------------ decoding


def decoded(part: Any, start: int, stop: int, dtype: torch.dtype, keep: bool = True) -> torch.Tensor | None:
    """Rows start … stop − 1 of a part, (stop − start, cols); None where its own `decode` has to do it.

    Args:
        part: a Part of the runtime.
        start, stop: which rows.
        dtype: of the result.
        keep: whether the result is to outlive the next call; else it lies in memory of this thread that is used again and again,
            because a fresh megabyte takes longer than what is written to it.
    """
    if torch.compiler.is_compiling() or part.codes.device.type != "cpu" or not _plain(part.codes):
        return None
    known = _known(_parts, part, _part)
    if known is None:
        return None
    room = torch.empty if keep else _room
    rows = room((stop - start, part.cols), dtype=torch.float32)
    wrong = product.decode(known, start, stop, rows.data_ptr(), torch.get_num_threads(), team())
    if wrong or dtype == torch.float32:
        return None if wrong else rows
    return room((stop - start, part.cols), dtype=dtype).copy_(rows)


class _Rooms(threading.local):
    def __init__(self) -> None:
        self.by_type: dict[torch.dtype, torch.Tensor] = {}


_rooms = _Rooms()


def _room(shape: tuple[int, int], *, dtype: torch.dtype) -> torch.Tensor:
    size, room = math.prod(shape), _rooms.by_type.get(dtype)
    if room is None or len(room) < size:
        with torch.inference_mode(False):  # it may serve a backward pass later
            room = _rooms.by_type[dtype] = torch.empty(max(size, TILE_WEIGHTS), dtype=dtype)
    return room[:size].view(shape)


def backend() -> str:
    """The library's instruction set; empty where there is no library."""
    return product.instruction_set()


def _plain(x: torch.Tensor) -> bool:
    """Whether nobody watches what is done with x: neither derivatives nor a trace would have the library's part in them."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
    )


def _known(known: WeakKeyDictionary[Any, Known], module: torch.nn.Module, make: Callable[[Any, Known], Any]) -> Any:
    found = known.get(module)
    if found is None or found.moved():
        known[module] = found = Known(module, make)
    return found.structure


def _layer(linear: Any, known: Known) -> Layer | None:
    layer, buffers = Layer(), linear._buffers
    layer.outputs, layer.inputs, layer.rank, layer.seed = linear.out_features, linear.in_features, linear.rank, linear.seed
    layer.turned_inputs, layer.turned_outputs = linear.rotated or linear.by_rows, linear.rotated
    layer.input_block, layer.output_block = linear.blocks()
    for name in ("backbone", "left", "right") if linear.rank else ("backbone",):
        part = getattr(linear, name)
        made = product.Part() if part is None else _part(part, known)
        if made is None:
            return None
        setattr(layer, name, made)
    for name in ("component_scale", "scale", "row_scales", "input_signs", "output_signs"):
        setattr(layer, name, known.at(buffers.get(name)))
    return layer


def _part(part: Any, known: Known) -> product.Part | None:
    fields = part.native()
    if fields is None:
        return None
    made = product.Part(rows=part.rows, cols=part.cols, height=part.height, codes=known.at(part.codes))
    for name, value in fields.items():
        if name == "kind":
            made.kind = Kind[value]
        else:
            setattr(made, name, known.at(value) if isinstance(value, torch.Tensor) else value)
    return made


@lru_cache
def team() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch has loaded: its threads are awake, and no others are needed."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        path = next(iter(re.findall(r"\S*libgomp\S*", maps)))
        return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, StopIteration, AttributeError):
        return None
