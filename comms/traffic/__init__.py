"""Which way bytes go: the order of rings, what links can do, shares of parallel paths."""
