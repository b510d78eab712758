"""Configs are strict: what is wrong is one UsageError that names the key, and what is dumped loads back equal."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_cli.config import load as configs
from slope_cli.config import schema
from slope_cli.config.schema import Config, LogConfig, ModelConfig, SparsityConfig, TrainConfig
from slope_cli.config.unused import without_effect
from slope_cli.errors import UsageError


def refused(*overrides: str, recipe: str = "gpt2-nano") -> str:
    with pytest.raises(UsageError) as caught:
        configs.load(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_then_recipe_then_words(tmp_path: Path) -> None:
    recipe = written(tmp_path, "optim: {lr: 0.5, clip: 2.0}\nmodel: {overrides: {n_layer: 3}}\n")
    words = ["optim.lr=0.25", "model.overrides.n_head=2", "sparsity.skip=[a, b]", "adapters.alpha=null"]
    config = configs.load(recipe, words)
    assert (config.optim.lr, config.optim.clip, config.optim.eps) == (0.25, 2.0, 1e-8)
    assert config.model.overrides == {"n_layer": 3, "n_head": 2}
    assert config.sparsity.skip == ["a", "b"]
    assert config.adapters.alpha is None


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert configs.load(written(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize(
    "word", ["optim.lrr=3", "optimm.lr=3", "lr=3", "model.overide.x=1", "layers.0=x", "optim..lr=1"]
)
def test_an_unknown_key_is_named_with_a_near_one(word: str) -> None:
    message = refused(word)
    assert message.startswith(word.partition("=")[0].split(".")[0])
    assert "unknown key" in message
    assert "did you mean" in message or "known are" in message


def test_the_near_key_is_the_full_one(tmp_path: Path) -> None:
    assert refused("optim.lrr=3") == "optim.lrr: unknown key; did you mean optim.lr?"
    recipe = written(tmp_path, "train:\n  step: 5\n")
    assert refused(recipe=recipe) == f"{recipe}: train.step: unknown key; did you mean train.steps?"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sparsity:\n  n: 2:4\n", "sparsity.n"),
        ("sparsity: {n: 2:4, m: 4}  # a comment\n", "sparsity.n"),
        ("sparsity:\n  m: 1:2 # a comment\n", "sparsity.m"),
        ("sparsity:\n  skip:\n  - 2:4\n", "sparsity.skip"),
    ],
)
def test_a_pattern_that_yaml_reads_as_a_number_is_explained(tmp_path: Path, text: str, key: str) -> None:
    recipe = written(tmp_path, text)
    message = refused(recipe=recipe)
    assert message.startswith(f"{recipe}: {key}: ")
    assert "base-60" in message
    assert "sparsity.n=" in message


@pytest.mark.parametrize("word", ["sparsity.n=2:4", "sparsity.m=2:4", "sparsity.skip=[2:4]", "pattern=2:4"])
def test_a_pattern_on_the_command_line_is_explained(word: str) -> None:
    message = refused(word)
    assert message.startswith(word.partition("=")[0] + ": ")
    assert message.endswith("say sparsity.n=2 sparsity.m=4")


def test_a_quoted_clock_time_is_text(tmp_path: Path) -> None:
    recipe = written(tmp_path, 'log: {sample_prompt: "12:30"}\n')
    assert configs.load(recipe).log.sample_prompt == "12:30"
    assert configs.load(recipe, ["log.sample_prompt='7:15'"]).log.sample_prompt == "7:15"


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("train.steps=1e5", "train.steps"),
        ("train.steps=many", "train.steps"),
        ("train.steps=", "train.steps"),
        ("train.steps=null", "train.steps"),
        ("train.steps.x=1", "train.steps"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=[1]", "optim.lr"),
        ("optim.lr=${foo}", "optim.lr"),
        ("optim.betas=3", "optim.betas"),
        ("optim.betas=[0.9]", "optim.betas: needs two numbers"),
        ("optim.betas=[0.9, 0.95, 0.99]", "optim.betas: needs two numbers"),
        ("optim.betas.0=0.5", ""),
        ("optim=3", "optim"),
        ("train=null", "train"),
        ("model.overrides=3", "model.overrides"),
        ("sparsity.skip=a", "sparsity.skip"),
        ("data.verify=perhaps", "data.verify"),
        ("train.seed=[", ""),
        ("train.seed=!!python/object:os.system x", ""),
    ],
)
def test_a_wrong_type_is_refused(word: str, key: str) -> None:
    assert refused(word).startswith(key)


@pytest.mark.parametrize("word", ["train.steps", "=3", ""])
def test_a_word_without_key_and_value_is_refused(word: str) -> None:
    assert "is not KEY=VALUE" in refused(word)


@pytest.mark.parametrize(
    "word",
    [
        *(
            f"{key}={bad}"
            for key in ("optim.lr", "optim.eps", "optim.power", "adapters.lr")
            for bad in (0, -1, "nan", "inf")
        ),
        *(
            f"{key}={bad}"
            for key in ("optim.clip", "optim.warmup", "optim.weight_decay", "adapters.rank", "adapters.warmup")
            for bad in (-1, "nan", "inf")
        ),
        *(f"{key}=0" for key in ("train.steps", "train.micro_batch", "train.seq_len", "train.tokens_per_step")),
        *(f"{key}=0" for key in ("log.every", "log.val_tokens", "log.sample_tokens", "log.keep")),
        *(f"{key}=-1" for key in ("log.val_every", "log.sample_every", "log.save_every", "sparsity.renew_every")),
        "train.seed=-1",
        "train.seed=99999999999999999999",
        f"train.seed={2**63}",
        *(f"train.device={bad}" for bad in ("meta", "gpu", "cuda:x", "cpu:0", "mps", "cpux")),
        "train.tokens_per_step=1000",
        "train.dtype=fp64",
        "method=dens",
        "model.dropout=1",
        "model.dropout=-0.1",
        "sparsity.n=0",
        "sparsity.n=4",
        "sparsity.n=5",
        "sparsity.mask=movement",
        "sparsity.skip=['(']",
        "adapters.rank=1.5",
        "adapters.start=1.1",
        "adapters.start=nan",
        "adapters.alpha=0",
        "optim.betas=[0.9, 1.0]",
        "optim.betas=[-0.1, 0.9]",
        "optim.min_lr=2",
        "optim.schedule=cosin",
    ],
)
def test_a_value_out_of_range_is_refused(word: str) -> None:
    key, _, value = word.partition("=")
    message = refused(word)
    assert message.startswith(key)
    assert value.strip("[]'").split(",")[0] in message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- a\n- b\n", "not a mapping"),
        ("just text\n", "unknown key"),
        ("optim: {lr: 1.0, lr: 2.0}\n", "line 1"),
        ("optim:\n  lr: [1\n", "line 3"),
        ("a: b: c\n", "line 1"),
        ("\tx: 1\n", "line 1"),
        ("a: \x07\n", ""),
        ("optim: 3\n", "is a section"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, what: str) -> None:
    recipe = written(tmp_path, text)
    message = refused(recipe=recipe)
    assert message.startswith(f"{recipe}: ")
    assert what in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert refused(recipe=f"{tmp_path}/none.yaml") == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"
    assert "Is a directory" in refused(recipe=f"{tmp_path}/")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: is not a text file" in refused(recipe=f"{tmp_path}/binary.yaml")


def test_an_unknown_recipe_is_met_with_near_ones() -> None:
    assert refused(recipe="gpt2-smal").startswith("gpt2-smal: no recipe of this name; did you mean gpt2-small")
    assert refused(recipe="zzz").endswith("see `slope recipes`")


ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="$")).filter(str.isprintable)


@settings(max_examples=40, deadline=None)
@given(
    prompt=ANY_TEXT, skip=st.lists(st.sampled_from([r"\.0\.", "1:2", "a: b", "# x", "null", "~", "1e3", "é", "yes"]))
)
def test_a_dumped_config_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, skip: list[str]
) -> None:
    config = Config(
        model=ModelConfig(dropout=0.1, overrides={"n_layer": 2, "rope_parameters": {"rope_theta": 1e6}, "x": None}),
        sparsity=SparsityConfig(n=1, m=2, skip=skip),
        log=LogConfig(sample_prompt=prompt),
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(configs.dump(config), encoding="utf-8")
    assert configs.load(str(path)) == config


def test_differences_name_the_keys_that_decide_what_is_computed() -> None:
    old, new = Config(), configs.load("gpt2-nano", ["optim.lr=0.5", "model.overrides.n_layer=2"])
    new.log.every, new.data.path, new.train.device = 7, "elsewhere", "cpu"
    base = configs.load("gpt2-nano")
    assert configs.differences(base, base) == []
    assert configs.differences(base, new) == [
        "model.overrides.n_layer: None -> 2",
        f"optim.lr: {base.optim.lr} -> 0.5",
    ]
    assert "optim.lr: 0.0006 -> 0.5" in configs.differences(old, new)


def test_free_keys_exist() -> None:
    known = {f"{section.name}.{key.name}" for section in fields(Config) for key in _fields_of(section.name)}
    known |= {section.name for section in fields(Config)}
    assert set(schema.FREE_KEYS) <= known


def _fields_of(section: str) -> tuple[object, ...]:
    value = getattr(Config(), section)
    return fields(value) if is_dataclass(value) else ()


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"steps": 1000}, 990),
        ({"steps": 10}, 9),  # round(9.9) is 10, but a run that has adapters has them for one step
        ({"steps": 1}, 0),
    ],
)
def test_adapters_join_before_the_last_step(changes: dict[str, int], step: int) -> None:
    assert Config(train=TrainConfig(**changes)).adapter_step == step
    assert configs.load("gpt2-nano", ["adapters.rank=0"]).adapter_step is None
    assert configs.load("gpt2-nano", ["method=dense"]).adapter_step is None


def test_accumulation_follows_from_the_tokens_of_a_step() -> None:
    words = ["train.tokens_per_step=4096", "train.micro_batch=4", "train.seq_len=256"]
    assert configs.load("gpt2-nano", words).train.accumulation == 4


@pytest.mark.parametrize("word", [f"train.seed={2**63 - 1}", "train.device=cuda", "train.device=cuda:3"])
def test_the_largest_seed_and_the_devices_that_there_are(word: str) -> None:
    key, _, value = word.partition("=")
    assert str(getattr(configs.load("gpt2-nano", [word]).train, key.removeprefix("train."))) == value


@pytest.mark.parametrize(
    ("words", "idle", "why"),
    [
        ("method=dense sparsity.mask=random", "sparsity.mask=random", "method=dense"),
        ("method=dense adapters.rank=8", "adapters.rank=8.0", "method=dense"),
        ("method=dense sparsity.blocks.1-1=[2,8]", "sparsity.blocks.1-1=[2, 8]", "method=dense"),
        ("sparsity={decay: 1e-3}", "sparsity.decay=0.001", "method=slope"),
        ("sparsity.dense_finish=0.3", "sparsity.dense_finish=0.3", "method=slope"),
        ("sparsity.before=sr_ste", "sparsity.before=sr_ste", "sparsity.start=0"),
        ("sparsity.calibration=8", "sparsity.calibration=8", "sparsity.mask=magnitude"),
        ("method=sr_ste sparsity.rescale=true", "sparsity.rescale=True", "method=sr_ste"),
        ("method=wanda sparsity.start=0.5 sparsity.mask=random", "sparsity.mask=random", "method=wanda"),
        ("method=wanda sparsity.start=0.5 sparsity.renew_every=2", "sparsity.renew_every=2", "method=wanda"),
        ("method=fst adapters.lr=1e-3", "adapters.lr=0.001", "method=fst"),
        ("adapters.rank=0 adapters.lr=1e-3", "adapters.lr=0.001", "adapters.rank=0"),
        ("adapters.schedule=run adapters.warmup=7", "adapters.warmup=7.0", "adapters.schedule=run"),
        ("method=dense adapters.rank=0 linearize.window=32", "linearize.window=32", "method=dense"),
        ("method=linearize adapters.start=0.5", "adapters.start=0.5", "method=linearize"),
        ("method=linearize optim.weight_decay=0.3", "optim.weight_decay=0.3", "method=linearize"),
        ("method=linearize linearize.transfer=1 optim.lr=1e-3", "optim.lr=0.001", "linearize.transfer=1"),
        (
            "method=linearize linearize.transfer=0 linearize.transfer_lr=1",
            "linearize.transfer_lr=1.0",
            "linearize.transfer=0",
        ),
        ("method=linearize adapters.rank=0 linearize.targets=[q]", "linearize.targets=['q']", "adapters.rank=0"),
    ],
)
def test_a_word_that_changes_nothing_is_named_with_what_makes_it_idle(words: str, idle: str, why: str) -> None:
    found = re.split(r" (?=[a-z_]+[.=])", words)
    lines = without_effect(configs.load("gpt2-nano", found), found)
    assert lines == [f"{idle}: has no effect with {why}"]


@pytest.mark.parametrize(
    "words",
    [
        "method=dense adapters.rank=0 sparsity.mask=magnitude",  # as much as not to say it
        "sparsity.mask=wanda sparsity.calibration=8",
        "sparsity.start=0.5 sparsity.before=sr_ste sparsity.decay=1e-3",
        "method=wanda sparsity.start=0.5 sparsity.mask=wanda sparsity.calibration=8",
        "method=sr_ste sparsity.decay=1e-3 sparsity.renew_every=7 sparsity.mask=random",
        "method=fst sparsity.decay=1e-3 sparsity.dense_finish=0.3",
        "method=dense data.path=elsewhere log.every=3 optim.lr=1e-3",
        "method=linearize adapters.rank=4 adapters.warmup=2 linearize.window=32",
    ],
)
def test_a_word_that_has_its_effect_is_not_named(words: str) -> None:
    assert without_effect(configs.load("gpt2-nano", words.split()), words.split()) == []
