import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for each_layer

from each_layer import LAYERS

from lora_fast.testing import randomize_


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest, backend: str) -> Any:
    """A layer whose adapter does something."""
    return randomize_(LAYERS[request.param]())
