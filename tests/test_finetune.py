"""slope finetune: what must be learnt is learnt, masks stay, files are read as written, faults are one line."""

import itertools
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.data import wordpiece
from support.runs import trained

from slope_cli.checkpoint.load import load_model
from slope_cli.data.batches import MaskingIds
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.errors import SlopeError, UsageError
from slope_cli.finetune import examples, glue, loop, squad, train
from slope_cli.finetune.loop import Settings
from slope_cli.finetune.train import TASKS
from slope_cli.inference.export import export
from slope_cli.report import metrics
from sparse_kernels import masked_layers, sparse_layers

LETTERS = "abcdefghijklm"
MARKER = "zz"
SPECIAL = MaskingIds(cls=2, sep=3, mask=4, pad=0, vocab_size=64, never_mask=(0, 1, 2, 3, 4))
QUICK: dict[str, Any] = {"lr": 4e-3, "batch": 16, "seq_len": 32}

# Time says little where other work shares the cores, and first calls import much.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ------------------------------------------------------------------------------------------- made-up tasks


def words(rng: random.Random, count: int, markers: int = 0) -> str:
    """Words of two letters, so many of which are the marker."""
    chosen = ["".join(rng.choices(LETTERS, k=2)) for _ in range(count - markers)] + [MARKER] * markers
    rng.shuffle(chosen)
    return " ".join(chosen)


def tsv(task: str, rng: random.Random, count: int) -> str:
    """A file as GLUE's own, in which the marker (in the last sentence) decides."""
    lines = []
    for index in range(count):
        mark = rng.randrange(2)
        one, two = words(rng, 5), words(rng, 5, mark)
        lines.append(
            {
                "CoLA": f"gj04\t{mark}\t{'' if mark else '*'}\t{two}",
                "SST-2": f"{two} \t{mark}",
                "MRPC": f'{mark}\t70{index}\t71{index}\t" {one}\t{two} "said',
                "RTE": f"{index}\t{one}\t{two}\t{'not_entailment' if mark else 'entailment'}",
                "STS-B": f"{index}\tnews\tx\t2012\t1\tnone\tnone\t{one}\t{two}\t{5.0 * mark:.3f}",
            }[task]
        )
    columns = next(each for each in glue.TASKS if each.name == task).columns
    header = "" if task == "CoLA" else "\t".join(columns) + "\n"
    return ("\ufeff" if task == "MRPC" else "") + header + "\n".join(lines) + "\n"


def squad_json(rng: random.Random, count: int, length: int = 12) -> str:
    """Files as SQuAD's own, in which the marker is always the answer."""
    paragraphs = []
    for number in range(count):
        context = words(rng, length, 1)
        answer = {"text": MARKER, "answer_start": context.index(MARKER)}
        question = {"id": f"q{number}", "question": "what is it?", "answers": [answer]}
        paragraphs.append({"context": context, "qas": [question]})
    return json.dumps({"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task's files, 160 rows to train on and 48 others."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in glue.TASKS:
        (folder / task.name).mkdir()
        for split, seed, count in (("train", 0, 160), ("dev", 1, 48)):
            (folder / task.name / f"{split}.tsv").write_text(tsv(task.name, random.Random(seed), count))
    for split, seed, count in (("train", 0, 160), ("dev", 1, 24)):
        (folder / f"{split}-v1.1.json").write_text(squad_json(random.Random(seed), count))
    return folder


def bert() -> Path:
    """A sparse run with adapters."""
    return trained("bert-base")


def but_for_the_clock(result: dict[str, Any]) -> dict[str, Any]:
    return result | {"seconds": 0, "versions": result["versions"] | {"date": ""}}


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in metrics.read(out) if record["kind"] == "train"]


# ------------------------------------------------------------------------------------------- what is learnt


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_marker_word_is_learnt(task: str, data: Path, tmp_path: Path) -> None:
    """All kinds of tasks on rows that were not trained on; at chance they would be 0, 0.5, 0.0."""
    out = tmp_path / "out"
    result = train.finetune(bert(), task.lower(), data=data, out=out, epochs=12, **QUICK)
    for name, value in result["metric"].items():
        assert value > 0.8, name
    before, after = np.mean(losses(out)[:5]), np.mean(losses(out)[-5:])
    assert after < before / 2
    assert result["train_loss"] < before / 2
    assert result["sparse_layers"] == len(list(sparse_layers(load_model(bert()).model.bert))) - (task == "SQuAD")
    assert result == json.loads((out / "result.json").read_text())
    assert (result["n_train"], result["n"]) == (160, 24 if task == "SQuAD" else 48)
    assert len((out / "predictions.jsonl").read_text().splitlines()) == result["n"]
    assert str(tmp_path) not in (out / "result.json").read_text()
    steps, rows = (240, 24) if task == "SQuAD" else (120, 48)
    counted = f"({steps} steps) of 160 training rows, evaluated on {rows} dev rows:"
    assert train.report_lines(result)[0] == f"{task} after 12 epochs {counted}"


def test_a_dense_run_learns_too(data: Path, tmp_path: Path) -> None:
    result = train.finetune(trained("bert-base", "method=dense"), "SST-2", data=data, out=tmp_path, epochs=12, **QUICK)
    assert result["metric"]["accuracy"] > 0.8
    assert result["sparse_layers"] == 0


def test_masks_stay_and_values_and_adapters_are_trained(data: Path, tmp_path: Path) -> None:
    found = load_model(bert())
    encoder = found.model.bert
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    s = Settings("SST-2", 1, 1e-3, 16, 32, 1)
    task = TASKS["SST-2"]
    made = task.examples(train.load_rows(task, data)[0]["train"], found.tokenizer, s.seq_len)
    model = train.build(found.model, task, s.seed)
    assert model.bert is encoder
    train._train(model, made, s, 0, tmp_path)
    after = encoder.state_dict()
    masks = [name for name in before if name.endswith("_mask_bits")]
    assert len(masks) == 2 * len(list(sparse_layers(encoder)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed & set(masks)
    for name, layer in sparse_layers(encoder):
        layer.validate()
        assert {f"{name}.values", f"{name}.adapter.lora_A", f"{name}.adapter.lora_B"} <= changed


@pytest.mark.parametrize("words", [("method=fst", "fst.dense_finish=0"), ("method=s_ste",)])
def test_fst_and_s_ste_are_fine_tuned_with_fixed_masks_and_exact_gradients(
    words: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    """In pretraining they prune gradients at random (mvue) and train pruned weights, too."""
    run, s, task = (
        trained("bert-base", *words),
        Settings("RTE", 1, 1e-3, 16, 32, 1),
        TASKS["RTE"],
    )
    results = []
    for name in ("as it comes", "exact"):
        found = load_model(run)
        layers = dict(masked_layers(found.model))
        assert layers
        assert all(layer.mvue for layer in layers.values())
        for layer in layers.values():
            layer.mvue = name == "as it comes"
        before = {key: layer.mask.clone() for key, layer in layers.items()}
        made = task.examples(train.load_rows(task, data)[0]["train"], found.tokenizer, s.seq_len)
        (tmp_path / name).mkdir()
        results.append(train._train(train.build(found.model, task, s.seed), made, s, 0, tmp_path / name))
        assert all(torch.equal(layer.mask, before[key]) for key, layer in layers.items())
    assert results[0] == results[1]


def test_the_same_seed_gives_the_same_numbers(data: Path, tmp_path: Path) -> None:
    one, two = (train.finetune(bert(), "RTE", data=data, out=tmp_path / name, epochs=1, **QUICK) for name in "ab")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert min(one["seconds"], two["seconds"]) >= 0
    assert but_for_the_clock(one) == but_for_the_clock(two)
    train.finetune(bert(), "RTE", data=data, out=tmp_path / "c", epochs=1, seed=2, **QUICK)
    assert losses(tmp_path / "c") != losses(tmp_path / "a")


def test_padding_changes_nothing(data: Path) -> None:
    """On a GPU all inputs are padded to --seq-len, on a CPU to the longest of the batch."""
    for task in (TASKS["MRPC"], TASKS["SQuAD"]):
        found = load_model(bert())
        made = task.examples(train.load_rows(task, data)[0]["dev"], found.tokenizer, 48)[:8]
        model = train.build(found.model, task, 1).eval()
        results = []
        for length in (None, 64):
            batch = examples.collate(made, 0, length)
            inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
            targets = torch.tensor([example.targets for example in made])
            with torch.no_grad():
                results.append(train.loss_of(train._logits(model, inputs), targets))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, np.log(3.0)]])
    expected = (np.log(2) + np.log(4 / 3)) / 2
    assert train.loss_of(logits, torch.tensor([[0.0], [1.0]])).item() == pytest.approx(expected)
    scores = torch.tensor([[1.0], [4.0]])
    assert train.loss_of(scores, torch.tensor([[3.0], [3.0]])).item() == pytest.approx((4 + 1) / 2)
    spans = torch.zeros(1, 2, 8)
    assert train.loss_of(spans, torch.tensor([[3.0, 5.0]])).item() == pytest.approx(np.log(8))


@unhurried
@given(count=st.integers(1, 40), epochs=st.integers(1, 3), batch=st.integers(1, 50))
def test_every_row_is_seen_once_an_epoch(count: int, epochs: int, batch: int) -> None:
    batches = list(loop.step_indices(count, Settings("RTE", epochs, 1e-5, batch, 128, 3)))
    rows = np.concatenate(batches)
    assert all(sorted(rows[e * count : (e + 1) * count]) == list(range(count)) for e in range(epochs))
    assert {len(part) for part in batches[:-1]} <= {batch}


# ------------------------------------------------------------------------------------------- the folder


def test_a_finished_one_is_returned_and_another_refused(data: Path, tmp_path: Path) -> None:
    def again(**changes: Any) -> dict[str, Any]:
        settings = {"data": data, "out": tmp_path / "out", "epochs": 1, **QUICK}
        return train.finetune(bert(), "SST-2", **(settings | changes))

    first = again()
    written = (tmp_path / "out" / "metrics.jsonl").stat().st_mtime_ns
    assert again() == first
    assert (tmp_path / "out" / "metrics.jsonl").stat().st_mtime_ns == written
    with pytest.raises(UsageError, match=r"another fine-tuning \(settings.lr: 0.004 -> 0.001\)"):
        again(lr=1e-3)
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "dev"):
        (other / f"{split}.tsv").write_text(tsv("SST-2", random.Random(9), 8))
    with pytest.raises(UsageError, match=r"data\.train"):
        again(data=other)
    (tmp_path / "out" / "result.json").write_text("{")
    with pytest.raises(SlopeError, match="damaged"):
        again()
    # An interrupted one: no result, a log that is cut short.
    (tmp_path / "out" / "result.json").unlink()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"ki')
    assert but_for_the_clock(again()) == but_for_the_clock(first)
    assert len(losses(tmp_path / "out")) == first["steps"]


def test_a_loss_that_is_not_finite_leaves_no_result(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SlopeError, match="not finite; lower --lr"):
        train.finetune(bert(), "STS-B", data=data, out=tmp_path, epochs=1, **(QUICK | {"lr": 1e25}))
    assert not (tmp_path / "result.json").exists()


def test_the_default_folder_is_inside_the_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "exported"
    export(bert(), run)
    train.finetune(run, "sst2", data=data, epochs=1, seed=4, **QUICK)
    assert (run / "finetune" / "SST-2-4" / "result.json").is_file()


def test_another_folder_is_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds no fine-tuning .*thesis\.tex"):
        train.finetune(bert(), "SST-2", data=data, out=tmp_path, **QUICK)


# ------------------------------------------------------------------------------------------- what is fine-tuned


def test_an_export_is_the_run_again(tmp_path: Path) -> None:
    """Layers with N:M zeros are sparse again, with their masks, and the adapters are there."""
    export(bert(), tmp_path / "out")
    run, exported = load_model(bert()), load_model(tmp_path / "out")
    ours, theirs = dict(sparse_layers(run.model)), dict(sparse_layers(exported.model))
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        assert torch.equal(layer.row_mask(), theirs[name].row_mask())
        adapters = layer.adapter, theirs[name].adapter
        assert None not in adapters
        torch.testing.assert_close(*(adapter.delta() for adapter in adapters if adapter is not None))
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        logits = [x.model(input_ids=ids).prediction_logits for x in (run, exported)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert exported.step is None
    assert run.step == 6


def test_merged_and_dense_exports_stay_dense(tmp_path: Path) -> None:
    export(bert(), tmp_path / "merged", merge=True)
    export(trained("bert-base", "method=dense"), tmp_path / "dense")
    for name in ("merged", "dense"):
        assert not list(sparse_layers(load_model(tmp_path / name).model))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (2, 8), (4, 8)])
def test_patterns_are_found(n: int, m: int) -> None:
    from sparse_kernels.convert import pattern
    from sparse_kernels.masks import nm_mask

    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    assert pattern(weight) is None
    assert pattern(weight * nm_mask(weight.abs(), n, m)) == (n, m)
    assert pattern(torch.zeros(32, 64)) is None


def test_a_head_of_the_seed() -> None:
    heads = [train.build(load_model(bert()).model, TASKS["RTE"], seed).classifier for seed in (1, 1, 2)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert train.build(load_model(bert()).model, TASKS["SQuAD"], 1).bert.pooler is None


# ------------------------------------------------------------------------------------------- faults in one line


def _write(folder: Path, name: str, text: str | bytes) -> None:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


TSV_FAULTS: dict[str, tuple[str, str | bytes, str]] = {
    "no column": ("SST-2", "text\tlabel\na b\t1\n", r"dev\.tsv:1: no column 'sentence'"),
    "missing fields": ("SST-2", "sentence\tlabel\na b\t1\n\nc d\n", r"dev\.tsv:4: 1 fields, expected 2"),
    "too many fields": ("CoLA", "x\t1\t\ta b\tc\n", r"dev\.tsv:1: 5 fields, expected 4"),
    "unknown label": (
        "SST-2",
        "sentence\tlabel\na b\t2\n",
        r"dev\.tsv:2: unknown label '2'; the labels of SST-2 are 0 and 1",
    ),
    "unknown word": ("RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", r"dev\.tsv:2: .*'maybe'"),
    "no score": ("STS-B", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"dev\.tsv:2: the score 'nan' is not a number"),
    "score too high": ("STS-B", "sentence1\tsentence2\tscore\na\tb\t5.5\n", r"dev\.tsv:2: the score '5.5'"),
    "empty sentence": ("SST-2", "sentence\tlabel\n \t1\n", r"dev\.tsv:2: sentence is empty"),
    "empty": ("CoLA", "", r"dev\.tsv: contains no rows"),
    "only a header": ("SST-2", "sentence\tlabel\n", r"dev\.tsv: contains no rows"),
    "no header": ("SST-2", "", r"dev\.tsv:1: no column"),
    "no text": ("CoLA", b"x\t1\t\t\xff\xfe\n", r"dev\.tsv: not UTF-8"),
}


@pytest.mark.parametrize("fault", TSV_FAULTS)
def test_faults_of_tsv_files(fault: str, data: Path, tmp_path: Path) -> None:
    task, content, message = TSV_FAULTS[fault]
    _write(tmp_path, "train.tsv", (data / task / "train.tsv").read_bytes())
    _write(tmp_path, "dev.tsv", content)
    with pytest.raises(UsageError, match=message) as caught:
        train.finetune(bert(), task, data=tmp_path, out=tmp_path / "out", **QUICK)
    assert "\n" not in str(caught.value)


SQUAD_FAULTS: dict[str, tuple[str, str]] = {
    "no JSON": ('{"data":\n[}', r"dev-v1\.1\.json:2: not JSON"),
    "no data": ("[]", r"dev-v1\.1\.json: no 'data'"),
    "no paragraphs": ('{"data": [{}]}', r"dev-v1\.1\.json: data\[0\]: no 'paragraphs'"),
    "no context": ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', r"data\[0\]\.paragraphs\[0\]: no 'context'"),
    "no answer": (
        '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "1", "question": "b", "answers": []}]}]}]}',
        r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: has no answer",
    ),
    "no start": (
        '{"data": [{"paragraphs": [{"context": "a", "qas": [{"answers": [{"text": "a", "answer_start": null}]}]}]}]}',
        r"qas\[0\]\.answers\[0\]: no 'answer_start'",
    ),
    "empty": ('{"data": []}', r"dev-v1\.1\.json: contains no rows"),
}


@pytest.mark.parametrize("fault", SQUAD_FAULTS)
def test_faults_of_squad_files(fault: str, data: Path, tmp_path: Path) -> None:
    content, message = SQUAD_FAULTS[fault]
    _write(tmp_path, "train-v1.1.json", (data / "train-v1.1.json").read_bytes())
    _write(tmp_path, "dev-v1.1.json", content)
    with pytest.raises(UsageError, match=message):
        train.finetune(bert(), "SQuAD", data=tmp_path, out=tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "MRCP"}, r"unknown task 'MRCP'; did you mean MRPC"),
        ({"task": "translation"}, r"unknown task 'translation'; known are CoLA, SST-2"),
        ({"task": "squadd"}, r"did you mean SQuAD"),
        ({"seq_len": 65}, r"--seq-len 65: the model has only 64 positions"),
        ({"seq_len": 7}, r"--seq-len 7: must be at least 8"),
        ({"epochs": 0}, r"--epochs 0"),
        ({"batch": 0}, r"--batch 0"),
        ({"lr": 0.0}, r"--lr 0.0: must be positive"),
        ({"lr": float("nan")}, r"--lr nan: must be finite"),
        ({"lr": float("inf")}, r"--lr inf: must be finite"),
        ({"seed": -1}, r"--seed -1"),
        (
            {"data": Path("no-such-folder")},
            r"no-such-folder/train\.tsv: cannot be read: No such file or directory; put it back",
        ),
        ({"folder": Path("no-such-run")}, r"no-such-run: is neither a run .*nor a model folder"),
    ],
)
def test_faults_of_the_command(changes: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    given = {"folder": bert(), "task": "SST-2", "data": data, "out": tmp_path / "out", **QUICK, **changes}
    with pytest.raises(UsageError, match=message) as caught:
        train.finetune(given.pop("folder"), given.pop("task"), **given)
    assert "\n" not in str(caught.value)


def test_causal_models_are_refused(data: Path, tmp_path: Path) -> None:
    export(trained(), tmp_path / "exported")
    for folder in (trained(), tmp_path / "exported"):
        with pytest.raises(UsageError, match="contains a gpt2 model; only BERT"):
            train.finetune(folder, "SST-2", data=data, out=tmp_path / "out", **QUICK)


def _as_gpt2_words(folder: Path) -> None:
    """Put a tokenizer without [CLS] and [SEP] there."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))).save_pretrained(folder)


def _with_more_words(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"<{number}>" for number in range(400)])
    tokenizer.save_pretrained(folder)


def _without_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if "layer.1" not in name}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_as_gpt2_words, "needs a tokenizer with cls, sep"),
        (_with_more_words, "its tokenizer has .* ids, and the model a vocabulary of only 272"),
        (_without_weights, r"holds no weights for bert\.encoder\.layer\.1"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("["), "cannot be loaded"),
        (lambda folder: (folder / "adapter" / "adapter_config.json").unlink(), "cannot be loaded"),
    ],
)
def test_damaged_exports(damage: Callable[[Path], Any], message: str, data: Path, tmp_path: Path) -> None:
    export(bert(), tmp_path / "exported")
    damage(tmp_path / "exported")
    with pytest.raises(SlopeError, match=message) as caught:
        train.finetune(tmp_path / "exported", "SST-2", data=data, out=tmp_path / "out", **QUICK)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- rows and pairs


def test_quotation_marks_are_characters(tmp_path: Path) -> None:
    """GLUE's files quote nothing: a mark at the start of a field would else swallow lines."""
    task = next(task for task in glue.TASKS if task.name == "MRPC")
    header = "\t".join(task.columns)
    (tmp_path / "train.tsv").write_text(f'\ufeff{header}\r\n1\t1\t2\t" a b\tc "d"\r\n0\t3\t4\te\t" f\r\n')
    rows = task.read(tmp_path / "train.tsv")
    assert rows == [glue.Row(('" a b', 'c "d"'), 1.0), glue.Row(("e", '" f'), 0.0)]


def test_files_may_lie_in_the_folder_of_the_task_or_be_given_directly(data: Path) -> None:
    task = TASKS["RTE"]
    assert train.load_rows(task, data)[0] == train.load_rows(task, data / "RTE")[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """The records of each split of a data set on the Hub; without any there is no network."""
    records: dict[str, list[dict[str, Any]]] = {}

    def load_dataset(name: str, configuration: str | None, *, split: str) -> list[dict[str, Any]]:
        if not records:
            raise ConnectionError(f"Couldn't reach {name} on the Hub\nmore of it")
        return records[f"{name} {configuration} {split}"]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return records


PAIR = {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}
ASKED = {"id": "7", "title": "t", "context": "a b", "question": "c", "answers": {"text": ["b"], "answer_start": [2]}}


def test_rows_of_the_hub(hub: dict[str, list[dict[str, Any]]]) -> None:
    hub |= {
        f"nyu-mll/glue rte {split}": [PAIR | {"label": label}] for split, label in (("train", 1), ("validation", 0))
    }
    rows, source = train.load_rows(TASKS["RTE"], None)
    assert rows == {"train": [glue.Row(("a", "b"), 1.0)], "dev": [glue.Row(("a", "b"), 0.0)]}
    assert source == {"hub": "nyu-mll/glue rte"}
    hub |= {f"nyu-mll/glue stsb {split}": [PAIR | {"label": 2.5}] for split in ("train", "validation")}
    assert train.load_rows(TASKS["STS-B"], None)[0]["dev"][0].label == 2.5
    hub |= {f"rajpurkar/squad None {split}": [ASKED] for split in ("train", "validation")}
    rows, source = train.load_rows(TASKS["SQuAD"], None)
    assert rows["train"] == rows["dev"] == [squad.Question("7", "c", "a b", ("b",), (2,))]
    assert source == {"hub": "rajpurkar/squad"}


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("MRPC", PAIR | {"label": -1}, "nyu-mll/glue mrpc validation row 2: unknown label -1"),
        ("CoLA", PAIR, "nyu-mll/glue cola validation row 2: no sentence"),
        (
            "SQuAD",
            ASKED | {"answers": {"text": [], "answer_start": []}},
            "rajpurkar/squad validation row 2: has no answer",
        ),
        ("RTE", None, "nyu-mll/glue rte validation: contains no rows"),
    ],
)
def test_faults_of_rows_of_the_hub(
    task: str, record: dict[str, Any] | None, message: str, hub: dict[str, list[dict[str, Any]]]
) -> None:
    sound = ASKED if task == "SQuAD" else PAIR | {"sentence": "a"}
    title = "{} {}".format(*TASKS[task].hub)
    hub |= {f"{title} train": [sound], f"{title} validation": [] if record is None else [sound, record]}
    with pytest.raises(UsageError, match=message):
        train.load_rows(TASKS[task], None)


@pytest.mark.usefixtures("hub")
def test_without_a_network_one_line_says_so() -> None:
    expected = (
        r"^nyu-mll/glue sst2: could not be downloaded from the Hugging Face Hub "
        r"\(Couldn't reach nyu-mll/glue on the Hub\); give the official files with --data$"
    )
    with pytest.raises(UsageError, match=expected):
        train.load_rows(TASKS["SST-2"], None)


@unhurried
@given(st.integers(0, 20), st.integers(0, 20), st.integers(2, 24))
def test_the_longer_text_is_cut(first: int, second: int, room: int) -> None:
    one, two = list(range(first)), list(range(second))
    expected = one[:], two[:]
    while len(expected[0]) + len(expected[1]) > room:
        expected[len(expected[1]) >= len(expected[0])].pop()
    left = examples.cut(one, two, room)
    assert left[1] is not None
    assert (len(left[0]), len(left[1])) == tuple(map(len, expected))
    assert left == expected
    assert examples.cut(one, None, room) == (one[:room], None)


def test_the_two_texts_of_an_input() -> None:
    assert examples.join([7, 8], [9], SPECIAL) == ([2, 7, 8, 3, 9, 3], [0, 0, 0, 0, 1, 1])
    assert examples.join([7], None, SPECIAL) == ([2, 7, 3], [0, 0, 0])
    made = [examples.Example(*examples.join(text, None, SPECIAL), (0.0,)) for text in ([7], [7, 8])]
    batch = examples.collate(made, 0, 5)
    assert batch["input_ids"].tolist() == [[2, 7, 3, 0, 0], [2, 7, 8, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


# ------------------------------------------------------------------------------------------- SQuAD's spans

WORD = st.text(string.ascii_letters + "é.,-(", min_size=1, max_size=6)
SPACE = st.sampled_from([" ", "  ", "\n", "\t"])


@st.composite
def questions(draw: st.DrawFn) -> squad.Question:
    """A context of words, commas and all kinds of space, and a part of it as the answer."""
    parts = draw(st.lists(st.tuples(WORD, SPACE), min_size=1, max_size=60))
    first = draw(st.integers(0, len(parts) - 1))
    last = draw(st.integers(first, min(len(parts) - 1, first + 2)))
    context = "".join(word + space for word, space in parts)
    begin = sum(len(word + space) for word, space in parts[:first])
    answer = "".join(word + space for word, space in parts[first : last + 1])[: -len(parts[last][1])]
    return squad.Question("1", "which words?", context, (answer,), (begin,))


def oracle(found: list[squad.Window]) -> list[np.ndarray]:
    """Logits of a model that knows: 9 at the ends of the answer, in windows that hold it."""
    logits = []
    for window in found:
        both = np.zeros((2, len(window.input_ids) + 3), np.float32)
        for side, position in enumerate(window.targets):
            both[side, int(position)] = 9.0
        logits.append(both)
    return logits


@unhurried
@given(question=questions(), seq_len=st.integers(24, 200))
def test_offsets_give_back_the_answer(question: squad.Question, seq_len: int) -> None:
    tokenizer = load_tokenizer(str(wordpiece()))
    found = squad.SQUAD.examples([question], tokenizer, seq_len)
    assert all(len(window.input_ids) <= seq_len for window in found)
    assert len({span for window in found for span in window.spans}) == len(
        tokenizer.tokenize(question.context)
    )  # no token of the context is in no window
    holding = [window for window in found if window.targets != (0.0, 0.0)]
    for window in holding:
        first, last = (int(position) - window.first for position in window.targets)
        assert question.context[window.spans[first][0] : window.spans[last][1]] == question.answers[0]
        ids = window.input_ids
        assert ids[:1] == [SPECIAL.cls]
        assert ids[window.first - 1] == ids[-1] == SPECIAL.sep
        assert window.token_type_ids == [0] * window.first + [1] * (len(ids) - window.first)
    tokens = squad.token_span(question.starts[0], question.starts[0] + len(question.answers[0]), _spans(question))
    assert tokens is not None
    if holding and tokens[1] - tokens[0] < squad.ANSWER_TOKENS:
        assert squad.best_answers([question], found, oracle(found)) == [question.answers[0]]


def _spans(question: squad.Question) -> list[tuple[int, int]]:
    tokenizer = load_tokenizer(str(wordpiece()))
    encoded = tokenizer(question.context, add_special_tokens=False, return_offsets_mapping=True)
    return [(begin, end) for begin, end in encoded["offset_mapping"]]


def test_windows_of_a_long_context() -> None:
    """128 tokens on each time, as in BERT's own code: 300 letters at 200 a window are windows from 0 and from 128."""
    context = " ".join(random.Random(0).choices(string.ascii_lowercase, k=300))
    question = squad.Question("1", "a b c", context, (context[400:405],), (400,))  # letters 200, 201, 202
    tokenizer = load_tokenizer(str(wordpiece()))
    found = squad.SQUAD.examples([question], tokenizer, 200 + 3 + 3)
    assert [(len(window.spans), window.spans[0][0] // 2) for window in found] == [(200, 0), (172, 128)]
    assert found[0].targets == (0.0, 0.0)
    assert found[1].targets == (5 + 200 - 128, 5 + 202 - 128)
    assert squad.best_answers([question], found, oracle(found)) == [context[400:405]]
    wrong = question._replace(starts=(399,))
    assert squad.SQUAD.trainable([wrong, question]) == [question]
    with pytest.raises(UsageError, match="no training question has its answer"):
        squad.SQUAD.trainable([wrong])


def test_the_best_span_is_in_order_short_and_in_the_context() -> None:
    spans = [(i, i + 1) for i in range(50)]
    window = squad.Window(*examples.join([9] * 2, [9] * 50, SPECIAL), (0.0, 0.0), question=0, first=4, spans=spans)
    starts, ends = np.zeros(60, np.float32), np.zeros(60, np.float32)
    starts[[0, 2, 4 + 10]] = 50, 50, 5  # [CLS] and the question are no answer
    ends[[4 + 3, 4 + 10 + 30, 4 + 10 + 29, 58]] = 7, 9, 4, 50
    assert squad.best_span(window, starts, ends) == (9.0, (10, 40))


@unhurried
@given(length=st.integers(1, 400), room=st.integers(3, 400))
def test_windows_leave_nothing_out_and_overlap(length: int, room: int) -> None:
    parts = list(squad._window_spans(length, room))
    assert parts[0][0] == 0
    assert parts[-1][1] == length
    overlap = min(room // 2, squad.ANSWER_TOKENS)
    for (_, end), (begin, _) in itertools.pairwise(parts):
        assert overlap <= end - begin < room


def test_an_empty_context_has_no_answer() -> None:
    tokenizer = load_tokenizer(str(wordpiece()))
    question = squad.Question("1", "a", " ", ("b",), (0,))
    found = squad.SQUAD.examples([question], tokenizer, 16)
    assert squad.best_answers([question], found, oracle(found)) == [""]


# ------------------------------------------------------------------------------------------- measures


def test_official_normalisation() -> None:
    assert squad.normalise("The  Cat's, an A-Team!") == "cats ateam"
    assert squad.exact_match("the Cat.", ["dog", "cat"]) == 1
    assert squad.f1("a big black cat", ["black cat", "cat"]) == pytest.approx(0.8)
    assert squad.f1("dog", ["cat"]) == 0
    rows = [squad.Question(str(i), "", "cat, big black cat", ("cat", "black cat"), (0, 9)) for i in range(2)]
    ends = ((0, 0), (1, 3))  # cat; big black cat
    spans = [(0, 3), (5, 8), (9, 14), (15, 18)]
    windows = [squad.Window([], [], (0.0, 0.0), index, 2, spans) for index in range(2)]
    logits = [np.stack([np.eye(6, dtype=np.float32)[2 + end] for end in pair]) for pair in ends]
    scores, lines = squad.SQUAD.evaluate(rows, windows, logits)
    assert scores["metric"] == {"exact_match": 0.5, "f1": pytest.approx(0.9)}
    assert scores["stderr"]["exact_match"] == pytest.approx(0.5)
    assert lines[1] == {"id": "1", "prediction": "big black cat", "exact_match": 0.0, "f1": pytest.approx(0.8)}


def test_measures_by_hand() -> None:
    predicted, labels = np.array([1.0, 1, 0, 0, 1]), np.array([1.0, 0, 0, 1, 1])
    assert glue.accuracy(predicted, labels) == pytest.approx(0.6)
    assert glue.f1(predicted, labels) == pytest.approx(2 / 3)
    assert glue.matthews(predicted, labels) == pytest.approx((2 * 1 - 1 * 1) / 6)
    assert glue.matthews(np.ones(5), labels) == 0
    assert glue.f1(np.zeros(5), np.zeros(5)) == 0
    assert glue.pearson(np.ones(5), labels) is None
    assert glue.pearson(np.array([1.0, 2, 3]), np.array([2.0, 4, 6])) == pytest.approx(1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert glue.spearman(np.array([1.0, 5, 5, 9]), np.array([0.0, 1, 2, 3])) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    tasks = {task.name: task for task in glue.TASKS}
    scores = tasks["MRPC"].scores(predicted, labels)
    assert scores["metric"] == {"accuracy": pytest.approx(0.6), "f1": pytest.approx(2 / 3)}
    assert scores["majority"] == pytest.approx(0.6)
    assert scores["stderr"] == {"accuracy": pytest.approx(np.sqrt(0.6 * 0.4 / 4))}
    assert train.report_lines(
        {
            "settings": {"task": "STS-B", "epochs": 1},
            "steps": 2,
            "n_train": 3,
            "left_out": 0,
            "n": 5,
            **tasks["STS-B"].scores(np.ones(5), labels),
        }
    )[1:] == [f"  {name}: undefined, all predictions or labels are equal" for name in ("pearson", "spearman")]


@unhurried
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 5)), min_size=3, max_size=30))
def test_measures_equal_those_of_scikit_learn_and_scipy(rows: list[tuple[int, int, int]]) -> None:
    sklearn, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    predicted, labels, scores = (np.array(column, float) for column in zip(*rows, strict=True))
    if np.ptp(predicted) and np.ptp(labels):  # it warns otherwise
        assert glue.matthews(predicted, labels) == pytest.approx(sklearn.matthews_corrcoef(labels, predicted))
        assert glue.f1(predicted, labels) == pytest.approx(sklearn.f1_score(labels, predicted))
    others = np.arange(len(scores)) ** 2.0
    if np.ptp(scores):
        assert glue.spearman(scores, others) == pytest.approx(stats.spearmanr(scores, others)[0])
        assert glue.pearson(scores, others) == pytest.approx(stats.pearsonr(scores, others)[0])
