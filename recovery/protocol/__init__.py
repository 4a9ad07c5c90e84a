"""Pure planning over faults and copies."""
