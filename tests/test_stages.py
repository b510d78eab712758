"""Every method in the same loop: its stages, its masks, and that it goes on after a kill as if nothing had been."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_same_run, die_in_save, finish, records, start, tiny, tiny_bert

from slope_cli.checkpoint import load, run_folder, run_model
from slope_cli.checkpoint.verify import check
from slope_cli.config import load as configs
from slope_cli.config.schema import Config
from slope_cli.errors import SlopeError, UsageError
from slope_cli.inference.export import export
from slope_cli.methods import phases
from slope_cli.methods.phases import DENSE, Stage, stage
from slope_cli.train.dry_run import describe
from slope_cli.train.loop import pretrain
from sparse_kernels import MaskedLinear, masked_layers, masks, sparse_layers

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {
    "sr_ste": ["method=sr_ste", "sparsity.renew_every=null"],
    "fst": ["method=fst", "sparsity.dense_finish=0.4", "sparsity.renew_every=3"],
    "wanda": ["method=wanda", "sparsity.start=0.5"],
    "dense start": ["sparsity.start=0.4", "sparsity.rescale=true", "sparsity.column_rescale=true"],
    "sr_ste start": ["sparsity.start=0.4", "sparsity.before=sr_ste"],
    "wanda mask": ["sparsity.mask=wanda", "sparsity.column_mask=random"],
    "mixed": ["sparsity.blocks.1-1=[2,8]"],
    "lamb": ["optim.name=lamb", "optim.lr=0.01", "adapters.schedule=run", "adapters.init=gaussian"],
}


def plan_of(config: Config) -> list[Stage]:
    return [stage(config, step) for step in range(config.train.steps)]


def test_the_stage_is_a_function_of_config_and_step() -> None:
    def of(*words: str) -> list[Stage]:
        return plan_of(configs.load("gpt2-nano", ["train.steps=4", *words]))

    masked, sparse, joined = Stage("masked"), Stage("sparse"), Stage("sparse", adapters=True)
    assert of("method=dense") == [DENSE] * 4
    assert of("adapters.start=0.5") == [sparse, sparse, joined, joined]
    assert of("adapters.start=0", "sparsity.start=0.5") == [DENSE, DENSE, joined, joined]
    assert of("adapters.rank=0", "sparsity.start=0.25", "sparsity.before=sr_ste") == [masked, sparse, sparse, sparse]
    assert of("method=sr_ste") == [masked] * 4
    assert of("method=sr_ste", "sparsity.start=0.25") == [DENSE, masked, masked, masked]
    assert of("method=fst", "sparsity.dense_finish=0.25") == [masked, masked, masked, Stage("lifted")]
    assert of("method=wanda", "sparsity.start=1") == [DENSE, DENSE, DENSE, masked]


def test_masks_are_renewed_as_their_method_wants() -> None:
    def every(*words: str) -> list[int]:
        config = configs.load("gpt2-nano", ["train.steps=4", *words])
        return [phases.renew_every(config, now) for now in plan_of(config)]

    assert every() == [1] * 4
    assert every("sparsity.renew_every=7", "sparsity.start=0.5", "sparsity.before=sr_ste") == [1, 1, 7, 7]
    assert every("method=sr_ste") == [1] * 4
    assert every("method=fst", "sparsity.renew_every=5") == [5] * 4
    assert every("method=wanda", "sparsity.start=0.5", "sparsity.renew_every=2") == [0] * 4  # chosen once
    assert every("method=wanda", "sparsity.start=0.5") == every("method=dense") == [0] * 4


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_bit_for_bit(name: str, data: Path, tmp_path: Path) -> None:
    """Killed in the first save after the change of stage, and so started again in the later stage and before it."""
    config = tiny(data, *METHODS[name], "log.save_every=3")
    reference = tmp_path / "reference"
    pretrain(config, reference)
    for step in (3, 6, 9):
        run = tmp_path / f"run{step}"
        assert finish(start(config, run, die_in_save, step, 3)) < 0
        pretrain(config, run)
        assert_same_run(config, run, reference)
    assert check(reference)["faults"] == []
    _, model, _, manifest = run_model.load(reference)
    layers = plan_of(config)[-1].layers
    assert manifest["step"] == config.train.steps
    assert bool(dict(sparse_layers(model))) == (layers == "sparse")
    assert bool(dict(masked_layers(model))) == (layers in ("masked", "lifted"))
    losses = [record["loss"] for record in records(reference) if record["kind"] == "train"]
    assert losses[-1] < losses[0]


def model_of(run: Path) -> torch.nn.Module:
    return run_model.load(run)[1]


def masked_of(run: Path) -> dict[str, MaskedLinear]:
    return dict(masked_layers(model_of(run)))


def test_sr_ste_has_the_mask_of_its_weights_in_all_layers_and_trains_the_pruned_ones(
    data: Path, tmp_path: Path
) -> None:
    config = tiny(data, "method=sr_ste", "sparsity.renew_every=null")
    pretrain(config, tmp_path / "run")
    first, report = run_model.build(config, "cpu")
    assert report is not None
    last = masked_of(tmp_path / "run")
    assert set(last) == {layer.name for layer in report.swapped}
    moved = 0
    for name, layer in last.items():
        assert torch.equal(layer.mask, masks.nm_mask(layer.weight.abs(), 2, 4))
        began = first.get_submodule(name)
        assert not torch.equal(layer.weight[~began.mask], began.weight[~began.mask])
        moved += int((layer.mask != began.mask).sum())
    assert moved > 0


def test_fst_prunes_the_mlps_transposably_and_ends_dense(data: Path, tmp_path: Path) -> None:
    config = tiny(data, "method=fst", "sparsity.dense_finish=0.4", "log.save_every=6")
    pretrain(config, tmp_path / "run")
    lifted = masked_of(tmp_path / "run")
    assert lifted
    assert all(".mlp." in name and layer.mask.all() and not layer.mvue for name, layer in lifted.items())
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000012")
    for layer in masked_of(tmp_path / "run").values():
        assert layer.mvue
        assert torch.equal(
            layer.mask.unflatten(0, (-1, 4)).sum(1), torch.full((layer.mask.shape[0] // 4, layer.mask.shape[1]), 2)
        )
        assert torch.equal(
            layer.mask.unflatten(1, (-1, 4)).sum(2), torch.full((layer.mask.shape[0], layer.mask.shape[1] // 4), 2)
        )


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


def test_a_run_begins_with_the_weights_and_masks_of_another(data: Path, tmp_path: Path) -> None:
    """As a second phase does: sparse after sparse keeps every mask; dense after sparse takes the weights with zeros."""
    first, second, dense = tmp_path / "first", tmp_path / "second", tmp_path / "dense"
    pretrain(tiny(data, "adapters.rank=0"), first)
    pretrain(tiny(data, f"model.init={first}", "train.steps=1", "optim.lr=1e-12"), second)
    ours, theirs = dict(sparse_layers(model_of(second))), dict(sparse_layers(model_of(first)))
    for name, layer in ours.items():
        assert torch.equal(layer.positions, theirs[name].positions)
        assert torch.allclose(layer.values, theirs[name].values, atol=1e-6)
        assert layer.adapter is not None
    exported = tmp_path / "exported"
    export(first, exported)
    for name, layer in sparse_layers(load.load(exported).model):
        assert (layer.n, layer.m) == (2, 4)
        assert torch.equal(layer.positions, theirs[name].positions)
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
    with pytest.raises(UsageError, match="has other adapters than this run begins with"):
        pretrain(tiny(data, f"model.init={finished}"), tmp_path / "late")


def test_what_cannot_be_begun_with_is_one_clear_line(data: Path, finished: Path, tmp_path: Path) -> None:
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
    assert refused("method=fst", "sparsity.skip=[mlp]").endswith(
        "(4 x is in no MLP; 4 x matches skip pattern 'mlp'; 1 x output head)"
    )
    assert "block" in refused("sparsity.blocks.0-5=[2,8]")
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
    assert re.search(rf"# begins with +{tmp_path}/later, which is not there yet", shown(f"model.init={tmp_path}/later"))
    (empty := tmp_path / "empty").mkdir()
    shutil.copy(finished / run_folder.CONFIG, empty)
    assert re.search(rf"# begins with +{empty}, which has no checkpoint yet", shown(f"model.init={empty}"))


def test_the_losses_of_an_exported_masked_model_are_those_of_the_run(data: Path, tmp_path: Path) -> None:
    pretrain(tiny(data, "method=sr_ste", "sparsity.renew_every=null"), tmp_path / "run")
    result = export(tmp_path / "run", tmp_path / "exported")
    assert result["logits_difference"] < 1e-5
    assert "2:4 sparse" in (tmp_path / "exported/README.md").read_text()


def test_bert_goes_through_two_phases_with_lamb(bert_data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain(tiny_bert(bert_data, "optim.name=lamb", "adapters.rank=0"), one)
    pretrain(tiny_bert(bert_data, "optim.name=lamb", f"model.init={one}"), two)
    losses = [record["loss"] for run in (one, two) for record in records(run) if record["kind"] == "train"]
    assert losses[len(losses) // 2] < losses[0]
