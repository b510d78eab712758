"""Linearized attention compiled on a GPU, in bf16: the losses and gradients of the eager form, and a whole run.

Shape suffixes: B sequences, T positions.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_cli.checkpoint.load import load_model
from slope_cli.config import configs
from slope_cli.config.methods import LinearizeConfig
from slope_cli.data.prepare import prepare
from slope_cli.linearize.linear_attention import Pattern
from slope_cli.linearize.linear_window import LinearWindow
from slope_cli.linearize.swap import keep_softmax, linear_windows, linearize_attention, projections
from slope_cli.linearize.transfer import transfer_losses
from slope_cli.models.build import build_model, model_config
from slope_cli.models.loss import forward, loss_fn
from slope_cli.report import metrics
from slope_cli.train.init import linearize_overrides
from slope_cli.train.init import teacher as teacher_of
from slope_cli.train.loop import pretrain
from slope_cli.train.step import compile_blocks
from sparse_kernels import adapters_of, add_adapters

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute", "ignore:TensorFloat32 tensor cores"
)  # Inductor's own

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-small": {"n_layer": 3, "n_head": 4, "n_embd": 256, "n_positions": 512, "vocab_size": 512},
    "llama3-8b": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 512,
        "vocab_size": 512,
    },
}


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """With TF32 and without."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    torch._dynamo.reset()
    yield request.param
    torch.set_float32_matmul_precision(before)


BOTH_PRECISIONS = pytest.mark.usefixtures("precision")


def linearized(name: str, state: str) -> Any:
    """A model whose attention looks at few keys, and whose maps are no longer what they started as."""
    torch.manual_seed(1)
    model = build_model(model_config(name, overrides=SHAPES[name], dropout=0.0), device="cuda")
    linearize_attention(model, LinearizeConfig(window=64, features=64, state=state))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name or "q_proj" in name or "k_proj" in name:
                parameter.mul_(6)
        for linear in linear_windows(model).values():
            for parameter in linear.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(2)
    ids_BT = torch.randint(512, (4, 512), device="cuda", generator=generator)
    return {"input_ids": ids_BT, "labels": ids_BT.roll(-1, 1)}


PATTERNS = [Pattern(64), Pattern(96), Pattern(128), Pattern(64, terrace=True), Pattern(64, causal=False)]
CASES = [*((pattern, "additive") for pattern in PATTERNS), (Pattern(64), "delta"), (Pattern(96), "delta")]
STATES = pytest.mark.parametrize("state", ["additive", "delta"])


@BOTH_PRECISIONS
@pytest.mark.parametrize(("pattern", "state"), CASES, ids=str)
def test_outputs_and_gradients_of_many_long_sequences(pattern: Pattern, state: str) -> None:
    """A compiled maximum's gradient once raced, by the width of a band; a compiled terrace once had other blocks."""
    generator = torch.Generator("cuda").manual_seed(3)

    def draw(*sides: int) -> Tensor:
        return torch.randn(*sides, device="cuda", generator=generator)

    qkv = [size * draw(16, 12, 1024, 64).bfloat16() for size in (2, 2, 1)]
    dy = draw(16, 12, 1024, 64).bfloat16()
    kind = "terrace" if pattern.terrace else "standard"
    settings = LinearizeConfig(window=pattern.window, features=64, kind=kind, state=state)
    sides: dict[str, Any] = {"heads": 12, "kv_heads": 12, "head_dim": 64, "causal": pattern.causal}
    linear = LinearWindow(settings, **sides, generator=torch.Generator().manual_seed(0)).cuda()

    def results(call: Callable[..., Tensor], rows: slice, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x[rows].to(dtype).requires_grad_() for x in qkv]
        y = call(*leaves, 64**-0.5)
        torch.autograd.backward(y, dy[rows].to(dtype))
        return [y.detach().double(), *(x.grad.double() for x in leaves if x.grad is not None)]

    compiled = torch.compile(linear)
    expected = results(linear, slice(0, 2), torch.float64)
    for _ in range(3):
        torch.full((1 << 28,), torch.nan, device="cuda")  # what memory holds that nothing was written to
        for found, exact in zip(results(compiled, slice(None), torch.bfloat16), expected, strict=True):
            assert found.isfinite().all()
            assert ((found[:2] - exact).norm() / exact.norm()).item() < 0.02


def compared_dtype(state: str) -> torch.dtype | None:
    """In what the two forms are compared; None for float32.

    The gradients of the delta rule's gates, and of the mix of other states, are small differences of large sums. In
    bf16 they are as far from each other as from exact ones, up to a half, so an error of the compiled form would not be
    seen.
    """
    return None if state == "delta" else torch.bfloat16


def adapter_gradients(model: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        loss = loss_fn(forward(model, batch()), batch()).token_loss
    torch.autograd.backward(loss)
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: ((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()}


@BOTH_PRECISIONS
@STATES
@pytest.mark.parametrize("kept", [[], ["0/1", "2/0"]], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_adapters_have_the_gradients_of_the_eager_form(name: str, kept: list[int | str], state: str) -> None:
    model = linearized(name, state)
    keep_softmax(model, kept)
    adapters = add_adapters(model, 8, projections(model, ["q", "k", "v", "o"]), alpha=16)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.normal_(0, 0.02)
    for linear in linear_windows(model).values():
        linear.requires_grad_(True)  # as with adjust_maps
    expected = adapter_gradients(copy.deepcopy(model).double(), None)
    for dtype in dict.fromkeys((compared_dtype(state), None)):
        eager = distances(adapter_gradients(copy.deepcopy(model), dtype), expected)
        one = copy.deepcopy(model)
        compile_blocks(one)
        compiled = distances(adapter_gradients(one, dtype), expected)
        exact = dtype is None and torch.get_float32_matmul_precision() == "highest"
        for parameter, distance in compiled.items():
            if exact or not parameter.endswith(".mix"):
                assert distance < 2 * eager[parameter] + 0.02, (parameter, dtype)


@pytest.mark.parametrize(
    ("precision", "state"),
    [("high", "additive"), ("highest", "additive"), ("highest", "delta")],  # TF32 is too coarse for delta's gates, too
    indirect=["precision"],
)
@pytest.mark.parametrize("name", SHAPES)
def test_transfer_has_the_losses_and_gradients_of_the_eager_form(name: str, state: str, precision: str) -> None:
    model, ids = linearized(name, state), {"input_ids": batch()["input_ids"]}
    found: list[tuple[Any, dict[str, Tensor]]] = []
    dtype = compared_dtype(state)
    for compiled in (False, True):
        one = copy.deepcopy(model)
        for linear in linear_windows(one).values():
            linear.requires_grad_(True)
        if compiled:
            compile_blocks(one)
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            losses = transfer_losses(one, ids, compiled=compiled)
        found.append((losses, {name: p.grad.double() for name, p in one.named_parameters() if p.grad is not None}))
    (losses, gradients), (compiled_losses, compiled_gradients) = found
    for layer, loss in losses.items():
        assert compiled_losses[layer].mse.item() == pytest.approx(loss.mse.item(), rel=0.02)
    assert max(distances(compiled_gradients, gradients).values()) < 0.1


def test_a_run_learns_from_its_softmax_model_and_holds_it_once(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"The {n}th of many short lines. " * 20}) + "\n" for n in range(100)))
    prepare([str(text)], tmp_path / "data", tokenizer="bytes", val_fraction=0.1, workers=1, progress=False)
    words = [f"data.path={tmp_path / 'data'}", "log.tensorboard=false", "log.sample_every=0", "log.val_tokens=2048"]
    base, run = tmp_path / "base", tmp_path / "run"
    pretrain(configs.load("gpt2-nano", [*words, "train.steps=20", "adapters.start=0.5"]), base)
    more = ["train.steps=8", "linearize.transfer=0.5", "distill.share=0.5", "linearize.window=32"]
    pretrain(configs.load("linearize", [*linearize_overrides(base), *words, *more]), run)
    assert len([record for record in metrics.read(run) if record["kind"] == "train"]) == 4
    model, began = (load_model(folder, "cuda").model for folder in (run, base))
    for adapter in adapters_of(model.requires_grad_(False)).values():
        adapter.requires_grad_(True)
    teacher = teacher_of(run, model, torch.device("cuda"), shares=True)
    ids_BT = torch.randint(256, (2, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    torch.testing.assert_close(teacher(input_ids=ids_BT).logits, began(input_ids=ids_BT).logits)
    own, theirs = model.state_dict(), teacher.state_dict()
    held_once = {name for name, tensor in theirs.items() if tensor.data_ptr() == own[name].data_ptr()}
    assert held_once == {name for name in theirs if ".adapter." not in name}
