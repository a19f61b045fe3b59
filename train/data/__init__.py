"""Raw text and images, prepared once; the order in which samples are read."""
