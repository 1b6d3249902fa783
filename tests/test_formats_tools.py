"""What other tools do with a packed folder: they read its configuration first, generate, and train LoRA on top."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_formats import change_config
from test_formats_peft import SHAPES, SPECS, packed_folder

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

from qlr_jax.formats.qlr import modeling_qlr as runtime  # noqa: E402
from qlr_jax.native import product  # noqa: E402

IDS = torch.arange(24)[None] % 7 + 40


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return packed_folder(tmp_path_factory.mktemp("tools"), "packed", SPECS, tied=False, shapes=SHAPES | {"vocab_size": 2048})[0]


@pytest.fixture(autouse=True)
def registered():
    """Beside another test process threads that wait for each other take several times as long."""
    runtime.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def get(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# ---------------------------------------------------------------------------------- tools that read config.json first


def test_the_configuration_brings_the_runtime_along(out, monkeypatch, tmp_path):
    """Of transformers' own class, so that every table of transformers knows it; and a saved model keeps it."""
    wanted = logits(get(out))
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "qlr")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "qlr")
    config, unused = AutoConfig.from_pretrained(out, trust_remote_code=True, return_unused_kwargs=True, rms_norm_eps=1e-5, other=1)
    assert type(config) is LlamaConfig and config.rms_norm_eps == 1e-5 and unused == {"other": 1}
    assert type(auto.AutoQuantizationConfig.from_dict(dict(config.quantization_config))).__name__ == "QLRConfig"
    model = get(out, trust_remote_code=True)
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "again")
    assert set(json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
    assert torch.equal(logits(get(tmp_path / "again", trust_remote_code=True)), wanted)
    assert type(AutoConfig.from_pretrained(out)) is LlamaConfig  # nor does it ask whether to trust what it does not need


def test_earlier_folders_load_as_before(out, tmp_path):
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    change_config(copy, lambda config: config["auto_map"].pop("AutoConfig"))
    (copy / "checksums.json").unlink(missing_ok=True)
    for options in ({}, {"trust_remote_code": True}):
        assert torch.equal(logits(get(copy, **options)), logits(get(out)))


@pytest.mark.parametrize("trust", [False, True])
def test_a_pipeline_has_nothing_to_complain_of(out, trust, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        pipe = transformers.pipeline("text-generation", str(out), trust_remote_code=trust)
        found = pipe("def f", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert found.startswith("def f") and not [r for r in caplog.records if "not supported" in r.getMessage()]


def test_a_model_says_what_multiplies_and_writes_the_same_either_way(out, monkeypatch):
    model = get(out)
    written = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert model.qlr_backend == (f"native ({product.instruction_set()})" if product.library() else "torch")
    monkeypatch.setattr(runtime, "native_products", lambda: None)
    assert model.qlr_backend == "torch"
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), written)


# -------------------------------------------------------------------------------------------------- LoRA on top


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, runtime.QLRLinear)}


def test_lora_trains_beside_codes_that_stay(lora, tmp_path):
    """Twenty steps of the Trainer with checkpointing."""
    pytest.importorskip("accelerate")
    import peft

    shapes = SHAPES | {"vocab_size": 96, "num_hidden_layers": 1}
    model = get(packed_folder(tmp_path, "packed", [[*SPECS[0][:3], "bf16", *SPECS[0][4:]]], tied=False, shapes=shapes)[0])
    names, codes = packed(model), {name: t.clone() for name, t in model.state_dict().items()}
    tuned = peft.get_peft_model(model, lora)
    kind = peft.tuners.lora.LoraLayer
    layers = {name.removeprefix("base_model.model.") for name, m in tuned.named_modules() if isinstance(m, kind)}
    assert layers >= set(names) and len(layers) == 7 and not any("lm_head" in name for name in layers)
    settings = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=20, per_device_train_batch_size=1, learning_rate=5e-3, gradient_checkpointing=True,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data: Any = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    trainer = transformers.Trainer(tuned, settings, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    after = {name.replace(".base_layer", ""): t for name, t in tuned.unload().state_dict().items()}
    assert after.keys() == codes.keys() and all(torch.equal(after[name], t) for name, t in codes.items())


def test_lora_is_saved_loaded_and_not_merged(out, lora, tmp_path):
    import peft

    tuned = peft.get_peft_model(get(out), lora)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    wanted = logits(tuned)
    assert not torch.allclose(wanted, logits(get(out)), atol=1e-2)
    tuned.save_pretrained(tmp_path / "lora")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(get(out), tmp_path / "lora")), wanted)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora", dtype=torch.float32, trust_remote_code=True)
    assert torch.equal(logits(again), wanted)
    for merge in (
        tuned.merge_and_unload,
        tuned.merge_adapter,
        tuned.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").merge,
    ):
        with pytest.raises(ValueError, match="cannot be merged into packed layers; load the folder with dequantize"):
            merge()
    assert torch.equal(logits(tuned), wanted)
    dense = get(out)
    dense.dequantize()
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "lora").merge_and_unload()
    assert type(merged) is LlamaForCausalLM and torch.allclose(logits(merged), wanted, atol=1e-4)


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_lora_that_reads_the_dense_weight_is_refused(out, setting):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=f"{next(iter(setting))}.* needs the dense weight of a layer that is packed"):
        peft.get_peft_model(get(out), peft.LoraConfig(target_modules=["q_proj"], **setting))


def test_a_backward_pass_keeps_no_decoded_weight(monkeypatch):
    """What is kept for it is the input, and the gradient is that of the dense layer."""
    monkeypatch.setattr(runtime, "TILE_WEIGHTS", 2000)  # several tiles
    linear = runtime.QLRLinear("int-4g32", (160, 96))
    for buffer in linear.buffers():
        buffer.copy_(torch.randint(0, 255, buffer.shape) if buffer.dtype == torch.uint8 else torch.rand(buffer.shape))
    x, kept = torch.randn(5, 96, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = linear(x)
    y.square().sum().backward()
    assert max(kept, default=0) <= 5 * 160
    wanted = 2 * (x.detach().double() @ linear.dense().double().T) @ linear.dense().double()
    assert torch.allclose(x.grad.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
