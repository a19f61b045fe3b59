"""Tests over the served application: HTTP through Ray Serve, rollouts, failures, commands."""
