"""The data that ships with raykiln, made by `make.py` and `make_extractor.py`."""
