"""The layers that keep softmax attention: chosen by what the others forget, and the same in all that reads the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.data import prepared, scratch
from support.marks import slow
from support.models import SHAPES, copying_model, left_padded, tiny_model, tokens
from support.models import linearized as tiny_linearized
from support.runs import LINEARIZED, assert_same_run, copied, slope, trained

from slope_cli.checkpoint import run_folder, store
from slope_cli.checkpoint.load import KEPT, load_model
from slope_cli.config import configs
from slope_cli.config.methods import LinearizeConfig
from slope_cli.data.dataset import open_dataset
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.inference.engine import Engine
from slope_cli.linearize.linear_attention import Pattern
from slope_cli.linearize.swap import (
    keep_softmax,
    kept_softmax,
    linear_windows,
    linearize_attention,
    projections,
    restore_attention,
    softmax_units,
    using,
)
from slope_cli.methods.accounting import attention_memory
from slope_cli.report import metrics
from slope_cli.train.keep_softmax import (
    Divergence,
    Probe,
    Trial,
    choose,
    divergence,
    probe_of,
    recurring,
    trial_lines,
    trial_warning,
)

LAYERS = 4
WORDS = (
    *LINEARIZED,
    "train.steps=16",
    "linearize.window=4",
    "log.save_every=4",
    "log.keep=9",
)


def base() -> Path:
    return trained("gpt2-nano", "method=dense", f"model.overrides.n_layer={LAYERS}", "train.steps=60")


def words(chosen: str = "auto:2", *more: str) -> tuple[str, ...]:
    return (*WORDS, f"linearize.keep_softmax={chosen}", *more)


def chosen_run(*more: str) -> Path:
    """A finished run in which two of four layers keep softmax, or what `more` begins with."""
    run = scratch() / "-".join(["kept", *more]).replace("/", "_")
    if not run.exists():
        done = slope("linearize", base(), *words(*more), "--out", run)
        assert done.code == 0, done.err
        (run.parent / f"{run.name}.err").write_text(done.err)
    return run


def record_of(run: Path) -> dict[str, Any]:
    (record,) = [record for record in metrics.read(run) if record["kind"] == KEPT]
    return record


# ------------------------------------------------------------------------------------------------------ the search


def test_the_search_is_greedy_and_tries_few() -> None:
    """Twelve layers whose gains are known, of which 1 and 2 are of no use together."""
    gains = {5: 1.0, 1: 0.9, 2: 0.85, 7: 0.5, 3: 0.1}
    seen: list[tuple[int, ...]] = []

    def trial_of(layers: Any) -> Trial:
        seen.append(tuple(layers))
        gain = sum(gains.get(layer, 0) for layer in layers) - 0.8 * ({1, 2} <= set(layers))
        return Trial(tuple(layers), 4 - gain, None, 4 - gain)

    chosen, trials = choose(range(12), 3, trial_of)
    assert chosen == [1, 5, 7]
    assert seen == [*((layer,) for layer in range(12)), (), (1, 5), (2, 5), (5, 7), (1, 2, 5), (1, 5, 7), (1, 3, 5)]
    assert sorted(trial.kept for trial in trials) == sorted(seen)
    assert trials[0] == trial_of([])
    assert choose(range(3), 1, lambda layers: Trial(tuple(layers), 1.0, 1.0, None))[0] == [0]
    assert choose(range(3), 2, lambda layers: Trial(tuple(layers), 1.0, 1.0, None))[0] == [0, 1]


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_a_divergence_of_any_size_is_precise(size: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(8, 300, dtype=torch.float64)
    others = logits + size * torch.randn_like(logits)
    log_p, log_q = logits.float().log_softmax(-1), others.float().log_softmax(-1)
    found = divergence(log_p, log_q)
    p = logits.softmax(-1)
    # ln(1 + x) of the mean of exp(difference) - 1 over p, less the mean difference: nothing large cancels.
    apart = others - logits
    exact = torch.log1p((p * torch.expm1(apart)).sum(-1)) - (p * apart).sum(-1)
    assert torch.allclose(found, exact, rtol=1e-2, atol=0)
    assert divergence(log_p, log_p).abs().max() == 0
    far = torch.tensor([[-200.0, 0.0]]), torch.tensor([[0.0, -200.0]])
    assert divergence(*far) == pytest.approx(200)


@given(st.dictionaries(st.integers(0, 2**5 - 1), st.floats(0, 1), min_size=32, max_size=32), st.integers(1, 4))
def test_a_choice_that_fewer_layers_beat_is_said_to_be_one(table: dict[int, float], count: int) -> None:
    def trial_of(layers: Any) -> Trial:
        return Trial(tuple(layers), table[sum(1 << layer for layer in layers)], None, 0.0)

    chosen, trials = choose(range(5), count, trial_of)
    beaten = min(t.divergence for t in trials if len(t.kept) < count) <= trial_of(chosen).divergence
    warning = trial_warning(f"auto:{count}", chosen, trials)
    assert warning.startswith("with softmax in fewer layers (") if beaten else not warning
    assert [line for line in trial_lines("", chosen, trials) if line.endswith("kept")]


def test_places_where_a_token_follows_another_one_as_it_did_before_and_far_away() -> None:
    ids = np.array([5, 6, 1, 2, 3, 5, 6, 9, 5, 6, 4])
    # (5, 6) at 0, 5 and 8. For the queries at 5 and 8, the earlier 6 was 4 and 2 tokens before.
    assert recurring(ids, 1).tolist() == [5, 8]
    assert recurring(ids, 2).tolist() == [5]
    assert recurring(ids, 4).tolist() == []


def test_a_probe_has_text_and_items_beyond_the_window() -> None:
    dataset, tokenizer, pattern = open_dataset(prepared()), load_tokenizer("bytes"), Pattern(16)
    probe = probe_of(dataset, tokenizer, pattern, seq_len=96, seed=0)
    again = probe_of(dataset, tokenizer, pattern, seq_len=96, seed=0)
    assert torch.equal(probe.ids_NT, again.ids_NT)
    (rows_P, columns_P), items_P = probe.places_P, probe.items_P
    assert probe.ids_NT.shape[1] == 96
    assert items_P.any()
    assert (~items_P).any()
    for row, column in zip(rows_P.tolist(), columns_P.tolist(), strict=True):
        following, seen = probe.ids_NT[row, column + 1], probe.ids_NT[row, : column - pattern.lookback]
        assert (seen == following).any(), "what follows was said beyond the window"
    short = probe_of(dataset, tokenizer, Pattern(30), seq_len=31, seed=0)
    assert len(short.places_P[0]), "where nothing recurs, all places count"


@pytest.mark.parametrize("kind", ["gpt2-nano", "llama3-8b"])
@pytest.mark.parametrize("kept", [[1], ["0/1"], ["0/0", "1/1"]], ids=str)
def test_a_divergence_is_that_of_the_mixed_model(kind: str, kept: list[int | str]) -> None:
    """What trials switch gives what a model gives that never had these layers, or heads, linearized."""
    model, teacher = tiny_linearized(kind, window=5), tiny_model(kind)
    ids_NT = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(0))
    places, items_P = (torch.tensor([0, 0, 2]), torch.tensor([9, 20, 15])), torch.tensor([False, False, True])
    found = Divergence(model, Probe(ids_NT, places, items_P), 2)
    mixed = tiny_linearized(kind, window=5)
    keep_softmax(mixed, kept)
    with torch.no_grad():
        p, q = (each(input_ids=ids_NT).logits[places].double().log_softmax(-1) for each in (teacher, mixed))
    kl_P = (p.exp() * (p - q)).sum(-1)
    trial = found(kept)
    assert trial.text == pytest.approx(float(kl_P[:2].mean()), rel=1e-4)
    assert trial.items == pytest.approx(float(kl_P[2]), rel=1e-4)
    assert trial.divergence == pytest.approx((trial.text + trial.items) / 2)
    assert trial.divergence > 1e-3
    for all_ in (softmax_units(model, heads=False), softmax_units(model, heads=True)):
        assert found(all_).divergence == pytest.approx(0, abs=1e-6)
    assert {(window.mode, window.softmax_heads) for window in linear_windows(model).values()} == {("linear", ())}


@pytest.mark.parametrize("kind", list(SHAPES))
def test_heads_with_softmax_stand_beside_linearized_ones(kind: str) -> None:
    """In the first layer, which sees what the original one sees, a head gives what it gives in a model of its kind."""
    ids_BT, mask_BT = left_padded(tokens(40), [0, 7])
    head, outputs = 1, list[torch.Tensor]()
    for settings in (None, {"window": 5}, {"window": 5, "keep_softmax": [f"0/{head}"]}):
        model = tiny_model(kind) if settings is None else tiny_linearized(kind, **settings)
        hook = model.get_submodule(projections(model, ["o"])[0]).register_forward_pre_hook(
            lambda _, inputs: outputs.append(inputs[0])
        )
        with torch.no_grad():
            model(input_ids=ids_BT, attention_mask=mask_BT)
        hook.remove()
    window = next(iter(linear_windows(model).values()))
    heads, dim = len(window.map_q.weight), window.map_q.weight.shape[1]
    softmax, linear, mixed = (y.unflatten(-1, (heads, dim))[mask_BT > 0] for y in outputs)
    for n in range(heads):
        kept = n // (heads // window.kv_heads) == head
        torch.testing.assert_close(mixed[:, n], (softmax if kept else linear)[:, n], rtol=1e-4, atol=1e-5)
        assert (softmax[:, n] - linear[:, n]).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:The .grad")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler's own
@pytest.mark.parametrize("settings", [{}, {"state": "delta"}, {"state": "gated", "feature_map": "t2r"}, {"cache": 4}])
@pytest.mark.parametrize("compiled", [False, slow(True)])
def test_the_linear_attention_of_softmax_heads_is_not_computed(settings: dict[str, Any], compiled: bool) -> None:
    """Output and gradients are as where a memory has all heads computed; those of unused parameters are zeros."""
    model, ids_BT, heads = tiny_linearized("llama3-8b", window=5, **settings), tokens(40), set[tuple[int, ...]]()
    keep_softmax(model, ["0/1", "1/0"])
    windows = linear_windows(model).values()

    def computed(*, use_cache: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        model.zero_grad()
        heads.clear()
        logits = model(input_ids=ids_BT, use_cache=use_cache).logits
        logits.square().mean().backward()
        return logits, {name: p.grad for name, p in model.named_parameters()}

    for window in windows:
        for module in (window.map_q, window.map_k):
            module.register_forward_hook(lambda module, x, _: heads.add((len(module.weight), x[0].shape[1])))
    expected, gradients = computed(use_cache=True)
    assert heads == {(4, 4), (2, 2)}
    for block in model.model.layers if compiled else ():
        block.compile(fullgraph="cache" not in settings, backend="aot_eager")  # an exact cache is scanned outside
    found, ours = computed(use_cache=False)
    assert heads == {(2, 2), (1, 1)}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)
    for window, kept in zip(windows, (1, 0), strict=True):
        halves = [parameter.grad.chunk(2) for parameter in window.parameters() if parameter.grad is not None]
        assert len(halves) == len([*window.parameters()])
        assert not any(both[kept].any() for both in halves)
        assert any(both[1 - kept].any() for both in halves)


def test_a_layer_that_keeps_all_its_heads_is_as_before() -> None:
    model = tiny_linearized("llama3-8b", keep_softmax=["1/1", "0/1", "1/0"])
    assert kept_softmax(model) == ["0/1", 1]
    assert softmax_units(model, heads=True) == ["0/0", "0/1"]
    (window,) = linear_windows(model).values()
    assert window.softmax_heads == (1,)
    assert [len(x) for x in window.of_heads([0]).parameters()] == [
        2,
        2,
        1,
    ]  # mix and W of two query heads, W of a KV head


def test_the_layer_that_looks_back_is_chosen() -> None:
    """Of a model that copies, the first layer looks one token back, and the second wherever a token was.

    Of linear attention the window alone, as if the maps had learned nothing.
    """
    tokenizer, dataset = load_tokenizer("bytes"), open_dataset(prepared())
    model = copying_model(272)
    linearize_attention(model, LinearizeConfig(window=16))
    probe = probe_of(dataset, tokenizer, Pattern(16), seq_len=96, seed=0)
    with using(model, branch="window"):
        chosen, trials = choose(range(2), 1, Divergence(model, probe, 8))
    assert chosen == [1]
    none, first, second = trials
    assert second.divergence < 0.01 * first.divergence
    assert first.divergence == pytest.approx(none.divergence, rel=0.01)


# ------------------------------------------------------------------------------------------------------------ runs


def test_a_run_chooses_after_the_transfer_and_keeps_the_table() -> None:
    run = chosen_run()
    record = record_of(run)
    assert record["step"] == 12
    trials = record["trials"]
    assert [trial["kept"] for trial in trials[:5]] == [[], [0], [1], [2], [3]]
    assert len(trials) == 1 + LAYERS + 3
    least = min(trials, key=lambda trial: trial["divergence"])
    (found,) = [trial for trial in trials if trial["kept"] == record["kept"]]
    assert 0 <= least["divergence"] <= found["divergence"] <= least["divergence"] + 1e-12  # of predictions in float32
    assert found["divergence"] < 1e-3 * trials[0]["divergence"]
    assert min(trials[1:5], key=lambda trial: trial["divergence"])["kept"][0] in record["kept"]
    printed = (run.parent / f"{run.name}.err").read_text()
    assert "keep_softmax=auto:2: divergence from the softmax model where it must recall" in printed
    assert [line for line in printed.splitlines() if line.endswith("  kept")]
    transfer, last = (store.at(run, step).manifest for step in (8, 16))
    assert KEPT not in transfer
    assert last[KEPT] == record["kept"]
    assert len(linear_windows(load_model(run).model)) == 2
    assert kept_softmax(load_model(run).model) == record["kept"]
    assert len(linear_windows(load_model(run, checkpoint=store.at(run, 8)).model)) == LAYERS
    assert slope("check", run).code == 0


@pytest.mark.parametrize(
    "more",
    [
        ("auto:2",),
        slow(("auto:2", "linearize.adjust_maps=true")),
        slow(("auto:2", "distill.share=0.5")),
        slow(("heads:6", "linearize.adjust_maps=true")),
    ],
)
@pytest.mark.parametrize("step", [8, slow(12)])
def test_a_run_resumes_bit_for_bit_across_the_choice(more: tuple[str, ...], step: int, tmp_path: Path) -> None:
    whole = chosen_run(*more)
    run = copied(whole, tmp_path)
    for folder in store.folders(run):
        if store.step_of(folder) > step:
            shutil.rmtree(folder)
    resumed = slope("linearize", base(), *words(*more), "--out", run)
    assert resumed.code == 0, resumed.err
    assert ("where it must recall" in resumed.err) == (step == 8)
    assert_same_run(run_folder.open_config(run), run, whole)


def test_a_run_chooses_heads() -> None:
    run = chosen_run("heads:3")
    record, every = record_of(run), [f"{layer}/{head}" for layer in range(LAYERS) for head in range(2)]
    assert [trial["kept"] for trial in record["trials"][:9]] == [[], *([head] for head in every)]
    assert len(record["trials"]) == 1 + len(every) + 3 + 3
    assert len(record["kept"]) == 3
    assert record["kept"] == [head for head in every if head in record["kept"]]
    assert "by the KV heads with softmax" in (run.parent / f"{run.name}.err").read_text()
    model = load_model(run).model
    whole = {layer for layer in range(LAYERS) if {f"{layer}/0", f"{layer}/1"} <= {*record["kept"]}}
    assert {entry for entry in kept_softmax(model) if isinstance(entry, int)} == whole
    assert slope("check", run).code == 0


@pytest.mark.parametrize("chosen", ["auto:2", "heads:3"])
def test_export_generate_and_eval_have_what_was_chosen(chosen: str, tmp_path: Path) -> None:
    run = chosen_run(chosen)
    kept, folder = kept_softmax(load_model(run).model), tmp_path / "export"
    assert slope("export", run, folder).code == 0
    assert json.loads((folder / "linearize" / "settings.json").read_text())["keep_softmax"] == kept
    assert kept_softmax(load_model(folder).model) == kept
    one, other = (slope("generate", place, "The ", "--temperature", "0", "--tokens", "8") for place in (run, folder))
    assert one.code == other.code == 0
    assert one.out == other.out
    found = [
        slope(
            "eval",
            place,
            "--no-perplexity",
            "--tasks",
            "mqar",
            "--limit",
            "4",
            "--seq-len",
            "48",
            "--json",
            "--data",
            prepared(),
        )
        for place in (run, folder)
    ]
    rows = [json.loads(each.out)["recall"]["rows"] for each in found]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kept", [[1], ["1/0"], ["0/1", "1/0", "1/1"]], ids=str)
def test_the_engine_has_the_memory_that_is_counted(kept: list[int | str]) -> None:
    model = tiny_linearized("llama3-8b", window=5, keep_softmax=kept)
    memory = attention_memory(model)
    caches = Engine(model, dtype=torch.bfloat16).decoder.caches(1, 60)
    found = sum(tensor.nbytes for cache in caches for tensor in cache.tensors())
    assert found == memory.state_bytes + 60 * memory.kept_bytes_per_token


def test_a_dry_run_counts_what_stays() -> None:
    rows = [slope("linearize", base(), *words(x), "--dry-run").out for x in ("heads:2", "auto:1")]  # a layer has 2
    stay = [next(line for line in out.splitlines() if "where softmax stays" in line) for out in rows]
    assert stay[0] == stay[1]
    done = slope("linearize", base(), *words(), "--dry-run")
    assert done.code == 0, done.err
    assert f"in 2 of {LAYERS} layers" in done.out
    assert "keep_softmax: auto:2" in done.out
    saved = scratch() / "dry.yaml"
    saved.write_text(done.out)
    assert configs.load(str(saved)).linearize.keep_softmax == "auto:2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["auto:0"], "linearize.keep_softmax=auto:0: list different layers, from 0, as [0, 3], and KV heads of others"),
        (["heads:0"], "linearize.keep_softmax=heads:0: list different layers"),
        (["heads:"], "linearize.keep_softmax.heads=null: must be a list, or text"),
        (["[0/1,0/1]"], "linearize.keep_softmax=['0/1', '0/1']: list different layers"),
        (["[0/1,0]"], "linearize.keep_softmax=['0/1', 0]: list different layers"),
        (["[0/01]"], "linearize.keep_softmax=['0/01']: list different layers"),
        (["heads:8"], "linearize.keep_softmax=heads:8: the model has 8 KV heads; choose fewer of them"),
        (["[4/0]"], "linearize.keep_softmax=['4/0']: there is no layer 4; the model's are 0 to 3"),
        (["[1/2]"], "linearize.keep_softmax=['1/2']: there is no KV head 2; a layer's are 0 to 1"),
        (["auto:"], "linearize.keep_softmax.auto=null: must be a list, or text"),
        (["auto"], "linearize.keep_softmax=auto: list different layers"),
        (["2"], "linearize.keep_softmax=2: list different layers"),
        (["null"], "linearize.keep_softmax=None: list different layers"),
        (["[1, 1]"], "linearize.keep_softmax=[1, 1]: list different layers"),
        (["[-1]"], "linearize.keep_softmax=[-1]: list different layers"),
        (["[a]"], "linearize.keep_softmax=['a']: list different layers"),
        (["auto:4"], "linearize.keep_softmax=auto:4: the model has 4 layers; choose fewer of them"),
        (["[4]"], "linearize.keep_softmax=[4]: there is no layer 4; the model's are 0 to 3"),
        (["[0,1,2,3/0,3/1]"], "linearize.keep_softmax=[0, 1, 2, '3/0', '3/1']: names all 4 layers"),
        (["auto:1", "linearize.transfer=1"], "linearize.keep_softmax=auto:1: chooses after the transfer"),
        (["auto:1", "linearize.transfer=0"], "linearize.keep_softmax=auto:1: chooses after the transfer"),
        (["auto:1", "adapters.rank=0"], "linearize.keep_softmax=auto:1: chooses after the transfer"),
    ],
)
def test_wrong_choices_are_one_line(given: list[str], message: str, tmp_path: Path) -> None:
    value, *more = given
    done = slope("linearize", base(), *words(value, *more), "--out", tmp_path / "run")
    assert done.code == 2, done.err
    line = done.err.strip().splitlines()[-1]
    assert line.startswith(f"error: {message}"), line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_two_sided_model_has_no_choice(tmp_path: Path) -> None:
    bert = trained("bert-base", "method=dense")
    done = slope("linearize", bert, *words("auto:1"), "--out", tmp_path / "run")
    assert (done.code, "is chosen for causal models alone; list the layers" in done.err) == (2, True)


def test_all_of_a_mixed_model_can_be_switched_to_softmax() -> None:
    """The teacher is what the model was, whichever layers have softmax by now."""
    model, ids = tiny_linearized("llama3-8b", window=5), torch.arange(3, 43)[None]
    restore_attention(model, [0])
    with torch.no_grad(), using(model, mode="softmax"):
        assert torch.equal(model(input_ids=ids).logits, tiny_model("llama3-8b")(input_ids=ids).logits)
