"""Triton kernels of lora_fast, installed as `lora_fast.kernels`.

A file with kernels holds, below them, the launchers that the operators call. Other files hold what
kernels share on the device (`primitives`, `lora_update`, ...), choose kernels and tiles (`plans`,
`configs`, `tables`, ...) or serve launches (`launch`, `gemm_launch`, `descriptors`, ...). Nothing
here is imported before an operator needs it, so `import lora_fast` works without Triton.
"""
