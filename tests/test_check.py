"""`slope check` finds what is damaged in a run, names the file, and ends with 1."""

import json
import shutil
from pathlib import Path

import pytest
from support.data import prepared
from support.runs import copied, slope, trained

from slope_cli.checkpoint import run_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.checkpoint.verify import check
from sparse_kernels import sparse_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def test_a_sound_run_has_no_fault() -> None:
    result = check(trained())
    assert result["faults"] == []
    assert result["lines"] == [
        "config.yaml: sound",
        "metrics.jsonl: sound",
        "step-00000006: sound",
        "data: sound",
        "model and tokenizer: sound",
    ]


FILES = [
    "checkpoints/step-00000006/__0_0.distcp",
    "checkpoints/step-00000006/.metadata",
    "checkpoints/step-00000006/manifest.json",
    "tokenizer/tokenizer.json",
    "metrics.jsonl",
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
    (fault,) = check(run)["faults"]
    assert fault == f"model and tokenizer: {run}/config.yaml was altered after step 6 ({said}); set it back"


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
