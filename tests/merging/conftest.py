import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for each_layer

from each_layer import LAYERS

import lora_fast as lora
from lora_fast.testing import randomize_


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    """With the native merge, and with the one that keeps a copy."""
    with lora.use_backend(request.param):
        yield request.param


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest, backend: str) -> Any:
    """A layer whose adapter does something."""
    return randomize_(LAYERS[request.param]())
