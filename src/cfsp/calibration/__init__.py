"""Calibration: one forward pass, block by block, gathering sums that plans are made from."""
