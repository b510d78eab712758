"""Checkpoints, the folder of a run, and models loaded from one or from a transformers folder."""
