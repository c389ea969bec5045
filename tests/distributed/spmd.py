"""What the tests here share: models, batches, and training steps; each rank runs the same code."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_fast as lora
from lora_fast.testing import randomize_
