"""What is answered, as OpenAI's API has it: texts whole or in chunks, models, errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

SERVER_ERROR = 500


class Reply:
    """The answers to one request.

    Args:
        model: name of the model.
        chat: an answer of /v1/chat/completions, else one of /v1/completions.
    """

    def __init__(self, model: str, chat: bool):
        self._chat, self._model = chat, model
        self._id, self._created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, text: str, finish: str, prompt: int, new: int) -> dict[str, Any]:
        """The answer in one piece.

        Args:
            text: all of it.
            finish: why it ended.
            prompt, new: tokens.
        """
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return self._object([{"index": 0, **said, "logprobs": None, "finish_reason": finish}], usage=usage(prompt, new))

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._chunk({"role": "assistant", "content": ""}, None)] if self._chat else []

    def part(self, text: str) -> dict[str, Any]:
        """A piece of the text."""
        return self._chunk({"content": text} if self._chat else {"text": text}, None)

    def end(self, finish: str) -> dict[str, Any]:
        """Why the text ended."""
        return self._chunk({} if self._chat else {"text": ""}, finish)

    def count(self, prompt: int, new: int) -> dict[str, Any]:
        """The tokens of a stream, for who asked for them."""
        return self._object([], part=True, usage=usage(prompt, new))

    def _chunk(self, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        said = {"delta": said} if self._chat else said
        return self._object([{"index": 0, **said, "logprobs": None, "finish_reason": finish}], part=True)

    def _object(self, choices: list[dict[str, Any]], part: bool = False, **more: Any) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if part else "chat.completion") if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices, **more}


def usage(prompt: int, new: int) -> dict[str, int]:
    """How many tokens there were."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def event(value: dict[str, Any] | str) -> bytes:
    """One server-sent event.

    Example:
        >>> event("[DONE]")
        b'data: [DONE]\\n\\n'
    """
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n".encode()


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error.

    Args:
        message: one sentence.
        status: of HTTP.
        param: the parameter that was wrong.
        code: for programs.
    """
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < SERVER_ERROR else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refused(
    message: str, status: int, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An answer that is an error; arguments as of `error`."""
    return JSONResponse(error(message, status, param, code), status, headers)
