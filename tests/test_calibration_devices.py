"""H and G on eight devices are those of one, and each device does its share."""

import json

from processes import run

SCRIPT = """
import importlib, json
import jax, numpy as np
from qlr_jax.calibration import hessians, output_hessians, squared_gradients
from qlr_jax.models import Llama, LlamaConfig

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
model, draw = Llama(config, jax.random.key(0)), np.random.default_rng(0)
for name, param in model.tensors().items():  # layers that matter, so that many bits do
    param.set_value(param.get_value() * (10 if param.get_value().ndim > 1 else 1))
tokens, weights = draw.integers(0, 64, (21, 128)).astype(np.int32), draw.random((21, 128)).astype(np.float32)

def apart(one, many):
    found = []
    for name, h in one.items():
        size = np.sqrt(np.outer(np.diag(h), np.diag(h)))
        assert np.array_equal(many[name], many[name].T)
        found.append(float(np.abs((many[name] - h) / size).max()))
    return max(found)

one = hessians(model, tokens, weights=weights, devices=1)
told = {"devices": jax.local_device_count(), "H": [apart(one, hessians(model, tokens, weights=weights, **given)) for given in
        ({}, {"devices": 3, "batch": 5}, {"batch": 32})]}
one = output_hessians(model, tokens, seed=1, devices=1)
told["G"] = [apart(one, output_hessians(model, tokens, seed=1, **given)) for given in ({}, {"devices": 3, "batch": 5})]
one, many = (squared_gradients(model, tokens, devices=count) for count in (1, None))
told["s"] = max(float(np.abs(many[name] - s).max() / s.max()) for name, s in one.items())

# operations of one device for one batch of 16 sequences in one block, counted by XLA
def work(of, module, function):
    room, found = importlib.import_module(module), []
    real = getattr(room, function)
    def watched(*given, **static):
        found.append(real.lower(*given, **static).compile().cost_analysis()["flops"])
        return real(*given, **static)
    setattr(room, function, watched)
    for devices in (1, 8):
        of(model, np.tile(tokens[:16], (1, 1)), batch=16, devices=devices)
    setattr(room, function, real)
    return found[-1] / found[0]

told["work"] = [work(hessians, "qlr_jax.calibration.hessians", "_advance"),
                work(output_hessians, "qlr_jax.calibration.descent", "_pull_back")]
print(json.dumps(told))
"""


def test_hessians_on_eight_devices_are_those_of_one():
    told = json.loads(run(SCRIPT, devices=8, environment={"NPROC": "16"}).splitlines()[-1])
    assert told["devices"] == 8
    assert max(told["H"]) < 2e-6 and max(told["G"]) < 2e-6, told  # of √(H_ii H_jj); 16 times the last bit of float32
    assert told["s"] < 1e-5, told
    assert max(told["work"]) < 1.15 / 8, told
