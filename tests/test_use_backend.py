"""Who chooses the implementation, and for how long."""

from collections.abc import Iterator
from typing import Any

import pytest

import lora_fast


@pytest.fixture(autouse=True)
def auto() -> Iterator[None]:
    """Every test begins with the default, and the next file with what it was before."""
    with lora_fast.use_backend("auto"):
        yield


@pytest.mark.parametrize("name", ["auto", "triton", "reference"])
def test_set_backend(name: str) -> None:
    assert lora_fast.set_backend(name) is None
    assert lora_fast.get_backend() == name


@pytest.mark.parametrize("name", ["", "TRITON", "cuda", "eager", "compiled", None, 3])
@pytest.mark.parametrize("how", ["set", "use"])
def test_unknown_names_are_refused(how: str, name: Any) -> None:
    lora_fast.set_backend("reference")
    choose = lora_fast.set_backend if how == "set" else lora_fast.use_backend(name).__enter__
    with pytest.raises(ValueError) as caught:
        choose(*[name] if how == "set" else [])
    assert str(caught.value) == f"backend must be one of auto, triton, reference, got {name!r}"
    assert lora_fast.get_backend() == "reference"


def test_use_backend_nests() -> None:
    with lora_fast.use_backend("reference"):
        with lora_fast.use_backend("triton"):
            with lora_fast.use_backend("auto"):
                assert lora_fast.get_backend() == "auto"
            assert lora_fast.get_backend() == "triton"
        assert lora_fast.get_backend() == "reference"
    assert lora_fast.get_backend() == "auto"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_use_backend_goes_back_after_an_exception(error: type[BaseException]) -> None:
    with pytest.raises(error), lora_fast.use_backend("reference"):
        raise error
    assert lora_fast.get_backend() == "auto"


def test_use_backend_goes_back_over_a_choice_made_inside() -> None:
    with lora_fast.use_backend("reference"):
        lora_fast.set_backend("triton")
    assert lora_fast.get_backend() == "auto"


def test_use_backend_decorates_functions() -> None:
    @lora_fast.use_backend("reference")
    def inside() -> str:
        return lora_fast.get_backend()

    assert [inside(), inside(), lora_fast.get_backend()] == ["reference", "reference", "auto"]
