"""`slope eval`: perplexity and zero-shot tasks."""
