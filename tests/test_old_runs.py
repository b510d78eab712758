"""Runs that version 0.1 left after step 8 of 13 are loaded, resumed, judged, exported and linearized by this one.

tests/old_runs/ holds a sparse run with adapters, masks of two patterns, and that run being linearized, with the tensors
and losses that version 0.1 went on to have.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import slope
from torch import Tensor

from slope_cli.checkpoint import run_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.config import configs
from slope_cli.evaluate.evaluate import evaluate
from slope_cli.inference.export import export
from slope_cli.report import metrics
from slope_cli.train.loop import Trainer, pretrain
from sparse_kernels import adapters_of, sparse_layers

OLD = Path(__file__).parent / "old_runs"
RUNS = ("sparse", "linear")
NAMES = {
    ".positions": ".row_mask_bits",
    ".positions_t": ".backward_mask_bits",
    ".column_scale": ".backward_scale",
}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them; their data lie at a path relative to it."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    return folder


def expected(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((OLD / name / "expected.json").read_text())
    return content


def today(name: str) -> str:
    """The name that a tensor of version 0.1 has now."""
    for before, now in NAMES.items():
        if name.endswith(before):
            return name.removesuffix(before) + now
    return name.replace(".adapter.A", ".adapter.lora_A").replace(".adapter.B", ".adapter.lora_B")


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, tensor in tensors.items()
    }


def restored(run: Path) -> dict[str, str]:
    """The hash of every tensor of a run's newest checkpoint, as a resumed run has it."""
    t = Trainer(run_folder.open_config(run), run, torch.device("cpu"))
    t.batches.close()
    return digests(store.state_tensors(t.model, t.optimizer))


@pytest.mark.parametrize("name", RUNS)
def test_every_tensor_is_restored_and_the_run_ends_as_it_did(name: str, old: Path) -> None:
    want, run = expected(name), old / name
    assert restored(run) == {today(key): digest for key, digest in want["tensors"].items()}
    pretrain(run_folder.open_config(run), run)
    records = metrics.read(run)
    steps = [record for record in records if record["kind"] in metrics.STEPS and record["step"] > 8]
    assert [[record["kind"], record["step"]] for record in steps] == [loss[:2] for loss in want["losses"]]
    losses = [record.get("loss", record.get("mse")) for record in steps]
    assert losses == pytest.approx([loss[2] for loss in want["losses"]], rel=1e-5)
    val = [record for record in records if record["kind"] == "val"][-1]
    assert val["loss"] == pytest.approx(want["validation"], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_the_command_line_resumes_and_names_the_new_keys_once(name: str, old: Path) -> None:
    config = configs.load_saved(Path(name) / "config.yaml")
    words = ("pretrain", f"{name}/config.yaml", "--out", name)
    first = slope(*words)
    assert first.code == 0
    (warning,) = [line for line in first.err.splitlines() if line.startswith("warning")]
    assert "train.dtype is now train.precision" in warning
    assert configs.load_saved(Path(name) / "config.yaml") == config
    second = slope(*words)
    assert (second.code, "warning" in second.err) == (0, False)
    assert json.loads(slope("check", name, "--json").out)["faults"] == []


def test_its_masks_patterns_and_adapters_are_those_of_its_config(old: Path) -> None:
    loaded = load_model(old / "sparse")
    layers = dict(sparse_layers(loaded.model))
    assert {(layer.n, layer.m) for layer in layers.values()} == {(2, 4), (1, 2)}
    assert all(layer.backward_rescale for layer in layers.values())
    assert {adapter.rank for adapter in adapters_of(loaded.model).values()} == {4}
    for layer in layers.values():
        layer.validate()


@pytest.mark.parametrize("name", RUNS)
def test_it_is_judged_as_it_was(name: str, old: Path) -> None:
    """The validation after step 5 is not of the checkpoint of step 8, so the run goes on to its end first."""
    run = old / name
    pretrain(run_folder.open_config(run), run)
    result = evaluate(run, tokens=256)
    assert result["perplexity"]["loss"] == pytest.approx(expected(name)["validation"], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_it_is_exported(name: str, old: Path) -> None:
    ids_BT = torch.arange(24).view(1, 24)
    export(old / name, old / "exported")
    ours, theirs = (load_model(old / folder).model(input_ids=ids_BT).logits for folder in (name, "exported"))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_it_is_linearized(old: Path) -> None:
    words = ("--out", "new", "train.steps=2", "linearize.window=8", "log.tensorboard=false", "log.sample_tokens=4")
    result = slope("linearize", "sparse", *words)
    assert result.code == 0, result.err
    teacher, step = (next(r for r in metrics.read(old / "new") if r["kind"] == kind) for kind in ("teacher", "val"))
    assert teacher["loss"] < step["loss"] + 0.5


def test_its_plot_shows_where_adapters_joined(old: Path) -> None:
    result = slope("plot", "sparse", "--out", "loss")
    assert result.code == 0
    assert "adapters" in (old / "loss.svg").read_text()
