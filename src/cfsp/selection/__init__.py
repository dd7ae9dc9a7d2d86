"""What goes: constraints, candidates that just meet them, scores, and the search over them."""
