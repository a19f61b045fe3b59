"""A run: its folder, checkpoints, metrics, progress and report."""
