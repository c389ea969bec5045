"""Files as the system has them: who may read them, and what it refuses."""

import errno
import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lora_fast as lora
from lora_fast.files import written_whole
from lora_fast.testing import randomize_

NAMES = ["a.safetensors", "a.pt"]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a POSIX system's permissions")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def model() -> nn.Module:
    return randomize_(lora.Linear(64, 64, r=4))


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_file_is_as_open_as_the_umask_allows(
    name: str, umask: int, model: nn.Module, tmp_path: Path
) -> None:
    lora.save(model, tmp_path / name)
    assert mode(tmp_path / name) == 0o666 & ~umask


@pytest.mark.parametrize("before", [0o600, 0o640, 0o644, 0o666, 0o444], ids=oct)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_keeps_its_permissions(
    name: str, before: int, model: nn.Module, tmp_path: Path
) -> None:
    lora.save(model, tmp_path / name)
    (tmp_path / name).chmod(before)
    lora.save(model, tmp_path / name)
    assert mode(tmp_path / name) == before
    assert os.listdir(tmp_path) == [name]


def test_what_is_written_is_never_more_open_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    file.chmod(0o600)
    with written_whole(file) as part:
        assert mode(part) == 0o600
        part.write_text("new")
    assert (file.read_text(), mode(file)) == ("new", 0o600)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_as_long_as_the_system_takes(name: str, model: nn.Module, tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    file = tmp_path / name.rjust(longest, "x")
    lora.save(model, file)
    lora.load(model, file)
    longer = tmp_path / name.rjust(longest + 1, "x")
    with pytest.raises(OSError) as caught:
        lora.save(model, longer)
    assert (caught.value.errno, caught.value.filename) == (errno.ENAMETOOLONG, str(longer))
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_an_error_of_the_system(name: str, model: nn.Module, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails halfway."""
    import resource

    file = tmp_path / name
    lora.save(model, file)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
        with pytest.raises(OSError) as caught:
            lora.save(model, file, lora_only=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_cannot_be_written_to(
    name: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any user: to root nothing is refused, so the system's answer is put in its place."""
    system = os.open

    def refused(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and Path(path).parent == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return system(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path / name))):
        lora.save(model, tmp_path / name)


def test_an_error_of_the_writer_is_its_own(tmp_path: Path) -> None:
    for error in (RuntimeError("no such thing"), ValueError("bad"), FileNotFoundError(2, "", "b")):
        with pytest.raises(type(error)) as caught, written_whole(tmp_path / "a"):
            raise error
        assert caught.value is error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_read_says_so_in_the_systems_words(
    name: str, model: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path / name))):
        lora.load(model, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing"):
        lora.load(model, tmp_path / f"missing{name}")
    lora.save(model, tmp_path / f"closed{name}")
    (tmp_path / f"closed{name}").chmod(0o000)
    if not os.access(tmp_path / f"closed{name}", os.R_OK):  # root may read it
        with pytest.raises(PermissionError, match="closed"):
            lora.load(model, tmp_path / f"closed{name}")
