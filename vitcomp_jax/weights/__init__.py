"""Pretrained weights: files, timm's names, position embeddings, slicing."""
