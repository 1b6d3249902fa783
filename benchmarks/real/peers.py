"""What people would pick instead: each makes dense weights of the same linear layers, and says how many bytes they take stored."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.core.batch import solve_many
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.solution import Solution
from qlr_jax.core.spec import Spec
from qlr_jax.models.gguf.file import read_gguf
from qlr_jax.models.gguf.names import gguf_name, natural_order
from qlr_jax.models.gguf.tensors import dequantized
from qlr_jax.sensitivity import Statistics

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Peer:
    """Compressed linear layers.

    Attributes:
        weights: name -> (out, in), float32.
        nbytes: of all of them, as their format stores them.
        note: what to know of it.
    """

    weights: Weights
    nbytes: int
    note: str = ""


# ---- by this library's own means, with the settings of others


def one_spec(
    spec: str, statistics: Statistics, metrics: str = "both", preset: str | None = None, seed: int = 0, **options: Any
) -> Peer:
    """Every matrix by one spec.

    Args:
        spec: of all.
        statistics: weights, H and G.
        metrics: "both" H and G, "inputs" H alone, "diagonal" that of H alone, "none": round to nearest.
        preset, options: of the solver.
        seed: of the rotations' signs.
    """
    problems: dict[str, tuple] = {}
    diagonals: dict[int, np.ndarray] = {}
    for name, weight in statistics.weights.items():
        h = statistics.hessians[name]
        if metrics == "diagonal":
            h = diagonals.setdefault(id(h), np.diag(np.diag(h)))
        elif metrics == "none":
            h = diagonals.setdefault(len(h), np.eye(len(h), dtype=np.float32))
        problems[name] = weight, h, spec, statistics.outputs[name] if metrics == "both" else None
    return as_peer(solve_many(problems, seed=seed, config=SolverConfig.make(options, preset)))


def as_peer(solved: Mapping[str, Solution]) -> Peer:
    """Matrices that this library solved."""
    matrices = {name: solution.value for name, solution in solved.items()}
    return Peer({name: np.asarray(m.dense()) for name, m in matrices.items()}, sum(m.nbytes for m in matrices.values()))


def own_specs(shapes: Mapping[str, tuple[int, int]], bits: float) -> dict[str, tuple[str, dict[str, Any]]]:
    """Names -> (a spec of at most so many bits a weight, how it is solved), of the methods that a rank or a grid fits to a size."""
    weights = sum(math.prod(shape) for shape in shapes.values())

    def best(make: Callable[[int], str], ranks: range) -> str | None:
        fits = (make(r) for r in ranks if sum(Spec.parse(make(r)).nbytes(s) for s in shapes.values()) * 8 <= bits * weights)
        return max(fits, key=lambda spec: Spec.parse(spec).rank, default=None)

    ranks = range(4, min(min(shape) for shape in shapes.values()) + 1, 4)
    found: dict[str, tuple[str | None, dict[str, Any]]] = {
        "CALDERA (paper)": (best(lambda r: f"e8-2+r{r}@e8-4", ranks), {"preset": "paper", "metrics": "inputs"}),
        "one SVD of the residual, both metrics": (
            best(lambda r: f"trellis-2+r{r}@bf16", ranks),
            {"start": "backbone", "iterations": 1},
        ),
        "LQER": (best(lambda r: f"int-2g64a+r{r}@bf16", ranks), {"metrics": "diagonal", "start": "backbone", "iterations": 1}),
    }
    return {name: (spec, how) for name, (spec, how) in found.items() if spec}


# ---- HQQ


def hqq(statistics: Statistics, bits: int, group: int) -> Peer:
    """Half-quadratic quantization, by its own package (`pip install hqq`), which looks at no text."""
    import torch
    from hqq.core.quantize import Quantizer

    weights, size = {}, 0
    for name, weight in statistics.weights.items():
        own = torch.from_numpy(np.array(weight, np.float32))
        how = {"nbits": bits, "group_size": group, "axis": 1, "optimize": True, "round_zero": bits == 4, "channel_wise": True}
        codes, meta = Quantizer.quantize(own, device="cpu", compute_dtype=torch.float32, bitpack=False, **how)
        weights[name] = np.asarray(Quantizer.dequantize(codes, meta).float()).reshape(weight.shape)
        size += math.ceil(weight.size * bits / 8) + weight.size // group * 4  # a float16 scale and zero point a group
    return Peer(weights, size, f"{bits} bits, groups of {group}, a float16 scale and zero point each")


# ---- llama.cpp

KINDS = {"Q4_0": 2, "Q2_K": 10, "Q3_K_S": 11, "IQ2_XXS": 19, "IQ2_S": 28, "IQ4_XS": 30}
"""Of llama.cpp's file types (`llama_ftype`) the numbers of those that are made."""


class _Imatrix(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Params(ctypes.Structure):
    """llama_model_quantize_params, of llama.cpp since April 2026."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *(
            (name, ctypes.c_bool)
            for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")
        ),
        ("imatrix", ctypes.POINTER(_Imatrix)),
        *((name, ctypes.c_void_p) for name in ("kv_overrides", "tt_overrides", "prune_layers")),
        ("beyond", ctypes.c_uint8 * 64),
    )


def _library(folder: Path) -> ctypes.CDLL:
    """libllama of the npm package @node-llama-cpp/linux-x64, unpacked."""
    for part in ("libggml-base.so", "libggml.v*.so"):
        ctypes.CDLL(str(next(folder.rglob(part))), ctypes.RTLD_GLOBAL)
    found = ctypes.CDLL(str(next(folder.rglob("libllama.v*.so"))), ctypes.RTLD_GLOBAL)
    found.llama_model_quantize_default_params.restype = _Params
    found.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Params))
    found.llama_model_quantize.restype = ctypes.c_uint32
    return found


@contextmanager
def _importance(statistics: Statistics) -> Iterator[Any]:
    """The mean square of every input channel, as llama.cpp takes it."""
    arrays = [
        (gguf_name(f"{n}.weight").encode(), np.ascontiguousarray(np.diag(h), np.float32)) for n, h in statistics.hessians.items()
    ]
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = (_Imatrix * (len(arrays) + 1))(*(_Imatrix(name, a.ctypes.data_as(pointer), len(a)) for name, a in arrays))
    yield ctypes.cast(entries, ctypes.POINTER(_Imatrix))
    del arrays


def llama_cpp(model: Path, kind: str, statistics: Statistics, config: Any, library: Path, out: Path) -> Peer:
    """A file type of llama.cpp's, made by its own library with an importance matrix of the same calibration text.

    Args:
        model: a GGUF file; what it holds is dequantized first.
        kind: of KINDS.
        statistics: whose H give the importance.
        config: of the model.
        library: the folder of its package.
        out: the file to write.
    """
    lib = _library(library)
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = 2, KINDS[kind], True
    with _importance(statistics) as params.imatrix:
        if status := lib.llama_model_quantize(str(model).encode(), str(out).encode(), ctypes.byref(params)):
            raise SystemExit(f"llama_model_quantize ended with {status} for {kind}")
    file = read_gguf(out)
    weights, size, kinds = {}, 0, {}
    for name in statistics.weights:
        stored = file.tensors[gguf_name(f"{name}.weight")]
        weights[name] = natural_order(dequantized(stored), name, config)
        size += stored.nbytes
        kinds[stored.kind] = kinds.get(stored.kind, 0) + 1
    out.unlink()
    return Peer(weights, size, ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda i: -i[1])))
