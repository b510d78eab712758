"""The other methods' steps on a GPU, and the transition from one phase of a run to the next, graphed as eagerly."""

import pytest
import torch
from test_gpu_step import Setup, assert_alike, assert_same_steps, batches, new_step

from slope_cli.config import configs
from slope_cli.methods import optim, phases_of
from slope_cli.methods.apply import apply
from slope_cli.models.build import build_model, run_model_config
from slope_cli.train.step import MaskUpdate, Step, StepOutput
from sparse_kernels import defer_activations, masked_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The CUDA Graph is empty", "ignore:The .grad attribute"
)  # Inductor's own

SIZES = ("model.overrides.n_embd=256", "model.overrides.n_layer=2", "train.steps=20", "optim.lr=2e-3", "optim.warmup=2")


def setup(*words: str, graphed: bool, compiled: bool = False) -> Setup:
    config = configs.load("gpt2-nano", [*SIZES, *words])
    model = build_model(run_model_config(config), device="cuda")
    apply(model, config, phases_of(config).at(0))
    defer_activations(model, on=True)
    optimizer = optim.build_optimizer(model, config, phases_of(config))
    return Setup(model, optimizer, new_step(model, optimizer, torch.bfloat16, graphed, compiled), config)


def train(run: Setup, steps: int, *, graphed: bool) -> list[StepOutput]:
    """Steps as slope_cli.train takes them, with their updates of masks and transitions between phases."""
    outputs, phases = [], phases_of(run.config)
    now = phases.at(0)
    for number in range(steps):
        to = phases.at(number)
        if to != now:
            apply(run.model, run.config, to, was=now, optimizer=run.optimizer)
            now, run = to, run._replace(step=new_step(run.model, run.optimizer, torch.bfloat16, graphed))
        update = MaskUpdate(now.layers.backward_mask, number) if now.updates_masks(number) else None
        outputs.append(run.take(batches("gpt2", 2, number), number, update))
    return outputs


WORDS = {
    "sr_ste": ["method=sr_ste"],
    "s_ste": ["method=s_ste", "s_ste.mvue=false", "sparsity.start=0.2"],
    "wanda": ["method=wanda", "sparsity.start=0.2"],
    "dense start": ["sparsity.start=0.2", "adapters.start=0.3", "slope.backward_rescale=true"],
    "sr_ste start": ["sparsity.start=0.2", "slope.before=sr_ste", "adapters.start=0.2"],
    "lamb": ["optim.name=lamb", "adapters.start=0.2"],
    "muon": ["optim.name=muon", "sparsity.start=0.2", "adapters.start=0.4"],
    "mixed": ["sparsity.pattern_overrides.1-1=[2,8]", "slope.mask_update_interval=3"],
    "random": ["slope.backward_mask=random", "slope.mask_update_interval=2"],
}


@pytest.mark.parametrize("name", WORDS)
def test_graphed_is_eager_through_all_phases(name: str) -> None:
    ones = {graphed: setup(*WORDS[name], graphed=graphed) for graphed in (False, True)}
    outputs = {graphed: train(one, 8, graphed=graphed) for graphed, one in ones.items()}
    assert_same_steps(outputs[True], outputs[False], rel=5e-3)
    assert_alike(ones[True], ones[False], rel=5e-3)


def test_the_draws_of_mvue_differ_from_replay_to_replay_and_are_unbiased() -> None:
    run = setup("method=fst", "fst.decay=0", graphed=True)
    (batch,) = batches("gpt2", 1, 0)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    layer = next(layer for _, layer in masked_layers(run.model))
    grads = []
    for _ in range(200):
        run.step([batch])
        assert layer.weight.grad is not None
        grads.append(layer.weight.grad.clone())
    assert not torch.equal(grads[0], grads[1])
    exact = setup("method=fst", "fst.decay=0", graphed=False)
    for _, other in masked_layers(exact.model):
        other.mvue = False
    assert isinstance(exact.step, Step)
    exact.step.backward(batch, 1, None)
    gradient = next(other for _, other in masked_layers(exact.model)).weight.grad
    assert gradient is not None
    wanted = gradient / exact.step.norm().clamp(min=1)
    mean = torch.stack(grads).mean(0)
    single = (grads[0] - wanted).norm() / wanted.norm()
    averaged = (mean - wanted).norm() / wanted.norm()
    assert averaged < single / 5


@pytest.mark.parametrize("words", ["method=sr_ste", "method=fst", "method=s_ste", "model.activation=sparse_relu2"])
def test_compiled_blocks_with_masked_layers_and_sparse_activations_train(words: str) -> None:
    ones = {fast: setup(words, graphed=fast, compiled=fast) for fast in (False, True)}
    outputs = {fast: train(one, 6, graphed=fast) for fast, one in ones.items()}
    rel = 5e-3 if words == "method=sr_ste" else 5e-2  # draws differ, and what is pruned of activations that are near
    assert [x.loss for x in outputs[True]] == pytest.approx([x.loss for x in outputs[False]], rel=rel)
