"""Replica groups that come and go: who is in, and what becomes of what they do together."""
