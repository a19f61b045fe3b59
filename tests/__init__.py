"""A package only because torch-fidelity installs a `tests` of its own, which would else be found before this folder."""
