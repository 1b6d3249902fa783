"""The `serve` command: a model behind an OpenAI-style endpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.paths import local
from qlr_jax.pipelines.generate import open_generator
from qlr_jax.progress import Progress

NEEDED = ("starlette", "uvicorn", "jinja2")  # jinja2 fills in chat templates


def serve(
    source: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    queue: int = 8,
    max_tokens: int = 1024,
    context: int | None = None,
    ignore_config: Sequence[str] = (),
    progress: Progress | None = None,
    ready: Callable[[Mapping[str, Any]], object] = lambda about: None,
) -> None:
    """Answer completions and chats with a model until interrupted (SIGINT).

    Args:
        source, ignore_config: as for `generate`.
        host, port: where; port 0 for a free one. Another host than loopback needs an API key.
        api_key: what clients have to send as a bearer token.
        queue: requests that may wait beside the one that is answered.
        max_tokens: new tokens that a request may ask for, and that a chat gets which does not say.
        context: positions of a prompt and its answer together; at most, and by default, the model's.
        ready: called once clients are answered, with url, model, context, max_tokens, queue, chat (whether there is a chat
            template) and api_key (whether one is needed).

    Raises:
        QLRError: starlette or uvicorn is missing, and what `serving.server.bind` and `generate` refuse.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        are = " and ".join(missing) + (" is" if len(missing) == 1 else " are")
        raise QLRError(f"qlr serve needs {', '.join(NEEDED)}, of which {are} not installed; run: pip install 'qlr-jax[serve]'")
    if max_tokens < 1:
        raise QLRError(f"max_tokens is {max_tokens}; give at least 1")
    from qlr_jax.serving import Engine
    from qlr_jax.serving.application import application
    from qlr_jax.serving.server import Server, bind, listen, url

    with closing(bind(host, port, api_key)) as bound:  # before the model is loaded, which may take minutes
        found = open_generator(source, ignore_config=ignore_config, progress=progress)
        engine = Engine(found.model, found.tokenizer, ends=found.ends, queue=queue, context=context)
        del found  # the packed weights
        name = _name(source)
        about = {
            "url": url(bound),
            "model": name,
            "context": engine.context,
            "max_tokens": max_tokens,
            "queue": queue,
            "chat": engine.has_chat_template,
            "api_key": api_key is not None,
        }
        app = application(engine, name=name, most=max_tokens, api_key=api_key)
        listen(bound)
        with engine, suppress(KeyboardInterrupt):
            Server(app, on_start=lambda: ready(about), on_stop=engine.close).run(sockets=[bound])


def _name(source: str | Path) -> str:
    """What requests call the model: the folder's name, or the name that the hub has it under."""
    path = local(source)
    return path.name or "model" if path.exists() else str(source)
