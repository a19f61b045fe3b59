"""Hyper-parameter search: Ray Tune over Ray Train runs."""
