"""PackedLinear, an inference-only layer: 2:4 kept entries in 16 bits, metadata in tile order, and adapters.

Shape suffixes: B tokens, O out features, I in features, K = I/2 kept entries of a row; R ranks of all adapters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_kernels import few_tokens, masks, tile_metadata
from sparse_kernels.lora import AdaptedLinear
from sparse_kernels.masked_linear import MaskedLinear
from sparse_kernels.packed import Stamp, stamp
from sparse_kernels.packed_product import pack, packed_linear, parts
from sparse_kernels.selection import stored_weight
from sparse_kernels.sparse_linear import SparseLinear

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Segments = tuple[tuple[int, int], ...]
"""(rows, rank) of each of the layers that were fused, in order; rank 0: it has no adapter."""
Adapter = tuple[Tensor, Tensor]
"""lora_A and lora_B of a layer, as PackedLinear has them."""


class NotTwoOfFourError(ValueError):
    """A weight has more than two entries other than zero in some 4 of a row."""


class PackedLinear(nn.Module):
    """A linear layer with a 2:4 weight W^R, or several that read the same input, stacked by rows; never trained.

    Attributes:
        values: buffer (out, in/2), the kept entries of W^R row by row in column order: bf16, fp16 or float32.
        metadata: uint8 buffer (n,), where they sit, in the order of `tile_metadata`.
        bias: buffer (out,) or None, of the values' dtype, as the adapters are.
        lora_A: buffer (R, in) or None, the layers' adapters stacked.
        lora_B: buffer (out, r) or None, with its scaling; r is the largest rank, and shorter ones are zero-padded. The
            rows of each segment multiply the segment's own slice of X · lora_A^T.
        segments: (rows, rank) of each layer.
    """

    values: Tensor
    metadata: Tensor
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None

    def __init__(
        self,
        in_features: int,
        segments: Segments,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """A layer of zeros.

        Raises:
            ValueError: `in_features` is not a multiple of 4, or a dtype that values cannot have.
        """
        super().__init__()
        if in_features % 4 or dtype not in DTYPES:
            raise ValueError(f"a packed layer needs inputs in fours and {DTYPES}, got {in_features} and {dtype}")
        self.in_features, self.out_features = in_features, sum(rows for rows, _ in segments)
        self.segments = tuple((rows, rank) for rows, rank in segments)
        self._operands: _Operands | None = None
        self._kept: tuple[tuple[torch.dtype, Stamp, Stamp], Tensor] | None = None
        ranks = [rank for _, rank in segments]
        places = tile_metadata.PADDING * 0x11
        size = tile_metadata.metadata_bytes(self.out_features, in_features)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer("values", zeros(self.out_features, in_features // 2))
        self.register_buffer("metadata", torch.full((size,), places, dtype=torch.uint8, device=device))
        self.register_buffer("bias", zeros(self.out_features) if bias else None)
        self.register_buffer("lora_A", zeros(sum(ranks), in_features) if any(ranks) else None)
        self.register_buffer("lora_B", zeros(self.out_features, max(ranks)) if any(ranks) else None)

    @classmethod
    @torch.no_grad()
    def fuse(cls, layers: Sequence[nn.Module], dtype: torch.dtype) -> "PackedLinear":
        """One layer of those that read the same input; of a single one, that layer packed.

        Args:
            layers: SparseLinear, PackedLinear, or any other linear layer with at most two entries other than zero in
                every 4 along a row; with or without adapters.
            dtype: of the values.

        Raises:
            NotTwoOfFourError: a layer that is not 2:4.
            ValueError: inputs of different lengths, or values that the dtype cannot hold.
        """
        parts = [_part(layer) for layer in layers]
        inputs = parts[0].mask_OI.shape[1]
        if any(part.mask_OI.shape[1] != inputs for part in parts):
            raise ValueError(f"layers to fuse read inputs of {[part.mask_OI.shape[1] for part in parts]} features")
        segments = tuple(segment for part in parts for segment in part.segments)
        has_bias, device = any(part.bias_O is not None for part in parts), parts[0].mask_OI.device
        fused = cls(inputs, segments, bias=has_bias, dtype=dtype, device=device)
        fused.metadata.copy_(tile_metadata.encode(torch.cat([part.mask_OI for part in parts])))
        fused.lora_A, fused.lora_B = stacked([(part.adapter, part.segments) for part in parts], fused.values, inputs)
        row = 0
        for part in parts:
            rows = slice(row, row := row + len(part.mask_OI))
            fused.values[rows] = part.values_OK + 0.0  # -0.0 becomes 0.0
            if fused.bias is not None and part.bias_O is not None:
                fused.bias[rows] = part.bias_O
        if not all(buffer.isfinite().all() for buffer in fused.buffers()):
            raise ValueError(f"a value is not finite in {str(dtype).removeprefix('torch.')}")
        return fused

    def forward(self, X: Tensor, residual: Tensor | None = None, Z_BR: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out) in X's dtype, plus `residual` of that shape; under autocast in the autocast dtype.

        Z_BR: X · A^T of few tokens with the A of `prepare`, where it is there already.
        """
        device = X.device.type
        if torch.is_autocast_enabled(device):
            X = X.to(torch.get_autocast_dtype(device))
        X_BI = X.reshape(-1, self.in_features)
        residual_BO = None if residual is None else residual.reshape(-1, self.out_features)
        operands = self.prepare() if X.is_cuda and X.dtype == self.values.dtype else None
        Y_BO: Tensor
        if operands is not None:
            Y_BO = packed_linear(X_BI, *operands, residual_BO, Z_BR)
        else:
            Y_BO = self._product(X_BI)
            if self.lora_A is not None and self.lora_B is not None:
                Y_BO = Y_BO + fused_adapters(X_BI, self.lora_A, self.lora_B, self.segments)
            Y_BO = Y_BO if residual_BO is None else Y_BO + residual_BO
        return Y_BO.view(*X.shape[:-1], self.out_features)

    def prepare(self) -> "_Operands | None":
        """What the kernels read, made at the first product on a GPU; None where the kernels cannot take this layer.

        Values and metadata are in one place, which the buffers are views of from then on. While torch compiles, what
        was made before is used.
        """
        made = self._operands
        if torch.compiler.is_compiling() or (made and made.packed.data_ptr() == self.values.data_ptr()):
            return made
        self._operands = None
        if len(self.segments) > few_tokens.MOST_SEGMENTS or any(rows % 16 for rows, _ in self.segments):
            return None
        if few_tokens.refusal(self.out_features, self.in_features, self.values.dtype, self.values.get_device()):
            return None
        packed = pack(self.values, self.metadata)
        self.values, self.metadata = parts(packed, self.out_features, self.in_features, self.values.dtype)
        rows, ranks = ([*part] for part in zip(*self.segments, strict=True))
        A, B = self.lora_A, self.lora_B
        if A is not None and B is not None:
            width = -(-B.shape[1] // few_tokens.RANKS) * few_tokens.RANKS
            if any(rank != width for rank in ranks):  # the kernels read as many ranks for each segment
                A = torch.cat([F.pad(part, (0, 0, 0, width - len(part))) for part in A.split(ranks)])
                B = F.pad(B, (0, width - B.shape[1]))
        # Products read weights before the kernel in front of them has ended, so it must not be the one that wrote them.
        torch.cuda.current_stream(packed.device).synchronize()
        self._operands = _Operands(packed, rows, self.bias, A, B)
        return self._operands

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._operands = None  # padded adapters are copies

    def _product(self, X_BI: Tensor) -> Tensor:
        """X · W^R^T + bias: (B, I) -> (B, O)."""
        bias_O = None if self.bias is None else self.bias.to(X_BI.dtype)
        return F.linear(X_BI, self._dense_in(X_BI.dtype), bias_O)  # [B,I] · [O,I]^T -> [B,O]

    def _dense_in(self, dtype: torch.dtype) -> Tensor:
        """W^R in a dtype. On a CPU it is kept: making it takes a hundred times as long as a product with one token."""
        if self.values.device.type != "cpu" or torch.compiler.is_compiling():
            return self.dense().to(dtype)
        source = dtype, stamp(self.values), stamp(self.metadata)
        if self._kept is None or self._kept[0] != source:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = source, self.dense().to(dtype)
        return self._kept[1]

    def dense(self) -> Tensor:
        """W^R as a dense matrix (out, in) with its zeros, without adapters: a copy."""
        return masks.scatter(self.values, self.mask())

    @property
    def weight(self) -> Tensor:
        """The same, as SparseLinear has it: models ask a linear layer for its weight's dtype or device."""
        return self.dense()

    def mask(self) -> Tensor:
        """The mask of W^R: bool (out, in)."""
        return tile_metadata.decode(self.metadata, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        sides = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sides}, bias={self.bias is not None}, segments={self.segments}"


def fused_adapters(X_BI: Tensor, A_RI: Tensor, B_Or: Tensor, segments: Segments) -> Tensor:
    """Of each segment (X · A^T) · B^T, side by side: (B, I) -> (B, O); A and B as PackedLinear has them."""
    rows, ranks = ([*part] for part in zip(*segments, strict=True))
    Z_BR = F.linear(X_BI, A_RI.to(X_BI.dtype))  # [B,I] · [R,I]^T -> [B,R]
    pairs = zip(Z_BR.split(ranks, 1), B_Or.to(X_BI.dtype).split(rows), ranks, strict=True)
    return torch.cat([F.linear(Z, B_or[:, :rank]) for Z, B_or, rank in pairs], 1)  # [B,r] · [o,r]^T -> [B,o]


class _Operands(NamedTuple):
    """What `packed_linear` takes beside X and the residual."""

    packed: Tensor
    rows: list[int]
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None


class _Part(NamedTuple):
    """One layer to fuse: its values, mask and bias; lora_A and lora_B and segments as PackedLinear has them."""

    values_OK: Tensor
    mask_OI: Tensor
    bias_O: Tensor | None
    adapter: Adapter | None
    segments: Segments


def _part(layer: nn.Module) -> _Part:
    if isinstance(layer, PackedLinear):
        values_OK, mask_OI = layer.values, layer.mask()
    elif isinstance(layer, SparseLinear) and (layer.n, layer.m) == (2, 4):
        values_OK, mask_OI = layer.values.detach(), layer.row_mask()
    else:
        weight_OI = dense_weight(layer)
        found = two_of_four(weight_OI)
        if found is None:
            raise NotTwoOfFourError(f"a {type(layer).__name__} is not 2:4 along its inputs")
        values_OK, mask_OI = weight_OI[found].view(len(weight_OI), -1), found
    return _Part(values_OK, mask_OI, cast(Tensor | None, layer.bias), *adapter_of(layer, len(mask_OI)))


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight that a linear layer of any kind multiplies by: (out, in), without its adapter."""
    if isinstance(layer, PackedLinear):
        return layer.dense()
    if isinstance(layer, SparseLinear):
        return layer.scattered()
    if isinstance(layer, MaskedLinear):
        return layer.masked_weight
    if isinstance(layer, AdaptedLinear):
        return layer.weight.t() if layer.conv1d else layer.weight
    return stored_weight(layer)


def adapter_of(layer: nn.Module, rows: int) -> tuple[Adapter | None, Segments]:
    """(lora_A, lora_B) of a linear layer of any kind with this many rows, None without an adapter; and its segments."""
    if isinstance(layer, PackedLinear):
        stored = None if layer.lora_A is None or layer.lora_B is None else (layer.lora_A, layer.lora_B)
        return stored, layer.segments
    adapter = layer.adapter if isinstance(layer, SparseLinear | AdaptedLinear) else None
    if adapter is None:
        return None, ((rows, 0),)
    return (adapter.lora_A, adapter.scaling * adapter.lora_B.float()), ((rows, adapter.rank),)


def stacked(
    adapters: Sequence[tuple[Adapter | None, Segments]], like: Tensor, inputs: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """lora_A (R, I) and lora_B (O, r) of layers side by side, as PackedLinear has them; None if no layer has adapters.

    Args:
        adapters: of each layer, as `adapter_of` says.
        like: a tensor of the dtype and the device of the result.
        inputs: I.
    """
    rows, ranks = zip(*(segment for _, segments in adapters for segment in segments), strict=True)
    if not any(ranks):
        return None, None
    lora_A, lora_B = like.new_zeros(sum(ranks), inputs), like.new_zeros(sum(rows), max(ranks))
    row = rank = 0
    for adapter, segments in adapters:
        own = slice(row, row := row + sum(rows for rows, _ in segments))
        if adapter is not None:
            A_RI, B_Or = adapter
            lora_A[rank : (rank := rank + len(A_RI))] = A_RI
            lora_B[own, : B_Or.shape[1]] = B_Or
    return lora_A, lora_B


def two_of_four(weight_OI: Tensor) -> Tensor | None:
    """The 2:4 mask that keeps every entry of a weight (out, in) but zeros; None if there is none."""
    if weight_OI.shape[1] % 4:
        return None
    mask_OI = masks.nm_mask(weight_OI.abs(), 2, 4)
    return None if bool(weight_OI.masked_fill(mask_OI, 0).any()) else mask_OI
