"""Recovery: training wins back quality, most of it where the coarse importance is high."""
