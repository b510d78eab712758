"""PackedLinear computes what the layers that it is made of do, and its metadata has the kernels' order."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparse_kernels import MaskedLinear, SparseLinear, add_adapters, masks, tile_metadata
from sparse_kernels.packed_linear import PackedLinear
from sparse_kernels.packing import pack_layers

RANKS = st.lists(st.sampled_from([0, 1, 3, 4]), min_size=1, max_size=3)


def random_mask(rows: int, columns: int, seed: int) -> Tensor:
    return masks.nm_mask(masks.mask_score(torch.empty(rows, columns), "random", seed=seed), 2, 4)


def nibble_in_tile_order(metadata: Tensor, columns: int, row: int, group: int) -> int:
    """The nibble of a group by arithmetic, from the words of the format's description."""
    tile = row // 64 * -(-columns // 32) + group // 8
    band, r, high = row % 64 // 16, row % 8, row % 16 // 8
    byte = metadata[tile * 256 + band * 64 + r * 8 + [0, 4, 1, 5, 2, 6, 3, 7].index(group % 8)]
    return int(byte) >> 4 * high & 15


@given(st.integers(1, 150), st.integers(1, 40), st.integers(0, 2**31))
def test_metadata_in_tile_order_comes_back(rows: int, groups: int, seed: int) -> None:
    mask = random_mask(rows, 4 * groups, seed)
    metadata = tile_metadata.encode(mask)
    assert metadata.shape == (tile_metadata.metadata_bytes(rows, 4 * groups),)
    assert metadata.dtype == torch.uint8
    assert torch.equal(tile_metadata.decode(metadata, rows, 4 * groups), mask)
    assert tile_metadata.is_sound(metadata)


def test_metadata_has_the_order_that_is_described() -> None:
    rows, columns = 100, 44
    mask = random_mask(rows, columns, 0)
    metadata = tile_metadata.encode(mask)
    for row in range(128):
        for group in range(16):
            inside = row < rows and group < columns // 4
            first, second = mask[row, 4 * group : 4 * group + 4].nonzero().flatten() if inside else (0, 1)
            assert nibble_in_tile_order(metadata, columns, row, group) == int(first) | int(second) << 2


def test_metadata_that_nothing_encoded_is_told() -> None:
    metadata = tile_metadata.encode(random_mask(4, 8, 0))
    for nibble in (0b0000, 0b0001, 0b1111):
        metadata[7] = nibble << 4 | tile_metadata.PADDING
        assert not tile_metadata.is_sound(metadata)


def sparse_layer(rows: int, columns: int, rank: int, seed: int, *, bias: bool = True) -> SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    offset = torch.randn(rows, generator=generator) if bias else None
    layer = SparseLinear(weight, offset, masks.row_mask(weight, 2, 4), 2, 4).requires_grad_(False)
    if rank:
        adapter = add_adapters(nn.ModuleList([layer]), rank, alpha=3, seed=seed)["0"].requires_grad_(False)
        adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator))
    return layer


@settings(deadline=None)
@given(RANKS, st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31), st.booleans())
def test_fused_layers_compute_what_each_does(ranks: list[int], o: int, i: int, seed: int, bias: bool) -> None:
    layers = [
        sparse_layer(4 * (o + at), 4 * i, rank, seed + at, bias=bias and at != 1) for at, rank in enumerate(ranks)
    ]
    X = torch.randn(2, 3, 4 * i, generator=torch.Generator().manual_seed(seed))
    fused = PackedLinear.fuse(layers, torch.float32)
    expected = torch.cat([layer(X) for layer in layers], -1)
    torch.testing.assert_close(fused(X), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(fused.dense(), torch.cat([layer.weight for layer in layers]))
    assert fused.segments == tuple((4 * (o + at), rank) for at, rank in enumerate(ranks))
    assert (fused.lora_A is None) == (not any(ranks))
    assert (fused.bias is None) == (not bias)
    again = PackedLinear.fuse([PackedLinear.fuse([layer], torch.float32) for layer in layers], torch.float32)
    assert again.state_dict().keys() == fused.state_dict().keys()
    assert all(torch.equal(again.get_buffer(name), buffer) for name, buffer in fused.named_buffers())
    assert not list(fused.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    layer = sparse_layer(48, 64, 4, 0)
    packed = PackedLinear.fuse([layer], dtype)
    assert all(buffer.dtype in (dtype, torch.uint8) for buffer in packed.buffers())
    X = torch.randn(5, 64)
    assert packed(X.to(dtype)).dtype == dtype
    assert packed(X).dtype == torch.float32
    torch.testing.assert_close(packed(X), layer(X), rtol=0.02, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(X).dtype == torch.bfloat16
    assert packed(X[0]).shape == (48,)


@pytest.mark.parametrize("pattern", [(1, 2), (1, 4), (2, 8)])
def test_sparser_patterns_and_dense_layers_with_zeros_are_two_of_four_too(pattern: tuple[int, int]) -> None:
    weight = torch.randn(16, 32)
    mask = masks.row_mask(weight, *pattern)
    X, bias = torch.randn(3, 32), torch.randn(16)
    linear = nn.Linear(32, 16)
    conv1d = Conv1D(16, 32)
    linear.weight.data, conv1d.weight.data = weight * mask, (weight * mask).t()
    linear.bias.data = conv1d.bias.data = bias
    layers = [linear, conv1d, SparseLinear(weight, bias, mask, *pattern), MaskedLinear(weight, bias, *pattern)]
    packed = [PackedLinear.fuse([layer], torch.float32) for layer in layers]
    for layer, of_layer in zip(layers, packed, strict=True):
        torch.testing.assert_close(of_layer(X), layer(X))
        assert torch.equal(of_layer.dense(), weight * mask)
        assert not torch.signbit(of_layer.dense()[~mask]).any()
        assert not torch.signbit(of_layer.values[of_layer.values == 0]).any()


def test_what_cannot_be_packed_is_told() -> None:
    with pytest.raises(ValueError, match="Linear is not 2:4"):
        PackedLinear.fuse([nn.Linear(16, 16)], torch.float32)
    with pytest.raises(ValueError, match=r"inputs of \[16, 32\] features"):
        PackedLinear.fuse([sparse_layer(16, 16, 0, 0), sparse_layer(16, 32, 0, 0)], torch.float32)
    large = sparse_layer(16, 16, 0, 0)
    large.values[0, 0] = 1e5
    with pytest.raises(ValueError, match="not finite in float16"):
        PackedLinear.fuse([large], torch.float16)
    with pytest.raises(ValueError, match="inputs in fours"):
        PackedLinear(18, ((16, 0),))
    with pytest.raises(ValueError, match="inputs in fours"):
        PackedLinear(16, ((16, 0),), dtype=torch.int8)


def test_a_new_layer_is_zero_and_takes_another_ones_state() -> None:
    packed = PackedLinear.fuse([sparse_layer(20, 12, 2, 0), sparse_layer(8, 12, 3, 1)], torch.bfloat16)
    empty = PackedLinear(12, packed.segments)
    X = torch.randn(4, 12)
    assert not empty(X).any()
    empty.load_state_dict(packed.state_dict())  # the dense copy that the product kept is stale
    assert torch.equal(empty(X), packed(X))
    assert torch.equal(copy.deepcopy(packed)(X), packed(X))
    with torch.inference_mode():
        assert torch.equal(empty.double().to(torch.bfloat16)(X), packed(X))
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), packed(X))
    assert "segments=((20, 2), (8, 3))" in repr(packed)


# ------------------------------------------------------------------------------------------- packing a model


def test_adapters_of_layers_that_stay_dense_are_merged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16))
    with torch.no_grad():
        model[2].weight *= masks.row_mask(model[2].weight, 2, 4)
    for adapter in add_adapters(model, 4, ["0", "2"], alpha=6).values():
        nn.init.normal_(adapter.lora_B)
    X = torch.randn(5, 32)
    expected = model(X)
    assert pack_layers(model, torch.float32) == dict.fromkeys(("0", "4"), "not 2:4 along its inputs")
    assert [type(layer) for layer in model[::2]] == [nn.Linear, PackedLinear, nn.Linear]
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_the_dtype_cannot_hold_is_named() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.mul_(masks.row_mask(model[0].weight, 2, 4)).mul_(1e9)
    with pytest.raises(ValueError, match="0: a value is not finite in float16"):
        pack_layers(model, torch.float16)
