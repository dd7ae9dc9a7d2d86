"""Text: where documents come from, and the token windows that are drawn from them."""
