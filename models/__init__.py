"""What is trained and what is served: models, losses, bundles and their registry."""
