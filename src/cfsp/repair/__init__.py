"""Repair of what is left after channels go, without end-to-end training: a ladder of steps."""
