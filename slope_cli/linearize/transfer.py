"""Stage 1, attention transfer: each layer's linearized attention learns softmax attention's output.

The model runs as the original one, so every layer sees the original hidden states; in passing, each linearized layer
computes both attentions from the same q, k, v and goes backward at once, into its own maps and mix factors only. Of all
layers' losses only one has a graph at any time, and no hidden state is kept.

Shape suffixes: B sequences, H query heads, G KV heads, T positions, D head dimension, F features, C queries in a chunk,
S keys.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from slope_cli.errors import UsageError
from slope_cli.linearize.cache import leading_padding
from slope_cli.linearize.exact_cache import entries_of_queries
from slope_cli.linearize.linear_attention import SHORTEST_CHUNK, weights_of
from slope_cli.linearize.linear_window import LinearWindow
from slope_cli.linearize.maps import SMALLEST
from slope_cli.linearize.swap import linear_windows, using


class LayerLoss(NamedTuple):
    """One layer's loss, three float32 scalars on its device: total = mse_weight · mse + entropy_weight · entropy.

    mse: mean over real tokens, heads and head dimensions of the squared difference of the attentions' outputs before
    the output projection. entropy: mean over real tokens and heads of the cross-entropy of the linearized attention's
    weights under softmax attention's; 0 if it has no weight.
    """

    total: Tensor
    mse: Tensor
    entropy: Tensor


def transfer_losses(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    mse_weight: float = 1000.0,
    entropy_weight: float = 0.0,
    scale: float = 1.0,
    backward: bool = True,
    compiled: bool = False,
) -> dict[str, LayerLoss]:
    """Run a linearized model once as its own teacher and return each layer's loss, by the attention module's name.

    The gradients of `scale` times the losses are added to the maps' and mixes' .grad, each during its layer's forward;
    with backward=False nothing goes backward, and the losses have their graphs, all at once. Nothing else gets a
    gradient. Runs the model without its head, under no_grad; dropout is as model.training says.

    Args:
        inputs: of the model: input_ids (B, T), and attention_mask (B, T) where there is padding.
        scale: for example 1 / the number of batches whose gradients are added up.
        compiled: compile each layer's loss, forward and backward; the model around it is the caller's to compile.

    Raises:
        UsageError: the model is not linearized.
    """
    if not linear_windows(model):
        raise UsageError("transfer: the model is not linearized")
    losses: dict[str, LayerLoss] = {}
    observed = _observed(model, losses, mse_weight, entropy_weight, scale, backward)
    with using(model, mode="transfer", compiled=compiled), observed, headless(model), torch.no_grad():
        model(**{**inputs, "use_cache": False})
    return losses


@contextlib.contextmanager
def headless(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a call of the model runs it without its head: its own call, with its hooks, by which FSDP2 gathers."""
    model.__dict__["forward"] = model.base_model
    try:
        yield
    finally:
        del model.__dict__["forward"]


@contextlib.contextmanager
def _observed(
    model: PreTrainedModel,
    losses: dict[str, LayerLoss],
    mse_weight: float,
    entropy_weight: float,
    scale: float,
    backward: bool,
) -> Iterator[None]:
    """Within it, each linearized layer's forward pass puts its loss into `losses`."""
    names = {linear: name for name, linear in linear_windows(model).items()}

    def observe(linear: LinearWindow, *attended: Any) -> None:
        loss_of = _compiled_loss() if linear.compiled else layer_loss
        with torch.enable_grad():
            loss = loss_of(linear, *attended, mse_weight=mse_weight, entropy_weight=entropy_weight)
            if backward:
                (scale * loss.total).backward()
                loss = LayerLoss(*(part.detach() for part in loss))
        losses[names[linear]] = loss

    try:
        for linear in names:
            # A compiled block cannot contain a backward pass: it is split there. The loss itself is compiled.
            linear.observer = torch.compiler.disable(observe, recursive=False)
        yield
    finally:
        for linear in names:
            linear.observer = None


def layer_loss(
    linear: LinearWindow,
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    scale: float,
    keep_BT: Tensor | None,
    y_BHTD: Tensor,
    *,
    mse_weight: float,
    entropy_weight: float,
) -> LayerLoss:
    """The loss of one layer against softmax attention's output y; q, k, v and y get no gradient."""
    q_BHTD, k_BGTD, v_BGTD = q_BHTD.detach(), k_BGTD.detach(), v_BGTD.detach()
    learned_BHTD = linear.compute(q_BHTD, k_BGTD, v_BGTD, scale, keep_BT)
    square_BHT = (learned_BHTD - y_BHTD.detach().to(learned_BHTD.dtype)).square().mean(-1)
    mse = _mean_of_real(square_BHT, keep_BT)
    entropy = torch.zeros_like(mse)
    if entropy_weight:
        entropy = _entropy(linear, q_BHTD, k_BGTD, v_BGTD, scale, keep_BT)
    return LayerLoss(mse_weight * mse + entropy_weight * entropy, mse, entropy)


@functools.cache
def _compiled_loss() -> Callable[..., LayerLoss]:
    """`layer_loss` compiled, one function for all layers; anew for another length, once, and then for any."""
    return torch.compile(layer_loss)


def _entropy(
    linear: LinearWindow, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float, keep_BT: Tensor | None
) -> Tensor:
    """The mean cross-entropy of weights, held for one chunk of queries at a time, in the backward pass too."""
    assert linear.mix is not None  # the delta rule has no weights
    (B, _, T, D) = q_BHTD.shape
    if keep_BT is None:
        keep_BT = torch.ones(B, T, dtype=torch.bool, device=q_BHTD.device)
    with torch.autocast(q_BHTD.device.type, enabled=False):
        q_BHTD, k_BGTD, v_BGTD = q_BHTD.float(), k_BGTD.float(), v_BGTD.float()
        phi_q_BHTF, phi_k_BGTF = linear.map_q(q_BHTD * (scale * D**0.5)), linear.map_k(k_BGTD)
        first_B, gamma_H, entries_BGTX = leading_padding(keep_BT).neg(), linear.mix.sigmoid(), None
        if linear.pattern.cache:
            entries_BGTX = entries_of_queries(k_BGTD, v_BGTD, keep_BT, linear.maps, linear.pattern, first_B)
        log_gates_BGT = None if linear.gate is None else linear.gate(k_BGTD) * keep_BT[:, None]

        def rows(
            q_BHCD: Tensor,
            phi_q_BHCF: Tensor,
            phi_k_BGSF: Tensor,
            log_gates_BGS: Tensor | None,
            mix_H: Tensor,
            start: int,
        ) -> Tensor:
            target_BHCS, weight_BHCS = weights_of(
                q_BHCD,
                phi_q_BHCF,
                k_BGTD,
                phi_k_BGSF,
                keep_BT,
                mix_H,
                linear.pattern,
                scale,
                start=start,
                first_B=first_B,
                entries_BGCX=None if entries_BGTX is None else entries_BGTX[:, :, start : start + q_BHCD.shape[2]],
                log_gates_BGS=log_gates_BGS,
            )
            return -(target_BHCS * weight_BHCS.clamp(min=SMALLEST).log()).sum(-1)

        entropies = []
        for start in range(0, T, SHORTEST_CHUNK):
            part = slice(start, start + SHORTEST_CHUNK)
            arguments = (q_BHTD[:, :, part], phi_q_BHTF[:, :, part], phi_k_BGTF, log_gates_BGT, gamma_H, start)
            entropies.append(checkpoint(rows, *arguments, use_reentrant=False))
        return _mean_of_real(torch.cat(entropies, dim=-1), keep_BT)


def _mean_of_real(x_BHT: Tensor, keep_BT: Tensor | None) -> Tensor:
    """The mean over heads and real tokens."""
    if keep_BT is None:
        return x_BHT.mean()
    return (x_BHT * keep_BT[:, None]).sum() / (keep_BT.sum().clamp(min=1) * x_BHT.shape[1])
