"""The optimizer, its parameter groups and state, and the learning rate of a step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from slope_cli.config.schema import Config, OptimConfig
from slope_cli.distributed.collectives import Group, sum_among
from slope_cli.linearize.swap import linear_windows
from slope_cli.methods.muon import hidden_matrices
from slope_cli.methods.muon_ranks import divided_updates
from slope_cli.methods.phases import ADAPTERS, MAPS, MATRICES, WEIGHTS, Phase, Phases, Rate
from sparse_kernels import decay_pruned
from sparse_kernels.sharded import local, of_whole

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state that optimizers keep for each parameter, in its shape; of what Muon updates the first alone."""


def build_optimizer(
    model: nn.Module, config: Config, phases: Phases, processes: Group | None = None
) -> torch.optim.Optimizer:
    """The optimizer of all parameters that are trained in the model's present phase, in groups with their rates.

    Weight decay is on the model's own matrices alone: not on biases and norms, nor on feature maps, which start as the
    identity and are not to shrink towards zero. The kept values of a sparse layer are a matrix like any other.

    processes: that take the steps together; None for this one alone.
    """
    decay = config.adapters.weight_decay
    optimizer = make_optimizer(model, config.optim, adapter_decay=decay, processes=processes)
    if phases.decay:
        # After clipping, and within what a CUDA graph captures; without masked layers there is nothing to decay.
        optimizer.register_step_pre_hook(lambda *_: decay_pruned(model, phases.decay))
    return optimizer


def make_optimizer(
    model: nn.Module, optim: OptimConfig, *, adapter_decay: float = 0.0, processes: Group | None = None
) -> torch.optim.Optimizer:
    """The optimizer of all parameters of a model that require a gradient: AdamW, LAMB or Muon; as `build_optimizer`."""
    groups = _groups(model, optim, adapter_decay)
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if optim.name == "muon":
        return Muon(model, groups, momentum=optim.momentum, processes=processes, **settings)
    return Lamb(groups, **settings)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020): Adam's update, with the weight's decay in it, times ||W|| / ||update|| for each matrix.

    Norms are those of whole matrices, where a process has only some of their rows, too. Without bias correction, which
    the ratio would cancel. In groups with "adam" the ratio is 1. Of a group's parameters all are split, or none.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        """
        Args:
            groups: as torch's optimizers take them.
            lr, betas, eps: of groups that have none of their own.
        """
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "adam": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                init_state(self, params)
                self._update(params, group)

    def _update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update some parameters, each process its own rows."""
        (beta1, beta2), eps = group["betas"], group["eps"]
        weights, grads = [local(p) for p in params], [local(cast(Tensor, p.grad)) for p in params]
        means, squares = ([local(self.state[p][key]) for p in params] for key in MOMENTS)
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, grads, alpha=1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        updates = torch._foreach_sqrt(squares)
        torch._foreach_add_(updates, eps)
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, means)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if not group["adam"]:
            norms = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(updates)])
            if isinstance(params[0], DTensor):
                norms = sum_among(norms.square_(), params[0].device_mesh.get_group("shard")).sqrt_()
            of_weights, of_updates = norms.chunk(2)
            ratios = torch.where((of_weights != 0) & (of_updates != 0), of_weights / (of_updates + eps), 1.0)
            torch._foreach_mul_(updates, ratios.unbind())
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


class Muon(torch.optim.Optimizer):
    """Muon for the hidden matrices of a model, AdamW in groups with "adam"; see `slope_cli.methods.muon`.

    The momentum is a decaying mean of gradients, of which the update looks one step ahead (Nesterov); weight decay is
    decoupled. Several processes divide the matrices among them; see `slope_cli.methods.muon_ranks`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        processes: Group | None = None,
    ) -> None:
        """
        Args:
            model: whose hidden layers tell, in each step, where the entries of their weights sit.
            groups: as torch's optimizers take them.
            lr: of groups that have none of their own.
            momentum: the decay rate of the mean.
            betas, eps: of AdamW.
            processes: that take the steps together; None for this one alone.
        """
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0, "adam": False}
        super().__init__(groups, defaults | {"fused": True})
        self._model, self.processes = model, processes or Group()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                init_state(self, params)
                if group["adam"]:
                    self._adamw(params, group)
                else:
                    self._update(params, group)

    def _adamw(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        means, squares = ([local(self.state[p][key]) for p in params] for key in MOMENTS)
        (beta1, beta2), steps = group["betas"], [self.state[p]["step"] for p in params]
        weights, grads = [local(p) for p in params], [local(cast(Tensor, p.grad)) for p in params]
        how = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        how |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False, "fused": True}
        adamw(weights, grads, means, squares, [], steps, **how)

    def _update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        found, lr, momentum = hidden_matrices(self._model), group["lr"], group["momentum"]
        grads = {p: local(cast(Tensor, p.grad)) for p in params}
        means = {p: local(self.state[p]["exp_avg"]) for p in params}
        torch._foreach_lerp_(list(means.values()), list(grads.values()), 1 - momentum)
        torch._foreach_mul_([local(p) for p in params], 1 - lr * group["weight_decay"])

        def ahead(weights: list[nn.Parameter]) -> list[Tensor]:
            own = [grads[p] for p in weights], [means[p] for p in weights]
            return list(torch._foreach_lerp(*own, momentum)) if weights else []

        for p, update in divided_updates({p: found[p] for p in params}, ahead, self.processes):
            weight = local(p)
            weight.sub_(update.to(weight.dtype) * lr)


def join(optimizer: torch.optim.Optimizer, model: nn.Module, config: Config) -> None:
    """Give what is trained from now on, and was not until now, groups of its own, with fresh state."""
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for group in _groups(model, config.optim, config.adapters.weight_decay):
        if new := [p for p in group["params"] if id(p) not in present]:
            optimizer.add_param_group({**group, "params": new})


def _groups(model: nn.Module, optim: OptimConfig, adapter_decay: float) -> list[dict[str, Any]]:
    """The parameters that require a gradient, in groups."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    windows = linear_windows(model).values()
    gates = [p for window in windows if window.gate is not None for p in window.gate.parameters() if p.requires_grad]
    adapters = [p for name, p in trained.items() if ".adapter." in name]
    gate_ids = set(map(id, gates))
    maps = [p for window in windows for p in window.parameters() if p.requires_grad and id(p) not in gate_ids]
    features = {id(feature_map.weight) for window in windows for feature_map in (window.map_q, window.map_k)}
    hidden = [p for p in hidden_matrices(model) if p.requires_grad] if optim.name == "muon" else []
    beside = {id(p) for p in (*adapters, *gates, *maps, *hidden)}
    groups: list[dict[str, Any]] = [{"params": hidden, "weight_decay": optim.weight_decay, "group": MATRICES}]
    weights = [p for p in trained.values() if id(p) not in beside]
    matrices = {id(p) for p in weights if p.dim() >= 2} | features
    for group, decay, own in ((WEIGHTS, optim.weight_decay, weights), (MAPS, 0.0, maps)):
        params = [p for p in own if id(p) in matrices]
        groups.append({"params": params, "weight_decay": decay, "group": group, "adam": optim.name == "muon"})
        # In LAMB without a trust ratio for biases and norms, as in NVIDIA's FusedLAMB, which BERT was trained with; nor
        # for what starts at zero beside feature maps: its own norm would keep it there.
        params = [p for p in own if id(p) not in matrices]
        groups.append({"params": params, "weight_decay": 0.0, "group": group, "adam": True})
    # adam: neither LAMB's trust ratio nor Muon works for a matrix that starts at zero, one of two that are multiplied.
    for late in (adapters, gates):  # adapters may be split over processes, and gates are not
        groups.append({"params": late, "weight_decay": adapter_decay, "group": ADAPTERS, "adam": True})
    return [group for group in groups if group["params"]]


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
    warmup_steps = span(rate.warmup, steps)
    if step < warmup_steps:
        return rate.peak * (step + 1) / warmup_steps
    if optim.schedule == "wsd":
        decay_steps = min(span(optim.decay, steps), steps - warmup_steps)
        done = max(0, step + 1 - (steps - decay_steps)) / max(1, decay_steps)  # the first step of the decay falls, too
    else:
        done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    left: float = {
        "cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
        "linear": 1 - done,
        "polynomial": (1 - done) ** optim.power,
        "constant": 1.0,
        "wsd": 1 - (math.sqrt(done) if optim.decay_shape == "sqrt" else done),
    }[optim.schedule]
    return rate.peak * (optim.min_lr + (1 - optim.min_lr) * left)


def span(length: float, steps: int) -> int:
    """The steps of a warm-up or a decay: a share of `steps` if below 1, else a number of steps."""
    return round(length * steps) if length < 1 else int(length)


# ------------------------------------------------------------------------------------------------------------- state


def init_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Make the state of parameters that have none, as the optimizer's first step would: zeros."""
    matrices = {p for group in optimizer.param_groups if group.get("group") == MATRICES for p in group["params"]}
    for p in parameters:
        if not optimizer.state[p]:
            optimizer.state[p] = {key: torch.zeros_like(p) for key in (MOMENTS[:1] if p in matrices else MOMENTS)}
            if not isinstance(optimizer, Lamb) and p not in matrices:
                device = p.device if optimizer.defaults["fused"] else torch.device("cpu")
                optimizer.state[p]["step"] = torch.zeros((), device=device)


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What the optimizer keeps of a parameter in its shape; nothing before its first step."""
    state = optimizer.state.get(parameter, {})
    return [state[key] for key in MOMENTS if key in state]


def replace_parameter(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    like: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Replace `old` by `new` in its group, with the state of `old`.

    Args:
        like: brings whole moments into the new shape, if it is another one. Split moments are gathered for it, and
            split again.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if state := optimizer.state.pop(old, None):
        changed = {} if like is None else {key: of_whole(state[key], like) for key in MOMENTS if key in state}
        optimizer.state[new] = state | changed


def drop_parameters(optimizer: torch.optim.Optimizer, gone: Iterable[nn.Parameter]) -> None:
    """Forget parameters that the model has no more, and their state."""
    left_out = {id(p): p for p in gone}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in left_out]
    for p in left_out.values():
        optimizer.state.pop(p, None)


def make_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Prepare the optimizer's step for capture in a CUDA graph: state allocated, learning rates in device memory.

    Returns:
        Whether it can be captured: LAMB's cannot, nor Muon's with its collectives.
    """
    if isinstance(optimizer, Lamb) or (isinstance(optimizer, Muon) and optimizer.processes.several):
        return False
    for group in optimizer.param_groups:
        init_state(optimizer, group["params"])
        group["capturable"] = True
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
    return True
