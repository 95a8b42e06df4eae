"""Experiments: one file each, whose `get_config()` returns the config of a run."""
