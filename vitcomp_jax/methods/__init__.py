"""Compression methods: how a ViT's layers are built for a search, and what they deploy."""
