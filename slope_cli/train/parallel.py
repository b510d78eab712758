"""How the model of a run is laid out over its processes, and which kernels they all run."""

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slope_cli.checkpoint import load
from slope_cli.config.schema import Config
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.layouts import ROWS, Choice, Cluster, Layout, choose
from slope_cli.distributed.sharding import Sharding
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods import optim, phases_of
from slope_cli.methods.accounting import phase_sizes
from slope_cli.methods.apply import Calibrate, apply
from slope_cli.methods.phases import DENSE, Phase
from slope_cli.train.dry_run import untrained_model
from sparse_kernels import check_backend, fp8_layers, kernel_choices, measure_kernels, use_choices
from sparse_kernels.convert import Norms
from sparse_kernels.operands import FP8
from sparse_kernels.sharded import whole

BITS = 8
"""Rows whose mask is in one byte."""


def layout_of(config: Config, run: Path | None, world: int, gpus_per_node: int, device: torch.device) -> Layout:
    """The layout that a run has on a number of processes.

    Args:
        run: its folder, if it has begun.
        device: of one of them; on a CPU "auto" is ddp.

    Raises:
        UsageError: fsdp or hsdp for sparse layers whose rows cannot be split.
        SlopeError: no layout fits in a GPU's memory.
    """
    keys, gpu = config.distributed, device.type == "cuda"
    if keys.layout == "ddp" or (keys.layout == "auto" and (world == 1 or not gpu)):
        return Layout("ddp")
    if world == 1:
        return Layout("fsdp", 1, "step" if keys.gather == "auto" else keys.gather)
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else 1 << 60
    rows = ROWS if gpu else BITS
    choice = _choice(config, run, Cluster(world, gpus_per_node, memory), rows)
    if keys.layout != "auto" and not choice.layout.gather:
        rule = f"the rows of sparse layers cannot be split over {world} GPUs in groups of {rows}"
        raise UsageError(f"distributed.layout={keys.layout}: {rule}")
    if not choice.fits:
        need, have = choice.memory.total / 1e9, memory / 1e9
        raise SlopeError(
            f"no layout fits: {choice.layout} needs {need:.0f} GB of a GPU that has {have:.0f}; take more GPUs, a "
            "smaller train.micro_batch or train.activation_checkpointing=block (see `slope pretrain --dry-run --gpus`)"
        )
    return choice.layout


def require_whole(config: Config, run: Path, memory: int) -> None:
    """SlopeError if the rest of a run, whose transfer went by ranges of layers, does not fit on one GPU.

    Args:
        memory: bytes of the GPU.
    """
    choice = _choice(config, run, Cluster(1, 1, memory), BITS)
    if not choice.fits:
        need = f"{choice.memory.total / 1e9:.0f} GB of a GPU that has {memory / 1e9:.0f}"
        rule = "start the same command on more GPUs, with distributed.layout=fsdp"
        raise SlopeError(
            f"{run}: the transfer is done and saved; the adapters train the whole model, which needs {need}; {rule}"
        )


def built_on(config: Config, sharding: Sharding | None, device: torch.device) -> torch.device:
    """Where a process builds the model of a run that begins or resumes.

    Calibration runs the model: where sparsity.mask=wanda chooses the first masks, it is whole on rank 0's device.
    """
    if sharding is None:
        return device
    calibrates = config.sparsity.mask == "wanda" and phases_of(config).at(0).layers != DENSE
    return device if calibrates and sharding.place.type == "cpu" else sharding.place


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


def enter(
    config: Config,
    run: Path,
    to: Phase,
    *,
    was: Phase,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    sharding: Sharding | None,
    calibrate: Calibrate,
    kept: Collection[int | str] = (),
) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    """Bring a model and its optimizer into a later phase; returns what they are from then on.

    Whole weights change in place. FSDP2 lets no parameter of a module be replaced, so a split model is built once more,
    as when a run resumes: whole in rank 0's host memory, where it gets the weights of the split one, changes, and is
    split again. The optimizer's moments stay split; those that change their shape are gathered one by one.

    kept: see `apply`.
    """
    if sharding is None:
        apply(model, config, to, was=was, optimizer=optimizer, calibrate=calibrate, kept=kept)
        return model, optimizer
    convert = to.layers.kind != was.layers.kind  # every process needs the new masks, to bring its moments into shape
    built = load.build(config, run, "cpu" if convert else sharding.place, was)
    with torch.no_grad():
        own = built.state_dict(keep_vars=True)
        for name, tensor in model.state_dict(keep_vars=True).items():
            own[name].copy_(whole(tensor))
    continued = optim.build_optimizer(built, config, phases_of(config))
    for old, new in zip(model.parameters(), built.parameters(), strict=True):
        if old in optimizer.state:
            continued.state[new] = optimizer.state[old]

    def calibrated(_: PreTrainedModel, names: Sequence[str]) -> Norms:
        with torch.autocast(sharding.device.type, sharding.dtype, enabled=sharding.dtype is not None):
            return calibrate(model, names)  # the split model is on the devices, its weights in 16 bits

    apply(built, config, to, was=was, optimizer=continued, calibrate=calibrated, kept=kept)
    plain = list(built.parameters())
    sharding.split(built)
    for old, new in zip(plain, built.parameters(), strict=True):
        optim.replace_parameter(continued, old, new)
    return built, continued


def set_up_torch(config: Config, device: torch.device) -> None:
    """Turn on deterministic kernels if configured; UsageError if this machine lacks the configured backend."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses cuBLAS
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        try:
            check_backend(config.sparsity.backend)
        except RuntimeError as error:
            raise UsageError(f"sparsity.backend={config.sparsity.backend}: {error}") from None


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
        if fp8_layers(model):
            group.first(lambda: measure_kernels(model, tokens, FP8))
        use_choices(group.broadcast(kernel_choices()))
