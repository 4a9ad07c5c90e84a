"""Erasure coding: what several nodes hold, protected by parity on others."""
