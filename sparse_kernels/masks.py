"""N:M masks: choosing them, pruning twice, soft thresholding, unbiased pruning, and the bits in which masks are stored.

Shape suffixes: O out features, I in features, K = I·N/M kept entries of a row; G groups; T tiles, P patterns of a tile;
B tokens, F features of an activation; R, C rows and columns of any matrix.
"""

import functools
import itertools

import torch
from torch import Tensor


def check_pattern(n: int, m: int) -> None:
    """ValueError unless 0 < n < m."""
    if not 0 < n < m:
        raise ValueError(f"an N:M pattern needs 0 < n < m, got {n}:{m}")


def nm_mask(score: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """Keep the `n` largest of every `m` consecutive entries along `dim`; of equal ones the first.

    Args:
        score: any shape, `score.shape[dim]` a multiple of `m`; no NaN.

    Returns:
        bool, the shape of `score`, exactly `n` True in every group.

    Raises:
        ValueError: the side is not a multiple of `m`, or not 0 < n < m.
    """
    check_pattern(n, m)
    if score.shape[dim] % m:
        raise ValueError(f"side {score.shape[dim]} is not a multiple of m={m}")
    dim %= score.dim()
    entries = score.unflatten(dim, (-1, m)).unbind(dim + 1)  # m views, one for each place in a group
    # A tournament of all pairs. Unlike a sort it breaks ties the same way on every device, and for m = 4 it is faster.
    # A rank is the number of entries that beat one: at first all before it, less those that it beats.
    narrow = torch.int8 if m <= 128 else torch.int16
    rank = [torch.full(entries[0].shape, place, dtype=narrow, device=score.device) for place in range(m)]
    for late in range(m):
        for early in range(late):
            late_wins = entries[late] > entries[early]
            rank[early] += late_wins
            rank[late].add_(late_wins, alpha=-1)  # torch subtracts no bool otherwise
    return (torch.stack(rank, dim + 1) < n).flatten(dim, dim + 1)


def mask_score(weight_OI: Tensor, kind: str, *, seed: int = 0, norms_I: Tensor | None = None) -> Tensor:
    """What a mask keeps the largest of: "magnitude" |W|, "random", or "wanda" |W_ij| · ||X_j|| (arXiv 2306.11695).

    Args:
        weight_OI: (out, in); for "random" its shape alone matters.
        seed: of the random scores, which are drawn on the CPU and so the same on every device.
        norms_I: (in,), the L2 norm of each input feature over the tokens; for "wanda", see `input_norms`.

    Returns:
        (out, in), on the weight's device.

    Raises:
        ValueError: another kind, or "wanda" without the norms of this layer's inputs.
    """
    if kind == "magnitude":
        return weight_OI.abs()
    if kind == "random":
        return torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(seed)).to(weight_OI.device)
    if kind != "wanda":
        raise ValueError(f"mask kind must be 'magnitude', 'random' or 'wanda', got {kind!r}")
    if norms_I is None or norms_I.shape != weight_OI.shape[1:]:
        raise ValueError(f"a wanda mask needs the norms of {weight_OI.shape[1]} inputs")
    return weight_OI.abs() * norms_I.to(weight_OI.device)


def row_mask(
    weight_OI: Tensor, n: int, m: int, *, kind: str = "magnitude", seed: int = 0, norms_I: Tensor | None = None
) -> Tensor:
    """The mask of W^R, N:M along the input features (the reduction of the forward product), by `mask_score`.

    Returns:
        bool (out, in).
    """
    return nm_mask(mask_score(weight_OI, kind, seed=seed, norms_I=norms_I), n, m)


def is_nm(mask_OI: Tensor, n: int, m: int) -> bool:
    """Whether a mask keeps exactly `n` of every `m` along its rows."""
    return mask_OI.shape[1] % m == 0 and bool((mask_OI.unflatten(1, (-1, m)).sum(-1) == n).all())


def double_prune(
    weight_OI: Tensor, row_mask_OI: Tensor, n: int, m: int, *, kind: str = "magnitude", seed: int = 0
) -> Tensor:
    """The mask of W^{R,C}: of the entries that W^R keeps, at most `n` of every `m` along the output features.

    Chosen by magnitude, or at random (see `mask_score`). A group with fewer than `n` kept entries keeps what it has, so
    for a random 2:4 row mask 40.6 % of all entries remain (arXiv 2405.16325, lemma 4.3.1).

    Returns:
        bool (out, in), a subset of `row_mask_OI`.
    """
    score_OI = mask_score(weight_OI, kind, seed=seed).masked_fill(~row_mask_OI, -1)  # a pruned entry loses to a kept 0
    return nm_mask(score_OI, n, m, dim=0) & row_mask_OI


def drop_and_grow(
    weight_OI: Tensor, mask_OI: Tensor, gradient_OI: Tensor, n: int, m: int, share: float = 1.0
) -> Tensor:
    """An N:M mask that follows the gradient, by one swap in a group at most.

    As in RigL (Evci et al. 2020, arXiv 1911.11134), which does so in whole layers: a group's kept entry of the smallest
    magnitude gives its place to the pruned entry of the largest gradient. Here it does so where that gradient is larger
    than its own, in the groups of a row where it is so by most; of equal entries the first counts.

    Args:
        weight_OI: (out, in).
        mask_OI: bool (out, in), N:M along the rows.
        gradient_OI: (out, in), of the loss with respect to each entry, pruned ones included.
        share: of the kept entries of a row, at most, that lose their place; but for ties.

    Returns:
        bool (out, in), with as many kept entries in each group as before.
    """
    size_OI = gradient_OI.abs()
    drop_OI = nm_mask(torch.where(mask_OI, -weight_OI.abs(), -torch.inf), 1, m)
    grow_OI = nm_mask(torch.where(mask_OI, -1, size_OI), 1, m)
    lost_OG, gained_OG = ((size_OI * each_OI).unflatten(1, (-1, m)).sum(-1) for each_OI in (drop_OI, grow_OI))
    gain_OG = gained_OG - lost_OG
    count = min(int(share * n * gain_OG.shape[1]), gain_OG.shape[1])
    if not count:
        return mask_OI.clone()
    swap_OG = (gain_OG > 0) & (gain_OG >= gain_OG.topk(count, dim=1).values[:, -1:])
    return torch.where(swap_OG.repeat_interleave(m, dim=1), (mask_OI & ~drop_OI) | grow_OI, mask_OI)


# ---------------------------------------------------------------------------------------------------------------------
# Transposable masks

LARGEST_TRANSPOSABLE = 4
"""The largest m whose tiles are searched: 4x4 has at most 90 patterns, 5x5 has 2,040 already."""
TILES_AT_ONCE = 1 << 17
"""Tiles whose patterns are compared together; 90 float64 scores each: 94 MB."""


def transposable_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Keep `n` in every row and every column of each m x m tile: the pattern with the largest sum of scores.

    W and W^T are then both N:M, so one mask serves both products (FST, arXiv 2404.01847). All patterns of a tile are
    compared, so this is the optimum; of equal ones the first.

    Args:
        score: (O, I), both sides multiples of `m`; no NaN.

    Returns:
        bool (O, I).

    Raises:
        ValueError: a side is no multiple of `m`, not 0 < n < m, or m > 4.
    """
    O, I = score.shape  # noqa: E741
    patterns = tile_patterns(n, m, score.device)
    if O % m or I % m:
        raise ValueError(f"sides {O} x {I} are not multiples of m={m}")
    tiles_TE = score.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2).reshape(-1, m * m)
    # In float64 a sum of few float32 numbers is as good as exact: neither TF32 nor the order decides anything.
    weights_EP = patterns.t().double()
    best_T = [(part.double() @ weights_EP).argmax(1) for part in tiles_TE.split(TILES_AT_ONCE)]  # [T,E] · [E,P]
    chosen = patterns[torch.cat(best_T)].view(O // m, I // m, m, m)
    return chosen.transpose(1, 2).reshape(O, I)


@functools.cache
def tile_patterns(n: int, m: int, device: torch.device) -> Tensor:
    """Every m x m pattern with `n` in each row and column: bool (P, m·m); 90 for 2:4, 2 for 1:2."""
    check_pattern(n, m)
    if m > LARGEST_TRANSPOSABLE:
        raise ValueError(f"transposable masks are searched for up to m={LARGEST_TRANSPOSABLE}, got {n}:{m}")
    rows = [[place in kept for place in range(m)] for kept in itertools.combinations(range(m), n)]
    tiles = torch.tensor(list(itertools.product(rows, repeat=m)))  # (P', m, m)
    return tiles[(tiles.sum(1) == n).all(1)].flatten(1).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Soft thresholding


def soft_threshold(weight: Tensor, n: int, m: int) -> Tensor:
    """S(W): sign(w) · max(|w| - t, 0), with t the (n + 1)-th largest magnitude of each `m` consecutive entries.

    At most `n` of every `m` entries along the last side are left, and unlike a mask's product it is a continuous
    function of W (S-STE, arXiv 2409.09099, which has it for 2:4).

    Args:
        weight: any shape, its last side a multiple of `m`.

    Returns:
        The same shape and dtype; zeros are +0.

    Raises:
        ValueError: not 0 < n < m.
    """
    check_pattern(n, m)
    groups = weight.unflatten(-1, (-1, m))
    left = list(groups.abs().unbind(-1))
    for _ in range(n):
        _take_largest(left)
    t = _take_largest(left).unsqueeze(-1)
    soft: Tensor = groups - groups.clamp(-t, t)
    return soft.flatten(-2)


def soft_scale(weight: Tensor, n: int, m: int) -> Tensor:
    """The beta that minimises ||W - beta · S(W)||²: <W, S(W)> / <S(W), S(W)>; 1 where S(W) is 0.

    S-STE (arXiv 2409.09099) computes it once for a weight, from its first values.

    Returns:
        () float32.
    """
    soft = soft_threshold(weight, n, m)
    products = [(each.double() * soft.double()).sum() for each in (weight, soft)]
    return torch.where(products[1] > 0, products[0] / products[1], 1).float()


# ---------------------------------------------------------------------------------------------------------------------
# Unbiased pruning


def mvue(X: Tensor, n: int, m: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """The minimum-variance unbiased estimate of X that is N:M along `dim` (arXiv 2203.10991).

    Each entry of a group is kept with probability p = min(1, |x| / tau), where tau makes these add up to `n`, and is
    divided by it: it becomes x itself, or tau with the sign of x. By systematic sampling (one uniform number places
    points one apart on the line along which the p are laid) exactly `n` are kept; fewer only where fewer are not zero.

    Args:
        X: any shape and floating dtype. The end of a side that is no multiple of `m` is left as it is.
        generator: None for the default one of X's device, which CUDA graphs and torch.compile know.

    Returns:
        The shape and dtype of X. Computed in float32 (float64 for such an X); unbiased up to rounding. A group with a
        NaN becomes NaN.

    Raises:
        ValueError: not 0 < n < m.
    """
    check_pattern(n, m)
    dim %= X.dim()
    whole = X.shape[dim] // m * m
    groups = X.narrow(dim, 0, whole).unflatten(dim, (-1, m))
    entries = list(groups.to(torch.promote_types(X.dtype, torch.float32)).unbind(dim + 1))
    sizes = [entry.abs() for entry in entries]
    tau = _mvue_threshold(sizes, n)
    u = torch.rand(tau.shape, generator=generator, dtype=tau.dtype, device=tau.device)
    taken = _systematic_sample(sizes, tau, u)
    # A NaN is neither certain nor dropped, so it is not hidden.
    estimate = [
        torch.where(certain, x, torch.where(dropped, 0, x.sign() * tau))
        for x, (certain, dropped) in zip(entries, taken, strict=True)
    ]
    sparse = torch.stack(estimate, dim + 1).flatten(dim, dim + 1).to(X.dtype)
    return sparse if whole == X.shape[dim] else torch.cat([sparse, X.narrow(dim, whole, X.shape[dim] - whole)], dim)


def _mvue_threshold(sizes: list[Tensor], n: int) -> Tensor:
    """The tau for which min(1, size / tau) adds up to `n`: the least of (all but the k largest) / (n - k), k < n."""
    left, largest = list(sizes), []
    for _ in range(n - 1):
        largest.append(_take_largest(left))
    # Added from below: the total less its largest would lose the small ones to rounding.
    rest = functools.reduce(torch.add, left)
    tau = rest
    for count, size in enumerate(reversed(largest), start=2):
        rest = rest + size
        tau = torch.minimum(tau, rest / count)
    return tau


def _take_largest(left: list[Tensor]) -> Tensor:
    """Remove the largest of some tensors, entry by entry, and return it; the others are left in any order."""
    for place in range(len(left) - 1):  # it bubbles to the end
        low, high = torch.minimum(left[place], left[place + 1]), torch.maximum(left[place], left[place + 1])
        left[place], left[place + 1] = low, high
    return left.pop()


def _systematic_sample(sizes: list[Tensor], tau: Tensor, u: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each entry: whether it is kept for certain; whether it is dropped."""
    m = len(sizes)
    # An entry of p = 1 but for rounding could hide two points. It is kept as it is, which is no less unbiased.
    near = 1 - m * m * 2.0**-22
    certain = [size >= near * tau for size in sizes]
    p = [torch.where(sure, 0, size / tau) for sure, size in zip(certain, sizes, strict=True)]
    ends = list(itertools.accumulate(p))
    points = ends[-1].round()  # a whole number but for rounding, which must neither win nor lose a point at the end
    taken, before = [], torch.zeros_like(u)
    for sure, end in zip(certain, ends, strict=True):
        passed = torch.where(end >= ends[-1], points, torch.minimum((end + u).floor(), points))
        taken.append((sure, passed == before))
        before = passed
    return taken


# ---------------------------------------------------------------------------------------------------------------------
# Activations that are not negative


def prune_features(A: Tensor) -> Tensor:
    """The 2 largest of each 4 features, others 0: (..., F) -> (..., F); a rest that is no group is left as it is."""
    whole = A.shape[-1] // 4 * 4
    groups = A[..., :whole]
    pruned = torch.where(nm_mask(groups.detach(), 2, 4), groups, 0)
    return pruned if whole == A.shape[-1] else torch.cat([pruned, A[..., whole:]], -1)


@torch.no_grad()
def prune_tokens(A: Tensor) -> Tensor:
    """The 2 largest of each 4 tokens of a feature, others 0: (..., F) -> (B, F), without a graph.

    Of B tokens those of a group are B // 4 apart. A rest that is no group, the last tokens, is left as it is.
    """
    A_BF = A.reshape(-1, A.shape[-1])
    whole = len(A_BF) // 4 * 4
    groups_RC = A_BF[:whole].reshape(4, -1)  # a column is a group: of one feature, tokens whole / 4 apart
    pruned_BF = torch.where(nm_mask(groups_RC, 2, 4, dim=0), groups_RC, 0).view(whole, A_BF.shape[1])
    return pruned_BF if whole == len(A_BF) else torch.cat([pruned_BF, A_BF[whole:]])


# ---------------------------------------------------------------------------------------------------------------------
# Storing masks, and what they keep


def scatter(values_OK: Tensor, mask_OI: Tensor) -> Tensor:
    """Kept entries, row by row in column order, as the dense matrix with its zeros: (O, K), bool (O, I) -> (O, I)."""
    return torch.zeros_like(mask_OI, dtype=values_OK.dtype).masked_scatter_(mask_OI, values_OK)


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
