"""The configuration of a run. Imports no torch."""

from slope_cli.config.configs import load

__all__ = ["load"]
