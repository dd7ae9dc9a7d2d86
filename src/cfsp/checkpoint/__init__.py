"""Checkpoints: finding one, reading it lazily, building its modules, writing a new one."""
