"""`qlr serve`: the queue and its worker, what a body may say, and a real server on a loopback port asked by OpenAI's client."""

import base64
import contextlib
import hashlib
import http.client
import importlib.util
import json
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import openai
import pytest
from typer.testing import CliRunner

from qlr_jax import cli, evaluation
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import GenerationSettings
from qlr_jax.evaluation.cache import prefill
from qlr_jax.evaluation.generation import _steps
from qlr_jax.evaluation.text import Piece
from qlr_jax.formats import save_packed
from qlr_jax.models import load_model
from qlr_jax.pipelines.generate import generate, open_generator
from qlr_jax.pipelines.serve import serve
from qlr_jax.serving import Engine, Failed, QueueFull, Request, Stopping, engine
from qlr_jax.serving.application import LARGEST_BODY, application
from qlr_jax.serving.page import PAGE, POLICY, SCRIPT, STYLE
from qlr_jax.serving.parameters import RequestError, messages_of, new_tokens, parameters, prompt_of
from qlr_jax.serving.server import Server, bind, listen, url

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


# ------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"n": 2}, "n", "n is 2, and only 1 is supported"),
        ({"n": True}, "n", "n is true"),
        ({"echo": True}, "echo", "echo is true, and only false is supported"),
        ({"logprobs": 0}, "logprobs", "logprobs is 0, and only false"),
        ({"presence_penalty": 0.5}, "presence_penalty", "only 0 is supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "only {} is supported"),
        ({"tools": [{}]}, "tools", "only [] is supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"guided_regex": "x"}, "guided_regex", "guided_regex is not supported; leave it out"),
        ({"stop": ["a"] * 5}, "stop", "a list of up to 4"),
        ({"stop": ["a", ""]}, "stop", "not empty"),
        ({"stop": 3}, "stop", "stop is 3"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": True}, "max_tokens", "max_tokens is true"),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens", "a whole number"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "differ; give one"),
        ({"temperature": "hot"}, "temperature", "give a number"),
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"temperature": float("nan")}, "temperature", "temperature is nan"),
        ({"temperature": 10**400}, "temperature", "give a number"),
        ({"top_p": 0}, "top_p", "top_p is 0"),
        ({"top_k": 1.5}, "top_k", "a whole number"),
        ({"seed": "x"}, "seed", "a whole number"),
        ({"stream": 1}, "stream", "give true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options", "only include_usage"),
        ({"messages": []}, "messages", "messages is not supported"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(body, param, says):
    with pytest.raises(RequestError) as refused:
        parameters({"prompt": "a", **body}, "prompt")
    assert refused.value.param == param and says in str(refused.value) and refused.value.status == 400
    assert len(str(refused.value)) < 200


def test_defaults_may_be_sent():
    sent = {"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0, "tools": [], "logit_bias": {}, "user": "me"}
    asked = parameters({"prompt": "a", "model": "m", **sent, "frequency_penalty": 0, "stop": None, "stream": False}, "prompt")
    assert asked.most is None and asked.stop == () and not asked.stream and not asked.usage
    assert (asked.settings.temperature, asked.settings.top_p, asked.settings.top_k) == (1.0, 1.0, 0)
    drawn = {parameters({}, "prompt").settings.seed for _ in range(8)}
    assert len(drawn) > 1  # another text each time, as of OpenAI's API
    for seed in (0, -1, 2**32 - 1, 2**63 - 1, -(2**63) + 1):  # all that a client may send, as a key of JAX
        jax.random.key(parameters({"seed": seed}, "prompt").settings.seed)
    assert parameters({"top_k": 10**12}, "prompt").settings.traced()


@pytest.mark.parametrize(
    ("asked", "prompt", "wanted"), [(None, 10, 16), (None, 60, 4), (3, 10, 3), (54, 10, 54), (None, 63, 1), (1, 63, 1)]
)
def test_how_many_tokens(asked, prompt, wanted):
    assert new_tokens(asked, 16, limit=60, prompt=prompt, context=64) == wanted


@pytest.mark.parametrize(
    ("asked", "prompt", "code", "says"),
    [
        (61, 1, "invalid_value", "this server gives 60 at most"),
        (55, 10, "context_length_exceeded", "ask for at most 54 or send a shorter prompt"),
        (None, 64, "context_length_exceeded", "there are 64; send a shorter prompt"),
    ],
)
def test_more_tokens_than_there_are(asked, prompt, code, says):
    with pytest.raises(RequestError, match=says) as refused:
        new_tokens(asked, 16, limit=60, prompt=prompt, context=64)
    assert refused.value.code == code


def test_prompts_and_messages():
    assert [prompt_of({"prompt": p}) for p in ("a", ["a"], [1, 2], [[1, 2]], "")] == ["a", "a", [1, 2], [1, 2], ""]
    for wrong in (None, [], ["a", "b"], [[1], [2]], [1, "a"], {}, 5, [True]):
        with pytest.raises(RequestError) as refused:
            prompt_of({"prompt": wrong})
        assert refused.value.param == "prompt"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sent = [{"role": "system", "content": "s", "name": None}, {"role": "user", "content": parts}]
    assert messages_of({"messages": sent}) == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]
    user = {"role": "user"}
    for wrong, says in (
        (None, "give a list"),
        ([], "give a list"),
        (["hi"], r"messages\[0\] is \"hi\""),
        ([{"content": "a"}], "role and content"),
        ([user], "content of .* is null"),
        ([{**user, "content": [{"type": "image_url"}]}], '"image_url"; only text'),
        ([{**user, "content": [{"type": "text"}]}], "give a text"),
        ([{**user, "content": ["a"]}], "only text"),
        ([{**user, "content": "a", "tool_calls": []}], '"tool_calls", which is not supported'),
    ):
        with pytest.raises(RequestError, match=says):
            messages_of({"messages": wrong})


# ------------------------------------------------------------------------------------------------- a server


@contextlib.contextmanager
def serving(at, api_key=None, most=60, host="127.0.0.1"):
    """A server of an engine on a free port; `.url`, `.client` and `.server`."""
    with contextlib.closing(bind(host, 0, api_key)) as bound:
        listen(bound)
        up = threading.Event()
        server = Server(application(at, name="small", most=most, api_key=api_key), up.set, at.close)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            assert up.wait(WAIT)
            base = url(bound)
            client = openai.OpenAI(base_url=f"{base}/v1", api_key=api_key or "none", max_retries=0, timeout=WAIT)
            with client:
                yield types.SimpleNamespace(url=base, client=client, server=server, thread=thread)
        finally:
            server.should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(found):
    with Engine(found.model, found.tokenizer, ends=found.ends) as at, serving(at) as up:
        yield up


def http_(address, method, path, body=None, **headers):
    """Status, headers and body of one request."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=WAIT)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_a_completion_is_what_generate_writes(served, written):
    done = served.client.completions.create(model="small", prompt=PROMPT, max_tokens=NEW, temperature=0)
    assert done.choices[0].text == written(PROMPT, max_new_tokens=NEW) and done.choices[0].finish_reason == "length"
    assert done.object == "text_completion" and done.model == "small" and done.usage.completion_tokens == NEW
    assert done.usage.total_tokens == done.usage.prompt_tokens + NEW
    short = served.client.completions.create(model="small", prompt=PROMPT, temperature=0)
    assert short.usage.completion_tokens == 16  # as OpenAI's API where nothing is said
    drawn = {"model": "small", "prompt": PROMPT, "max_tokens": NEW, "temperature": 3, "seed": 7}
    one, same = (served.client.completions.create(**drawn).choices[0].text for _ in range(2))
    assert one == same == written(PROMPT, max_new_tokens=NEW, temperature=3.0, seed=7) != done.choices[0].text


def test_a_chat_follows_the_template(served, written, found):
    messages = [{"role": "user", "content": "hi"}]
    done = served.client.chat.completions.create(model="small", messages=messages, max_completion_tokens=9, temperature=0)
    bare = found.tokenizer.encode("<user>hi<assistant>", add_special_tokens=False)
    same = served.client.completions.create(model="small", prompt=bare, max_tokens=9, temperature=0)
    assert done.choices[0].message.content == same.choices[0].text != "" and done.choices[0].message.role == "assistant"
    assert done.usage.prompt_tokens == len(bare) and done.object == "chat.completion"
    rest = served.client.chat.completions.create(model="small", messages=messages, temperature=0)
    assert rest.usage.completion_tokens == 64 - len(bare)  # all that the model has positions for


def test_streams_give_the_same_text_in_pieces(served):
    sent = {"model": "small", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    whole = served.client.completions.create(**sent)
    chunks = list(served.client.completions.create(**sent, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text and len(chunks) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1
    sent = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0}
    whole = served.client.chat.completions.create(**sent)
    chunks = list(served.client.chat.completions.create(**sent, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert all(chunk.usage is None for chunk in chunks)
    raw = json.dumps({**sent, "stream": True})
    status, headers, body = http_(served.url, "POST", "/v1/chat/completions", raw, Content_Type="application/json")
    assert status == 200 and headers["content-type"].startswith("text/event-stream") and body.endswith(b"data: [DONE]\n\n")


def test_nothing_of_a_stop_string_is_streamed(served):
    sent = {"model": "small", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    free = served.client.completions.create(**sent).choices[0].text
    word = next(free[i : i + 5] for i in range(3, len(free)) if free.find(free[i : i + 5]) == i)
    chunks = list(served.client.completions.create(**sent, stop=["zzzz", word], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == free[: free.index(word)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    done = served.client.completions.create(**sent, stop=word)
    assert done.choices[0].text == free[: free.index(word)] and done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens < NEW


def test_characters_are_not_split_in_a_stream(served, found, monkeypatch):
    line = "naïve 🙂 漢字."
    ids = found.tokenizer.encode(line, add_special_tokens=False)
    monkeypatch.setattr("qlr_jax.evaluation.text.stream", lambda *_, **__: (np.asarray([[token]]) for token in ids))
    chunks = [c.choices[0].text for c in served.client.completions.create(model="small", prompt=PROMPT, stream=True)]
    assert "".join(chunks) == line and not any("\ufffd" in chunk for chunk in chunks)


def test_models_and_health(served):
    (only,) = served.client.models.list().data
    assert only.id == "small" and only.max_model_len == 64 and only.chat
    assert served.client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="there is no model other here, only small"):
        served.client.models.retrieve("other")
    status, _, body = http_(served.url, "GET", "/health")
    assert status == 200 and json.loads(body) == {"status": "ok", "running": False, "waiting": 0}


def test_errors_have_the_shape_that_clients_read(served):
    create = served.client.completions.create
    with pytest.raises(openai.BadRequestError, match="n is 3, and only 1 is supported") as refused:
        create(model="small", prompt="a", n=3)
    assert (refused.value.param, refused.value.code, refused.value.type) == ("n", "unsupported_value", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="send a shorter prompt") as refused:
        create(model="small", prompt="a b c d e f g h " * 20)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as refused:
        create(model="gpt", prompt="a")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="no tools") as refused:
        served.client.chat.completions.create(model="small", messages=[{"role": "tool", "content": "a", "tool_call_id": None}])
    assert refused.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="vocabulary") as refused:
        create(model="small", prompt=[5000])
    assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status", "says"),
    [
        ("POST", "/v1/completions", "{", "application/json", 400, "is not JSON"),
        ("POST", "/v1/completions", "[1]", "application/json; charset=utf-8", 400, "is not a JSON object"),
        ("POST", "/v1/completions", '{"prompt": "\\ud800"}', "application/json", 400, "is not JSON in UTF-8"),
        ("POST", "/v1/completions", "[" * 100_000, "application/json", 400, "is not JSON"),
        ("POST", "/v1/completions", '{"prompt": "a"}', "text/plain", 415, "Content-Type: application/json"),
        ("POST", "/v1/completions", b" " * (LARGEST_BODY + 1), "application/json", 413, "send a shorter prompt"),
        ("POST", "/v1/embeddings", "{}", "application/json", 404, "there is no POST /v1/embeddings here"),
        ("GET", "/v1/completions", None, "application/json", 405, "POST /v1/completions"),
    ],
)
def test_what_no_client_should_send(served, method, path, body, kind, status, says):
    got, _, answer = http_(served.url, method, path, body, Content_Type=kind)
    error = json.loads(answer)["error"]
    assert got == status and says in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_without_a_key_only_loopback_names_are_answered(served):
    """A page of another site, whose name was made to point here, reads nothing."""
    port = served.url.rpartition(":")[2]
    for host, status in (("evil.example", 403), (f"evil.example:{port}", 403), ("localhost", 200), (f"[::1]:{port}", 200)):
        got, _, answer = http_(served.url, "GET", "/v1/models", Host=host)
        assert got == status and (status == 200 or "only localhost" in json.loads(answer)["error"]["message"])


def test_the_page_needs_nothing_from_elsewhere(served):
    status, headers, body = http_(served.url, "GET", "/")
    page = body.decode()
    assert status == 200 and headers["content-type"].startswith("text/html") and page == PAGE
    assert not re.search(r"https?://|\bsrc=|@import|url\(", page) and headers["content-security-policy"] == POLICY
    for part in (SCRIPT, STYLE):  # what the policy lets run is what is there
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f">{part}</" in page and f"'sha256-{digest}'" in POLICY
    ids = set(re.findall(r' id="(\w+)"', page))
    assert set(re.findall(r'at\("(\w+)"\)', SCRIPT)) | {"temperature", "top_p", "seed", "max_tokens"} <= ids


def test_an_api_key(make, written):
    with serving(make(), api_key="s3cret") as up:
        done = up.client.completions.create(model="small", prompt=PROMPT, max_tokens=4, temperature=0)
        assert done.choices[0].text == written(PROMPT, max_new_tokens=4)
        for wrong in ("s3cre", "s3cret!", "none"):
            with pytest.raises(openai.AuthenticationError, match="not this server's") as refused:
                up.client.with_options(api_key=wrong).models.list()
            assert refused.value.code == "invalid_api_key"
        assert http_(up.url, "GET", "/v1/models")[0] == http_(up.url, "GET", "/v1/other")[0] == 401
        assert http_(up.url, "GET", "/v1/models", Authorization="Basic s3cret")[0] == 401
        assert http_(up.url, "GET", "/v1/models", Authorization="Bearer s3cret", Host="proxy.example")[0] == 200
        assert http_(up.url, "GET", "/health")[0] == http_(up.url, "GET", "/")[0] == 200  # they tell nothing


def test_a_full_queue_is_429_with_a_time_to_try_again(make, gate):
    at = make(queue=0)
    with serving(at) as up:
        stream = up.client.completions.create(model="small", prompt=PROMPT, stream=True)
        assert gate.begun.acquire(timeout=WAIT)
        for streamed in (False, True):
            with pytest.raises(openai.RateLimitError, match="try again in") as refused:
                up.client.completions.create(model="small", prompt=PROMPT, stream=streamed)
            assert int(refused.value.response.headers["retry-after"]) >= 1 and refused.value.code == "queue_full"
        for _ in range(3):
            gate.go.release()
        assert "".join(chunk.choices[0].text for chunk in stream) == "abc"


@pytest.mark.parametrize("streamed", [True, False])
def test_nothing_is_generated_for_a_client_that_went_away(make, gate, streamed):
    at = make()
    with serving(at) as up:
        body = json.dumps({"prompt": PROMPT, "stream": streamed})
        host, port = up.url.removeprefix("http://").split(":")
        head = ("POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(body)}")
        forget, gone = at.forget, threading.Event()
        at.forget = lambda ticket: (forget(ticket), gone.set())
        with socket.create_connection((host, int(port)), timeout=WAIT) as raw:
            raw.sendall("\r\n".join([*head, "", body]).encode())
            assert gate.begun.acquire(timeout=WAIT)
        assert gone.wait(WAIT)
        gate.go.release()
        assert gate.ended.acquire(timeout=WAIT) and gate.order == [len(at.tokens(PROMPT))]
        assert not gate.go.acquire(blocking=False)  # one piece was asked for, none after it


def test_a_failure_is_told_in_the_stream_or_as_500(served, monkeypatch):
    monkeypatch.setattr(engine, "stream_pieces", lambda *_, **__: (Piece("a", 1 // left) for left in (1, 0)))
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
        served.client.completions.create(model="small", prompt=PROMPT)
    stream = served.client.completions.create(model="small", prompt=PROMPT, stream=True)
    assert next(stream).choices[0].text == "a"
    with pytest.raises(openai.APIError, match="the model failed on this request"):
        next(stream)


def test_stopping_ends_the_answers_under_way(make, gate):
    with serving(make()) as up:
        stream = up.client.completions.create(model="small", prompt=PROMPT, stream=True)
        gate.go.release()
        assert next(stream).choices[0].text == "a"
        up.server.should_exit = True
        with pytest.raises(openai.APIError, match="is being stopped"):
            next(stream)
        up.thread.join(WAIT)
        assert not up.thread.is_alive()
        gate.go.release()


# ------------------------------------------------------------------------------------------------- the command


def test_addresses(monkeypatch):
    with contextlib.closing(bind("127.0.0.1", 0, None)) as taken:
        listen(taken)
        port = taken.getsockname()[1]
        with pytest.raises(QLRError, match=f"port {port} of 127.0.0.1 is in use; pass another one"):
            bind("127.0.0.1", port, None)
    with contextlib.closing(bind("127.0.0.1", 0, None)) as one:
        port = one.getsockname()[1]
        with contextlib.suppress(QLRError), contextlib.closing(bind("127.0.0.1", port, None)) as two:  # nobody listens yet
            listen(one)
            with pytest.raises(QLRError, match="is in use"):
                listen(two)
    for host in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(QLRError, match=f"host {host} can be reached from other machines, which needs an API key"):
            bind(host, 0, None)
    with pytest.raises(QLRError, match=r"192.0.2.1 is no address of this machine"):
        bind("192.0.2.1", 0, "key")
    with pytest.raises(QLRError, match="'no host' is not known"):
        bind("no host", 0, None)
    for key in ("", "a b", "é", "a\n"):
        with pytest.raises(QLRError, match="a header cannot carry"):
            bind("127.0.0.1", 0, key)
    with contextlib.closing(bind("0.0.0.0", 0, "key")) as bound:
        assert url(bound).startswith("http://0.0.0.0:")


def test_nothing_is_loaded_for_an_address_that_cannot_be(monkeypatch):
    monkeypatch.delenv("QLR_API_KEY", raising=False)
    monkeypatch.setattr("qlr_jax.pipelines.serve.open_generator", lambda *_, **__: pytest.fail("it was loaded"))
    for args, says in (
        (["--host", "0.0.0.0"], "needs an API key; pass --api-key or set QLR_API_KEY"),
        (["--api-key", "a b"], "a header cannot carry"),
    ):
        done = CliRunner().invoke(cli.app, ["serve", "nowhere", "--port", "0", "--compile-cache", "none", *args])
        assert done.exit_code == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.output
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    with pytest.raises(QLRError, match=re.escape("of which uvicorn is not installed; run: pip install 'qlr-jax[serve]'")):
        serve("nowhere")


def test_the_command_passes_everything_on(monkeypatch):
    seen = {}

    def noted(out, **options):
        seen.update(options, out=out)
        options["ready"]({"url": "http://x", "model": "small", "chat": False, "api_key": True})

    monkeypatch.setattr("qlr_jax.pipelines.serve.serve", noted)
    monkeypatch.setenv("QLR_API_KEY", "s3cret")
    args = ["--host", "::1", "--port", "81", "--queue", "3", "--max-tokens", "9", "--context", "99", "--ignore-config", "x"]
    done = CliRunner().invoke(cli.app, ["serve", "small", "--compile-cache", "none", *args])
    assert done.exit_code == 0 and "small at http://x" in done.stdout and "clients need the API key" in done.stdout
    wanted = {"host": "::1", "port": 81, "queue": 3, "max_tokens": 9, "context": 99, "ignore_config": ["x"], "out": "small"}
    assert {name: seen[name] for name in wanted} == wanted and seen["api_key"] == "s3cret"
    assert "s3cret" not in CliRunner().invoke(cli.app, ["serve", "--help"]).output


def test_the_command_answers_until_it_is_interrupted(folder):
    code = "import sys; from qlr_jax import cli; cli.main()"
    typed = [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--json", "--compile-cache", "none"]
    with subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            about = json.loads(process.stdout.readline())
            assert about["model"] == folder.name and about["chat"] and about["context"] == 64 and not about["api_key"]
            assert http_(about["url"], "GET", "/health")[0] == 200
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert process.returncode == 0 and out == "" and err.splitlines()[-1] == "qlr: stopped" and "Traceback" not in err
