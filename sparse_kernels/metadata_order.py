"""In which order a library writes a packed matrix's metadata: found out by packing matrices that are known.

The metadata have two bits for each slot of a group, the place (0 to 3) of its entry. Where they lie is taken to be
linear over bits: each bit of a slot's row, group and number is the parity of some bits of its address. So it is within
a tile, whose sides are powers of two; tiles follow one another along rows, or along columns. An order that is none of
these is not found. Nobody need trust one that is: `matmul_plan.writes_metadata` compares what the kernel writes by it.

Shape suffixes: R rows, C columns of a matrix; a group is 4 columns of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ROW_BITS, _GROUP_BITS = 8, 7
SIDES = 1 << _ROW_BITS, 4 << _GROUP_BITS
"""(R, C) of the matrices from which an order is found: larger than a tile."""
_ADDRESS_BITS = _ROW_BITS + _GROUP_BITS + 1
_WORD = 16
"""Slots of 32 bits of metadata, which a thread writes."""


@dataclass(frozen=True)
class MetadataOrder:
    """An order of metadata.

    Attributes:
        slot, groups, rows: which bits of a slot's address within a tile have the parity of each bit of its number in
            the group, of its group, and of its row, lowest bits first.
        by_rows: tiles of the same rows follow one another.
    """

    slot: int
    groups: tuple[int, ...]
    rows: tuple[int, ...]
    by_rows: bool

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile, of which both sides of a matrix must be multiples."""
        return 1 << len(self.rows), 4 << len(self.groups)

    def encode(self, bits: Tensor) -> Tensor:
        """The metadata of a mask: uint8 (R, C/8), two bits in every nibble, to uint8 (R·C/8,)."""
        rows, columns = bits.shape[0], bits.shape[1] * 8
        nibbles_RG = torch.stack([bits & 15, bits >> 4], dim=-1).flatten(1)
        row, group, slot = self.slots_at(torch.arange(rows * columns // 2, device=bits.device), rows, columns)
        nibble = nibbles_RG[row, group].int()
        first = torch.where(nibble & 1 > 0, 0, torch.where(nibble & 2 > 0, 1, 2))
        last = torch.where(nibble & 8 > 0, 3, torch.where(nibble & 4 > 0, 2, 1))
        four = torch.where(slot > 0, last, first).view(-1, 4)
        return (four << torch.arange(0, 8, 2, device=bits.device)).sum(1).to(torch.uint8)

    def slots_at(self, address: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, group and number of the slots at these addresses, int64, in a matrix (rows, columns)."""
        size = 1 + len(self.groups) + len(self.rows)
        tile, place = address >> size, address & ((1 << size) - 1)
        high, wide = self.tile
        across = columns // wide if self.by_rows else rows // high
        outer, inner = tile // across, tile % across
        tile_row, tile_group = (outer, inner) if self.by_rows else (inner, outer)
        row = _number([_parity(place & mask) for mask in self.rows], place)
        group = _number([_parity(place & mask) for mask in self.groups], place)
        return row + tile_row * high, group + tile_group * (wide // 4), _parity(place & self.slot)

    def table(self) -> list[int]:
        """The order as kernels.cu reads it: bits of a row, of a group, by_rows, then the parities of slot, groups and
        rows, 16 places each, and of the slots of a word how their row, group and number differ from those of the first.
        """

        def padded(masks: tuple[int, ...]) -> list[int]:
            return [*masks, *[0] * (16 - len(masks))]

        of_word = zip(*(part.tolist() for part in self.slots_at(torch.arange(_WORD), *self.tile)), strict=True)
        differ = [row | group << 12 | slot << 24 for row, group, slot in of_word]
        sides = [len(self.rows), len(self.groups), int(self.by_rows)]
        return [*sides, self.slot, *padded(self.groups), *padded(self.rows), *differ]


def find_order(write: Callable[[Tensor], Tensor]) -> MetadataOrder | None:
    """The order in which `write` lays out metadata; None if it is of another kind.

    Args:
        write: of a mask of `SIDES`, uint8 (R, C/8) with two bits in every nibble: its metadata, uint8 (R·C/8,).
    """
    rows, columns = SIDES

    def places(nibbles_RG: Tensor) -> Tensor:
        nibbles_RG = nibbles_RG.to(torch.uint8)
        metadata = write(nibbles_RG[:, ::2] | nibbles_RG[:, 1::2] << 4).cpu()
        return (metadata[:, None] >> torch.arange(0, 8, 2, dtype=torch.uint8) & 3).flatten()

    row, group = torch.arange(rows)[:, None], torch.arange(columns // 4)
    first_two = torch.full((rows, columns // 4), 0b0011)
    base = places(first_two)
    if len(base) != 1 << _ADDRESS_BITS:
        return None
    changes = [first_two ^ 0b1010]  # of the second slot alone: places 0 and 3
    for bits, number in ((_GROUP_BITS, group), (_ROW_BITS, row)):  # of both slots: places 2 and 3
        changes += [torch.where(number >> bit & 1 > 0, 0b1100, first_two) for bit in range(bits)]
    address, masks = torch.arange(1 << _ADDRESS_BITS), []
    for change in changes:
        changed = (places(change) != base).long()
        mask = sum(int(changed[1 << bit]) << bit for bit in range(_ADDRESS_BITS))
        if not torch.equal(_parity(address & mask), changed):
            return None
        masks.append(mask)
    return _by_tiles(masks[0], masks[1 : 1 + _GROUP_BITS], masks[1 + _GROUP_BITS :])


def _by_tiles(slot: int, groups: list[int], rows: list[int]) -> MetadataOrder | None:
    """The order with the smallest tile, at least a word; the parities are those of a whole matrix of `SIDES`."""
    for size in range(_WORD.bit_length() - 1, _ADDRESS_BITS):
        inner_groups = [mask for mask in groups if mask < 1 << size]
        inner_rows = [mask for mask in rows if mask < 1 << size]
        wide, high = len(inner_groups), len(inner_rows)
        lowest = inner_groups == groups[:wide] and inner_rows == rows[:high] and slot < 1 << size
        if not lowest or 1 + wide + high != size or wide == _GROUP_BITS or high == _ROW_BITS:
            continue
        outer = [1 << bit for bit in range(size, _ADDRESS_BITS)]
        for by_rows in (True, False):
            following = [*groups[wide:], *rows[high:]] if by_rows else [*rows[high:], *groups[wide:]]
            if following == outer:
                return MetadataOrder(slot, tuple(inner_groups), tuple(inner_rows), by_rows)
    return None


def _parity(number: Tensor) -> Tensor:
    for shift in (16, 8, 4, 2, 1):
        number = number ^ number >> shift
    return number & 1


def _number(bits: list[Tensor], like: Tensor) -> Tensor:
    """The numbers with these bits, lowest first."""
    return sum((bit << k for k, bit in enumerate(bits)), torch.zeros_like(like))
