"""A corpus of real text from Debian's own packages: source code, documentation, manual pages and prose.

    python -m slope_cli.benchmarks.corpus --work DIR --out DIR

corpus.yaml lists the packages of each source. apt fetches and verifies them, dpkg-deb unpacks them, groff renders
manual pages; nothing is installed. Four stages: each package becomes documents in UTF-8, without what programs have
written; files and long paragraphs that came before are cut; a source that would be too large a share of the tokens
loses documents; and each source becomes parts of at most PART bytes, `train/SOURCE-00000.jsonl.zst` and `val/...`, with
one object a line: `text`, `source`, `path`. A hash of a file's path decides what is validation text, and is the same
for other versions of a package. The same packages give the same bytes, in any number of processes.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
import zstandard

from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.errors import SlopeError, UsageError
from slope_cli.utils.files import atomic_folder, write_json

from .corpus_packages import Package, fetch, licences, members, output_of
from .corpus_text import MIN_TEXT, NO_WORDS, PIECE, UNPACK, Rejected, document, kind_of, pieces, unpacked

PART = 60_000_000
"""The most bytes of a part."""
LEVEL = 9
"""Of zstd, for the parts."""
LONG_PARAGRAPH = 200
"""Characters from which a paragraph occurs only once: licences, notices, copied functions."""
MAX_SHARE = 0.4
"""Of all tokens, of one source."""
VAL_SHARE = 1 / 128
"""Of the files, as validation text."""
SAMPLE = 1 / 64
"""Of the documents, whose tokens are counted."""


# --------------------------------------------------------------------------------------------------- documents


@dataclass
class Extract:
    """What a package has given. copyright: the package whose copyright file holds, if not its own."""

    licences: list[str] = field(default_factory=list)
    copyright: str = ""
    documents: int = 0
    text_bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def extract(package: Package, folder: Path) -> Extract:
    """Write the documents of a package to `texts_of`, in its own order."""
    found = Extract()
    about = f"usr/share/doc/{package.name}"
    with _writer(texts_of(package, folder)) as write:
        for path, content, link in members(package.path):
            if path == about and link:
                found.copyright = link.rpartition("/")[2]
            if path == f"{about}/copyright":
                found.licences = licences(content.decode(errors="replace"))
            stem, _, packing = path.rpartition(".")
            name = stem if packing in UNPACK else path
            if link or not (kind := kind_of(name)):
                continue
            try:
                text = document(kind, unpacked(packing, content))
            except Rejected as reason:
                found.left_out[str(reason)] += 1
            else:
                found.text_bytes += len(text.encode())
                for piece in pieces(text):
                    found.documents += 1
                    write({"text": piece, "source": package.source, "path": f"{package.name}/{name}"})
    return found


def texts_of(package: Package, folder: Path) -> Path:
    """Where the documents of a package lie between the stages."""
    return folder / f"{package.name}.jsonl.zst"


# --------------------------------------------------------------------------------------------------- selection


def fraction(text: str, purpose: str) -> float:
    """A number from 0 to below 1 that looks random and depends on the text and the purpose alone."""
    return int.from_bytes(hashlib.blake2b(f"{purpose}:{text}".encode(), digest_size=8).digest()) / 2**64


def is_held_out(path: str) -> bool:
    """Whether a file is validation text, by its path without the numbers of versions in folders' names."""
    folders, _, name = path.rpartition("/")
    return fraction(re.sub(r"\d+([.+~-]\w+)*", "", folders) + "/" + name, "validation") < VAL_SHARE


class Seen:
    """The files and long paragraphs that have occurred; `cut` takes documents in order."""

    def __init__(self) -> None:
        self._files: set[bytes] = set()
        self._paragraphs: set[bytes] = set()

    def cut(self, text: str) -> str:
        """The document without long paragraphs that have occurred, by their letters and digits alone.

        Signs and spaces do not count, because comments begin otherwise in other languages. Rejected if the document has
        occurred, or less than half of it is new: it is a version of another one.
        """
        if (whole := _digest(text.encode())) in self._files:
            raise Rejected("a duplicate")
        new: set[bytes] = set()
        kept = []
        for paragraph in text.split("\n\n"):
            if len(paragraph) >= LONG_PARAGRAPH:
                key = _digest(paragraph.encode().translate(None, NO_WORDS))
                if key in self._paragraphs or key in new:
                    continue
                new.add(key)
            kept.append(paragraph)
        rest = "\n\n".join(kept).strip("\n") + "\n"
        if len(rest) < max(len(text) // 2, MIN_TEXT):
            raise Rejected("mostly duplicates")
        self._files.add(whole)
        self._paragraphs |= new
        return rest


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


@dataclass
class Selected:
    """What duplicates have left of a source. sizes: for each document its `fraction` and its bytes."""

    sizes: list[tuple[float, int]] = field(default_factory=list)
    sampled_bytes: int = 0
    sampled_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> float:
        """Estimated from the sample."""
        return sum(size for _, size in self.sizes) * self.tokens_per_byte

    @property
    def tokens_per_byte(self) -> float:
        """Of the sample."""
        return self.sampled_tokens / max(1, self.sampled_bytes)

    def below(self, tokens: float) -> float:
        """The fraction below which documents have at most so many tokens in all."""
        if self.tokens <= tokens:
            return 1.0
        order = sorted(self.sizes)
        totals = accumulate(size for _, size in order)
        return next(at for (at, _), total in zip(order, totals, strict=True) if total * self.tokens_per_byte > tokens)


def select(texts: Iterable[Path], out: Path, seen: Seen, count_tokens: Callable[[str], int]) -> Selected:
    """Write the documents of a source without what has occurred, in order."""
    selected = Selected()
    with _writer(out) as write:
        for number, record in enumerate(record for path in texts for record in _records(path)):
            try:
                record["text"] = text = seen.cut(record["text"])
            except Rejected as reason:
                selected.left_out[str(reason)] += 1
                continue
            write(record)
            size = len(text.encode())
            place = _place(record)
            selected.sizes.append((place, size))
            if place * 4096 % 1 < SAMPLE or number == 0:  # by other digits of it: those that remain are sampled alike
                selected.sampled_bytes += size
                selected.sampled_tokens += count_tokens(text)
    return selected


def _place(record: Mapping[str, str]) -> float:
    return fraction(record["path"] + record["text"][:100], "share")


def most_tokens(tokens: Sequence[float], share: float) -> float:
    """The tokens that a source may have at most, so that none is above this share of what then remains in all.

    Raises:
        UsageError: there are too few sources for it.
    """
    if len(tokens) * share < 1:
        raise UsageError(f"{len(tokens)} sources cannot each be at most {share:.0%} of the tokens; give more sources")
    most = max(tokens)
    for _ in range(1000):
        most = min(most, share * sum(min(most, each) for each in tokens))
    return most


# ------------------------------------------------------------------------------------------------------- parts


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[Mapping[str, str]], object]]:
    """Records as lines of JSON in a file of zstd, for the next stage."""
    with zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(1)) as file:
        yield lambda record: file.write(_line(record))


def _line(record: Mapping[str, str]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _records(path: Path) -> Iterator[dict[str, str]]:
    with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


class Part:
    """A part that is being written."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._compress = zstandard.ZstdCompressor(LEVEL, write_checksum=True).compressobj()
        self._hash, self._text_hash = hashlib.sha256(), hashlib.sha256()
        self.documents = self.text_bytes = self.bytes = 0

    def write(self, record: Mapping[str, str]) -> None:
        """Add a line."""
        line = _line(record)
        self._text_hash.update(line)
        self.documents += 1
        self.text_bytes += len(record["text"].encode())
        self._put(self._compress.compress(line))

    @property
    def full(self) -> bool:
        """Whether one more piece, and what the compressor holds, might be too much."""
        return self.bytes > PART - 8 * PIECE

    def close(self) -> dict[str, Any]:
        """Finish the file; its row of the manifest. lines_sha256: of its lines, whatever version of zstd packs them."""
        self._put(self._compress.flush())
        self._file.close()
        row: dict[str, Any] = {"documents": self.documents, "text_bytes": self.text_bytes, "bytes": self.bytes}
        return row | {"sha256": self._hash.hexdigest(), "lines_sha256": self._text_hash.hexdigest()}

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)


def write_parts(item: tuple[str, float], selected: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Write the parts of a source from its selected documents of a `fraction` below a number; their rows by path."""
    source, below = item
    rows: dict[str, dict[str, Any]] = {}
    open_parts: dict[str, tuple[str, Part]] = {}
    numbers: Counter[str] = Counter()
    for record in _records(selected / f"{source}.jsonl.zst"):
        if _place(record) >= below:
            continue
        split = "val" if is_held_out(record["path"]) else "train"
        if split not in open_parts:
            path = f"{split}/{source}-{numbers[split]:05d}.jsonl.zst"
            open_parts[split], numbers[split] = (path, Part(out / path)), numbers[split] + 1
        path, part = open_parts[split]
        part.write(record)
        if part.full:
            rows[path] = part.close()
            del open_parts[split]
    return dict(sorted({**rows, **{path: part.close() for path, part in open_parts.values()}}.items()))


def build(
    packages: Sequence[Package],
    work: Path,
    out: Path,
    *,
    tokenizer: str = "gpt2",
    max_share: float = MAX_SHARE,
    processes: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Make the corpus of fetched packages in the folder `out`, which appears when it is complete.

    Args:
        work: a folder for the files between the stages, about as large as the parts.
        tokenizer: as for `slope data prepare`: its tokens are counted, in a sample.
        max_share: the largest share of the tokens that a source may be.

    Returns:
        What manifest.json says.

    Raises:
        UsageError: `out` is not empty, there are too few sources for `max_share`, or groff is missing.
        SlopeError: a package is damaged, or `out` cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not an empty folder; choose another")
    tok = load_tokenizer(tokenizer).backend_tokenizer
    texts, kept = work / "texts", work / "selected"
    for folder in (texts, kept):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    with ExitStack() as stack:
        each: Callable[..., Iterable[Any]] = map
        if processes > 1:
            pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
            each = stack.enter_context(pool).map
        extracts = []
        for package, found in zip(packages, each(partial(extract, folder=texts), packages), strict=True):
            extracts.append(found)
            say(f"{package.name}: {texts_of(package, texts).stat().st_size / 1e6:.1f} MB")
        seen = Seen()
        selected: dict[str, Selected] = {}
        for source in dict.fromkeys(package.source for package in packages):
            given = [texts_of(package, texts) for package in packages if package.source == source]
            selected[source] = found = select(
                given, kept / f"{source}.jsonl.zst", seen, lambda text: len(tok.encode(text, add_special_tokens=False))
            )
            say(f"{source}: {found.tokens / 1e6:.1f} M tokens of {sum(size for _, size in found.sizes) / 1e6:.1f} MB")
        most = most_tokens([found.tokens for found in selected.values()], max_share)
        below = [(source, found.below(most)) for source, found in selected.items()]
        with atomic_folder(out) as folder:
            for split in ("train", "val"):
                (folder / split).mkdir()
            rows: dict[str, dict[str, Any]] = {}
            for found_rows in each(partial(write_parts, selected=kept, out=folder), below):
                rows |= found_rows
            manifest = _manifest(packages, extracts, selected, dict(below), rows, tokenizer)
            write_json(folder / "manifest.json", manifest)
    return manifest


def _manifest(
    packages: Sequence[Package],
    extracts: Sequence[Extract],
    selected: Mapping[str, Selected],
    below: Mapping[str, float],
    rows: Mapping[str, dict[str, Any]],
    tokenizer: str,
) -> dict[str, Any]:
    sources: dict[str, dict[str, Any]] = {}
    for name, found in selected.items():
        own = [row | {"split": path.split("/")[0]} for path, row in rows.items() if _source_of(path) == name]
        left_out = found.left_out.copy()
        for package, extracted in zip(packages, extracts, strict=True):
            left_out.update(extracted.left_out if package.source == name else {})
        left_out["above the largest share"] = len(found.sizes) - sum(row["documents"] for row in own)
        sources[name] = {
            **{key: sum(row[key] for row in own) for key in ("documents", "text_bytes", "bytes")},
            "tokens_per_byte": round(found.tokens_per_byte, 5),
            **{
                f"{split}_tokens": round(
                    sum(r["text_bytes"] for r in own if r["split"] == split) * found.tokens_per_byte
                )
                for split in ("train", "val")
            },
            "below": below[name],
            "left_out": dict(sorted(left_out.items())),
        }
    total = sum(row["train_tokens"] + row["val_tokens"] for row in sources.values())
    for row in sources.values():
        row["share"] = round((row["train_tokens"] + row["val_tokens"]) / total, 4)
    return {
        "programs": {"python": sys.version.split()[0], "zstandard": zstandard.__version__, "groff": _groff()},
        "tokenizer": Path(tokenizer).name,
        "tokens": total,
        "sources": sources,
        "packages": [
            {
                **{"package": package.name, "version": package.version, "sha256": package.sha256},
                **{"source": package.source, "documents": found.documents, "text_bytes": found.text_bytes},
                **{"licences": found.licences, "copyright": found.copyright or package.name},
            }
            for package, found in zip(packages, extracts, strict=True)
        ],
        "parts": dict(rows),
    }


def _source_of(path: str) -> str:
    return path.partition("/")[2].rpartition("-")[0]


def _groff() -> str | None:
    return output_of(["groff", "--version"]).splitlines()[0] if shutil.which("groff") else None


def main() -> None:
    """Fetch, make the corpus, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for packages and files between the stages")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--packages", type=Path, default=Path(__file__).with_name("corpus.yaml"), help="SOURCE: [PACKAGE]"
    )
    parser.add_argument("--versions", type=Path, help="a manifest.json whose versions to take, not apt's candidates")
    parser.add_argument("--tokenizer", default="gpt2", help="to count tokens with: a folder or a Hugging Face name")
    parser.add_argument("--max-share", type=float, default=MAX_SHARE, help="of the tokens, of one source")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    try:
        versions = json.loads(given.versions.read_text())["packages"] if given.versions else []
        pinned = {entry["package"]: entry["version"] for entry in versions}
        packages = fetch(yaml.safe_load(given.packages.read_text()), given.work / "packages", pinned)
        manifest = build(
            packages,
            given.work,
            given.out,
            tokenizer=given.tokenizer,
            max_share=given.max_share,
            processes=given.processes,
            say=partial(print, file=sys.stderr, flush=True),
        )
    except SlopeError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(f"{given.out}: about {manifest['tokens']:,} tokens in {len(manifest['parts'])} parts")


if __name__ == "__main__":
    main()
