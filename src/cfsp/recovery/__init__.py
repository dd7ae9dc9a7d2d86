"""Recovery: training wins back quality."""
