"""How good a model is: perplexity, agreement with the dense model, tasks."""
