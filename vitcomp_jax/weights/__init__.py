"""Pretrained weights: files, timm's names, position embeddings and slicing."""
