"""The forward pass: windows stream block by block through a model that may exceed memory."""
