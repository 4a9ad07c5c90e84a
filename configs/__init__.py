"""Hydra groups and the frozen dataclasses they fill; imports nothing of ftrain."""
