"""Restoration: closed-form repair of the down projections after channels are removed."""
