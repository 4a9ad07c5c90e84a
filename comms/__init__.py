"""Messages, membership, telemetry and the driver; knows nothing of training."""
