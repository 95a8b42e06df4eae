"""Experiments, one per file; `get_config()` returns the config of a run."""
