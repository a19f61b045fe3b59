"""How hyper-parameters are searched: Ray Tune over Ray Train runs."""
