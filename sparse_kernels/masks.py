"""N:M masks: choosing them, pruning twice, and the bits in which they are stored.

Shape suffixes: O out features, I in features, K = I·N/M kept entries of a row.
"""

import torch
from torch import Tensor


def nm_mask(score: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """Keep the `n` largest of every `m` consecutive entries along `dim`; of equal ones the first.

    Args:
        score: any shape, `score.shape[dim]` a multiple of `m`; no NaN.

    Returns:
        bool, the shape of `score`, exactly `n` True in every group.

    Raises:
        ValueError: the side is not a multiple of `m`, or not 0 < n < m.
    """
    if not 0 < n < m:
        raise ValueError(f"an N:M pattern needs 0 < n < m, got {n}:{m}")
    if score.shape[dim] % m:
        raise ValueError(f"side {score.shape[dim]} is not a multiple of m={m}")
    dim %= score.dim()
    entries = score.unflatten(dim, (-1, m)).unbind(dim + 1)  # m views, one for each place in a group
    rank = [torch.zeros(entries[0].shape, dtype=torch.int16, device=score.device) for _ in range(m)]
    # A tournament of all pairs. Unlike a sort it breaks ties the same way on every device, and for m = 4 it is faster.
    for late in range(m):
        for early in range(late):
            late_wins = entries[late] > entries[early]
            rank[early] += late_wins
            rank[late] += ~late_wins
    return (torch.stack(rank, dim + 1) < n).flatten(dim, dim + 1)


def row_mask(weight_OI: Tensor, n: int, m: int, *, kind: str = "magnitude", seed: int = 0) -> Tensor:
    """The mask of W^R, N:M along the input features (the reduction of the forward product).

    Args:
        weight_OI: (out, in); its magnitudes decide for kind "magnitude", its shape alone for "random".
        seed: of the random choice, which is drawn on the CPU and so the same on every device.

    Returns:
        bool (out, in).
    """
    if kind == "magnitude":
        return nm_mask(weight_OI.abs(), n, m)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return nm_mask(torch.rand(weight_OI.shape, generator=generator), n, m).to(weight_OI.device)
    raise ValueError(f"mask kind must be 'magnitude' or 'random', got {kind!r}")


def double_prune(weight_OI: Tensor, row_mask_OI: Tensor, n: int, m: int) -> Tensor:
    """The mask of W^{R,C}: of the entries that W^R keeps, at most `n` of every `m` along the output features.

    Chosen by magnitude. A group with fewer than `n` kept entries keeps what it has, so for a random 2:4 row
    mask 40.6 % of all entries remain (arXiv 2405.16325, lemma 4.3.1).

    Returns:
        bool (out, in), a subset of `row_mask_OI`.
    """
    score_OI = weight_OI.abs().masked_fill(~row_mask_OI, -1)  # a pruned entry loses to a kept zero
    return nm_mask(score_OI, n, m, dim=0) & row_mask_OI


def pack_bits(mask_RC: Tensor) -> Tensor:
    """bool (R, C) to uint8 (R, ceil(C/8)), lowest bit first: for M = 4, a nibble for each group."""
    padded: Tensor = torch.nn.functional.pad(mask_RC, (0, -mask_RC.shape[1] % 8)).unflatten(1, (-1, 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask_RC.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 (R, ceil(C/8)) to bool (R, C) with `columns` = C."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    places = bits.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1)
    return places.flatten(1)[:, :columns].bool()
