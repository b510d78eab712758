"""The order of metadata is found from what a library writes: tile order, and orders that are drawn."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_kernels import masks, metadata_order, tile_metadata
from sparse_kernels.matmul_plan import random_mask
from sparse_kernels.metadata_order import MetadataOrder, find_order


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return random_mask(rows, columns, torch.Generator().manual_seed(seed))


def in_tile_order(bits: Tensor) -> Tensor:
    return tile_metadata.encode(masks.unpack_bits(bits, bits.shape[1] * 8))


def test_tile_order_is_found() -> None:
    order = find_order(in_tile_order)
    assert order is not None
    assert order.tile == (tile_metadata.TILE_ROWS, tile_metadata.TILE_COLUMNS)
    assert order.by_rows
    for rows, columns in ((64, 32), (192, 96), (320, 1056)):
        assert torch.equal(order.encode(drawn(rows, columns)), in_tile_order(drawn(rows, columns)))


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 6), st.integers(2, 5), st.booleans(), st.integers(0, 999))
def test_any_order_by_tiles_is_found(high: int, wide: int, by_rows: bool, seed: int) -> None:
    """Bits of the address in any order, some of them added to others, as swizzles do."""
    source, size = random.Random(seed), 1 + high + wide
    parities = [1 << bit for bit in range(size)]
    source.shuffle(parities)
    for _ in range(3):
        one, other = source.sample(range(size), 2)
        parities[one] ^= parities[other]
    written = MetadataOrder(parities[0], tuple(parities[1 : 1 + wide]), tuple(parities[1 + wide :]), by_rows)
    found = find_order(written.encode)
    assert found is not None
    for rows, columns in (written.tile, (3 * written.tile[0], 5 * written.tile[1])):
        assert torch.equal(found.encode(drawn(rows, columns, seed)), written.encode(drawn(rows, columns, seed)))


def test_what_a_kernel_reads_names_every_slot() -> None:
    order = find_order(in_tile_order)
    assert order is not None
    row_bits, group_bits, by_rows, slot, *rest = order.table()
    groups, rows, differ = rest[:16], rest[16:32], rest[32:]
    assert (1 << row_bits, 4 << group_bits, by_rows) == (*order.tile, 1)
    size = 1 + row_bits + group_bits

    def parity(number: int) -> int:
        return number.bit_count() % 2

    seen = []
    for start in range(0, 1 << size, 16):  # as the kernel does
        row = sum(parity(start & mask) << k for k, mask in enumerate(rows))
        group = sum(parity(start & mask) << k for k, mask in enumerate(groups))
        seen += [(row ^ d & 0xFFF, group ^ d >> 12 & 0xFFF, parity(start & slot) ^ d >> 24) for d in differ]
    expected = order.slots_at(torch.arange(1 << size), *order.tile)
    assert seen == list(zip(*(part.tolist() for part in expected), strict=True))


@pytest.mark.parametrize("fault", ["shifted", "hashed", "longer"])
def test_another_kind_of_order_is_not_found(fault: str) -> None:
    shuffled = torch.randperm(
        metadata_order.SIDES[0] * metadata_order.SIDES[1] // 8, generator=torch.Generator().manual_seed(1)
    )

    def write(bits: Tensor) -> Tensor:
        metadata = in_tile_order(bits)
        if fault == "shifted":
            return metadata.roll(1)
        return metadata[shuffled] if fault == "hashed" else torch.cat([metadata, metadata])

    assert find_order(write) is None
