"""The model types of the installed transformers, and proof of each."""
