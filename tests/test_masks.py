"""Masks: exactly N:M, the largest kept, pruned twice as the paper's lemma says, stored without loss; mvue."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_kernels import masks

PATTERNS = st.sampled_from([(2, 4), (1, 2), (2, 8), (4, 8), (1, 4), (8, 16)])


@given(PATTERNS, st.integers(1, 9), st.integers(1, 7), st.integers(0, 2**31), st.sampled_from([0, 1]))
def test_keeps_the_n_largest_of_every_group(
    pattern: tuple[int, int], rows: int, groups: int, seed: int, dim: int
) -> None:
    n, m = pattern
    # Few distinct scores, so that ties are met all the time.
    score = torch.randint(0, 5, (rows, groups * m), generator=torch.Generator().manual_seed(seed)).float()
    mask = masks.nm_mask(score.t() if dim == 0 else score, n, m, dim=dim)
    mask = mask.t() if dim == 0 else mask
    order = score.view(rows, groups, m).sort(dim=-1, descending=True, stable=True).indices
    expected = torch.zeros(rows, groups, m, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    assert torch.equal(mask, expected.view(rows, -1))


@given(PATTERNS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_double_pruning_is_a_part_of_the_row_mask(pattern: tuple[int, int], r: int, c: int, seed: int) -> None:
    n, m = pattern
    weight = torch.randn(r * m, c * m, generator=torch.Generator().manual_seed(seed))
    row = masks.row_mask(weight, n, m)
    column = masks.double_prune(weight, row, n, m)
    assert not (column & ~row).any()
    assert (column.unflatten(0, (-1, m)).sum(1) == row.unflatten(0, (-1, m)).sum(1).clamp(max=n)).all()
    kept_least = (weight.abs().masked_fill(~column, torch.inf)).unflatten(0, (-1, m)).amin(1)
    lost_most = (weight.abs() * (row & ~column)).unflatten(0, (-1, m)).amax(1)
    assert (lost_most <= kept_least).all()


@pytest.mark.parametrize(("n", "m", "density"), [(2, 4, 0.40625), (1, 2, 0.375), (2, 8, 0.25 - 0.0584)])
@pytest.mark.parametrize("kind", ["random", "magnitude"])
def test_density_after_double_pruning(n: int, m: int, density: float, kind: str) -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    column = masks.double_prune(weight, masks.row_mask(weight, n, m, kind=kind, seed=3), n, m)
    assert column.float().mean().item() == pytest.approx(density, abs=1e-3)


def test_a_kept_zero_beats_a_pruned_entry() -> None:
    row = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.bool)
    assert torch.equal(masks.double_prune(torch.zeros(4, 2), row, 2, 4), row)


@given(PATTERNS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31), st.floats(0, 1))
def test_drop_and_grow_swaps_once_a_group_where_the_gradient_is_larger_by_most(
    pattern: tuple[int, int], rows: int, groups: int, seed: int, share: float
) -> None:
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    # Few distinct numbers, so that ties are met all the time.
    weight, gradient = torch.randint(-3, 4, (2, rows, groups * m), generator=generator).float()
    mask = masks.row_mask(weight, n, m, kind="random", seed=seed)
    expected = mask.clone()
    for row in range(rows):
        swaps = []
        for first in range(0, groups * m, m):
            group = range(first, first + m)
            least = min((i for i in group if mask[row, i]), key=lambda i: abs(weight[row, i]))
            steepest = max((i for i in group if not mask[row, i]), key=lambda i: abs(gradient[row, i]))
            swaps.append((float(abs(gradient[row, steepest]) - abs(gradient[row, least])), least, steepest))
        most = sorted((gain for gain, *_ in swaps), reverse=True)[: int(share * n * groups)]
        for gain, least, steepest in swaps:
            if most and gain > 0 and gain >= most[-1]:
                expected[row, least], expected[row, steepest] = False, True
    grown = masks.drop_and_grow(weight, mask, gradient, n, m, share)
    assert torch.equal(grown, expected)
    assert masks.is_nm(grown, n, m)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
def test_bits_round_trip(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = masks.pack_bits(mask)
    assert bits.shape == (rows, -(-columns // 8))
    assert torch.equal(masks.unpack_bits(bits, columns), mask)


def test_random_mask_depends_on_its_seed_alone() -> None:
    a = masks.row_mask(torch.zeros(16, 16), 2, 4, kind="random", seed=1)
    assert torch.equal(a, masks.row_mask(torch.ones(16, 16), 2, 4, kind="random", seed=1))
    assert not torch.equal(a, masks.row_mask(torch.zeros(16, 16), 2, 4, kind="random", seed=2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.nm_mask(torch.zeros(2, 6), 2, 4), "not a multiple of m=4"),
        (lambda: masks.nm_mask(torch.zeros(2, 8), 4, 4), "0 < n < m"),
        (lambda: masks.row_mask(torch.zeros(2, 8), 2, 4, kind="largest"), "mask kind must be"),
        (lambda: masks.row_mask(torch.zeros(2, 8), 2, 4, kind="wanda"), "needs the norms of 8 inputs"),
        (lambda: masks.mask_score(torch.zeros(2, 8), "wanda", norms_I=torch.ones(2)), "needs the norms of 8 inputs"),
        (lambda: masks.transposable_mask(torch.zeros(6, 8), 2, 4), "6 x 8 are not multiples of m=4"),
        (lambda: masks.transposable_mask(torch.zeros(8, 8), 4, 8), "up to m=4, got 4:8"),
        (lambda: masks.transposable_mask(torch.zeros(8, 8), 4, 4), "0 < n < m"),
        (lambda: masks.mvue(torch.zeros(8, 8), 4, 4, 0), "0 < n < m"),
    ],
)
def test_bad_input(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


@given(PATTERNS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_random_columns_are_a_part_of_the_row_mask(pattern: tuple[int, int], r: int, c: int, seed: int) -> None:
    n, m = pattern
    weight = torch.randn(r * m, c * m, generator=torch.Generator().manual_seed(seed))
    row = masks.row_mask(weight, n, m)
    column = masks.double_prune(weight, row, n, m, kind="random", seed=seed)
    assert not (column & ~row).any()
    assert (column.unflatten(0, (-1, m)).sum(1) == row.unflatten(0, (-1, m)).sum(1).clamp(max=n)).all()
    assert torch.equal(column, masks.double_prune(weight * 3 + 1, row, n, m, kind="random", seed=seed))


def test_random_columns_favour_none() -> None:
    weight, row = torch.arange(1.0, 65).view(8, 8), torch.ones(8, 8, dtype=torch.bool)
    draws = torch.stack([masks.double_prune(weight, row, 2, 4, kind="random", seed=seed) for seed in range(400)])
    assert (draws.float().mean(0) - 0.5).abs().max() < 4 * (0.25 / 400) ** 0.5


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, -2.0, 1.0]])
    norms = torch.tensor([9.0, 4.0, 2.0, 1.0])  # scores 9 8 6 4 and 36 12 4 1
    assert masks.mask_score(weight, "wanda", norms_I=norms).tolist() == [[9, 8, 6, 4], [36, 12, 4, 1]]
    both = torch.tensor([[True, True, False, False]] * 2)
    assert torch.equal(masks.row_mask(weight, 2, 4, kind="wanda", norms_I=norms), both)
    assert not torch.equal(masks.row_mask(weight, 2, 4), both)


# ---------------------------------------------------------------------------------------------------------------------
# Transposable masks


def best_sum(tile: torch.Tensor, n: int, m: int) -> float:
    """The best tile by trying every choice of n entries in each row, columns counted by hand."""
    best = -1.0
    for rows in itertools.product(itertools.combinations(range(m), n), repeat=m):
        if all(sum(j in row for row in rows) == n for j in range(m)):
            best = max(best, sum(tile[i, j].item() for i, row in enumerate(rows) for j in row))
    return best


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(2, 4), (1, 2), (1, 4), (3, 4), (2, 3)]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 2**31),
)
def test_transposable_masks_are_the_best_of_their_kind(pattern: tuple[int, int], r: int, c: int, seed: int) -> None:
    n, m = pattern
    score = torch.rand(r * m, c * m, generator=torch.Generator().manual_seed(seed))
    mask = masks.transposable_mask(score, n, m)
    assert masks.is_nm(mask, n, m)
    assert masks.is_nm(mask.t(), n, m)
    for i, j in itertools.product(range(r), range(c)):
        where = slice(i * m, i * m + m), slice(j * m, j * m + m)
        assert (score[where] * mask[where]).double().sum().item() == pytest.approx(
            best_sum(score[where], n, m), rel=1e-6
        )


def test_groups_wider_than_a_byte_counts() -> None:
    mask = masks.nm_mask(torch.randn(4, 400), 100, 200)
    assert masks.is_nm(mask, 100, 200)


def test_transposable_patterns_are_counted() -> None:
    counts = {
        pattern: len(masks.tile_patterns(*pattern, torch.device("cpu"))) for pattern in [(2, 4), (1, 2), (1, 4), (1, 3)]
    }
    assert counts == {(2, 4): 90, (1, 2): 2, (1, 4): 24, (1, 3): 6}


def test_transposable_masks_do_not_depend_on_chunks_or_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.rand(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = masks.transposable_mask(score, 2, 4)
    monkeypatch.setattr(masks, "TILES_AT_ONCE", 7)
    assert torch.equal(masks.transposable_mask(score.float(), 2, 4), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(masks.transposable_mask(score.float(), 2, 4), whole)
    # Of W^R under such a mask, double pruning takes nothing away.
    assert torch.equal(masks.double_prune(score, whole, 2, 4), whole)


# ---------------------------------------------------------------------------------------------------------------------
# Unbiased pruning


def groups(kind: str, n: int, m: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, m, generator=generator)
    if kind == "scales":
        x = x * 10 ** (torch.rand(count, m, generator=generator) * 12 - 6)
    if kind == "ties":
        x = x.sign()
    if kind == "near ties":
        x = x.sign() * (1 + torch.rand(count, m, generator=generator) * 1e-6)
    if kind == "zeros":
        x = x * (torch.rand(count, m, generator=generator) < 0.5)
    return x


def probabilities(x: torch.Tensor, n: int) -> torch.Tensor:
    """min(1, |x| / tau) that adds up to n, by bisection in float64."""
    x = x.double().abs()
    low, high = torch.zeros(len(x), 1, dtype=torch.float64), x.sum(1, keepdim=True)
    for _ in range(200):
        tau = (low + high) / 2
        more = (x / tau).clamp(max=1).sum(1, keepdim=True) > n
        low, high = torch.where(more, tau, low), torch.where(more, high, tau)
    return (x / high).nan_to_num(0).clamp(max=1)  # 0 / 0 where fewer than n are not zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 4), (2, 8), (8, 16)])
@pytest.mark.parametrize("kind", ["normal", "scales", "ties", "near ties", "zeros"])
def test_mvue_keeps_exactly_n(kind: str, n: int, m: int, dtype: torch.dtype) -> None:
    x = groups(kind, n, m, 20_000).to(dtype)
    kept = masks.mvue(x, n, m, 1, torch.Generator().manual_seed(1))
    assert kept.dtype == dtype
    assert torch.equal((kept != 0).sum(1), (x != 0).sum(1).clamp(max=n))
    assert ((kept == 0) | (kept.sign() == x.sign())).all()
    assert (kept.abs() >= x.abs() * 0.99)[kept != 0].all()  # none is scaled down


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.5 - 2.0**-25, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 4), (2, 8), (8, 16)])
@pytest.mark.parametrize("kind", ["normal", "scales", "ties", "near ties", "zeros"])
def test_mvue_keeps_exactly_n_for_every_draw(
    kind: str, n: int, m: int, u: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = groups(kind, n, m, 20_000)
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, u))
    assert torch.equal((masks.mvue(x, n, m, 1) != 0).sum(1), (x != 0).sum(1).clamp(max=n))


@pytest.mark.parametrize("kind", ["normal", "scales", "zeros"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 4), (2, 8)])
def test_mvue_is_unbiased(kind: str, n: int, m: int) -> None:
    x, draws = groups(kind, n, m, 24, seed=3), 10_000
    estimates = masks.mvue(x.expand(draws, -1, -1), n, m, 2, torch.Generator().manual_seed(2)).double()
    p = probabilities(x, n)
    spread = x.double().abs() * ((1 / p.clamp(min=1e-30) - 1) / draws).sqrt()  # of a mean, where x is kept with p
    seen = (p * draws > 20) | (x == 0)  # of the others too few are drawn for a normal law
    assert ((estimates.mean(0) - x).abs() <= 4 * spread + 1e-5 * x.abs())[seen].all()
    kept = (estimates != 0).double().mean(0)
    assert ((kept - p).abs() <= 4 * (p * (1 - p) / draws).sqrt() + 1e-5)[x != 0].all()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([(2, 4), (1, 2), (3, 4), (2, 8)]), st.integers(0, 2**31))
def test_mvue_has_the_least_variance(pattern: tuple[int, int], seed: int) -> None:
    """The variance is Σ x² (1/p - 1), whatever the joint law: no other p in (0, 1] that adds up to n has less."""
    n, m = pattern
    x = groups("normal", n, m, 1, seed).double()
    least = (x**2 / probabilities(x, n)).sum()
    other = torch.rand(2000, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1e-3
    other = other / other.sum(1, keepdim=True) * n
    other = other[(other <= 1).all(1)]
    assert ((x**2 / other).sum(1) >= least * (1 - 1e-9)).all()
    assert (x**2 * m / n).sum() >= least * (1 - 1e-9)  # uniform


def test_mvue_varies_less_than_naive_choices_do() -> None:
    n, m, draws = 2, 4, 4000
    x = groups("normal", n, m, 50)
    generator = torch.Generator().manual_seed(1)
    error = (masks.mvue(x.expand(draws, -1, -1), n, m, 2, generator) - x).square().sum(2).mean(0)
    uniform = masks.nm_mask(torch.rand(draws, 50, m, generator=generator), n, m) * x * m / n
    assert error.mean() < 0.8 * (uniform - x).square().sum(2).mean()
    # Two independent draws in proportion to |x|, each with half of the weight.
    share = x.abs() / x.abs().sum(1, keepdim=True)
    drawn = torch.multinomial(share, 2 * draws, replacement=True, generator=generator).view(50, draws, 2)
    hits = torch.nn.functional.one_hot(drawn, m).sum(2) / 2
    independent = hits * (x / share).unsqueeze(1)
    assert error.mean() < 0.8 * (independent - x.unsqueeze(1)).square().sum(2).mean()


@given(st.integers(0, 13), st.integers(1, 5), st.sampled_from([0, 1, -1]), st.integers(0, 2**31))
def test_mvue_of_other_shapes(side: int, other: int, dim: int, seed: int) -> None:
    shape = (side, other) if dim == 0 else (other, side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    sparse = masks.mvue(x, 2, 4, dim, torch.Generator().manual_seed(seed))
    assert sparse.shape == x.shape
    first, along = (x, sparse) if dim == 0 else (x.t(), sparse.t())
    whole = side // 4 * 4
    assert torch.equal(along[whole:], first[whole:])  # an incomplete group stays
    assert ((along[:whole].unflatten(0, (-1, 4)) != 0).sum(1) == 2).all()


def test_mvue_hides_no_nan_and_takes_the_default_generator() -> None:
    x = torch.randn(4, 8)
    x[1, 2], x[3, 5] = torch.nan, torch.inf
    sparse = masks.mvue(x, 2, 4, 1)
    assert sparse[1, :4].isnan().all()
    assert sparse[3, 5].isinf()
    assert sparse.isnan().sum() == 4
    torch.manual_seed(5)
    first = masks.mvue(x[:1], 2, 4, 1)
    torch.manual_seed(5)
    assert torch.equal(masks.mvue(x[:1], 2, 4, 1), first)


def test_mvue_compiles_without_a_break() -> None:
    x = torch.randn(16, 12)
    run = torch.compile(lambda x: masks.mvue(x, 2, 4, 0), fullgraph=True, backend="aot_eager")
    sparse = run(x)
    assert ((sparse.unflatten(0, (-1, 4)) != 0).sum(1) == 2).all()
