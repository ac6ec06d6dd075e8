"""One thread: the batches are small, and two threads would mostly wait for each other."""

import torch

torch.set_num_threads(1)
