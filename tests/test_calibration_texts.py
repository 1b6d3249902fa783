"""Texts as people have them: kinds of files, fields, mixtures, short ones, conversations."""

import gzip
import json
import os
import sys
import threading

import numpy as np
import pytest

from qlr_jax.calibration import Corpus, fitting_length, read_text, shares
from qlr_jax.calibration.files import read_part
from qlr_jax.cli.shell import spread
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import cut_corpus
from qlr_jax.models import load_tokenizer
from qlr_jax.pipelines.source import open_source
from qlr_jax.pipelines.stages.calibrate import calibration_tokens
from qlr_jax.pipelines.texts import Texts
from qlr_jax.settings.recipe import Recipe

RECORDS = [{"id": 1, "text": "one", "body": "eins"}, {"id": 2, "text": "two", "body": "zwölf"}]


@pytest.fixture
def folder(tmp_path):
    """The same two texts in every kind of file."""
    lines = "\n".join(map(json.dumps, RECORDS)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "b.json").write_text(json.dumps({"data": RECORDS}))
    (tmp_path / "c.json").write_text(json.dumps({"text": ["one", "two"], "id": [1, 2]}))
    (tmp_path / "d.json").write_text(json.dumps(["one", "two"]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_every_kind_gives_the_same_texts(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({key: [record[key] for record in RECORDS] for key in ("id", "text", "body")})
    pq.write_table(table, folder / "a.parquet")
    pq.write_table(table.select(["id", "body"]), folder / "one column.parquet")
    (folder / "b.parquet.gz").write_bytes(gzip.compress((folder / "a.parquet").read_bytes()))
    for name in ("a.jsonl", "a.json", "b.json", "c.json", "d.json", "a.jsonl.gz", "a.parquet", "b.parquet.gz"):
        assert read_part(folder / name).documents == ("one", "two"), name
    for name in ("a.jsonl#body", "a.json#body", "a.jsonl.gz#body", "a.parquet#body", "one column.parquet"):
        assert read_part(folder / name).documents == ("eins", "zwölf"), name
    assert read_text(folder / "a.jsonl") == "one\n\ntwo"


def test_what_is_no_text_is_named_with_its_line(folder, monkeypatch):
    (folder / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    (folder / "talks.jsonl").write_text('{"messages": []}\n')
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    (folder / "no.txt.gz").write_bytes(b"text")
    (folder / "no.parquet").write_bytes(b"PAR1 nothing")
    (folder / "plain.txt").write_text("text")
    (folder / "empty.jsonl").write_text("\n")
    (folder / "none").mkdir()
    for name, says in (
        ("bad.jsonl", r"bad.jsonl, line 2 is no JSON"),
        ("number.jsonl", "line 1 holds a int where text is needed"),
        ("a.jsonl#boddy", r"line 1 has no field 'boddy'; it has id, text, body: name one \(a.jsonl#FIELD\)"),
        ("talks.jsonl", r"no field 'text'.*chat template to its messages \(--chat\)"),
        ("cut.txt.gz", "cannot be read"),
        ("no.txt.gz", "cannot be read"),
        ("no.parquet", "is no Parquet file|needs pyarrow"),
        ("plain.txt#text", "has no fields"),
        ("empty.jsonl", "is empty"),
        ("none", "holds no text"),
        ("nothing-*.docx", "does not exist"),
        ("missing.txt:2", "missing.txt.* does not exist"),
        ("plain.txt:0", "give a number above 0"),
    ):
        with pytest.raises(QLRError, match=says):
            read_part(str(folder / name))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(QLRError, match=r"needs pyarrow.*qlr-jax\[parquet\]"):
        read_part(folder / "no.parquet")


def test_folders_patterns_and_names_that_hold_the_signs(folder, monkeypatch):
    texts = folder / "texts"
    (texts / "below" / ".hidden").mkdir(parents=True)
    for name in ("b.txt", "a.md", "below/c.txt", "below/.hidden/d.txt"):
        (texts / name).write_text(name)
    (texts / "picture.png").write_bytes(b"\xff\xd8")
    assert read_part(texts).documents == ("a.md", "b.txt", "below/c.txt") and "3 files are read" in read_part(texts).notes[0]
    assert read_part(f"{texts}/**/*.txt").documents == ("b.txt", "below/c.txt")
    (texts / "odd[1]#x:2.txt").write_text("odd")
    (texts / "odd:2").write_text("odd")
    assert read_part(texts / "odd[1]#x:2.txt").documents == ("odd",) and read_part(texts / "odd:2").weight is None
    part = read_part(f"{texts}/b.txt:2.5")
    assert part.weight == 2.5 and part.name == f"{texts}/b.txt"
    monkeypatch.setenv("HOME", str(folder))
    assert read_part("~/texts/*.md:3").documents == ("a.md",) and read_part("~/a.jsonl#body:.5").weight == 0.5


def test_marks_and_line_ends_are_dropped_and_said(tmp_path):
    (tmp_path / "crlf.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "wide.txt").write_bytes("zwölf\r\n".encode("utf-16"))
    (tmp_path / "plain.txt").write_bytes(b"one\n")
    part = read_part(tmp_path / "crlf.txt")
    assert part.documents == ("one\ntwo\nthree\n",)
    assert "byte order mark is dropped" in part.notes[0] and "read as LF" in part.notes[1]
    assert read_part(tmp_path / "wide.txt").documents == ("zwölf\n",) and read_part(tmp_path / "plain.txt").notes == ()
    texts = Texts.read([tmp_path / "plain.txt"], tmp_path / "crlf.txt")
    assert len(texts.notes) == 2 and texts.held_out_name == str(tmp_path / "crlf.txt")


def test_a_pipe_is_read(folder):
    reading, writing = os.pipe()
    os.write(writing, b"through a pipe\n")
    os.close(writing)
    assert read_text([f"/dev/fd/{reading}"]).strip() == "through a pipe"  # as /dev/stdin is /dev/fd/0
    os.close(reading)
    os.mkfifo(folder / "pipe")
    writer = threading.Thread(target=(folder / "pipe").write_text, args=('{"a": "x"}\n',))
    writer.start()
    assert read_part(f"{folder / 'pipe'}#a").documents == ("x",)
    writer.join()


def test_proportions_hold_where_a_text_is_short():
    assert shares([10_000, 10_000], [2, 1], 256, 16) == [171, 85] and shares([10_000, 10_000], [1, 1], 7, 16) == [4, 3]
    assert shares([10_000, 160], [2, 1], 256, 16) == [20, 10]
    assert shares([10_000, 16], [1000, 1], 256, 16) == [256, 1]  # each has one at least
    assert fitting_length(4096, 4096) == 4096 and fitting_length(4095, 4096) == 1023 and fitting_length(3, 4096) == 3


@pytest.fixture(scope="module")
def source(tiny):
    return open_source(tiny, Recipe(sequences=12, backbones=("int-4g16",), ranks=(0,)))


def test_weights_are_proportions_of_sequences(source, text, tmp_path):
    words = ("import ", "return ")
    for name, word in zip("ab", words, strict=True):
        (tmp_path / name).write_text(word * 2000)
    said = []
    rows = calibration_tokens(source, Corpus.read([f"{tmp_path / 'a'}:2", tmp_path / "b"]), said.append)
    assert rows.shape == (12, 64) and "8 sequences of" in said[0] and "and" not in said[0].split(" of ")[0]
    first = [source.tokenizer.decode(row).count(words[0].strip()) > 5 for row in rows]
    assert first == [True] * 8 + [False] * 4
    with pytest.raises(QLRError, match=r"weights .* mix texts to calibrate on"):
        cut_corpus(Corpus.read([f"{tmp_path / 'a'}:2", f"{tmp_path / 'b'}:1"]), source.tokenizer, 8, 2048)
    one, other = (Corpus.read([f"{tmp_path / 'a'}:{w}", tmp_path / "b"]).content for w in (1, 2))
    assert one != other  # another mixture is another job


def test_a_plain_text_gives_the_sequences_that_it_gave(source, text):
    from qlr_jax.calibration import calibration_tokens as before

    want = before(text.read_text(), source.tokenizer, 12, 64)
    assert np.array_equal(calibration_tokens(source, text.read_text()), want)
    assert np.array_equal(calibration_tokens(source, Corpus.read(text)), want)


def test_a_short_text_gives_shorter_sequences_and_says_so(source, tmp_path):
    long = open_source(source.folder, source.recipe.updated(sequence_length=2000))
    said = []
    rows = calibration_tokens(long, "import os\n" * 100, said.append)
    assert rows.shape[1] < 2000 and len(rows) >= 4
    assert f"too few for a sequence of 2,000: {len(rows)} sequences of {rows.shape[1]} are taken" in said[0]
    windows = cut_corpus(Corpus.of("import os\n" * 100), source.tokenizer, 2000, 2048, said.append)
    assert windows.rows.shape[1] < 2000 and "too few for a window of 2,000" in said[1]
    with pytest.raises(QLRError, match="fewer than one window of 2000"):
        cut_corpus(Corpus.of("import os\n" * 100), source.tokenizer, 2000, 2048)
    with pytest.raises(QLRError, match="give more text"):
        calibration_tokens(long, "import os")


def test_several_weighted_texts_follow_one_option():
    args = ["M", "OUT", "--calibration", "web.jsonl:2", "code.txt:1", "--budget", "3bpw"]
    assert spread(args) == ["M", "OUT", "--calibration", "web.jsonl:2", "--calibration", "code.txt:1", "--budget", "3bpw"]
    for same in (
        ["--calibration", "a.txt", "M", "OUT"],
        ["--calibration", "a.txt:2", "M", "OUT", "--device", "x:2"],
        ["--calibration", "a:1", "--calibration", "b:2", "--lock", "x:3"],
    ):
        assert spread(same) == same


# Conversations ---------------------------------------------------------------------------------------------------------------


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


@pytest.fixture
def instruct(tiny):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_chat_template_is_applied_to_messages_and_to_paragraphs(instruct, tmp_path):
    talk = [{"role": "user", "content": "Why?\r\n"}, {"role": "assistant", "content": "So."}]
    shared = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk, "text": "no"}) + "\n" + json.dumps(shared))
    (tmp_path / "b.txt").write_text("one\n\ntwo\n\n\nthree\nstill three\n\nfour\n\nfive")
    corpus = Corpus.read([tmp_path / "a.jsonl"], chat=True)
    wanted = "<user>Why?\n</user><assistant>So.</assistant><user>Who?</user><assistant>I.</assistant>"
    assert corpus.text(instruct) == wanted and "read as LF" in corpus.notes[0]
    assert Corpus.read(tmp_path / "b.txt", chat=True).text(instruct) == (
        "<user>one</user><assistant>two</assistant><user>three\nstill three</user><assistant>four</assistant><user>five</user>"
    )
    (tmp_path / "d.txt").write_text("one\ntwo\n")
    assert Corpus.read(tmp_path / "d.txt", chat=True).text(instruct) == "<user>one</user><assistant>two</assistant>"
    assert Corpus.read(tmp_path / "b.txt", chat=True).content != Corpus.read(tmp_path / "b.txt").content
    instruct.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(QLRError, match=r"refuses a conversation \(no user\)"):
        corpus.text(instruct)
    instruct.chat_template = None
    with pytest.raises(QLRError, match="has no chat template"):
        corpus.text(instruct)
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(QLRError, match="line 1 is no conversation"):
        Corpus.read(tmp_path / "c.jsonl", chat=True)
