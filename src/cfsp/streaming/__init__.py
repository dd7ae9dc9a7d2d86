"""The forward pass by blocks: windows stream through a model that need not fit into memory."""
