"""Using a trained model: prompts, decoding, sampling, scoring of texts."""
