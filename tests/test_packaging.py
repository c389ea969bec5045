"""The package as others get it: wheel, sdist, editable install and the Makefile."""

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import lora_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"lora_fast": ROOT / "lora_fast", "lora_fast.kernels": ROOT / "kernels"}
A_TABLE = "kernels/tables/of-no-gpu.json"
GENERATED = (".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", "*.so", ".*_cache")
# Python 3.12 and 3.13 warn without a filter, the oldest 3.10 and 3.11 have none.
SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
# One process builds the package once for all tests here.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Return what a command printed; fail with all of it if the command fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done.stdout


# What is built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the tree as a fresh clone has it, and a table of measured choices."""
    target = tmp_path_factory.mktemp("checkout") / "lora_fast"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*GENERATED))
    (target / A_TABLE).parent.mkdir(exist_ok=True)
    (target / A_TABLE).write_text("{}")
    return target


def build(kind: str, source: Path) -> Path:
    """Build as pip does with --no-build-isolation, in a process where torch can't be imported."""
    out = source.parent / kind
    script = f"""
import sys
sys.modules["torch"] = None
from setuptools import build_meta
build_meta.build_{kind}({str(out)!r})
"""
    out.mkdir()
    run(sys.executable, "-c", script, cwd=source, LORA_FAST_BUILD="none")
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(checkout) -> Path:
    return build("sdist", checkout)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The pure Python wheel, built from the unpacked sdist: so the sdist is complete."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, **SAFELY)
    (source,) = unpacked.iterdir()
    # What an earlier install from there has left, of a module that was deleted since.
    (source / "build" / "lib" / "lora_fast").mkdir(parents=True)
    (source / "build" / "lib" / "lora_fast" / "deleted.py").write_text("")
    return build("wheel", source)


@pytest.fixture(scope="module")
def wheel_names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel, wheel_names) -> Message:
    (name,) = (n for n in wheel_names if n.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(name))


@pytest.mark.slow
def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "kernels", "lora_fast", "tests", "bench")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".json", ".typed"}
        and "out" not in path.parts
    }
    wanted |= {A_TABLE, "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
    assert wanted - names == set()
    assert not {name for name in names if name.endswith((".so", ".pyc", ".o"))}


@pytest.mark.slow
def test_wheel_holds_every_module_and_no_general_name(wheel, wheel_names):
    assert wheel.name.endswith("-py3-none-any.whl")
    source = {
        f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for pattern in ("*.py", "*.json", "py.typed")
        for path in folder.rglob(pattern)
    }
    source.add(f"lora_fast/{A_TABLE}")
    assert {n for n in wheel_names if ".dist-info/" not in n} == source
    assert {name.partition("/")[0].partition("-")[0] for name in wheel_names} == {"lora_fast"}
    assert {"lora_fast/py.typed", "lora_fast/kernels/__init__.py"} <= wheel_names


@pytest.mark.slow
def test_metadata(metadata, wheel_names):
    assert metadata["Name"] == "lora_fast"
    assert metadata["License-Expression"] == "MIT"
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) >= {"test", "bench", "demo", "triton"}
    requirements = metadata.get_all("Requires-Dist")
    always = {re.split(r"[^\w-]", r)[0] for r in requirements if "extra ==" not in r}
    assert always == {"torch", "safetensors", "tqdm", "numpy", "platformdirs"}
    assert "torch>=2.10" in requirements
    (triton,) = (r for r in requirements if r.startswith("triton"))
    assert re.search(r"""platform_system == ['"]Linux['"]""", triton)


def test_build_requires_no_torch():
    (requires,) = re.findall(r"^requires = (.*)$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert [re.split(r"\W", name)[0] for name in ast.literal_eval(requires)] == ["setuptools"]


@pytest.mark.slow
def test_version_has_one_source(metadata):
    installed = importlib.metadata.version("lora_fast")
    assert metadata["Version"] == lora_fast.__version__ == installed, "reinstall: make setup"


# What is installed


@pytest.fixture
def environment(tmp_path) -> Path:
    """The Python of a new environment that sees this one's packages, lora_fast excepted.

    A plain path in a .pth file runs none of the .pth files there, such as an editable install's.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    borrowed = Path(run(python, "-c", site, cwd=tmp_path).strip()) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *arguments: str | Path, cwd: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(*pip, "install", *options, *arguments, cwd=cwd, LORA_FAST_BUILD="none")


WHERE = """
import importlib.util, lora_fast, lora_fast.kernels
print(lora_fast.__file__, lora_fast.kernels.__file__, importlib.util.find_spec("kernels"))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the paths of a POSIX environment")
def test_installed_wheel(environment, wheel, tmp_path):
    install(environment, wheel, cwd=tmp_path)
    package, kernels, plain = run(environment, "-c", WHERE, cwd=tmp_path).split()
    assert Path(package).is_relative_to(tmp_path / "venv")
    assert Path(kernels).parent == Path(package).parent / "kernels"
    assert plain == "None"
    assert (environment.parent / "lora-fast").is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the paths of a POSIX environment")
def test_editable_install(environment, checkout, tmp_path):
    install(environment, "--editable", checkout, cwd=tmp_path)
    package, kernels, plain = run(environment, "-c", WHERE, cwd=tmp_path).split()
    assert Path(package) == checkout / "lora_fast" / "__init__.py"
    assert Path(kernels) == checkout / "kernels" / "__init__.py"
    assert plain == "None"


# What is compiled

# A torch with CUDA as setup.py sees it, where an nvcc refuses everything.
BUILD_FOR_A_GPU = """
import os, runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", os.environ["CUDA_HOME"]
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


# Compiles whatever it is given as an empty file.
NVCC = """#!/bin/sh
while [ $# -gt 0 ]; do test "$1" = -o && out="$2"; shift; done
test -z "$out" || g++ -fPIC -x c++ -c /dev/null -o "$out"
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("failing", ["_C_cuda", "_C"])
def test_what_cannot_be_built_takes_nothing_else_with_it(checkout, tmp_path, failing):
    source = shutil.copytree(checkout, tmp_path / "source")
    for path in (source / "csrc").glob("*.cpp"):
        path.write_text("#error refused" if failing == "_C" else "")  # compiles soon
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC if failing == "_C" else "#!/bin/sh\necho refused >&2; exit 1\n")
    nvcc.chmod(0o755)
    libraries = tmp_path / "cuda" / "lib64"
    libraries.mkdir()
    for name in ("cudart", "c10_cuda", "torch_cuda"):  # none is here where torch is for CPUs
        target = libraries / f"lib{name}.so"
        subprocess.check_call(["g++", "-shared", "-x", "c++", "/dev/null", "-o", str(target)])
    stale = source / "lora_fast" / f"{failing}.abi3.so"
    stale.write_text("of other sources")
    said = run(
        *(sys.executable, "-c", BUILD_FOR_A_GPU),
        cwd=source,
        CUDA_HOME=str(tmp_path / "cuda"),
        TORCH_CUDA_ARCH_LIST="9.0",
        LORA_FAST_BUILD="auto",
    )
    (built,) = (source / "lora_fast").glob("*.so")  # and the stale one is gone
    other = "_C" if failing == "_C_cuda" else "_C_cuda"
    assert built.name.startswith(f"{other}.")
    assert f"lora_fast: lora_fast.{failing} was not compiled: " in said
    assert f"lora_fast.{other} was not" not in said


@pytest.mark.slow
def test_a_wheel_into_which_nothing_could_be_compiled_is_for_every_machine(checkout, tmp_path):
    source = shutil.copytree(checkout, tmp_path / "source")
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    missing = str(tmp_path / "no-compiler")
    said = run(
        *(sys.executable, "-c", script),
        cwd=source,
        **{"LORA_FAST_BUILD": "auto", "CC": missing, "CXX": missing},
    )
    assert "lora_fast: lora_fast._C was not compiled: " in said
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


# The tree


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("safe", ["", "1"])
def test_make_runs_a_borrowed_pytest(checkout, tmp_path, safe):
    """In an environment without a script of its own; the checkout stays off the path."""
    own = tmp_path / "venv"
    venv.create(own, symlinks=True)
    site = run(own / "bin" / "python", "-c", "import site; print(*site.getsitepackages())", cwd=own)
    (Path(site.split()[0]) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    (own / ".lora_fast-installed").touch()
    test = tmp_path / "test_path.py"
    test.write_text(
        "import os, sys\ndef test_path():\n    assert not {'', os.getcwd()} & set(sys.path)\n"
    )
    said = run(
        *("make", "test", f"VENV={own}", f"PYTEST_ARGS=-q -n 1 --noconftest {test}"),
        cwd=checkout,
        PYTHONSAFEPATH=safe,
    )
    assert "1 passed" in said


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_second_make_sets_up_nothing(checkout):
    make = ("make", "--no-print-directory", "-n", "test")
    assert "pip install" in run(*make, cwd=checkout)
    stamp = checkout / ".venv" / ".lora_fast-installed"
    stamp.parent.mkdir()
    stamp.touch()
    # As if set up an hour after the last change, then a change two hours later.
    newest = max(path.stat().st_mtime for path in checkout.rglob("*") if path.is_file())
    os.utime(stamp, (newest + 3600, newest + 3600))
    again = run(*make, cwd=checkout)
    assert "pytest" in again
    assert "pip install" not in again
    os.utime(checkout / "pyproject.toml", (newest + 7200, newest + 7200))
    assert "pip install" in run(*make, cwd=checkout)


# Stands for a Python: makes an environment with itself in it, and does anything else at once.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ] && [ ! -e "$(dirname "$0")/activate" ]; then exit 1; fi
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/bin/activate"
fi
"""


@pytest.fixture
def make(tmp_path):
    """Run make, without a word about folders, beside a Makefile where nothing is built."""
    tree = tmp_path / "tree"
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for folder in ("lora_fast", "kernels"):
        (tree / folder).mkdir()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return lambda *args: run("make", "--no-print-directory", f"PYTHON={python}", *args, cwd=tree)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_clean_deletes_the_environment_that_make_made(make, tmp_path):
    assert "making .venv with" in make("setup")
    environment = tmp_path / "tree" / ".venv"
    assert (environment / ".lora_fast-installed").is_file()
    make("clean")
    assert not environment.exists()
    make("clean")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("is_set_up", [False, True])
def test_clean_keeps_what_others_made(make, tmp_path, is_set_up):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "notes").write_text("")
    if is_set_up:
        make("setup", f"VENV={folder}")
        assert (folder / ".lora_fast-installed").is_file()
    assert f"keeping {folder}" in make("clean", f"VENV={folder}")
    assert (folder / "notes").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("folder", [".", "../tree"])
def test_clean_never_deletes_the_tree(make, tmp_path, folder):
    make("setup", f"VENV={folder}")
    make("clean", f"VENV={folder}")
    assert (tmp_path / "tree" / "Makefile").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_wheel_may_go_to_a_folder_with_a_space(make):
    assert "--outdir 'two words' ." in make("-n", "wheel", "DIST=two words").replace('"', "'")


def test_tree_names_no_path_of_one_machine():
    folders = re.compile("|".join(re.escape(f"/{name}/") for name in ("work", "root", "opt")))
    skipped = {".git", ".venv", "build", "dist", "__pycache__"}
    for path in ROOT.rglob("*"):
        parts = set(path.relative_to(ROOT).parts)
        if parts & skipped or any("cache" in part for part in parts) or not path.is_file():
            continue
        if path.suffix in {".md", ".py", ".toml", ".txt", ".yaml", ".yml", ".cpp", ".cu", ".h"}:
            found = folders.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)} names {found and found.group()}"
