"""The process of a run, and its device."""

import os
import sys
from typing import TYPE_CHECKING

from slope_cli.errors import UsageError

if TYPE_CHECKING:
    import torch


def require_one_process() -> None:
    """Refuse to start as one of several processes.

    Raises:
        UsageError: torchrun or srun started more than one.
    """
    # Not SLURM_NTASKS: sbatch sets it to the job's tasks even for a script that starts one process without srun.
    for key in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(key, "1") != "1" and ("RANK" in os.environ or "SLURM_PROCID" in os.environ):
            raise UsageError(f"{key}={os.environ[key]}: a run trains in one process; start a single task")


def _given_gpus() -> str:
    """The variable that says this process has GPUs, as KEY=VALUE; empty if there is none, or they are hidden."""
    for key, nothing in (
        ("CUDA_VISIBLE_DEVICES", ("", "-1", "NoDevFiles")),
        ("SLURM_GPUS", ("", "0")),
        ("SLURM_JOB_GPUS", ("",)),  # numbers of GPUs, so that 0 is one
    ):
        if (value := os.environ.get(key)) is not None:
            return "" if value in nothing else f"{key}={value}"
    return ""


def pick_device(name: str) -> "torch.device":
    """The device called `name`, or for "auto" the GPU where there is one, with a warning where there should be one.

    Raises:
        UsageError: no such device here.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if given := _given_gpus():
            print(f"warning: {given}, but torch finds no GPU; using the CPU (see `slope doctor`)", file=sys.stderr)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"train.device={name}: {str(error).splitlines()[0]}") from None
    return device
