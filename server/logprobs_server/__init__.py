"""The Logprobs service: scores texts and streams generated tokens with their log probabilities."""
