"""Pure slot custody."""
