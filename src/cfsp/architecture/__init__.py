"""What a model is made of: found in its modules, proved by execution."""
