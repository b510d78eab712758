"""What a trained model is used for: generated text, exported folders."""
