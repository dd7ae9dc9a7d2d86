"""What requires the whole model in memory, where all else reads one block at a time."""
