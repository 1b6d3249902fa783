"""The queue of requests and its worker, as `qlr serve` has them."""

import contextlib
import queue
import shutil
import threading
import types

import numpy as np
import pytest

from qlr_jax import evaluation
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import GenerationSettings
from qlr_jax.evaluation.cache import prefill
from qlr_jax.evaluation.generation import _steps
from qlr_jax.evaluation.text import Piece
from qlr_jax.formats import save_packed
from qlr_jax.models import load_model
from qlr_jax.pipelines.generate import generate, open_generator
from qlr_jax.serving import Engine, Failed, QueueFull, Request, Stopping, engine

PROMPT, NEW = "import os", 24
TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WAIT = 20  # seconds until a test is given up, not until it goes on


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A compressed folder of random codes, with a chat template."""
    from test_formats import random_matrix

    parent = tmp_path_factory.mktemp("serving")
    source = shutil.copytree(tiny, parent / "source")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    model = load_model(source)
    spec = str(Spec.parse("int-4g32"))
    matrices = {name: random_matrix(spec, linear.weight.get_value().shape, size=2.0) for name, linear in model.linears().items()}
    return save_packed(parent / "small", model, matrices, source=source)


@pytest.fixture(scope="module")
def written(folder):
    """written(prompt, **settings) -> what `qlr generate` gives."""
    return lambda prompt, **settings: "".join(generate(folder, prompt, **settings))


@pytest.fixture(scope="module")
def found(folder):
    return open_generator(folder)


@pytest.fixture
def make(found):
    """make(**options) -> an engine at work."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(Engine(found.model, found.tokenizer, ends=found.ends, **options))


def ask(at, prompt=PROMPT, stop=(), **settings):
    """The pieces that an engine makes of a prompt; what it raises is raised."""
    events: queue.Queue[Piece | QLRError] = queue.Queue()
    at.submit(Request(at.tokens(prompt), GenerationSettings(**{"max_new_tokens": NEW, **settings}), stop), events.put)
    return list(read(events))


def read(events):
    while True:
        event = events.get(timeout=WAIT)
        if isinstance(event, QLRError):
            raise event
        yield event
        if event.finish:
            return


def text(pieces):
    return "".join(piece.text for piece in pieces)


class Gate:
    """Generations that go on piece by piece, each once the test says so."""

    def __init__(self):
        self.go, self.ended, self.begun, self.order = threading.Semaphore(0), threading.Semaphore(0), threading.Semaphore(0), []

    def __call__(self, model, tokenizer, prompt, settings, **_):
        return self._pieces(len(prompt))

    def _pieces(self, who):
        self.order.append(who)
        self.begun.release()
        try:
            for count in range(1, 4):
                assert self.go.acquire(timeout=WAIT)
                yield Piece("abc"[count - 1], count, "length" if count == 3 else None)
        finally:
            self.ended.release()


@pytest.fixture
def gate(monkeypatch):
    found = Gate()
    monkeypatch.setattr(engine, "stream_pieces", found)
    yield found
    for _ in range(100):
        found.go.release()  # whatever still runs


# ------------------------------------------------------------------------------------------------- the engine


def test_the_engine_writes_what_generate_writes(make, written):
    at = make()
    for prompt in (PROMPT, "def main(", ""):
        pieces = ask(at, prompt)
        assert text(pieces) == written(prompt, max_new_tokens=NEW) != "" and len(pieces) > 2
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish == "length" and pieces[-1].tokens == NEW


def test_draws_repeat_with_their_seed(make, written):
    at = make()
    one, same, other = (text(ask(at, temperature=3.0, seed=seed)) for seed in (5, 5, 6))
    assert one == same != other and one == written(PROMPT, max_new_tokens=NEW, temperature=3.0, seed=5)


def test_a_stop_string_across_tokens_is_never_shown(make, found):
    at = make()
    free = text(ask(at))
    lengths = [len(text(ask(at, max_new_tokens=count))) for count in range(1, NEW)]
    # the first string of the text that begins in one token, ends in the next, and was not there before
    at_token, edge = next((i, n) for i, n in enumerate(lengths) if n and free.find(free[n - 1 : n + 1]) == n - 1)
    pieces = ask(at, stop=["never there", free[edge - 1 : edge + 1]])
    assert text(pieces) == free[: edge - 1] and pieces[-1].finish == "stop"
    assert pieces[-1].tokens == at_token + 2 < NEW


def test_a_token_that_ends_the_text_is_counted_and_not_shown(found):
    ids = [found.tokenizer.encode(PROMPT)]
    free = evaluation.generate(found.model, ids, max_new_tokens=NEW, stop=())[0].tolist()
    before = free.index(free[4])
    with Engine(found.model, found.tokenizer, ends=[free[4]]) as at:
        pieces = ask(at)
    assert (pieces[-1].finish, pieces[-1].tokens) == ("stop", before + 1)
    with Engine(found.model, found.tokenizer, ends=()) as at:
        assert text(pieces) == text(ask(at, max_new_tokens=before)) if before else text(pieces) == ""


def test_characters_come_whole(make, found, monkeypatch):
    line = "naïve 🙂 漢字, "
    ids = found.tokenizer.encode(line, add_special_tokens=False)
    monkeypatch.setattr("qlr_jax.evaluation.text.stream", lambda *_, **__: (np.asarray([[token]]) for token in ids))
    pieces = ask(make())
    assert text(pieces) == line and len(ids) > len(line)  # several tokens a character
    assert sum(not piece.text for piece in pieces) > 5 and not any("\ufffd" in piece.text for piece in pieces)


def test_a_conversation_goes_through_the_chat_template_without_a_second_bos(make, found):
    at, bos = make(), found.tokenizer.bos_token_id
    tokens = at.tokens([{"role": "user", "content": "hi"}])
    assert found.tokenizer.decode(tokens) == "<user>hi<assistant>" and bos not in tokens
    assert at.tokens("hi")[0] == bos and at.tokens([5, 6]) == [5, 6]
    with pytest.raises(QLRError, match=r"refuses these messages \(no tools\)"):
        at.tokens([{"role": "tool", "content": "hi"}])
    with pytest.raises(QLRError, match="token 4096 is not in the model's vocabulary"):
        at.tokens([4096])
    plain = types.SimpleNamespace(chat_template=None)
    with pytest.raises(QLRError, match="has no chat template; send a prompt to /v1/completions"):
        Engine(found.model, plain).tokens([{"role": "user", "content": "hi"}])


def test_the_queue_is_bounded_and_first_come_first_served(make, gate):
    at, events = make(queue=2), queue.Queue()

    def submit(who):
        return at.submit(Request([1] * who, GenerationSettings()), lambda event: events.put((who, event)))

    submit(1)
    assert gate.begun.acquire(timeout=WAIT)  # it waits no more
    second, _ = submit(2), submit(3)
    assert at.running and at.waiting == 2
    with pytest.raises(QueueFull, match="2 requests wait already") as full:
        submit(4)
    assert full.value.retry_after >= 1
    second.cancel()
    assert at.waiting == 1
    submit(5)  # in the place that is free again
    for _ in range(9):
        gate.go.release()
    got = [events.get(timeout=WAIT) for _ in range(9)]
    assert [who for who, _ in got] == [1] * 3 + [3] * 3 + [5] * 3 and gate.order == [1, 3, 5]
    assert not at.waiting


def test_a_queue_of_nothing_takes_one_at_a_time(make, gate):
    at, events, request = make(queue=0), queue.Queue(), Request([1], GenerationSettings())

    def then_another(event):
        if event.finish:  # as soon as the last piece is there, the next may come
            at.submit(request, events.put)
        events.put(event)

    at.submit(request, then_another)
    for _ in range(2):
        with pytest.raises(QueueFull):
            at.submit(request, events.put)
        for _ in range(3):
            gate.go.release()
        assert text(read(events)) == "abc"


def test_what_is_cancelled_stops_being_generated(make, gate):
    at, events = make(), queue.Queue()
    ticket = at.submit(Request([1], GenerationSettings()), events.put)
    gate.go.release()
    assert events.get(timeout=WAIT).text == "a"
    ticket.cancel()
    gate.go.release()  # what is being made is finished, and nothing after it
    assert gate.ended.acquire(timeout=WAIT) and events.empty()


def test_closing_ends_every_request(found, gate):
    events = queue.Queue()
    with Engine(found.model, found.tokenizer) as at:
        for _ in range(2):
            at.submit(Request([1], GenerationSettings()), events.put)
        assert gate.begun.acquire(timeout=WAIT)
        at.close()
        assert [type(events.get(timeout=WAIT)) for _ in range(2)] == [Stopping, Stopping]
        with pytest.raises(Stopping, match="is being stopped"):
            at.submit(Request([1], GenerationSettings()), events.put)
        gate.go.release()
    assert events.empty() and len(gate.order) == 1


def test_a_failure_ends_its_request_alone(make, monkeypatch):
    at, right = make(), engine.stream_pieces
    monkeypatch.setattr(engine, "stream_pieces", lambda *_, **__: (Piece("a", 1 // left) for left in (1, 0)))
    with pytest.raises(Failed, match="the model failed on this request \\(ZeroDivisionError"):
        ask(at)
    monkeypatch.setattr(engine, "stream_pieces", right)
    assert ask(at)[-1].finish == "length"


def test_requests_of_a_bucket_share_their_programs(make):
    at = make()
    ask(at)
    before = prefill._cache_size(), _steps._cache_size()
    ask(at, "import sys\n", temperature=0.5, seed=3, max_new_tokens=NEW - 3, stop=["x"])
    ask(at, [1, 2, 3], temperature=0.9, top_p=0.5, top_k=3)
    assert (prefill._cache_size(), _steps._cache_size()) == before


def test_an_engine_says_what_it_cannot_be(found):
    with pytest.raises(QLRError, match="a queue of -1"):
        Engine(found.model, found.tokenizer, queue=-1)
    with pytest.raises(QLRError, match="a context of 1"):
        Engine(found.model, found.tokenizer, context=1)
    most = found.model.config.max_position_embeddings
    contexts = [Engine(found.model, found.tokenizer, context=context).context for context in (None, 10, 10**6)]
    assert contexts == [most, 10, most]
