"""The container and conda files of docs/install: what they copy exists and suffices, and they agree with setup.cfg."""

import configparser
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import slope_cli

ROOT = Path(__file__).parent.parent
INSTALL = ROOT / "docs" / "install"
DOCKERFILE = (INSTALL / "Dockerfile").read_text()
DEFINITION = (INSTALL / "slope.def").read_text()
CONDA = yaml.safe_load((INSTALL / "environment.yml").read_text())

setup = configparser.ConfigParser()
setup.read(ROOT / "setup.cfg")


def copied_by_docker() -> list[str]:
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def copied_by_apptainer() -> list[str]:
    (section,) = re.findall(r"^%files\n((?: {4}.+\n)+)", DEFINITION, re.MULTILINE)
    return [line.split()[0] for line in section.splitlines()]


def pip_lines() -> list[str]:
    (own,) = (each["pip"] for each in CONDA["dependencies"] if isinstance(each, dict))
    return list(own)


def extras(text: str) -> set[str]:
    return set(text.split(","))


def test_what_is_copied_exists_and_is_the_same_in_both() -> None:
    assert sorted(copied_by_docker()) == sorted(copied_by_apptainer())
    assert [name for name in copied_by_docker() if not (ROOT / name).exists()] == []


def test_what_is_copied_holds_all_packages_and_what_the_build_reads() -> None:
    needed = {package.split(".")[0] for package in setup["options"]["packages"].split()}
    needed |= {line.split("=")[1].strip() for line in setup["options"]["package_dir"].strip().splitlines()}
    needed |= {"pyproject.toml", "setup.cfg", setup["metadata"]["license_files"], "constraints.txt"}
    needed.add(setup["metadata"]["long_description"].removeprefix("file:").strip())
    assert needed == set(copied_by_docker())


def test_the_build_context_is_what_is_copied() -> None:
    """The last pattern of Dockerfile.dockerignore that fits a path decides."""
    lines = (INSTALL / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]

    def sent(path: str) -> bool:
        fitting = [p for p in patterns if fnmatch.fnmatch(path, p.removeprefix("!").replace("**/", "*"))]
        return not fitting or fitting[-1].startswith("!")

    tracked = {path.name for path in ROOT.iterdir()}
    assert {name for name in tracked | {".venv", "runs", "dist"} if sent(name)} == set(copied_by_docker())
    assert not sent("slope_cli/__pycache__")


def test_versions_and_extras_are_those_of_setup_cfg() -> None:
    (conda_python,) = (each for each in CONDA["dependencies"] if str(each).startswith("python="))
    pythons = re.findall(r"^FROM python:([\d.]+)-slim", DOCKERFILE, re.MULTILINE)
    pythons += re.findall(r"^From: python:([\d.]+)-slim$", DEFINITION, re.MULTILINE)
    pythons.append(conda_python.partition("=")[2])
    assert len(pythons) == 4
    assert len(set(pythons)) == 1
    assert f"Python :: {pythons[0]}\n" in setup["metadata"]["classifiers"] + "\n"
    constraint, project = pip_lines()
    named = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.MULTILINE) + re.findall(r'"\.\[(.+)\]"', DEFINITION)
    named.append(project.partition("[")[2].rstrip("]"))
    assert len(named) == 3
    assert all(extras(each) <= set(setup["options.extras_require"]) for each in named)
    assert len({frozenset(extras(each)) for each in named}) == 1
    assert (INSTALL / constraint.removeprefix("--constraint ")).resolve() == ROOT / "constraints.txt"
    assert (INSTALL / project.partition("[")[0]).resolve() == ROOT


def test_the_pages_and_the_heads_of_the_files_name_files_that_exist() -> None:
    text = (
        (ROOT / "docs" / "start.md").read_text() + DOCKERFILE + DEFINITION + (INSTALL / "environment.yml").read_text()
    )
    named = set(re.findall(r"docs/install/[\w.]+", text))
    assert named == {"docs/install/Dockerfile", "docs/install/slope.def", "docs/install/environment.yml"}
    assert all((ROOT / name).is_file() for name in named)
    wheels = re.findall(r"slope_cli-([\d.]+)-py3-none-any\.whl", text)
    assert wheels == [slope_cli.__version__]


@pytest.mark.slow
def test_a_wheel_of_what_is_copied_works(tmp_path: Path) -> None:
    """Built as the Dockerfile does, and installed away from the clone: recipes, benchmarks and texts are in it."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in copied_by_docker():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.meta_path[:] = [f for f in sys.meta_path"
        " if 'ditable' not in repr(f)]\nimport slope_cli.cli as cli, slope_cli.benchmarks.render as render\n"
        "print(cli.__file__, render.__file__, flush=True)\nsys.argv[0] = 'slope'; cli.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for words in (["recipes"], ["pretrain", "train.steps=1", "--out", "run"]):
        command = [sys.executable, "-P", "-c", code, site, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0].count(str(site)) == 2
