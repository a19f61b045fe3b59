"""A valid manifest for bundles whose files do not matter."""

from models import bundle

MANIFEST: bundle.Manifest = {
    "kind": "gpt",
    "created": "2000-01-01T00:00:00+00:00",
    "inputs": [],
    "outputs": [],
    "opset": 24,
    "parity": {"max_abs_diff": 0.0, "tolerance": 1e-5, "cases": []},
    "run": {"name": "r", "step": 1, "storage": "s"},
    "dataset": {"name": "d", "fingerprint": "0"},
    "metrics": {},
    "libraries": {},
    "model": {},
}
