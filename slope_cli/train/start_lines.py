"""What a start of a run says before its first step: which layers change, in what precision, on what, how much."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from slope_cli.config.schema import Config
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.layouts import Layout
from slope_cli.linearize.swap import linear_windows
from slope_cli.methods.phases import Phase
from slope_cli.report.tables import counted
from sparse_kernels import ModelReport, fp8_layers, fp8_obstacle, sparse_layers


def start_lines(
    config: Config,
    run: Path,
    report: ModelReport | None,
    phase: Phase,
    model: nn.Module,
    dtype: torch.dtype | None,
    group: Group,
    layout: Layout,
) -> Iterator[str]:
    """The lines of a start.

    Args:
        report: which layers become sparse or masked; None if none does.
        model: in the phase, on its device.
        dtype: of products, or None for that of the weights.
    """
    device = next(model.parameters()).device
    yield str(report or _unswapped(model))
    if phase.fp8 and not fp8_obstacle(device):
        simulated = ", which a CPU simulates" if device.type == "cpu" else ""
        yield f"{counted(len(fp8_layers(model)), 'linear layer')} multiply in fp8 in training{simulated}"
    if share := config.distill.share:
        yield f"{share:.0%} of the loss is the divergence from the predictions of {config.teacher}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    precision = "fp32" if dtype is None else "bf16 and fp8" if fp8_layers(model) else "bf16"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train, world, batch = config.train, group.ranks.world, ""
    if group.several:
        name = f"{world} x {name} ({layout})"
        parts = f"{counted(train.micro_batch, 'sequence')} x {counted(train.accumulation(world), 'micro-batch', 'es')}"
        batch = f"; a step: {parts} x {world} ranks = {train.tokens_per_step:,} tokens"
    tokens = train.steps * train.tokens_per_step
    yield f"{run}: on {name} in {precision}, {trained:,} trained parameters, {tokens:,} tokens in all{batch}"


def _unswapped(model: nn.Module) -> str:
    """Of a run that makes no layer sparse."""
    if windows := linear_windows(model):
        sparse = sum(1 for _ in sparse_layers(model))
        becomes = f"attention of {counted(len(windows), 'layer')} becomes linear attention"
        stay = "is sparse and stays so" if sparse == 1 else "are sparse and stay so"
        return f"{becomes}; {counted(sparse, 'linear layer')} {stay}"
    return "dense run: no layer is sparse"
