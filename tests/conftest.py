"""One thread a test process: two OpenMP teams on two cores slow each other down a hundredfold."""

import torch

torch.set_num_threads(1)
