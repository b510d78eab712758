"""The token file: a header with a checksum, and token ids.

It is read and not mapped into memory: where a mapped file is cut off, a signal ends the process that looks there.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slope_cli.errors import SlopeError, UsageError, first_line, os_reason
from slope_cli.utils.files import atomic_file

Tokens = NDArray[Any]

MAGIC = b"SLOPETOK1\n"
HEADER_BYTES = 4096
READ_TOKENS = 1 << 22
DTYPES = ("<u2", "<u4")
SEAL = slice(len(MAGIC), len(MAGIC) + 64)
"""Where the header's own checksum is."""


@dataclass(frozen=True)
class TokenHeader:
    """The header of a token file. sha256: of the payload. text_bytes: of the source text in UTF-8."""

    source: str
    split: str
    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    max_id: int
    vocab_size: int
    separator_id: int
    tokenizer: str
    sha256: str


class FileIdentity(NamedTuple):
    """What tells a file that was changed or replaced from the one before. header: the header's own checksum."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    header: str


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids: 4096 bytes of header, then little-endian uint16 or uint32. identity: when it was opened."""

    path: Path
    header: TokenHeader
    identity: FileIdentity

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Open a file and check its header and its size, but not its payload; SlopeError if they are wrong."""
        try:
            with open(path, "rb") as file:
                block, status = file.read(HEADER_BYTES), os.fstat(file.fileno())
        except OSError as error:
            raise SlopeError(read_error(path, error)) from error
        header, size = _parse_header(path, block), status.st_size
        expected = HEADER_BYTES + header.tokens * np.dtype(header.dtype).itemsize
        if size != expected:
            raise SlopeError(f"{path}: has {size} bytes, but its header says {expected}; prepare the data again")
        times = status.st_mtime_ns, status.st_ctime_ns
        return cls(path, header, FileIdentity(size, *times, status.st_ino, block[SEAL].decode()))

    @property
    def tokens(self) -> Tokens:
        """All ids, (tokens,) uint16 or uint32."""
        return TokenReader(self).read(0, self.header.tokens)

    def pieces(self) -> Iterator[Tokens]:
        """The ids in order, in arrays of READ_TOKENS."""
        reader, tokens = TokenReader(self), self.header.tokens
        for start in range(0, tokens, READ_TOKENS):
            yield reader.read(start, min(start + READ_TOKENS, tokens))

    def checked(self, ids: Tokens) -> Tokens:
        """Ids of this file, if none is above the largest that its header names, else SlopeError.

        A header can be forged together with its checksum, and an id outside the vocabulary ends a GPU's process.
        """
        if ids.size and int(ids.max()) > self.header.max_id:
            raise SlopeError(
                f"{self.path}: contains the token id {ids.max()}, but its header says at most {self.header.max_id}; "
                f"prepare the data again"
            )
        return ids

    def verify(self, check: Callable[[], None] = lambda: None) -> None:
        """Check the payload; SlopeError if its checksum is wrong, or an id is above the header's largest.

        check: called now and then; what it raises ends this.
        """
        for _ in self.verified():
            check()

    def verified(self) -> Iterator[bytes | memoryview]:
        """All bytes of the file, in pieces; as `verify`, at the end of the last one."""
        yield TokenReader(self).header_block()
        digest, largest = hashlib.sha256(), np.zeros(1, np.int64)
        for piece in self.pieces():
            digest.update(piece.data)
            largest = np.maximum(largest, piece.max(initial=0))
            yield piece.data
        if digest.hexdigest() != self.header.sha256:
            raise SlopeError(f"{self.path}: damaged, its checksum is wrong; prepare the data again")
        if self.header.tokens:
            self.checked(largest)


class TokenReader:
    """A token file that is held open, to read ids from any place; for any number of threads.

    SlopeError, also of `read`, if it is no longer the file that `TokenFile.open` opened, or cannot be read.
    """

    def __init__(self, file: TokenFile) -> None:
        self._file, self._dtype = file, np.dtype(file.header.dtype)
        try:
            self._handle = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._handle)
        except OSError as error:
            raise SlopeError(read_error(file.path, error)) from error
        if self._bytes(0, SEAL.stop)[SEAL] != file.identity.header.encode():
            raise SlopeError(f"{file.path}: was replaced while it was used; put the old file back, or start anew")

    def read(self, start: int, stop: int) -> Tokens:
        """The ids from `start` to before `stop`: uint16 or uint32, read-only."""
        size = self._dtype.itemsize
        return np.frombuffer(self._bytes(HEADER_BYTES + start * size, (stop - start) * size), self._dtype)

    def header_block(self) -> bytes:
        """The header as it lies in the file."""
        return self._bytes(0, HEADER_BYTES)

    def _bytes(self, at: int, size: int) -> bytes:
        try:
            block = os.pread(self._handle, size, at)
            while len(block) < size and (more := os.pread(self._handle, size - len(block), at + len(block))):
                block += more  # one call gives at most 2 GiB
        except OSError as error:
            raise SlopeError(read_error(self._file.path, error)) from error
        if len(block) < size:
            found, whole = os.fstat(self._handle).st_size, self._file.identity.size
            cut = f"was cut off while it was used, to {found} bytes of {whole}"
            raise SlopeError(f"{self._file.path}: {cut}; put the old file back")
        return block


def read_error(path: Path, error: OSError, what: str = "read") -> str:
    """One line for a file or folder that cannot be read or written: its name, why, and what to do."""
    return f"{error.filename or path}: cannot be {what}: {os_reason(error)}"


def _parse_header(path: Path, block: bytes) -> TokenHeader:
    start = len(MAGIC) + 65
    if block[: len(MAGIC)] != MAGIC:
        raise SlopeError(f"{path}: not a token file of slope")
    if len(block) != HEADER_BYTES:
        raise SlopeError(f"{path}: has {len(block)} bytes, but the header alone has {HEADER_BYTES}")
    if block[len(MAGIC) : start] != _digest_line(block[start:]):
        raise SlopeError(f"{path}: damaged header, its checksum is wrong; prepare the data again")
    try:
        header = TokenHeader(**json.loads(block[start:]))
    except (TypeError, ValueError) as error:
        raise SlopeError(f"{path}: not the header of a token file ({first_line(error)})") from error
    if not _is_sound(header):
        raise SlopeError(f"{path}: its header contradicts itself; prepare the data again")
    return header


def _is_sound(header: TokenHeader) -> bool:
    """Whether every field of a header that somebody else wrote has its type, and the numbers fit each other."""
    fields = asdict(header)
    texts = [fields.pop(name) for name in ("source", "split", "dtype", "tokenizer", "sha256")]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int and number >= -1 for number in fields.values())
        and header.dtype in DTYPES
        and header.split in ("train", "val")
        and min(header.tokens, header.documents, header.text_bytes) >= 0
        and max(header.max_id, header.separator_id) < header.vocab_size
    )


def _header_block(header: TokenHeader) -> bytes:
    room = HEADER_BYTES - len(MAGIC) - 65
    text = json.dumps(asdict(header)).encode()
    if len(text) > room:
        raise UsageError(f"source {header.source[:40]}…: its name is too long for the header of a token file")
    padded = text.ljust(room)
    return MAGIC + _digest_line(padded) + padded


def _digest_line(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"


def token_dtype(vocab_size: int) -> str:
    """The smallest dtype that holds every id: `<u2` up to 65,536 ids, else `<u4`."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_token_file(
    path: Path,
    chunks: Iterable[Tokens],
    *,
    source: str,
    split: str,
    vocab_size: int,
    separator_id: int,
    tokenizer: str,
    text_bytes: int = 0,
) -> TokenFile:
    """Write one-dimensional chunks of integer ids in order, atomically.

    SlopeError if an id is outside the vocabulary or the disk is full; then an existing file is kept.
    """
    dtype, digest = token_dtype(vocab_size), hashlib.sha256()
    count, documents, max_id = 0, 0, -1
    with atomic_file(path) as file:
        file.write(bytes(HEADER_BYTES))
        for chunk in chunks:
            if chunk.size == 0:
                continue
            max_id = max(max_id, int(chunk.max()))
            if max_id >= vocab_size or chunk.min() < 0:
                raise SlopeError(
                    f"{path}: token ids from {chunk.min()} to {max_id} are outside the vocabulary of {vocab_size}"
                )
            payload = np.ascontiguousarray(chunk, dtype)
            file.write(payload.data)
            digest.update(payload.data)
            count += chunk.size
            documents += int(np.count_nonzero(payload == separator_id))
        header = TokenHeader(
            source, split, dtype, count, documents, text_bytes, max_id, vocab_size, separator_id, tokenizer,
            digest.hexdigest(),
        )  # fmt: skip
        file.seek(0)
        file.write(_header_block(header))
    return TokenFile.open(path)
