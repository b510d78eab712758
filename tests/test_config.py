"""Configs are strict: a mistake is one UsageError that names the key, and a dumped config loads back equal."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_cli.compare.variants import variants
from slope_cli.config import configs, schema
from slope_cli.config.schema import METHODS, Config, TrainConfig
from slope_cli.config.values import known_keys, type_in_words
from slope_cli.errors import UsageError
from slope_cli.methods import phases_of


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
    words = ["optim.lr=0.25", "model.overrides.n_head=2", "sparsity.exclude_modules=[a, b]", "adapters.alpha=null"]
    config = configs.load(recipe, words)
    assert (config.optim.lr, config.optim.clip, config.optim.eps) == (0.25, 2.0, 1e-8)
    assert config.model.overrides == {"n_layer": 3, "n_head": 2}
    assert config.sparsity.exclude_modules == ["a", "b"]
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
        ("sparsity:\n  exclude_modules:\n  - 2:4\n", "sparsity.exclude_modules"),
    ],
)
def test_a_pattern_that_yaml_reads_as_a_number_is_explained(tmp_path: Path, text: str, key: str) -> None:
    recipe = written(tmp_path, text)
    message = refused(recipe=recipe)
    assert message.startswith(f"{recipe}: {key}: ")
    assert "base-60" in message
    assert "sparsity.n=" in message


@pytest.mark.parametrize("word", ["sparsity.n=2:4", "sparsity.m=2:4", "sparsity.exclude_modules=[2:4]", "pattern=2:4"])
def test_a_pattern_on_the_command_line_is_explained(word: str) -> None:
    message = refused(word)
    assert message.startswith(word.partition("=")[0] + ": ")
    assert message.endswith("say sparsity.n=2 sparsity.m=4")


def test_a_quoted_clock_time_is_text(tmp_path: Path) -> None:
    recipe = written(tmp_path, 'log: {sample_prompt: "12:30"}\n')
    assert configs.load(recipe).log.sample_prompt == "12:30"
    assert configs.load(recipe, ["log.sample_prompt='7:15'"]).log.sample_prompt == "7:15"


@pytest.mark.parametrize("text", ["The ", "12", "1e3", "yes", "007", "7:15", "#x", "a: b", "[a]", "it's", "null", "'"])
def test_a_word_of_type_text_is_taken_as_written(text: str) -> None:
    assert configs.load("gpt2-nano", [f"log.sample_prompt={text}"]).log.sample_prompt == text


def test_text_may_be_quoted_and_where_there_may_be_none_it_may_be_null() -> None:
    words = ["log.sample_prompt='The '", 'data.path="1.10"', "model.init=007", "sparsity.mask=random"]
    config = configs.load("gpt2-nano", words)
    assert (config.log.sample_prompt, config.data.path, config.model.init) == ("The ", "1.10", "007")
    config = configs.load("gpt2-nano", [*words, "model.init=null", "sparsity.mask=null"])
    assert (config.model.init, config.sparsity.mask) == (None, "magnitude")


WORDS = [
    "12345e67",
    "123456_7",
    "1e3",
    "No",
    "yes",
    "on",
    "010",
    "007",
    "0x10",
    "12:30",
    ".5",
    "+1",
    "2001-01-01",
    "-",
    "=",
]
"""Texts that YAML reads as something else."""


@pytest.mark.parametrize(
    "text", [*WORDS, "/scratch/run #3", "a: b", "{a}", "%x", "&a", "*a", "!x", "é", "\x1b[31m", "'a' or 'b'"]
)
def test_keys_of_type_text_take_any_word_as_written(text: str, tmp_path: Path) -> None:
    keys = {"data": "path", "model": "init", "log": "sample_prompt"}

    def values(config: Config) -> set[object]:
        return {getattr(getattr(config, section), name) for section, name in keys.items()}

    config = configs.load("gpt2-nano", [f"{section}.{name}={text}" for section, name in keys.items()])
    assert values(config) == {text}
    assert values(dumped(config, tmp_path / "dumped.yaml")) == {text}
    if text in WORDS[:-2]:
        for form in (
            "{section}: {{{name}: {text}}}\n",
            "{section}:\n  {name}: {text}  # why\n",
            "{section}.{name}: {text}\n",
        ):
            recipe = "".join(form.format(section=section, name=name, text=text) for section, name in keys.items())
            assert values(configs.load(written(tmp_path, recipe))) == {text}
        words = [f"{section}={{{name}: {text}}}" for section, name in keys.items()]
        assert values(configs.load("gpt2-nano", words)) == {text}


def test_texts_of_a_list_are_taken_as_written(tmp_path: Path) -> None:
    texts = [word for word in WORDS if word not in ("12:30", "+1", "-")]
    word = f"sparsity.exclude_modules=[{', '.join(texts)}, null, 'a b']"
    assert configs.load("gpt2-nano", [word]).sparsity.exclude_modules == [*texts, "null", "a b"]
    recipe = written(tmp_path, "sparsity:\n  exclude_modules:\n" + "".join(f"  - {text}\n" for text in texts))
    assert configs.load(recipe).sparsity.exclude_modules == texts


def test_text_under_an_earlier_name_is_taken_as_written(tmp_path: Path) -> None:
    assert configs.load("gpt2-nano", ["sparsity.skip=[1e3]"]).sparsity.exclude_modules == ["1e3"]
    assert refused("train.dtype=16").startswith("train.precision=16: choose one of")


def test_an_empty_text_must_be_said_and_null_is_for_keys_that_may_be_null(tmp_path: Path) -> None:
    assert refused("model.init=").startswith("model.init=: is empty; write a value")
    assert refused("data.path=").startswith("data.path=: is empty; write a value")
    assert configs.load("gpt2-nano", ['log.sample_prompt=""']).log.sample_prompt == ""
    for null in ("null", "~", ""):
        assert configs.load(written(tmp_path, f"model: {{init: {null}}}\n")).model.init is None
        assert "data.path" in refused(recipe=written(tmp_path, f"data: {{path: {null}}}\n"))
    assert configs.load(written(tmp_path, "model: {init: 'null'}\n")).model.init == "null"


@pytest.mark.parametrize("number", ["010", "00", "-07", "0_10", "08", "+010"])
@pytest.mark.parametrize(
    "key", ["train.steps", "optim.lr", "model.overrides.n_layer", "sparsity.pattern_overrides.1-2"]
)
def test_an_octal_number_is_refused(key: str, number: str, tmp_path: Path) -> None:
    value = f"[1, {number}]" if key.startswith("sparsity") else number
    message = f"{key}: {number} would be read as an octal number; leave out the leading 0"
    assert refused(f"{key}={value}") == message
    recipe = written(tmp_path, f"{key}: {value}\n")
    assert refused(recipe=recipe) == f"{recipe}: {message}"


@pytest.mark.parametrize("key", ["data.path", "model.init", "train.steps", "model.overrides.n_layer", "fst.decay"])
def test_the_mark_of_a_missing_value_is_refused(key: str, tmp_path: Path) -> None:
    for word in (f"{key}=???", f"{key}='???'"):
        assert "??? stands for a missing value" in refused(word)
    assert "??? stands for a missing value" in refused("sparsity.exclude_modules=['???']")
    recipe = written(tmp_path, f"{key}: ???\n")
    assert refused(recipe=recipe).startswith(f"{recipe}: {key}=???: ??? stands for a missing value")


def test_a_duplicate_key_is_named_with_its_line(tmp_path: Path) -> None:
    recipe = written(tmp_path, "# first\n\noptim:\n  lr: 1.0\n  clip: 1\n  lr: 2.0\n")
    assert refused(recipe=recipe) == f"{recipe}: line 6 is not YAML: duplicate key lr"


def test_aliases_of_yaml_work_and_cannot_grow_without_end(tmp_path: Path) -> None:
    recipe = written(tmp_path, "log: {save_every: &n 7, val_every: *n}\n")
    assert configs.load(recipe).log.val_every == 7
    assert refused(recipe=written(tmp_path, "model: {overrides: &a {x: *a}}\n"))
    nests = "".join(f"  x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert refused(recipe=written(tmp_path, f"model:\n overrides:\n  x0: &x0 [1]\n{nests}"))


@pytest.mark.parametrize("value", ["${optim.lr}", "${foo}", "${oc.env:HOME}"])
def test_an_interpolation_is_refused_wherever_a_config_is_read(value: str, tmp_path: Path) -> None:
    for key in ("adapters.lr", "log.sample_prompt", "sparsity.exclude_modules"):
        word = f"{key}={[value]}" if key.endswith("modules") else f"{key}={value}"
        assert refused(word) == f"{word}: is an interpolation; write the value itself"
    recipe = written(tmp_path, f"adapters: {{lr: '{value}'}}\n")
    assert "is an interpolation" in refused(recipe=recipe)
    for text in (
        f"fst: {{decay: '{value}'}}\n",
        f"model: {{overrides: {{x: [1, '{value}']}}}}\n",
        f"data: {{path: '{value}'}}\n",
    ):
        assert "is an interpolation" in refused(recipe=written(tmp_path, text))
    with pytest.raises(UsageError, match="is an interpolation"):
        configs.load_saved(Path(written(tmp_path, f"method: slope\nfst: {{decay: '{value}'}}\n")))
    with pytest.raises(UsageError, match=r"is an interpolation"):
        configs.from_fixed({"method": "slope", "data.path": value}, "manifest")
    with pytest.raises(UsageError, match=r"is an interpolation"):
        variants("gpt2-nano", [], [], [f"mine: log.sample_prompt={value}"])


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
        ("optim.betas=3", "optim.betas"),
        ("optim.betas=[0.9]", "optim.betas=["),
        ("optim.betas=[0.9, 0.95, 0.99]", "optim.betas=["),
        ("optim.betas.0=0.5", ""),
        ("optim=3", "optim"),
        ("train=null", "train"),
        ("model.overrides=3", "model.overrides"),
        ("sparsity.exclude_modules=a", "sparsity.exclude_modules"),
        ("data.verify=perhaps", "data.verify"),
        ("train.seed=[", ""),
        ("train.seed=!!python/object:os.system x", ""),
    ],
)
def test_a_wrong_type_is_refused(word: str, key: str) -> None:
    assert refused(word).startswith(key)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("train.steps=abc", "train.steps=abc: must be a whole number, such as train.steps=10000"),
        ("train.steps=1.5", "train.steps=1.5: must be a whole number, such as train.steps=10000"),
        ("train.steps.x=1", "train.steps.x=1: must be a whole number, such as train.steps=10000"),
        ("train.steps=null", "train.steps=null: must be a whole number, such as train.steps=10000"),
        ("optim.betas=[a, b]", "optim.betas=['a', 'b']: must be two numbers, such as optim.betas=[0.9, 0.999]"),
        ("optim.betas=[1]", "optim.betas=[1]: must be two numbers, such as optim.betas=[0.9, 0.999]"),
        ("data.verify=maybe", "data.verify=maybe: must be true or false, such as data.verify=false"),
        ("train.compile=3", "train.compile=3: must be true, false or auto, such as train.compile=false"),
        ("model.dropout=x", "model.dropout=x: must be a number or null, such as model.dropout=0.1"),
        ("sparsity.exclude_modules=x", "sparsity.exclude_modules=x: must be a list of texts, such as "),
        ("sparsity.pattern_overrides.a=3", "sparsity.pattern_overrides.a=3: must be a mapping, such as "),
        ("adapters.start=500", "adapters.start=500.0: is a share of the run, which must lie between 0 and 1"),
    ],
)
def test_a_wrong_value_is_answered_in_plain_words(word: str, sentence: str) -> None:
    assert refused(word).startswith(sentence)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lr=1e-3", "optim.lr or adapters.lr"),
        ("steps=10", "train.steps"),
        ("step=10", "train.steps"),
        ("trian.steps=10", "train.steps"),
        ("trian.step=10", "train.steps"),
        ("optimm.lr=3", "optim.lr"),
        ("optim.steps=10", "train.steps"),
        ("model.override.n_layer=2", "model.overrides"),
        ("opitm=3", "optim"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_whole_key(word: str, key: str) -> None:
    assert refused(word) == f"{word.partition('=')[0]}: unknown key; did you mean {key}?"


NUMBERS = [key for key in known_keys() if type_in_words(key).startswith(("number", "two numbers"))]


@pytest.mark.parametrize("bad", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_is_not_finite_is_called_that(key: str, bad: str) -> None:
    value = f"[{bad}, 0.5]" if type_in_words(key) == "two numbers" else bad
    of_method = [f"method={key.partition('.')[0]}"] if key.partition(".")[0] in METHODS else []
    words = (*of_method, "linearize.window=8") if of_method == ["method=linearize"] else of_method
    message = refused(*words, f"{key}={value}")
    assert message.startswith(f"{key}=")
    assert message.endswith(": must be finite")


def test_a_number_of_a_model_s_config_is_finite_too() -> None:
    assert len(NUMBERS) > 20
    assert refused("model.overrides.layer_norm_epsilon=.inf").endswith(": must be finite")


@pytest.mark.parametrize("key", [key for key in known_keys() if "number" in type_in_words(key)])
def test_a_number_of_too_many_digits_is_refused(key: str) -> None:
    own, kind = key.partition(".")[0], type_in_words(key)
    lists = {"two": "[0.5, {}]", "list of whole": "[{}]", "list of lists": "[[0, {}]]"}
    form = next((form for start, form in lists.items() if kind.startswith(start)), "{}")
    of_method = [f"method={own}"] * (own in METHODS)
    assert refused(*of_method, f"{key}={form.format('9' * 400)}").startswith(f"{key}=")
    if kind.startswith("whole"):
        assert refused(*of_method, f"{key}={2**63}") == f"{key}={2**63}: must be below 2^63"
    refused(*of_method, f"{key}={form.format('9' * 5000)}")


def test_numbers_inside_of_mappings_and_words_are_refused_by_their_size_too() -> None:
    assert refused(f"model.overrides.n_layer={2**63}").endswith(": must be below 2^63")
    assert refused(f"sparsity.pattern_overrides={{a: [{2**63}, {2**64}]}}").endswith(": must be below 2^63")
    assert "auto:K" in refused("method=linearize", f"linearize.keep_softmax=auto:{'9' * 5000}")


@pytest.mark.parametrize("key", ["train.steps", "optim.betas", "linearize.keep_softmax", "data.path", "data.verify"])
def test_an_empty_mapping_sets_nothing_and_is_refused(tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    recipe = written(tmp_path, f"method: linearize\n{section}: {{{name}: {{}}}}\n")
    assert f"{key}={{}}: must be" in refused(recipe=recipe)
    if key != "data.path":  # the text {}
        assert f"{key}={{}}: must be" in refused(f"{key}={{}}")


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
        *(f"{key}=-1" for key in ("log.val_every", "log.sample_every", "log.save_every", "slope.mask_update_interval")),
        "train.seed=-1",
        "train.seed=99999999999999999999",
        f"train.seed={2**63}",
        *(f"train.device={bad}" for bad in ("meta", "gpu", "cuda:x", "cpu:0", "mps", "cpux")),
        "train.tokens_per_step=1000",
        "train.precision=fp64",
        "train.compile=maybe",
        "train.cuda_graph=2",
        "method=dens",
        "model.dropout=1",
        "model.dropout=-0.1",
        "sparsity.n=0",
        "sparsity.n=4",
        "sparsity.n=5",
        "sparsity.mask=movement",
        "sparsity.exclude_modules=['(']",
        "sparsity.target_modules=['(']",
        "sparsity.pattern_overrides.1-2=[2,2]",
        "sparsity.backend=cutlass",
        "slope.before=fst",
        "slope.backward_mask=largest",
        "slope.decay=-1",
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
    advice = "put it back or correct the path, and run the same command again"
    missing = f"{tmp_path}/none.yaml"
    assert refused(recipe=missing) == f"{missing}: cannot be read: No such file or directory; {advice}"
    assert "Is a directory" in refused(recipe=f"{tmp_path}/")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: is not a text file" in refused(recipe=f"{tmp_path}/binary.yaml")


def test_an_unknown_recipe_is_answered_with_near_ones() -> None:
    assert refused(recipe="gpt2-smal").startswith("gpt2-smal: no recipe of this name; did you mean gpt2-small")
    assert refused(recipe="zzz").startswith("zzz: no recipe of this name; known are bert-base, ")


# ------------------------------------------------------------------------------------------------------------- methods


OWN = {
    "slope": {"mask_update_interval": 7, "backward_mask": "random", "rescale": True},
    "sr_ste": {"mask_update_interval": 7, "decay": 1e-3},
    "fst": {"mask_update_interval": 7, "dense_finish": 0.3},
    "s_ste": {"mvue": False},
    "linearize": {"window": 16, "keep_softmax": [1]},
}
"""Of each method with a section, keys with other values than their defaults."""
FOREIGN = [(own, other) for own in OWN for other in METHODS if other != own]


def chosen(method: str) -> list[str]:
    return [f"method={method}", *(["sparsity.start=0.5"] if method == "wanda" else [])]


@pytest.mark.parametrize(("own", "other"), FOREIGN)
def test_a_key_of_another_methods_section_is_refused(own: str, other: str, tmp_path: Path) -> None:
    message = f"only method={own} reads this key, and the method is {other}"
    for key, value in OWN[own].items():
        assert refused(f"{own}.{key}={value}", *chosen(other)) == f"{own}.{key}: {message}"
        start = "sparsity: {start: 0.5}" if other == "wanda" else ""
        recipe = written(tmp_path, f"method: {other}\n{own}: {{{key}: {value}}}\n{start}\n")
        assert refused(recipe=recipe) == f"{recipe}: {own}.{key}: {message}"


@pytest.mark.parametrize(("own", "other"), FOREIGN)
def test_a_default_in_another_methods_section_changes_nothing(own: str, other: str) -> None:
    words = [f"{own}.{key}={configs.defaults()[f'{own}.{key}']}" for key in OWN[own]]
    assert configs.load("gpt2-nano", [*words, *chosen(other)]) == configs.load("gpt2-nano", chosen(other))


@pytest.mark.parametrize(("own", "other"), FOREIGN)
def test_a_recipes_section_of_its_own_method_is_dropped_when_another_is_chosen(
    own: str, other: str, tmp_path: Path
) -> None:
    keys = "".join(f"  {key}: {value}\n" for key, value in OWN[own].items())
    recipe = written(tmp_path, f"method: {own}\n{own}:\n{keys}")
    assert configs.load(recipe, chosen(other)) == configs.load(written_empty(tmp_path), chosen(other))
    section = getattr(configs.load(recipe), own)
    assert {key: getattr(section, key) for key in OWN[own]} == OWN[own]


def written_empty(folder: Path) -> str:
    path = folder / "empty.yaml"
    path.write_text("")
    return str(path)


def test_an_unknown_key_is_refused_in_a_section_that_is_dropped_too(tmp_path: Path) -> None:
    recipe = written(tmp_path, "slope: {recsale: true}\n")
    assert refused("method=dense", recipe=recipe).startswith(f"{recipe}: slope.recsale: unknown key; did you mean")
    assert refused("method=dense", "fst.decya=1").startswith("fst.decya: unknown key; did you mean")


def test_the_last_method_of_the_words_is_the_one_that_counts() -> None:
    words = ["method=fst", "slope.rescale=true", "method=slope"]
    assert configs.load("gpt2-nano", words).slope.rescale


def test_values_that_follow_from_others_are_filled_in() -> None:
    def load(*words: str) -> Config:
        return configs.load("gpt2-nano", words)

    assert load("optim.lr=0.5").adapters.lr == 0.5
    assert load("optim.lr=0.5", "adapters.lr=0.25").adapters.lr == 0.25
    assert load("optim.lr=0.5").optim.muon_lr is None
    assert load("optim.lr=0.5", "optim.name=muon").optim.muon_lr == 0.5
    assert load("optim.lr=0.5", "optim.name=muon", "optim.muon_lr=0.25").optim.muon_lr == 0.25
    assert load().sparsity.mask == load(*chosen("fst")).sparsity.mask == "magnitude"
    assert load(*chosen("wanda")).sparsity.mask == "wanda"
    assert (load().sparsity.target_modules, load("method=fst").sparsity.target_modules) == ([], ["mlp"])
    assert load("method=s_ste").sparsity.target_modules == ["mlp"]
    assert load("method=fst", "sparsity.target_modules=[c_fc]").sparsity.target_modules == ["c_fc"]
    assert [load(f"method={method}").train.cuda_graph for method in ("slope", "linearize")] == ["auto", False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("method=wanda", "sparsity.start=0.0: wanda prunes a trained model: set sparsity.start above 0, or model.init"),
        (
            "method=wanda sparsity.start=0.5 sparsity.mask=random",
            "sparsity.mask=random: method=wanda chooses masks by wanda",
        ),
        ("method=fst sparsity.m=8", "sparsity.m=8: fst searches transposable masks up to 4"),
        ("method=fst sparsity.pattern_overrides.0-1=[1,4]", "sparsity.m=4: fst searches transposable masks up to 4"),
        (
            "slope.row_mask_until=0.3 sparsity.start=0.3",
            "slope.row_mask_until=0.3: must be above sparsity.start=0.3, or 0",
        ),
        ("method=s_ste sparsity.mask=random", "sparsity.mask=random: soft thresholding keeps the largest magnitudes"),
        ("method=linearize train.cuda_graph=true", "train.cuda_graph=True: method=linearize runs without CUDA graphs"),
        ("method=linearize linearize.window=128", "linearize.window=128: must be below train.seq_len=128"),
        (
            "method=linearize linearize.window=64 linearize.kind=terrace",
            "linearize.window=64: must be below half of train.seq_len=128",
        ),
        ("method=linearize linearize.targets=[]", "linearize.targets=[]: choose some of q, k, v, o"),
        ("method=linearize linearize.feature_map=elu", "linearize.feature_map=elu: choose one of hedgehog, t2r"),
        ("method=linearize optim.name=muon", "optim.name=muon: is not for method=linearize"),
        ("model.name=init", "model.name=init: is only for method=linearize"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(words: str, message: str) -> None:
    assert refused(*words.split()).startswith(message)


# --------------------------------------------------------------------------------------------------- dumped and loaded


PATTERNS = [r"\.0\.", "1:2", "a: b", "# x", "null", "~", "1e3", "é", "yes"]
OVERRIDES = {
    "log.sample_prompt": st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="$'\"")).filter(
        bool
    ),
    "sparsity.exclude_modules": st.lists(st.sampled_from(PATTERNS)).map(repr),
    "sparsity.pattern_overrides.1-3": st.sampled_from(["[1, 4]", "[2,4]"]),
    "sparsity.start": st.floats(0.01, 1),
    "sparsity.mask": st.sampled_from(["magnitude", "random", "wanda", "null"]),
    "slope.mask_update_interval": st.integers(0, 100),
    "slope.row_mask_update_interval": st.integers(1, 100),
    "slope.before": st.sampled_from(["dense", "sr_ste"]),
    "sr_ste.decay": st.floats(0, 1),
    "fst.dense_finish": st.floats(0, 1),
    "s_ste.mvue": st.booleans(),
    "linearize.keep_softmax": st.one_of(
        st.lists(st.integers(0, 3), unique=True), st.sampled_from(["auto:1", "heads:12", "[1/0,2]"])
    ),
    "linearize.transfer": st.sampled_from([0, 0.25, 1]),
    "adapters.lr": st.one_of(st.just("null"), st.floats(1e-9, 1)),
    "adapters.rank": st.one_of(st.integers(0, 64), st.floats(0, 0.5)),
    "adapters.schedule": st.sampled_from(["own", "run"]),
    "optim.betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(list),
    "optim.lr": st.floats(1e-9, 1),
    "model.init": st.sampled_from(["null", "runs/first", "007", "1e3", "1.10", "None or so"]),
    "model.dropout": st.one_of(st.just("null"), st.floats(0, 0.9)),
    "model.overrides.rope_parameters": st.just("{rope_theta: 1e6, x: null}"),
    "train.compile": st.sampled_from(["auto", "true", "false"]),
    "train.cuda_graph": st.sampled_from(["auto", "false"]),
    "train.seed": st.integers(0, 2**63 - 1),
}


def dumped(config: Config, path: Path) -> Config:
    """What a config is once it was written and read."""
    path.write_text(configs.dump(config), encoding="utf-8")
    loaded = configs.load(str(path))
    assert configs.load_saved(path) == loaded
    assert configs.dump(loaded) == configs.dump(config)
    assert configs.fixed(configs.from_fixed(configs.fixed(config), "it")) == configs.fixed(config)
    return loaded


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(method=st.sampled_from(list(METHODS)), chosen_keys=st.sets(st.sampled_from(list(OVERRIDES))), draws=st.data())
def test_a_dumped_config_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, method: str, chosen_keys: set[str], draws: st.DataObject
) -> None:
    others = OWN.keys() - {method}
    keys = [key for key in sorted(chosen_keys) if key.partition(".")[0] not in others]
    if method in ("wanda", "s_ste"):
        keys = [key for key in keys if key != "sparsity.mask"]
    if method == "fst":
        keys = [key for key in keys if not key.startswith("sparsity.pattern_overrides")]
    words = [f"method={method}", *(["sparsity.start=0.5"] if method == "wanda" else [])]
    words += [f"{key}={draws.draw(OVERRIDES[key])}" for key in keys]
    if any(word.startswith("linearize.keep_softmax=") and ":" in word for word in words):  # among adapters' steps
        words = [word for word in words if not word.startswith(("linearize.transfer=", "adapters.rank="))]
    config = configs.load("gpt2-nano", words)
    loaded = dumped(config, tmp_path_factory.getbasetemp() / "dumped.yaml")
    assert configs.differences(config, loaded) == []
    assert with_effect(loaded) == with_effect(config)
    if method == "slope":
        assert loaded == config


def with_effect(config: Config) -> dict[str, object]:
    """The sections that a dump holds."""
    return {name: getattr(config, name) for name in configs.container(config)}


@pytest.mark.slow
@pytest.mark.parametrize("name", configs.recipe_names())
@pytest.mark.parametrize("method", ["its own", *METHODS])
def test_every_recipe_with_every_method_loads_back_equal(name: str, method: str, tmp_path: Path) -> None:
    words = [] if method == "its own" else chosen(method)
    if method == "linearize":
        words.append("linearize.window=32")
    config = configs.load(name, words)
    loaded = dumped(config, tmp_path / "dumped.yaml")
    assert configs.fixed(loaded) == configs.fixed(config)
    assert with_effect(loaded) == with_effect(config)
    if method == "slope":
        assert loaded == config


def test_a_dump_says_what_auto_stands_for() -> None:
    def comments(*words: str) -> dict[str, str]:
        lines = [line.partition("  # ") for line in configs.dump(configs.load("gpt2-nano", words)).splitlines()]
        return {line.strip(): comment for line, _, comment in lines if comment}

    assert comments() == {f"{key.partition('.')[2]}: auto": meaning for key, meaning in schema.AUTO.items()}
    assert comments()["precision: auto"] == "bf16 on a GPU, fp32 on a CPU"
    layout = ("layout", "gather")
    assert comments("method=linearize").keys() == {
        f"{key}: auto" for key in ("precision", "device", "compile", *layout)
    }
    settled = ("train.precision=fp32", "train.device=cpu", "train.compile=false", "train.cuda_graph=false")
    settled += ("distributed.layout=ddp", "distributed.gather=step")
    assert comments(*settled, "method=dense", "log.sample_prompt=auto") == {}


def test_a_dump_leaves_out_what_has_no_effect() -> None:
    def sections(*words: str) -> set[str]:
        return set(configs.container(configs.load("gpt2-nano", words))) - {"method", "model", "data"}

    always = {"optim", "train", "distributed", "log"}
    assert sections() == {*always, "sparsity", "slope", "adapters"}
    assert sections("method=dense") == always
    assert sections(*chosen("wanda")) == {*always, "sparsity"}
    assert sections("method=fst") == {*always, "sparsity", "fst"}
    assert sections("method=s_ste") == {*always, "sparsity", "s_ste"}
    assert sections("method=linearize") == {*always, "linearize", "adapters"}
    assert sections("method=linearize", "linearize.transfer=1") == {*always, "linearize"}


def test_differences_name_the_keys_that_decide_what_is_computed() -> None:
    old, new = Config(), configs.load("gpt2-nano", ["optim.lr=0.5", "model.overrides.n_layer=2"])
    new.log.every, new.data.path, new.train.device = 7, "elsewhere", "cpu"
    base = configs.load("gpt2-nano")
    assert configs.differences(base, base) == []
    assert configs.differences(base, new) == [
        "model.overrides.n_layer: None -> 2",
        f"optim.lr: {base.optim.lr} -> 0.5",  # which adapters.lr follows in both
    ]
    own = configs.load("gpt2-nano", ["adapters.lr=0.5"])
    assert configs.differences(base, own) == [f"adapters.lr: {base.optim.lr} -> 0.5"]
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
        ({"steps": 10}, 9),  # round(9.9) is 10, but a run with adapters has them for one step at least
        ({"steps": 1}, 0),
    ],
)
def test_adapters_are_added_before_the_last_step(changes: dict[str, int], step: int) -> None:
    assert phases_of(Config(train=TrainConfig(**changes))).adapter_step == step
    assert phases_of(configs.load("gpt2-nano", ["adapters.rank=0"])).adapter_step is None
    assert phases_of(configs.load("gpt2-nano", ["method=dense"])).adapter_step is None


def test_accumulation_follows_from_the_tokens_of_a_step() -> None:
    words = ["train.tokens_per_step=4096", "train.micro_batch=4", "train.seq_len=256"]
    assert configs.load("gpt2-nano", words).train.accumulation() == 4


@pytest.mark.parametrize(
    "word", [f"train.seed={2**63 - 1}", "train.device=cuda", "train.device=cuda:3", "train.device=auto"]
)
def test_the_largest_seed_and_existing_devices_are_accepted(word: str) -> None:
    key, _, value = word.partition("=")
    assert str(getattr(configs.load("gpt2-nano", [word]).train, key.removeprefix("train."))) == value


@pytest.mark.parametrize(
    ("words", "idle", "why"),
    [
        ("method=dense sparsity.mask=random", "sparsity.mask=random", "method=dense"),
        ("method=dense adapters.rank=8", "adapters.rank=8.0", "method=dense"),
        ("method=dense sparsity.pattern_overrides.1-1=[2,8]", "sparsity.pattern_overrides.1-1=[2, 8]", "method=dense"),
        ("slope={decay: 1e-3}", "slope.decay=0.001", "sparsity.start=0"),
        ("sparsity.start=0.5 slope.decay=1e-3", "slope.decay=0.001", "slope.before=dense"),
        ("slope.before=sr_ste", "slope.before=sr_ste", "sparsity.start=0"),
        ("slope.row_mask_update_interval=8", "slope.row_mask_update_interval=8", "slope.row_mask_until=0"),
        ("sparsity.calibration=8", "sparsity.calibration=8", "sparsity.mask=magnitude"),
        ("method=fst adapters.lr=1e-3", "adapters.lr=0.001", "method=fst"),
        ("adapters.rank=0 adapters.lr=1e-3", "adapters.lr=0.001", "adapters.rank=0"),
        ("adapters.schedule=run adapters.warmup=7", "adapters.warmup=7.0", "adapters.schedule=run"),
        ("train.precision=bf16 train.bf16_finish=0.1", "train.bf16_finish=0.1", "train.precision=bf16"),
        ("optim.schedule=wsd optim.power=2", "optim.power=2.0", "optim.schedule=wsd"),
        ("method=linearize sparsity.n=1", "sparsity.n=1", "method=linearize"),
        ("method=linearize adapters.start=0.5", "adapters.start=0.5", "method=linearize"),
        ("method=linearize optim.weight_decay=0.3", "optim.weight_decay=0.3", "method=linearize"),
        ("method=linearize linearize.transfer=1 optim.lr=1e-3", "optim.lr=0.001", "linearize.transfer=1"),
        (
            "method=linearize linearize.transfer=0 linearize.transfer_lr=1",
            "linearize.transfer_lr=1.0",
            "linearize.transfer=0",
        ),
        ("method=linearize adapters.rank=0 linearize.targets=[q]", "linearize.targets=['q']", "adapters.rank=0"),
        ("method=linearize linearize.state=delta linearize.mix=0.5", "linearize.mix=0.5", "linearize.state=delta"),
    ],
)
def test_a_word_without_effect_is_named_with_its_cause(words: str, idle: str, why: str) -> None:
    found = re.split(r" (?=[a-z_]+[.=])", words)
    lines = configs.without_effect(configs.load("gpt2-nano", found), found)
    assert lines == [f"{idle}: has no effect with {why}"]


@pytest.mark.parametrize(
    "words",
    [
        "method=dense sparsity.mask=magnitude",  # the default
        "method=dense sparsity.mask=null adapters.lr=null",
        "sparsity.mask=wanda sparsity.calibration=8",
        "sparsity.start=0.5 slope.before=sr_ste slope.decay=1e-3",
        "method=wanda sparsity.start=0.5 sparsity.mask=wanda sparsity.calibration=8",
        "method=sr_ste sr_ste.decay=1e-3 sr_ste.mask_update_interval=7 sparsity.mask=random",
        "method=fst fst.decay=1e-3 fst.dense_finish=0.3",
        "method=dense data.path=elsewhere log.every=3 optim.lr=1e-3",
        "method=linearize adapters.rank=4 adapters.warmup=2 linearize.window=32",
    ],
)
def test_a_word_with_an_effect_is_not_named(words: str) -> None:
    assert configs.without_effect(configs.load("gpt2-nano", words.split()), words.split()) == []
