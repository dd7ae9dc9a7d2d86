"""Many plans from one calibration, each pruned, measured and compared."""
