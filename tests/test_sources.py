"""What is taken for text: formats by their names, folders with links and what is left out of them, hostile files."""

import bz2
import gzip
import json
import lzma
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from support.marks import slow

import slope_cli
from slope_cli.data.dataset import Dataset
from slope_cli.data.prepare import prepare
from slope_cli.data.sources import find_inputs
from slope_cli.errors import SlopeError, UsageError

ROOT = str(Path(slope_cli.__file__).parents[1])
TEXTS = ["Hello, world", 'a "quoted" word', "two\nlines", "three 三"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
ROWS = {".jsonl": b'{"text": "', ".json": b'[{"text": "', ".csv": b'text\n"'}
"""The beginning of a file whose first text does not end."""


def lines(texts: list[str] = TEXTS) -> bytes:
    return "".join(json.dumps({"text": text, "url": "http://x"}) + "\n" for text in texts).encode()


def table(delimiter: str) -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    return "".join(f"{delimiter.join((text, '1'))}\r\n" for text in ["text", *quoted]).encode().replace(b"1", b"id", 1)


def made(*inputs: Path | str, out: Path, encoding: str = "utf-8") -> Dataset:
    items = [str(item) for item in inputs]
    return prepare(items, out, encoding=encoding, val_fraction=0, workers=1, progress=False)


def documents(dataset: Dataset) -> list[str]:
    """Of all sources, from bytes."""
    text = b"".join(bytes(np.where(file.tokens == 256, 0, file.tokens).astype(np.uint8)) for file in dataset.train)
    return text.decode().split("\0")[:-1]


def left_out(folder: Path) -> tuple[set[str], str]:
    """The names of the files that are taken, and the lines on the others."""
    said: list[str] = []
    taken = {os.path.relpath(item.name, folder) for item in find_inputs([str(folder)], say=said.append)}  # type: ignore[union-attr]
    return taken, "\n".join(said)


# ------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", lines()),
        ("a.JSONL", lines()),
        ("a.jsonlines", lines()),
        ("a.Json", lines()),
        ("a.jsonl.GZ", gzip.compress(lines())),
        ("a.jsonl.zstd", zstandard.compress(lines())),
        ("a.jsonl-00000-of-00002", lines()),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("a.json.bz2", bz2.compress(b"\xef\xbb\xbf" + json.dumps([{"text": text} for text in TEXTS]).encode())),
        ("a.csv", table(",")),
        ("a.CSV.xz", lzma.compress(b"\xef\xbb\xbf" + table(","))),
        ("a.tsv", table("\t")),
        ("a.tab", table("\t")),
    ],
)
def test_synonyms_and_upper_case_endings_are_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    dataset = made(tmp_path / name, out=tmp_path / "out")
    assert documents(dataset) == TEXTS
    assert dataset.train[0].header.source == "a"


@pytest.mark.parametrize("encoding", ["Latin1", *map(slow, ("UTF-16", "utf-16-le"))])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.csv.gz"])
def test_text_of_another_encoding(tmp_path: Path, name: str, encoding: str) -> None:
    texts = ["café au lait, ½ l", "à la carte"] * 9_000
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    text = {
        ".txt": "\n".join(texts),
        ".jsonl": "\n".join(rows),
        ".json": f"[{','.join(rows)}]",
        ".csv": "text\n" + "".join(f'"{text}"\n' for text in texts),
    }["." + name.split(".")[1]]
    content = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    dataset = made(tmp_path / name, out=tmp_path / "out", encoding=encoding)
    assert documents(dataset) == (["\n".join(texts)] if name == "a.txt" else texts)
    (listed,) = dataset.made_from["inputs"]
    assert listed["encoding"] == {"Latin1": "iso8859-1", "UTF-16": "utf-16", "utf-16-le": "utf-16-le"}[encoding]
    with pytest.raises(UsageError, match="made with other inputs"):
        made(tmp_path / name, out=tmp_path / "out", encoding="cp1252")


def test_an_encoding_that_is_wrong_or_not_known(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("prix réduit".encode("latin-1"))
    for encoding, message in (
        ("utf-8", "a.txt: not UTF-8 text .*give its --encoding"),
        ("ascii", "a.txt: not ascii text .*correct --encoding"),
        ("martian", "--encoding martian: is not known"),
        ("base64", "--encoding base64: is not known"),
    ):
        with pytest.raises(UsageError, match=message):
            made(tmp_path / "a.txt", out=tmp_path / "out", encoding=encoding)


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_the_name_given_decides_not_the_target_of_a_link(tmp_path: Path, packing: str) -> None:
    """As the caches of huggingface_hub and DVC, whose targets are hashes without an ending."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/9f86d081").write_bytes(gzip.compress(lines()) if packing else lines())
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / f"snapshot/train.jsonl{packing}"
    link.symlink_to("../blobs/9f86d081")
    assert documents(made(link, out=tmp_path / "file")) == TEXTS
    assert documents(made(tmp_path / "snapshot", out=tmp_path / "folder")) == TEXTS
    assert documents(made(f"x={tmp_path}/snapshot", out=tmp_path / "named")) == TEXTS


def test_a_file_that_was_read_as_prose_is_another_input(tmp_path: Path) -> None:
    """A data set of an earlier version is not taken for the same one; a file that is read as ever stays the same."""
    for name in ("a.csv", "b.ndjson", "c.jsonl"):
        (tmp_path / name).write_bytes(table(",") if name == "a.csv" else lines())
    (tmp_path / "d.jsonl").symlink_to(tmp_path / "b.ndjson")
    formats = [item.identity().get("format") for item in find_inputs([str(tmp_path)])]
    assert formats == [".csv", ".jsonl", None]


@pytest.mark.parametrize("name", ["a.xml", "a.HTML", "a.arrow", "a.zip", "a.jsonl.lz4", "a.jsonl.part", "a.yaml.gz"])
def test_a_structured_ending_that_is_not_known_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(UsageError, match=r"\.\w+ files are not read; convert it, or name it \.txt"):
        find_inputs([str(tmp_path / name)])
    (tmp_path / "b.txt").write_text("text")
    taken, said = left_out(tmp_path)
    assert taken == {"b.txt"}
    assert name in said


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("blob", lines(), "begins as JSON does"),
        ("a.dump", b' [\n {"text": 1}]', "begins as JSON does"),
        ("a.gz", gzip.compress(lines()), "begins as JSON does"),
        ("model", b"\x80\x02\0", "UTF-8|binary"),
        ("a.jpg", b"\xff\xd8\xff", "not UTF-8"),
    ],
)
def test_an_ending_that_says_nothing_is_not_believed_against_the_content(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        find_inputs([str(tmp_path / name)])
    (tmp_path / name).rename(tmp_path / "code.py")
    (tmp_path / "code.py").write_text('table = {"text": 1}')
    assert left_out(tmp_path) == ({"code.py"}, "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"text": "a"}, {"text": ', r"x\.json: record 2: not JSON"),
        ("x.json", b'[{"text": "a"}', r"x\.json: truncated, its JSON list does not end"),
        ("x.json", b'[{"text": "a"}] [', r"x\.json: has more text after its JSON list"),
        ("x.json", b'[{"body": "a"}]', r"x\.json: record 1: no key 'text': known are body"),
        ("x.json", b'{"data": [\n1]}', r"x\.json:1: not a JSON line .* or a list of objects"),
        ("x.csv", b"body,n\na,1\n", r"x\.csv: no column 'text': known are body, n; .* --text-key"),
        ("x.csv", b"text,n\na,1,2\n", r"x\.csv:2: has 3 columns, but the header 2"),
        ("x.csv", b"text\n\xff\n", r"x\.csv:2: not UTF-8"),
        ("x.csv", b'text\n"a\nb\n', r"x\.csv:3: not a row of a table \(unexpected end of data"),
        ("x.csv.gz", gzip.compress(table(","), mtime=0)[:-20], r"x\.csv\.gz: truncated"),
        ("x.tsv.bz2", table("\t"), r"x\.tsv\.bz2: damaged \.bz2 data"),
        ("x.txt.bz2", bz2.compress(lines())[:-5], r"x\.txt\.bz2: truncated"),
    ],
)
def test_bad_rows_are_one_line_that_names_the_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        made(tmp_path / name, out=tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_records_of_a_list_may_be_longer_than_a_read(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "", "y", "\ud800", "z" * 1_500_000]
    (tmp_path / "x.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert [len(text) for text in documents(made(tmp_path / "x.json", out=tmp_path / "out"))] == [
        3000000,
        1,
        1,
        1500000,
    ]


# ------------------------------------------------------------------------------------------------------- folders


def test_linked_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "real/sub").mkdir(parents=True)
    (tmp_path / "real/sub/a.txt").write_text("a")
    corpus = tmp_path / "corpus"
    (corpus / "inner").mkdir(parents=True)
    (corpus / "inner/b.txt").write_text("b")
    (corpus / "also.txt").symlink_to("inner/b.txt")
    (corpus / "again").symlink_to("inner")
    (corpus / "inner/loop").symlink_to("..")
    (corpus / "gone").symlink_to("nowhere")
    (corpus / "self").symlink_to("self")
    (corpus / "linked").symlink_to("../real/sub")
    taken, said = left_out(corpus)
    assert taken == {"linked/a.txt", "also.txt"} or taken == {"linked/a.txt", "inner/b.txt"}
    assert "gone, self (a link to nothing)" in said
    assert "taken under another name" in said
    assert said.startswith(f"warning: left out of {corpus}: ")


def test_what_is_no_training_text_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """Cards, licences, metadata, validation and test text, markers and empty shards; a file that is named is taken."""
    reasons = {
        "hidden": [".gitattributes"],
        "a data set card or licence": ["LICENSE", "README.md", "licence-CC.txt"],
        "metadata": ["SHA256SUMS", "_SUCCESS", "dataset_infos.json"],
        "validation or test text": ["Test.csv", "c4-validation.00003-of-00008.json.gz", "dev/"],
        "empty": ["part-1.jsonl"],
    }
    taken = {"train-0.jsonl", "latest.jsonl", "contest.jsonl", "train/x.jsonl"}
    (tmp_path / "dev").mkdir()
    (tmp_path / "train").mkdir()
    for name in (*taken, "dev/x.jsonl", *(name for names in reasons.values() for name in names if name[-1] != "/")):
        (tmp_path / name).write_bytes(b"" if name == "part-1.jsonl" else lines([name]))
    found, said = left_out(tmp_path)
    assert found == taken
    for reason, names in reasons.items():
        assert f"{', '.join(names)} ({reason})" in said
    for name in ("wiki.valid", "test-00000-of-00001.parquet", "x_eval.txt", "devset.txt"):
        (tmp_path / name).write_bytes(b"text")
    found, said = left_out(tmp_path)
    assert found == taken
    assert "dev/ and 4 more (validation or test text)" in said
    assert documents(made(f"x={tmp_path}/wiki.valid", tmp_path / "x_eval.txt", out=tmp_path / "out")) == ["text"] * 2


def test_a_folder_of_which_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("card")
    with pytest.raises(UsageError, match=r"contains no text: left out are README\.md \(a data set card.*name a file"):
        find_inputs([str(tmp_path)])
    assert [item.source for item in find_inputs([str(tmp_path / "README.md")])] == ["README"]


def test_shards_without_text_do_not_end_the_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "in"
    folder.mkdir()
    for number, texts in enumerate((["one", "two"], [], ["three"], [])):
        rows = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        pyarrow.parquet.write_table(rows, folder / f"part-{number}.parquet")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "header.csv").write_text("text\n")
    (folder / "README.md").write_text("card")
    dataset = prepare([str(folder)], tmp_path / "out", val_fraction=0, workers=1)
    assert documents(dataset) == ["one", "two", "three"]
    said = capfd.readouterr().err
    assert "README.md (a data set card or licence)" in said
    assert f"warning: left out: {folder}/blank.jsonl, {folder}/header.csv, {folder}/part-1.parquet and 1 more" in said
    assert said.splitlines()[-1].startswith("prepared: ")


def test_very_many_files_make_a_small_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(1200):
        (folder / f"{number}.txt").write_text(f"text {number}")
    dataset = made(folder, out=tmp_path / "out")
    assert dataset.train[0].header.documents == 1200
    assert (tmp_path / "out/dataset.json").stat().st_size < 2000
    assert made(folder, out=tmp_path / "out").fingerprint == dataset.fingerprint
    (folder / "7.txt").write_text("other")
    with pytest.raises(UsageError, match="made with other inputs"):
        made(folder, out=tmp_path / "out")


# ------------------------------------------------------------------------------------------- hostile and broken files


def limited(code: str, *arguments: object, gib: float) -> str:
    """What a process with so much memory says."""
    limit = int(gib * (1 << 30))
    code = "import sys, resource\nfrom slope_cli.errors import SlopeError\n" + code
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": ROOT, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


READ = """
from slope_cli.data.sources import find_inputs, read_segments
size = 0
try:
    for item in find_inputs([sys.argv[1]]):
        for segment in read_segments(item, "text", 0):
            size += len(segment.text)
            if size > 1 << 28:
                break
except SlopeError as error:
    print(error)
with open("/proc/self/status") as status:  # ru_maxrss would count what the process that began this one had
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
print(size, int(peak) >> 10)
"""


QUICK = (".txt", ".gz"), (".jsonl", ".zst")
BOMBS = [*((".txt", packing) for packing in COMPRESS), *((rows, ".zst") for rows in ROWS), (".jsonl", ".gz")]


@pytest.mark.parametrize(("ending", "packing"), [pair if pair in QUICK else slow(*pair) for pair in BOMBS])
def test_bombs_take_bounded_memory(tmp_path: Path, ending: str, packing: str) -> None:
    """A small file that holds 1 GiB without a line break: text is streamed, a line without end is refused."""
    compress, start, piece = COMPRESS[packing], ROWS.get(ending, b""), b"a" * (1 << 24)
    if packing == ".zst":  # one frame
        frame = zstandard.ZstdCompressor().compressobj()
        content = b"".join(map(frame.compress, [start, *[piece] * 64])) + frame.flush()
    else:
        content = (compress(start) if start else b"") + compress(piece) * 64
    path = tmp_path / f"bomb{ending}{packing}"
    path.write_bytes(content)
    *errors, sizes = limited(READ, path, gib=1.5).splitlines()
    size, peak_mib = map(int, sizes.split())
    assert peak_mib < 700
    if ending == ".txt":
        assert errors == []
        assert size > 1 << 28
    else:
        assert len(errors) == 1
        assert str(path) in errors[0]
        assert "more than 64 MiB" in errors[0]


def test_too_few_open_files_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    code = """
import os
from pathlib import Path
from slope_cli.data.prepare import prepare
from slope_cli.data.token_file import TokenFile
text, out = sys.argv[1], Path(sys.argv[2])
prepare([text], out, progress=False)
tries = [lambda: TokenFile.open(out / "train/x.tok"), lambda: TokenFile.open(out / "train/x.tok").tokens]
tries += [lambda at=at: prepare([text], Path(f"{out}{at}"), progress=False) for at in range(6)]
for at, attempt in enumerate(tries):
    spare = max(0, at - 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1 + spare, 4096))
    try:
        attempt()
    except SlopeError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
"""
    said = limited(code, tmp_path / "x.txt", tmp_path / "out", gib=4).splitlines()
    assert len(said) >= 4
    assert all(line.startswith(str(tmp_path)) and "Too many open files" in line for line in said)
    assert all("ulimit -n" in line for line in said if "train/x.tok" in line)


def test_a_file_without_rights_is_found_before_the_work(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("the administrator may read everything")
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "x.txt").chmod(0)
    for given in (tmp_path, tmp_path / "x.txt"):
        with pytest.raises(SlopeError, match=r"x\.txt: cannot be read: Permission denied; .*chmod"):
            find_inputs([str(given)])
