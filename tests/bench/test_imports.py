"""Who imports whom in bench/: scripts stand on `peers`, those on `harness`, none goes back."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
MODULES = {
    ".".join(path.relative_to(BENCH).with_suffix("").parts): path for path in BENCH.rglob("*.py")
}


def imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def test_modules_import_each_other_in_one_direction():
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()  # names a cycle


def test_each_folder_stands_on_those_below_it():
    for folder, below in (("harness", {"harness"}), ("peers", {"peers", "harness"})):
        names = [name for name in MODULES if name.startswith(f"{folder}.")]
        brought = {target.partition(".")[0] for name in names for target in imports(name)}
        assert brought == below
