"""`slope compare`: train variants of a recipe and compare them."""
