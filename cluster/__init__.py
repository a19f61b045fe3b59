"""Where it runs: one machine or many, started, checked and submitted to with the same commands."""
