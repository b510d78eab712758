"""How the model of a run is laid out over its processes, and which kernels they all run."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slope_cli.config.schema import Config
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.launch import Ranks
from slope_cli.distributed.layouts import ROWS, Choice, Cluster, Layout, choose
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods.accounting import phase_sizes
from slope_cli.train.dry_run import untrained_model, whole_because
from sparse_kernels import kernel_choices, measure_kernels, use_choices

BITS = 8
"""Rows whose mask is in one byte."""


def layout_of(config: Config, run: Path | None, world: int, gpus_per_node: int, device: torch.device) -> Layout:
    """The layout that a run has on a number of processes.

    Args:
        run: its folder, if it has begun.
        device: of one of them; on a CPU "auto" is ddp.

    Raises:
        UsageError: fsdp or hsdp for a run whose layers change their kind, or become linear, or whose optimizer is LAMB.
        SlopeError: no layout fits in a GPU's memory.
    """
    keys, gpu = config.distributed, device.type == "cuda"
    reason = whole_because(config)
    if keys.layout in ("fsdp", "hsdp") and reason:
        raise UsageError(f"distributed.layout={keys.layout}: {reason}; set distributed.layout=ddp")
    if keys.layout == "ddp" or (keys.layout == "auto" and (world == 1 or not gpu or reason)):
        return Layout("ddp")
    if world == 1:
        return Layout("fsdp", 1, "step" if keys.gather == "auto" else keys.gather)
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else 1 << 60
    choice = _choice(config, run, Cluster(world, gpus_per_node, memory), rows=ROWS if gpu else BITS)
    if keys.layout != "auto" and not choice.layout.gather:
        rule = f"the rows of sparse layers cannot be split over {world} GPUs in groups of {ROWS}"
        raise UsageError(f"distributed.layout={keys.layout}: {rule}")
    if not choice.fits:
        need, have = choice.memory.total / 1e9, memory / 1e9
        raise SlopeError(
            f"no layout fits: {choice.layout} needs {need:.0f} GB of a GPU that has {have:.0f}; take more GPUs, a "
            "smaller train.micro_batch or train.activation_checkpointing=block (see `slope pretrain --dry-run --gpus`)"
        )
    return choice.layout


def built_on(config: Config, layout: Layout, ranks: Ranks, device: torch.device) -> torch.device:
    """Where a process builds its model. If it is to be split: rank 0 in its host's memory, the others only its shapes.

    Calibration runs the model, so with sparsity.mask=wanda it is whole on rank 0's device.
    """
    if not layout.gather or (ranks.first and config.sparsity.mask == "wanda"):
        return device
    return torch.device("cpu" if ranks.first else "meta")


def _choice(config: Config, run: Path | None, cluster: Cluster, rows: int) -> Choice:
    return choose(
        phase_sizes(untrained_model(config, run), config),
        cluster,
        micro_batches=config.train.accumulation(cluster.world),
        activation_checkpointing=config.train.activation_checkpointing,
        layout=config.distributed.layout,
        gather=config.distributed.gather,
        group=rows,
    )


def agree_on_kernels(
    model: nn.Module, tokens: int, dtype: torch.dtype, group: Group, saved: Mapping[str, Any] | None
) -> None:
    """Let all processes run the same kernels: those of an earlier start, and for new products what rank 0 measures.

    Args:
        tokens: of a micro-batch.
        saved: `kernel_choices` of an earlier start of the run; those of other GPUs or versions have no effect.
    """
    with contextlib.suppress(ValueError):  # a stranger's manifest: measured again
        use_choices(saved or {})
    if group.several:
        group.first(lambda: measure_kernels(model, tokens, dtype))
        use_choices(group.broadcast(kernel_choices()))
