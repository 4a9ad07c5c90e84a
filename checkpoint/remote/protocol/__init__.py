"""What the process that uses an object store is told, and what it answers."""
