"""Prepared data sets, and batches that are a pure function of (seed, step, micro-step, rank).

Shape letters: B sequences of a micro-batch, T tokens of a sequence. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope_cli.data.token_file import TokenFile
from slope_cli.errors import SlopeError, UsageError
from slope_cli.utils.files import file_sha256, read_sealed, write_sealed

MANIFEST = "dataset.json"
UNFINISHED = ".parts"
NO_VALIDATION = (
    "only a source of two passages or more (documents, or parts of at most 16,384 characters of a long one) "
    "has some: join short files to one source as NAME=FOLDER, or prepare more text"
)


# -------------------------------------------------------------------------------------------------- data set


@dataclass(frozen=True)
class Dataset:
    """A prepared folder: `train/<source>.tok`, `val/<source>.tok`, `tokenizer/`, and `dataset.json`, written last."""

    folder: Path
    tokenizer_name: str
    vocab_size: int
    separator_id: int
    train: tuple[TokenFile, ...]
    val: dict[str, TokenFile]
    fingerprint: str
    plan: dict[str, Any]

    @property
    def train_tokens(self) -> int:
        """Tokens of all training files together."""
        return sum(file.header.tokens for file in self.train)

    def check_model(self, vocab_size: int, seq_len: int) -> None:
        """UsageError if a token id is outside the model's vocabulary, or the text shorter than one sequence."""
        for file in (*self.train, *self.val.values()):
            if file.header.max_id >= vocab_size:
                raise UsageError(
                    f"{file.path}: token id {file.header.max_id} is above the model's vocabulary of {vocab_size}; "
                    f"set the model's vocabulary to {self.vocab_size} (model.overrides.vocab_size={self.vocab_size}), "
                    f"or prepare the data with the model's tokenizer"
                )
        if self.train_tokens < seq_len + 1:
            raise UsageError(
                f"{self.folder}: {self.train_tokens} training tokens are fewer than one sequence needs "
                f"(train.seq_len + 1 = {seq_len + 1}); lower train.seq_len or prepare more text"
            )


def open_dataset(folder: Path | str, verify: bool = True) -> Dataset:
    """Opens a prepared folder; with `verify`, every byte of it is checked against its checksum.

    UsageError if it is no data set, SlopeError if it is unfinished or damaged; both name the file.
    """
    folder = Path(folder).expanduser()
    body = _read_manifest(folder)
    files = [_listed_file(folder, entry, verify) for entry in body["files"]]
    if verify:
        for name, digest in body["tokenizer_files"].items():
            if file_sha256(folder / "tokenizer" / name) != digest:
                raise SlopeError(f"{folder / 'tokenizer' / name}: damaged, its checksum is not that in {MANIFEST}")
    return Dataset(
        folder=folder,
        tokenizer_name=body["tokenizer"],
        vocab_size=body["vocab_size"],
        separator_id=body["separator_id"],
        train=tuple(file for file in files if file.header.split == "train"),
        val={file.header.source: file for file in files if file.header.split == "val"},
        fingerprint=hashlib.sha256("\n".join(file.header.sha256 for file in files).encode()).hexdigest(),
        plan=body["plan"],
    )


def write_manifest(
    folder: Path, files: Sequence[TokenFile], tokenizer: str, vocab_size: int, separator_id: int, plan: dict[str, Any]
) -> None:
    """Writes `dataset.json`, which makes the folder a data set: call it when all else is on the disk."""
    body = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "separator_id": separator_id,
        "tokenizer_files": {
            path.name: file_sha256(path) for path in sorted((folder / "tokenizer").iterdir()) if path.is_file()
        },
        "files": [
            {
                "path": file.path.relative_to(folder).as_posix(),
                "bytes": file.path.stat().st_size,
                "tokens": file.header.tokens,
                "sha256": file.header.sha256,
            }
            for file in files
        ],
        "plan": plan,
    }
    write_sealed(folder / MANIFEST, body)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder; make it with `slope data prepare`")
    if not path.is_file():
        if (folder / UNFINISHED).is_dir():
            raise SlopeError(f"{folder}: unfinished preparation; run the same `slope data prepare` again")
        raise UsageError(f"{folder}: not a prepared data set (no {MANIFEST}); make one with `slope data prepare`")
    try:
        return read_sealed(path)
    except SlopeError as error:
        raise SlopeError(f"{error}; prepare the data again") from None


def _listed_file(folder: Path, entry: dict[str, Any], verify: bool) -> TokenFile:
    file = TokenFile.open(folder / entry["path"])
    if (file.header.sha256, file.header.tokens) != (entry["sha256"], entry["tokens"]):
        raise SlopeError(f"{file.path}: not the file that {MANIFEST} lists; prepare the data again")
    if verify:
        file.verify()
    return file
