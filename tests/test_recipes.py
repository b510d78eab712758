"""Every recipe in the package describes a run that fits together, and its header says what it is."""

import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import pytest
from support.runs import slope

from slope_cli.config import configs
from slope_cli.methods import phases_of
from slope_cli.models.shapes import SHAPES

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
    assert slope("recipes", "--copy", "gpt2-small", copy) == (0, "", "")
    assert configs.load(str(copy)) == configs.load("gpt2-small")
    again = slope("recipes", "gpt2-small", "--copy", copy)
    assert again == (2, "", f"error: {copy}: already exists; choose another file\n")


@pytest.mark.parametrize("words", [("--copy",), ("--copy", "mine.yaml"), ("gpt2-small", "mine.yaml")])
def test_a_copy_needs_a_recipe_and_a_file(words: tuple[str, ...]) -> None:
    code, out, err = slope("recipes", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: to copy a recipe: slope recipes --copy NAME FILE")


def scripts() -> dict[str, str]:
    """The SLURM scripts of the package, by name."""
    files = (resources.files("slope_cli.recipes") / "slurm").iterdir()
    return {file.name: file.read_text() for file in files if file.name.endswith(".sbatch")}


def test_slurm_scripts_are_shell_within_the_line_length() -> None:
    assert sorted(scripts()) == ["compare.sbatch", "linearize.sbatch", "prepare.sbatch", "pretrain.sbatch"]
    for text in scripts().values():
        assert text.startswith("#!/bin/bash\n")
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
        assert max(map(len, text.splitlines())) <= 120


def test_slurm_scripts_handle_stops_alike() -> None:
    """The same lead, log and requeue, though sbatch gives a script no way to share them."""
    ends = {text[text.index("code=$?") :] for text in scripts().values()}
    options = {
        tuple(re.findall(r"^#SBATCH --(?:signal|requeue|open|output).*", text, re.M)) for text in scripts().values()
    }
    assert (len(ends), len(options)) == (1, 1)


class Ran(NamedTuple):
    """What a script did, and the words of the commands that it started."""

    code: int
    err: str
    srun: list[str]
    requeued: bool


def run_script(name: str, folder: Path, code: int = 0, scontrol: int = 0, **variables: str) -> Ran:
    """Run a script as a batch job whose srun and scontrol end with these codes."""
    for command, end in (("srun", code), ("scontrol", scontrol)):
        log = folder / command
        stub = folder / "bin" / command
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(
            f'#!/bin/bash\nprintf "%s\\n" "$@" > {log}\n[ -z "$SLURM_CPUS_PER_GPU" ] || exit 9\nexit {end}\n'
        )
        stub.chmod(0o755)
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **variables}
    words = ["bash", "-s", "--", "gpt2-small", "a b"]
    done = subprocess.run(words, input=scripts()[name], text=True, capture_output=True, env=environment)
    asked = folder / "scontrol"
    requeued = asked.is_file() and asked.read_text().split() == ["requeue", "7"]
    return Ran(done.returncode, done.stderr, (folder / "srun").read_text().splitlines(), requeued)


@pytest.mark.parametrize("name", scripts())
@pytest.mark.parametrize("code", [0, 1, 2, 75, 137, 143])
def test_only_a_stop_requeues_a_job(name: str, code: int, tmp_path: Path) -> None:
    ran = run_script(name, tmp_path, code)
    assert (ran.code, ran.err, ran.requeued) == (code, "", code == 75)
    assert ran.srun[-2:] == ["gpt2-small", "a b"]


@pytest.mark.parametrize("name", scripts())
def test_a_requeue_that_fails_is_said(name: str, tmp_path: Path) -> None:
    ran = run_script(name, tmp_path, 75, scontrol=1)
    assert ran.code == 75
    assert ran.err == "job 7 stopped and can go on, but was not requeued: submit the same command again\n"


@pytest.mark.parametrize("name", ["pretrain", "linearize"])
def test_a_task_for_each_gpu(name: str, tmp_path: Path) -> None:
    ran = run_script(f"{name}.sbatch", tmp_path, SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_GPU="6")
    options = ["--ntasks-per-node=8", "--cpus-per-task=6", "--kill-on-bad-exit=1"]
    assert ran.srun == [*options, "slope", name, "gpt2-small", "a b"]


@pytest.mark.parametrize("name", ["compare", "prepare"])
def test_a_task_of_an_array_does_its_share(name: str, tmp_path: Path) -> None:
    ran = run_script(f"{name}.sbatch", tmp_path, SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_COUNT="6")
    assert ran.srun[-4:] == ["gpt2-small", "a b", "--shard", "2/6"]
