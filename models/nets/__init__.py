"""The networks and their losses: the only torch in `models`."""
