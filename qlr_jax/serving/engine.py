"""Requests for text: one is generated at a time, the others wait in a queue of bounded length. Nothing here knows of HTTP."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.sampling import GenerationSettings
from qlr_jax.evaluation.text import Piece, encode_prompt, stream_pieces
from qlr_jax.models import Llama
from qlr_jax.models.vocabulary import check_tokens

log = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be generated.

    Attributes:
        tokens: of the prompt.
        settings: how many new tokens, and how they are sampled.
        stop: strings that end the text; they are not part of it.
    """

    tokens: Sequence[int]
    settings: GenerationSettings
    stop: Sequence[str] = ()


class QueueFull(QLRError):
    """As many requests wait as may.

    Attributes:
        retry_after: seconds after which a place may be free.
    """

    def __init__(self, waiting: int, retry_after: int):
        are = "1 request waits" if waiting == 1 else f"{waiting} requests wait"
        super().__init__(f"{are} already, as many as may beside the one that is answered; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopping(QLRError):
    """The engine was closed before the text was whole."""

    def __init__(self) -> None:
        super().__init__("the server is being stopped; send the request again once it runs")


class Failed(QLRError):
    """Generating raised what it should not have, such as an array that does not fit; the log holds it whole."""

    def __init__(self, error: Exception):
        why = str(error).strip().partition("\n")[0][:200]
        super().__init__(f"the model failed on this request ({type(error).__name__}: {why}); a shorter one may do")


class Ticket:
    """A request that was accepted."""

    def __init__(self, engine: Engine, pieces: Generator[Piece], deliver: Callable[[Piece | QLRError], None]):
        self.pieces, self.deliver, self.cancelled, self._engine = pieces, deliver, False, engine

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves the queue, or stops after the tokens that are being made."""
        self._engine.forget(self)


class Engine:
    """A model, its tokenizer and one worker. `with engine:` lets it work.

    Args:
        model: packed weights that C++ has no product for are decoded once.
        tokenizer: of this model.
        ends: tokens that end a text; the model's end-of-text tokens where not given.
        queue: requests that may wait beside the one that is generated.
        context: positions that a prompt and what follows it may take; at most, and by default, the model's.

    Raises:
        QLRError: a queue below 0 or a context below 2.
    """

    def __init__(
        self, model: Llama, tokenizer: Any, *, ends: Sequence[int] | None = None, queue: int = 8, context: int | None = None
    ):
        if queue < 0:
            raise QLRError(f"a queue of {queue} requests is asked for; give 0 or more")
        most = model.config.max_position_embeddings
        if context is not None and context < 2:
            raise QLRError(f"a context of {context} is asked for; give at least 2 positions, one for the prompt and one after it")
        self.context = most if context is None else min(context, most)
        self.model, self.ends = model.for_generation(), model.config.eos_ids if ends is None else tuple(ends)
        self._tokenizer = _OneAtATime(tokenizer)
        self._queue, self._waiting, self._running = queue, deque[Ticket](), None
        self._change, self._closed, self._seconds = threading.Condition(), False, 1.0
        # A daemon: a second Ctrl-C may end the process while a long program is being compiled.
        self._worker = threading.Thread(target=self._work, name="qlr-serve", daemon=True)

    def __enter__(self) -> Engine:
        self._worker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self._worker.join()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether a request is being answered."""
        return self._running is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether `tokens` takes conversations."""
        return bool(getattr(self._tokenizer.tokenizer, "chat_template", None))

    def tokens(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt: of a text as `qlr generate` takes it, of a conversation by the tokenizer's chat template.

        Args:
            prompt: a text, a conversation, up to where its next answer begins, or token ids.

        Raises:
            QLRError: an empty text where the tokenizer has no BOS, a token that the model lacks, a conversation without a chat
                template, or one that the template refuses.
        """
        tokenizer = self._tokenizer.tokenizer
        with self._tokenizer.lock:
            if isinstance(prompt, str):
                found = encode_prompt(tokenizer, prompt)
            elif messages := [message for message in prompt if isinstance(message, Mapping)]:
                found = _conversation(tokenizer, messages)
            else:
                found = [token for token in prompt if isinstance(token, int)]
        check_tokens(found, self.model.config.vocab_size, tokenizer)
        return found

    def submit(self, request: Request, deliver: Callable[[Piece | QLRError], None]) -> Ticket:
        """Put a request at the end of the queue.

        Args:
            request: what to generate.
            deliver: called by the worker with each piece, the last one with its `finish`, or with `Failed` or `Stopping`, which is
                the last thing then. It must neither wait nor raise.

        Raises:
            QueueFull: no place in the queue.
            Stopping: the engine is closed.
            QLRError: what `evaluation.generate` refuses.
        """
        found = stream_pieces(
            self.model, self._tokenizer, request.tokens, request.settings, stop=request.stop, ends=self.ends
        )  # refuses at once what it refuses, and computes nothing before its first piece is asked for
        ticket = Ticket(self, found, deliver)
        with self._change:
            if self._closed:
                raise Stopping
            if self.waiting + self.running > self._queue:
                raise QueueFull(self.waiting, max(1, round(self._seconds)))
            self._waiting.append(ticket)
            self._change.notify()
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """`Ticket.cancel`."""
        with self._change:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def close(self) -> None:
        """End every request with `Stopping`, and take no other."""
        with self._change:
            self._closed = True
            under_way = [*self._waiting, *([self._running] if self._running else [])]
            ended = [ticket for ticket in under_way if not ticket.cancelled]
            self._waiting.clear()
            for ticket in ended:
                ticket.cancelled = True
            self._change.notify()
        for ticket in ended:
            ticket.deliver(Stopping())

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            started = time.monotonic()
            try:
                with closing(ticket.pieces) as pieces:  # its cache of keys and values would stay as long as the ticket
                    for piece in pieces:
                        if ticket.cancelled:
                            break
                        if piece.finish:  # before it is delivered: whoever reads it may ask for more at once
                            self._done(time.monotonic() - started)
                        ticket.deliver(piece)
            except Exception as error:
                log.exception("a request failed")
                ticket.deliver(Failed(error))
            self._done()

    def _next(self) -> Ticket | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closed)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _done(self, seconds: float | None = None) -> None:
        with self._change:
            self._running = None
            if seconds is not None:
                self._seconds = (self._seconds + seconds) / 2


def _conversation(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise QLRError("the model's folder has no chat template; send a prompt to /v1/completions instead")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise as they like
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise QLRError(f"the model's chat template refuses these messages ({why}); change their roles or their order") from None
    return list(tokenizer.encode(text, add_special_tokens=False))  # the template writes BOS itself


class _OneAtATime:
    """A tokenizer that two threads share: the worker decodes, those who ask encode, and not all tokenizers bear both at once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.lock = tokenizer, threading.Lock()

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        with self.lock:
            return self.tokenizer.decode(ids, **options)
