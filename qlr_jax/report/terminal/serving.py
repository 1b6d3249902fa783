"""Where a model is served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def serving_text(about: Mapping[str, Any]) -> str:
    """The line that `qlr serve` prints once requests are answered.

    Args:
        about: what `pipelines.serve.serve` hands to `ready`.

    Example:
        >>> serving_text({"model": "small", "url": "http://127.0.0.1:8000", "chat": False, "api_key": False})
        'small at http://127.0.0.1:8000: a page to try it, and /v1/completions (no chat template, no chats). Ctrl-C ends it.'
    """
    paths = "/v1/completions and /v1/chat/completions" if about["chat"] else "/v1/completions (no chat template, no chats)"
    key = "; clients need the API key" if about["api_key"] else ""
    return f"{about['model']} at {about['url']}: a page to try it, and {paths}{key}. Ctrl-C ends it."
