"""How the bundles are served: session (ONNX Runtime), engine (batching), deployments (Ray Serve), ingress (HTTP)."""
