"""Training on Ray Train: data, distribution, checkpoints, a loop per kind of model, export."""
