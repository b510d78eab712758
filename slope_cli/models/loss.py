"""A model's predictions for a batch, and the pretraining losses: of the next token, or of masked ones as in BERT.

Shape suffixes: B sequences, T positions, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from slope_cli.data.batches import IGNORED_LABEL
from slope_cli.models.shapes import FAMILIES, objective

CrossEntropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Batch = Mapping[str, Tensor]
"""input_ids (B, T) int64, and what goes with them; see `forward` and `loss_fn`."""

ROWS_AT_ONCE = 4096
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


def kl_divergence(logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """KL(teacher || student) in nats, the mean over positions with a label, a float32 scalar."""
    student_BTV, teacher_BTV = logits_BTV.float().log_softmax(-1), teacher_BTV.float().log_softmax(-1)
    kl_BT = (teacher_BTV.exp() * (teacher_BTV - student_BTV)).sum(-1)
    counted_BT = labels_BT != IGNORED_LABEL
    return (kl_BT * counted_BT).sum() / counted_BT.sum().clamp(min=1)


def autocast(device: torch.device) -> torch.autocast:
    """The autocast for evaluating and fine-tuning a trained model: bf16 on a GPU, its own precision elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
