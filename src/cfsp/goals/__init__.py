"""Goals other than a fraction of channels: each is resolved to a budget before anything is cut."""
