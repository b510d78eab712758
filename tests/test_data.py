"""Token files, data sets, the order of the samples, and batches."""

import gc
import hashlib
import json
import math
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slope_cli
from slope_cli.data.batches import (
    Batch,
    Blocks,
    MaskingIds,
    Prefetcher,
    bigram_loss,
    causal_batch,
    masked_batch,
    sample_indices,
    sample_numbers,
    shuffled,
    val_batches,
)
from slope_cli.data.dataset import (
    VERIFIED,
    Dataset,
    open_dataset,
    remember_verified,
    show,
    verified_before,
    write_manifest,
)
from slope_cli.data.token_file import HEADER_BYTES, TokenFile, TokenReader, Tokens, write_token_file
from slope_cli.distributed.signals import Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.utils.files import read_sealed, write_sealed

ROOT = str(Path(slope_cli.__file__).parents[1])
SPECIAL = MaskingIds(cls=1, sep=2, mask=3, pad=0, vocab_size=100, never_mask=(0, 1, 2, 3, 4))


def write(path: Path, ids: Tokens | list[int], *, split: str = "train", vocab_size: int = 1000) -> TokenFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = np.array_split(np.asarray(ids, np.int64), 3)
    return write_token_file(
        path, chunks, source=path.stem, split=split, vocab_size=vocab_size, separator_id=0, tokenizer="test"
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    files = [
        write(tmp_path / "train/a.tok", np.arange(1, 50)),
        write(tmp_path / "train/b.tok", np.arange(51, 80)),
        write(tmp_path / "val/a.tok", np.arange(7), split="val"),
    ]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    write_manifest(tmp_path, files, {"inputs": []})
    return open_dataset(tmp_path)


# ------------------------------------------------------------------------------------------------- token files


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_token_file_comes_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    ids = [5, 0, vocab_size - 1, 7, 0]
    written = write(tmp_path / "x.tok", ids, vocab_size=vocab_size)
    file = TokenFile.open(tmp_path / "x.tok")
    file.verify()
    assert file.header == written.header
    assert file.tokens.dtype == dtype
    assert file.tokens.tolist() == ids
    assert (file.header.tokens, file.header.documents, file.header.max_id) == (5, 2, vocab_size - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tok"]


def test_empty_token_file(tmp_path: Path) -> None:
    write(tmp_path / "x.tok", [])
    file = TokenFile.open(tmp_path / "x.tok")
    file.verify()
    assert file.tokens.tolist() == []
    assert len(Blocks([file], 4)) == 0


@pytest.mark.parametrize("at", [0, 12, 80, HEADER_BYTES - 1, HEADER_BYTES, -1])
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, at: int) -> None:
    path = tmp_path / "x.tok"
    write(path, np.arange(100))
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    with pytest.raises(SlopeError, match=r"x\.tok: (not a token file|damaged)"):
        TokenFile.open(path).verify()


def test_a_wrong_length_is_found_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "x.tok"
    write(path, np.arange(100))
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(SlopeError, match=rf"has {len(content)} bytes, but its header says 4296"):
            TokenFile.open(path)
    path.write_bytes(whole[:1000])
    with pytest.raises(SlopeError, match="1000 bytes"):
        TokenFile.open(path)
    with pytest.raises(SlopeError, match="cannot be read"):
        TokenFile.open(tmp_path / "none.tok")


@pytest.mark.parametrize("bad", [[1000], [-1]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, bad: list[int]) -> None:
    with pytest.raises(SlopeError, match="vocabulary"):
        write(tmp_path / "x.tok", bad)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.tok"
    old = write(path, np.arange(100))
    code = f"""
import resource, numpy as np
from pathlib import Path
from slope_cli.data.token_file import write_token_file
from slope_cli.errors import SlopeError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
ids = (np.zeros(1000, np.int64) for _ in range(100))
try:
    write_token_file(Path({str(path)!r}), ids, source="x", split="train", vocab_size=9, separator_id=0, tokenizer="t")
except SlopeError as error:
    print(error)
"""
    env = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "full" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.tok"]
    assert TokenFile.open(path).header == old.header


# -------------------------------------------------------------------------------------------------- data sets


def test_dataset_opens(dataset: Dataset) -> None:
    assert [file.header.source for file in dataset.train] == ["a", "b"]
    assert dataset.val["a"].tokens.tolist() == list(range(7))
    assert (dataset.vocab_size, dataset.separator_id, dataset.tokenizer_name) == (1000, 0, "test")
    assert dataset.train_tokens == 78
    assert open_dataset(dataset.folder, verify=False).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("verify", [True, False])
def test_a_tokenizer_that_was_altered_after_the_preparation_is_found(dataset: Dataset, verify: bool) -> None:
    """However much of the text is checked: a run would go on with other special ids, say."""
    added = dataset.folder / "tokenizer/special_tokens_map.json"
    (dataset.folder / "tokenizer/.nfs01").touch()  # a network file system's own
    added.write_text('{"mask_token": "a"}')
    with pytest.raises(SlopeError, match=r"special_tokens_map\.json: is not of this data set, .*; remove it$"):
        open_dataset(dataset.folder, verify)
    added.unlink()
    open_dataset(dataset.folder, verify)
    (dataset.folder / "tokenizer/tokenizer.json").write_text("{ }")
    with pytest.raises(SlopeError, match=r"tokenizer\.json: damaged, its checksum is not that in dataset\.json$"):
        open_dataset(dataset.folder, verify)


def test_a_flipped_bit_in_any_file_of_a_dataset_is_found(dataset: Dataset) -> None:
    for path in [path for path in dataset.folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for at in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(SlopeError, match=path.name) as caught:
                open_dataset(dataset.folder)
            assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    open_dataset(dataset.folder)


def test_a_valid_file_that_is_another_one_is_found(dataset: Dataset) -> None:
    write(dataset.folder / "train/a.tok", np.arange(2, 51))
    with pytest.raises(SlopeError, match=r"not the file that dataset\.json lists"):
        open_dataset(dataset.folder, verify=False)


def test_folders_that_are_no_finished_dataset(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such data folder"):
        open_dataset(tmp_path / "none")
    (dataset.folder / "dataset.json").unlink()
    with pytest.raises(UsageError, match="slope data prepare"):
        open_dataset(dataset.folder)
    (dataset.folder / ".parts").mkdir()
    with pytest.raises(SlopeError, match="run the same `slope data prepare` again"):
        open_dataset(dataset.folder)


def test_check_model(dataset: Dataset) -> None:
    dataset.check_model(vocab_size=80, seq_len=77)
    with pytest.raises(UsageError, match=r"token id 79 is above .* of 79; .*model\.overrides\.vocab_size=1000"):
        dataset.check_model(vocab_size=79, seq_len=8)
    with pytest.raises(UsageError, match=r"78 training tokens are fewer.*lower train\.seq_len"):
        dataset.check_model(vocab_size=80, seq_len=78)


def forged(path: Path, **fields: object) -> None:
    """Change fields of a token file's header, and seal it again, as anyone can."""
    content = path.read_bytes()
    start = len(b"SLOPETOK1\n") + 65
    header = json.dumps(json.loads(content[start:HEADER_BYTES]) | fields).encode().ljust(HEADER_BYTES - start)
    digest = hashlib.sha256(header).hexdigest().encode() + b"\n"
    path.write_bytes(b"SLOPETOK1\n" + digest + header + content[HEADER_BYTES:])


def test_ids_above_a_forged_header_never_reach_a_model(tmp_path: Path) -> None:
    """On a GPU they are a device assert, which ends the process."""
    path = tmp_path / "train/x.tok"
    write(path, np.arange(200))
    forged(path, max_id=99, vocab_size=100)
    file = TokenFile.open(path)
    blocks = Blocks([file], seq_len=10)
    assert blocks[8].max() == 90
    validation = partial(val_batches, file, seq_len=10, tokens=200, micro_batch=4)
    loss = partial(bigram_loss, [file], [file], 100)
    for use in (file.verify, lambda: blocks[9], loss, lambda: list(validation())):
        with pytest.raises(SlopeError, match=r"x\.tok: contains the token id 1\d\d, but its header says at most 99"):
            use()


@pytest.mark.parametrize(
    "fields",
    [
        {"max_id": 1000}, {"separator_id": 1000}, {"tokens": -1}, {"tokens": 1.5}, {"tokens": "9"}, {"tokens": True},
        {"dtype": "|O"}, {"dtype": ">u2"}, {"dtype": 2}, {"split": "../x"}, {"source": None}, {"vocab_size": []},
        {"max_id": None}, {"other": 1},
    ],
)  # fmt: skip
def test_a_forged_header_is_one_line_that_names_the_file(tmp_path: Path, fields: dict[str, object]) -> None:
    write(tmp_path / "x.tok", np.arange(200))
    forged(tmp_path / "x.tok", **fields)
    with pytest.raises(SlopeError, match=r"x\.tok: (not the header|its header contradicts itself)") as caught:
        TokenFile.open(tmp_path / "x.tok")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["absolute", "upwards", "link", "folder link", "tokenizer"])
def test_a_manifest_reaches_no_file_outside_its_folder(dataset: Dataset, way: str) -> None:
    outside = dataset.folder.with_name(f"{dataset.folder.name}-outside")
    (dataset.folder / "train").rename(outside)
    (dataset.folder / "train").mkdir()
    manifest = read_sealed(dataset.folder / "dataset.json")
    if way == "link":
        for file in outside.iterdir():
            (dataset.folder / "train" / file.name).symlink_to(file)
    elif way == "folder link":
        (dataset.folder / "train").rmdir()
        (dataset.folder / "train").symlink_to(outside)
    else:
        (outside / "a.tok").rename(dataset.folder / "train/a.tok")
        (outside / "b.tok").rename(dataset.folder / "train/b.tok")
        if way == "tokenizer":
            manifest["tokenizer_files"] = {f"../../{outside.name}/x": "0"}
        else:
            name = str(outside / "a.tok") if way == "absolute" else f"train/../../{outside.name}/a.tok"
            (dataset.folder / "train/a.tok").rename(outside / "a.tok")
            manifest["files"][0]["path"] = name
    write_sealed(dataset.folder / "dataset.json", manifest)
    for verify in (True, False):
        with pytest.raises(SlopeError, match=r"dataset\.json: lists .*, which is outside the data set"):
            open_dataset(dataset.folder, verify=verify)


def test_a_sealed_manifest_of_another_kind_is_one_line(dataset: Dataset) -> None:
    manifest = read_sealed(dataset.folder / "dataset.json")
    others = [{}, {"files": []}, manifest | {"files": [3]}, manifest | {"files": [{"path": "a\0b"}]}]
    for other in (*others, manifest | {"tokenizer_files": []}, manifest | {"vocab_size": "x"}, manifest | {"plan": 1}):
        write_sealed(dataset.folder / "dataset.json", other)
        with pytest.raises(SlopeError, match=r"dataset\.json: not the manifest of a data set"):
            open_dataset(dataset.folder)


def test_more_sources_than_files_that_a_process_may_open(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{number}.tok", np.arange(20)) for number in range(200)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, limits[1]))
    try:
        blocks = Blocks(files, seq_len=10)
        assert sum(int(blocks[index][:-1].sum()) for index in range(len(blocks))) == 200 * 190 - 19 - sum(range(10, 19))
        bigram_loss(files, files, 1000)
        gc.disable()
        for file in files:  # a validation
            assert list(val_batches(file, seq_len=10, tokens=10, micro_batch=1))
    finally:
        gc.enable()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# --------------------------------------------------------------------------------------------------- the order


# ------------------------------------------------------------------------------- files that change while they are used


def cut_off(path: Path) -> None:
    os.truncate(path, HEADER_BYTES + 1000)


def rewritten(path: Path) -> None:
    """As `cp` does over an existing file: the same inode, shorter for a moment."""
    path.write_bytes(path.read_bytes()[:HEADER_BYTES])


@pytest.mark.parametrize("change", [cut_off, rewritten])
@pytest.mark.parametrize("use", ["blocks", "batches", "val", "bigram", "verify", "all"])
def test_a_file_that_is_cut_off_while_it_is_used_is_a_line_that_names_it(
    tmp_path: Path, change: Callable[[Path], None], use: str
) -> None:
    """Not SIGBUS, which ends the process, as a file that is mapped into memory has it; and no shorter text either."""
    file = write(tmp_path / "a.tok", np.arange(40_000) % 500)
    blocks = Blocks([file], seq_len=8)
    assert blocks[len(blocks) - 1].tolist() == [n % 500 for n in range(39_991 // 8 * 8, 39_991 // 8 * 8 + 9)]
    pieces = val_batches(file, seq_len=8, tokens=40_000, micro_batch=4)
    next(pieces)
    change(file.path)
    uses: dict[str, Callable[[], object]] = {
        "blocks": lambda: blocks[len(blocks) - 1],
        "batches": lambda: causal_batch(blocks, [3, len(blocks) - 1]),
        "val": lambda: list(pieces),
        "bigram": lambda: bigram_loss([file], [file], 1000),
        "verify": file.verify,
        "all": lambda: file.tokens,
    }
    with pytest.raises(SlopeError, match=rf"^{re.escape(str(file.path))}: was cut off while it was used, to \d+ bytes"):
        uses[use]()


def test_a_file_that_is_replaced_is_read_to_its_end_or_refused(tmp_path: Path) -> None:
    """By a rename: whoever holds the old file open reads on; whoever opens it anew must not read another text."""
    file = write(tmp_path / "a.tok", np.arange(1, 100))
    held = TokenReader(file)
    other = write(tmp_path / "other/a.tok", np.arange(101, 200))
    os.replace(other.path, file.path)
    assert held.read(0, 99).tolist() == list(range(1, 100))
    for use in (lambda: TokenReader(file), lambda: Blocks([file], 8)[0], file.verify):
        with pytest.raises(SlopeError, match=r"a\.tok: was replaced while it was used"):
            use()
    file.path.unlink()
    with pytest.raises(SlopeError, match=r"a\.tok: cannot be read: No such file.*put it back"):
        Blocks([file], 8)[0]


# ------------------------------------------------------------------------------------------ verified once, by all ranks


def settled(dataset: Dataset) -> Dataset:
    """The data set as it is when its files are a while old."""
    ago = 1_000_000_000_000_000_123
    for file in (*dataset.train, *dataset.val.values()):
        os.utime(file.path, ns=(ago, ago))
    time.sleep(2.1)  # the time of the last change of a file's times cannot be set
    return open_dataset(dataset.folder, verify=False)


@pytest.mark.parametrize("world", [1, 2, 3, 64])
def test_ranks_share_the_verification(dataset: Dataset, world: int) -> None:
    shares = [open_dataset(dataset.folder, share=(rank, world)) for rank in range(world)]
    names = [name for share in shares for name in share.verified]
    assert sorted(names) == ["train/a.tok", "train/b.tok", "val/a.tok"]
    assert max(len(share.verified) for share in shares) == -(-3 // min(world, 3))
    assert all(share == dataset for share in shares)
    for path in sorted(dataset.folder.glob("*/*.tok")):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        errors = []
        for rank in range(world):
            try:
                open_dataset(dataset.folder, share=(rank, world))
            except SlopeError as error:
                errors.append(str(error))
        assert [str(path) in error for error in errors] == [True]
        path.write_bytes(good)


def test_the_largest_files_are_shared_first(tmp_path: Path) -> None:
    sizes = {"a": 30, "b": 2000, "c": 900, "d": 1000, "e": 40}
    files = [write(tmp_path / f"train/{name}.tok", np.ones(size)) for name, size in sizes.items()]
    (tmp_path / "tokenizer").mkdir()
    write_manifest(tmp_path, files, {"inputs": []})
    shares = [{Path(name).stem for name in open_dataset(tmp_path, share=(rank, 2)).verified} for rank in range(2)]
    assert ({"b"} <= shares[0], {"c", "d"} <= shares[1]) == (True, True)


def test_what_was_verified_is_not_read_again_unless_it_changed(dataset: Dataset, tmp_path: Path) -> None:
    """The change is one that its checksum finds, so that no error means: not read."""
    memory = tmp_path / VERIFIED
    settled(dataset)
    remember_verified(memory, [open_dataset(dataset.folder, share=(rank, 2)).verified for rank in range(2)])
    known = verified_before(memory)
    assert known.keys() == {"train/a.tok", "train/b.tok", "val/a.tok"}
    assert open_dataset(dataset.folder, known=known).verified == known
    path = dataset.folder / "train/b.tok"
    before, good = path.stat(), path.read_bytes()
    with open(path, "r+b") as file:  # in place, and with the old time: only the inode's own time tells
        file.seek(-1, os.SEEK_END)
        file.write(bytes([good[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    forged = known | {"train/b.tok": TokenFile.open(path).identity}
    open_dataset(dataset.folder, known=forged)  # not read
    with pytest.raises(SlopeError, match=r"train/b\.tok: damaged"):
        open_dataset(dataset.folder, known=known)
    with pytest.raises(SlopeError, match=r"train/b\.tok: damaged"):
        open_dataset(dataset.folder)
    open_dataset(dataset.folder, verify=False)
    copy = path.with_name("copy")
    copy.write_bytes(good)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(copy, path)  # the same text in another inode: hashed again, and sound
    assert open_dataset(dataset.folder, known=known).verified["train/b.tok"].inode != known["train/b.tok"].inode


def test_a_memory_that_cannot_be_read_means_that_all_is_verified(dataset: Dataset, tmp_path: Path) -> None:
    memory = tmp_path / VERIFIED
    assert verified_before(memory) == {}
    remember_verified(memory, [dataset.verified])
    assert not memory.exists()  # the files are younger than the clock's ticks can tell apart
    remember_verified(memory, [open_dataset(settled(dataset).folder).verified])
    written = memory.read_bytes()
    remember_verified(memory, [open_dataset(dataset.folder, verify=False).verified])  # which verified nothing
    assert memory.read_bytes() == written
    memory.write_bytes(written.replace(b"train/a", b"train/A"))
    assert verified_before(memory) == {}
    for content in ({}, {"files": {"train/a.tok": 3}}, {"files": [1]}, {"files": {"train/a.tok": [1]}}):
        write_sealed(memory, content)
        assert verified_before(memory) == {}


def test_a_stop_ends_the_verification(dataset: Dataset) -> None:
    def check() -> None:
        raise Stopped("stopped")

    with pytest.raises(Stopped):
        open_dataset(dataset.folder, check=check)


# ---------------------------------------------------------------------------------------------------- blocks


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks")


NUMBER = count()


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5), seq_len=st.integers(1, 12))
def test_blocks_are_windows_of_the_joined_files(scratch: Path, sizes: list[int], seq_len: int) -> None:
    stream, files = np.arange(sum(sizes)), []
    for part in np.split(stream, np.cumsum(sizes)[:-1]):
        files.append(write(scratch / f"{next(NUMBER)}.tok", part))
    blocks = Blocks(files, seq_len)
    assert len(blocks) == max(len(stream) - 1, 0) // seq_len
    for index in range(len(blocks)):
        assert blocks[index].dtype == np.int64
        assert blocks[index].tolist() == list(range(index * seq_len, (index + 1) * seq_len + 1))
    for outside in (-1, len(blocks)):
        with pytest.raises(IndexError):
            blocks[outside]


@given(length=st.integers(1, 700), key=st.tuples(st.integers(0, 1 << 40), st.integers(0, 99)))
def test_shuffled_is_a_bijection(length: int, key: tuple[int, int]) -> None:
    places = shuffled(np.arange(length), length, key)
    assert sorted(places.tolist()) == list(range(length))
    assert shuffled(np.array([length - 1]), length, key) == places[-1:]


def test_shuffled_at_great_length_and_out_of_range() -> None:
    length = 10**15 + 7
    index = np.arange(1000, dtype=np.int64) * 10**12
    places = shuffled(index, length, (1, 2))
    assert len(set(places.tolist())) == 1000
    assert places.max() < length
    assert abs(places.mean() / length - 0.5) < 0.05
    for bad in (-1, length):
        with pytest.raises(ValueError, match="outside"):
            shuffled(np.array([bad]), length, (1, 2))


def test_shuffled_looks_random_and_is_pinned() -> None:
    places = shuffled(np.arange(4096), 4096, (0, 0))
    assert abs(np.corrcoef(np.arange(4096), places)[0, 1]) < 0.05
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert np.count_nonzero(shuffled(np.arange(4096), 4096, (0, 1)) == places) < 12
    assert abs(np.count_nonzero(places == np.arange(4096)) - 1) < 8
    # A run must resume with the order it began with, so this order is part of the format.
    assert shuffled(np.arange(4), 1000, (1234, 0)).tolist() == PINNED


PINNED = [716, 366, 819, 647]


@pytest.mark.slow
@settings(deadline=None)
@given(
    world=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 3]),
    micro_batch=st.integers(1, 3),
    length=st.integers(1, 60),
    seed=st.integers(0, 5),
)
def test_a_step_has_the_same_samples_for_any_world(
    world: int, accumulation: int, micro_batch: int, length: int, seed: int
) -> None:
    def step_samples(step: int, world: int, accumulation: int, micro_batch: int) -> list[int]:
        shape = {"world": world, "accumulation": accumulation, "micro_batch": micro_batch}
        return [
            int(index)
            for micro in range(accumulation)
            for rank in range(world)
            for index in sample_indices(step, micro, rank, **shape, seed=seed, length=length)
        ]

    per_step = world * accumulation * micro_batch
    seen: list[int] = []
    for step in range(3 * length // per_step + 1):
        samples = step_samples(step, world, accumulation, micro_batch)
        assert sorted(samples) == sorted(step_samples(step, 1, per_step, 1))
        assert sorted(samples) == sorted(step_samples(step, per_step, 1, 1))
        seen += samples
    for epoch in range(len(seen) // length):
        assert sorted(seen[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_sample_numbers_count_up() -> None:
    shape = {"world": 2, "micro_batch": 3, "accumulation": 2}
    numbers = [
        sample_numbers(step, micro, rank, **shape) for step in range(2) for micro in range(2) for rank in range(2)
    ]
    assert np.concatenate(numbers).tolist() == list(range(24))
    with pytest.raises(UsageError, match=r"shorter than one sequence: lower train\.seq_len"):
        sample_indices(0, 0, 0, **shape, seed=0, length=0)


# ----------------------------------------------------------------------------------------------------- batches


def test_causal_batch_is_shifted(tmp_path: Path) -> None:
    blocks = Blocks([write(tmp_path / "x.tok", np.arange(100))], 8)
    batch = causal_batch(blocks, np.array([3, 0]))
    assert batch["input_ids"].tolist() == [list(range(24, 32)), list(range(8))]
    assert np.array_equal(batch["labels"], batch["input_ids"] + 1)


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    ids = np.random.default_rng(0).integers(5, 100, 20_000)
    ids[::97] = SPECIAL.sep
    return Blocks([write(tmp_path / "x.tok", ids, vocab_size=100)], 64)


def test_masked_batch_layout(blocks: Blocks) -> None:
    indices = np.arange(len(blocks))
    batch = masked_batch(blocks, indices, special=SPECIAL, seed=1, sample_numbers=indices)
    ids, labels, types = batch["input_ids"], batch["labels"], batch["token_type_ids"]
    assert {name: value.dtype.name for name, value in batch.items()} == dict.fromkeys(batch, "int64")
    assert ids.shape == labels.shape == types.shape == (len(blocks), 64)
    assert (ids[:, 0] == SPECIAL.cls).all()
    assert (ids[:, -1] == SPECIAL.sep).all()
    first_of_b = types.argmax(axis=1)
    assert (ids[indices, first_of_b - 1] == SPECIAL.sep).all()
    assert (np.diff(types, axis=1) >= 0).all()
    assert (first_of_b >= 3).all()
    assert (first_of_b <= 62).all()
    assert 0.4 < batch["next_sentence_label"].mean() < 0.6


def test_masked_batch_predicts_what_it_says(blocks: Blocks) -> None:
    indices = np.arange(len(blocks))
    batch = masked_batch(blocks, indices, special=SPECIAL, seed=1, sample_numbers=indices)
    chosen = batch["labels"] != -100
    ids, labels = batch["input_ids"][chosen], batch["labels"][chosen]
    candidates = (~np.isin(np.where(chosen, batch["labels"], batch["input_ids"]), SPECIAL.never_mask)).sum(axis=1)
    assert chosen.sum(axis=1).tolist() == [max(1, round(0.15 * int(number))) for number in candidates]
    assert not np.isin(labels, SPECIAL.never_mask).any()
    assert 0.77 < (ids == SPECIAL.mask).mean() < 0.83
    assert 0.08 < (ids == labels).mean() < 0.13
    assert not np.isin(ids[ids != SPECIAL.mask], SPECIAL.never_mask).any()


def test_masked_batch_predicts_and_draws_every_token_but_the_special_ones(tmp_path: Path) -> None:
    """In a text that contains the special ones, too."""
    blocks = Blocks([write(tmp_path / "x.tok", np.random.default_rng(0).integers(0, 10, 90_000))], 64)
    indices, special = np.arange(len(blocks)), replace(SPECIAL, vocab_size=10)
    batch = masked_batch(blocks, indices, special=special, seed=1, sample_numbers=indices)
    ids, labels = batch["input_ids"], batch["labels"]
    drawn = (labels != -100) & (ids != special.mask) & (ids != labels)
    assert 0.79 < (ids[labels != -100] == special.mask).mean() < 0.81
    assert set(labels[labels != -100].tolist()) == set(ids[drawn].tolist()) == {5, 6, 7, 8, 9}


def test_masked_segments_come_from_the_text(blocks: Blocks) -> None:
    indices = np.arange(40)
    batch = masked_batch(blocks, indices, special=SPECIAL, seed=2, sample_numbers=indices)
    whole = np.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])
    for row, index in enumerate(indices):
        split = int(batch["token_type_ids"][row].argmax())
        first, second = whole[row, 1 : split - 1].tolist(), whole[row, split:-1].tolist()
        text = blocks[int(index)].tolist()
        spans = [text[at : at + len(first) + len(second)] for at in range(5)]
        assert first in [span[: len(first)] for span in spans]
        assert ((first + second) in spans) == (batch["next_sentence_label"][row] == 0)


def test_masked_sample_depends_on_its_number_only(blocks: Blocks) -> None:
    together = masked_batch(blocks, [3, 4], special=SPECIAL, seed=1, sample_numbers=[10, 11])
    alone = masked_batch(blocks, [4], special=SPECIAL, seed=1, sample_numbers=[11])
    other = masked_batch(blocks, [4], special=SPECIAL, seed=1, sample_numbers=[12])
    for name in together:
        assert np.array_equal(together[name][1:], alone[name])
    assert not np.array_equal(alone["input_ids"], other["input_ids"])


def test_masked_batch_of_one_block_and_too_short(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tok", np.full(9, 50), vocab_size=100)
    numbers = range(20)
    batch = masked_batch(Blocks([file], 8), [0] * 20, special=SPECIAL, seed=1, sample_numbers=numbers)
    assert batch["next_sentence_label"].tolist() == [0] * 20
    with pytest.raises(UsageError, match=r"train\.seq_len 4 is too short"):
        masked_batch(Blocks([file], 4), [0], special=SPECIAL, seed=1, sample_numbers=[0])
    ends = write(tmp_path / "y.tok", np.full(9, SPECIAL.sep), vocab_size=100)
    assert (masked_batch(Blocks([ends], 8), [0], special=SPECIAL, seed=1, sample_numbers=[0])["labels"] == -100).all()


def test_batches_are_made_ahead_of_their_step() -> None:
    made, ahead_of_time = [], threading.Event()

    def make(step: int) -> list[Batch]:
        if step == 7:
            raise SlopeError("a damaged file")
        made.append(step)
        if step == 4:
            ahead_of_time.set()
        return [{"input_ids": np.array([[step]])}]

    prefetched = Prefetcher(make, 8)
    assert prefetched(3)[0]["input_ids"] == 3
    assert ahead_of_time.wait(10)  # nobody has asked for step 4
    assert [int(prefetched(step)[0]["input_ids"][0, 0]) for step in (4, 5, 0, 1, 5, 6)] == [4, 5, 0, 1, 5, 6]
    assert made.count(4) == 1
    with pytest.raises(SlopeError, match="damaged"):
        prefetched(7)
    prefetched.close()
    assert max(made) == 6


def test_val_batches_are_evenly_spaced_and_the_same_each_time(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tok", np.arange(1000))
    batches = list(val_batches(file, seq_len=10, tokens=50, micro_batch=2))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert np.concatenate([batch["input_ids"] for batch in batches])[:, 0].tolist() == [0, 190, 390, 590, 790]
    assert sum(len(batch["input_ids"]) for batch in val_batches(file, seq_len=10, tokens=10**9, micro_batch=7)) == 99
    masked = [list(val_batches(file, seq_len=10, tokens=50, micro_batch=2, masking=SPECIAL)) for _ in range(2)]
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(*masked, strict=True))


def test_val_batches_of_a_short_file(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tok", np.arange(5, 12))
    assert [batch["labels"].tolist() for batch in val_batches(file, seq_len=64, tokens=1, micro_batch=4)] == [
        [[6, 7, 8, 9, 10, 11]]
    ]
    for ids in ([], [1]):
        assert list(val_batches(write(tmp_path / "y.tok", ids), seq_len=8, tokens=99, micro_batch=1)) == []
    short = write(tmp_path / "z.tok", np.arange(5))
    assert list(val_batches(short, seq_len=8, tokens=99, micro_batch=1, masking=SPECIAL)) == []


def test_bigram_loss(tmp_path: Path) -> None:
    train = write(tmp_path / "t.tok", [0, 1, 0, 1, 0], vocab_size=2)
    val = write(tmp_path / "v.tok", [0, 1, 1], vocab_size=2)
    expected = -(math.log(2.1 / 2.2) + math.log(0.1 / 2.2)) / 2
    assert bigram_loss([train], [val], 2) == pytest.approx(expected)
    with pytest.raises(UsageError, match=r"no validation text.*--val-fraction"):
        bigram_loss([train], [], 2)


def test_show_prints_each_source_and_the_sums(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    show(dataset)
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith(f"tokenizer test, 1,000 ids, fingerprint {dataset.fingerprint[:16]}; ") for line in lines
    )
    assert [line.split(" | ")[1:] for line in lines if line.startswith(("| a", "| b", "| all"))] == [
        ["0", "49", "0", "7", "0", "12.5% |"],
        ["0", "29", "0", "0", "0", "0.0% |"],
        ["0", "78", "0", "7", "0", "8.2% |"],
    ]


def test_manifest_is_json_with_its_checksum(dataset: Dataset) -> None:
    manifest = json.loads((dataset.folder / "dataset.json").read_text())
    assert len(manifest["sha256"]) == 64
    assert [entry["path"] for entry in manifest["content"]["files"]] == ["train/a.tok", "train/b.tok", "val/a.tok"]
