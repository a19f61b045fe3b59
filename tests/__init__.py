"""A package, because torch-fidelity installs a package `tests` that would be imported instead."""
