"""Tiny runs, the command line in this process, and what is compared of two runs.

`python -m support.runs`, from the folder tests, writes golden/nano.json anew.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from slope_cli import cli
from slope_cli.checkpoint import store
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.report import metrics
from slope_cli.train import loop
from support.data import prepared, scratch, write_data

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "nano.json"
RECIPE = TESTS / "tiny.yaml"

# The shortest run that the commands are tried on: adapters half-way, no checkpoint but the last.
STEPS = 6
SHORT = (
    f"train.steps={STEPS}",
    "train.tokens_per_step=64",
    "model.dropout=0",
    "train.seed=0",
    "adapters.lr=null",
    "adapters.warmup=1",
    "optim.lr=0.01",
    "optim.warmup=1",
    "log.sample_prompt='The '",
    "log.save_every=0",
    "log.val_every=0",
    "log.val_tokens=128",
)
LINEARIZED = (
    "linearize.transfer_lr=0.03",
    "adapters.rank=4",
    "optim.lr=0.01",
    "log.plot=false",
    "log.tensorboard=false",
    "log.sample_tokens=4",
    "log.sample_prompt='The '",
    "log.val_tokens=512",
)
"""A short run that linearizes, but for its length and its window."""
_COMMON = ("hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "vocab_size=272")
OVERRIDES: dict[str, tuple[str, ...]] = {
    "gpt2-nano": ("n_layer=2", "n_embd=32", "n_head=2", "n_positions=64"),
    "opt-125m": (*_COMMON, "max_position_embeddings=64", "ffn_dim=64"),
    "llama3-8b": (*_COMMON, "max_position_embeddings=64", "intermediate_size=64", "num_key_value_heads=1"),
    "bert-base": (*_COMMON, "max_position_embeddings=64", "intermediate_size=64"),
}


def sized(model: str) -> list[str]:
    """The overrides that make a model tiny."""
    return [f"model.name={model}", *(f"model.overrides.{size}" for size in OVERRIDES[model])]


def small(model: str) -> list[str]:
    """The overrides that make a model tiny and its run short."""
    return [*sized(model), *SHORT]


def tiny(data: Path | str, *words: str, model: str = "gpt2-nano") -> Config:
    """The tiny run of RECIPE; a BERT brings the masked objective."""
    return configs.load(str(RECIPE), [f"data.path={data}", *sized(model), *words])


class Result(NamedTuple):
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str


def slope(*words: str | Path) -> Result:
    """Run `slope WORDS…` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["slope", *map(str, words)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        finally:
            os.environ.pop("SLOPE_DEBUG", None)  # what --debug leaves
    return Result(code, out.getvalue(), err.getvalue())


@cache
def trained(model: str = "gpt2-nano", *more: str) -> Path:
    """A finished short run; adapters joined half-way unless `more` says otherwise. Copy it before you alter it."""
    run = scratch() / "-".join(["run", model, *more]).replace("/", "_")
    data = prepared("wordpiece" if model.startswith("bert") else "bytes")
    result = slope("pretrain", RECIPE, *small(model), f"data.path={data}", *more, "--out", run)
    if result.code:
        raise RuntimeError(result.err)
    return run


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run that may be altered."""
    return Path(shutil.copytree(run, folder / "copy"))


def records(run: Path) -> list[dict[str, Any]]:
    """The run's log without what depends on the clock."""
    return metrics.without_clock(metrics.read(run))


def final_state(config: Config, run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, weights and optimizer, through the program's own loading."""
    trainer = loop.Trainer(config, run, torch.device("cpu"))
    trainer.batches.close()
    return {name: t.detach().clone() for name, t in store.state_tensors(trainer.model, trainer.optimizer).items()}


def assert_same_run(config: Config, run: Path, reference: Path) -> None:
    """Log, weights and optimizer state of two runs are equal bit for bit."""
    assert records(run) == records(reference)
    ours, theirs = final_state(config, run), final_state(config, reference)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optim.") for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def golden_losses(folder: Path) -> list[float]:
    """The losses of 20 steps of the tiny run, with mask updates and adapters.

    Without dropout, which not every CPU draws alike.
    """
    settings = ("train.steps=20", "model.dropout=0", "model.overrides.n_positions=256", "log.save_every=0")
    config = tiny(write_data(folder), *settings)
    loop.pretrain(config, folder / "run")
    return [record["loss"] for record in metrics.read(folder / "run") if record["kind"] == "train"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(golden_losses(Path(temporary)), indent=1) + "\n")
