"""Measurements of the kernels, each beside its rivals in the same run."""
