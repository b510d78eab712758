"""Where text comes from: finds the inputs, opens them whatever their compression, and cuts documents into passages."""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, cast

from slope_cli.errors import SlopeError, UsageError

# Short passages at a source's beginning: the share that one takes of a small source for validation stays small.
PASSAGE_CHARS = 1 << 16
SHORT_PASSAGE_CHARS = 1 << 14
SHORT_UNTIL_CHARS = 1 << 20
CUT = (SHORT_PASSAGE_CHARS, SHORT_UNTIL_CHARS, PASSAGE_CHARS)
FOLDER_SOURCES = 16
READ_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".xz", ".zst")
ROWS = (".jsonl", ".json", ".parquet")
FORMATS = (".txt", ".md", *ROWS)
SHARD = re.compile(r"[-_.]\d+([-_.]of[-_.]\d+)?(-[0-9a-f]{16})?$")


@dataclass(frozen=True)
class FileInput:
    """One file of a source; size and mtime tell a restart whether it is still the same."""

    source: str
    path: Path
    size: int
    mtime_ns: int

    def plan(self) -> dict[str, Any]:
        """What identifies the input, as JSON."""
        return {"source": self.source, "path": str(self.path), "size": self.size, "mtime_ns": self.mtime_ns}


@dataclass(frozen=True)
class HubInput:
    """One split of a Hugging Face data set; its size is not known beforehand."""

    source: str
    name: str
    config_name: str | None
    split: str
    size: int = 0

    def plan(self) -> dict[str, Any]:
        """What identifies the input, as JSON."""
        return {"source": self.source, "dataset": self.name, "config": self.config_name, "split": self.split}


Input = FileInput | HubInput


class Passage(NamedTuple):
    """A document or a part of one, see `cut`; `position` is how many bytes (or rows) are read by now."""

    text: str
    ends_document: bool
    position: int


# ----------------------------------------------------------------------------------------------- which inputs


def find_inputs(given: list[str], *, split: str, config_name: str | None) -> list[Input]:
    """The inputs that the words of a command line mean, grouped by source, in a fixed order.

    A word is a file, a folder (all files below it, but hidden ones), the name of a Hugging Face data set, or any of
    these as `source=…`. Without that, `source_name` names the source, so that shards are one; but a folder of more than
    16 sources, or of nothing but plain texts of at most 16,384 bytes, is one source with the folder's name: text so
    short cannot be divided into training and validation text. UsageError for what is missing, empty or not readable.
    """
    found: list[Input] = []
    for word in given:
        source, path = _named(word)
        if path.is_dir():
            found += _folder_inputs(path, source)
        elif path.exists():
            found.append(_file_input(path, source))
        else:
            found.append(_hub_input(word if source is None else word.split("=", 1)[1], source, config_name, split))
    if not found:
        raise UsageError("no inputs: give text, JSONL or parquet files, a folder of these, or a data set's name")
    seen: set[Path] = set()
    for item in found:
        if isinstance(item, FileInput) and item.path in seen:
            raise UsageError(f"{item.path}: given twice")
        seen |= {item.path} if isinstance(item, FileInput) else set()
    return sorted(found, key=lambda item: (item.source, str(item.path) if isinstance(item, FileInput) else item.name))


def source_name(path: Path) -> str:
    """The file's name without endings and shard number: `part-00012-of-00100.jsonl.gz` is of the source `part`."""
    stem = path.name
    for endings in (COMPRESSIONS, (path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix,)):
        for ending in endings:
            stem = stem.removesuffix(ending) if ending else stem
    stem = SHARD.sub("", stem)
    if not stem or stem.isdigit():
        stem = path.parent.name or "text"
    return _plain_name(stem)


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-") or "text"


def _named(word: str) -> tuple[str | None, Path]:
    path = Path(word).expanduser()
    if path.exists() or "=" not in word:
        return None, path
    name, rest = word.split("=", 1)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise UsageError(f"{word}: a source's name is made of letters, digits, dots, dashes and underscores")
    return name, Path(rest).expanduser()


def _folder_inputs(folder: Path, source: str | None) -> list[FileInput]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise UsageError(f"{folder}: holds no files")
    items = [_file_input(path, source) for path in paths]
    sources = len({item.source for item in items})
    if source is None and (sources > FOLDER_SOURCES or (sources > 1 and all(map(_is_one_passage, items)))):
        return [replace(item, source=_plain_name(folder.resolve().name)) for item in items]
    return items


def _is_one_passage(item: FileInput) -> bool:
    return item.path.suffix not in (*ROWS, *COMPRESSIONS) and item.size <= SHORT_PASSAGE_CHARS


def _file_input(path: Path, source: str | None) -> FileInput:
    if not path.is_file():
        raise UsageError(f"{path}: neither a file nor a folder; a pipe cannot be read again after a stop")
    about = path.stat()
    if about.st_size == 0:
        raise UsageError(f"{path}: is empty")
    return FileInput(source or source_name(path), path.resolve(), about.st_size, about.st_mtime_ns)


def _hub_input(name: str, source: str | None, config_name: str | None, split: str) -> HubInput:
    looks_local = name.endswith((*FORMATS, *COMPRESSIONS, "/")) or name.startswith((".", "/", "~"))
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"{name}: no such file or folder")
    return HubInput(source or source_name(Path(name.rsplit("/", 1)[-1])), name, config_name, split)


# -------------------------------------------------------------------------------------------------- reading


def read_passages(item: Input, text_key: str, before: int) -> Iterator[Passage]:
    """The text of an input in order, cut into passages; `before` is how many characters its source had before it.

    UsageError, naming file and line, for what is damaged, not text, or without any. SlopeError when a data set that is
    streamed breaks off.
    """
    of = _hub_passages(item, text_key, before) if isinstance(item, HubInput) else _file_passages(item, text_key, before)
    found = False
    for passage in of:
        found = True
        yield passage
    if not found:
        raise UsageError(f"{item.name if isinstance(item, HubInput) else item.path}: there is no text in it")


def _hub_passages(item: HubInput, text_key: str, before: int) -> Iterator[Passage]:
    for number, text in enumerate(hub_texts(item, text_key), 1):
        yield from (Passage(part, ends, number) for part, ends in cut([text], before))
        before += len(text)


def _file_passages(item: FileInput, text_key: str, before: int) -> Iterator[Passage]:
    try:
        with open(item.path, "rb") as raw:
            for pieces in _documents(raw, item.path, text_key):
                for part, ends in cut(pieces, before):
                    before += len(part)
                    yield Passage(part, ends, raw.tell())
    except EOFError as error:
        raise UsageError(f"{item.path}: truncated, the compressed data stop early; fetch the file again") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UsageError(f"{item.path}: damaged {item.path.suffix} data ({error})") from error
    except OSError as error:
        raise UsageError(f"{item.path}: cannot be read: {error.strerror or error}") from error


def cut(pieces: Iterable[str], before: int) -> Iterator[tuple[str, bool]]:
    """Cuts a document, given in pieces of any size, into passages; its source had `before` characters before it.

    A passage has at most 16,384 characters if it starts in the first 1,048,576 of the source, and 65,536 after these.
    Yields (passage, whether it ends the document). Cuts after the last line break that fits, else before the last
    space, else anywhere; nothing is lost. An empty document yields nothing.
    """
    held = ""
    for piece in pieces:
        held += piece
        at = 0
        while len(held) - at > (limit := _most_chars(before)):
            end = _cut_place(held, at, at + limit)
            yield held[at:end], False
            before += end - at
            at = end
        held = held[at:]
    if held:
        yield held, True


def _most_chars(before: int) -> int:
    return SHORT_PASSAGE_CHARS if before < SHORT_UNTIL_CHARS else PASSAGE_CHARS


def _cut_place(text: str, start: int, limit: int) -> int:
    line = text.rfind("\n", start, limit) + 1
    if line > start:
        return line
    space = text.rfind(" ", start + 1, limit)
    return space if space > start else limit


def _documents(raw: BinaryIO, path: Path, text_key: str) -> Iterator[Iterable[str]]:
    compressed = path.suffix in COMPRESSIONS
    stream = _decompressed(raw, path.suffix) if compressed else raw
    ending = path.with_suffix("").suffix if compressed else path.suffix
    if ending in (".jsonl", ".json"):
        return ([text] for text in _json_texts(stream, path, text_key))
    if ending == ".parquet":
        return ([text] for text in _parquet_texts(stream, path, text_key))
    return iter([_plain_text(stream, path)])


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(raw))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(raw))
    return io.BufferedReader(_ZstdFrames(raw), READ_BYTES)


class _ZstdFrames(io.RawIOBase):
    """Zstandard frames one after the other; unlike the library's own reader it notices a truncated one (EOFError)."""

    def __init__(self, raw: BinaryIO) -> None:
        zstandard = needed("zstandard", "to read .zst files")
        self._raw, self._error = raw, zstandard.ZstdError
        # 2 GiB: what `zstd --long=31` asks for; the library's own limit refuses such files.
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._ready, self._unread = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._unread or self._raw.read(READ_BYTES)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise zlib.error(str(error)) from error
            self._unread = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _plain_text(stream: BinaryIO, path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while True:
        block = stream.read(READ_BYTES)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 text ({error.reason}); convert it, or leave it out") from error
        if "\0" in text:
            raise UsageError(f"{path}: a binary file (it holds NUL bytes), not text; leave it out")
        yield text
        if not block:
            return


def _json_texts(stream: BinaryIO, path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not a JSON line ({error}); write one object a line") from error
        text = _text_of(row, text_key, f"{path}:{number}")
        # Only a \u escape can bring half a surrogate pair into a string, and no tokenizer takes one.
        yield whole_characters(text) if b"\\ud" in line or b"\\uD" in line else text


def _text_of(row: Any, text_key: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a {type(row).__name__} where an object with the key {text_key!r} should be")
    if text_key not in row:
        keys = ", ".join(map(repr, list(row)[:8])) or "none"
        raise UsageError(f"{where}: no key {text_key!r}; the keys are {keys}: choose one with --text-key")
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f"{where}: {text_key!r} is a {type(text).__name__}, not text: choose another key with --text-key"
        )
    return text or ""


def whole_characters(text: str) -> str:
    """The text with pairs of surrogates joined, and single ones replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _parquet_texts(stream: BinaryIO, path: Path, text_key: str) -> Iterator[str]:
    pyarrow = needed("pyarrow", "to read parquet files")
    parquet = needed("pyarrow.parquet", "to read parquet files")
    try:
        # Parquet is read from its end: what is compressed on the outside has to be unpacked first.
        table = parquet.ParquetFile(stream if path.suffix == ".parquet" else io.BytesIO(stream.read()))
        if text_key not in table.schema_arrow.names:
            names = ", ".join(map(repr, table.schema_arrow.names[:8]))
            raise UsageError(f"{path}: no column {text_key!r}; the columns are {names}: choose one with --text-key")
        kind = table.schema_arrow.field(text_key).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UsageError(f"{path}: the column {text_key!r} holds {kind}, not text: choose another with --text-key")
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a whole parquet file ({_reason(error)})") from error


def hub_texts(item: HubInput, text_key: str) -> Iterator[str]:
    """The texts of one split of a Hugging Face data set, streamed; UsageError if it cannot be had or lacks the key."""
    datasets = needed("datasets", f"to read the data set {item.name} (there is no file of that name)")
    try:
        rows = datasets.load_dataset(item.name, item.config_name, split=item.split, streaming=True)
    except Exception as error:  # hub, HTTP, config and split errors share no base class
        raise UsageError(
            f"{item.name}: no such file or folder, and not to be had as a Hugging Face data set ({_reason(error)})"
        ) from error
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield whole_characters(_text_of(row, text_key, f"{item.name} row {number}"))
    except UsageError:
        raise
    except Exception as error:  # as above
        raise SlopeError(
            f"{item.name}: reading stopped after row {number} ({_reason(error)}); run the same command again"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def needed(module: str, purpose: str) -> ModuleType:
    """Imports a module that only some inputs need; UsageError that says what to install if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"{module.split('.')[0]} is needed {purpose}: pip install {module.split('.')[0]}") from error
