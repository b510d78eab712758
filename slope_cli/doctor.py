"""`slope doctor`: what is installed, what is missing, and how to fix it."""

import importlib
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from slope_cli.distributed.launch import pick_device
from slope_cli.errors import SlopeError, install
from slope_cli.report.terminal import named_lines
from slope_cli.utils.environment import cupy_version, driver, package_version

_NEEDED = ("torch", "transformers", "tokenizers", "numpy", "omegaconf", "safetensors")
_USED_BY = {
    "tensorboard": "log.tensorboard",
    "matplotlib": "slope plot, and the plot of a run",
    "datasets": "slope data prepare of a Hugging Face data set",
    "pyarrow": "slope data prepare of parquet files",
    "zstandard": "slope data prepare of .zst files",
    "lm_eval": "slope eval --tasks",
    "accelerate": "slope eval --tasks, Trainer of transformers",
    "peft": "loading an export's adapters outside slope",
    "fastapi": "slope serve",
    "uvicorn": "slope serve",
    "wandb": "log.wandb",
}

_EXTRAS = {
    "lm_eval": "eval",
    "accelerate": "eval or trainer",
    "peft": "trainer",
    "fastapi": "serve",
    "uvicorn": "serve",
    "wandb": "wandb",
}
"""The extra that installs what is not installed with slope."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: an item, its version or state, and what to do if it is missing or fails, else empty.

    stops: without it no run can train on the device, and with the settings, that are taken by default.
    """

    name: str
    found: str
    fix: str = ""
    stops: bool = False


def examine() -> tuple[dict[str, Any], list[str]]:
    """Check everything that training uses.

    Returns:
        A record for JSON, whose "training" says whether a step works on the device that training would use, and the
        same as lines.
    """
    findings = [Finding("python", platform.python_version()), *_packages()]
    error = failure(lambda: train_a_step("cpu"))
    if not error:
        findings += [*_gpu(), compiler_finding()]
        error = next((finding.fix for finding in findings if finding.stops), "")
    fix = f"training cannot work: {error}" if error else ""
    findings.append(Finding("a training step", "fails" if error else "works", fix))
    lines = named_lines({x.name: f"{x.found}{x.fix and f'; {x.fix}'}" for x in findings})
    return {"training": not error, "findings": [asdict(finding) for finding in findings]}, lines


def _packages() -> list[Finding]:
    findings = []
    for name in (*_NEEDED, *_USED_BY):
        version, fix = package_version(name), ""
        if version is None:
            fix = install(_EXTRAS[name]) if name in _EXTRAS else f"pip install {name}"
            fix += f"; only {_USED_BY[name]} needs it" if name in _USED_BY else ""
        findings.append(Finding(name, version or "missing", fix))
    return findings


def failure(work: Callable[[], object]) -> str:
    """The error that `work` raises, in one line; empty if it raises none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except Exception as error:  # the report names it, whatever it is
        kind = "" if isinstance(error, SlopeError) else f"{type(error).__name__}: "
        return f"{kind}{' '.join(str(error).split())}"[:500]
    return ""


def train_a_step(device: str) -> None:
    """One training step of a small sparse model, as in `slope pretrain`; raises whatever fails."""
    for name in ("omegaconf", "transformers", "tokenizers", "safetensors"):
        importlib.import_module(name)
    import torch

    from sparse_kernels import sparsify

    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)).to(device)
    sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss = model(torch.randn(16, 32, device=device)).square().mean()
    loss.backward()
    optimizer.step()
    if not loss.isfinite():
        raise ArithmeticError("the loss of a small layer is not finite")


def _gpu() -> list[Finding]:
    """The GPU and everything that fast 2:4 products need, down to one product that is checked against dense."""
    import torch

    from sparse_kernels import cuda

    version, usable = driver(), torch.cuda.is_available()
    driver_fix = "" if version or usable else "for a GPU, install NVIDIA's driver"
    cpu_build = version and not torch.version.cuda
    torch_fix = "install a CUDA build of torch (pytorch.org, Get started)" if cpu_build else ""
    findings = [
        Finding("driver", version or "unknown: no nvidia-smi", driver_fix),
        Finding("CUDA of torch", torch.version.cuda or "none: a CPU build", torch_fix),
    ]
    if not usable:
        granted = failure(lambda: pick_device("auto"))
        fix = granted or "training runs on the CPU, where 2:4 saves no time"
        return [*findings, Finding("GPU", "none that torch can use", fix, stops=bool(granted))]
    card = torch.cuda.get_device_properties(0)
    size = f"{card.total_memory / 2**30:.0f} GiB"
    findings.append(Finding("GPU", f"{card.name}, {size}, compute capability {card.major}.{card.minor}"))
    if error := failure(lambda: train_a_step("cuda")):
        findings.append(Finding("a step on the GPU", "fails", error, stops=True))
    libraries = [Finding("cupy", cupy_version() or "missing", cuda.missing(0)), cusparselt_finding()]
    return [*findings, *libraries, *([] if any(finding.fix for finding in libraries) else [self_test()])]


def compiler_finding() -> Finding:
    """Whether torch.compile works on the device that training would use; by default only a GPU needs it."""
    import torch

    from slope_cli.train.step import require_compiler

    device = "cuda" if torch.cuda.is_available() else "cpu"
    error = failure(lambda: require_compiler(device))
    return Finding("torch.compile", "fails" if error else "works", error, stops=bool(error) and device == "cuda")


def cusparselt_finding() -> Finding:
    """The cuSPARSELt library that this process would use."""
    from sparse_kernels import cusparselt

    try:
        library = cusparselt.library()
    except cusparselt.CuSparseLtError as error:
        return Finding("cuSPARSELt", "missing", str(error))
    return Finding("cuSPARSELt", f"{'.'.join(map(str, library.version))}, {library.path}")


def self_test() -> Finding:
    """Run and time a 2:4 product in bf16, check it against dense; then a layer's forward and backward pass."""
    import torch

    from sparse_kernels import kernel_choice
    from sparse_kernels.matmul_plan import MatmulShape

    name, width, tokens = "2:4 product", 4096, 4096
    shape = MatmulShape(width, width, tokens, torch.bfloat16, True)
    try:
        choice, plan = kernel_choice.choose(shape, 0)
    except RuntimeError as error:
        return Finding(name, "fails", " ".join(str(error).split()))
    if plan is None and choice.sparse_ms is None:
        return Finding(name, "cannot run", choice.reason)
    if reason := failure(lambda: check_layer("cuda")):
        return Finding("2:4 layer", "fails", reason)
    return Finding(name, f"{width} x {width}, {tokens} tokens: agrees with dense, {choice.reason}")


def check_layer(device: str) -> None:
    """Compare a bf16 layer's output and gradients with those of dense products; ArithmeticError if they differ."""
    import torch

    from sparse_kernels import SparseLinear, masks

    weight, bias = torch.randn(512, 512, device=device), torch.randn(512, device=device)
    layer = SparseLinear(weight, bias, masks.row_mask(weight, 2, 4), 2, 4)
    X = torch.randn(256, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        Y = layer(X)
    dY = torch.randn_like(Y)
    Y.backward(dY)
    wide, wide_dY = X.detach().float(), dY.float()
    dW = (wide_dY.t() @ wide)[layer.row_mask()].view_as(layer.values)
    pairs = {
        "output": (Y, wide @ layer.weight.t() + bias),
        "input gradient": (X.grad, wide_dY @ layer.weight_backward),
        "weight gradient": (layer.values.grad, dW),
    }
    for name, (actual, expected) in pairs.items():
        if actual is None or (actual.float() - expected).norm() > 0.02 * expected.norm():
            raise ArithmeticError(f"the {name} of a 2:4 layer differs from the dense product's")
