"""Pure functions on arrays: attention, selection, merging, straight-through counts."""
