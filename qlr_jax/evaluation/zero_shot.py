"""Zero-shot tasks through lm_eval: the five of the CALDERA paper, any other that lm_eval has, and local ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.engine import HERE, Engine
from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Llama
from qlr_jax.paths import local
from qlr_jax.progress import Progress, silent

PAPER_TASKS: Mapping[str, tuple[str, str | None]] = {
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
    "rte": ("nyu-mll/glue", "rte"),
    "piqa": ("baber/piqa", None),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
}
"""The zero-shot tasks of CALDERA (arXiv 2405.18886, table 1), with the data set that lm_eval reads for each and its part."""

Samples = dict[tuple[str, str], np.ndarray]
"""(task, metric) -> its value for every document, where it has one."""


@dataclasses.dataclass(frozen=True)
class ZeroShotOptions:
    """How zero-shot tasks are measured.

    Attributes:
        include_path: a folder of further tasks as YAML; with `dataset_path: json` and `data_files` they need no network.
        limit: documents of each task, at most.
        batch: rows of a batch, at most.
        shots: examples before each question; the task's own number (0 for the paper's) where not given.
        seed: of the choice of these examples.
        progress: where it is shown; nowhere if not given.
        engine: where batches of requests go through the model.
    """

    include_path: str | Path | None = None
    limit: int | None = None
    batch: int = 8
    shots: int | None = None
    seed: int = 1234
    progress: Progress | None = None
    engine: Engine = HERE


def zero_shot(
    model: Llama, tokenizer: Any, tasks: Sequence[str], options: ZeroShotOptions | None = None, **single: Any
) -> dict[str, Any]:
    """Scores of a model on tasks of lm_eval (the extra `eval`).

    Args:
        model: packed weights are decoded once.
        tokenizer: of this model.
        tasks: names, "paper" for PAPER_TASKS, or paths of YAML files.
        options: how they are measured; the defaults of `ZeroShotOptions` where not given.
        single: fields of `ZeroShotOptions` by name; they win over `options`.

    Returns:
        tasks: name -> {metrics: {name: {value, stderr}}, samples, shots, version}; stderr is that of a mean over documents,
        None where the metric is none. protocol: how they were measured, in a sentence. lm_eval: its version.

    Raises:
        QLRError: lm_eval is not installed, a task is unknown, or its data is not at hand, with how to get it.
    """
    return _measure(model, tokenizer, tasks, dataclasses.replace(options or ZeroShotOptions(), **single))[0]


def compare_zero_shot(
    original: Llama,
    compressed: Llama,
    tokenizer: Any,
    tasks: Sequence[str],
    options: ZeroShotOptions | None = None,
    **single: Any,
) -> dict[str, Any]:
    """`zero_shot` of both models on the same documents.

    Args:
        original, compressed: packed weights are decoded once.
        tokenizer, tasks, options, single: as for `zero_shot`.

    Returns:
        As `zero_shot`, each metric {original, compressed, difference, stderr}: the difference is compressed − original, its
        standard error that of the paired differences, which is smaller than that of either score.

    Raises:
        QLRError: as `zero_shot`.
    """
    options = dataclasses.replace(options or ZeroShotOptions(), **single)
    before, of_original = _measure(original, tokenizer, tasks, options)
    after, of_compressed = _measure(compressed, tokenizer, tasks, options)
    for task, row in after["tasks"].items():
        for metric, score in row["metrics"].items():
            first, key = before["tasks"][task]["metrics"][metric]["value"], (task, metric)
            both = key in of_original and key in of_compressed
            paired = of_compressed[key] - of_original[key] if both else np.empty(0)
            row["metrics"][metric] = {
                "original": first,
                "compressed": score["value"],
                "difference": score["value"] - first,
                "stderr": _standard_error(paired),
            }
    return after


def _load(tasks: Sequence[str], include_path: str | Path | None, shots: int | None, seed: int) -> dict[str, Any]:
    """Every task with its data, ready to run; a task keeps the answers of one run, so each run loads its own."""
    if importlib.util.find_spec("lm_eval") is None:
        raise QLRError("zero-shot tasks need lm_eval, which is not installed; run: pip install 'qlr-jax[eval]'")
    from lm_eval.tasks import TaskManager

    if include_path is not None and not (include_path := local(include_path)).is_dir():
        raise QLRError(f"{include_path} is no folder; give the folder that holds the YAML files of your tasks")
    names = [name for task in tasks for name in (PAPER_TASKS if task == "paper" else [_place(task)])]
    if not names:
        raise QLRError(f"no task is given; name some of lm_eval's, or 'paper' for {', '.join(PAPER_TASKS)}")
    paths = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
        manager = TaskManager(include_path=paths)  # reads thousands of files, so only where it must
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            where = f" or in {include_path}" if include_path else ""
            raise QLRError(
                f"task {name!r} is not in lm_eval {version('lm_eval')}{where}; the paper's are {', '.join(PAPER_TASKS)}, "
                "and --task-path takes a folder of your own"
            )
        try:
            parts = manager.load([name])
        except Exception as error:  # data sets and YAML files fail in many ways
            raise QLRError(_unavailable(name, error)) from error
        for part, entries in parts.items():
            loaded[part].update(entries)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        keeps = own is not None and (own == 0 or shots is None)  # a task that fixes 0 means it, as lm_eval has it
        task.set_config(key="num_fewshot", value=own if keeps else shots or 0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _place(task: str) -> str:
    """A YAML file by its whole path; a name as it is."""
    return str(path) if task.strip() and (path := local(task)).is_file() else task


def _unavailable(name: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    why = lines[0][:200] if lines else type(error).__name__
    if name not in PAPER_TASKS:
        return f"task {name!r} cannot be loaded ({why}); see that its data_files exist, or that its data set can be fetched"
    path, part = PAPER_TASKS[name]
    call = f"datasets.load_dataset({path!r}" + (f", {part!r})" if part else ")")
    return (
        f"the data of task {name!r} is not on this machine and could not be fetched ({why}); run {call} once with a network, "
        "or write a task of local files (dataset_path: json) and pass its folder with --task-path"
    )


def _measure(model: Llama, tokenizer: Any, tasks: Sequence[str], options: ZeroShotOptions) -> tuple[dict[str, Any], Samples]:
    """What `zero_shot` returns, and the value of every document."""
    loaded = _load(tasks, options.include_path, options.shots, options.seed)
    from lm_eval.evaluator import evaluate

    from qlr_jax.evaluation.harness import HarnessModel

    if options.limit is not None and options.limit < 1:
        raise QLRError(f"limit is {options.limit}; give a number of documents, at least 1")
    wrapped = HarnessModel(model, tokenizer, batch=options.batch, progress=options.progress or silent(), engine=options.engine)
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # No resampling by lm_eval: it forks, which a running JAX backend may not survive.
        raw: Any = evaluate(lm=wrapped, task_dict=loaded, limit=options.limit, bootstrap_iters=0, log_samples=True)
    finally:
        logger.setLevel(level)
    assert raw is not None  # None is for other processes than the first
    results, samples = {}, {}
    for name in loaded["tasks"]:
        metrics, of_documents = _metrics(raw["results"][name], raw["samples"][name])
        samples |= {(name, label): values for label, values in of_documents.items()}
        results[name] = {
            "metrics": metrics,
            "samples": raw["n-samples"][name]["effective"],
            "shots": raw["n-shot"][name],
            "version": raw["versions"].get(name),
        }
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    protocol = (
        f"lm_eval {version('lm_eval')}, log-likelihoods in float32, {'one BOS before each text' if begins else 'no BOS'} "
        f"(the tokenizer's own choice), at most {wrapped.max_length} tokens"
    )
    return {"tasks": results, "protocol": protocol, "lm_eval": version("lm_eval")}, samples


def _metrics(scores: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One task's {metric: {value, stderr}}, and of those metrics that are means, the values of the documents."""
    metrics, of_documents = {}, {}
    for key, value in scores.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if kind == "none" else f"{metric} ({kind})"
        single = [document.get(metric) for document in documents if document["filter"] == kind]
        whole = all(isinstance(s, bool | int | float | np.number) for s in single)
        numbers = np.asarray(single, float) if whole else np.empty(0)
        is_mean = numbers.size > 0 and math.isclose(float(numbers.mean()), value, abs_tol=1e-9)
        if is_mean:
            of_documents[label] = numbers
        metrics[label] = {"value": float(value), "stderr": _standard_error(numbers if is_mean else np.empty(0))}
    return metrics, of_documents


def _standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean, None for fewer than two values."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else None
