"""`slope check` finds what is damaged in a run, names the file, and ends with 1."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.data import prepared
from support.runs import copied, slope, trained

from slope_cli.checkpoint import run_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.checkpoint.verify import check
from sparse_kernels import sparse_layers


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def test_a_sound_run_has_no_fault() -> None:
    result = check(trained())
    assert result["faults"] == []
    assert result["lines"] == [
        "config.yaml: sound",
        "step-00000006: sound",
        "metrics.jsonl: sound",
        "environment.jsonl: sound",
        "starts.jsonl: sound",
        "data: sound",
        "model and tokenizer: sound",
    ]


FILES = [
    "checkpoints/step-00000006/__0_0.distcp",
    "checkpoints/step-00000006/.metadata",
    "checkpoints/step-00000006/manifest.json",
    "tokenizer/tokenizer.json",
    "metrics.jsonl",
    "environment.jsonl",
    "starts.jsonl",
    "config.yaml",
]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    # The first byte of text files: their syntax breaks. Elsewhere one in the middle.
    flip(run / name, 0 if name.endswith((".jsonl", "tokenizer.json", ".yaml")) else None)
    result = slope("check", run)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert result.err.startswith(f"error: {run}: ")
    assert Path(name).name in result.err or Path(name).parent.name in result.err
    assert "FAULT" in result.out
    record = json.loads(slope("check", run, "--json").out)
    assert any(Path(name).name in fault or Path(name).parent.name in fault for fault in record["faults"])


@pytest.mark.parametrize("name", FILES[:3])
def test_a_missing_or_short_file_is_named(name: str, tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    (run / name).write_bytes((run / name).read_bytes()[:-1])
    assert Path(name).name in slope("check", run).err
    (run / name).unlink()
    assert Path(name).name in slope("check", run).err


LOST: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "emptied": (lambda _: [], "no record is left of steps 1-6"),
    "cut": (lambda lines: lines[:3], "no record is left of steps 4-6"),
    "cut in a line": (lambda lines: [*lines[:2], lines[2][:9]], "no record is left of steps 3-6"),
    "a line removed": (lambda lines: lines[:1] + lines[2:], "no record is left of steps 2"),
    "a line doubled": (lambda lines: [lines[0], *lines], "records other than those of steps are changed or lost"),
}


@pytest.mark.parametrize("damage", LOST)
def test_a_log_that_lost_lines_is_named_with_their_steps(damage: str, tmp_path: Path) -> None:
    """Each line that is left is sound; the checkpoint's manifest knows what the log was. No command has a traceback."""
    run = copied(trained(), tmp_path)
    log, (change, lost) = run / "metrics.jsonl", LOST[damage]
    log.write_bytes(b"".join(change(log.read_bytes().splitlines(keepends=True))))
    (fault,) = check(run)["faults"]
    assert fault == f"metrics.jsonl: {log}: is not what it was when step 6 was saved: {lost}"
    resumed = slope("pretrain", run / "config.yaml", "--out", run)
    assert f"warning: {log}: is not what it was when step 6 was saved: {lost}" in resumed.err
    assert resumed.code == (damage == "emptied")
    if damage == "emptied":
        words = f"error: {log}: the records of its steps are lost; the checkpoint is sound"
        assert resumed.err.splitlines()[-1].startswith(words)
    else:  # the last validation is made again where its record is lost
        assert "step 6: validation loss" in resumed.out


@pytest.mark.parametrize("damage", ["emptied", "cut"])
def test_a_log_of_an_earlier_version_that_lost_lines_is_named_too(damage: str, tmp_path: Path) -> None:
    run = copied(Path(__file__).parent / "old_runs" / "sparse", tmp_path)
    log = run / "metrics.jsonl"
    log.write_bytes(b"" if damage == "emptied" else b"".join(log.read_bytes().splitlines(keepends=True)[:2]))
    assert any("no record is left of steps" in fault for fault in check(run)["faults"])


@pytest.mark.slow
def test_each_flipped_bit_of_a_log_is_noticed(tmp_path: Path) -> None:
    """In digits, keys, checksums and line ends."""
    run = copied(trained(), tmp_path)
    for log in (run / "metrics.jsonl", run / "environment.jsonl", run / "starts.jsonl"):
        whole, chosen = log.read_bytes(), random.Random(0)
        for at in [*chosen.choices(range(len(whole)), k=100), *range(whole.index(b"\n") - 30, whole.index(b"\n") + 1)]:
            log.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << chosen.randrange(8))]) + whole[at + 1 :])
            assert any(fault.startswith(log.name) for fault in log_faults(run)), at
        log.write_bytes(whole)


def log_faults(run: Path) -> list[str]:
    """The faults of a run's logs; its checkpoint is not loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slope_cli.checkpoint.verify._load", lambda *_: None)
        return [str(fault) for fault in check(run)["faults"]]


def test_a_run_may_drop_checkpoints_while_it_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes while the newest is verified, as when another process trains on."""
    run = copied(trained("gpt2-nano", "log.save_every=3"), tmp_path)
    digest = hashlib.file_digest

    def dropping(*args: Any) -> Any:
        shutil.rmtree(run / "checkpoints/step-00000003", ignore_errors=True)
        return digest(*args)

    monkeypatch.setattr(hashlib, "file_digest", dropping)
    result = check(run)
    assert result["faults"] == []
    assert "step-00000003: a newer checkpoint has replaced it" in result["lines"]
    assert "model and tokenizer: sound" in result["lines"]


def test_a_damaged_checkpoint_does_not_hide_a_sound_one(tmp_path: Path) -> None:
    run = copied(trained("gpt2-nano", "log.save_every=3"), tmp_path)
    flip(run / "checkpoints/step-00000006/__0_0.distcp")
    lines = check(run)["lines"]
    assert "step-00000003: sound" in lines
    assert "model and tokenizer: sound" in lines
    assert sum("FAULT" in line for line in lines) == 1


def test_a_checkpoint_whose_masks_break_their_rule(tmp_path: Path) -> None:
    """Every hash is right, and still the layer is not 2:4: something wrote it so."""
    run = copied(trained(), tmp_path)
    _, model, _, _, manifest, _ = load_model(run)
    assert manifest is not None
    name, layer = next(iter(sparse_layers(model)))
    layer.row_mask_bits[0, 0] ^= 1
    metadata = {key: value for key, value in manifest.items() if key not in ("step", "files")}
    store.save(run, 7, store.state_tensors(model, None), metadata, keep=2)
    result = slope("check", run)
    assert result.code == 1
    assert f"{name}: the stored row mask is not exactly 2:4" in result.err


def with_data(run: Path, path: Path | str) -> Path:
    """The run, with another data.path."""
    config = run_folder.open_config(run)
    config.data.path = str(path)
    run_folder.write_config(run, config)
    return run


def test_the_data_are_checked_where_they_are_here(tmp_path: Path) -> None:
    run = with_data(copied(trained(), tmp_path), "embedded")
    assert not any(line.startswith("data: ") for line in check(run)["lines"])
    (run / "data").symlink_to(prepared())
    assert "data: sound" in check(run)["lines"]
    moved = tmp_path / "moved"
    with_data(run, moved)
    assert not any(line.startswith("data: ") for line in check(run)["lines"])
    shutil.copytree(prepared(), moved)
    assert "data: sound" in check(run)["lines"]
    flip(next((moved / "train").iterdir()))
    (fault,) = check(run)["faults"]
    assert fault.startswith(f"data: {moved}/")


def test_other_data_than_it_was_trained_on(tmp_path: Path) -> None:
    other = prepared("wordpiece")
    assert check(with_data(copied(trained(), tmp_path), other))["faults"] == [
        f"data: {other} holds other data than the run was trained on"
    ]


@pytest.mark.parametrize("damage", ["altered", "missing", "no folder"])
def test_another_tokenizer_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its syntax is right, and still it is not the run's; by a relative path too, which is no name on the hub."""
    monkeypatch.chdir(tmp_path)
    run = copied(trained(), tmp_path)
    path = run / "tokenizer" / "tokenizer.json"
    if damage == "altered":
        path.write_text(path.read_text().replace('"a"', '"~a"', 1))
    else:
        path.unlink() if damage == "missing" else shutil.rmtree(path.parent)
    names = ["tokenizer.json"] if damage != "no folder" else sorted(p.name for p in (trained() / "tokenizer").iterdir())
    (fault,) = check(Path("copy"))["faults"]
    assert fault in [
        f"model and tokenizer: copy/tokenizer/{name} is missing or not what it was when step-00000006 was saved"
        for name in names
    ]
    result = slope("generate", "copy", "The ")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize(
    ("line", "altered", "said"),
    [
        ("  name: adamw\n", "  name: lamb\n", "optim.name: adamw -> lamb"),
        ("    n_layer: 2\n", "    n_layer: 2\n    n_inner: 64\n", "model.overrides.n_inner: None -> 64"),
    ],
)
def test_another_config_is_named(line: str, altered: str, said: str, tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    text = (run / "config.yaml").read_text()
    assert line in text
    (run / "config.yaml").write_text(text.replace(line, altered, 1))
    edited, other = check(run)["faults"]
    assert edited.startswith(f"config.yaml: {run}/config.yaml: is not what was written, its checksum does not fit")
    assert other == f"model and tokenizer: {run}/config.yaml was altered after step 6 ({said}); set it back"


@pytest.mark.parametrize(("line", "altered"), [("  every: 10\n", "  every: 18\n"), ("sha256 of", "sha256 oF")])
def test_a_changed_key_that_is_free_is_noticed_until_the_run_writes_it_again(
    line: str, altered: str, tmp_path: Path
) -> None:
    """A flipped digit of a setting that no checkpoint is bound to."""
    run = copied(trained(), tmp_path)
    path = run / "config.yaml"
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, altered, 1))
    (fault,) = check(run)["faults"]
    assert fault.startswith(f"config.yaml: {path}: is not what was written")
    assert slope("pretrain", path, "--out", run).code == 0
    assert check(run)["faults"] == []


def test_free_keys_may_change(tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    config = run_folder.open_config(run)
    config.log.every, config.train.device = 3, "cpu"
    run_folder.write_config(run, config)
    assert check(run)["faults"] == []


def test_a_run_without_a_checkpoint_is_sound(tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    for folder in store.folders(run):
        folder.rename(tmp_path / folder.name)
    assert check(run)["faults"] == []


def test_what_is_no_run() -> None:
    result = slope("check", "/nowhere")
    assert result == (2, "", "error: /nowhere: is not the folder of a run (no config.yaml)\n")
