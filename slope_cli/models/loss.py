"""A model's predictions for a batch, and the pretraining losses: of the next token, or of masked ones as in BERT.

Shape suffixes: B sequences, T positions, V vocabulary, N = B·T, W width of the model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from slope_cli.data.batches import IGNORED_LABEL
from slope_cli.models.shapes import FAMILIES, objective

CrossEntropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Batch = Mapping[str, Tensor]
"""input_ids (B, T) int64, and what goes with them; see `forward` and `loss_fn`."""

LossAndGradient = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`loss_and_gradient_`, or a compiled one."""

ROWS_AT_ONCE = 4096
LOGITS_AT_ONCE = 2**29
"""Of the logits of a training step, at most: 1 GiB in 16 bits."""
UNPADDED = "sdpa_unpadded"
"""Scaled dot product attention for batches without padding. transformers builds a mask tensor wherever it sees a
compiler or a CUDA graph, which rules out the fused kernels; it builds none for an attention function that has no mask
function of its own."""

AttentionInterface.register(UNPADDED, sdpa_attention_forward)


class Output(NamedTuple):
    """logits (B, T, V) of tokens, and sentence_logits (B, 2) of whether the second sentence follows the first: BERT."""

    logits: Tensor
    sentence_logits: Tensor | None = None


class Loss(NamedTuple):
    """The loss of one batch, scalars on the model's device.

    token_loss: float32, the mean cross-entropy in nats of the predicted tokens, of which perplexity is the exponential.
    targets: int64, how many tokens that mean is over; without any it is 0.
    sentence_loss: the mean cross-entropy of the next sentence, which is added to it; None where it is not predicted.
    """

    token_loss: Tensor
    targets: Tensor
    sentence_loss: Tensor | None = None


def forward(model: PreTrainedModel, batch: Batch) -> Output:
    """Predict the tokens of a batch.

    Args:
        model: of `build_model`, or any causal model of transformers.
        batch: input_ids; in a model that predicts masked tokens also token_type_ids and attention_mask, where there are
            any, int64, (B, T).
    """
    config = model.config
    if objective(config) == "causal":
        with _without_padding(config):
            return Output(model(input_ids=batch["input_ids"], use_cache=False).logits)
    inputs = {key: batch[key] for key in ("input_ids", "token_type_ids", "attention_mask") if key in batch}
    with contextlib.nullcontext() if "attention_mask" in batch else _without_padding(config):
        output = model(**inputs)
    return Output(output.prediction_logits, output.seq_relationship_logits)


@contextlib.contextmanager
def _without_padding(config: PreTrainedConfig) -> Iterator[None]:
    """Within it, softmax attention gets no mask tensor, only its causal flag.

    Except in models that may need more than that: with a sliding window, or of an unknown family.
    """
    if config.model_type not in FAMILIES or getattr(config, "sliding_window", None) is not None:
        yield
        return
    before, config._attn_implementation = config._attn_implementation, UNPADDED
    try:
        yield
    finally:
        config._attn_implementation = before


def loss_fn(output: Output, batch: Batch, cross_entropy: CrossEntropy | None = None) -> Loss:
    """The pretraining loss of what a model predicted, computed in float32 without waiting for the device.

    Args:
        batch: labels (B, T), -100 where nothing is predicted, for causal models already shifted: labels[b, t] is the
            token after input_ids[b, t]; next_sentence_label (B,), where there is one. All int64.
        cross_entropy: `token_cross_entropy`, or a compiled one.
    """
    token_loss, targets = (cross_entropy or token_cross_entropy)(output.logits, batch["labels"])
    if output.sentence_logits is None or "next_sentence_label" not in batch:
        return Loss(token_loss, targets)
    return Loss(token_loss, targets, F.cross_entropy(output.sentence_logits.float(), batch["next_sentence_label"]))


def token_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy in nats over labels other than -100, float32, and their number, int64; both scalars."""
    # Unlabelled rows are not indexed away: a shape that depends on the data would make the host wait for the device.
    targets = (labels_BT != IGNORED_LABEL).sum()
    rows_V, labels = logits_BTV.flatten(0, 1), labels_BT.flatten()
    # Without gradients, the float32 copy of the logits is made in parts.
    size = len(labels) if torch.is_grad_enabled() else ROWS_AT_ONCE
    parts = (slice(start, start + size) for start in range(0, len(labels), size))
    losses = [
        F.cross_entropy(rows_V[part].float(), labels[part], ignore_index=IGNORED_LABEL, reduction="sum")
        for part in parts
    ]
    summed = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return summed / targets.clamp(min=1), targets


# ---------------------------------------------------------------------------------------------------------------------
# The loss of a training step without all its logits


def training_loss(
    model: PreTrainedModel,
    batch: Batch,
    cross_entropy: CrossEntropy | None = None,
    loss_and_gradient: LossAndGradient | None = None,
) -> Loss:
    """As `loss_fn` of `forward`, to be optimised: where nothing else needs the logits, they are never all there.

    Then the head computes the logits of some tokens in the products' dtype, and their loss; their gradient takes their
    place, and its products with the head's weight and input are made at once, as in Liger (arXiv 2410.10989). So in
    models that predict the next token by a linear head without a bias.

    Args:
        cross_entropy: of other models, `token_cross_entropy` or a compiled one.
        loss_and_gradient: `loss_and_gradient_` or a compiled one.
    """
    head: Any = model.get_output_embeddings()
    causal = model.config.model_type in FAMILIES and objective(model.config) == "causal"
    plain = type(head) is nn.Linear and [name for name, _ in head.named_parameters()] == ["weight"]
    if not (causal and plain and torch.is_grad_enabled()):
        return loss_fn(forward(model, batch), batch, cross_entropy)
    labels_N = batch["labels"].flatten()
    targets = (labels_N != IGNORED_LABEL).sum()

    def loss_of(X_BTW: Tensor) -> Tensor:
        device, step = X_BTW.device.type, loss_and_gradient or loss_and_gradient_
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else X_BTW.dtype
        loss: Tensor = _HeadLoss.apply(X_BTW.flatten(0, 1), head.weight, labels_N, targets, dtype, step)
        return loss

    # Within the model's forward pass, for whose time alone a split weight is whole.
    head.forward = loss_of
    try:
        token_loss = forward(model, batch).logits
    finally:
        del head.forward
    return Loss(token_loss, targets)


class _HeadLoss(torch.autograd.Function):
    """The mean cross-entropy of X · W^T, whose gradient is computed in the forward pass, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        X_NW: Tensor,
        W_VW: Tensor,
        labels_N: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        loss_and_gradient: LossAndGradient,
    ) -> Tensor:
        needs_X, needs_W = ctx.needs_input_grad[:2]
        X, W, share = X_NW.to(dtype), W_VW.to(dtype), targets.clamp(min=1).float().reciprocal()
        # Equal parts, of one compiled shape but for the last.
        parts = -(-len(X) * len(W) // LOGITS_AT_ONCE)
        rows = -(-len(X) // parts)
        several = rows < len(X)
        dX_NW = torch.empty_like(X) if needs_X else None
        dW_VW: Tensor | None = None
        losses = []
        with torch.autocast(X.device.type, enabled=False):
            for start in range(0, len(X), rows):
                part = slice(start, start + rows)
                logits_nV = F.linear(X[part], W)  # [n,W] · [V,W]^T -> [n,V]
                losses.append(loss_and_gradient(logits_nV, labels_N[part], share))
                if dX_NW is not None:
                    torch.mm(logits_nV, W, out=dX_NW[part])  # [n,V] · [V,W] -> [n,W]
                if needs_W:
                    product_VW = logits_nV.t() @ X[part]  # [V,n] · [n,W] -> [V,W]
                    if several and dW_VW is None:
                        dW_VW = product_VW.to(torch.promote_types(dtype, torch.float32))
                    else:
                        dW_VW = product_VW if dW_VW is None else dW_VW.add_(product_VW)
                del logits_nV
        ctx.save_for_backward(dX_NW, dW_VW)
        ctx.dtypes = X_NW.dtype, W_VW.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((None if g is None else (g * dloss).to(dtype)) for g, dtype in gradients), None, None, None, None


def loss_and_gradient_(logits_nV: Tensor, labels_n: Tensor, share: Tensor) -> Tensor:
    """The cross-entropies in nats of rows of logits with a label other than -100, summed and times `share`.

    In float32 or more of rows of any dtype; their gradient with respect to the logits takes the logits' place.
    """
    size = len(labels_n) if torch.compiler.is_compiling() else ROWS_AT_ONCE
    losses = []
    for start in range(0, len(labels_n), size):
        logits_rV, labels_r = logits_nV[start : start + size], labels_n[start : start + size, None]
        counted = labels_r != IGNORED_LABEL
        logs_rV = logits_rV.to(torch.promote_types(logits_rV.dtype, torch.float32)).log_softmax(-1)
        picked = logs_rV.gather(1, labels_r.clamp(min=0))
        losses.append(torch.where(counted, -picked, 0).sum() * share)
        places_V = torch.arange(logits_rV.shape[1], device=logits_rV.device)
        shares_rV = torch.where(places_V == labels_r, logs_rV.exp() - 1, logs_rV.exp())
        logits_rV.copy_(shares_rV * torch.where(counted, share, 0))
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def kl_divergence(logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """KL(teacher || student) in nats, the mean over positions with a label, a float32 scalar."""
    student_BTV, teacher_BTV = logits_BTV.float().log_softmax(-1), teacher_BTV.float().log_softmax(-1)
    kl_BT = (teacher_BTV.exp() * (teacher_BTV - student_BTV)).sum(-1)
    counted_BT = labels_BT != IGNORED_LABEL
    return (kl_BT * counted_BT).sum() / counted_BT.sum().clamp(min=1)


def autocast(device: torch.device) -> torch.autocast:
    """The autocast for evaluating and fine-tuning a trained model: bf16 on a GPU, its own precision elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
