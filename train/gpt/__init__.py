"""The GPT: its training loop and its export."""
