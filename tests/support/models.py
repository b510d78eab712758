"""Tiny models, dense and linearized, and linearized attention written out from its definition.

Shape suffixes: B sequences, H query heads, G KV heads, T positions, D head dimension, F features, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slope_cli.config.methods import LinearizeConfig
from slope_cli.linearize.linear_attention import Maps, Pattern
from slope_cli.linearize.swap import linear_windows, linearize_attention
from slope_cli.models.build import build_model, model_config
from sparse_kernels import MaskedLinear, SparseLinear, masks

VOCABULARY = 96
_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_hidden_layers": 2, "hidden_size": 32}
_GROUPED = {**_COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-nano": {"vocab_size": VOCABULARY, "n_positions": 256, "n_layer": 2, "n_embd": 32, "n_head": 4},
    "opt-125m": {**_COMMON, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "llama3-8b": _GROUPED,
    "mistral-7b": _GROUPED,
    "bert-base": {**_COMMON, "num_attention_heads": 4, "intermediate_size": 48},
}
CAUSAL = ("gpt2-nano", "opt-125m", "llama3-8b", "mistral-7b")
FORMS = {
    "window": {"window": 5},
    "terrace": {"window": 4, "kind": "terrace"},
    "cache": {"window": 4, "cache": 6},
    "gated": {"window": 5, "state": "gated"},
    "gated terrace": {"window": 4, "kind": "terrace", "state": "gated"},
    "delta": {"window": 5, "state": "delta"},
    "heads": {"window": 5, "keep_softmax": ["0/1"]},
}


def of_every_name(*forms: dict[str, Any]) -> list[Any]:
    """Parameters (name, form): each form of Llama's attention, and of the other causal models' the first.

    The others are of a slow test: how a model projects and how its state is kept do not depend on each other.
    """
    return [
        pytest.param(
            *(name, form),
            marks=() if name == "llama3-8b" or form is forms[0] else pytest.mark.slow,
            id="-".join(map(str, (name, *form.values()))),
        )
        for name in CAUSAL
        for form in forms
    ]


def tiny_model(name: str, **overrides: Any) -> Any:
    """A model of two layers in evaluation mode, its weights large enough that attention is far from even."""
    config = model_config(name, overrides={**SHAPES[name], **overrides}, dropout=0.0)
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def linearized(name: str, **settings: Any) -> Any:
    """A tiny linearized model with random maps and mix factors."""
    model = tiny_model(name)
    linearize_attention(model, LinearizeConfig(**settings))
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Other values for all that linearizing added, so that heads and features differ."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for linear in linear_windows(model).values():
            for parameter in linear.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.4)


def copying_model(vocabulary: int, positions: int = 128, code: int = 128) -> Any:
    """A GPT-2 that goes on as the text went on after the last token's earlier place, by weights that are written down.

    A stream of four parts: the token's code, the place's, the code of the token before, which the first layer copies
    there, and the result: the second layer looks for places after a token like the last one, and copies their token.
    Only the first of four heads is used.

    Args:
        positions, code: powers of 2, positions not above code: codes of places are rows of a Hadamard matrix.
    """
    width = 4 * code
    sizes = {"n_positions": positions, "n_layer": 2, "n_embd": width, "n_head": 4, "n_inner": 1}
    own = {"vocab_size": vocabulary, "tie_word_embeddings": False, **sizes}
    model = build_model(model_config("gpt2-nano", overrides=own, dropout=0.0))
    places = torch.ones(1, 1)
    while len(places) < code:
        places = torch.cat([torch.cat([places, places], 1), torch.cat([places, -places], 1)])
    places, one = places[:positions], torch.eye(code)
    codes = torch.randint(2, (vocabulary, code), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    parts = {name: slice(n * code, (n + 1) * code) for n, name in enumerate(("token", "place", "before", "result"))}
    query, key, value = (slice(n * width, n * width + code) for n in range(3))
    with torch.no_grad():
        for block in model.transformer.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        model.transformer.wte.weight.zero_()[:, parts["token"]] = codes
        model.transformer.wpe.weight.zero_()[:, parts["place"]] = places
        model.lm_head.weight.zero_()[:, parts["result"]] = codes
        to_before = places[1:].T @ places[:-1] / code  # the code of a place to that of the one before it
        for block, asks, keys, looks, to in zip(
            model.transformer.h,
            ("place", "token"),
            ("place", "before"),
            (3 * to_before, 4 * one),
            ("before", "result"),
            strict=True,
        ):
            weight = block.attn.c_attn.weight
            weight[parts[asks], query], weight[parts[keys], key], weight[parts["token"], value] = looks, one, one
            block.attn.c_proj.weight[:code, parts[to]] = one
    return model.eval()


def tokens(count: int, rows: int = 2) -> Tensor:
    """(rows, count) token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(3))


def left_padded(ids_BT: Tensor, padding: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and mask: row b keeps its last T - padding[b] tokens; what stands before them is not to be seen."""
    mask_BT = torch.arange(ids_BT.shape[1]) >= torch.tensor(padding)[:, None]
    return ids_BT.masked_fill(~mask_BT, 7), mask_BT.long()


def positions_of(mask_BT: Tensor) -> Tensor:
    """Position ids as `generate` makes them."""
    return (mask_BT.cumsum(1) - 1).clamp(min=0)


def attend_as_defined(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    keep_BT: Tensor,
    mix_H: Tensor,
    maps: Maps,
    pattern: Pattern,
    scale: float,
) -> Tensor:
    """Equation 7 of LoLCATs, query by query, each far key decayed by the gates of those after it: (B, H, T, D)."""
    (B, H, T, D), G = q_BHTD.shape, k_BGTD.shape[1]
    phi_q_BHTF, phi_k_BGTF = maps.q(q_BHTD * scale * D**0.5), maps.k(k_BGTD)
    gates_BGT = k_BGTD.new_ones(B, G, T) if maps.gate is None else maps.gate(k_BGTD).exp()
    rows = []
    for b in range(B):
        real = keep_BT[b].nonzero().flatten().tolist()
        first = real[0] if real else 0
        for n in range(T):
            seen = [j for j in real if j <= n or not pattern.causal]
            near = [j for j in seen if _near(n - first, j - first, pattern)]
            far = sorted(set(seen) - set(near))
            for h in range(H):
                g = h * G // H
                weights_T = q_BHTD.new_zeros(T)
                if near:
                    scores = scale * k_BGTD[b, g, near] @ q_BHTD[b, h, n]
                    weights_T = weights_T.index_put((torch.tensor(near),), mix_H[h] * (scores - scores.max()).exp())
                if far:
                    after = torch.cat([gates_BGT[b, g, far[1:]], gates_BGT.new_ones(1)])
                    left = after.flip(0).cumprod(0).flip(0)  # of each far key, the gates of those after it
                    product = phi_k_BGTF[b, g, far] @ phi_q_BHTF[b, h, n]
                    weights_T = weights_T.index_put((torch.tensor(far),), left * product)
                rows.append(weights_T @ v_BGTD[b, g] / weights_T.sum() if seen else torch.zeros_like(q_BHTD[b, h, n]))
    return torch.stack(rows).view(B, T, H, D).transpose(1, 2)


def delta_as_defined(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    keep_BT: Tensor,
    maps: Maps,
    window: int,
    scale: float,
) -> Tensor:
    """Softmax over the window mixed with a read of the delta rule's state, query by query: (B, H, T, D)."""
    assert maps.gate is not None
    assert maps.beta is not None
    assert maps.share is not None
    (B, H, T, D), G = q_BHTD.shape, k_BGTD.shape[1]
    scaled_BHTD = q_BHTD * scale * D**0.5
    phi_q_BHTF, phi_k_BGTF, share_BHT = maps.q(scaled_BHTD), maps.k(k_BGTD), maps.share(scaled_BHTD)
    beta_BGT, gate_BGT, eye_FF = maps.beta(k_BGTD), maps.gate(k_BGTD).exp(), torch.eye(phi_k_BGTF.shape[-1]).to(q_BHTD)
    rows = []
    for b in range(B):
        real = keep_BT[b].nonzero().flatten().tolist()
        states = [[eye_FF[:, :1] * v_BGTD[b, g, :1] * 0] for g in range(G)]
        for g in range(G):
            for j in real:
                k_F1, v_1D, beta = phi_k_BGTF[b, g, j, :, None], v_BGTD[b, g, j, None], beta_BGT[b, g, j]
                erased_FD = (eye_FF - beta * k_F1 @ k_F1.T) @ states[g][-1]
                states[g].append(gate_BGT[b, g, j] * erased_FD + beta * k_F1 @ v_1D)
        for n in range(T):
            near = [j for j in real if n - window < j <= n]
            far = sum(j <= n - window for j in real)
            for h in range(H):
                g, y_D = h * G // H, torch.zeros_like(q_BHTD[b, h, n])
                if near:
                    y_D = (scale * k_BGTD[b, g, near] @ q_BHTD[b, h, n]).softmax(0) @ v_BGTD[b, g, near]
                if far:
                    y_D = torch.lerp(y_D, phi_q_BHTF[b, h, n] @ states[g][far], share_BHT[b, h, n])
                rows.append(y_D)
    return torch.stack(rows).view(B, T, H, D).transpose(1, 2)


def _near(n: int, j: int, pattern: Pattern) -> bool:
    if pattern.terrace:
        return n // pattern.window - j // pattern.window <= 1
    return abs(n - j) < pattern.window


def bytes_for_backward(run: Callable[[], Tensor]) -> int:
    """The bytes that autograd keeps from a forward pass, of the sum of whose result it then takes the gradient."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run().sum().backward()
    return sum(sizes.values())


def linear_layers(out: int, inp: int, seed: int) -> dict[str, Callable[[], nn.Module]]:
    """A layer of every kind, by its name, from one dense weight; 1:4 is a sparse one without a bias."""
    generator = torch.Generator().manual_seed(seed)
    W_OI, bias = torch.randn(out, inp, generator=generator), torch.randn(out, generator=generator)

    def linear() -> nn.Module:
        layer = nn.Linear(inp, out)
        layer.weight.data, layer.bias.data = W_OI.clone(), bias.clone()
        return layer

    def conv1d() -> nn.Module:
        layer = Conv1D(out, inp)
        layer.weight.data, layer.bias.data = W_OI.t().contiguous(), bias.clone()
        return layer

    return {
        "linear": linear,
        "conv1d": conv1d,
        "masked": lambda: MaskedLinear(W_OI, bias, 2, 4),
        "sparse": lambda: SparseLinear(W_OI, bias, masks.row_mask(W_OI, 2, 4), 2, 4),
        "1:4": lambda: SparseLinear(W_OI, None, masks.row_mask(W_OI, 1, 4), 1, 4),
    }
