"""Text and images, prepared once, and the order in which samples are read."""
