"""What this process runs on: versions, source, hardware."""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import slope_cli
from slope_cli.utils import jsonl

ENVIRONMENT = "environment.jsonl"
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "omegaconf",
    "safetensors",
    "lm_eval",
    "cupy-cuda12x",
    "cupy-cuda13x",
)


def environment() -> dict[str, Any]:
    """Versions and hardware, for the head of a result: nothing that is private to the user or the machine."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d"),
        "slope": slope_cli.__version__,
        "source": source_version(),
        "python": platform.python_version(),
        **{name: number for name in PACKAGES if (number := package_version(name))},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def program() -> str:
    """The words that call this program again in the same shell: slope, or its path if PATH has none or another one."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return shlex.join([sys.executable, "-m", "slope_cli"])
    found = shutil.which("slope")
    if called.name != "slope" or (found and Path(found).resolve() == called.resolve()):
        return "slope"
    return shlex.quote(str(called))


def note_environment(run: Path, device: object, members: Sequence[Mapping[str, Any]] = ()) -> None:
    """Append what this start runs on to RUN/environment.jsonl; of the environment's variables only SLURM's numbers.

    Args:
        members: what each of several processes runs on.

    Raises:
        SlopeError, UsageError: as `jsonl.append`.
    """
    own: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "host": platform.node()}
    own |= {"device": str(device), "slurm_job": os.environ.get("SLURM_JOB_ID")}
    own |= {"slurm_restarts": os.environ.get("SLURM_RESTART_COUNT")}
    jsonl.append(run / ENVIRONMENT, own | environment() | ({"ranks": list(members)} if members else {}))


def package_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------- the source


@functools.cache
def source_version() -> dict[str, str | None]:
    """A hash over the program's own source files, and the git commit where they lie in a checkout."""
    package = Path(slope_cli.__file__).parent
    return {"sha256": source_hash(package.parent), "git": git_commit(package)}


def source_hash(root: Path) -> str:
    """16 hex digits over the names and bytes of the sources of slope_cli and sparse_kernels below `root`.

    Recipes and benchmarks do not count: a wheel has them inside slope_cli, a checkout beside it.
    """
    sources = [*root.glob("slope_cli/**/*.py"), *root.glob("sparse_kernels/*.py"), *root.glob("sparse_kernels/*.cu*")]
    named = {file.relative_to(root).as_posix(): file for file in sources}
    digest = hashlib.sha256()
    for name in sorted(named):
        if not name.startswith(("slope_cli/benchmarks/", "slope_cli/recipes/")):
            digest.update(f"{name}\0".encode() + named[name].read_bytes())
    return digest.hexdigest()[:16]


def git_commit(package: Path) -> str | None:
    """The commit that a folder of this program is checked out at; None if git does not know its files."""
    git = ["git", "-C", str(package)]
    try:
        # A virtual environment inside another project's checkout is in a repository that is not this program's.
        known = subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, timeout=10)
        if known.returncode:
            return None
        command = [*git, "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


# ----------------------------------------------------------------------------------------------------- the hardware


def _processor() -> str:
    """The model's name, with the matrix instructions that decide its speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.processor())} ({', '.join(flags)})"


def gpu_libraries() -> dict[str, str | None]:
    """Driver, CuPy and cuSPARSELt of this machine, for the head of a result; None for what is missing."""
    from sparse_kernels import cusparselt

    versions = {"driver": driver(), "cupy": cupy_version(), "cusparselt": None, "cusparselt_file": None}
    try:
        library = cusparselt.library()
    except cusparselt.CuSparseLtError:
        return versions
    file = library.path.rpartition("site-packages/")[2]  # do not leak local paths
    return {**versions, "cusparselt": ".".join(map(str, library.version)), "cusparselt_file": file}


def driver() -> str | None:
    """The version of NVIDIA's driver, or None without one."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout.strip() else None


def cupy_version() -> str | None:
    """The version of CuPy, whichever of its packages is installed, or None."""
    return next((v for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if (v := package_version(name))), None)
