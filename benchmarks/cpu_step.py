"""The reference backend on a CPU: time of a sparse step over a dense one, and bytes of their checkpoints.

    python -m slope_cli.benchmarks.cpu_step

A step is forward, backward, clipping and AdamW of the whole model, and its share of the column-mask renewals. Dense and
sparse steps alternate in one process; the ratio is that of the medians.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from slope_cli.benchmarks.machine import RESULTS, machine
from slope_cli.checkpoint import run_model, store
from slope_cli.config import load as configs
from slope_cli.config.schema import Config
from slope_cli.methods import optim, phases
from slope_cli.models import shapes
from slope_cli.models.loss import batch_loss
from sparse_kernels import renew_column_masks

CASES = (  # model, sequences, tokens of each, rounds
    ("gpt2-nano", 8, 128, 200),
    ("gpt2-small", 4, 512, 5),
)
CHECKPOINTS = ("gpt2-nano", "gpt2-small", "gpt2-medium")


def _config(name: str, method: str, sequences: int, tokens: int) -> Config:
    shape = [f"train.micro_batch={sequences}", f"train.seq_len={tokens}", f"train.tokens_per_step={sequences * tokens}"]
    return configs.load(name, [f"method={method}", *shape])


class Stepper:
    """A model that takes timed steps on one random batch."""

    def __init__(self, config: Config) -> None:
        self.model, _ = run_model.build(config, "cpu")
        self.optimizer = optim.build_optimizer(self.model, config)
        rows = shapes.vocab_size(self.model.config)
        shape = (config.train.micro_batch, config.train.seq_len)
        self.batch = {name: torch.randint(rows, shape) for name in ("input_ids", "labels")}

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        torch.autograd.backward(batch_loss(self.model, self.batch, "causal").total)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def renewal(self) -> float:
        """Seconds of one renewal of all column masks."""
        started = time.perf_counter()
        renew_column_masks(self.model)
        return time.perf_counter() - started


def time_steps(name: str, sequences: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a dense and a sparse step of one shape, and their ratio."""
    dense, sparse = (Stepper(_config(name, method, sequences, tokens)) for method in ("dense", "slope"))
    for _ in range(2):
        dense.step(), sparse.step()
    pairs = [(dense.step(), sparse.step()) for _ in range(rounds)]
    renewal = sparse.renewal() / phases.renew_every(configs.load(name), phases.Stage("sparse"))
    dense_s, sparse_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "model": name,
        "tokens": sequences * tokens,
        "dense_s": dense_s,
        "sparse_s": sparse_s + renewal,
        "renewal_s": renewal,
        "ratio": (sparse_s + renewal) / dense_s,
        "rounds": rounds,
    }


def checkpoint_bytes(name: str, method: str) -> int:
    """Bytes of a checkpoint of a model with AdamW's state, adapters not counted."""
    config = configs.load(name, [f"method={method}"])
    model, _ = run_model.build(config, "cpu")
    optimizer = optim.build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        saved = store.save(Path(folder), 1, store.state_tensors(model, optimizer), {}, keep=2)
        return sum(file.stat().st_size for file in saved.iterdir())


def main() -> None:
    """Measure, print, and write benchmarks/results/cpu.json."""
    steps = []
    for case in CASES:
        steps.append(time_steps(*case))
        print(json.dumps(steps[-1]), flush=True)
    sizes = []
    for name in CHECKPOINTS:
        dense, sparse = checkpoint_bytes(name, "dense"), checkpoint_bytes(name, "slope")
        sizes.append({"model": name, "dense_bytes": dense, "sparse_bytes": sparse, "ratio": sparse / dense})
        print(json.dumps(sizes[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": machine(), "steps": steps, "checkpoints": sizes}
    (RESULTS / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
