"""Pure machines: membership, frames, handshake."""
