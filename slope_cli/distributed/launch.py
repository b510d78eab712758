"""The process of a run, and its device."""

import os
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


def _granted_gpus() -> str:
    """The variable that says this process was given GPUs, as KEY=VALUE; empty if none was, or they are hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # the last word: an empty one hides them on purpose
        hidden = visible.strip() in ("", "NoDevFiles") or visible.strip().startswith("-1")
        return "" if hidden else f"CUDA_VISIBLE_DEVICES={visible}"
    for key, value in sorted(os.environ.items()):
        if key.startswith("SLURM_GPUS"):  # a number, or TYPE:NUMBER for several types
            given = any(part.rpartition(":")[2].strip() not in ("", "0") for part in value.split(","))
        elif key in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):  # which ones, so that 0 is one
            given = bool(value.strip())
        else:  # "all" stands in container images, whether or not they run with a GPU
            given = key == "NVIDIA_VISIBLE_DEVICES" and value.strip() not in ("", "all", "none", "void")
        if given:
            return f"{key}={value}"
    return ""


def pick_device(name: str) -> "torch.device":
    """The device called `name`; for "auto" the GPU, or the CPU where no GPU was granted.

    Raises:
        UsageError: no such device here, or a GPU was granted and torch finds none.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if granted := _granted_gpus():
            raise UsageError(
                f"{granted}, but torch finds no GPU (`slope doctor` says more); "
                "for the CPU set train.device=cpu, or CUDA_VISIBLE_DEVICES to nothing"
            )
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"train.device={name}: {str(error).splitlines()[0]}") from None
    return device
