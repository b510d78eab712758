"""Masks: exactly N:M, the largest kept, pruned twice as the paper's lemma says, stored without loss."""

import pytest
import torch
from hypothesis import given
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
        (lambda: masks.row_mask(torch.zeros(2, 8), 2, 4, kind="wanda"), "mask kind must be"),
    ],
)
def test_bad_input(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
