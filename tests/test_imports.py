"""Who imports whom: one direction, nothing optional, and what a star brings along."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import loralib
import pytest

import lora_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"lora_fast": ROOT / "lora_fast", "lora_fast.kernels": ROOT / "kernels"}


def modules() -> dict[str, Path]:
    """Every module of the package with its file."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, *, lazy: bool = True) -> set[str]:
    """Return what a module imports; without `lazy`, only what its own import brings."""
    return {
        f"{target}.{alias}" if f"{target}.{alias}" in MODULES else target
        for target, alias in _import_statements(ast.parse(MODULES[name].read_text()), lazy)
    }


def _import_statements(node: ast.AST, lazy: bool) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports in this package are absolute"
            yield from ((child.module or "", alias.name) for alias in child.names)
        elif lazy or not isinstance(child, ast.FunctionDef):
            yield from _import_statements(child, lazy)


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "lora_fast"}


def test_modules_import_each_other_in_one_direction():
    graph = {name: ours(imports(name, lazy=False)) - {"lora_fast"} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError and names the cycle


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("lora_fast.kernels")))
def test_kernels_know_nothing_of_the_rest(name):
    assert all(target.startswith("lora_fast.kernels.") for target in ours(imports(name)))


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("blocks", set()),
        ("autocast", {"torch_internals"}),
        ("reference", {"autocast", "blocks"}),
        ("testing", {"checks"}),
        ("decisions", {"backend", "ops"}),
        ("selftest", {"backend", "commands", "decisions", "functional", "reference", "testing"}),
        ("commands", set()),
        ("torch_internals", set()),
        (
            "functional",
            {"autograd", "autograd_embedding", "autograd_weight"}
            | {"backend", "checks", "eager", "lora_first", "merging", "reference", "shapes"},
        ),
        (
            "merging",
            {"backend", "blocks", "checks", "native", "ops", "record", "reference", "shapes"}
            | {"sharded", "sums", "torch_internals", "versions"},
        ),
        ("native", {"ops", "record", "reference", "torch_internals"}),
        ("versions", {"torch_internals"}),
        (
            "eager",
            {"autocast", "blocks", "delta", "dropout", "products", "reference"}
            | {"torch_internals"},
        ),
        ("delta", {"blocks", "ops", "products", "torch_internals"}),
        ("products", {"torch_internals"}),
        ("lora_first", {"autocast", "checks", "dropout", "eager", "products", "torch_internals"}),
        ("sums", {"autocast", "reference"}),
        ("dropout", {"interrupts", "ops"}),
        ("scripting", set()),
        ("checks", {"torch_internals"}),
        ("shapes", {"blocks", "checks"}),
    ],
)
def test_import_arrows(name, allowed):
    assert ours(imports(f"lora_fast.{name}")) == {f"lora_fast.{target}" for target in allowed}


def test_only_ops_names_the_native_part():
    naming = [
        n for n, path in MODULES.items() if re.search(r"(?<!torch\.)\b_C\b", path.read_text())
    ]
    assert naming == ["lora_fast.ops"]


@pytest.mark.parametrize("name", ["layers", "conv", "lora_layer"])
def test_layers_know_no_implementation(name):
    """They reach it through `functional`; the reference serves what only they can be asked for."""
    names = {"autograd", "delta", "eager", "lora_first", "ops", "native", "dropout", "products"}
    assert not ours(imports(f"lora_fast.{name}")) & {f"lora_fast.{other}" for other in names}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_optional_packages_are_imported_where_they_are_used(name):
    now = {target.partition(".")[0] for target in imports(name, lazy=False)}
    assert not now & {"loralib", "matplotlib", "onnx", "peft", "pytest", "transformers"}
    if not name.startswith("lora_fast.kernels"):
        assert "triton" not in now
        assert not any(
            target.startswith("lora_fast.kernels") for target in imports(name, lazy=False)
        )


def test_import_brings_no_triton_and_asks_no_gpu():
    script = """
import sys, torch

def refuse(*args):
    raise AssertionError("import lora_fast asked for the GPU")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = refuse
torch._C._cuda_init = torch._C._cuda_getDeviceCount = refuse
before = set(sys.modules)
import lora_fast
import lora_fast.layers, lora_fast.utils
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(brought & {"triton", "loralib", "matplotlib", "transformers", "peft", "onnx"}))
"""
    # From elsewhere: in the checkout, kernels/ would be found as a package of that name.
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT.parent, text=True)
    assert printed.strip() == "[]"


@pytest.mark.parametrize("module", ["", ".layers", ".utils"])
def test_a_star_brings_along_what_it_brings_of_loralib(module: str) -> None:
    ours, theirs = {}, {}
    exec(f"from lora_fast{module} import *", ours)
    exec(f"from loralib{module} import *", theirs)
    assert set(theirs) <= set(ours)


def test_dir_lists_what_is_public() -> None:
    listed = dir(lora_fast)
    assert {name for name in listed if not name.startswith("__")} == set(lora_fast.__all__)
    assert {"__all__", "__doc__", "__name__", "__version__"} <= set(listed)
    assert set(dir(loralib)) <= set(listed)
    assert all(hasattr(lora_fast, name) for name in listed)
