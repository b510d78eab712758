"""The losses of attention transfer: against softmax attention, each layer's gradient its own.

Nothing of size L×L is built, and no states are stored.

Shape suffixes: B sequences, H query heads, T positions, S keys, D head dimension.
"""

from typing import Any

import pytest
import torch
from support.models import CAUSAL, FORMS, SHAPES, left_padded, linearized, positions_of, randomize, tiny_model, tokens
from torch import Tensor
from torch.nn import functional as F

from slope_cli.config.methods import LinearizeConfig
from slope_cli.errors import UsageError
from slope_cli.linearize.swap import linear_windows, linearize_attention, using
from slope_cli.linearize.transfer import layer_loss, transfer_losses


def gradients(model: Any) -> dict[str, Tensor]:
    """Every gradient of the model by its parameter's name, and none left."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("entropy_weight", [0.0, 1.0])
def test_layerwise_gradients_are_those_of_the_summed_loss(name: str, entropy_weight: float) -> None:
    model, inputs = linearized(name, window=5), {"input_ids": tokens(80)}
    losses = transfer_losses(model, inputs, entropy_weight=entropy_weight, scale=0.5)
    layerwise = gradients(model)
    assert list(losses) == list(linear_windows(model))
    assert set(layerwise) == {key for key, _ in model.named_parameters() if ".linear." in key}
    assert not any(loss.total.requires_grad for loss in losses.values())

    joint = transfer_losses(model, inputs, entropy_weight=entropy_weight, backward=False)
    torch.stack([0.5 * loss.total for loss in joint.values()]).sum().backward()
    summed = gradients(model)
    assert summed.keys() == layerwise.keys()
    for key, gradient in summed.items():
        assert torch.equal(gradient, layerwise[key]), key
        assert gradient.abs().max() > 0, key

    first, second = joint = list(transfer_losses(model, inputs, backward=False).values())
    second.total.backward()
    names = list(linear_windows(model))
    assert all(key.startswith(names[1] + ".") for key in gradients(model))
    assert first.total.grad_fn is not None


@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_is_of_both_attentions_of_the_same_q_k_v(name: str) -> None:
    """The squared difference of what each layer hands to its output projection, at the teacher's hidden states."""
    model, inputs = linearized(name, window=5), {"input_ids": tokens(60)}
    losses = transfer_losses(model, inputs, backward=False)
    for key, linear in linear_windows(model).items():
        inner: dict[str, Tensor] = {}
        with torch.no_grad(), using(model, mode="softmax"):
            hook = _watch_attention(model, key, inner)
            model(**inputs)
            inner["softmax"] = inner.pop("y")
            linear.mode = "linear"  # this layer alone: it sees the teacher's hidden states
            model(**inputs, use_cache=False)
            hook()
        expected = (inner["y"] - inner["softmax"]).square().mean()
        torch.testing.assert_close(losses[key].mse.detach(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(losses[key].total, 1000 * losses[key].mse)


@pytest.mark.parametrize(
    "form",
    [form for form in [*FORMS.values(), {"window": 5, "causal": False}] if form.get("state") != "delta"],
    ids=str,
)
def test_the_entropy_is_that_of_the_whole_weights(form: dict[str, Any]) -> None:
    form = dict(form)
    name = "gpt2-nano" if form.pop("causal", True) else "bert-base"
    linear = next(iter(linear_windows(linearized(name, **form)).values())).double()
    q, k = (torch.randn(2, 4, 150, 8, dtype=torch.float64) for _ in range(2))
    keep = torch.ones(2, 150, dtype=torch.bool)
    keep[1, :7] = False
    # One-hot values make an attention's output its weights.
    eye_BHSS = torch.eye(150, dtype=torch.float64).expand(2, 4, 150, 150)
    loss = layer_loss(linear, q, k, eye_BHSS, 0.4, keep, eye_BHSS, mse_weight=0.0, entropy_weight=2.0)
    weights = linear.compute(q, k, eye_BHSS, 0.4, keep)
    seen = keep[:, None, None] & (torch.ones(150, 150).tril() > 0 if linear.pattern.causal else True)
    target = F.scaled_dot_product_attention(q, k, eye_BHSS, attn_mask=seen, scale=0.4)
    rows = -(target * weights.clamp(min=1e-12).log()).sum(-1)
    expected = rows.transpose(1, 2)[keep].mean()
    torch.testing.assert_close(loss.entropy.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.total.double(), 2 * expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_counts_for_nothing(name: str) -> None:
    model = linearized(name, window=5)
    ids_BT, mask_BT = left_padded(tokens(40, rows=1), [12])
    options: dict[str, Any] = {"entropy_weight": 1.0, "backward": False}
    padded = transfer_losses(
        model, {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_of(mask_BT)}, **options
    )
    alone = transfer_losses(model, {"input_ids": ids_BT[:, 12:]}, **options)
    for key, loss in alone.items():
        torch.testing.assert_close(padded[key].mse, loss.mse, rtol=1e-4, atol=0)
        torch.testing.assert_close(padded[key].entropy, loss.entropy, rtol=1e-4, atol=0)


def test_training_brings_the_attentions_together() -> None:
    torch.manual_seed(0)
    model, inputs = tiny_model("gpt2-nano"), {"input_ids": tokens(64, rows=8)}
    frozen = {key: p.clone() for key, p in model.named_parameters()}
    linearize_attention(model, LinearizeConfig(window=8))
    windows = linear_windows(model)
    optimizers = [torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=0.0) for linear in windows.values()]
    history = []
    for _ in range(40):
        losses = transfer_losses(model, inputs)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append([float(loss.mse) for loss in losses.values()])
    assert all(last < 0.8 * first for first, last in zip(history[0], history[-1], strict=True))
    assert all(torch.equal(p, frozen[key]) for key, p in model.named_parameters() if key in frozen)


def test_dropped_windows_leave_the_mix_without_gradient() -> None:
    model = linearized("gpt2-nano", window=5, window_dropout=1.0)
    transfer_losses(model, {"input_ids": tokens(40)})
    # Where nothing is far, gamma cancels: its gradient is zero but for rounding.
    assert all((gradient.abs().max() < 1e-3) == key.endswith("mix") for key, gradient in gradients(model).items())


def test_what_the_backward_pass_keeps_is_linear_in_length() -> None:
    model = tiny_model("gpt2-nano", n_positions=2048)
    linearize_attention(model, LinearizeConfig(window=8))
    randomize(model)

    def largest_kept(length: int) -> tuple[int, int]:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            transfer_losses(model, {"input_ids": tokens(length, rows=1)})
        return max(sizes), sum(sizes)

    (short, short_sum), (long, long_sum) = largest_kept(256), largest_kept(2048)
    assert long < 8.5 * short
    assert long_sum < 8.5 * short_sum


def test_only_one_layer_has_a_graph_at_a_time() -> None:
    model = linearized("gpt2-nano", window=5)
    alive: list[int] = []
    graphs: list[Any] = []
    for linear in linear_windows(model).values():
        linear.map_q.register_forward_hook(lambda *_: alive.append(sum(graph() is not None for graph in graphs)))
        linear.map_q.register_forward_hook(lambda _module, _inputs, phi: graphs.append(_reference(phi)))
    transfer_losses(model, {"input_ids": tokens(40)})
    assert alive == [0, 0]


def test_a_model_as_it_came_has_no_losses() -> None:
    with pytest.raises(UsageError, match="not linearized"):
        transfer_losses(tiny_model("gpt2-nano"), {"input_ids": tokens(4)})


def test_the_model_answers_as_the_linearized_one_afterwards() -> None:
    model, ids_BT = linearized("llama3-8b", window=5), tokens(30)
    with torch.no_grad():
        before = model(input_ids=ids_BT).logits
        transfer_losses(model, {"input_ids": ids_BT})
        assert torch.equal(model(input_ids=ids_BT).logits, before)
    with pytest.raises(ValueError, match="exactly one"):
        transfer_losses(model, {})
    assert all(linear.mode == "linear" and linear.observer is None for linear in linear_windows(model).values())


def _reference(tensor: Tensor) -> Any:
    import weakref

    return weakref.ref(tensor)


def _watch_attention(model: Any, name: str, into: dict[str, Tensor]) -> Any:
    """Note what the attention function of one module returns as `y`; call what is returned to stop."""
    from transformers import AttentionInterface

    from slope_cli.linearize import swap

    module = model.get_submodule(name)

    def watching(called: Any, *arguments: Any, **more: Any) -> Any:
        y, weights = swap.attention(called, *arguments, **more)
        if called is module:
            into["y"] = y
        return y, weights

    AttentionInterface.register(swap.NAME, watching)
    return lambda: AttentionInterface.register(swap.NAME, swap.attention)
