"""`slope eval`: perplexity and tasks of lm-eval."""
