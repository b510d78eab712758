"""`slope config` and docs/config.md explain every key of the schema, and are what the schema says."""

import re
import shlex
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from support.runs import slope

from slope_cli.config import configs, reference
from slope_cli.config.schema import AUTO, METHODS, Config
from slope_cli.errors import UsageError

PAGE = Path(__file__).parent.parent / "docs" / "config.md"
KEYS = {key.name: key for _, keys in reference.sections().values() for key in keys}


def known_keys() -> Iterator[str]:
    """Every key of the schema, with `model.overrides` and the like as one."""
    tree = OmegaConf.to_container(OmegaConf.structured(Config))
    for section, keys in tree.items():  # type: ignore[union-attr]
        yield from [f"{section}.{key}" for key in keys] if isinstance(keys, dict) else [str(section)]


def test_every_key_has_a_meaning_a_type_in_words_and_a_default_in_yaml() -> None:
    assert set(KEYS) == set(known_keys())
    for key in KEYS.values():
        assert re.fullmatch(r".{10,}\.", key.meaning), key
        assert not re.search(r"[|\[\]]|\b(str|int|bool|float|None|dict)\b", key.type), key
        yaml.safe_load(key.default.partition(" (")[0])


@pytest.mark.parametrize("name", KEYS)
def test_an_example_sets_its_key_to_another_value(name: str, tmp_path: Path) -> None:
    (word,) = shlex.split(KEYS[name].example)
    method = name.partition(".")[0]
    needs = [f"method={method}", "linearize.window=32"] if method == "linearize" else [f"method={method}"]
    needs = needs if method in METHODS else []
    needs += ["model.init=runs/first"] * (name in ("model.init_optimizer", "distill.share"))
    recipe = tmp_path / "small.yaml"
    recipe.write_text("train: {tokens_per_step: 1024, micro_batch: 8, seq_len: 128}\n")

    def value(*words: str) -> object:
        return attrgetter(name)(configs.load(str(recipe), [*needs, *words]))

    assert value(word) != (64 if name == "linearize.window" else value())


def test_every_choice_and_no_other_word_is_taken() -> None:
    for name, key in KEYS.items():
        if key.facts.choices and name not in ("method", "linearize.feature_map", "linearize.kind"):
            method = name.partition(".")[0]
            of_method = [f"method={method}"] if method in METHODS else []
            for choice in key.facts.choices:
                configs.load("gpt2-nano", [*of_method, f"{name}={choice}"])
            rule = re.escape(f"{name}=other: choose one of {', '.join(key.facts.choices)}")
            with pytest.raises(UsageError, match=rf"^{rule}$"):
                configs.load("gpt2-nano", [*of_method, f"{name}=other"])


def test_a_key_has_a_unit_or_choices_if_it_is_a_number() -> None:
    for key in KEYS.values():
        if "number" in key.type and key.name != "train.seed":
            assert key.facts.unit, key.name
        assert not (key.facts.unit and key.facts.choices)


def test_every_section_has_a_line() -> None:
    for name, (text, keys) in reference.sections().items():
        assert keys
        assert text.endswith(".") if name else keys[0].name == "method"


def test_defaults_are_those_of_the_schema_and_name_the_methods_with_others() -> None:
    for name, key in KEYS.items():
        if " (" not in key.default and name != "sparsity.mask":
            assert yaml.safe_load(key.default) == _plain(configs.defaults().get(name, {}))
    assert {name: key.default for name, key in KEYS.items() if " (" in key.default} == {
        "sparsity.target_modules": "[] (fst: [mlp], s_ste: [mlp])",
        "sparsity.mask": "magnitude (wanda: wanda)",
        "train.cuda_graph": "auto (linearize: false)",
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_what_auto_stands_for_is_said() -> None:
    for name, meaning in AUTO.items():
        assert KEYS[name].default.startswith("auto")
        assert KEYS[name].meaning.endswith(f". auto: {meaning}.")
    assert {name for name, key in KEYS.items() if key.default.startswith("auto")} == set(AUTO)


def test_without_a_word_all_methods_and_sections_are_named() -> None:
    code, out, err = slope("config")
    assert (code, err) == (0, "")
    for name in (*METHODS, *(name for name in reference.sections() if name)):
        assert re.search(rf"^  {name} +\S", out, flags=re.MULTILINE)


def test_a_section_is_explained_with_all_its_keys() -> None:
    code, out, err = slope("config", "optim")
    assert (code, err) == (0, "")
    assert out.startswith(
        "The optimizer and the learning rate.\n\noptim.name: text; default adamw\n    The optimizer: "
    )
    entries = out.split("\n\n")[1:]
    assert [entry.partition(":")[0] for entry in entries] == [name for name in KEYS if name.startswith("optim.")]
    for entry in entries:
        key = KEYS[entry.partition(":")[0]]
        about = [f"choices: {', '.join(key.facts.choices)}"] * bool(key.facts.choices)
        about += [f"unit: {key.facts.unit}"] * bool(key.facts.unit)
        texts = (f"{key.name}: {key.type}; default {key.default}", key.meaning, *about, f"example: {key.example}")
        assert " ".join(entry.split()) == " ".join(texts)


def test_a_key_is_explained() -> None:
    lines = slope("config", "optim.lr").out.splitlines()
    assert lines[0] == "optim.lr: number; default 0.0006"
    assert lines[-2:] == ["    unit: a factor, times the update", "    example: optim.lr=1e-3"]
    assert slope("config", "optim.schedule").out.splitlines()[-2:] == [
        "    choices: cosine, linear, polynomial, constant, wsd",
        "    example: optim.schedule=linear",
    ]
    share = "    unit: below 1 a share of "
    assert slope("config", "optim.warmup").out.splitlines()[-2] == f"{share}the run, else steps"
    assert slope("config", "adapters.warmup").out.splitlines()[-2] == f"{share}the adapters' steps, else steps"
    assert slope("config", "adapters.rank").out.splitlines()[-2] == f"{share}each layer's smaller side, else the rank"
    assert slope("config", "sparsity.mask").out.startswith(
        "sparsity.mask: text or null; default magnitude (wanda: wanda)\n    How the first mask"
    )
    out = slope("config", "method").out
    assert out.startswith("method: text; default slope\n")
    assert all(f" {name} {meaning}" in " ".join(out.split()) for name, meaning in METHODS.items())


def test_several_keys_sections_and_patterns_are_explained_in_their_order() -> None:
    def names(*words: str) -> list[str]:
        return re.findall(r"^(\w+\.\w+): ", slope("config", *words).out, flags=re.MULTILINE)

    assert names("train.seed", "optim.lr") == ["train.seed", "optim.lr"]
    assert names("*.lr") == ["adapters.lr", "optim.lr"]
    assert names("sr_ste.*", "optim.eps") == ["sr_ste.mask_update_interval", "sr_ste.decay", "optim.eps"]
    assert names("sr_ste", "optim.eps") == names("sr_ste.*", "optim.eps")
    code, out, err = slope("config", "optim.lr", "*.zzz")
    assert (code, out) == (2, "")
    assert err.startswith("error: *.zzz: unknown key; ")


@pytest.mark.parametrize(("columns", "used"), [(None, 80), (60, 60), (80, 80), (200, 100)])
def test_lines_are_as_wide_as_the_terminal_and_words_stay_whole(
    columns: int | None, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    lines = reference.explain(["*"])
    assert max(map(len, lines)) in range(used - 3, used + 1)
    assert "    example: 'sparsity.pattern_overrides={12-23: [2, 8]}'" in lines


@pytest.mark.parametrize("query", ["adapters.rank", "*.mask_update_interval", "log.norms_every", "distributed.gather"])
def test_what_numbers_and_choices_mean_is_said_for_each(query: str) -> None:
    """A share below 1 and a count, what 0 is, and each choice."""
    for key in (key for key in KEYS.values() if re.fullmatch(query.replace("*", r"\w+"), key.name)):
        assert "0 is no adapters" in key.meaning if key.name == "adapters.rank" else True
        assert re.search(r"\b0 (is )?(never|no )", key.meaning) or key.facts.choices
        assert all(f"{choice}: " in key.meaning for choice in key.facts.choices)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("optim.lrr", "did you mean optim.lr?"),
        ("opitm", "did you mean optim?"),
        ("lr", "did you mean optim.lr or adapters.lr?"),
        ("window", "did you mean linearize.window?"),
        ("train.step", "did you mean train.steps?"),
        ("log.zzz", "known are log.every, log.norms_every, "),
        ("zzz", "known are method, model, data, "),
        ("zzz.y", "known are method, model, data, "),
    ],
)
def test_an_unknown_key_is_answered_with_a_hint(word: str, hint: str) -> None:
    code, out, err = slope("config", word)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {word}: unknown key; {hint}")
    with pytest.raises(UsageError):
        reference.explain([word])


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == reference.markdown(), f"run python -m slope_cli.config.reference > {PAGE}"


def test_the_page_has_a_row_of_six_cells_for_every_key() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", reference.markdown(), flags=re.MULTILINE)
    assert [name for name, _ in rows] == [*METHODS, *(name for name in KEYS if name != "method")]
    for name, cells in rows:
        assert len(re.split(r"(?<!\\)\|", cells)) == (1 if name in METHODS else 5)
