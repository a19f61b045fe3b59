"""The demo (`python -m cluster demo`) and what only it needs."""
