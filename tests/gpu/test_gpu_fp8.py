"""fp8 products by the tensor cores: against the CPU's, compiled, and in runs."""

import copy
from pathlib import Path

import pytest
import torch
from support import inductor
from support.models import linear_layers as layers
from support.runs import records, tiny
from torch import nn

from slope_cli.train.loop import pretrain
from sparse_kernels import fp8_obstacle, set_fp8
from sparse_kernels.operands import operand

pytestmark = inductor.QUIET


@pytest.fixture(autouse=True)
def able() -> None:
    if reason := fp8_obstacle(torch.device("cuda")):
        pytest.skip(reason)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "masked", "sparse", "1:4"])
@pytest.mark.parametrize("tokens", [1, 24, 256])
def test_products_are_those_of_a_cpu(tokens: int, kind: str, compiled: bool) -> None:
    model = nn.Sequential(layers(96, 64, 0)[kind]())
    set_fp8(model, ["0"])
    X, dY = torch.randn(tokens, 64), torch.randn(tokens, 96)
    results = []
    for device in ("cpu", "cuda"):
        own, x = copy.deepcopy(model).to(device), X.to(device).requires_grad_()
        run = torch.compile(own) if compiled and device == "cuda" else own
        with torch.autocast(device, torch.bfloat16):
            Y = run(x)
        Y.backward(dY.to(Y))
        results.append([Y.detach(), *(p.grad for p in (x, *own.parameters()))])
    for ours, theirs in zip(*results, strict=True):  # 16-bit results of sums in another order
        torch.testing.assert_close(theirs.cpu().float(), ours.float(), rtol=1e-2, atol=1e-2 * float(ours.abs().max()))


def test_rounding_is_that_of_a_cpu() -> None:
    for scale in (1e-20, 1.0, 1e20):
        X = torch.randn(300, 70) * scale
        for ours, theirs in zip(operand(X, fp8=True), operand(X.cuda(), fp8=True), strict=True):
            assert ours is not None
            assert theirs is not None
            torch.testing.assert_close(theirs.cpu().float(), ours.float(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["slope", "dense", "sr_ste"])
def test_a_run_with_graphs_learns_as_one_without(method: str, data: Path, tmp_path: Path) -> None:
    words = (f"method={method}", "train.precision=fp8", "train.device=cuda", "model.dropout=0", "train.bf16_finish=0.3")
    for name, more in (("fast", ()), ("eager", ("train.compile=false", "train.cuda_graph=false"))):
        pretrain(tiny(data, *words, *more), tmp_path / name)
    losses = [[r["loss"] for r in records(tmp_path / name) if r["kind"] == "train"] for name in ("fast", "eager")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=0.02)
