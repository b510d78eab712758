"""Every recipe in the package describes a run that fits together, and its header says what it is."""

import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from support.runs import slope

from slope_cli.config import configs
from slope_cli.methods import phases_of
from slope_cli.models.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = configs.recipe_names()


def test_every_shape_has_a_recipe() -> None:
    assert {configs.load(name).model.name for name in RECIPES} == set(SHAPES)


def test_no_recipe_has_a_key_of_an_older_version() -> None:
    """In a process of its own, since a warning is printed once."""
    source = "from slope_cli.config import configs\nfor name in configs.recipe_names(): print(configs.load(name))"
    done = subprocess.run([sys.executable, "-P", "-c", source], capture_output=True, text=True, check=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (len(RECIPES), "")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_shows_a_config_that_loads_back(name: str, tmp_path: Path) -> None:
    result = slope("pretrain", name, "--dry-run")
    assert (result.code, result.err) == (0, "")
    shown = tmp_path / "shown.yaml"
    shown.write_text(result.out)
    assert configs.load(str(shown)) == configs.load(name)
    assert "# training state " in result.out


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_names_hardware_time_tokens_and_loss(name: str) -> None:
    header = "".join(line for line in configs.recipe_text(name).splitlines(keepends=True) if line.startswith("#"))
    assert "Hardware: " in header
    assert "loss" in header
    assert re.search(r"\btime\b|\bminutes?\b|\bseconds?\b|\bhours?\b", header, re.IGNORECASE)
    billions = re.search(r"Tokens: ([\d.]+) (million|billion) \(([\d,]+) steps", header)
    assert billions, header
    # The demonstration's model brings its sequences.
    sizes = configs.load("gpt2-nano").train if name == "linearize" else configs.load(name).train
    train = configs.load(name).train
    tokens = float(billions[1]) * {"million": 1e6, "billion": 1e9}[billions[2]]
    assert int(billions[3].replace(",", "")) == train.steps
    assert train.steps * sizes.tokens_per_step == pytest.approx(tokens, rel=0.03)


@pytest.mark.parametrize("name", [name for name in RECIPES if re.fullmatch(r"linearize-.*b", name)])
def test_large_models_are_linearized_with_the_published_settings(name: str) -> None:
    config = configs.load(name)
    assert config.method == "linearize"
    assert (config.linearize.window, config.linearize.feature_map, config.linearize.features) == (64, "hedgehog", None)
    assert (config.linearize.transfer_lr, config.optim.lr, config.optim.weight_decay) == (1e-2, 1e-4, 0.0)
    assert (config.adapters.rank, config.adapters.alpha, config.linearize.targets) == (8, 16, ["q", "k", "v", "o"])
    assert (config.train.seq_len, config.train.tokens_per_step) == (1024, 8 * 1024)
    step = phases_of(config).adapter_step
    assert step is not None
    assert step * config.train.tokens_per_step == pytest.approx(20e6, rel=1e-3)


def test_the_70b_recipe_has_that_many_parameters() -> None:
    record = json.loads(slope("pretrain", "linearize-llama3-70b", "--dry-run", "--json").out)
    assert record["account"]["frozen_parameters"] == pytest.approx(70.55e9, rel=1e-3)
    assert record["attention"]["linear_layers"] == 80


def test_a_dry_run_keeps_the_order_of_the_layers_and_joins_only_neighbours() -> None:
    out = slope("pretrain", "gpt2-nano", "sparsity.exclude_modules=['h\\.2\\.mlp\\.c_fc']", "--dry-run").out
    table = [line.split() for line in out.splitlines() if line.startswith("# transformer.h.")]
    layers = [(row[1].removeprefix("transformer.h.*."), row[2], row[5]) for row in table]
    assert layers == [
        ("attn.c_attn", "0", "dense:"),
        ("attn.c_attn", "1-3", "sparse"),
        ("attn.c_proj", "0-3", "sparse"),
        ("mlp.c_fc", "0-1", "sparse"),
        ("mlp.c_fc", "2", "dense:"),
        ("mlp.c_fc", "3", "sparse"),
        ("mlp.c_proj", "0-3", "sparse"),
    ]


def test_a_dry_run_as_json() -> None:
    record = json.loads(slope("pretrain", "opt-66b", "--dry-run", "--json").out)
    assert record["config"]["model"]["name"] == "opt-66b"
    assert len(record["layers"]) == 385
    assert 65e9 < record["account"]["dense_parameters"] < 67e9


def test_a_dry_run_of_a_dense_run() -> None:
    out = slope("pretrain", "method=dense", "--dry-run").out
    assert "# linear layers: all dense" in out
    assert "1.000 of the dense run's" in out
    assert "adapters with their state" not in out


def test_recipes_are_listed_printed_and_copied(tmp_path: Path) -> None:
    listed = slope("recipes").out.splitlines()
    assert [line.split()[0] for line in listed] == RECIPES
    assert all(len(line.split()) > 5 for line in listed)
    assert slope("recipes", "gpt2-small").out == configs.recipe_text("gpt2-small")
    copy = tmp_path / "mine.yaml"
    assert slope("recipes", "gpt2-small", "--copy", copy) == (0, "", "")
    assert configs.load(str(copy)) == configs.load("gpt2-small")
    again = slope("recipes", "gpt2-small", "--copy", copy)
    assert again == (2, "", f"error: {copy}: already exists; choose another file\n")


def test_slurm_scripts_are_shell() -> None:
    scripts = [f for f in (resources.files("slope_cli.recipes") / "slurm").iterdir() if f.name.endswith(".sbatch")]
    assert scripts
    for script in scripts:
        text = script.read_text()
        assert text.startswith("#!/bin/bash\n")
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
        assert "scontrol requeue" in text
