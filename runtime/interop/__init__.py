"""Versions to and from the formats of others: safetensors, torch.save, torch's DCP."""
