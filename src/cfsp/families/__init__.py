"""The model types of the installed transformers: proof, and contract of their checkpoints."""
