"""What every fine-tuning has: its settings, its steps, and the folder that it writes.

OUT/result.json   settings, metrics and versions; written last, so that only a finished fine-tuning has one
OUT/metrics.jsonl a line for each step
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slope_cli.checkpoint import run_folder
from slope_cli.checkpoint.hf_folder import RESULT
from slope_cli.checkpoint.load import Loaded
from slope_cli.config.schema import OptimConfig
from slope_cli.config.section import MAX_WHOLE
from slope_cli.config.values import flat
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods import optim
from slope_cli.methods.phases import Rate
from slope_cli.report import metrics
from slope_cli.report.progress import Progress
from slope_cli.report.timing import Speed
from slope_cli.utils import files
from slope_cli.utils.environment import environment
from sparse_kernels import check_backend, masked_layers, sparse_layers

SFT = "SFT"
"""The task of causal models; see `sft`."""
FOLDER = "finetune"
FEWEST_TOKENS = 8
"""The shortest sequence that holds two short texts and their special tokens."""
WARMUP, WEIGHT_DECAY, CLIP = 0.1, 0.01, 1.0
LOG_EVERY = 50

Step = Callable[[NDArray[np.int64]], tuple[float, int]]
"""Computes the gradient of the loss of some examples; the loss, and how many tokens the model read."""


@dataclass(frozen=True)
class Settings:
    """The settings of a fine-tuning; UsageError for a bad value."""

    task: str
    epochs: int
    lr: float
    batch: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("seq_len", FEWEST_TOKENS)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"--lr {self.lr}: must be {'positive' if math.isfinite(self.lr) else 'finite'}")
        if not 0 <= self.seed <= MAX_WHOLE:
            raise UsageError(f"--seed {self.seed}: must be at least 0 and below 2^63")


def require_positions(model: Any, seq_len: int) -> None:
    """UsageError if a model of transformers has fewer positions than inputs are long."""
    if seq_len > (positions := model.config.max_position_embeddings):
        raise UsageError(f"--seq-len {seq_len}: the model has only {positions} positions; set it lower")


# ------------------------------------------------------------------------------------------------------- the folder


def default_folder(folder: Path, task: str, seed: int) -> Path:
    """FOLDER/finetune/TASK-SEED, of RUN@STEP in RUN; UsageError if it is a link: it may be a stranger's folder."""
    out = run_folder.place(str(folder))[0] / FOLDER / f"{task}-{seed}"
    if link := next((path for path in (out.parent, out) if path.is_symlink()), None):
        raise UsageError(f"{link}: is a link, which is not written through; choose another folder with --out")
    return out


def finished(
    loaded: Loaded, settings: Settings, source: dict[str, str], out: Path, own: str, run: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a fine-tuning: that in its folder, or that of `run`, which is written there, last.

    Args:
        source: of the rows, as the result has it.
        own: what `run` writes beside the log.

    Raises:
        UsageError: the folder contains something else, or the result of another model, other rows or other settings.
        SlopeError: the result is damaged.
    """
    identity = {"run": loaded.name, "step": loaded.step, "settings": asdict(settings), "data": source}
    known = RESULT, own, metrics.JSONL

    def is_own(path: Path) -> bool:
        name = path.name.removeprefix(".")
        return name.removesuffix(".tmp") in known or name.removeprefix("tmp-") == own

    with files.claimed_folder(out, "fine-tuning", is_own):
        if (out / RESULT).is_file():
            return _finished_result(out, identity)
        started, device = time.monotonic(), loaded.model.device
        if device.type == "cuda":
            backend = "auto" if loaded.config is None else loaded.config.sparsity.backend
            try:
                check_backend(backend)
            except RuntimeError as error:
                raise UsageError(f"sparsity.backend={backend}: {error}") from None
        result = {
            **identity,
            **run(),
            "seconds": round(time.monotonic() - started, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": "bf16" if device.type == "cuda" else "fp32",
            "versions": environment(),
        }
        files.write_json(out / RESULT, result)
        return result


def _finished_result(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The result in a folder; UsageError if it is of another model, other rows or other settings."""
    try:
        result: dict[str, Any] = json.loads((out / RESULT).read_text())
    except ValueError:
        raise SlopeError(f"{out / RESULT}: damaged, not JSON; remove it to fine-tune again") from None
    before, now = flat({key: result.get(key) for key in identity}), flat(identity)
    changed = [f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UsageError(f"{out}: contains another fine-tuning ({'; '.join(changed)}); choose another --out")
    return result


# --------------------------------------------------------------------------------------------------------- the steps


def train(model: nn.Module, count: int, s: Settings, step: Step, out: Path) -> list[float]:
    """Train in place on so many examples, and return the loss of each step.

    AdamW (weight decay 0.01 on matrices) over what requires a gradient, linear warm-up over a tenth of the steps and
    linear decay to 0, gradients clipped at norm 1. All masks stay fixed.

    Raises:
        SlopeError: a loss or gradient is not finite; that step updates nothing.
    """
    for _, layer in masked_layers(model):
        layer.fix_mask()
    config = OptimConfig(lr=s.lr, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY, schedule="linear", min_lr=0.0)
    optimizer = optim.make_optimizer(model, config, adapter_decay=WEIGHT_DECAY)
    losses, steps = [], list(step_indices(count, s))
    rate = Rate(0, len(steps) + 1, s.lr, WARMUP)  # one more step, because the last learning rate is 0
    log = metrics.MetricsLog(out, 0)
    progress, speed = Progress(len(steps), every=LOG_EVERY), Speed()
    torch.manual_seed(s.seed)  # of dropout
    model.train()
    try:
        for number, indices in enumerate(steps):
            started = time.perf_counter()
            lr = optim.learning_rate(rate, number, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, tokens = step(indices)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            values = {"loss": loss, "grad_norm": norm.item(), "lr": lr}
            if not all(map(math.isfinite, values.values())):
                raise SlopeError(f"step {number + 1}: loss or gradient is not finite; lower --lr")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            seconds = time.perf_counter() - started
            speed.add(tokens, seconds, first=number == 0)
            progress.step(log.write("train", number + 1, **values, tokens_per_s=round(tokens / seconds, 1)), speed)
    finally:
        progress.close()
        log.close()
    return losses


def step_indices(count: int, s: Settings) -> Iterator[NDArray[np.int64]]:
    """The examples of each step: each once per epoch, in an order that depends only on seed and epoch.

    A batch may span two epochs, so that all but the last have the same size.
    """
    epochs = [np.random.default_rng([s.seed, epoch]).permutation(count) for epoch in range(s.epochs)]
    indices = np.concatenate(epochs)
    return (indices[start : start + s.batch] for start in range(0, len(indices), s.batch))


def facts(model: nn.Module, losses: list[float]) -> dict[str, Any]:
    """What a result says of the training: its steps, its loss at the end, the layers under masks."""
    return {
        "steps": len(losses),
        "train_loss": float(np.mean(losses[-math.ceil(len(losses) / 10) :])),  # of the last tenth
        "sparse_layers": len([*sparse_layers(model), *masked_layers(model)]),
    }
