"""The optimizer, its parameter groups and state, and the learning rate of a step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slope_cli.config.schema import Config, OptimConfig
from sparse_kernels import decay_pruned

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What both optimizers keep for each parameter, in its shape."""


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW or LAMB over all parameters; weight decay on matrices, none on biases and norms.

    The kept values of a sparse layer are a matrix like any other, so its state is that much smaller.
    """
    # Adapters that are there from the first step have their group from the first step.
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    early = [p for name, p in trained if ".adapter." in name] if config.adapter_step == 0 else []
    taken = set(map(id, early))
    parameters = [p for _, p in trained if id(p) not in taken]
    optim = config.optim
    # The maps of linear attention, which begin as the identity, are not to shrink towards zero.
    phase, decay = ("transfer", 0.0) if config.method == "linearize" else ("run", optim.weight_decay)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay, "phase": phase},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "phase": phase},
    ]
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    optimizer: torch.optim.Optimizer
    if optim.name == "adamw":
        optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    else:
        from pytorch_optimizer import Lamb

        # You et al. 2020 with the decay within the update that the trust ratio scales, and as NVIDIA's FusedLAMB, which
        # BERT was trained with: no ratio for biases and norms. No bias correction (adam_debias is this library's word
        # for that), which the ratio takes back where there is one. The step clips by itself.
        groups[1]["adam"] = True
        optimizer = Lamb(groups, weight_decouple=False, adam_debias=True, **settings)
        optimizer.clamp = math.inf  # the library's 10 would hold back every large matrix
    if early:
        add_adapter_group(optimizer, early, config)
    if config.method in ("slope", "sr_ste", "fst"):
        # After clipping, and within what a CUDA graph captures; layers without a dynamic mask have nothing to decay.
        optimizer.register_step_pre_hook(lambda *_: decay_pruned(model, config.sparsity.decay))
    return optimizer


def add_adapter_group(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], config: Config) -> None:
    """The adapters' own group: their learning rate, their decay, and a fresh state."""
    decay = config.adapters.weight_decay
    # adam: no trust ratio in LAMB, which of a matrix that begins at zero can make nothing.
    optimizer.add_param_group({"params": list(parameters), "weight_decay": decay, "phase": "adapters", "adam": True})


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    """Give every group its learning rate for a step (counted from 0).

    Returns:
        The run's; where it linearizes, that of what is trained in this step.
    """
    for group in optimizer.param_groups:
        rate = _rate(group["phase"], step, config)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # a captured step reads it from there
        else:
            group["lr"] = rate
    if config.method != "linearize":
        return _rate("run", step, config)
    return _rate("transfer" if config.adapter_step is None or step < config.adapter_step else "adapters", step, config)


def _rate(phase: str, step: int, config: Config) -> float:
    """The learning rate of the groups of a phase: run, adapters or transfer."""
    optim, adapters, steps = config.optim, config.adapters, config.train.steps
    if phase == "transfer" and config.adapter_step is not None and step >= config.adapter_step:
        return _rate("adapters", step, config)  # of maps that are trained on; with no gradient nothing reads it
    if phase == "transfer":
        last = steps if config.adapter_step is None else config.adapter_step
        return learning_rate(step, last, optim.warmup, config.linearize.transfer_lr, optim)
    run = learning_rate(step, steps, optim.warmup, optim.lr, optim)
    if phase == "adapters" and adapters.schedule == "run":
        return run * (adapters.lr or optim.lr) / optim.lr
    if phase == "adapters" and config.adapter_step is not None:
        since, left = step - config.adapter_step, steps - config.adapter_step
        return learning_rate(since, left, adapters.warmup, adapters.lr or optim.lr, optim)
    return run


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
    """Let `new` take the place of `old` in its group, with the state of `old` brought into its shape by `like`."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if state := optimizer.state.pop(old, None):
        optimizer.state[new] = state | {key: like(state[key]) for key in MOMENTS}


def make_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Let a CUDA graph hold the optimizer's step: state that is there already, learning rates in device memory.

    Returns:
        Whether it can: LAMB's step cannot.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return False
    for group in optimizer.param_groups:
        init_state(optimizer, group["params"])
        group["capturable"] = True
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
    return True


def learning_rate(step: int, steps: int, warmup: float, peak: float, optim: OptimConfig) -> float:
    """Linear warm-up to `peak`, then the schedule down to `optim.min_lr` of it at the last step.

    Args:
        step: from 0 to steps - 1.
        warmup: a share of `steps` if below 1, else a number of steps.
    """
    warmup_steps = round(warmup * steps) if warmup < 1 else int(warmup)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    left: float = {
        "cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
        "linear": 1 - done,
        "polynomial": (1 - done) ** optim.power,
        "constant": 1.0,
    }[optim.schedule]
    return peak * (optim.min_lr + (1 - optim.min_lr) * left)
