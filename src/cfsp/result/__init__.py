"""What is written beside the weights, and what a checkpoint can be asked."""
