"""How the models are trained on Ray Train: data, order, strategy, checkpoints, the two loops, export."""
