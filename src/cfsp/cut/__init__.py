"""Cutting the tensors of a model by a plan, in files or in memory."""
