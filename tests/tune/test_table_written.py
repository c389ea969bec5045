"""The file of a table is there whole or as it was, where its path or a link leads."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lora_fast.commands import BadInputError
from lora_fast.kernels import tables
from lora_fast.tune import run, search

needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="the kernels need a GPU or Triton's interpreter",
)


@needs_kernels
def test_a_write_that_fails_leaves_the_old_table(
    kernel_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    run._Target(kernel_device, path).write(search.Found())
    path.chmod(0o640)
    before = path.read_bytes()

    def full_disk(self: Path, *args: Any, **kwargs: Any) -> None:
        self.write_bytes(b'{"format"')
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="no space"):
            run._Target(kernel_device, path).write(search.Found())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    run._Target(kernel_device, path).write(search.Found())
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_folder_that_is_not_there_yet_hides_nothing(
    kernel_device: torch.device, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes")
    with pytest.raises(BadInputError, match=r"^--out: expected a new file or a table"):
        run._Target(kernel_device, tmp_path / "new" / ".." / notes.name)
    assert notes.read_text() == "my notes"
    assert list(tmp_path.iterdir()) == [notes]


def test_a_link_is_followed(kernel_device: torch.device, tmp_path: Path) -> None:
    link, path = tmp_path / "link.json", tmp_path / "folder" / "table.json"
    link.symlink_to(path)
    for _ in range(2):  # a new file, then one that is there
        target = run._Target(kernel_device, link)
        assert target.write(search.Found()) == f"written: {path}, 0 rows"
        assert link.is_symlink()
        assert tables.read(link).machine == target.machine


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
@pytest.mark.parametrize("argument", ["--out", "LORA_FAST_CACHE"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_file_is_neither_read_nor_replaced(
    kind: str, argument: str, kernel_device: torch.device, tmp_path: Path
) -> None:
    out = tmp_path / "table.json" if argument == "--out" else None
    path = run._Target(kernel_device, out).path
    if kind == "folder":
        path.mkdir()
    else:
        there = path if kind == "pipe" else tmp_path / "pipe"
        os.mkfifo(there)
        if kind == "link":
            path.symlink_to(there)
    before = path.lstat()
    with pytest.raises(BadInputError, match=rf"^{argument}: .* is no file but a folder, a device"):
        run._Target(kernel_device, out)
    assert path.lstat() == before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files have no paths")
def test_an_open_pipe_is_no_file(kernel_device: torch.device, tmp_path: Path) -> None:
    """As `--out /dev/stdout`, whose link leads to no path."""
    ends = os.pipe()
    (tmp_path / "link").symlink_to(f"/proc/self/fd/{ends[1]}")
    try:
        with pytest.raises(BadInputError, match=r"^--out: .* is no file but a folder, a device"):
            run._Target(kernel_device, tmp_path / "link")
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.parametrize("name", ["link", "n" * 300], ids=["a loop", "too long"])
def test_a_path_that_leads_nowhere(name: str, kernel_device: torch.device, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(BadInputError, match=r"^--out: expected a new file or a table"):
        run._Target(kernel_device, tmp_path / name)
