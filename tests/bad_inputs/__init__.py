"""A catalogue of bad input: every row is refused with one sentence and leaves nothing behind."""
