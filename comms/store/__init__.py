"""Where a coordinator keeps what must survive it, and who of several coordinators may act."""
