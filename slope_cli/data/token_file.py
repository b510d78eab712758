"""The token file: a header with a checksum, and memory-mapped token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slope_cli.errors import SlopeError, UsageError
from slope_cli.utils.files import atomic_file

Tokens = NDArray[Any]

MAGIC = b"SLOPETOK1\n"
HEADER_BYTES = 4096


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
            raise SlopeError(f"{path}: cannot be read: {error.strerror}") from error
        header = _parse_header(path, block)
        expected = HEADER_BYTES + header.tokens * np.dtype(header.dtype).itemsize
        if size != expected:
            raise SlopeError(f"{path}: has {size} bytes, but its header says {expected}; prepare the data again")
        return cls(path, header)

    @cached_property
    def tokens(self) -> Tokens:
        """The ids, (tokens,) uint16 or uint32, as a memory map."""
        if self.header.tokens == 0:  # an empty range cannot be mapped
            return np.empty(0, self.header.dtype)
        return np.memmap(self.path, self.header.dtype, "r", HEADER_BYTES, (self.header.tokens,))

    def verify(self) -> None:
        """Check the payload; SlopeError if its checksum is wrong."""
        with open(self.path, "rb") as file:
            file.seek(HEADER_BYTES)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.header.sha256:
            raise SlopeError(f"{self.path}: damaged, its checksum is wrong; prepare the data again")


def _parse_header(path: Path, block: bytes) -> TokenHeader:
    start = len(MAGIC) + 65
    if block[: len(MAGIC)] != MAGIC:
        raise SlopeError(f"{path}: not a token file of slope")
    if len(block) != HEADER_BYTES:
        raise SlopeError(f"{path}: has {len(block)} bytes, but the header alone has {HEADER_BYTES}")
    if block[len(MAGIC) : start] != _digest_line(block[start:]):
        raise SlopeError(f"{path}: damaged header, its checksum is wrong; prepare the data again")
    return TokenHeader(**json.loads(block[start:]))


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
