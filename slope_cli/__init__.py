"""Command-line toolkit for sparse-plus-low-rank pretraining of language models."""

__version__ = "0.2.0"
