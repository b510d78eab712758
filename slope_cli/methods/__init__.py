"""What a method trains in each step of a run."""
