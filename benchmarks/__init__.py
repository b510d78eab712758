"""Measuring programs; each writes a file with hardware and versions in it to benchmarks/results/."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
