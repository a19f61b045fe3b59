"""Networks and losses: the only modules of `models` that import torch."""
