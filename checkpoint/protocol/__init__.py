"""Pure machines of the checkpoint levels."""
