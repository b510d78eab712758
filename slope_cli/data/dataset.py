"""Prepared data sets: a folder of token files, the tokenizer, and a manifest with the checksums of all of them."""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slope_cli.data.folders import some
from slope_cli.data.token_file import FileIdentity, TokenFile
from slope_cli.errors import SlopeError, UsageError, nearest
from slope_cli.report import tables
from slope_cli.utils.files import file_sha256, read_sealed, write_sealed

MANIFEST = "dataset.json"
VERIFIED = "verified.json"
"""In the folder of a run: which token files were found whole, and by what to know that they are still the same."""
SETTLED_NS = 2_000_000_000
"""The age from which a file's times tell: a change within the same tick of the clock leaves them as they were."""
UNFINISHED = ".parts"
LARGE_SHARE = 0.25
"""Of a source's tokens as validation text: above it there is a warning unless it was asked for."""
NO_VALIDATION = (
    "only a source of two documents, or of one with more than 16,384 characters, has some: make short files one source "
    "(NAME=FOLDER), or prepare more text"
)
"""Why a data set may have no validation text, and how to get some."""
LESS_VALIDATION = (
    "what is held out are whole documents, or parts of up to 16,384 characters of long ones: make short files one "
    "source (NAME=FOLDER), or prepare more text"
)
"""Why a short source may lose much of its text to validation, and what to do."""


class WrongDataError(UsageError):
    """No data set is there, or it does not fit the run: another one is needed."""


@dataclass(frozen=True)
class Dataset:
    """A prepared folder: `train/<source>.tok`, `val/<source>.tok`, `tokenizer/`, and `dataset.json`, written last.

    val: by source, without sources that are too short. made_from: the inputs and settings, as JSON. verified: the files
    whose payload was checked when this was opened, or before, by their paths in the manifest.
    """

    folder: Path
    tokenizer_name: str
    vocab_size: int
    separator_id: int
    train: tuple[TokenFile, ...]
    val: dict[str, TokenFile]
    fingerprint: str
    made_from: dict[str, Any]
    verified: dict[str, FileIdentity] = field(default_factory=dict, compare=False)

    @property
    def train_tokens(self) -> int:
        """The number of tokens in all training files."""
        return sum(file.header.tokens for file in self.train)

    def check_model(self, vocab_size: int, seq_len: int) -> None:
        """Raise WrongDataError if a token id is outside the model's vocabulary, or the text shorter than a sequence."""
        for file in (*self.train, *self.val.values()):
            if file.header.max_id >= vocab_size:
                raise WrongDataError(
                    f"{file.path}: token id {file.header.max_id} is above the model's vocabulary of {vocab_size}; "
                    f"set the model's vocabulary to {self.vocab_size} (model.overrides.vocab_size={self.vocab_size}), "
                    f"or prepare the data with the model's tokenizer"
                )
        if self.train_tokens < seq_len + 1:
            raise WrongDataError(
                f"{self.folder}: {self.train_tokens} training tokens are fewer than one sequence needs "
                f"(train.seq_len + 1 = {seq_len + 1}); lower train.seq_len or prepare more text"
            )


def open_dataset(
    folder: Path | str,
    verify: bool = True,
    *,
    share: tuple[int, int] = (0, 1),
    known: Mapping[str, FileIdentity] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Dataset:
    """Open a prepared folder and check its tokenizer; with `verify`, check every byte of the text, too.

    Args:
        share: (rank, world): of the token files only those that fall to this rank, by size, are checked. All ranks
            together check all of them.
        known: files that were checked before, from `verified_before`: the same ones are not checked again.
        check: called now and then; what it raises ends this.

    Raises:
        WrongDataError: it is not a data set.
        SlopeError: it is unfinished, or the named file is damaged.
    """
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder)
    try:
        dataset = _listed(folder, manifest)
        _verify_tokenizer(folder / "tokenizer", manifest["tokenizer_files"])
        if verify:
            _verify(dataset, share, known or {}, check)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # sealed, but not by `write_manifest`
        raise SlopeError(f"{folder / MANIFEST}: not the manifest of a data set ({error!r})") from error
    return dataset


def _listed(folder: Path, manifest: dict[str, Any]) -> Dataset:
    files = [_listed_file(folder, entry) for entry in manifest["files"]]
    for name in manifest["tokenizer_files"]:
        _inside(folder, f"tokenizer/{name}")
    numbers = (manifest["vocab_size"], manifest["separator_id"])
    if not all(type(number) is int for number in numbers) or not isinstance(manifest["plan"], dict):
        raise TypeError("a wrong type")
    return Dataset(
        folder=folder,
        tokenizer_name=manifest["tokenizer"],
        vocab_size=numbers[0],
        separator_id=numbers[1],
        train=tuple(file for file in files if file.header.split == "train"),
        val={file.header.source: file for file in files if file.header.split == "val"},
        fingerprint=hashlib.sha256("\n".join(file.header.sha256 for file in files).encode()).hexdigest(),
        made_from=manifest["plan"],
    )


def _verify_tokenizer(folder: Path, listed: Mapping[str, str]) -> None:
    """Check that the tokenizer's files are those that the text was prepared with, by their hashes, and no others."""
    for name, digest in listed.items():
        if file_sha256(folder / name) != digest:
            raise SlopeError(f"{folder / name}: damaged, its checksum is not that in {MANIFEST}")
    for path in folder.glob("[!.]*"):
        if path.is_file() and path.name not in listed:
            raise SlopeError(f"{path}: is not of this data set, and may change its tokenizer; remove it")


def _verify(
    dataset: Dataset, share: tuple[int, int], known: Mapping[str, FileIdentity], check: Callable[[], None]
) -> None:
    """Check the token files of a share, and note them in `dataset.verified`."""
    files = (*dataset.train, *dataset.val.values())
    # Whose share a file is does not depend on `known`, so that ranks that see other times do not leave one out.
    for file in _share(files, *share):
        name = file.path.relative_to(dataset.folder).as_posix()
        if known.get(name) != file.identity:
            file.verify(check)
        dataset.verified[name] = file.identity


def _share(files: Iterable[TokenFile], rank: int, world: int) -> list[TokenFile]:
    """The files of one rank: of all, from the largest on, each goes to the rank that has the fewest bytes."""
    loads = [(0, each) for each in range(world)]
    mine = []
    for file in sorted(files, key=lambda file: (-file.identity.size, file.path)):
        load, taker = heapq.heappop(loads)
        heapq.heappush(loads, (load + file.identity.size, taker))
        if taker == rank:
            mine.append(file)
    return mine


def verified_before(path: Path) -> dict[str, FileIdentity]:
    """What `remember_verified` wrote; nothing, so that all is checked again, where this cannot be read."""
    try:
        files = read_sealed(path)["files"]
        return {name: FileIdentity(*identity) for name, identity in files.items()}
    except (SlopeError, KeyError, TypeError, AttributeError):
        return {}


def remember_verified(path: Path, shares: Iterable[Mapping[str, FileIdentity]]) -> None:
    """Write the `Dataset.verified` of all ranks for the next start; not files that have only just changed.

    It lies in the folder of the run, because that of the data may be read-only.
    """
    now = time.time_ns()
    files = {
        name: identity
        for share in shares
        for name, identity in share.items()
        if now - max(identity.mtime_ns, identity.ctime_ns) > SETTLED_NS
    }
    if files and files != verified_before(path):
        write_sealed(path, {"files": files})


def write_manifest(folder: Path, files: Sequence[TokenFile], made_from: dict[str, Any]) -> None:
    """Write `dataset.json`, which makes the folder a data set: call it when everything else is on the disk."""
    header = files[0].header
    manifest = {
        "tokenizer": header.tokenizer,
        "vocab_size": header.vocab_size,
        "separator_id": header.separator_id,
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
        "plan": made_from,
    }
    write_sealed(folder / MANIFEST, manifest)


def largely_held_out(dataset: Dataset) -> list[str]:
    """One line about the sources of which validation takes far more than its share, as short ones may; else none."""
    share, large = float(dataset.made_from.get("val_fraction", 0)), []
    for train in dataset.train:
        val = dataset.val.get(train.header.source)
        part = _held_out(train.header.tokens, val.header.tokens if val else 0)
        large += [f"{train.header.source} ({part:.0%})"] if share and part > max(LARGE_SHARE, 2 * share) else []
    line = f"{dataset.folder}: far more than --val-fraction {share:g} is held out for validation of {some(large)}"
    return [line] if large else []


def _held_out(train: int, val: int) -> float:
    """The share of so many training and validation tokens that is held out."""
    return val / max(1, train + val)


def show(dataset: Dataset, *, as_json: bool = False) -> None:
    """Print what each source has to train on and holds out for validation, and their sums, to standard output."""
    rows = []
    train = {file.header.source: file.header for file in dataset.train}
    for source in sorted({*train, *dataset.val}):
        header, val = train.get(source), dataset.val.get(source)
        trained = (header.documents, header.tokens, header.text_bytes) if header else (0, 0, 0)
        held_out = (val.header.tokens, val.header.text_bytes) if val else (0, 0)
        rows.append((source, *trained, *held_out))
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    kinds = ("training documents", "training tokens", "training bytes", "validation tokens", "validation bytes")
    if as_json:
        sources = [
            {"source": source}
            | {kind.replace(" ", "_"): count for kind, count in zip(kinds, counts, strict=True)}
            | {"held_out": _held_out(counts[1], counts[3])}
            for source, *counts in rows
        ]
        known = {
            "tokenizer": dataset.tokenizer_name,
            "vocab_size": dataset.vocab_size,
            "fingerprint": dataset.fingerprint,
        }
        print(json.dumps({"folder": str(dataset.folder), **known, "sources": sources}, indent=1))
        return
    cells = [
        [source, *(f"{count:,}" for count in counts), f"{_held_out(counts[1], counts[3]):.1%}"]
        for source, *counts in rows
    ]
    about = f"tokenizer {dataset.tokenizer_name}, {dataset.vocab_size:,} ids, fingerprint {dataset.fingerprint[:16]}"
    meaning = "validation text is held out of training, and each source's has a loss of its own; bytes of text in UTF-8"
    table = tables.Table("Sources", ("source", *kinds, "held out"), cells, note=f"{about}; {meaning}")
    tables.Document(str(dataset.folder), [table]).show()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise WrongDataError(
            f"{folder}: no such data folder; {_prepared_near(folder)}make it with `slope data prepare`"
        )
    if not path.is_file():
        if (folder / UNFINISHED).is_dir():
            raise SlopeError(f"{folder}: unfinished preparation; run the same `slope data prepare` again")
        known = f"{folder}: not a prepared data set (no {MANIFEST}); {_prepared_near(folder)}"
        raise WrongDataError(f"{known}make one with `slope data prepare`")
    try:
        return read_sealed(path)
    except SlopeError as error:
        raise SlopeError(f"{error}; prepare the data again") from None


def _prepared_near(folder: Path) -> str:
    """A question about the prepared folder with the nearest name, beside this one, here or in data/; else nothing."""
    places = dict.fromkeys((folder.parent, Path(), Path("data")))
    found = {path.parent.name: path.parent for place in places for path in sorted(place.glob(f"*/{MANIFEST}"))}
    near = [str(found[name]) for name in nearest(folder.name, found)]
    return f"did you mean {' or '.join(near)}? If not, " if near else ""


def _inside(folder: Path, name: str) -> Path:
    """A path that the manifest lists; SlopeError if it, or a link in it, leads out of the folder."""
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise SlopeError(f"{folder / MANIFEST}: lists {name!r}, which is outside the data set; prepare the data again")
    return folder / name


def _listed_file(folder: Path, entry: dict[str, Any]) -> TokenFile:
    file = TokenFile.open(_inside(folder, entry["path"]))
    if (file.header.sha256, file.header.tokens) != (entry["sha256"], entry["tokens"]):
        raise SlopeError(f"{file.path}: not the file that {MANIFEST} lists; prepare the data again")
    return file
