"""Costs of models: multiply-accumulates, and latency on one device."""
