"""One Flax Vision Transformer whose layers are data: specs, tokens, reducers, variants."""
