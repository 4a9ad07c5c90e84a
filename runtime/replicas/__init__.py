"""Replica groups that train together, step by step, and come and go."""
