"""The product for Hopper, where the Triton that is here compiles it."""

import logging

import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from lora_fast.kernels.configs import GemmConfig

_log = logging.getLogger("lora_fast.dispatch")
_refused: set[GemmConfig] = set()


def specialised_product(*operands: Tensor, config: GemmConfig, **options: object) -> bool:
    """Run `lora_gemm_hopper`; False where the Triton that is here can't compile it.

    Gluon is experimental: its names and rules change from one Triton to the next.
    """
    if _refused and config in _refused:
        return False
    try:
        from lora_fast.kernels.lora_gemm_hopper import lora_gemm_hopper  # Gluon, for it alone

        lora_gemm_hopper(*operands, config=config, **options)
    except (ImportError, AttributeError, CompilationError, OutOfResources, PTXASError) as error:
        _refuse(config, error)
        return False
    except RuntimeError as error:
        if not any(word in str(error) for word in ("parsing", "PassManager")):
            raise  # not the compiler's
        _refuse(config, error)
        return False
    return True


def _refuse(config: GemmConfig, error: Exception) -> None:
    _refused.add(config)
    _log.warning(
        "Triton %s does not compile the product for Hopper (%s: %s); the one for all chips, which "
        "takes a few percent longer, serves in the place of %s",
        *(triton.__version__, type(error).__name__, str(error).strip().partition("\n")[0], config),
    )
