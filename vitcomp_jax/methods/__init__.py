"""Compression methods, each a file or a folder: its reducers, its schedules, its search.

`methods.tome.layers(spec, r=13)` and its like make layers without a search;
`methods.within("tome", spec, gmacs)` makes them as strong as a budget asks for.
"""

from vitcomp_jax.methods import diffrate, dynamicvit, evit, handmade, registry, tome, vit_slim
from vitcomp_jax.methods.registry import within

__all__ = ["diffrate", "dynamicvit", "evit", "handmade", "registry", "tome", "vit_slim", "within"]
