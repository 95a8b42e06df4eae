"""Experiments: one file each, whose `get_config()` gives the config of a run."""
