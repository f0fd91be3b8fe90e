"""Shared by all tests."""

import torch

# The models here are tiny: threads gain nothing, and on a busy machine their barriers cost a lot.
torch.set_num_threads(1)
