"""Each kernel of kernels.cu against plain torch, bit for bit, on shapes that fill no tile."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_kernels import cuda, masks, tile_metadata

SHAPES = [(16, 16), (48, 80), (64, 128), (272, 144), (144, 272), (1040, 2064), (768, 3072)]
HALVES = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}
DTYPES = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16,) * 2, (torch.float16,) * 2]


def layer(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kept values, row_bits, backward_bits, and the two masks."""
    generator = torch.Generator("cuda").manual_seed(rows * columns)
    weight = torch.randn(rows, columns, device="cuda", generator=generator).to(dtype)
    row = masks.row_mask(weight, 2, 4, kind="random", seed=rows)
    column = masks.double_prune(weight, row, 2, 4)
    return weight[row].view(rows, -1), masks.pack_bits(row), masks.pack_bits(column.t()), row, column


def guarded(*sides: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor of NaN and the whole memory around it, with 64 entries on each side."""
    size = sides[0] * sides[1]
    whole = torch.full((size + 128,), torch.nan, dtype=dtype, device="cuda")
    return whole[64 : 64 + size].view(sides), whole


def untouched(whole: Tensor) -> bool:
    return bool(whole[:64].isnan().all() and whole[-64:].isnan().all())


def slots_of(bits: Tensor, columns: int) -> Tensor:
    """The filler rule in plain torch: the kept places of every group, and the lowest free ones until there are two."""
    kept = masks.unpack_bits(bits, columns).unflatten(1, (-1, 4))
    fillers = (~kept).cumsum(-1) <= 2 - kept.sum(-1, keepdim=True)
    slots: Tensor = (kept | fillers & ~kept).flatten(1)
    return slots


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slot_markers(rows: int, columns: int, dtype: torch.dtype) -> None:
    groups = torch.tensor([0, 1, 2, 4, 8, 3, 12, 10], dtype=torch.uint8, device="cuda")
    expected = [3, 3, 3, 5, 9, 3, 12, 10]
    assert masks.pack_bits(cuda.slot_markers(groups[None] << 4, dtype).bool())[0].tolist() == [
        16 * e + 3 for e in expected
    ]
    _, row_bits, backward_bits, row, column = layer(rows, columns, dtype)
    assert torch.equal(cuda.slot_markers(row_bits, dtype), row.to(dtype))
    marked = cuda.slot_markers(backward_bits, dtype)
    assert torch.equal(marked, slots_of(backward_bits, rows).to(dtype))
    assert (marked.bool() & ~column.t()).any()  # some groups did need fillers


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("values_dtype", "dtype"), [*DTYPES, (torch.float32, torch.float32)])
def test_gather_kept(rows: int, columns: int, values_dtype: torch.dtype, dtype: torch.dtype) -> None:
    _, row_bits, _, row, _ = layer(rows, columns, values_dtype)
    dense = torch.randn(rows, columns, device="cuda").to(dtype)
    kept = cuda.gather_kept(dense, row_bits, values_dtype)
    assert kept.dtype == values_dtype
    assert torch.equal(kept, dense[row].view(rows, -1).to(values_dtype))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("values_dtype", "dtype"), DTYPES)
def test_refresh(rows: int, columns: int, values_dtype: torch.dtype, dtype: torch.dtype) -> None:
    values, row_bits, backward_bits, row, column = layer(rows, columns, values_dtype)
    zero = torch.zeros((), dtype=dtype, device="cuda")
    dense = torch.zeros(rows, columns, dtype=dtype, device="cuda").masked_scatter_(row, values.to(dtype))
    dense_t = torch.where(column, dense, zero).t().contiguous()
    slots = slots_of(backward_bits, rows)
    expected = {"w": (values.to(dtype), dense), "w_t": (dense_t[slots].view(columns, -1), dense_t)}
    bias = torch.randn(rows, device="cuda").to(values_dtype)
    for form in ((0, 0), (0, 1), (1, 0), (1, 1)):
        written = {name: guarded(*expected[name][f].shape, dtype=dtype) for name, f in zip(expected, form, strict=True)}
        bias_out, bias_whole = guarded(1, rows, dtype=dtype)
        targets: dict[str, Any] = {name: view for name, (view, _) in written.items()}
        cuda.launch(cuda.refresh(values, row_bits, backward_bits, **targets, bias=bias, bias_out=bias_out[0]))
        for (name, (view, whole)), f in zip(written.items(), form, strict=True):
            assert torch.equal(view, expected[name][f]), (name, f)
            assert untouched(whole)
        assert torch.equal(bias_out[0], bias.to(dtype))
        assert untouched(bias_whole)
    for name in expected:  # one alone
        view, _ = guarded(*expected[name][0].shape, dtype=dtype)
        one: dict[str, Any] = {name: view}
        cuda.launch(cuda.refresh(values, row_bits, backward_bits, **one))
        assert torch.equal(view, expected[name][0])


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ties", [False, True])
def test_update_mask(rows: int, columns: int, dtype: torch.dtype, ties: bool) -> None:
    values, row_bits, backward_bits, row, _ = layer(rows, columns, dtype)
    values = values.round() if ties else -values
    weight = torch.zeros(rows, columns, dtype=dtype, device="cuda").masked_scatter_(row, values)
    expected = masks.pack_bits(masks.double_prune(weight, row, 2, 4).t())
    version = backward_bits._version
    cuda.launch(cuda.refresh(values, row_bits, backward_bits, update_mask=True))
    assert torch.equal(backward_bits, expected)
    assert backward_bits._version > version
    for half in HALVES[dtype]:
        for packed, packed_t in ((True, True), (True, False), (False, True), (False, False)):
            w = torch.empty(rows, columns // 2 if packed else columns, dtype=half, device="cuda")
            w_t = torch.empty(columns, rows // 2 if packed_t else rows, dtype=half, device="cuda")
            metadata = None
            if packed_t and columns % 64 == 0 and rows % 32 == 0:
                metadata = torch.zeros(rows * columns // 8, dtype=torch.uint8, device="cuda")
            backward_bits.zero_()
            cuda.launch(
                cuda.refresh(values, row_bits, backward_bits, update_mask=True, w=w, w_t=w_t, metadata=metadata)
            )
            assert torch.equal(backward_bits, expected)
            refreshed = torch.empty_like(w), torch.empty_like(w_t)
            cuda.launch(cuda.refresh(values, row_bits, backward_bits, w=refreshed[0], w_t=refreshed[1]))
            assert torch.equal(w, refreshed[0])
            assert torch.equal(w_t, refreshed[1])
            if metadata is not None:
                assert torch.equal(metadata, metadata_of(backward_bits))


def test_runs_on_torch_s_current_stream() -> None:
    values, row_bits, backward_bits, _, _ = layer(1024, 1024, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # so that a kernel on any other stream would come first
        values.mul_(2)
        w = torch.empty_like(values, dtype=torch.bfloat16)
        cuda.launch(cuda.refresh(values, row_bits, backward_bits, w=w))
    stream.synchronize()
    assert torch.equal(w, values.bfloat16())


def test_layers_of_many_sizes_in_one_launch() -> None:
    found = [layer(rows, columns, torch.float32) for rows, columns in SHAPES]
    for values, _, _, _, _ in found:
        values.neg_().add_(torch.rand_like(values))
    cuda.launch_all(
        cuda.refresh(values, row_bits, backward_bits, update_mask=True)
        for values, row_bits, backward_bits, _, _ in found
    )
    for values, _, backward_bits, row, _ in found:
        weight = torch.zeros(row.shape, device="cuda").masked_scatter_(row, values)
        assert torch.equal(backward_bits, masks.pack_bits(masks.double_prune(weight, row, 2, 4).t()))
    updated = [(*targets_of(*layer[:3]), layer) for layer in found]
    for values, *_ in found:
        values.neg_().add_(torch.rand_like(values))
    cuda.launch_all(
        cuda.refresh(*layer[:3], update_mask=True, w=w, w_t=w_t, bias=bias, bias_out=bias_out, metadata=metadata)
        for w, w_t, bias, bias_out, metadata, layer in updated
    )
    for w, w_t, bias, bias_out, metadata, (values, row_bits, backward_bits, _, _) in updated:
        alone = torch.empty_like(w), torch.empty_like(w_t)
        cuda.launch(cuda.refresh(values, row_bits, backward_bits, w=alone[0], w_t=alone[1]))
        assert torch.equal(w, alone[0])
        assert torch.equal(w_t, alone[1])
        assert torch.equal(bias_out, bias.bfloat16())
        if metadata is not None:
            assert torch.equal(metadata, metadata_of(backward_bits))
    even = [(bits, torch.empty(bits.numel(), dtype=torch.uint8, device="cuda")) for bits in masks_with_fillers()]
    cuda.launch_all(cuda.metadata(bits, target) for bits, target in even)
    for bits, target in even:
        single = torch.zeros_like(target)
        cuda.launch(cuda.metadata(bits, single))
        assert torch.equal(target, single)
        assert torch.equal(target, metadata_of(bits))


def targets_of(
    values: Tensor, row_bits: Tensor, backward_bits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Room for packed weights, a bias and room for it in 16 bits, and room for metadata if the sides have any."""
    rows, columns = len(values), len(backward_bits)
    w, w_t = (
        torch.empty(side, dtype=torch.bfloat16, device="cuda") for side in ((rows, columns // 2), (columns, rows // 2))
    )
    bias = torch.randn(rows, device="cuda")
    size = 0 if columns % 64 or rows % 32 else rows * columns // 8
    metadata = torch.empty(size, dtype=torch.uint8, device="cuda") if size else None
    return w, w_t, bias, torch.empty_like(bias, dtype=torch.bfloat16), metadata


def masks_with_fillers() -> list[Tensor]:
    """Masks with fillers, of sides that the kernel takes."""
    return [layer(columns, rows, torch.float32)[2] for rows, columns in ((64, 32), (128, 96), (768, 2048))]


def metadata_of(bits: Tensor) -> Tensor:
    """What the kernel is to write, in plain torch."""
    return tile_metadata.encode(slots_of(bits, bits.shape[1] * 8))


def test_strided_tensors_are_refused() -> None:
    values, row_bits, backward_bits, _, _ = layer(64, 128, torch.float32)
    with pytest.raises(ValueError, match="values_OK must be contiguous"):
        cuda.launch(cuda.refresh(values.t().contiguous().t(), row_bits, backward_bits, w=values.bfloat16()))
