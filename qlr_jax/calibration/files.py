"""Files of text as people have them: plain, JSON lines, JSON, Parquet, these in gzip; folders, patterns and pipes of them."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.paths import local

Messages = list[dict[str, str]]
"""One conversation: [{"role": …, "content": …}, …]."""

PLAIN, LINES, RECORDS, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".json",), (".parquet",)
FIELD, CONVERSATIONS = "text", ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # as some data sets call them


@dataclass(frozen=True)
class Part:
    """What one argument names.

    Attributes:
        name: as it was given, without its weight.
        documents: texts, or conversations where a chat template is to be applied.
        weight: that was given with it, None where none was.
        notes: what was changed on reading, a sentence each.
    """

    name: str
    documents: tuple[str | Messages, ...]
    weight: float | None = None
    notes: tuple[str, ...] = ()


def read_part(given: str | Path, chat: bool = False) -> Part:
    """The documents of one argument: `PATH`, `PATH#FIELD`, each with `:WEIGHT` where several are mixed.

    PATH is a file, a folder (all files below it whose kind is known), a pattern such as `data/*.jsonl`, or a pipe such as
    /dev/stdin. FIELD is that of a record or column, "text" where none is named, or the only column of text of a Parquet file. A
    byte order mark is dropped, and line ends become LF.

    Args:
        given: as it was typed; a file of just this name comes before any other meaning.
        chat: take the conversations of records that have them.

    Raises:
        QLRError: nothing there, or something that is no text, naming the file and the line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a.jsonl").write_text('{"body": "one"}\\n{"body": "two"}\\n')
        ...     read_part(f"{folder}/a.jsonl#body:2").documents
        ('one', 'two')
    """
    path, field, weight = _parsed(str(given))
    files, notes, documents = _files(path, str(given)), [], []
    for file in files:
        found = [_lf(document) for document in _documents(file, field, chat, notes.append)]
        if any(old != new for old, new in found):
            notes.append(f"{file}: line ends were CRLF or CR and are read as LF")
        documents += [new for _, new in found if not isinstance(new, str) or new.strip()]
    if not documents:
        raise QLRError(f"text file {path} is empty; give a file with text in it")
    if len(files) > 1:
        notes.append(f"{path}: {len(files)} files are read, {files[0].name} to {files[-1].name}")
    return Part(str(given) if weight is None else str(given).rpartition(":")[0], tuple(documents), weight, tuple(notes))


def _parsed(given: str) -> tuple[str, str | None, float | None]:
    """(path, field, weight) of an argument."""
    there = lambda text: bool(text) and (local(text).exists() or bool(_matches(text)))  # noqa: E731
    path, field, weight = given, None, None
    if not there(path) and (match := re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", path, re.DOTALL)):
        path, weight = match[1], float(match[2])
        if not weight > 0:
            raise QLRError(f"the weight of {given} is {match[2]}; give a number above 0, or leave the text out")
    if not there(path) and "#" in path and there(path.rpartition("#")[0]):
        path, _, field = path.rpartition("#")
    return path, field or None, weight


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(str(local(pattern)), recursive=True)) if any(sign in pattern for sign in "*?[") else []


def _files(path: str, given: str) -> list[Path]:
    """The files that a path, folder or pattern stands for, in order of their names."""
    place = local(path)
    if place.exists() and not place.is_dir():
        return [place]  # a pipe too
    if place.is_dir():
        below = sorted(p for p in place.rglob("*") if p.is_file() and _kind(p) is not None)
        found = [p for p in below if not any(part.startswith(".") for part in p.relative_to(place).parts)]
        if not found:
            kinds = ", ".join((*PLAIN, *LINES, *RECORDS, *PARQUET))
            raise QLRError(f"folder {place} holds no text; give one with files of {kinds}, or these in .gz")
        return found
    found = [Path(match) for match in _matches(path) if Path(match).is_file()]
    if not found:
        raise QLRError(f"text file {place} does not exist; give a UTF-8 text file, or a folder, a pattern or .jsonl of text")
    return found


def _kind(file: Path) -> tuple[str, ...] | None:
    """Which of the kinds a file's name says that it is."""
    suffix = Path(file.name.lower().removesuffix(".gz")).suffix
    return next((kind for kind in (PLAIN, LINES, RECORDS, PARQUET) if suffix in kind), None)


def _documents(file: Path, field: str | None, chat: bool, note: Callable[[str], None]) -> Iterator[str | Messages]:
    try:
        data = file.read_bytes()
        if file.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise QLRError(f"text file {file} cannot be read ({why}); give another, or get it again") from None
    kind = _kind(file) or (LINES if field else PLAIN)  # a pipe has no suffix
    if kind is PARQUET:
        records = _columns(file, data, field, chat)
    else:
        text = _decoded(file, data, note)
        if kind is PLAIN:
            if field:
                raise QLRError(f"text file {file} has no fields, and #{field} is asked for; leave that out, or give .jsonl")
            yield text
            return
        records = _lines(file, text) if kind is LINES else _records(file, text)
    for where, record in records:
        yield from _document(record, field, chat, where, file)


def _decoded(file: Path, data: bytes, note: Callable[[str], None]) -> str:
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if wide:
        note(f"{file}: it is UTF-16 by its byte order mark, and read as such")
    elif data.startswith(codecs.BOM_UTF8):
        note(f"{file}: a byte order mark is dropped")
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise QLRError(f"text file {file} is not UTF-8; convert it first") from None


def _lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{file}, line {number}", json.loads(line)
            except ValueError as error:
                raise QLRError(f"{file}, line {number} is no JSON ({error}); give one record a line") from None


def _records(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    if not text.strip():
        return
    try:
        whole = json.loads(text)
    except ValueError as error:
        raise QLRError(
            f"{file} is no JSON ({error}); give a list of texts or records, or name it .jsonl where each is a line"
        ) from None
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        named = any(name in whole for name in (FIELD, *CONVERSATIONS))
        whole = lists[0] if len(lists) == 1 and len(whole) == 1 and not named else [whole]
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"{file}, record {number}", record


def _columns(file: Path, data: bytes, field: str | None, chat: bool) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise QLRError(f"{file} needs pyarrow, which is not installed; run: pip install 'qlr-jax[parquet]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        schema = table.schema_arrow
        wanted = [name for name in ([field] if field else [*(CONVERSATIONS if chat else ()), FIELD]) if name in schema.names]
        texts = [item.name for item in schema if pyarrow.types.is_string(item.type) or pyarrow.types.is_large_string(item.type)]
        if not wanted and not field and len(texts) == 1:
            wanted = texts
        if not wanted:
            why = f"no column {field!r}" if field else f"no column {FIELD!r}"
            raise QLRError(f"{file} has {why}; it has {', '.join(schema.names)}: name one ({file.name}#COLUMN)")
        for number, row in enumerate(table.read(columns=wanted[:1]).to_pylist(), 1):
            value = row[wanted[0]]
            yield f"{file}, row {number}", {wanted[0] if wanted[0] in CONVERSATIONS else field or FIELD: value}
    except pyarrow.ArrowException as error:
        raise QLRError(f"{file} is no Parquet file ({str(error).splitlines()[0]}); get it again") from None


def _document(record: Any, field: str | None, chat: bool, where: str, file: Path) -> Iterator[str | Messages]:
    """The texts, or the conversation, of one record."""
    if isinstance(record, dict):
        names = [field] if field else [*(CONVERSATIONS if chat else ()), FIELD]
        name = next((name for name in names if name in record), None)
        if name is None:
            talks = next((name for name in CONVERSATIONS if name in record), None)
            more = f", or apply the chat template to its {talks} (--chat)" if talks and not chat and not field else ""
            shown = ", ".join(map(str, record)) or "no fields"
            raise QLRError(f"{where} has no field {names[-1]!r}; it has {shown}: name one ({file.name}#FIELD){more}")
        record = record[name]
        if chat and isinstance(record, list) and record and isinstance(record[0], dict):
            yield _messages(record, where)
            return
    for text in record if isinstance(record, list) else [record]:
        if text is not None and not isinstance(text, str):
            raise QLRError(f"{where} holds a {type(text).__name__} where text is needed; name another field ({file.name}#FIELD)")
        yield text or ""


def _messages(turns: list[Any], where: str) -> Messages:
    found = []
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise QLRError(f'{where} is no conversation; give a list of {{"role": ..., "content": ...}} with text in both')
        found.append({"role": ROLES.get(role, role), "content": content})
    return found


def _lf(document: str | Messages) -> tuple[str | Messages, str | Messages]:
    """The document as it was, and with LF alone."""
    plain = lambda text: text.replace("\r\n", "\n").replace("\r", "\n")  # noqa: E731
    if isinstance(document, str):
        return document, plain(document)
    return document, [{**turn, "content": plain(turn["content"])} for turn in document]
