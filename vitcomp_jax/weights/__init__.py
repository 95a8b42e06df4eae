"""Weights of others: files (reading, writing), timm's names, position embeddings."""
