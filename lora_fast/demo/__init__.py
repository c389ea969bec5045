"""`lora-fast demo`: one fine-tuning run with loralib's layers and with ours, side by side."""
