"""The engine: batches, runs the model, and reduces logits to log probabilities. Knows nothing of gRPC."""
