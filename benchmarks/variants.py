"""The decoders that `slope bench generate` compares: one dense model with random weights, and what is made of it.

Variants share every tensor that they do not change, so that all of them fit on a GPU together. Layers and variants with
other weights have memory of their own: a step finds no weight in the GPU's cache that its own last layers left there.

Shape suffixes: N tokens, O out features, I in features.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from slope_cli.checkpoint import load
from slope_cli.config.methods import LinearizeConfig
from slope_cli.errors import UsageError, did_you_mean
from slope_cli.inference.decoder import Block, Decoder
from slope_cli.inference.products import DenseLinear
from slope_cli.linearize.linear_window import LinearWindow
from slope_cli.models import shapes
from slope_cli.models.build import model_config
from sparse_kernels import masks, tile_metadata
from sparse_kernels.packed_linear import PackedLinear, Segments

from .timing import random_model

PRODUCTS = ("qkv", "out", "up", "down")
"""The products of a block, by their names there."""


@dataclass(frozen=True)
class Variant:
    """A decoder.

    layers: "dense", "sparse", or what PyTorch itself has: "semi_structured", "int8". adapters: rank over the hidden
    size. linear: the name of the kind of linearized attention in KINDS; "" for softmax. compiled: its decoding step is.
    """

    layers: str = "dense"
    adapters: float = 0.0
    linear: str = ""
    compiled: bool = False


KINDS: dict[str, LinearizeConfig] = {
    "linearized": LinearizeConfig(),
    "linearized-gated": LinearizeConfig(state="gated"),
    "linearized-delta": LinearizeConfig(state="delta"),
    "linearized-cache-64": LinearizeConfig(cache=64),
    "linearized-cache-256": LinearizeConfig(cache=256),
    "linearized-quarter-softmax": LinearizeConfig(keep_softmax=[*range(3, 1000, 4)]),  # of as many as there are
}
"""Kinds of linearized attention, by default settings but for what their name says."""
VARIANTS = {
    "dense": Variant(),
    "sparse": Variant("sparse"),
    "sparse-r1.56": Variant("sparse", adapters=1 / 64),
    "sparse-r6.25": Variant("sparse", adapters=1 / 16),
    **{name: Variant(linear=name) for name in KINDS},
    **{f"sparse-{name}": Variant("sparse", linear=name) for name in KINDS},
    "linearized-compiled": Variant(linear="linearized", compiled=True),
    "sparse-linearized-compiled": Variant("sparse", linear="linearized", compiled=True),
}
USUAL = ("dense", "sparse", "sparse-r1.56", "sparse-r6.25", *KINDS, "sparse-linearized")
TRAINED, TRANSFORMERS = "trained", "transformers"
AGAINST = {"semi_structured": Variant("semi_structured"), "int8": Variant("int8")}


def names(chosen: tuple[str, ...], against: tuple[str, ...], *, trained: bool) -> list[str]:
    """The variants to measure in the engine, "dense" first; UsageError for an unknown one."""
    known = {"variants": [*VARIANTS, *([TRAINED] if trained else [])], "against": [*AGAINST, TRANSFORMERS]}
    for option, given in (("variants", chosen), ("against", against)):
        if unknown := [name for name in given if name not in known[option]]:
            raise UsageError(f"--{option} {unknown[0]}: is unknown; {did_you_mean(unknown[0], known[option])}")
    usual = (TRAINED,) if trained else USUAL
    return list(dict.fromkeys(["dense", *(chosen or usual), *(name for name in against if name in AGAINST)]))


def shape(name: str, depth: int | None) -> tuple[PreTrainedConfig, int, Path | None]:
    """The config of a shape, or of a model's folder, cut to `depth` blocks; all its blocks; and the folder.

    Raises:
        UsageError: neither of them, a model that does not predict the next token, or a folder that is to be cut.
        SlopeError: files that cannot be read.
    """
    folder = None
    if name in shapes.SHAPES:
        config = model_config(name, dropout=0.0)
    elif Path(name).is_dir():
        folder = Path(name)
        config = load.shape_of(folder)
        config._attn_implementation = "sdpa"
    else:
        hint = did_you_mean(name, sorted(shapes.SHAPES))
        raise UsageError(f"{name}: neither the shape of a model nor a folder; {hint}")
    if shapes.objective(config) != "causal":
        raise UsageError(f"{name}: predicts masked tokens and cannot continue text; choose a causal model")
    blocks: int = config.num_hidden_layers
    if depth is not None and (folder is not None or not 1 <= depth <= blocks):
        reason = "it is trained; measure it whole" if folder is not None else f"it has {blocks} blocks"
        raise UsageError(f"--depth {depth}: {name} cannot be cut to that: {reason}")
    config.num_hidden_layers = depth or blocks
    return config, blocks, folder


class Variants:
    """Makes the decoders of one shape.

    Attributes:
        dense: the one with random dense weights.
    """

    def __init__(
        self, config: PreTrainedConfig, folder: Path | None, device: torch.device, dtype: torch.dtype, max_length: int
    ) -> None:
        self._folder, self._length, self._hidden = folder, max_length, int(config.hidden_size)
        model = random_model(config, device, dtype).eval().requires_grad_(False)
        self.dense = Decoder(model, dtype, device, sparse=False, max_length=max_length)
        self._packed: dict[tuple[int, str], PackedLinear] = {}  # by block and part
        self._windows: dict[tuple[int, str, bool], LinearWindow] = {}  # by block, kind, and whether it is compiled

    def make(self, name: str) -> Decoder:
        """The decoder of a variant."""
        if name == TRAINED:
            return self._trained()
        variant = {**VARIANTS, **AGAINST}[name]
        rank = max(1, round(variant.adapters * self._hidden)) if variant.adapters else 0
        own = sharing(self.dense)
        for index, block in enumerate(cast(Any, own.blocks)):
            for part in PRODUCTS:
                setattr(block, part, self._product(index, part, variant.layers, rank))
            if variant.linear and index not in KINDS[variant.linear].kept:
                block.linear = self._window(index, variant)
        return own

    def _window(self, block: int, variant: Variant) -> LinearWindow:
        """The linearized attention of a block, of which there is one for each kind."""
        key = (block, variant.linear, variant.compiled)
        if key not in self._windows:
            own, device = cast(Block, self.dense.blocks[block]), self.dense.tokens.device
            self._windows[key] = linear_window(own, KINDS[variant.linear], device, compiled=variant.compiled)
        return self._windows[key]

    def _product(self, block: int, part: str, layers: str, rank: int) -> nn.Module:
        dense = cast(DenseLinear, self.dense.get_submodule(f"blocks.{block}.{part}"))
        if layers == "sparse":
            if (block, part) not in self._packed:
                self._packed[block, part] = pruned(dense.weight, dense.bias, dense.segments)
            return adapted(self._packed[block, part], rank)
        other = {"semi_structured": SemiStructuredLinear, "int8": Int8Linear}.get(layers)
        return dense if other is None else other(dense)

    def _trained(self) -> Decoder:
        assert self._folder is not None
        device, dtype = self.dense.tokens.device, self.dense.tokens.dtype
        return Decoder(load.load_model(self._folder, device).model, dtype, device, sparse=True, max_length=self._length)


def sharing(decoder: Decoder) -> Decoder:
    """A copy that has the same tensors."""
    return copy.deepcopy(decoder, {id(tensor): tensor for tensor in (*decoder.buffers(), *decoder.parameters())})


def linear_window(block: Block, config: LinearizeConfig, device: torch.device, *, compiled: bool) -> LinearWindow:
    """Linearized attention for a block, untrained."""
    spec = block.spec
    sides = {"heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
    linear = LinearWindow(config, **sides, causal=True, generator=torch.Generator().manual_seed(0))
    linear.compiled = compiled
    return linear.to(device).eval().requires_grad_(False)


@torch.no_grad()
def pruned(weight_OI: Tensor, bias_O: Tensor | None, segments: Segments) -> PackedLinear:
    """A dense weight pruned to 2:4 by magnitude, without adapters."""
    mask_OI = masks.nm_mask(weight_OI.abs(), 2, 4)
    bias, dtype, device = bias_O is not None, weight_OI.dtype, weight_OI.device
    own = PackedLinear(weight_OI.shape[1], segments, bias=bias, dtype=dtype, device=device)
    own.values.copy_(weight_OI[mask_OI].view_as(own.values) + 0.0)  # -0.0 becomes 0.0
    own.metadata.copy_(tile_metadata.encode(mask_OI))
    own.bias = bias_O
    return own


def adapted(layer: PackedLinear, rank: int) -> PackedLinear:
    """A layer with the values of another, and random adapters of this rank; 0 for none."""
    if layer.values.is_cuda:
        layer.prepare()  # what kernels read is made once, and shared as well
    segments = tuple((rows, rank) for rows, _ in layer.segments)
    bias, dtype, device = layer.bias is not None, layer.values.dtype, layer.values.device
    own = PackedLinear(layer.in_features, segments, bias=bias, dtype=dtype, device=device)
    own.values, own.metadata, own.bias = layer.values, layer.metadata, layer.bias
    for adapter in (own.lora_A, own.lora_B):
        if adapter is not None:
            adapter.normal_(std=0.02)
    return own


class SemiStructuredLinear(nn.Module):
    """PyTorch's own 2:4 layer, as DenseLinear. It raises where PyTorch has no such product, as on a CPU."""

    bias: Tensor | None

    def __init__(self, layer: DenseLinear) -> None:
        super().__init__()
        pruned_OI = (layer.weight * masks.nm_mask(layer.weight.abs(), 2, 4)).contiguous()
        self.register_buffer("weight", torch.sparse.to_sparse_semi_structured(pruned_OI))
        self.register_buffer("bias", layer.bias)

    def forward(self, X_NI: Tensor, residual_NO: Tensor | None = None) -> Tensor:
        """(N, I) -> (N, O), plus the residual."""
        Y_NO = F.linear(X_NI, cast(Tensor, self.weight), self.bias)  # [N,I] · [O,I]^T -> [N,O]
        return Y_NO if residual_NO is None else Y_NO + residual_NO


class Int8Linear(nn.Module):
    """Weights in 8 bits with a scale for each row, by PyTorch's own operator; as DenseLinear."""

    bias: Tensor | None

    def __init__(self, layer: DenseLinear) -> None:
        super().__init__()
        scale_O = layer.weight.abs().amax(1).clamp(min=1e-6) / 127
        self.register_buffer("weight", (layer.weight / scale_O[:, None]).round().to(torch.int8).contiguous())
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", layer.bias)

    def forward(self, X_NI: Tensor, residual_NO: Tensor | None = None) -> Tensor:
        """(N, I) -> (N, O), plus the residual."""
        # [N,I] · [O,I]^T -> [N,O]
        Y_NO: Tensor = torch.ops.aten._weight_int8pack_mm(X_NI.contiguous(), self.weight, self.scale)
        Y_NO = Y_NO if self.bias is None else Y_NO + self.bias
        return Y_NO if residual_NO is None else Y_NO + residual_NO
