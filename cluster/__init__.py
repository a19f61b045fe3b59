"""Ray clusters, storage and the command line: what all other packages build on."""
