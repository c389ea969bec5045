"""Triton kernels of lora_fast, installed as `lora_fast.kernels`.

Each file holds kernels and, below them, the launchers that the operators call. Nothing here
is imported before an operator needs it, so `import lora_fast` works without Triton.
"""
