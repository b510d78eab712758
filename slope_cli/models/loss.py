"""The pretraining losses.

Shape suffixes: B sequences, T positions, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from slope_cli.models.shapes import Objective

CrossEntropy = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor]"]

IGNORED_LABEL = -100
ROWS_AT_ONCE = 4096


class Loss(NamedTuple):
    """The loss of one batch, three scalars on the model's device.

    total: float32, what to call backward on. token_loss: float32, detached, the mean cross-entropy in nats of the
    predicted tokens, of which perplexity is the exponential. targets: int64, how many tokens that mean is over.
    """

    total: Tensor
    token_loss: Tensor
    targets: Tensor


def batch_loss(
    model: Callable[..., Any],
    batch: Mapping[str, Tensor],
    objective: Objective,
    cross_entropy: CrossEntropy | None = None,
) -> Loss:
    """The pretraining loss of one batch, computed in float32 without waiting for the device.

    model: a model of `build_model`, or a wrapper that forwards to it (DDP, torch.compile).
    batch, all int64: input_ids (B, T); labels (B, T), -100 where nothing is predicted. For "causal" labels are already
    shifted: labels[b, t] is the token after input_ids[b, t]. For "masked" token_type_ids and attention_mask (B, T) are
    passed on if there, and the mean cross-entropy of next_sentence_label (B,) is added if there.

    A batch without any target has token_loss 0. cross_entropy: `token_cross_entropy`, or a compiled one.
    """
    cross_entropy = cross_entropy or token_cross_entropy
    if objective == "causal":
        with _unpadded(model):
            logits_BTV = model(input_ids=batch["input_ids"], use_cache=False).logits
        token_loss, targets = cross_entropy(logits_BTV, batch["labels"])
        return Loss(token_loss, token_loss.detach(), targets)
    return _masked_loss(model, batch, cross_entropy)


def _masked_loss(model: Callable[..., Any], batch: Mapping[str, Tensor], cross_entropy: CrossEntropy) -> Loss:
    inputs = {key: batch[key] for key in ("input_ids", "token_type_ids", "attention_mask") if key in batch}
    with _unpadded(model) if "attention_mask" not in batch else contextlib.nullcontext():
        output = model(**inputs)
    token_loss, targets = cross_entropy(output.prediction_logits, batch["labels"])
    if "next_sentence_label" not in batch:
        return Loss(token_loss, token_loss.detach(), targets)
    sentence_loss = F.cross_entropy(output.seq_relationship_logits.float(), batch["next_sentence_label"])
    return Loss(token_loss + sentence_loss, token_loss.detach(), targets)


@contextlib.contextmanager
def _unpadded(model: Any) -> Iterator[None]:
    """Within it, attention gets no mask tensor, only its flag: right for batches without padding.

    transformers builds a mask tensor wherever it sees a compiler or a CUDA graph at work, which rules out the fused
    attention kernels. For an attention function without a mask function of its own it builds none.
    """
    AttentionInterface.register("sdpa_unpadded", sdpa_attention_forward)
    before, model.config._attn_implementation = model.config._attn_implementation, "sdpa_unpadded"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def token_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy in nats over labels other than -100, float32, and their number, int64; both scalars."""
    # Unlabelled rows are not indexed away: a shape that depends on the data would make the host wait for the device.
    targets = (labels_BT != IGNORED_LABEL).sum()
    rows_V, labels = logits_BTV.flatten(0, 1), labels_BT.flatten()
    # Where there is no gradient to make, the float32 copy of the logits need not be there as a whole.
    size = len(labels) if torch.is_grad_enabled() else ROWS_AT_ONCE
    parts = (slice(start, start + size) for start in range(0, len(labels), size))
    losses = [
        F.cross_entropy(rows_V[part].float(), labels[part], ignore_index=IGNORED_LABEL, reduction="sum")
        for part in parts
    ]
    summed = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return summed / targets.clamp(min=1), targets


def autocast(device: torch.device) -> torch.autocast:
    """What a trained model is judged and tuned in: bf16 on a GPU, its own precision elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
