"""What a version is, how it is captured, and its durable copies."""
