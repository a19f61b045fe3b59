"""The data that ships with raykiln; made by `python -m train.data.make` and `make_extractor`, checked by its sha256 whenever it is read."""
