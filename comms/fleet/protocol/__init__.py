"""The pure machines of a fleet."""
