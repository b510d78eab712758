"""The reference backend on a CPU: time of a sparse step over a dense one, and bytes of their checkpoints.

    python -m slope_cli.benchmarks.cpu_step

A step is forward, backward, clipping, AdamW and the mask update of the whole model.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slope_cli.checkpoint import store
from slope_cli.config import configs
from slope_cli.methods import optim, phases_of
from slope_cli.methods.apply import apply
from slope_cli.models.build import build_model, run_model_config
from slope_cli.utils.environment import environment
from slope_cli.utils.files import write_json
from sparse_kernels import update_backward_masks

from . import RESULTS
from .measure import Runner, Variant, case_config
from .records import Case
from .timing import Timing

CASES = (
    (Case(name="gpt2-nano", seq_len=128, tokens=1024), Timing(warm_up=2, rounds=200)),
    (Case(name="gpt2-small", seq_len=512, tokens=2048), Timing(warm_up=2, rounds=5)),
)
CHECKPOINTS = ("gpt2-nano", "gpt2-small", "gpt2-medium")


def time_steps(case: Case, timing: Timing) -> dict[str, Any]:
    """Median seconds of a dense and a sparse step of one shape, their ratio, and the mask update's share."""
    dense, sparse = (
        Runner(case_config(case, method), Variant(method, method), torch.device("cpu"), timing)
        for method in ("dense", "slope")
    )
    dense_s, sparse_s = timing.medians(dense.step, sparse.step)
    (update_s,) = replace(timing, rounds=1).medians(lambda: update_backward_masks(sparse.model))
    row = {"model": case.name, "tokens": case.tokens, "rounds": timing.rounds, "dense_s": dense_s}
    return {**row, "sparse_s": sparse_s, "mask_update_s": update_s, "ratio": sparse_s / dense_s}


def checkpoint_bytes(name: str, method: str) -> int:
    """Bytes of a checkpoint of a model with AdamW's state, without adapters."""
    config = configs.load(name, [f"method={method}"])
    model, phases = build_model(run_model_config(config), seed=config.train.seed), phases_of(config)
    apply(model, config, phases.at(0))
    optimizer = optim.build_optimizer(model, config, phases)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        derived = phases.at(0).layers.backward_mask_is_derived
        tensors = store.state_tensors(model, optimizer, derived=not derived)
        saved = store.save(Path(folder), 1, tensors, {}, keep=2, derived=derived)
        return sum(file.stat().st_size for file in saved.iterdir())


def main() -> None:
    """Measure, print the rows as they come, and write benchmarks/results/cpu.json."""
    steps, checkpoints = [], []
    for case, timing in CASES:
        steps.append(time_steps(case, timing))
        print(json.dumps(steps[-1]), flush=True)
    for name in CHECKPOINTS:
        dense, sparse = checkpoint_bytes(name, "dense"), checkpoint_bytes(name, "slope")
        checkpoints.append({"model": name, "dense_bytes": dense, "sparse_bytes": sparse, "ratio": sparse / dense})
        print(json.dumps(checkpoints[-1]), flush=True)
    write_json(RESULTS / "cpu.json", {"machine": environment(), "steps": steps, "checkpoints": checkpoints})


if __name__ == "__main__":
    main()
