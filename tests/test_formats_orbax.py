"""A packed model as an Orbax checkpoint, and packed models on a mesh of devices, beside the folder that they come from."""

import json

import jax
import numpy as np
import pytest
from processes import run
from test_formats import random_matrix

import qlr_jax as qlr
from qlr_jax.errors import QLRError
from qlr_jax.formats import export_orbax, save_packed
from qlr_jax.models import load_model

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
SPECS = ("trellis-2+r4@trellis-4", "int-4g32", "int-3g16a/rot+r4@bf16", "e8-2", "nf-4g32")


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    model = load_model(tiny)
    found = {}
    for i, (name, linear) in enumerate(model.linears().items()):
        found[name] = random_matrix(SPECS[i % len(SPECS)], linear.weight.get_value().shape, seed=i, state_bits=6)
    return save_packed(tmp_path_factory.mktemp("packed") / "out", model, found, source=tiny)


def test_a_checkpoint_is_the_folder(packed, tmp_path):
    dest = export_orbax(packed, tmp_path / "orbax", "float32")
    one, other = qlr.load(packed), qlr.load(dest)
    for name, param in one.tensors().items():
        for a, b in zip(jax.tree.leaves(param.get_value()), jax.tree.leaves(other.tensors()[name].get_value()), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    forward = jax.jit(lambda model, tokens: model(tokens))
    np.testing.assert_array_equal(forward(one, TOKENS), forward(other, TOKENS))
    assert "qlr.load" in (dest / "README.md").read_text() and (dest / "tokenizer.json").is_file()
    half = export_orbax(packed, tmp_path / "half")  # what is not packed in bfloat16, as in the folder
    np.testing.assert_array_equal(forward(one, TOKENS), forward(qlr.load(half), TOKENS))


def test_what_cannot_be_exported_or_read_is_one_sentence(packed, tmp_path):
    with pytest.raises(QLRError, match="dtype 'int8' is not offered"):
        export_orbax(packed, tmp_path / "a", "int8")
    dest = export_orbax(packed, tmp_path / "b")
    for path in (dest / "weights").rglob("*"):
        if path.is_file():
            path.write_bytes(b"{")
    with pytest.raises(QLRError, match=r"the Orbax checkpoint cannot be read .*export it again"):
        qlr.load(dest)
    assert not (tmp_path / "a").exists()


ON_A_MESH = """
import json, sys
import jax, numpy as np
import qlr_jax as qlr
folders, tokens = sys.argv[1:], np.arange(24, dtype=np.int32).reshape(2, 12)
mesh = jax.make_mesh((jax.device_count(),), ("rows",))
forward = jax.jit(lambda model, tokens: model(tokens))
wanted = np.asarray(forward(qlr.load(folders[0]), tokens))
for folder in folders:
    model = qlr.load(folder, mesh=mesh)
    leaves = [leaf for param in model.tensors().values() for leaf in jax.tree.leaves(param.get_value())]
    shared = sum(len({str(shard.index) for shard in leaf.addressable_shards}) > 1 for leaf in leaves)
    logits = np.asarray(model(tokens)) if folder == folders[0] else wanted  # they lie alike: one of them op by op is enough
    jitted = np.asarray(forward(model, tokens))
    far = max(float(np.abs(found - wanted).max()) for found in (logits, jitted))
    print(json.dumps([len(leaves), shared, all(len(leaf.devices()) == 8 for leaf in leaves), far, float(np.abs(wanted).max())]))
"""


def test_a_packed_model_lies_sharded_on_eight_devices(packed, tmp_path):
    dest = export_orbax(packed, tmp_path / "orbax")
    for line in run(ON_A_MESH, packed, dest, devices=8).splitlines()[-2:]:
        leaves, shared, everywhere, far, largest = json.loads(line)
        assert everywhere and 0.3 * leaves < shared < leaves
        assert far < 1e-5 * largest
