"""Parameters, bytes and floating-point operations of a run, counted from its shapes: nothing is allocated.

Embeddings and heads are counted as they are. Bytes are exact for the training state, apart from AdamW's 4-byte step
count of each parameter tensor; activations are an estimate.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slope_cli.config.schema import Config
from slope_cli.distributed.layouts import Sizes, Unit
from slope_cli.linearize.hidden_states import states_on_disk
from slope_cli.linearize.layer_range import learning_ranges, ranges_of
from slope_cli.linearize.swap import linear_windows
from slope_cli.methods import phases_of
from slope_cli.methods.apply import UNTOUCHED, apply
from slope_cli.methods.muon import Matrix, hidden_matrices
from slope_cli.methods.phases import MAPS
from slope_cli.models import shapes
from slope_cli.models.build import transformer_blocks
from slope_cli.models.loss import LOGITS_AT_ONCE
from sparse_kernels import (
    AdaptedLinear,
    MaskedLinear,
    SparseLinear,
    adapters_of,
    backends,
    masked_layers,
    sparse_layers,
)
from sparse_kernels.formats import BF16
from sparse_kernels.layers import alike

TEACHER = "teacher"
"""Of the state of a run: the weights in float32, and masks, that a teacher has for itself."""
DENSE = nn.Linear | Conv1D | MaskedLinear | AdaptedLinear
LINEAR = DENSE | SparseLinear


@dataclass(frozen=True)
class Counts:
    """Of a model in one phase, in numbers of parameters.

    weights: those that are stored, adapters and feature maps aside; of a sparse layer the kept ones.
    trained: those of them that are trained.
    active: those of them that no mask prunes.
    adapters, trained_adapters: of adapters, and of those among them that are trained.
    maps, trained_maps: of what linearizing adds, feature maps, mix factors and gates, and of what is trained of it.
    linear: entries of the weights that take part in a product: a lookup in an embedding is none, a head tied to one is.
    sparse, stored_sparse: entries of the weights of sparse layers, and those of them that are stored.
    pruned_layers: entries of the weights of layers that are sparse or under a mask.
    mask_bytes: of all masks.
    """

    weights: int
    trained: int
    active: int
    adapters: int
    trained_adapters: int
    maps: int
    trained_maps: int
    linear: int
    sparse: int
    stored_sparse: int
    pruned_layers: int
    mask_bytes: int


def count(model: nn.Module) -> Counts:
    """Count a model as it is, on any device."""
    adapters, windows = adapters_of(model).values(), linear_windows(model).values()
    beside = {id(p) for module in (*adapters, *windows) for p in module.parameters()}
    weights = [p for p in model.parameters() if id(p) not in beside]
    sparse, masked = [x for _, x in sparse_layers(model)], [x for _, x in masked_layers(model)]
    entries = sum(x.out_features * x.in_features for x in sparse)
    under_mask = [x.weight.numel() for x in masked if not x.unmasked]
    masked_away = sum(x.weight.numel() * (x.m - x.n) // x.m for x in masked if not x.unmasked)
    bits = [bits for x in sparse for bits in (x.row_mask_bits, x.backward_mask_bits)]
    return Counts(
        weights=sum(p.numel() for p in weights),
        trained=sum(p.numel() for p in weights if p.requires_grad),
        active=sum(p.numel() for p in weights) - masked_away,
        adapters=sum(map(_parameters, adapters)),
        trained_adapters=sum(_parameters(x) for x in adapters if x.lora_A.requires_grad),
        maps=sum(map(_parameters, windows)),
        trained_maps=sum(p.numel() for window in windows for p in window.parameters() if p.requires_grad),
        linear=entries + sum(x.weight.numel() for x in model.modules() if isinstance(x, DENSE)),
        sparse=entries,
        stored_sparse=sum(x.values.numel() for x in sparse),
        pruned_layers=entries + sum(under_mask),
        mask_bytes=sum(mask.nbytes for mask in (*bits, *(x.mask for x in masked))),
    )


class Flops(NamedTuple):
    """Floating-point operations of a model for a token, forward and backward.

    dense_equivalent: of the dense model: every linear layer, and attention. real: those that are computed, without
    pruned weights in sparse products, and with adapters. Neither counts activations that are computed again.
    """

    dense_equivalent: int
    real: int

    def utilization(self, tokens_per_s: float, peak: float) -> dict[str, float]:
        """Model FLOPs utilization (MFU) of both kinds, as the log has it.

        Args:
            tokens_per_s: of all GPUs together.
            peak: FLOP/s of all GPUs together, of dense products: of sparse ones a GPU may do up to twice as many.
        """
        shares = (tokens_per_s * number / peak for number in self)
        return {f"mfu_{name}": share for name, share in zip(self._fields, shares, strict=True)}


def flops(model: PreTrainedModel, config: Config) -> Flops | None:
    """Of a model in its phase, for sequences of train.seq_len; None if its attention is linearized.

    On a GPU a product of a sparse layer counts as sparse if one has run so; elsewhere all count as on a GPU that has
    2:4 products for them.
    """
    if linear_windows(model):
        return None
    now, saved = count(model), 0
    chosen = {row.name: (row.forward, row.input_grad) for row in backends(model)}
    for name, layer in sparse_layers(model):
        # Of the three products, the forward and the input gradient are sparse.
        ran = sum(choice is not None and choice.sparse for choice in chosen.get(name, ()))
        sparse = ran if layer.values.is_cuda else 2
        saved += 2 * sparse * (layer.out_features * layer.in_features - layer.values.numel())
    dense = 6 * now.linear + _attention_flops(config, model)
    return Flops(dense, dense - saved + 6 * now.adapters)


@dataclass(frozen=True)
class Account:
    """Of a run in its last phase, and of the dense run of the same model, in numbers of parameters and in bytes.

    dense_parameters: of the dense model.
    trained_parameters, active_parameters: weights that are trained, and that are not pruned; adapters and maps aside.
    frozen_parameters: weights, and adapters, that are stored and not trained.
    adapter_parameters: of trained adapters; pretrained_adapter_parameters: those that the run begins with among them.
    map_parameters, trained_map_parameters: of feature maps, mix factors and gates, and of those that are trained.
    all_adapter_parameters: of adapters, trained or not.
    linear_weights, pruned_layer_weights: entries of the weights of all linear layers, and of those that are pruned.
    state_bytes, dense_state_bytes: of the training state, by its parts.
    derived_bytes: of derived copies that sparse layers compute with, never saved; which ones depends on the device.
    activation_bytes: an estimate, with train.activation_checkpointing as configured. It and the operations are None in
    a run that linearizes.
    dense_flops_per_token: forward and backward of every linear layer and of attention; real_flops_per_token: without
    the products with pruned weights and without adapters; adapter_flops_per_token: of these.
    """

    dense_parameters: int
    trained_parameters: int
    active_parameters: int
    frozen_parameters: int
    adapter_parameters: int
    pretrained_adapter_parameters: int
    all_adapter_parameters: int
    map_parameters: int
    trained_map_parameters: int
    linear_weights: int
    pruned_layer_weights: int
    state_bytes: dict[str, int]
    dense_state_bytes: dict[str, int]
    derived_bytes: dict[str, int]
    activation_bytes: int | None
    dense_flops_per_token: int | None
    real_flops_per_token: int | None
    adapter_flops_per_token: int | None

    @property
    def inference_bytes(self) -> int:
        """Of 16-bit weights, adapters and maps without what is pruned, and a mask bit for each entry of such layers."""
        numbers = self.active_parameters + self.all_adapter_parameters + self.map_parameters
        return 2 * numbers + self.pruned_layer_weights // 8


def account(model: PreTrainedModel, config: Config) -> Account:
    """Count a run.

    Args:
        model: as it is before it enters the run's first phase; it is brought into the last one. It may be on "meta".
    """
    before, begun = adapters_of(model), count(model)
    old, end = {name: _parameters(adapter) for name, adapter in before.items()}, phases_of(config).end
    apply(model, config, end)
    now = count(model)
    trained = {name for name, adapter in adapters_of(model).items() if adapter.lora_A.requires_grad}
    dense = now.weights + now.sparse - now.stored_sparse
    frozen = now.weights - now.trained + now.adapters - now.trained_adapters
    operations, in_adapters = flops(model, config), 6 * now.adapters
    by_muon = _by_muon(model, config)
    teacher = begun if end.step == "distill" and not end.shares_teacher else None
    return Account(
        dense_parameters=dense,
        trained_parameters=now.trained,
        active_parameters=now.active,
        frozen_parameters=frozen,
        adapter_parameters=now.trained_adapters,
        pretrained_adapter_parameters=sum(old.get(name, 0) for name in trained),
        all_adapter_parameters=now.adapters,
        map_parameters=now.maps,
        trained_map_parameters=now.trained_maps,
        linear_weights=now.linear,
        pruned_layer_weights=now.pruned_layers,
        state_bytes={
            **({"frozen (float32)": 4 * frozen} if frozen else {}),
            **({TEACHER: 4 * (teacher.weights + teacher.adapters) + teacher.mask_bytes} if teacher else {}),
            **_state_bytes(now.trained, sum(p.numel() for p in by_muon)),
            "masks": now.mask_bytes,
            "adapters with their state": 16 * now.trained_adapters,
            "maps with their state": 16 * now.maps,
        },
        dense_state_bytes=_state_bytes(dense, sum(matrix.entries for matrix in by_muon.values())),
        derived_bytes=_derived_bytes(now, teacher) if now.sparse else {},
        activation_bytes=activation_bytes(model, config).get(config.train.activation_checkpointing),
        dense_flops_per_token=operations and operations.dense_equivalent,
        real_flops_per_token=operations and operations.real - in_adapters,
        adapter_flops_per_token=operations and in_adapters,
    )


def activation_bytes(model: PreTrainedModel, config: Config) -> dict[str, int]:
    """What a micro-batch keeps for its backward pass, estimated by train.activation_checkpointing; {} if linearized.

    In 16 bits with fused attention a block keeps its input, two norms' outputs, the sum between them, what attention
    gives, what its other products but the two that are added to the sum give, the activation function's result (a ReLU
    keeps it alone), and the masks of dropout in 8 bits: 34 bytes a token and feature in GPT-2 (Korthikanti et al. 2022,
    section 4.1). Beside the blocks: the logits with their gradient in float32, or where `loss.training_loss` does
    without, those of some tokens in 16 bits.
    """
    if linear_windows(model):
        return {}
    tokens = config.train.micro_batch * config.train.seq_len
    width, vocab = model.config.hidden_size, model.config.vocab_size
    masks = 2 * width * shapes.drops(model.config)
    by_result = getattr(model.config, shapes.family_of(model.config).activation) == "relu"
    inputs = selective = whole = largest = 0
    for block in transformer_blocks(model):
        layers = [x for x in block.modules() if isinstance(x, LINEAR)]
        products = sum(map(_out_features, layers))
        widest = max(map(_out_features, layers), default=0)
        between = 0 if by_result else sum(_out_features(x) for x in layers if _out_features(x) == widest)
        each = 2 * (products + between + 3 * width) + masks
        inputs, whole, largest = inputs + 2 * width, whole + each, max(largest, each)
        selective += 2 * (products + 2 * width)
    sizes = {"none": whole, "block": inputs + largest, "selective": min(selective + largest, whole)}
    in_parts = shapes.objective(model.config) == "causal" and not config.distill.share
    logits = 2 * min(tokens * vocab, LOGITS_AT_ONCE) if in_parts else 8 * tokens * vocab
    return {mode: tokens * size + logits for mode, size in sizes.items()}


def _out_features(layer: Any) -> int:
    return int(layer.weight.shape[1] if isinstance(layer, Conv1D) else layer.out_features)


def sizes_of(model: PreTrainedModel, config: Config) -> Sizes:
    """A model as it is, on any device, block by block: what a layout's memory and communication follow from."""
    by_muon = _by_muon(model, config)
    blocks = tuple(_unit(block, by_muon) for block in transformer_blocks(model))
    whole, inside = _unit(model, by_muon), sum(blocks[1:], blocks[0]) if blocks else Unit(0, 0, 0)
    rest = Unit(*(a - b for a, b in zip(vars(whole).values(), vars(inside).values(), strict=True)))
    rows = {x.out_features for _, x in sparse_layers(model)} | {x.out_features for _, x in masked_layers(model)}
    each = sum(layer.out_features * layer.in_features for layer, *_ in alike(model))
    return Sizes(blocks, rest, tuple(sorted(rows)), _packed_bytes(each), activation_bytes(model, config))


def phase_sizes(model: PreTrainedModel, config: Config) -> list[Sizes]:
    """A model in each phase of a run, into whose last one it is brought; it may be on "meta"."""
    found, was, begun = [], UNTOUCHED, sizes_of(model, config)
    for phase in phases_of(config).distinct:
        apply(model, config, phase, was=was)
        teacher = begun if phase.step == "distill" else None
        found.append(replace(sizes_of(model, config), teacher=teacher, shares_teacher=phase.shares_teacher))
        was = phase
    return found


def _by_muon(model: nn.Module, config: Config) -> dict[nn.Parameter, Matrix]:
    """What Muon updates in a run of a model."""
    return hidden_matrices(model) if config.optim.name == "muon" else {}


def _unit(module: nn.Module, by_muon: dict[nn.Parameter, Matrix]) -> Unit:
    now, masked = count(module), [x for _, x in masked_layers(module)]
    updated = [x.mask for x in masked if not x.unmasked] + [x.backward_mask_bits for _, x in sparse_layers(module)]
    return Unit(
        parameters=now.weights + now.adapters + now.maps,
        trained=now.trained + now.trained_adapters + now.maps,
        dense=now.linear - now.sparse + now.adapters,
        packed_bytes=_packed_bytes(now.sparse),
        mask_bytes=now.mask_bytes,
        updated_mask_bytes=sum(mask.nbytes for mask in updated),
        by_muon=sum(p.numel() for p in module.parameters() if p in by_muon),
    )


def _derived_bytes(counts: Counts, teacher: Counts | None) -> dict[str, int]:
    """Packed for forward and input gradient; in plain torch each kept entry has an int64 index and a flag.

    teacher: one with layers of its own, which has forward products alone.
    """
    packed, stored = _packed_bytes(counts.sparse), counts.stored_sparse
    if teacher is not None:
        packed, stored = packed + _packed_bytes(teacher.sparse) // 2, stored + teacher.stored_sparse
    return {"on a GPU, packed": packed, "on a CPU, index": 9 * stored}


def _packed_bytes(entries: int) -> int:
    """Of the packed weights for both products, of a weight with so many entries."""
    return 2 * BF16.packed_bytes(1, entries)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _state_bytes(parameters: int, by_muon: int) -> dict[str, int]:
    """Of trained weights, some of which Muon updates."""
    sizes = {"weights (float32)": 4 * parameters, "gradients (float32)": 4 * parameters}
    sizes["AdamW moments"] = 8 * (parameters - by_muon)
    return sizes | ({"Muon momentum": 4 * by_muon} if by_muon else {})


def _attention_flops(config: Config, model: PreTrainedModel) -> int:
    """Scores and weighted sums, forward and backward: 12 T·d a token and layer, half of it if attention is causal."""
    each = 12 if shapes.objective(model.config) == "masked" else 6
    return int(each * model.config.num_hidden_layers * config.train.seq_len * model.config.hidden_size)


@dataclass(frozen=True)
class AttentionMemory:
    """The memory for decoding one sequence in 16 bits, as `inference.engine` has it.

    layers, linear_layers: attention layers, and those that are linearized.
    state_bytes: of all linearized layers, windows and float32 states, at any length.
    cache_bytes_per_token: of the same heads' cache with softmax attention, for each token.
    kept_bytes_per_token: of the cache of the layers, and heads of others, that keep softmax attention, for each token.
    """

    layers: int
    linear_layers: int
    state_bytes: int
    cache_bytes_per_token: int
    kept_bytes_per_token: int

    @property
    def break_even(self) -> int:
        """The number of tokens from which the linearized layers need less memory."""
        return -(-self.state_bytes // self.cache_bytes_per_token)


def attention_memory(model: PreTrainedModel) -> AttentionMemory:
    """Compute the decoding memory of a linearized model; nothing is allocated."""
    windows = linear_windows(model).values()
    linear = softmax = 0
    for window in windows:
        groups, dim = window.kv_heads, window.map_k.weight.shape[1]
        linearized = len(window.linear_heads)
        cache = window.new_cache()  # of the others nothing is counted: their keys have no length yet
        nothing_BGTD = torch.empty(1, linearized, 0, dim, dtype=torch.bfloat16, device="meta")
        cache.lazy_initialization(nothing_BGTD, nothing_BGTD)
        linear += cache.nbytes()
        softmax += 2 * 2 * linearized * dim
    layers = model.config.num_hidden_layers
    every = 2 * 2 * dim * groups * layers  # all layers have the same heads
    return AttentionMemory(layers, len(windows), linear, softmax, every - softmax)


@dataclass(frozen=True)
class RangeMemory:
    """What attention transfer by ranges of layers takes.

    ranges: of layers that learn.
    device_bytes: of the frozen weights that the device holds at once, in float32: of a range's layers, and what lies
        outside of all layers; with the embedding for the first ones, and for the last, in validation, the head.
    disk_bytes: of the hidden states on the disk at once, in 16 bits, or 32 with train.precision=fp32.
    """

    ranges: int
    device_bytes: int
    disk_bytes: int


def range_memory(model: PreTrainedModel, config: Config) -> RangeMemory | None:
    """What the transfer of a model, which is not linearized yet, takes by ranges; None if it is of all layers at once.

    Raises:
        UsageError: a range has no layers to linearize.
    """
    at_once, steps = config.linearize.layers_at_once, phases_of(config).at(0).rates.get(MAPS)
    if not at_once or steps is None:
        return None
    blocks = [_bytes(block.state_dict().values()) for block in transformer_blocks(model)]
    embedding, head = (part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    whole = _bytes({id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values())
    ends = embedding.nbytes + (head.nbytes if head is not embedding else 0)
    held = [
        sum(blocks[layer] for layer in layers)
        + embedding.nbytes * (layers.start == 0)
        + head.nbytes * (layers.stop == len(blocks))
        for layers in ranges_of(len(blocks), at_once)
    ]
    ranges = len(learning_ranges(len(blocks), config.linearize))
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    width, tokens = model.config.hidden_size, config.train.tokens_per_step
    disk = states_on_disk(steps.last, tokens, width, ranges, dtype)
    return RangeMemory(ranges, max(held) + whole - sum(blocks) - ends, disk)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
