"""The forward pass, block by block: windows stream through a model that need not fit into memory."""
