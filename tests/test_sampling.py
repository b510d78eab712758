"""How the next token is chosen: the distribution that the settings ask for, from random numbers of a text's own.

Shape suffixes: B texts, V vocabulary.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from slope_cli.errors import UsageError
from slope_cli.inference.sampling import Mode, Sampling, Settings, choose, mode_of

SHARES = (0.4, 0.3, 0.15, 0.1, 0.05)
ORDER = (3, 0, 4, 1, 2)  # the tokens from the likeliest on
DRAWS = 40000


def logits() -> Tensor:
    """(V,), of which token ORDER[i] has the probability SHARES[i]."""
    return torch.tensor([SHARES[ORDER.index(token)] for token in range(5)]).log() + 3


def shares(*, mode: Mode | None = None, **settings: Any) -> list[float]:
    """How often each token was chosen, in ORDER, at as many places of one text."""
    sampling = Sampling(seed=9, **settings)
    rows = Settings.of([sampling] * DRAWS, "cpu")
    ids_B = choose(logits().expand(DRAWS, -1), rows, torch.arange(DRAWS), mode or mode_of([sampling], 5))
    counts = torch.bincount(ids_B, minlength=5) / DRAWS
    return [counts[token].item() for token in ORDER]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 5),
        ({"top_k": 3}, 3),
        ({"top_k": 5}, 5),
        ({"top_k": 900}, 5),
        ({"top_k": 1}, 1),
        ({"top_p": 0.71}, 3),
        ({"top_p": 0.69}, 2),
        ({"top_p": 0.01}, 1),
        ({"top_k": 3, "top_p": 0.8}, 2),  # of the three: 0.47, 0.35, 0.18
        ({"top_k": 3, "top_p": 0.83}, 3),
    ],
)
def test_only_the_likeliest_are_drawn_by_their_probabilities(settings: dict[str, Any], kept: int) -> None:
    total = sum(SHARES[:kept])
    expected = [share / total if rank < kept else 0.0 for rank, share in enumerate(SHARES)]
    assert shares(**settings) == pytest.approx(expected, abs=0.012)
    assert [share > 0 for share in shares(**settings)] == [share > 0 for share in expected]


def test_temperature() -> None:
    sharp = [share**2 / sum(share**2 for share in SHARES) for share in SHARES]
    assert shares(temperature=0.5) == pytest.approx(sharp, abs=0.012)
    assert shares(temperature=0) == shares(temperature=1e-9) == [1.0, 0, 0, 0, 0]


def test_a_text_is_the_same_in_every_mode_and_company() -> None:
    vocabulary = 3000
    logits_BV = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(1)) * 4
    texts = [
        Sampling(temperature=0),
        Sampling(seed=1),
        Sampling(seed=2, top_k=20),
        Sampling(seed=3, top_k=500, temperature=0.8),
        Sampling(seed=2**62, top_p=0.7),
        Sampling(seed=5, top_k=40, top_p=0.9),
    ]
    modes = [mode_of([text], vocabulary) for text in texts]
    assert modes[0] == (True, 0)
    assert [mode.ranked for mode in modes] == [0, 0, 64, 1024, vocabulary, 64]
    assert mode_of(texts, vocabulary) == (False, vocabulary)
    for place in range(30):
        places_B = torch.full((6,), place, dtype=torch.int32)
        together = choose(logits_BV, Settings.of(texts, "cpu"), places_B, mode_of(texts, vocabulary)).tolist()
        for row, text in enumerate(texts):
            alone = choose(logits_BV[row : row + 1], Settings.of([text], "cpu"), places_B[:1], modes[row])
            assert together[row] == alone.item()
        assert together[0] == logits_BV[0].argmax()
        assert logits_BV[2, together[2]] >= logits_BV[2].topk(20).values[-1]


def test_seeds_places_and_tokens_have_noise_of_their_own() -> None:
    """Neighbouring seeds and places draw independently: pairs of draws have the product of the probabilities."""
    places = torch.arange(DRAWS)
    rows = Settings.of([Sampling(seed=seed % 200) for seed in range(DRAWS)], "cpu")
    first = choose(logits().expand(DRAWS, -1), rows, places // 200, Mode(greedy=False, ranked=0))
    for second in (first.roll(1), first.roll(200), first.roll(201)):  # the next seed, the next place, both
        pairs = torch.bincount(first * 5 + second, minlength=25).view(5, 5) / DRAWS
        single = logits().softmax(-1)
        torch.testing.assert_close(pairs, single[:, None] * single, rtol=0, atol=0.012)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"seed": 2**63}, "seed must be from 0"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)
