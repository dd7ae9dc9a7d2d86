"""Selection: candidates, constraints, scores and the search."""
