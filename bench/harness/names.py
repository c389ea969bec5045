"""The names that several modules share: of the peers, a unit, and which of q, k and v are adapted.

Results on disk hold the peers' names, which another name here would no longer find.
"""

OURS = "lora_fast"
FROZEN = "frozen"
LORALIB = "loralib"
LORALIB_COMPILED = "loralib-compiled"
PEFT = "peft"
ADDMM_ORDER = "addmm-order"
LORA_FIRST = "lora-first"
LORAFUSION = "lorafusion"
CLONES = "clones"

MIB = 2**20
QKV = [True, False, True]  # what MergedLinear takes as `enable_lora`


def is_ours(peer: str) -> bool:
    """Tell whether a peer is lora_fast, as it dispatches or by one implementation."""
    return peer.partition(":")[0] == OURS
