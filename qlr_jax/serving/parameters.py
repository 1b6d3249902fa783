"""The body of a request -> what is to be generated. What is not supported is refused by name, never ignored."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.sampling import GenerationSettings

STOPS = 4  # stop strings of a request, as OpenAI's API has it
COMPLETION_TOKENS = 16  # of a completion that does not say how many, as there
SEEDS = 1 << 32  # that the draws tell apart
TOP_K = (1 << 31) - 1  # more than any vocabulary has, and what an array of the sampling holds
SHOWN = 60  # characters of a wrong value in a message
LARGEST = 1 << 63  # numbers of a body are below it: seeds have 64 bits

SAMPLING = ("temperature", "top_p", "top_k")
LENGTHS = ("max_tokens", "max_completion_tokens")
LABELS = {"user", "metadata", "safety_identifier"}  # for who serves; no text depends on them
READ = {"model", "stop", "stream", "stream_options", "seed", *SAMPLING, *LENGTHS, *LABELS}
# What clients send although it is the default: nothing but that is supported.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}


class RequestError(QLRError):
    """A request that cannot be answered.

    Args:
        message: one sentence.
        param: the parameter that is wrong.
        code: for programs.
        status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a body says beside its prompt.

    Attributes:
        settings: of the sampling; how many tokens is `new_tokens`' to say.
        most: new tokens, where the body says how many.
        stop: strings that end the text.
        stream: whether it is sent as it comes.
        usage: whether a stream ends with its count of tokens.
    """

    settings: GenerationSettings
    most: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool


def parameters(body: Mapping[str, Any], prompt: str) -> Parameters:
    """What `body` says beside its prompt; null is as good as left out.

    Args:
        body: of the request.
        prompt: the parameter that holds the prompt, "prompt" or "messages".

    Raises:
        RequestError: a parameter that is not known or not supported, or a value out of its range.

    Example:
        >>> parameters({"prompt": "a", "temperature": 0, "stop": "b", "seed": 1}, "prompt").stop
        ('b',)
        >>> parameters({"prompt": "a", "n": 2}, "prompt")
        Traceback (most recent call last):
            ...
        qlr_jax.serving.parameters.RequestError: n is 2, and only 1 is supported; leave it out
    """
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name in DEFAULTS:
            if not any(_same(value, default) for default in DEFAULTS[name]):
                only = " or ".join(_shown(default) for default in DEFAULTS[name])
                why = f"{name} is {_shown(value)}, and only {only} is supported; leave it out"
                raise RequestError(why, name, "unsupported_value")
        elif name not in READ and name != prompt:
            raise RequestError(f"{name[:SHOWN]} is not supported; leave it out", name, "unsupported_parameter")
    stream = _boolean(body, "stream")
    return Parameters(_sampling(body), _length(body), _stop(body), stream, _usage(body, stream))


def new_tokens(asked: int | None, default: int, *, limit: int, prompt: int, context: int) -> int:
    """How many tokens to generate, at most.

    Args:
        asked: by the request.
        default: where it does not say; less where less is left.
        limit: of this server.
        prompt: tokens of the prompt.
        context: positions of prompt and answer together.

    Raises:
        RequestError: more than the server allows, or than positions are left.

    Example:
        >>> new_tokens(None, 16, limit=100, prompt=60, context=64), new_tokens(3, 16, limit=100, prompt=60, context=64)
        (4, 3)
    """
    left = context - prompt
    if asked is not None and asked > limit:
        raise RequestError(
            f"{asked} tokens are asked for, and this server gives {limit} at most (qlr serve --max-tokens)", LENGTHS[0]
        )
    if left < (asked or 1):
        raise RequestError(
            f"the prompt of {prompt} tokens and {asked or 1} to follow take {prompt + (asked or 1)} positions, and there are "
            f"{context}; {f'ask for at most {left} or ' if left > 0 else ''}send a shorter prompt",
            LENGTHS[0] if left > 0 else None,
            "context_length_exceeded",
        )
    return asked or min(default, limit, left)


def prompt_of(body: Mapping[str, Any]) -> str | list[int]:
    """The one prompt of a completion: text, or token ids.

    Raises:
        RequestError: none, several, or something else.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    if isinstance(prompt, list) and len(prompt) > 1 and all(isinstance(one, str | list) for one in prompt):
        raise RequestError(f"prompt holds {len(prompt)} prompts; send each in a request of its own", "prompt", "unsupported_value")
    raise RequestError(f"prompt is {_shown(prompt)}; give a text, or a list of token ids", "prompt")


def messages_of(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a conversation, their content as plain text.

    Raises:
        RequestError: none, or one that is not a role with text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {_shown(messages)}; give a list of objects with role and content", "messages")
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} is {_shown(message)}; give an object with role and content", "messages")
    if more := [key for key, value in message.items() if key not in ("role", "content") and value is not None]:
        raise RequestError(f"{where} has {_shown(more[0])}, which is not supported; leave it out", "messages", "unsupported_value")
    content = message.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        if wrong := [kind for kind in kinds if kind != "text"]:
            raise RequestError(
                f"{where} has a part of type {_shown(wrong[0])}; only text is supported", "messages", "unsupported_value"
            )
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str):
        raise RequestError(f"the content of {where} is {_shown(message.get('content'))}; give a text", "messages")
    return {"role": message["role"], "content": content}


def _sampling(body: Mapping[str, Any]) -> GenerationSettings:
    found: dict[str, Any] = {"temperature": 1.0}  # OpenAI's API draws where nothing else is said
    for name, whole in (("temperature", False), ("top_p", False), ("top_k", True), ("seed", True)):
        value = body.get(name, found.get(name))
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or abs(value) >= LARGEST:
            raise RequestError(f"{name} is {_shown(value)}; give a {'whole number' if whole else 'number'}", name)
        found[name] = value
    found["seed"] = found.get("seed", secrets.randbelow(SEEDS)) % SEEDS
    found["top_k"] = min(found.get("top_k", 0), TOP_K)
    try:
        return GenerationSettings(**found)
    except QLRError as error:
        name = next((name for name in SAMPLING if str(error).startswith(name)), None)
        raise RequestError(str(error), name) from None


def _length(body: Mapping[str, Any]) -> int | None:
    given = {name: body[name] for name in LENGTHS if name in body}
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise RequestError(f"{name} is {_shown(value)}; give a whole number of tokens, at least 1", name)
    if len(set(given.values())) > 1:
        raise RequestError(f"{' and '.join(given)} differ; give one of them", LENGTHS[0])
    return next(iter(given.values()), None)


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or len(words) > STOPS or not all(isinstance(word, str) and word for word in words):
        raise RequestError(f"stop is {_shown(stop)}; give a text that is not empty, or a list of up to {STOPS} of them", "stop")
    return tuple(words)


def _usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
        raise RequestError(f"stream_options is {_shown(options)}; only include_usage is supported", "stream_options")
    if options and not stream:
        raise RequestError("stream_options is for a stream; leave it out, or set stream to true", "stream_options")
    return _boolean(options, "include_usage")


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} is {_shown(value)}; give true or false", name)
    return bool(value)


def _shown(value: Any) -> str:
    """A value of the body, as it was sent, for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _same(value: Any, default: Any) -> bool:
    """Whether they are equal as JSON has it, where false is not 0."""
    return value == default and isinstance(value, bool) == isinstance(default, bool)
