"""A trained model over HTTP, by OpenAI's interface."""
