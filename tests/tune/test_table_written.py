"""The file of a table is there whole or as it was, with the permissions that it had."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

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
