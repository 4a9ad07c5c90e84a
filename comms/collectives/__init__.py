"""Collectives among ranks that may come and go."""
