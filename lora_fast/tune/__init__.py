"""The command `lora-fast tune`: measures the kernels for given layers and keeps what is best."""
