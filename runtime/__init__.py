"""The public API a training script sees: Session, adapters, data position."""
