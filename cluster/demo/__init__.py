"""The whole road on this machine, and what only the demo needs."""
