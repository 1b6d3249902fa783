"""A model of this library as lm_eval wants one. Importing this module needs lm_eval (`pip install 'qlr-jax[eval]'`)."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qlr_jax.engine import HERE, Engine
from qlr_jax.errors import QLRError
from qlr_jax.evaluation.generation import stream
from qlr_jax.evaluation.sampling import GenerationSettings
from qlr_jax.evaluation.scoring import scores
from qlr_jax.evaluation.text import decoded_after, stop_position
from qlr_jax.evaluation.windows import batches
from qlr_jax.models.llama import Llama
from qlr_jax.models.vocabulary import check_tokens
from qlr_jax.progress import Progress, silent

MAX_NEW_TOKENS = 256  # where a task does not say, as lm_eval's own models
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # first come, first served
KNOWN_KEYS = frozenset({"until", "do_sample", "temperature", "top_k", "top_p", "num_beams", *LENGTH_KEYS})


class HarnessModel(TemplateLM):
    """lm_eval's interface on a JAX model, tokenizing, truncating and scoring as lm_eval's `hf` model does.

    Text is tokenized as the tokenizer does by itself: most Llama tokenizers put one BOS before it. Two differences to `hf`:
    a rolling log-likelihood starts with exactly one BOS, where `hf` gives two if the tokenizer adds one; and a `top_k`,
    `top_p` or `num_beams` that is not supported is refused, not passed on.

    Args:
        model: packed weights are decoded here, once.
        tokenizer: of this model.
        batch: rows of a batch, at most.
        max_length: tokens that the model reads at most; its max_position_embeddings where not given.
        seed: of sampled generations.
        progress: where it is shown; nowhere if not given.
        engine: where batches go through the model, which must be decoded where that is elsewhere than here.

    Raises:
        QLRError: a batch below 1.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Any,
        *,
        batch: int = 8,
        max_length: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        engine: Engine = HERE,
    ):
        super().__init__()
        if batch < 1:
            raise QLRError(f"batch is {batch}; give at least 1")
        self.model, self.tokenizer, self.batch, self.seed = model.densified(), tokenizer, batch, seed
        self._given, self._engine = model, engine
        self.max_length, self.progress = max_length or model.config.max_position_embeddings, progress or silent()

    @property
    def eot_token_id(self) -> int:
        """What ends a text: the tokenizer's EOS, else the model's."""
        token = self.tokenizer.eos_token_id
        token = next(iter(self.model.config.eos_ids), None) if token is None else token
        if token is None:
            raise QLRError("neither the tokenizer nor the model names an end-of-text token; lm_eval's tasks need one")
        return token

    @property
    def stop_ids(self) -> set[int]:
        """Every token that ends a text: those of the model and the tokenizer's."""
        return {self.eot_token_id, *self.model.config.eos_ids}

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which lm_eval would cache requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are the tokenizer's choice by default, and none are added where the text begins with BOS."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **chosen))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's chat template filled in."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is what greedy decoding gives) of each request."""
        return super().loglikelihood(requests, disable_tqdm=True)  # `progress` alone shows it

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self._check(token for _, *parts in requests for ids in parts for token in ids)
        with self.progress.stage("scoring", total=len(requests)) as stage:
            results = scores(
                self.model if self._engine is HERE else self._given,  # which the engine knows by that very object
                [(context, continuation) for _, context, continuation in requests],
                max_length=self.max_length,
                batch=self.batch,
                on_done=stage.advance,
                engine=self._engine,
            )
        for (texts, _, _), score in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(score))
        return [(score.logp, score.greedy) for score in results]

    def _check(self, tokens: Iterable[int]) -> None:
        check_tokens(list(tokens), self.model.config.vocab_size, self.tokenizer)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token once, in windows as long as the model reads."""
        parts, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                parts.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        results = self._loglikelihood_tokens(parts)
        sums = np.zeros(len(requests))
        np.add.at(sums, np.asarray(owners, int), [logp for logp, _ in results])
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(value))
        return sums.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first stop string: greedy, or sampled where the task asks for it."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        answers = [""] * len(requests)
        with self.progress.stage("generating", total=len(requests)) as stage:
            for members in groups.values():
                settings, until = task_settings(requests[members[0]].args[1], self.seed)
                if settings.max_new_tokens >= self.max_length:
                    raise QLRError(
                        f"a task asks for {settings.max_new_tokens} new tokens, and the model reads {self.max_length}; "
                        "set a smaller max_gen_toks in its generation_kwargs"
                    )
                most = self.max_length - settings.max_new_tokens  # tokens of a context
                contexts = [self.tok_encode(requests[i].args[0])[-most:] or [self.prefix_token_id] for i in members]
                self._check(token for context in contexts for token in context)
                order = np.argsort([len(context) for context in contexts])  # neighbours in length share a bucket
                for batch, live in batches(order[:, None], self.batch):
                    rows, part = [contexts[j] for j in batch[:, 0]], batch[:live, 0]
                    for j, text in zip(part, self._continued(rows, live, settings, until), strict=True):
                        answers[members[j]] = text
                        self.cache_hook.add_partial("generate_until", requests[members[j]].args, text)
                    stage.advance(live)
        return answers

    def _continued(self, rows: list[list[int]], live: int, settings: GenerationSettings, until: list[str]) -> list[str]:
        """What follows the first `live` of the rows, each up to its first stop string."""
        texts, ids = [""] * live, [[] for _ in range(live)]
        # Its text ends a generation too, as with `hf`.
        until = [*until, self.tokenizer.decode([self.eot_token_id])]
        for part in stream(self.model, rows, settings, stop=self.stop_ids):
            for i in range(live):
                ids[i].extend(part[i].tolist())
                texts[i] = decoded_after(self.tokenizer, rows[i], ids[i])
            if all(
                stop_position(text, until) < len(text) or self.stop_ids & set(row) for text, row in zip(texts, ids, strict=True)
            ):
                break
        return [text[: stop_position(text, until)] for text in texts]


def task_settings(given: dict[str, Any], seed: int = 0) -> tuple[GenerationSettings, list[str]]:
    """A task's `generation_kwargs` -> the settings of its generations, and the strings that end them.

    Args:
        given: by the keys of transformers and of lm_eval's tasks.
        seed: of sampled generations.

    Raises:
        QLRError: a key that is not known, or beams.

    Example:
        >>> settings, until = task_settings({"until": "\\n", "max_gen_toks": 5, "do_sample": False, "temperature": 0.7})
        >>> settings, until
        (GenerationSettings(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=5, seed=0), ['\\n'])
    """
    unknown = sorted(set(given) - KNOWN_KEYS)
    if unknown or given.get("num_beams", 1) != 1:
        wrong = unknown[0] if unknown else f"num_beams {given['num_beams']}"
        raise QLRError(f"generation_kwargs: {wrong} is not supported; known are {', '.join(sorted(KNOWN_KEYS))} (one beam)")
    until = given.get("until") or []
    temperature = float(given.get("temperature") or 0.0)
    if given.get("do_sample") and not temperature:
        temperature = 1.0  # as transformers
    settings = GenerationSettings(
        temperature=temperature if given.get("do_sample", temperature > 0) else 0.0,
        top_k=int(given.get("top_k") or 0),
        top_p=float(given.get("top_p") or 1.0),
        max_new_tokens=int(next((given[key] for key in LENGTH_KEYS if given.get(key) is not None), MAX_NEW_TOKENS)),
        seed=seed,
    )
    return settings, [until] if isinstance(until, str) else list(until)
