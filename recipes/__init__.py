"""Run recipes: YAML files that hold only the differences from the defaults in slope_cli.config."""
