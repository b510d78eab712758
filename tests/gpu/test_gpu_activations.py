"""Activation checkpointing on a GPU: the same losses, eager, compiled and from CUDA graphs, and less memory."""

from typing import Any

import pytest
import torch
from support import inductor

from slope_cli.config import configs
from slope_cli.methods import optim, phases_of
from slope_cli.models.build import build_model, model_config
from slope_cli.train.activations import checkpoint_activations
from slope_cli.train.cuda_graphs import GraphedStep
from slope_cli.train.step import MaskUpdate, Step
from sparse_kernels import add_adapters, sparsify

pytestmark = inductor.QUIET

_COMMON = {"vocab_size": 272, "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2-nano": {"n_embd": 512, "n_layer": 3, "n_head": 8},
    "opt-125m": {**_COMMON, "ffn_dim": 1024, "word_embed_proj_dim": 512},
    "llama3-8b": {**_COMMON, "num_key_value_heads": 4, "intermediate_size": 1024},
    "bert-base": {**_COMMON, "intermediate_size": 1024},
}
MODES = ("block", "selective")
HOW = ("eager", "graphed")


def sparse(name: str, dropout: float = 0.2, **more: Any) -> Any:
    """Adapters have outputs from the start, and attention drops weights, too."""
    config = model_config(name, overrides={**SIZES[name], **more}, dropout=dropout)
    model = build_model(config, seed=1, device="cuda")
    sparsify(model)
    for adapter in add_adapters(model, 0.1).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
    return model.train()


def batch(name: str, seed: int, rows: int = 4, length: int = 128) -> dict[str, torch.Tensor]:
    tokens = torch.randint(5, 256, (rows, length), generator=torch.Generator().manual_seed(seed)).cuda()
    labels = torch.where(tokens % 3 == 0, tokens, -100) if name.startswith("bert") else tokens
    return {"input_ids": tokens, "labels": labels}


def losses(name: str, mode: str, how: str) -> list[float]:
    """Losses and norms of four steps with mask updates."""
    torch.compiler.reset()
    torch.manual_seed(3)
    model, config = sparse(name), configs.load("gpt2-nano", ["optim.lr=2e-3", "optim.warmup=1"])
    optimizer = optim.build_optimizer(model, config, phases_of(config))
    checkpoint_activations(model, mode)
    plain = Step(model, optimizer, dtype=torch.bfloat16, clip=1.0, compiled="compiled" in how)
    step = GraphedStep(plain) if "graphed" in how else plain
    found = []
    for number in range(4):
        torch.manual_seed(number)
        output = step([batch(name, 2 * number), batch(name, 2 * number + 1)], MaskUpdate())
        found += [output.loss, output.norm]
    return found


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SIZES)
def test_steps_are_those_without_checkpointing(name: str, how: str) -> None:
    expected = losses(name, "none", how)
    for mode in MODES:
        assert losses(name, mode, how) == pytest.approx(expected, rel=2e-3), mode


def gradients(name: str, mode: str, dropout: float, dtype: torch.dtype | None) -> tuple[float, torch.Tensor]:
    """Loss and whole gradient of a compiled step's first micro-batch."""
    torch.compiler.reset()
    torch.manual_seed(3)
    model, config = sparse(name, dropout), configs.load("gpt2-nano", [])
    optimizer = optim.build_optimizer(model, config, phases_of(config))
    checkpoint_activations(model, mode)
    step = Step(model, optimizer, dtype=dtype, clip=1.0, compiled=True)
    torch.manual_seed(0)
    loss = step.backward(batch(name, 0), 1, None)[0]
    return float(loss), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", SIZES)
def test_compiled_blocks_have_the_gradient_of_those_without_checkpointing(name: str) -> None:
    """Without dropout, which each compiled graph draws in its own way."""
    expected, whole = gradients(name, "none", 0.0, torch.bfloat16)
    for mode in MODES:
        loss, gradient = gradients(name, mode, 0.0, torch.bfloat16)
        assert loss == pytest.approx(expected, rel=1e-3), mode
        assert torch.cosine_similarity(gradient, whole, dim=0) > 0.9995, mode


@torch.no_grad()
def _move(model: torch.nn.Module, directions: list[torch.Tensor], distance: float) -> None:
    for p, direction in zip(model.parameters(), directions, strict=True):
        p.add_(direction, alpha=distance)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_computed_again_drops_what_the_forward_pass_dropped(mode: str) -> None:
    """The gradient is the slope of the loss with the same draws, in a model of dense layers; compiled, it is not."""
    config = model_config("gpt2-nano", overrides=SIZES["gpt2-nano"], dropout=0.2)
    model = build_model(config, seed=1, device="cuda").train()
    own = configs.load("gpt2-nano", ["method=dense"])
    optimizer = optim.build_optimizer(model, own, phases_of(own))
    checkpoint_activations(model, mode)
    step = Step(model, optimizer, dtype=None, clip=1.0)

    def loss() -> float:
        torch.manual_seed(0)
        return float(step.backward(batch("gpt2-nano", 0), 1, None)[0])

    loss()
    slope = 0.0
    directions = [p.grad.clone() for p in model.parameters()]
    norm = torch.cat([d.flatten() for d in directions]).norm()
    for sign in (1, -1):
        _move(model, directions, sign * 0.01 / float(norm))
        slope += sign * loss() / 0.02
        _move(model, directions, -sign * 0.01 / float(norm))
    assert slope == pytest.approx(float(norm), rel=0.02)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_peak_memory_falls(how: str) -> None:
    peaks = {}
    for mode in ("none", "selective", "block"):
        torch.compiler.reset()
        model = sparse("gpt2-nano", dropout=0.0, n_layer=8)
        checkpoint_activations(model, mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = Step(model, optimizer, dtype=torch.bfloat16, clip=1.0, compiled=how == "compiled")
        for _ in range(2):
            step([batch("gpt2-nano", 1, rows=16, length=256)])
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step([batch("gpt2-nano", 1, rows=16, length=256)])
        peaks[mode] = torch.cuda.max_memory_allocated() - held
        del model, optimizer, step
    assert peaks["none"] > 1.1 * peaks["selective"] > 1.2 * peaks["block"]
