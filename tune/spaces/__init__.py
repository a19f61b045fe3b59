"""The search spaces that ship with raykiln."""
