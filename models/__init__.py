"""Models: networks and losses, exported bundles, their registry, and running them on ONNX."""
