"""Fixtures of the tests of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import tiny, write_bert_data, write_data

from slope_cli.train.loop import pretrain


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small matrices one thread is the fastest; and runs in two processes are compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of a few KB, as bytes."""
    return write_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def bert_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text as WordPiece."""
    return write_bert_data(tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `tiny(data)`: copy it before changing it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pretrain(tiny(data), run)
    torch.set_num_threads(before)
    return run
