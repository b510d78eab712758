"""JSON Lines whose every line carries a checksum, and which a kill or a full disk can only cut at their end.

The last key of each object is "crc32", of the line's bytes before that key, in hex. Earlier versions wrote lines
without one; these are read up to the first line that has one.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slope_cli.errors import SlopeError, os_reason
from slope_cli.utils import files

IsSound = Callable[[Mapping[str, Any]], bool]
_KEY, _END = b', "crc32": "', b'"}\n'
_TAIL = len(_KEY) + 8 + len(_END)
_PARSER = json.JSONDecoder()


def encode(record: Mapping[str, Any]) -> bytes:
    """The line of a record, which has at least one key."""
    body = json.dumps(record)[:-1].encode()
    return body + _KEY + f"{zlib.crc32(body):08x}".encode() + _END


def read(path: Path, is_sound: IsSound = lambda _: True) -> list[dict[str, Any]]:
    """All records, without their checksums; SlopeError for a damaged line, or a file that cannot be read.

    Args:
        is_sound: whether a record has what the records of this file must have.
    """
    records = []
    for number, (record, _) in enumerate(lines(path, is_sound), 1):
        if record is None:
            raise SlopeError(f"{path}:{number} is damaged: not the record that was written")
        records.append(record)
    return records


def lines(path: Path, is_sound: IsSound = lambda _: True) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """Each line as a record, None if it is damaged or not sound, and as bytes; a last line cut short is left out."""
    checked = False
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    if _decode(line[:-1] + b"\n", True)[0] is not None:  # not cut short: its end is another byte
                        yield None, line
                    return
                record, checked = _decode(line, checked)
                yield (record if record is not None and is_sound(record) else None), line
    except OSError as error:
        raise SlopeError(f"{path}: cannot be read: {os_reason(error)}") from error


def _decode(line: bytes, checked: bool) -> tuple[dict[str, Any] | None, bool]:
    """The record of a line, None if it is damaged, and whether it or one before it (`checked`) has a checksum."""
    body, tail = line[:-_TAIL], line[-_TAIL:]
    sound = own = tail == _KEY + b"%08x" % zlib.crc32(body) + _END
    if not own:  # a damaged checksum must not pass for a line that never had one
        fixed = tail[: len(_KEY)] + tail[-len(_END) :]
        own = fixed == _KEY + _END
        nearly = sum(a != b for a, b in zip(fixed, _KEY + _END, strict=False)) <= 2
        sound = not (checked or own or nearly)
    try:  # half the time of json.loads, which guesses an encoding and looks for spaces
        text = str(body + b"}" if own else line.strip(b" \t\n\r"), "utf-8") if sound else ""
        record, end = _PARSER.raw_decode(text)
    except (ValueError, RecursionError):
        return None, checked or own
    return record if isinstance(record, dict) and end == len(text) else None, checked or own


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record; what a failed write left at the end of the file is removed first.

    Raises:
        SlopeError, UsageError: as `files.write_error`, and for a link.
    """
    try:
        handle = files.open_own(path)
        try:
            drop_cut_line(handle)
            write(handle, encode(record))
        finally:
            os.close(handle)
    except OSError as error:
        raise files.write_error(path, error) from error


def write(handle: int, line: bytes) -> None:
    """Append a line to an open file; it is there whole, or OSError and not at all."""
    end, rest = os.lseek(handle, 0, os.SEEK_END), memoryview(line)
    try:
        while rest:
            rest = rest[os.write(handle, rest) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, end)
        raise


def drop_cut_line(handle: int) -> None:
    """Remove the end of a file after its last newline."""
    size = end = os.lseek(handle, 0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        end = start + newline + 1
        if newline >= 0:
            break
    if end < size:
        os.ftruncate(handle, end)


def marks(*paths: Path) -> dict[str, dict[str, Any]]:
    """By the names of those that are there, their length and the sha256 of their bytes, which `extends` compares."""
    contents = {path.name: path.read_bytes() for path in paths if path.is_file()}
    return {name: {"bytes": len(x), "sha256": hashlib.sha256(x).hexdigest()} for name, x in contents.items()}


def extends(path: Path, earlier: Mapping[str, Any]) -> bool:
    """Whether a file still begins with what it was when its mark was taken."""
    size: int = earlier["bytes"]
    if not path.is_file() or not 0 <= size <= path.stat().st_size:
        return False
    with path.open("rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest() == str(earlier["sha256"])
