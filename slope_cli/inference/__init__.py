"""Uses of a trained model: generating text, and export."""
