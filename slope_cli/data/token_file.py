"""The token file: a header with a checksum, and memory-mapped token ids."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slope_cli.errors import SlopeError, UsageError, first_line
from slope_cli.utils.files import atomic_file

Tokens = NDArray[Any]

MAGIC = b"SLOPETOK1\n"
HEADER_BYTES = 4096
READ_TOKENS = 1 << 22
DTYPES = ("<u2", "<u4")


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


@dataclass(frozen=True)
class TokenFile:
    """A memory-mapped file of token ids: 4096 bytes of header, then little-endian uint16 or uint32."""

    path: Path
    header: TokenHeader

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Open a file and check its header and its size, but not its payload; SlopeError if they are wrong."""
        try:
            with open(path, "rb") as file:
                block = file.read(HEADER_BYTES)
            size = path.stat().st_size
        except OSError as error:
            raise SlopeError(read_error(path, error)) from error
        header = _parse_header(path, block)
        expected = HEADER_BYTES + header.tokens * np.dtype(header.dtype).itemsize
        if size != expected:
            raise SlopeError(f"{path}: has {size} bytes, but its header says {expected}; prepare the data again")
        return cls(path, header)

    @property
    def tokens(self) -> Tokens:
        """The ids, (tokens,) uint16 or uint32, as a new memory map: it holds a file open for as long as it lives."""
        if self.header.tokens == 0:  # an empty range cannot be mapped
            return np.empty(0, self.header.dtype)
        try:
            return np.memmap(self.path, self.header.dtype, "r", HEADER_BYTES, (self.header.tokens,))
        except (OSError, ValueError) as error:  # ValueError: it has become shorter
            raise SlopeError(read_error(self.path, error if isinstance(error, OSError) else OSError(error))) from error

    def pieces(self) -> Iterator[Tokens]:
        """The ids in order, in arrays of READ_TOKENS, read without a memory map."""
        dtype = np.dtype(self.header.dtype)
        try:
            with open(self.path, "rb") as file:
                file.seek(HEADER_BYTES)
                while block := file.read(READ_TOKENS * dtype.itemsize):
                    yield np.frombuffer(block, dtype, len(block) // dtype.itemsize)
        except OSError as error:
            raise SlopeError(read_error(self.path, error)) from error

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

    def verify(self) -> None:
        """Check the payload; SlopeError if its checksum is wrong, or an id is above the header's largest."""
        digest, largest = hashlib.sha256(), np.zeros(1, np.int64)
        for piece in self.pieces():
            digest.update(piece.data)
            largest = np.maximum(largest, piece.max(initial=0))
        if digest.hexdigest() != self.header.sha256:
            raise SlopeError(f"{self.path}: damaged, its checksum is wrong; prepare the data again")
        if self.header.tokens:
            self.checked(largest)


ADVICE = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: close some, or ask its administrator",
    errno.ENOMEM: "the machine has too little free memory: close other programs",
    errno.EACCES: "give yourself the right to read it (chmod +r)",
    errno.ENOENT: "it was there before: put it back, and run the same command again",
    errno.ESTALE: "the file system has lost it: run the same command again",
    errno.EIO: "the disk or network failed: copy the file elsewhere",
}


def read_error(path: Path, error: OSError, what: str = "read") -> str:
    """One line for a file or folder that cannot be read or written: its name, why, and what to do."""
    advice = ADVICE.get(error.errno or 0, "mend this, and run the same command again")
    return f"{error.filename or path}: cannot be {what}: {error.strerror or error}; {advice}"


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
    return TokenFile(path, header)
