"""How training is distributed over workers: DDP and DeepSpeed."""
