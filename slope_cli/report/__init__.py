"""What a run writes and shows: metrics, progress, tables, plots."""
