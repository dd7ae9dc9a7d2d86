"""What goes: candidates, constraints that they meet, scores, and the search over them.

constraint  parameters, KV cache, speed, loss; or a share of one part
candidates  all that just meet it; one, where nothing is open
best        the one with the least divergence from the dense model, masked or repaired
"""
