"""Losses, the optimizer, one training step and the loop around it."""
