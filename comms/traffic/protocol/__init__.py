"""Pure parts of it: ring order, probing, shares of paths."""
