"""File formats of text: which one a name means, and the texts in a file of each. Memory is bounded in all of them."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, cast

from slope_cli.errors import UsageError, did_you_mean, first_line

UTF_8 = "utf-8"
READ_BYTES = 1 << 20
ROW_BYTES = 1 << 26
"""The longest line or record of a file of rows. Its size is known only once it is in memory."""
PACKED_PARQUET_BYTES = 1 << 30
ZSTD_SLICE_BYTES = 1 << 10
"""Compressed bytes given to Zstandard at a time: its library bounds no output, and 4 bytes may become 128 KiB."""
HEAD_BYTES = 1 << 12

SHARD = re.compile(r"[-_.]\d+([-_.]of[-_.]\d+)?(-[0-9a-f]{16})?$")
COMPRESSIONS = {".gz": ".gz", ".gzip": ".gz", ".bz2": ".bz2", ".xz": ".xz", ".zst": ".zst", ".zstd": ".zst"}
ROWS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".ldjson"), ".jsonl"),
    ".json": ".json",
    **dict.fromkeys((".parquet", ".parq", ".pq"), ".parquet"),
    ".csv": ".csv",
    **dict.fromkeys((".tsv", ".tab"), ".tsv"),
}
TEXTS = (".txt", ".text", ".md", ".markdown")
NOT_READ = re.compile(
    r"\.(7z|rar|tar|tbz2|tgz|txz|zip|br|lz4|lzma|lzo|snappy|sz|z|arrow|avro|feather|orc|tfrecord|tfrecords"
    r"|mds|msgpack|xls|xlsx|ods|db|sqlite|sqlite3|h5|hdf5|mat|npy|npz|pickle|pkl|pt|pth|rds"
    r"|safetensors|tok|geojson|htm|html|ipynb|jsonc|json5|jsonld|xhtml|xml|yaml|yml|warc|wat|wet|doc|docx"
    r"|epub|mobi|odt|pdf|ps|rtf|aria2|crdownload|download|incomplete|lock|part|partial|tmp)",
    re.I,
)
"""Endings of structured or unfinished files. Any other ending that is not known is taken for plain text."""
_LOOKS_LIKE_JSON = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')


class Format(NamedTuple):
    """What a file's name says: the ending of its rows ("" for plain text), its compression, and the name without.

    ending: in lower case, as it was written before a compression's. encoding: of its text, which no name says.
    """

    rows: str
    compression: str
    stem: str
    ending: str
    encoding: str = UTF_8

    @property
    def name(self) -> str:
        """The endings of the format."""
        return self.rows + self.compression


def format_of(path: Path, encoding: str = UTF_8) -> Format:
    """The format that a name means; synonyms and upper case are known, and a shard's number may follow its ending."""
    form = _format_of_name(path.name)
    if not form.name and (shard := SHARD.search(path.name)):
        without_number = _format_of_name(path.name[: shard.start()])
        form = without_number if without_number.name else form
    return form._replace(encoding=encoding)


def _format_of_name(name: str) -> Format:
    stem, ending = _split(name)
    if compression := COMPRESSIONS.get(ending, ""):
        stem, ending = _split(stem)
    return Format(ROWS.get(ending, ""), compression, stem, ending)


def _split(name: str) -> tuple[str, str]:
    stem, _, ending = name.rpartition(".")
    return (stem, f".{ending.lower()}") if stem and ending else (name, "")


def why_unread(path: Path, form: Format) -> str | None:
    """Why a file is not taken for text, by its name or, where this says nothing, by its first bytes; else None."""
    if form.rows or form.ending in TEXTS:
        return None
    if NOT_READ.fullmatch(form.ending):
        return f"{form.ending} files are not read; convert it, or name it .txt if it is plain text"
    try:
        with open(path, "rb") as raw:
            head = text_stream(raw, path, form).read(HEAD_BYTES)
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason}); give its --encoding, convert it, or leave it out"
    except UsageError as error:
        return str(error).removeprefix(f"{path}: ")
    except (EOFError, zlib.error, lzma.LZMAError, OSError):
        return None  # reading it says more
    if b"\0" in head:
        return "a binary file (it contains NUL bytes), not text; leave it out"
    if _LOOKS_LIKE_JSON.match(head):
        return "begins as JSON does; name it .jsonl, or .txt if it is plain text"
    return None


def documents(raw: BinaryIO, path: Path, form: Format, text_key: str) -> Iterator[Iterable[str]]:
    """The documents of a file, each in pieces: a row is a document, and so is a file of plain text."""
    stream = text_stream(raw, path, form)
    if form.rows in (".jsonl", ".json"):
        return ([text] for text in _json_texts(stream, path, text_key))
    if form.rows == ".parquet":
        return ([text] for text in _parquet_texts(stream, path, form, text_key))
    if form.rows:
        return ([text] for text in _csv_texts(stream, path, form, text_key))
    return iter([_plain_text(stream, path)])


# ---------------------------------------------------------------------------------------- compression and encoding


def known_encoding(name: str) -> str:
    """Python's own name of an encoding; UsageError if it knows none of this name."""
    try:
        "".encode(name)  # also refuses those that are not of text, such as base64
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        raise UsageError(f"--encoding {name}: is not known; give one such as utf-8, latin-1, cp1252, utf-16") from None


def text_stream(raw: BinaryIO, path: Path, form: Format) -> BinaryIO:
    """A stream of a file's decompressed bytes; text is in UTF-8, whatever its encoding."""
    stream = decompressed(raw, form.compression)
    if form.encoding == UTF_8 or form.rows == ".parquet":
        return stream
    return io.BufferedReader(_Recoded(stream, path, form.encoding), READ_BYTES)


class _Recoded(io.RawIOBase):
    """Text of another encoding as UTF-8, so that only this knows of encodings."""

    def __init__(self, stream: BinaryIO, path: Path, encoding: str) -> None:
        self._stream, self._path, self._encoding = stream, path, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready, self._ended = memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._stream.read(READ_BYTES)
            self._ended = not block
            try:
                text = self._decoder.decode(block, final=self._ended)
            except UnicodeError as error:  # the codec of utf-16 raises its base class for a missing byte order mark
                reason = getattr(error, "reason", error)
                raise UsageError(f"{self._path}: not {self._encoding} text ({reason}); correct --encoding") from error
            self._ready = memoryview(text.encode("utf-8", "replace"))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """A stream of the decompressed bytes. A read takes memory for what it returns, not for all that its input holds."""
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(raw))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.open(raw))
    if compression == ".xz":
        return cast(BinaryIO, lzma.open(raw))
    return io.BufferedReader(_ZstdFrames(raw), READ_BYTES) if compression == ".zst" else raw


class _ZstdFrames(io.RawIOBase):
    """Consecutive Zstandard frames. Unlike the library's own reader, it reports a truncated one (EOFError)."""

    def __init__(self, raw: BinaryIO) -> None:
        zstandard = needed("zstandard", "to read .zst files")
        self._raw, self._error = raw, zstandard.ZstdError
        # `zstd --long=31` needs 2 GiB; the library refuses such files by default.
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._ready, self._unread = memoryview(b""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._unread or self._raw.read(ZSTD_SLICE_BYTES)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise zlib.error(str(error)) from error
            self._unread = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


# ---------------------------------------------------------------------------------------------- plain text, JSON


def _plain_text(stream: BinaryIO, path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while True:
        block = stream.read(READ_BYTES)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            advice = "give its --encoding, convert it, or leave it out"
            raise UsageError(f"{path}: not UTF-8 text ({error.reason}); {advice}") from error
        if "\0" in text:
            raise UsageError(f"{path}: a binary file (it contains NUL bytes), not text; leave it out")
        yield text
        if not block:
            return


def _json_texts(stream: BinaryIO, path: Path, text_key: str) -> Iterator[str]:
    """The texts of JSON lines, or of one list of objects."""
    if _peek(stream).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        for number, row in enumerate(_list_items(_plain_text(stream, path), path), 1):
            yield whole_characters(text_of(row, text_key, f"{path}: record {number}"))
        return
    for number, line in enumerate(_lines(stream, path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(_decoded(line, path, number))
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{path}:{number}: not a JSON line ({error}); write one object per line, or a list of objects"
            ) from error
        text = text_of(row, text_key, f"{path}:{number}")
        # Only a \u escape can put half a surrogate pair into a string, which no tokenizer accepts.
        yield whole_characters(text) if b"\\ud" in line or b"\\uD" in line else text


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    for number, line in enumerate(iter(partial(stream.readline, ROW_BYTES + 1), b""), 1):
        if len(line) > ROW_BYTES:
            raise _too_long(f"{path}:{number}", "line")
        yield line


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}:{number}: not UTF-8 text ({error.reason}); give its --encoding") from error


def _peek(stream: Any) -> bytes:
    """The next bytes of a stream, which stay in it."""
    return cast(bytes, stream.peek(HEAD_BYTES))


def _list_items(pieces: Iterator[str], path: Path) -> Iterator[Any]:
    """The items of a JSON list, whose text comes in pieces; one item at a time is in memory."""
    decode, opened, number = json.JSONDecoder().raw_decode, False, 1
    held, at = "", 0

    def hold_more() -> bool:
        """Twice as much as is unread, so that a long item, which is decoded anew each time, takes linear time."""
        nonlocal held, at
        parts, size, unread = [held[at:]], 0, len(held) - at
        while size <= unread and (piece := next(pieces, "")):
            parts.append(piece)
            size += len(piece)
        held, at = "".join(parts), 0
        return size > 0

    while True:
        while at < len(held) and held[at] in " \t\r\n,":
            at += 1
        if at == len(held):
            if not hold_more():
                raise UsageError(f"{path}: truncated, its JSON list does not end; fetch the file again")
        elif not opened:
            opened, at = True, at + 1
        elif held[at] == "]":
            if held[at + 1 :].strip() or any(piece.strip() for piece in pieces):
                raise UsageError(f"{path}: has more text after its JSON list; write one list, or one object per line")
            return
        else:
            try:
                item, at = decode(held, at)
            except (ValueError, RecursionError) as error:
                if len(held) - at > ROW_BYTES:
                    raise _too_long(f"{path}: record {number}", "record") from error
                if not hold_more():
                    raise UsageError(f"{path}: record {number}: not JSON ({first_line(error)})") from error
            else:
                number += 1
                yield item


def _too_long(where: str, what: str) -> UsageError:
    return UsageError(
        f"{where}: a {what} of more than {ROW_BYTES >> 20} MiB; cut it into shorter ones, or leave it out"
    )


def text_of(row: Any, text_key: str, where: str) -> str:
    """The text of a row; UsageError if the row is no object, or has no text under the key."""
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a {type(row).__name__} instead of an object with the key {text_key!r}")
    if text_key not in row:
        raise _no_such_field(where, "key", text_key, row)
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f"{where}: {text_key!r} is a {type(text).__name__}, not text; choose another key with --text-key"
        )
    return text or ""


def _no_such_field(where: object, kind: str, name: str, known: Collection[str]) -> UsageError:
    hint = did_you_mean(name, known) if known else "there is none"
    return UsageError(f"{where}: no {kind} {name!r}: {hint}; choose one with --text-key")


def whole_characters(text: str) -> str:
    """The text with pairs of surrogates joined, and single ones replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# ---------------------------------------------------------------------------------------------- tables


def _parquet_texts(stream: BinaryIO, path: Path, form: Format, text_key: str) -> Iterator[str]:
    pyarrow = needed("pyarrow", "to read parquet files")
    parquet = needed("pyarrow.parquet", "to read parquet files")
    if form.compression:  # parquet is read from its end, so an outer compression must be undone first
        content = stream.read(PACKED_PARQUET_BYTES + 1)
        if len(content) > PACKED_PARQUET_BYTES:
            raise UsageError(f"{path}: more than {PACKED_PARQUET_BYTES >> 30} GiB of parquet; decompress it first")
        stream = io.BytesIO(content)
    try:
        table = parquet.ParquetFile(stream)
        if text_key not in table.schema_arrow.names:
            raise _no_such_field(path, "column", text_key, table.schema_arrow.names)
        dtype = table.schema_arrow.field(text_key).type
        if not (pyarrow.types.is_string(dtype) or pyarrow.types.is_large_string(dtype)):
            raise UsageError(f"{path}: the column {text_key!r} is {dtype}, not text; choose another with --text-key")
        for batch in table.iter_batches(batch_size=128, columns=[text_key]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a whole parquet file ({first_line(error)})") from error


def _csv_texts(stream: BinaryIO, path: Path, form: Format, text_key: str) -> Iterator[str]:
    """The texts of a table with a header row: comma-separated, or tab-separated.

    Python's own reader, since that of pyarrow reads ahead in a thread, which aborts a process that ends on an error.
    """
    csv.field_size_limit(ROW_BYTES)
    reader = csv.reader(_text_lines(stream, path), strict=True, delimiter="\t" if form.rows == ".tsv" else ",")
    try:
        header = next(reader, [])
        if header and text_key not in header:
            raise _no_such_field(path, "column", text_key, header)
        for row in filter(None, reader):
            if len(row) != len(header):
                raise UsageError(f"{path}:{reader.line_num}: has {len(row)} columns, but the header {len(header)}")
            yield row[header.index(text_key)]
    except csv.Error as error:
        raise UsageError(
            f"{path}:{reader.line_num}: not a row of a table ({error}); mend it, or leave the file out"
        ) from error


def _text_lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(stream, path), 1):
        yield _decoded(line, path, number)


def needed(module: str, purpose: str) -> ModuleType:
    """Import a module that only some inputs need; if it is missing, a UsageError says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"{module.split('.')[0]} is needed {purpose}: pip install {module.split('.')[0]}") from error
