"""Tile order: the order of a 2:4 mask's metadata in which the tensor cores' kernels read it, and files hold it.

A group is 4 columns of a row, and its nibble the places (0 to 3) of its two kept entries: first | second << 2. Rows are
padded to whole tiles of 64, columns to 32, with nibbles of 0b0100. The bytes are [R/64][C/32][4][8][8]: for each tile
of 64 rows and 32 columns, each of its 4 bands of 16 rows, and each r of 8, the groups 0 4 1 5 2 6 3 7 of these columns;
a byte's low nibble is of row r of the band, the high one of row r + 8. cuSPARSELt has this order for 16-bit values on
sm_90; `metadata_word` in kernels.cu is the same thing.

Shape suffixes: R rows, C columns of a matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 64, 32
PADDING = 0b0100
"""The nibble of a group outside of the matrix: its first two places."""


def metadata_bytes(rows: int, columns: int) -> int:
    """Bytes of the metadata of a matrix (R, C)."""
    return -(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS) * (TILE_ROWS * TILE_COLUMNS // 8)


def encode(mask_RC: Tensor) -> Tensor:
    """A 2:4 mask, bool (R, C) with exactly two True in every 4 along a row, to uint8 (metadata_bytes(R, C),)."""
    kept_RG4 = mask_RC.unflatten(1, (-1, 4)).to(torch.uint8)
    first_RG, second_RG = kept_RG4.argmax(-1), 3 - kept_RG4.flip(-1).argmax(-1)
    nibbles_RG = (first_RG | second_RG << 2).to(torch.uint8)
    rows, groups = nibbles_RG.shape
    nibbles_RG = F.pad(nibbles_RG, (0, -groups % (TILE_COLUMNS // 4), 0, -rows % TILE_ROWS), value=PADDING)
    tiles = nibbles_RG.unflatten(1, (-1, 2, 4)).unflatten(0, (-1, 4, 2, 8))  # [R/64][4][2][8] by [C/32][2][4]
    low, high = tiles.permute(2, 0, 4, 1, 3, 6, 5).flatten(1)
    metadata: Tensor = low | high << 4
    return metadata


def decode(metadata: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `encode`: uint8 (metadata_bytes(R, C),) to bool (R, C)."""
    tiles = torch.stack([metadata & 15, metadata >> 4])
    tiles = tiles.view(2, -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS), 4, 8, 4, 2)
    nibbles_RG = tiles.permute(1, 3, 0, 4, 2, 6, 5).flatten(4, 6).flatten(0, 3)[:rows, : columns // 4, None]
    places = torch.arange(4, dtype=torch.uint8, device=metadata.device)
    return ((nibbles_RG & 3 == places) | (nibbles_RG >> 2 == places)).flatten(1)


def is_sound(metadata: Tensor) -> bool:
    """Whether every nibble names two places in ascending order; what nothing encoded might not."""
    nibbles = torch.stack([metadata & 15, metadata >> 4])
    return bool((nibbles & 3 < nibbles >> 2).all())
