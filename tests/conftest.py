"""Fixtures of the tests of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.data import prepared
from support.runs import tiny

from slope_cli.train.loop import pretrain


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small matrices one thread is the fastest; and runs in two processes are compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data() -> Path:
    """The tests' text as bytes."""
    return prepared()


@pytest.fixture(scope="session")
def bert_data() -> Path:
    """The tests' text as WordPiece."""
    return prepared("wordpiece")


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `tiny(data)`: copy it before changing it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pretrain(tiny(data), run)
    torch.set_num_threads(before)
    return run
