"""Keys of older versions still load: from recipes, command lines, and the configs and manifests of runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slope_cli.config import configs
from slope_cli.config.migrate import DEFAULTED, MOVED, RENAMED
from slope_cli.config.schema import METHODS, Config
from slope_cli.errors import UsageError

OLD = [
    ("slope", "sparsity.blocks.1-3", "[1, 2]", "sparsity.pattern_overrides.1-3"),
    ("sr_ste", "sparsity.skip", "['c_fc']", "sparsity.exclude_modules"),
    ("linearize", "linearize.map", "t2r", "linearize.feature_map"),
    ("linearize", "linearize.distill", "0.25", "distill.share"),
    ("dense", "train.dtype", "bf16", "train.precision"),
    ("slope", "sparsity.before", "sr_ste", "slope.before"),
    ("slope", "sparsity.rescale", "true", "slope.rescale"),
    ("slope", "sparsity.renew_every", "7", "slope.mask_update_interval"),
    ("sr_ste", "sparsity.renew_every", "7", "sr_ste.mask_update_interval"),
    ("fst", "sparsity.renew_every", "7", "fst.mask_update_interval"),
    ("slope", "sparsity.column_mask", "random", "slope.backward_mask"),
    ("slope", "sparsity.column_rescale", "true", "slope.backward_rescale"),
    ("slope", "sparsity.decay", "0.25", "slope.decay"),
    ("sr_ste", "sparsity.decay", "0.25", "sr_ste.decay"),
    ("fst", "sparsity.decay", "0.25", "fst.decay"),
    ("fst", "sparsity.dense_finish", "0.25", "fst.dense_finish"),
]
"""A method, an old key, a value other than the default, and today's key."""
NULLS = [
    ("dense", "train.compile", "train.compile", "auto"),
    ("dense", "train.cuda_graph", "train.cuda_graph", "auto"),
    ("slope", "sparsity.renew_every", "slope.mask_update_interval", "1"),
    ("sr_ste", "sparsity.renew_every", "sr_ste.mask_update_interval", "1"),
    ("fst", "sparsity.renew_every", "fst.mask_update_interval", "40"),
]
"""Keys whose null meant the default: today's key, and the default."""
OLD_CONFIG = """
method: METHOD
model: {name: gpt2-nano, init: null, dropout: null, overrides: {}}
data: {path: embedded, verify: true}
sparsity: {'n': 2, m: 4, blocks: {}, mask: magnitude, start: START, before: dense, rescale: false, renew_every: null,
  column_mask: magnitude, column_rescale: false, decay: 6.0e-06, dense_finish: 0.17, calibration: 32, backend: auto,
  skip: []}
adapters: {rank: 0.0156, start: 0.99, init: lora, alpha: null, lr: null, schedule: own, warmup: 0.1, weight_decay: 0.0}
linearize: {window: 64, kind: standard, map: hedgehog, features: null, mix: 0.1, keep_softmax: [], transfer: 0.5,
  transfer_lr: 0.01, adjust_maps: false, mse_weight: 1000.0, entropy_weight: 0.0, window_dropout: 0.0,
  targets: [q, k, v, o], distill: 0.0}
optim: {name: adamw, lr: 0.0006, betas: [0.9, 0.95], eps: 1.0e-08, weight_decay: 0.1, schedule: cosine, warmup: 0.01,
  min_lr: 0.1, power: 0.5, clip: 1.0}
train: {steps: 1000, tokens_per_step: 524288, micro_batch: 8, seq_len: 1024, dtype: auto, device: auto, compile: null,
  cuda_graph: null, seed: 1, deterministic: false}
log: {every: 10, val_every: 250, val_tokens: 262144, sample_every: 1000, sample_prompt: 'The ', sample_tokens: 100,
  save_every: 500, keep: 2, tensorboard: true}
"""
"""The defaults as the version before wrote them, with the sections of all methods."""


def setting(method: str, key: str, value: str) -> str:
    """A file that sets one key: {a: {b: value}}."""
    *parents, last = key.split(".")
    return (
        f"method: {method}\n" + "".join(f"{parent}: {{" for parent in parents) + f"{last}: {value}" + "}" * len(parents)
    )


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def words(method: str, key: str, value: str) -> list[str]:
    return [f"method={method}", f"{key}={value}"]


def test_every_old_key_is_tested() -> None:
    listed = {"sparsity.blocks" if "blocks" in key else key for _, key, _, _ in OLD}
    assert listed == {*RENAMED, *MOVED}
    assert {key for _, key, _, _ in NULLS} == set(DEFAULTED)
    for key, (_, *methods) in MOVED.items():
        assert {method for method, old, _, _ in OLD if old == key} == set(methods)


@pytest.mark.parametrize(("method", "old", "value", "new"), OLD)
def test_an_old_key_of_a_recipe_is_read_with_one_warning(
    method: str, old: str, value: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, today = (written(tmp_path / f"{key}.yaml", setting(method, key, value)) for key in (old, new))
    config = configs.load(str(recipe))
    assert config == configs.load(str(today)) == configs.load(str(recipe))
    assert config != Config(method=method)
    assert capsys.readouterr().err == f"warning: {recipe}: {old} is now {new}\n"


@pytest.mark.parametrize(("method", "old", "value", "new"), OLD)
def test_an_old_key_of_a_saved_config_is_read_with_one_warning(
    method: str, old: str, value: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, today = (written(tmp_path / f"{key}.yaml", setting(method, key, value)) for key in (old, new))
    config = configs.load_saved(saved)
    assert config == configs.load_saved(today) == configs.load_saved(saved) == configs.load(str(today))
    assert capsys.readouterr().err == f"warning: {saved}: {old} is now {new}\n"


@pytest.mark.parametrize(("method", "old", "value", "new"), OLD)
def test_an_old_key_of_a_manifest_is_read_in_silence(
    method: str, old: str, value: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config.yaml beside it has warned."""
    text = value.replace("true", "True")
    config = configs.from_fixed({"method": method, old: text}, "the manifest")
    assert config == configs.from_fixed({"method": method, new: text}, "the manifest")
    assert config == configs.load(str(written(tmp_path / "today.yaml", setting(method, new, value))))
    assert capsys.readouterr() == ("", "")


def test_old_words_are_read_with_one_warning_each() -> None:
    """In a process of its own: a line is printed once, however often the word is read."""
    source = """
import contextlib, io, json, sys
from slope_cli.config import configs
for method, old, value, new in json.loads(sys.argv[1]):
    seen = io.StringIO()
    with contextlib.redirect_stderr(seen):
        config, again = (configs.load("gpt2-nano", [f"method={method}", f"{old}={value}"]) for _ in range(2))
    assert config == again == configs.load("gpt2-nano", [f"method={method}", f"{new}={value}"]), (method, old)
    assert config != configs.load("gpt2-nano", [f"method={method}"]), (method, old)
    assert seen.getvalue() == f"warning: {old} is now {new}\\n", seen.getvalue()
"""
    done = subprocess.run([sys.executable, "-P", "-c", source, json.dumps(OLD)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_old_keys_of_a_file_are_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path / "recipe.yaml", "sparsity: {renew_every: 3, skip: [c_fc]}\ntrain: {dtype: fp32}\n")
    configs.load(str(recipe))
    renamed = "sparsity.renew_every is now slope.mask_update_interval; sparsity.skip is now sparsity.exclude_modules"
    assert capsys.readouterr().err == f"warning: {recipe}: {renamed}; train.dtype is now train.precision\n"


@pytest.mark.parametrize(("method", "old", "new", "default"), NULLS)
def test_null_is_the_default(method: str, old: str, new: str, default: str, tmp_path: Path) -> None:
    null = written(tmp_path / "null.yaml", setting(method, old, "null"))
    expected = configs.load(str(written(tmp_path / "default.yaml", setting(method, new, default))))
    assert configs.load(str(null)) == configs.load_saved(null) == expected
    assert configs.from_fixed({"method": method, old: "None"}, "the manifest") == expected
    # Also where it takes back what was said before.
    other = written(tmp_path / "other.yaml", setting(method, new, "9" if default.isdigit() else "true"))
    assert configs.load(str(other)) != expected
    assert configs.load(str(other), [f"{old}=null"]) == expected


def test_null_of_a_key_that_has_a_value_today_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^slope.mask_update_interval=null: must be a whole number"):
        configs.load("gpt2-nano", ["slope.mask_update_interval=null"])


@pytest.mark.parametrize("method", METHODS)
def test_a_config_of_the_version_before_loads(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = OLD_CONFIG.replace("METHOD", method).replace("START", "0.5" if method == "wanda" else "0.0")
    saved = written(tmp_path / "config.yaml", text)
    empty = written(tmp_path / "empty.yaml", "")
    start = ["sparsity.start=0.5"] if method == "wanda" else []
    config = configs.load(str(empty), [f"method={method}", *start])
    assert configs.load_saved(saved) == config
    assert len(capsys.readouterr().err.splitlines()) == 1
    manifest = {key: str(value) for key, value in configs.flat(yaml.safe_load(text)).items()}
    assert configs.fixed(configs.from_fixed(manifest, "the manifest")) == configs.fixed(config)
    if method != "wanda":  # whose mask was not looked at
        assert configs.load(str(saved)) == config


def test_an_old_key_of_a_recipe_follows_the_method_that_was_chosen(tmp_path: Path) -> None:
    """As in the version before, where it was one key for all methods."""
    recipe = str(written(tmp_path / "recipe.yaml", "sparsity: {renew_every: 7, rescale: true, column_mask: random}\n"))
    assert configs.load(recipe, ["method=fst"]).fst.mask_update_interval == 7
    assert configs.load(recipe, ["method=sr_ste"]).sr_ste.mask_update_interval == 7
    empty = str(written(tmp_path / "empty.yaml", ""))
    assert configs.load(recipe, ["method=dense"]) == configs.load(empty, ["method=dense"])


def test_an_old_key_that_the_method_does_not_read_is_refused_as_today(tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yaml", "method: dense\nsparsity: {dense_finish: 0.5}\n")
    with pytest.raises(UsageError, match=r"fst.dense_finish: only method=fst reads this key, and the method is dense$"):
        configs.load(str(recipe))


def test_a_manifest_of_a_later_version_names_itself() -> None:
    with pytest.raises(UsageError, match=r"^the manifest: train.flux: unknown key; "):
        configs.from_fixed({"method": "slope", "train.flux": "1"}, "the manifest")
