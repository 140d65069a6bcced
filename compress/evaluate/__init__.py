"""What a model keeps: perplexity and recall, of the dense model and of others on the same items."""
