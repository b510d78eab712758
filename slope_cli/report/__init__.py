"""Metrics, progress, tables and plots."""
