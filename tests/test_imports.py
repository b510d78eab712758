"""Modules import one another one way, local imports included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = {"benchmarks": "slope_cli.benchmarks"}  # as an installed wheel has it


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
                found = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                graph[name] |= found or {str(node.module)} & modules.keys()
    assert sum(map(len, graph.values())) > 300
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
