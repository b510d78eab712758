"""What takes the steps of a phase: which kind of step, in which precision, compiled or from CUDA graphs."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slope_cli.config.schema import Config
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.sharding import Sharding
from slope_cli.errors import UsageError
from slope_cli.methods.phases import Phase
from slope_cli.models.shapes import drops
from slope_cli.train import init
from slope_cli.train.activations import checkpoint_activations
from slope_cli.train.cuda_graphs import GraphedStep
from slope_cli.train.linearize_steps import DistillStep, TransferStep
from slope_cli.train.step import Step
from sparse_kernels import backends, defer_activations


def products_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype of products, or None for that of the weights."""
    precision = config.train.precision
    return torch.bfloat16 if precision in ("bf16", "fp8") or (precision == "auto" and device.type == "cuda") else None


def set_matmul_precision(config: Config, device: torch.device) -> None:
    """Allow TF32 in products of float32 where a linearized model's others are in bf16, on a GPU.

    Linearized attention computes in float32 from 16-bit q, k and v. TF32 holds these exactly, and features and states
    to 10 bits, which bf16 would not.
    """
    if device.type == "cuda" and products_dtype(config, device) is not None:
        torch.set_float32_matmul_precision("high")


def make_step(
    config: Config,
    run: Path,
    phase: Phase,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    group: Group,
    sharding: Sharding | None,
) -> Step | GraphedStep:
    """What takes the steps of a phase; UsageError for CUDA graphs where there can be none."""
    train, dtype = config.train, products_dtype(config, device)
    if phase.linearized:
        set_matmul_precision(config, device)
    defer_activations(model, on=not phase.linearized)
    checkpoint_activations(model, train.activation_checkpointing)
    compiled = _compiled(config, device, model)
    how: dict[str, Any] = {"dtype": dtype, "clip": config.optim.clip, "compiled": compiled}
    how |= {"group": group, "sharding": sharding}
    own = config.linearize
    if phase.step == "transfer":
        how |= {"mse_weight": own.mse_weight, "entropy_weight": own.entropy_weight}
        return TransferStep(model, optimizer, **how)
    if phase.step == "distill":
        teacher = init.teacher(run, model, device, shares=phase.shares_teacher, group=group, sharding=sharding)
        return DistillStep(model, optimizer, teacher=teacher, share=config.distill.share, **how)
    step = Step(model, optimizer, **how)
    return GraphedStep(step) if _graphed(config, device, sharding, compiled) else step


def _compiled(config: Config, device: torch.device, model: PreTrainedModel) -> bool:
    """Whether blocks are compiled; UsageError if they are to be, and would have a wrong gradient."""
    train, gpu = config.train, device.type == "cuda"
    if not (gpu and train.activation_checkpointing != "none" and drops(model.config)):
        return gpu if train.compile == "auto" else bool(train.compile)
    if train.compile is True:  # its gradient was off by a sixth on an H200 with torch 2.11
        rule = "compiled blocks do not drop again what they dropped; set model.dropout=0 or train.compile=false"
        raise UsageError(f"train.activation_checkpointing={train.activation_checkpointing}: {rule}")
    return False


def _graphed(config: Config, device: torch.device, sharding: Sharding | None, compiled: bool) -> bool:
    """Whether steps are replayed from CUDA graphs; UsageError if they are to be, and cannot."""
    train, reason = config.train, ""
    if device.type != "cuda":
        reason = f"needs a GPU, and the device is {device}"
    elif sharding is not None:
        reason = f"is not for distributed.layout={sharding.layout.name}"
    elif config.learns_from_teacher:
        reason = "is not for distill.share above 0"
    elif compiled and train.activation_checkpointing != "none":
        # What is computed again restores the generator's state, which a capture does not allow.
        reason = "is not for train.compile with train.activation_checkpointing; set train.compile=false"
    if train.cuda_graph is True and reason:
        raise UsageError(f"train.cuda_graph=true: {reason}")
    return train.cuda_graph is not False and not reason


def kernels_of(model: PreTrainedModel) -> dict[str, int]:
    """How many products of sparse layers run in cuSPARSELt, and how many dense; empty without a GPU."""
    choices = [choice for layer in backends(model) for choice in (layer.forward, layer.input_grad) if choice]
    counts = {"cusparselt": sum(choice.sparse for choice in choices)}
    return {**counts, "dense": len(choices) - counts["cusparselt"]} if choices else {}
