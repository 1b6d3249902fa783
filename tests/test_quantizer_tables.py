"""The library's table of quantizers and the PyTorch runtime's, which travels alone: names, stored arrays, types, values."""

import inspect

import numpy as np
import pytest

from qlr_jax.core.quantizers import DEFAULT_STATE_BITS, QUANTIZERS, parse_quantizer

torch = pytest.importorskip("torch")
from qlr_jax.formats.qlr import modeling_qlr as runtime  # noqa: E402

SHAPE = (21, 53)


def test_same_rows():
    assert list(QUANTIZERS) == list(runtime.QUANTIZERS)
    assert inspect.signature(runtime.QLRLinear).parameters["state_bits"].default == DEFAULT_STATE_BITS


@pytest.mark.parametrize("name", [name for kind in QUANTIZERS.values() for name in kind.examples])
def test_same_arrays_and_values(name):
    quantizer, (row, match) = parse_quantizer(name).for_backbone(SHAPE), runtime.find_row(name)
    assert (row.unit_scale, row.always_rotated) == (quantizer.unit_scale, quantizer.always_rotated)
    part, stored = row.part(match, *SHAPE, quantizer.tile[0], DEFAULT_STATE_BITS), quantizer.stored(*SHAPE)
    if part is None:
        assert not stored
        return
    found = {key: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in part.state_dict().items()}
    assert found == {key: (shape, str(np.dtype(kind))) for key, (shape, kind) in stored.items()}
    rng, arrays, tensors = np.random.default_rng(0), {}, {}
    for key, (shape, kind) in stored.items():
        whole = rng.integers(0, 256, shape) if np.dtype(kind) == np.uint8 else rng.uniform(0.01, 100, shape)
        # rates of cells, whose mean is that of the name
        arrays[key] = np.full(shape, 16 * quantizer.bits, kind) if key == "rates" else whole.astype(kind)
        tensors[key] = torch.from_numpy(arrays[key].view(np.uint8).copy()).view(getattr(torch, str(arrays[key].dtype)))
    part.load_state_dict(tensors)
    np.testing.assert_array_equal(part.whole().numpy(), quantizer.decode(arrays, *SHAPE))
