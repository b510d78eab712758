"""Every method in the same loop: its phases, its masks, and that a killed run resumes bit for bit."""

import ast
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.processes import die_in_save, finish, start
from support.runs import assert_same_run, records, tiny
from transformers import PreTrainedModel

from slope_cli.checkpoint import run_folder
from slope_cli.checkpoint.load import load_model
from slope_cli.checkpoint.verify import check
from slope_cli.config import configs
from slope_cli.config.schema import METHODS, Config
from slope_cli.errors import SlopeError, UsageError
from slope_cli.inference.export import export
from slope_cli.methods import phases_of
from slope_cli.methods.apply import apply
from slope_cli.methods.phases import ADAPTERS, MAPS, WEIGHTS, Phase
from slope_cli.methods.sparse import report_layers
from slope_cli.models.build import build_model, run_model_config
from slope_cli.train.dry_run import describe
from slope_cli.train.loop import pretrain
from sparse_kernels import MaskedLinear, ModelReport, masked_layers, masks, sparse_layers

ROOT = Path(__file__).parent.parent

RUNS = {
    "sr_ste": ["method=sr_ste"],
    "fst": ["method=fst", "fst.dense_finish=0.4", "fst.mask_update_interval=3"],
    "s_ste": ["method=s_ste", "sparsity.start=0.3"],
    "wanda": ["method=wanda", "sparsity.start=0.5"],
    "dense start": ["sparsity.start=0.4", "slope.rescale=true", "slope.backward_rescale=true"],
    "sr_ste start": ["sparsity.start=0.4", "slope.before=sr_ste"],
    "wanda mask": ["sparsity.mask=wanda", "slope.backward_mask=random"],
    "row masks": ["slope.row_mask_until=0.7", "slope.row_mask_update_interval=2", "sparsity.start=0.2"],
    "sparse_relu2": ["model.activation=sparse_relu2", "sparsity.start=0.3"],
    "mixed": ["sparsity.pattern_overrides.1-1=[2,8]"],
    "every step": ["slope.mask_update_interval=1", "sparsity.target_modules=[mlp]"],
    "fp8": ["train.precision=fp8", "train.bf16_finish=0.3"],
    "muon": ["optim.name=muon", "sparsity.start=0.3", "slope.before=sr_ste"],
    "lamb": ["optim.name=lamb", "optim.lr=0.01", "adapters.schedule=run", "adapters.init=gaussian"],
}


def in_each_step(*words: str) -> list[Phase]:
    config = configs.load("gpt2-nano", ["train.steps=4", *words])
    return [phases_of(config).at(step) for step in range(config.train.steps)]


def test_the_phase_is_a_function_of_config_and_step() -> None:
    def kinds(*words: str) -> list[str]:
        return [phase.name for phase in in_each_step(*words)]

    adapted = "sparse, with adapters"
    assert kinds("method=dense") == ["dense"] * 4
    assert kinds("adapters.start=0.5") == ["sparse", "sparse", adapted, adapted]
    assert kinds("adapters.start=0", "sparsity.start=0.5") == ["dense", "dense", adapted, adapted]
    assert kinds("adapters.rank=0", "sparsity.start=0.25", "slope.before=sr_ste") == ["masked", *["sparse"] * 3]
    assert kinds("method=sr_ste") == ["masked"] * 4
    assert kinds("method=sr_ste", "sparsity.start=0.25") == ["dense", "masked", "masked", "masked"]
    assert kinds("method=fst", "fst.dense_finish=0.25") == ["masked", "masked", "masked", "unmasked"]
    assert kinds("method=fst", "fst.dense_finish=0") == ["masked"] * 4
    assert kinds("method=s_ste", "sparsity.start=0.5") == ["dense", "dense", "masked", "masked"]
    assert kinds("method=wanda", "sparsity.start=1") == ["dense", "dense", "dense", "masked"]
    assert kinds("method=linearize") == ["transfer", "transfer", *["train, with adapters"] * 2]
    assert kinds("method=linearize", "distill.share=1")[2:] == ["distill, with adapters"] * 2
    assert kinds("method=linearize", "linearize.transfer=1") == ["transfer"] * 4
    every = ("method=linearize", "linearize.train=all")
    assert kinds(*every)[2:] == ["train, all weights, with adapters"] * 2
    assert kinds(*every, "adapters.rank=0", "distill.share=1")[2:] == ["distill, all weights"] * 2
    assert kinds(*every, "linearize.transfer=1") == ["transfer"] * 4
    assert kinds("method=linearize", "linearize.transfer=0") == ["train, with adapters"] * 4
    fp8 = "train.precision=fp8"
    assert kinds(fp8, "adapters.start=0.5") == ["sparse, in fp8"] * 2 + [f"{adapted}, in fp8"] * 2
    assert kinds(fp8, "adapters.start=0.5", "train.bf16_finish=0.25")[2:] == [f"{adapted}, in fp8", adapted]
    assert kinds(fp8, "adapters.start=0.5", "train.bf16_finish=0.5")[1:3] == ["sparse, in fp8", adapted]
    assert kinds(fp8, "adapters.start=0.5", "train.bf16_finish=0.75")[:3] == ["sparse, in fp8", "sparse", adapted]
    assert kinds(fp8, "method=dense", "train.bf16_finish=1") == ["dense"] * 4


@pytest.mark.parametrize("method", METHODS)
def test_phases_cover_the_run_in_order(method: str) -> None:
    for steps in (1, 2, 7):
        words = [f"method={method}", f"train.steps={steps}", *(["sparsity.start=0.5"] if method == "wanda" else [])]
        phases = phases_of(configs.load("gpt2-nano", words))
        seen = [phases.at(step) for step in range(steps)]
        firsts = [phase.first for phase in phases]
        assert firsts == sorted(firsts)
        assert firsts[0] == 0
        assert phases.distinct == unique(seen)
        assert phases.end is seen[-1]
        assert all(phase.rates for phase in seen)


def test_each_method_says_which_products_are_sparse() -> None:
    def sparse(*words: str) -> list[str]:
        return in_each_step(*words)[1].layers.sparse_products

    assert sparse() == ["forward", "input gradient"]
    assert sparse("method=sr_ste") == sparse("method=wanda", "sparsity.start=0.25") == ["forward"]
    assert sparse("method=fst") == ["forward", "input gradient", "weight gradient"]
    assert sparse("method=s_ste") == ["forward", "weight gradient"]
    assert sparse("method=s_ste", "s_ste.mvue=false") == ["forward"]
    assert sparse("method=dense") == sparse("method=fst", "fst.dense_finish=1") == []
    lines = "\n".join(describe(configs.load("gpt2-nano", ["method=s_ste"]))[1])
    assert re.search(r"# sparse products +forward, weight gradient; computed as dense ones, with zeros\n", lines)
    assert "sparse products" not in "\n".join(describe(configs.load("gpt2-nano", ["method=dense"]))[1])


def unique(phases: list[Phase]) -> list[Phase]:
    return [phase for number, phase in enumerate(phases) if phase not in phases[:number]]


def test_masks_are_updated_as_their_method_wants() -> None:
    def due(*words: str) -> list[bool]:
        config = configs.load("gpt2-nano", ["train.steps=8", *words])
        return [phases_of(config).at(step).updates_masks(step) for step in range(8)]

    def every(interval: int, first: int = 0) -> list[bool]:
        return [step >= first and interval > 0 and (step + 1) % interval == 0 for step in range(8)]

    assert due() == every(1)
    assert due("slope.mask_update_interval=0") == every(0)
    half = every(1)[:4] + every(3)[4:]
    assert due("slope.mask_update_interval=3", "sparsity.start=0.5", "slope.before=sr_ste") == half
    assert due("slope.mask_update_interval=3", "sparsity.start=0.5") == every(3, first=4)
    assert due("method=sr_ste") == every(1)
    assert due("method=fst", "fst.mask_update_interval=3", "fst.dense_finish=0") == every(3)
    assert due("method=fst") == every(0)  # 40 steps are more than it has
    assert due("method=s_ste") == every(1)
    assert due("method=wanda", "sparsity.start=0.5") == every(0)  # chosen once
    assert due("method=dense") == due("method=linearize", "linearize.window=8") == every(0)
    rows = ("slope.row_mask_update_interval=2", "slope.row_mask_until=0.75")
    assert due("slope.mask_update_interval=0", *rows) == [False, True, False, True, *[False] * 4]
    assert due("slope.mask_update_interval=3", *rows) == [False, True, True, True, False, True, False, False]
    assert due("slope.mask_update_interval=0", "sparsity.start=0.25", *rows) == [*[False] * 3, True, *[False] * 4]


def test_row_masks_change_less_and_less_until_they_are_fixed() -> None:
    words = ("slope.row_mask_until=0.75", "slope.row_mask_update_interval=1", "slope.row_mask_share=0.4")
    phases = in_each_step(*words, "adapters.start=0.5")  # 4 steps
    shares = [phase.row_mask_share(step) for step, phase in enumerate(phases)]
    assert shares == pytest.approx([0.2 * (1 + math.cos(math.pi / 3)), 0.2 * (1 + math.cos(2 * math.pi / 3)), 0, 0])
    assert [phase.row_mask_share(step) for step, phase in enumerate(in_each_step())] == [0] * 4


def test_each_phase_says_what_is_trained_at_which_rate() -> None:
    def groups(*words: str) -> list[list[str]]:
        return [list(phase.rates) for phase in in_each_step(*words)]

    assert groups("adapters.start=0.5") == [[WEIGHTS]] * 2 + [[WEIGHTS, ADAPTERS]] * 2
    assert groups("method=linearize") == [[MAPS]] * 2 + [[ADAPTERS]] * 2
    assert groups("method=linearize", "linearize.adjust_maps=true") == [[MAPS]] * 2 + [[ADAPTERS, MAPS]] * 2
    every = ("method=linearize", "linearize.train=all")
    assert groups(*every)[2:] == [[WEIGHTS, ADAPTERS, MAPS]] * 2
    assert groups(*every, "adapters.rank=0")[2:] == [[WEIGHTS, MAPS]] * 2
    assert groups(*every, "adapters.rank=0", "linearize.state=gated")[2:] == [[WEIGHTS, ADAPTERS, MAPS]] * 2
    alone = ("method=linearize", "linearize.state=delta", "linearize.transfer=1")
    assert groups(*alone) == [[MAPS]] * 4  # its gates stay 1
    rates = in_each_step(*every, "optim.lr=0.5", "adapters.lr=0.25")[3].rates
    assert [rates[group].peak for group in (WEIGHTS, ADAPTERS, MAPS)] == [0.5, 0.25, 0.25]
    assert {(rate.first, rate.last) for rate in rates.values()} == {(2, 4)}
    own = in_each_step("adapters.start=0.5", "adapters.lr=0.25", "adapters.warmup=1")[3].rates[ADAPTERS]
    assert (own.first, own.last, own.peak, own.warmup) == (2, 4, 0.25, 1)
    run = in_each_step("adapters.start=0.5", "adapters.lr=0.25", "adapters.schedule=run")[3].rates
    assert run[ADAPTERS] == replace(run[WEIGHTS], peak=0.25)


def test_the_backward_mask_is_derived_where_each_step_chooses_it_by_magnitude() -> None:
    def derived(*words: str) -> list[bool]:
        return [phase.layers.backward_mask_is_derived for phase in in_each_step(*words)]

    assert derived() == [True] * 4
    assert derived("sparsity.start=0.5") == [False, False, True, True]
    for word in ("slope.mask_update_interval=2", "slope.mask_update_interval=0", "slope.backward_mask=random"):
        assert derived(word) == [False] * 4
    assert derived("method=sr_ste") == derived("method=dense") == [False] * 4


def test_only_methods_and_config_compare_the_names_of_methods() -> None:
    """All else asks `phases_of(config)`."""
    found = []
    for path in sorted([*ROOT.glob("slope_cli/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]):
        room = path.relative_to(ROOT)
        if room.parts[:2] in (("slope_cli", "methods"), ("slope_cli", "config")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            subject = [node.subject] if isinstance(node, ast.Match) else []
            if any(isinstance(side, ast.Attribute) and side.attr == "method" for side in (*sides, *subject)):
                found.append(f"{room}:{node.lineno}")  # type: ignore[attr-defined]
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_bit_for_bit(name: str, data: Path, tmp_path: Path) -> None:
    """Killed in the first save after a transition, and so started again in the later phase and before it."""
    config = tiny(data, *RUNS[name], "log.save_every=3")
    reference = tmp_path / "reference"
    pretrain(config, reference)
    for step in (3, 6, 9):
        run = tmp_path / f"run{step}"
        assert finish(start(config, run, die_in_save, step, 3)) < 0
        pretrain(config, run)
        assert_same_run(config, run, reference)
    assert check(reference)["faults"] == []
    loaded, kind = load_model(reference), phases_of(config).end.layers.kind
    assert loaded.step == config.train.steps
    assert bool(dict(sparse_layers(loaded.model))) == (kind == "sparse")
    assert bool(dict(masked_layers(loaded.model))) == (kind in ("masked", "unmasked"))
    losses = [record["loss"] for record in records(reference) if record["kind"] == "train"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sparsity.start=0.5", "adapters.start=0.5"], [(7, "sparse, with adapters", "sparse", True)]),
        (["sparsity.start=0.25"], [(4, "sparse", "sparse", False), (7, "sparse, with adapters", "sparse", True)]),
        (["method=fst", "fst.dense_finish=0.4"], [(8, "unmasked", "unmasked", False)]),
        (["method=dense"], []),
    ],
)
def test_a_transition_is_one_record_of_all_that_it_changes(
    words: list[str], expected: list[tuple[object, ...]], data: Path, tmp_path: Path
) -> None:
    pretrain(tiny(data, *words), tmp_path / "run")
    log = records(tmp_path / "run")
    found = [record for record in log if record["kind"] == "phase"]
    assert [(x["step"], x["name"], x["layers"], x["adapters"]) for x in found] == expected
    assert not any(record["linearized"] for record in found)
    assert {record["kind"] for record in log} <= {"train", "val", "sample", "phase", "products"}
    model = model_of(tmp_path / "run")
    adapters = [p for name, p in model.named_parameters() if ".adapter." in name]
    for record in found[-1:]:
        assert record["trained_parameters"] == sum(p.numel() for p in model.parameters())
        assert record["adapter_parameters"] == sum(p.numel() for p in adapters)


def model_of(run: Path) -> torch.nn.Module:
    return load_model(run).model


def masked_of(run: Path) -> dict[str, MaskedLinear]:
    return dict(masked_layers(model_of(run)))


def layers_of(config: Config) -> ModelReport:
    report = report_layers(config, phases_of(config), build_model(run_model_config(config), device="meta"))
    assert report is not None
    return report


def first_model(config: Config) -> PreTrainedModel:
    """That of a run before its first step."""
    model = build_model(run_model_config(config), seed=config.train.seed)
    apply(model, config, phases_of(config).at(0))
    return model


def test_sr_ste_has_the_mask_of_its_weights_in_all_layers_and_trains_the_pruned_ones(
    data: Path, tmp_path: Path
) -> None:
    config = tiny(data, "method=sr_ste")
    pretrain(config, tmp_path / "run")
    report = layers_of(config)
    first, last = first_model(config), masked_of(tmp_path / "run")
    assert set(last) == {layer.name for layer in report.swapped}
    moved = 0
    for name, layer in last.items():
        assert torch.equal(layer.mask, masks.nm_mask(layer.weight.abs(), 2, 4))
        began = first.get_submodule(name)
        assert not torch.equal(layer.weight[~began.mask], began.weight[~began.mask])
        moved += int((layer.mask != began.mask).sum())
    assert moved > 0


def test_fst_prunes_the_mlps_transposably_and_ends_dense(data: Path, tmp_path: Path) -> None:
    config = tiny(data, "method=fst", "fst.dense_finish=0.4", "log.save_every=6")
    pretrain(config, tmp_path / "run")
    unmasked = masked_of(tmp_path / "run")
    assert unmasked
    assert all(".mlp." in name and layer.mask.all() and not layer.mvue for name, layer in unmasked.items())
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000012")
    for layer in masked_of(tmp_path / "run").values():
        assert layer.mvue
        assert torch.equal(
            layer.mask.unflatten(0, (-1, 4)).sum(1), torch.full((layer.mask.shape[0] // 4, layer.mask.shape[1]), 2)
        )
        assert torch.equal(
            layer.mask.unflatten(1, (-1, 4)).sum(2), torch.full((layer.mask.shape[0], layer.mask.shape[1] // 4), 2)
        )


def test_s_ste_ends_as_a_model_with_soft_thresholded_mlps(data: Path, tmp_path: Path) -> None:
    config = tiny(data, "method=s_ste")
    pretrain(config, tmp_path / "run")
    first = first_model(config)
    last = masked_of(tmp_path / "run")
    assert last
    assert all(".mlp." in name and layer.mvue for name, layer in last.items())
    for name, layer in last.items():
        began, W = first.get_submodule(name), layer.weight.detach()
        assert torch.equal(layer.scale, began.scale)  # type: ignore[arg-type]
        assert not torch.equal(W, began.weight)
        assert torch.equal(layer.mask, masks.nm_mask(W.abs(), 2, 4))
        torch.testing.assert_close(layer.masked_weight.detach(), masks.soft_threshold(W, 2, 4) * began.scale)
    export(tmp_path / "run", tmp_path / "exported")
    exported = dict(sparse_layers(model_of(tmp_path / "exported")))
    assert set(exported) == set(last)
    assert all(torch.equal(exported[name].weight.detach(), last[name].masked_weight.detach()) for name in last)


@pytest.mark.slow
def test_wanda_prunes_a_finished_dense_run_and_tunes_what_is_left(data: Path, finished: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    pretrain(tiny(data, "method=dense"), dense)
    words = ("method=wanda", f"model.init={dense}", "train.steps=1", "optim.lr=1e-12")
    pretrain(tiny(data, *words), tmp_path / "wanda")
    before = model_of(dense)
    pruned = masked_of(tmp_path / "wanda")
    differs = 0
    for name, layer in pruned.items():
        weight_OI = before.get_submodule(name).weight.t()  # Conv1D
        assert torch.allclose(layer.weight, weight_OI, atol=1e-6)
        assert masks.is_nm(layer.mask, 2, 4)
        differs += int((layer.mask != masks.nm_mask(weight_OI.abs(), 2, 4)).sum())
    assert differs > 0  # the inputs' norms have a say


@pytest.mark.slow
def test_a_run_begins_with_the_weights_and_masks_of_another(data: Path, tmp_path: Path) -> None:
    """As a second phase does: sparse after sparse keeps every mask; dense after sparse takes the weights with zeros."""
    first, second, dense = tmp_path / "first", tmp_path / "second", tmp_path / "dense"
    pretrain(tiny(data, "adapters.rank=0"), first)
    pretrain(tiny(data, f"model.init={first}", "train.steps=1", "optim.lr=1e-12"), second)
    ours, theirs = dict(sparse_layers(model_of(second))), dict(sparse_layers(model_of(first)))
    for name, layer in ours.items():
        assert torch.equal(layer.row_mask_bits, theirs[name].row_mask_bits)
        assert torch.allclose(layer.values, theirs[name].values, atol=1e-6)
        assert layer.adapter is not None
    exported = tmp_path / "exported"
    export(first, exported)
    for name, layer in sparse_layers(load_model(exported).model):
        assert (layer.n, layer.m) == (2, 4)
        assert torch.equal(layer.row_mask_bits, theirs[name].row_mask_bits)
    for source in (first, exported):
        shutil.rmtree(dense, ignore_errors=True)
        pretrain(tiny(data, "method=dense", f"model.init={source}", "train.steps=1", "optim.lr=1e-12"), dense)
        for name, layer in theirs.items():
            assert torch.allclose(model_of(dense).get_submodule(name).weight.t(), layer.weight, atol=1e-6)


def test_a_run_that_begins_with_adapters_is_the_same_function(data: Path, finished: Path, tmp_path: Path) -> None:
    """Also where the scale of its own adapters is another."""
    still = ("train.steps=1", "optim.lr=1e-12", "adapters.lr=1e-12", f"model.init={finished}")
    pretrain(tiny(data, *still, "adapters.start=0", "adapters.init=gaussian"), tmp_path / "run")
    ids = torch.arange(32).view(1, 32)
    ours, theirs = (model_of(run)(input_ids=ids).logits for run in (tmp_path / "run", finished))
    assert torch.allclose(ours, theirs, atol=1e-5)
    with pytest.raises(UsageError, match=r"has other adapters .*; adapters.start=0 adapters.rank=4 would"):
        pretrain(tiny(data, f"model.init={finished}"), tmp_path / "late")


def test_a_bad_beginning_is_one_clear_line(data: Path, finished: Path, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(SlopeError) as caught:
            pretrain(tiny(data, *words), tmp_path / "run")
        return str(caught.value)

    assert "is another model: " in refused(f"model.init={finished}", "model.overrides.n_embd=48")
    for wrong in (tmp_path / "absent", tmp_path):
        assert refused(f"model.init={wrong}").startswith(f"model.init={wrong}: is neither a run")
    (empty := tmp_path / "empty").mkdir()
    shutil.copy(finished / run_folder.CONFIG, empty)
    assert refused(f"model.init={empty}") == f"model.init={empty}: has no checkpoint yet"
    assert refused("method=fst", "sparsity.exclude_modules=[mlp]").endswith(
        "(4 x not in an MLP; 4 x matches exclude_modules 'mlp'; 1 x output head)"
    )
    assert "block" in refused("sparsity.pattern_overrides.0-5=[2,8]")
    assert "wanda prunes a trained model" in refused("method=wanda")


def test_a_dry_run_says_what_is_wrong_with_what_it_would_begin_with(data: Path, finished: Path, tmp_path: Path) -> None:
    def shown(*words: str) -> str:
        return "\n".join(describe(tiny(data, *words))[1])

    def refused(*words: str) -> str:
        with pytest.raises(SlopeError) as caught:
            shown(*words)
        return str(caught.value)

    exported = tmp_path / "exported"
    export(finished, exported)
    for folder in (finished, exported):
        assert re.search(rf"# begins with +{folder}\n", shown(f"model.init={folder}"))
        assert refused(f"model.init={folder}", "model.overrides.n_embd=48").startswith(
            f"model.init={folder}: is another model: "
        )
    assert refused(f"model.init={tmp_path}").startswith(f"model.init={tmp_path}: is neither a run")
    (exported / "config.json").write_text("{")
    assert refused(f"model.init={exported}").startswith(f"model.init={exported}: cannot be loaded as a model (")
    assert "begins with" not in shown()
    # It may be a run that is yet to be made.
    later = tmp_path / "later"
    assert re.search(rf"# begins with +{later}, which does not exist yet", shown(f"model.init={later}"))
    (empty := tmp_path / "empty").mkdir()
    shutil.copy(finished / run_folder.CONFIG, empty)
    assert re.search(rf"# begins with +{empty}, which has no checkpoint yet", shown(f"model.init={empty}"))


def test_the_losses_of_an_exported_masked_model_are_those_of_the_run(data: Path, tmp_path: Path) -> None:
    pretrain(tiny(data, "method=sr_ste"), tmp_path / "run")
    result = export(tmp_path / "run", tmp_path / "exported")
    assert result["logits_difference"] < 1e-5
    assert "2:4 sparse" in (tmp_path / "exported/README.md").read_text()


def test_bert_goes_through_two_phases_with_lamb(bert_data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(tiny(bert_data, "optim.name=lamb", "adapters.rank=0", model="bert-base"), one)
    pretrain(tiny(bert_data, "optim.name=lamb", f"model.init={one}", model="bert-base"), two)
    losses = [record["loss"] for run in (one, two) for record in records(run) if record["kind"] == "train"]
    assert losses[len(losses) // 2] < losses[0]
