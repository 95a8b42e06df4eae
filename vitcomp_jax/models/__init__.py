"""Flax Vision Transformers whose layers are data: specs, tokens, reducers, variants."""
