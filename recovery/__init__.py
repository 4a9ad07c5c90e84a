"""Detection of faults, plans for recovery, and deliberate faults."""
