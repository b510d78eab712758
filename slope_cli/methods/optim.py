"""The optimizer, its parameter groups and state, and the learning rate of a step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_optimizer import Lamb
from torch import Tensor, nn

from slope_cli.config.schema import Config, OptimConfig
from slope_cli.linearize.swap import linear_windows
from slope_cli.methods.phases import ADAPTERS, MAPS, WEIGHTS, Phase, Phases, Rate
from sparse_kernels import decay_pruned

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state that both optimizers keep for each parameter, in its shape."""


def build_optimizer(model: nn.Module, config: Config, phases: Phases) -> torch.optim.Optimizer:
    """AdamW or LAMB over all parameters that are trained in the model's present phase, in groups with their rates.

    Weight decay is on the model's own matrices alone: not on biases and norms, nor on feature maps, which start as the
    identity and are not to shrink towards zero. The kept values of a sparse layer are a matrix like any other.
    """
    optimizer = make_optimizer(model, config.optim, adapter_decay=config.adapters.weight_decay)
    if phases.decay:
        # After clipping, and within what a CUDA graph captures; without masked layers there is nothing to decay.
        optimizer.register_step_pre_hook(lambda *_: decay_pruned(model, phases.decay))
    return optimizer


def make_optimizer(model: nn.Module, optim: OptimConfig, *, adapter_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW or LAMB over all parameters of a model that require a gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapters = [p for name, p in trained.items() if ".adapter." in name]
    maps = [p for window in linear_windows(model).values() for p in window.parameters() if p.requires_grad]
    beside = {id(p) for p in (*adapters, *maps)}
    groups = []
    for group, decay, own in (
        (WEIGHTS, optim.weight_decay, [p for p in trained.values() if id(p) not in beside]),
        (MAPS, 0.0, maps),
    ):
        groups.append({"params": [p for p in own if p.dim() >= 2], "weight_decay": decay, "group": group})
        # In LAMB without a trust ratio for biases and norms, as in NVIDIA's FusedLAMB, which BERT was trained with.
        vectors = [p for p in own if p.dim() < 2]
        groups.append({"params": vectors, "weight_decay": 0.0, "group": group, "adam": True})
    groups = [group for group in (*groups, _adapter_group(adapters, adapter_decay)) if group["params"]]
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    # You et al. 2020 with the decay within the update that the trust ratio scales. No bias correction (adam_debias=True
    # in this library), which the trust ratio would cancel. Clipping is done by the training step.
    optimizer: torch.optim.Optimizer = Lamb(groups, weight_decouple=False, adam_debias=True, **settings)
    optimizer.clamp = math.inf  # type: ignore[attr-defined]  # the library's 10 would hold back every large matrix
    return optimizer


def add_adapter_group(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], config: Config) -> None:
    """Give added adapters their own group, with its learning rate, decay and fresh state."""
    optimizer.add_param_group(_adapter_group(parameters, config.adapters.weight_decay))


def _adapter_group(parameters: Iterable[nn.Parameter], decay: float) -> dict[str, Any]:
    # adam: LAMB's trust ratio does not work for a matrix that starts at zero.
    return {"params": list(parameters), "weight_decay": decay, "group": ADAPTERS, "adam": True}


def set_learning_rates(optimizer: torch.optim.Optimizer, phase: Phase, step: int, optim: OptimConfig) -> float:
    """Give every trained group its learning rate for a step (counted from 0); returns that of the phase's first."""
    rates = {group: learning_rate(rate, step, optim) for group, rate in phase.rates.items()}
    for group in optimizer.param_groups:
        if (rate := rates.get(group["group"])) is None:
            continue
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # a captured step reads it from there
        else:
            group["lr"] = rate
    return next(iter(rates.values()))


def learning_rate(rate: Rate, step: int, optim: OptimConfig) -> float:
    """Linear warm-up to the peak, then the schedule down to `optim.min_lr` of it at the last step.

    Args:
        step: of the run, from rate.first to rate.last - 1.
    """
    step, steps = step - rate.first, rate.last - rate.first
    warmup_steps = round(rate.warmup * steps) if rate.warmup < 1 else int(rate.warmup)
    if step < warmup_steps:
        return rate.peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    left: float = {
        "cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
        "linear": 1 - done,
        "polynomial": (1 - done) ** optim.power,
        "constant": 1.0,
    }[optim.schedule]
    return rate.peak * (optim.min_lr + (1 - optim.min_lr) * left)


# ------------------------------------------------------------------------------------------------------------- state


def init_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Make the state of parameters that have none, as the optimizer's first step would: zeros."""
    for p in parameters:
        if not optimizer.state[p]:
            optimizer.state[p] = {key: torch.zeros_like(p) for key in MOMENTS}
            if isinstance(optimizer, torch.optim.AdamW):
                device = p.device if optimizer.defaults["fused"] else torch.device("cpu")
                optimizer.state[p]["step"] = torch.zeros((), device=device)


def replace_parameter(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, like: Callable[[Tensor], Tensor]
) -> None:
    """Replace `old` by `new` in its group, with the state of `old` brought into the new shape by `like`."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if state := optimizer.state.pop(old, None):
        optimizer.state[new] = state | {key: like(state[key]) for key in MOMENTS}


def make_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Prepare the optimizer's step for capture in a CUDA graph: state allocated, learning rates in device memory.

    Returns:
        Whether it can be captured: LAMB's cannot.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return False
    for group in optimizer.param_groups:
        init_state(optimizer, group["params"])
        group["capturable"] = True
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
    return True
