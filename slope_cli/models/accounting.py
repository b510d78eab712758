"""Parameters, bytes and floating-point operations of a run, counted from its shapes: nothing is allocated.

Embeddings and heads are counted as they are. Bytes are exact for the training state, apart from the four that AdamW
counts its steps with for each parameter tensor; activations are an estimate.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slope_cli.config.schema import Config
from slope_cli.models import shapes
from sparse_kernels import LayerReport, Report
from sparse_kernels.convert import adapter_rank


@dataclass(frozen=True)
class Account:
    """Of the sparse run, and of the dense run of the same model, in numbers of parameters and in bytes."""

    dense_parameters: int
    trained_parameters: int
    """Before the adapters join."""
    active_parameters: int
    """Those that are not pruned, before the adapters join."""
    adapter_parameters: int
    state_bytes: dict[str, int]
    """With the adapters."""
    dense_state_bytes: dict[str, int]
    derived_bytes: dict[str, int]
    """What the sparse layers keep beside the state to compute with, never saved; the device decides which."""
    activation_bytes: int
    dense_flops_per_token: int
    """Forward and backward of every linear layer and of attention."""
    real_flops_per_token: int
    """Without the products with pruned weights, before the adapters join."""
    adapter_flops_per_token: int


def account(config: Config, report: Report | None, model: PreTrainedModel) -> Account:
    """Count a run.

    Args:
        report: of the sparse layers, or None for a dense run.
        model: the dense model, on any device; "meta" will do.
    """
    swapped = report.swapped if report is not None else ()
    pruned = sum(layer.out_features * layer.in_features for layer in swapped)
    active = sum(layer.out_features * layer.in_features * layer.n // layer.m for layer in swapped)
    slope = config.method == "slope"  # the other sparse methods train dense weights, and compute with them
    kept = active if slope else pruned
    adapters = sum(_adapter_parameters(config, layer) for layer in swapped)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = parameters - pruned + kept
    state = {
        **_adamw_bytes(trained),
        "positions": sum(map(position_bytes, swapped)) if slope else pruned,
        "adapters with their state": 16 * adapters,
    }
    dense = 6 * _linear_weights(model) + _attention_flops(config, model)
    layers, width, vocab = model.config.num_hidden_layers, shapes.width(model.config), shapes.vocab_size(model.config)
    return Account(
        dense_parameters=parameters,
        trained_parameters=trained,
        active_parameters=parameters - pruned + active,
        adapter_parameters=adapters,
        state_bytes=state,
        dense_state_bytes=_adamw_bytes(parameters),
        # Packed, a 16-bit weight takes 9/16 of its dense bytes, twice; in plain torch each kept entry has an int64
        # index and a flag.
        derived_bytes={"on a GPU, packed": 9 * pruned // 4, "on a CPU, index": 9 * kept} if slope else {},
        # 34 bytes a token, layer and feature in 16 bits with fused attention (Korthikanti et al. 2022, section 4.1),
        # and the logits with their gradient in float32.
        activation_bytes=config.train.micro_batch * config.train.seq_len * (34 * layers * width + 8 * vocab),
        dense_flops_per_token=dense,
        # Of the three products, the forward and the input gradient are sparse.
        real_flops_per_token=dense - 4 * (pruned - kept),
        adapter_flops_per_token=6 * adapters,
    )


def _adapter_parameters(config: Config, layer: LayerReport) -> int:
    if config.adapter_step is None:
        return 0
    rank = adapter_rank(config.adapters.rank, layer.out_features, layer.in_features)
    return rank * (layer.out_features + layer.in_features)


def _adamw_bytes(parameters: int) -> dict[str, int]:
    return {"weights (float32)": 4 * parameters, "gradients (float32)": 4 * parameters, "AdamW moments": 8 * parameters}


def position_bytes(layer: LayerReport) -> int:
    """A bit for each weight in positions and one in positions_t, both padded to whole bytes along a row."""
    return layer.out_features * -(-layer.in_features // 8) + layer.in_features * -(-layer.out_features // 8)


def _linear_weights(model: PreTrainedModel) -> int:
    """Weights that take part in a product: a lookup in an embedding is none, a head tied to one is."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | Conv1D))


def _attention_flops(config: Config, model: PreTrainedModel) -> int:
    """Scores and weighted sums, forward and backward: 12 T·d a token and layer, half of it if attention is causal."""
    each = 12 if shapes.objective(model.config) == "masked" else 6
    return int(each * model.config.num_hidden_layers * config.train.seq_len * shapes.width(model.config))
