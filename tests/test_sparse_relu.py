"""Squared ReLU with a 2:4 result: against loops, in every kind of layer, and in runs, exports and decoding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inductor import QUIET
from support.models import linear_layers
from support.runs import tiny
from torch import Tensor, nn

from slope_cli.checkpoint.load import load_model
from slope_cli.config import configs
from slope_cli.errors import UsageError
from slope_cli.inference.export import export
from slope_cli.inference.export_packed import export_packed
from slope_cli.models.build import run_model_config
from slope_cli.train.loop import Trainer, pretrain
from sparse_kernels import MaskedLinear, SparseLinear, SparseSquaredReLU, defer_activations, masks, set_fp8, to_dense
from sparse_kernels.selection import stored_weight

WORDS = ("model.activation=sparse_relu2",)


class MLP(nn.Module):
    """What GPT-2 has of it: an activation, and the layer that reads it."""

    def __init__(self, down: nn.Module) -> None:
        super().__init__()
        self.act, self.c_proj = SparseSquaredReLU(), down

    def forward(self, H: Tensor) -> Tensor:
        Y: Tensor = self.c_proj(self.act(H))
        return Y


def largest_two(group: list[float]) -> list[bool]:
    """Which of a group are its two largest; of equal ones the first."""
    order = sorted(range(len(group)), key=lambda place: -group[place])[:2]
    return [place in order for place in range(len(group))]


def kept_features(A_BF: Tensor) -> Tensor:
    """Of whole groups of 4 features of each token its two largest, by loops; all of the rest."""
    kept = torch.ones_like(A_BF, dtype=torch.bool)
    for row, token in enumerate(A_BF.tolist()):
        for first in range(0, len(token) // 4 * 4, 4):
            kept[row, first : first + 4] = torch.tensor(largest_two(token[first : first + 4]))
    return kept


def kept_tokens(A_BF: Tensor) -> Tensor:
    """Of tokens a quarter of the batch apart the two largest of each feature, by loops; all of the last tokens."""
    kept, step = torch.ones_like(A_BF, dtype=torch.bool), len(A_BF) // 4
    for feature in range(A_BF.shape[1]):
        for first in range(step):
            rows = [first + step * place for place in range(4)]
            kept[rows, feature] = torch.tensor(largest_two(A_BF[rows, feature].tolist()))
    return kept


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 19), st.integers(1, 19), st.integers(0, 2**31))
def test_features_and_tokens_keep_their_two_largest(tokens: int, features: int, seed: int) -> None:
    # Few distinct numbers, so that ties are met all the time.
    A = torch.randint(0, 4, (tokens, features), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(masks.prune_features(A), A * kept_features(A))
    assert torch.equal(masks.prune_tokens(A), A * kept_tokens(A))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "masked", "sparse", "1:4"])
@pytest.mark.parametrize("deferred", [True, False])
def test_products_and_gradients_equal_the_formulas(kind: str, deferred: bool) -> None:
    model = MLP(linear_layers(16, 24, seed=4)[kind]()).double()
    down = model.c_proj
    if isinstance(down, SparseLinear):
        forward, backward = down.weight.detach(), down.weight_backward.detach()
    else:
        forward = backward = (down.masked_weight if isinstance(down, MaskedLinear) else stored_weight(down)).detach()
    generator = torch.Generator().manual_seed(5)
    H = torch.randn(2, 9, 24, dtype=torch.float64, generator=generator).requires_grad_()  # 18 tokens: 2 are left
    dY = torch.randn(2, 9, 16, dtype=torch.float64, generator=generator)
    if deferred:
        defer_activations(model, on=True)
    model(H).backward(dY)
    h, dy = H.detach().view(18, 24), dY.view(18, 16)
    A = torch.relu(h) ** 2
    kept = kept_features(A)
    with torch.no_grad():
        bias = 0 if down.bias is None else down.bias
        torch.testing.assert_close(model(H.detach()).view(18, 16), (A * kept) @ forward.T + bias)
    dH = 2 * torch.relu(h) * kept * (dy @ backward)
    torch.testing.assert_close(H.grad.view(18, 24), dH)  # type: ignore[union-attr]
    assert ((dH.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    dW = dy.T @ (A * (kept_tokens(A) if deferred else kept))
    if isinstance(down, SparseLinear):
        torch.testing.assert_close(down.values.grad, down.kept(dW))
    else:
        grad = down.weight.grad
        torch.testing.assert_close(grad.t() if kind == "conv1d" else grad, dW)
    if down.bias is not None:
        torch.testing.assert_close(down.bias.grad, dy.sum(0))


def test_evaluation_prunes_by_token_and_what_was_deferred_is_undone() -> None:
    model, H = MLP(linear_layers(16, 24, seed=4)["linear"]()), torch.randn(8, 24)
    expected, kind = model(H), type(model.c_proj)
    defer_activations(model, on=True)
    defer_activations(model, on=True)  # once is enough
    assert isinstance(model.c_proj, kind)
    assert type(model.c_proj) is not kind
    torch.testing.assert_close(model(H), expected)
    model.eval()
    assert torch.equal(model(H), expected)
    assert torch.equal(model.act(H[3:4]), model.act(H)[3:4])  # alone as in company
    defer_activations(model, on=False)
    assert type(model.c_proj) is kind
    assert torch.equal(model.train()(H), expected)


@QUIET
def test_a_deferred_activation_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    grads = []
    for compiled in (False, True):
        model = MLP(linear_layers(16, 24, seed=4)["masked"]())
        defer_activations(model, on=True)
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager", dynamic=False)
        H = torch.randn(8, 24, generator=torch.Generator().manual_seed(6)).requires_grad_()
        model(H).square().sum().backward()
        grads.append((H.grad, model.c_proj.weight.grad))
    torch.testing.assert_close(*grads)


# ------------------------------------------------------------------------------------------------------- in the program


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.name=llama3-8b"], "model.activation=sparse_relu2: is for GPT-2 and OPT, and llama3-8b is neither"),
        (["model.name=bert-base"], "model.activation=sparse_relu2: is for GPT-2 and OPT, and bert-base is neither"),
        (
            ["model.overrides.activation_function=relu"],
            "model.activation=sparse_relu2: model.overrides.activation_function is set, too; keep one",
        ),
        (["train.precision=fp8"], "model.activation=sparse_relu2: is not for train.precision=fp8"),
    ],
)
def test_what_it_does_not_go_with_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        run_model_config(configs.load("gpt2-nano", [*WORDS, *words]))
    assert str(error.value) == message


@pytest.mark.parametrize("method", ["slope", "dense", "s_ste"])
def test_the_layers_of_a_run_are_deferred_in_each_phase(method: str, data: Path, tmp_path: Path) -> None:
    start = () if method == "dense" else ("sparsity.start=0.5",)
    trainer = Trainer(tiny(data, *WORDS, f"method={method}", *start), tmp_path / "run", torch.device("cpu"))
    trainer.batches.close()

    def deferred() -> list[bool]:
        return [m.deferred for m in trainer.model.modules() if isinstance(m, SparseSquaredReLU)]

    assert deferred() == [True, True]
    for phase in trainer.phases.distinct[1:]:
        trainer.enter(phase)
        assert deferred() == [True, True]
        kept = [m for m in trainer.model.modules() if isinstance(m, SparseLinear | MaskedLinear) and m.prunes_input]
        assert len(kept) == 2


@pytest.mark.parametrize("model", ["gpt2-nano", "opt-125m"])
def test_a_run_an_export_and_decoding_have_the_same_activation(model: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tiny(data, *WORDS, "train.steps=4", "adapters.rank=0", model=model), run)
    trained = load_model(run)
    assert trained.model.config.activation_function == "sparse_relu2"
    export(run, tmp_path / "exported")  # compares the logits
    export_packed(run, tmp_path / "packed", "float32")
    assert "sparse_kernels.transformers" in (tmp_path / "exported/README.md").read_text()
    for folder in ("exported", "packed"):
        loaded = load_model(tmp_path / folder)
        assert sum(isinstance(m, SparseSquaredReLU) for m in loaded.model.modules()) == 2
    to_dense(trained.model)
    ids = torch.tensor([[5, 9, 40, 3, 7, 11]])
    whole = trained.model(ids).logits[0]
    short = trained.model(ids[:, :3], use_cache=True)
    step = trained.model(ids[:, 3:4], past_key_values=short.past_key_values).logits[0, 0]
    torch.testing.assert_close(step, whole[3])


@pytest.mark.parametrize("first_on", ["fp8", "activations"])
@pytest.mark.parametrize("first_off", ["fp8", "activations"])
def test_a_layer_is_what_it_was_when_both_of_its_forwards_end_in_any_order(first_on: str, first_off: str) -> None:
    model = MLP(nn.Linear(32, 16))
    layer = model.c_proj
    kind, keys = type(layer), list(layer.state_dict())
    turn: dict[str, Callable[[bool], None]] = {
        "fp8": lambda on: set_fp8(model, ["c_proj"] if on else []),
        "activations": lambda on: defer_activations(model, on=on),
    }
    for order, on in ((first_on, True), (first_off, False)):
        for what in sorted(turn, key=lambda each: each != order):
            turn[what](on)
            assert isinstance(layer, kind)
        assert (type(layer) is kind) != on
    assert list(layer.state_dict()) == keys
