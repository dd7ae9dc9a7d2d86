"""Pruned checkpoints in the layouts that other software reads; one module a layout."""
