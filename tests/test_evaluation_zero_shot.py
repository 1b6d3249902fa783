"""Zero-shot tasks through lm_eval, offline: local tasks against a direct computation and against lm_eval's own `hf` model."""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from qlr_jax.errors import QLRError
from qlr_jax.evaluation import PAPER_TASKS, GenerationSettings, compare_zero_shot, zero_shot
from qlr_jax.models import load_model, load_tokenizer
from qlr_jax.models.bundled import BUNDLED

pytest.importorskip("lm_eval")
import datasets
import huggingface_hub.constants
import lm_eval.tasks

from qlr_jax.evaluation.harness import HarnessModel, task_settings

QUESTIONS = [
    ("import os\nimport", ["sys", "zebra", "==="], 0),
    ("def __init__(self,", ["None)", "name):", "] ="], 1),
    ("for i in", ["range(10):", "while", ")"], 0),
    ("if x is not", ["elif", "None:", "pass"], 1),
    ("raise ValueError", ["of the", "('x')", "[[["], 1),
]
PROMPTS = ["import os\nimport", "def __init__(self", "class A(", "    return"]
TEXTS = ["def f(x):\n    return x\n", "import sys\n" * 40, "x"]
run = jax.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def model():
    return load_model(BUNDLED)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED)


@pytest.fixture(scope="module")
def wanted(model, tokenizer):
    """Greedy continuations up to the end of a line, each token from a pass over everything."""
    found = []
    for prompt in PROMPTS:
        start = tokenizer.encode(prompt)
        ids = list(start)
        for _ in range(6):
            row = np.zeros((1, 64), np.int32)
            row[0, : len(ids)] = ids
            ids.append(int(np.asarray(run(model, jnp.asarray(row)))[0, len(ids) - 1].argmax()))
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        found.append(whole[len(tokenizer.decode(start, skip_special_tokens=True)) :].split("\n")[0])
    return found


@pytest.fixture
def tasks(tmp_path, monkeypatch, wanted):
    """A folder of three local tasks; nothing is read from or written to the user's caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(name, rows, **settings):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | settings))

    write(
        "local_choice", [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS],
        output_type="multiple_choice", fewshot_split="test",
        doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="answer",
        metric_list=[{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    )  # fmt: skip
    answers = [wanted[0], "nothing like it", wanted[2], "nor this"]
    write(
        "local_exact", [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)],
        output_type="generate_until", doc_to_text="{{prompt}}", doc_to_target="{{answer}}", target_delimiter="",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    write(
        "local_text", [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    )  # fmt: skip
    return folder


def log_likelihood(model, ids, count):
    """Of the last `count` tokens of `ids`, in float64; two lengths, so that little is compiled."""
    row = np.zeros((1, 64 if len(ids) <= 64 else 256), np.int32)
    row[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(run(model, jnp.asarray(row)), np.float64)[0]
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return sum(logp[t, ids[t + 1]] for t in range(len(ids) - 1 - count, len(ids) - 1))


def test_scores_equal_a_direct_computation(model, tokenizer, tasks):
    names = ["local_choice", "local_exact", "local_text"]
    found = zero_shot(model, tokenizer, names, include_path=tasks, batch=3)
    assert list(found["tasks"]) == names and "lm_eval 0." in found["protocol"]

    right, right_norm = [], []
    for question, choices, answer in QUESTIONS:
        context = tokenizer.encode(question)
        rows = [tokenizer.encode(f"{question} {choice}") for choice in choices]
        values = np.asarray([log_likelihood(model, ids, len(ids) - len(context)) for ids in rows])
        right.append(values.argmax() == answer)
        right_norm.append((values / [len(choice) for choice in choices]).argmax() == answer)
    choice = found["tasks"]["local_choice"]
    assert choice["samples"] == 5 and choice["shots"] == 0
    for metric, values in (("acc", right), ("acc_norm", right_norm)):
        assert choice["metrics"][metric]["value"] == pytest.approx(np.mean(values))
        assert choice["metrics"][metric]["stderr"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(5))
    assert 0 < np.mean(right) <= 1

    assert found["tasks"]["local_exact"]["metrics"]["exact_match"]["value"] == 0.5

    # One BOS, every token of the text scored once; the second text is longer than the model's 256 positions.
    total = 0.0
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        first = ids[:256]
        total += log_likelihood(model, [tokenizer.bos_token_id, *first], len(first))
        if rest := len(ids) - 256 if len(ids) > 256 else 0:
            total += log_likelihood(model, ids[-257:], rest)
    want = np.exp(-total / sum(len(text.encode()) for text in TEXTS))
    metric = found["tasks"]["local_text"]["metrics"]["byte_perplexity"]
    assert metric["value"] == pytest.approx(want, rel=1e-5) and metric["stderr"] is None


def test_limit_and_paired_comparison(model, tokenizer, tasks):
    worse = load_model(BUNDLED)
    draw = np.random.default_rng(0)
    for linear in worse.linears().values():
        w = np.asarray(linear.weight.get_value())
        linear.weight.set_value(w + 0.5 * w.std() * draw.standard_normal(w.shape, np.float32))
    settings = {"include_path": tasks, "batch": 3}  # as other tests: another batch would be compiled anew
    same = compare_zero_shot(model, model, tokenizer, ["local_choice"], limit=3, **settings)["tasks"]["local_choice"]
    shots = zero_shot(model, tokenizer, ["local_choice"], limit=2, shots=1, **settings)["tasks"]["local_choice"]["shots"]
    assert shots == 1
    assert same["samples"] == 3 and same["metrics"]["acc"]["difference"] == same["metrics"]["acc"]["stderr"] == 0
    found = compare_zero_shot(model, worse, tokenizer, ["local_exact"], **settings)["tasks"]["local_exact"]["metrics"]
    metric = found["exact_match"]
    assert metric["original"] == 0.5 and metric["difference"] == metric["compressed"] - 0.5 <= 0


def test_requests_equal_those_of_lm_evals_own_model(model, tokenizer, wanted):
    """Likelihoods, greediness and generations, request by request, also where contexts must be cut."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    other = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32),
        tokenizer=tokenizer,
        device="cpu",
        batch_size=2,
    )
    ours = HarnessModel(model, tokenizer, batch=3)
    assert (ours.max_length, ours.prefix_token_id, ours.eot_token_id) == (
        other.max_length,
        other.prefix_token_id,
        other.eot_token_id,
    )

    def asked(kind, arguments):
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    pairs = [(question, f" {choice}") for question, choices, _ in QUESTIONS for choice in choices]
    pairs += [("", "import os"), ("def f(x): ", "return"), ("import sys\n" * 100, "import os\n"), (PROMPTS[0], wanted[0])]
    for (a, greedy), (b, same) in zip(*(m.loglikelihood(asked("loglikelihood", pairs)) for m in (ours, other)), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4) and greedy == same
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [(prompt, settings) for prompt in [*PROMPTS, "import sys\n" * 100]]
    ours_text, other_text = (m.generate_until(asked("generate_until", prompts)) for m in (ours, other))
    assert ours_text == other_text


def test_a_missing_task_missing_data_and_missing_lm_eval_are_one_sentence(model, tokenizer, tasks, monkeypatch, tmp_path):
    for module, name in ((datasets.config, "HF_DATASETS_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(module, name, True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    # of lm_eval's own tasks one folder: to read all of its thousands of files takes longer than all of this
    own = Path(lm_eval.tasks.__file__).parent / "piqa"
    manager = lm_eval.tasks.TaskManager
    real = functools.cache(lambda *paths: manager(include_path=list(paths), include_defaults=False))
    few = lambda include_path, include_defaults=True: real(str(include_path), *[str(own)] * include_defaults)  # noqa: E731
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    with pytest.raises(
        QLRError, match=r"data of task 'piqa' is not on this machine.*load_dataset\('baber/piqa'\) once with a network"
    ):
        zero_shot(model, tokenizer, ["piqa"], include_path=tasks)
    with pytest.raises(QLRError, match=r"task 'piqaa' is not in lm_eval 0.* or in .*the paper's are winogrande, rte, piqa"):
        zero_shot(model, tokenizer, ["local_choice", "piqaa"], include_path=tasks)
    (tasks / "local_choice.jsonl").unlink()
    with pytest.raises(QLRError, match=r"task 'local_choice' cannot be loaded .*data_files exist"):
        zero_shot(model, tokenizer, ["local_choice"], include_path=tasks)
    for bad, says in (({"include_path": tmp_path / "no"}, "no is no folder"), ({"limit": 0}, "limit is 0")):
        with pytest.raises(QLRError, match=says):
            zero_shot(model, tokenizer, ["local_text"], **{"include_path": tasks} | bad)
    with pytest.raises(QLRError, match="no task is given"):
        zero_shot(model, tokenizer, [])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(QLRError, match=r"pip install 'qlr-jax\[eval\]'"):
        zero_shot(model, tokenizer, ["local_choice"])
    assert list(PAPER_TASKS) == ["winogrande", "rte", "piqa", "arc_easy", "arc_challenge"]


def test_generation_settings_of_a_task():
    assert task_settings({}) == (GenerationSettings(max_new_tokens=256), [])
    assert task_settings({"do_sample": True}, seed=3)[0] == GenerationSettings(1.0, max_new_tokens=256, seed=3)
    assert task_settings({"temperature": 0.5, "max_tokens": 3, "top_k": 4})[0] == GenerationSettings(0.5, 4, max_new_tokens=3)
    settings, until = task_settings({"do_sample": False, "temperature": 0.5, "until": "a"})
    assert settings.temperature == 0 and until == ["a"]
    for wrong in ({"num_beams": 4}, {"repetition_penalty": 1.1}):
        with pytest.raises(QLRError, match="is not supported"):
            task_settings(wrong)
