"""Compression methods, each a file or a folder with its reducers, its schedules and its search.

`methods.tome.layers(spec, r=13)` and its siblings make layers without a search;
`methods.within("tome", spec, gmacs)` makes layers that meet a budget. `DiffRate` and `ViTSlim`
search inside your own training loop.
"""

from vitcomp_jax.config import DiffRateOptions, ViTSlimOptions
from vitcomp_jax.methods import diffrate, dynamicvit, evit, handmade, registry, tome, vit_slim
from vitcomp_jax.methods.diffrate.search import DiffRate
from vitcomp_jax.methods.registry import within
from vitcomp_jax.methods.vit_slim.search import ViTSlim

__all__ = [
  "DiffRate",
  "DiffRateOptions",
  "ViTSlim",
  "ViTSlimOptions",
  "diffrate",
  "dynamicvit",
  "evit",
  "handmade",
  "registry",
  "tome",
  "vit_slim",
  "within",
]
