"""Proofs that a killed run ends as an uninterrupted one does."""
