"""Use an installed lora_fast as a stranger would, away from the repository.

    cd /elsewhere && VENV/bin/python CHECKOUT/.ci/smoke.py

It trains, merges, restores, saves and loads one layer, and checks that what it imported is the
installation and not a checkout.
"""

import importlib.metadata
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import lora_fast as lora


def check(condition: bool, what: str) -> None:
    """End the run with `what` unless `condition` holds."""
    if not condition:
        sys.exit(f"smoke test failed: {what}")


def check_installation() -> None:
    """The package lies in this environment, whole, and brought nothing with a general name."""
    site = Path(lora.__file__).resolve().parents[1]
    check(site.is_relative_to(Path(sys.prefix).resolve()), f"imported from {site}")
    check("triton" not in sys.modules, "import lora_fast imported triton")
    check(not torch.cuda.is_initialized(), "import lora_fast initialised CUDA")
    version = importlib.metadata.version("lora_fast")
    check(version == lora.__version__, f"metadata says {version}, package {lora.__version__}")
    kernels = importlib.util.find_spec("lora_fast.kernels")
    check(kernels is not None, "lora_fast.kernels is missing")
    for name in ("kernels", "csrc", "tests", "bench"):
        check(not (site / name).exists(), f"site-packages has a plain {name}/")
    check((site / "lora_fast" / "py.typed").is_file(), "py.typed is missing")


def check_layer() -> None:
    """One layer through its life: train, merge, restore, save, load."""
    torch.manual_seed(0)
    layer = lora.Linear(32, 16, r=4, lora_alpha=8)
    lora.mark_only_lora_as_trainable(layer)
    base = layer.weight.detach().clone()
    x, target = torch.randn(64, 32), torch.randn(64, 16)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(50):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    check(losses[-1] < 0.8 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    trained = layer(x).detach()
    layer.eval()
    check(not torch.equal(layer.weight, base), "eval() did not merge")
    torch.testing.assert_close(layer(x).detach(), trained, rtol=1e-4, atol=1e-4)
    layer.train()
    check(torch.equal(layer.weight, base), "train() did not restore the base weight's bits")

    other = lora.Linear(32, 16, r=4, lora_alpha=8)
    other.load_state_dict({"weight": base, "bias": layer.bias.detach()}, strict=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.pt"
        torch.save(lora.lora_state_dict(layer), path)
        other.load_state_dict(torch.load(path), strict=False)
    check(torch.equal(other(x).detach(), trained), "the loaded adapter gives another output")


if __name__ == "__main__":
    check_installation()
    check_layer()
    built = importlib.util.find_spec("lora_fast._C") is not None
    print(
        f"smoke test passed: lora_fast {lora.__version__}, torch {torch.__version__}, _C: {built}"
    )
