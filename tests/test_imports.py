"""Modules import one another one way, local imports included."""

import ast
import configparser
import importlib.util
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parent.parent
NAMES = {"benchmarks": "slope_cli.benchmarks", "recipes": "slope_cli.recipes"}  # as an installed wheel has it


def test_no_module_imports_itself_by_way_of_others() -> None:
    files = [
        file for folder in ("slope_cli", "sparse_kernels", "benchmarks") for file in ROOT.glob(f"{folder}/**/*.py")
    ]
    parts = {file: file.relative_to(ROOT).with_suffix("").parts for file in files}
    modules = {".".join([NAMES.get(p[0], p[0]), *p[1:]]).removesuffix(".__init__"): file for file, p in parts.items()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, file in modules.items():
        nodes = [ast.parse(file.read_text())]
        for node in nodes:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            nodes += ast.iter_child_nodes(node)
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & modules.keys()
            elif isinstance(node, ast.ImportFrom):
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                found = {f"{source}.{alias.name}" for alias in node.names} & modules.keys()
                graph[name] |= found or {source} & modules.keys()
    assert sum(map(len, graph.values())) > 300
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


TORCH_FREE = ("cli", "commands", "doctor", "errors", "config", "data", "distributed.signals", "report", "utils")
"""What every command imports before it knows whether it needs torch, and what spawned workers import."""


def test_what_every_command_and_every_worker_imports_is_free_of_torch() -> None:
    files = [file for name in TORCH_FREE for file in (ROOT / "slope_cli").glob(f"{name.replace('.', '/')}*")]
    files = [module for file in files for module in (file.glob("*.py") if file.is_dir() else [file])]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert len(names) > 20
    code = f"import sys, {', '.join(names)}; print(*{{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_wheel_has_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    found = find_packages(str(ROOT), exclude=["tests*"])
    assert sorted(listed) == sorted(NAMES.get(name, name) for name in found)
