"""Everything in this folder needs a CUDA GPU of compute capability 8.0 or newer, CuPy, and torch's own CUDA build.

`python -m pytest --numprocesses 16 --dist loadgroup tests/gpu`: the processes share what they compile and measure.
"""

import os
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from sparse_kernels import cuda, kernel_choice

HERE = Path(__file__).parent
# Inductor compiles in the process itself: a pool for each of the tests' processes, and for those that they start,
# would take longer to start than to compile these few kernels.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
torch._inductor.config.compile_threads = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = cuda.missing(0) if torch.cuda.is_available() else "no CUDA GPU"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These matrices are large: here the processor's part takes all threads, or its share of them."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of these tests see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(autouse=True)
def fresh(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No warnings given yet, and a cache folder that all GPU tests of this run share."""
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(shared / "cache"))
    kernel_choice.warn_once.cache_clear()
