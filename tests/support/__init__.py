"""What tests share: bundles, workers, nodes, fakes."""
