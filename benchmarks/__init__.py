"""Measuring programs; each writes a file with hardware and versions in it to benchmarks/results/."""
