"""Importance: pure functions from statistics and weights to scores; higher means keep."""
