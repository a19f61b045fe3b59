"""Serve bundles over HTTP: session (ONNX Runtime), engine (batching), replicas, gateway, routes."""
