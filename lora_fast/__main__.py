"""`python -m lora_fast`, for where the folder of `lora-fast` is not on the path."""

import sys

from lora_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
