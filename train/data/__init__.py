"""The data that ships with raykiln; made by `python -m train.data.make`, checked by its sha256 whenever it is read."""
