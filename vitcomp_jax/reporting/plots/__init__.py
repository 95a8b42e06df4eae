"""The plots of a run: functions that draw measured values, and `save`, which writes figures.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish; line styles and
markers also distinguish the lines when printed in gray.
"""

from vitcomp_jax.reporting.plots.accuracy_cost import accuracy_against_gmacs
from vitcomp_jax.reporting.plots.attention import attention_map, cls_attention
from vitcomp_jax.reporting.plots.plans import schedules, tokens_left
from vitcomp_jax.reporting.plots.search import search_curves
from vitcomp_jax.reporting.plots.slimming import (
  kept_patches,
  kept_units,
  kept_widths,
  mask_histograms,
)
from vitcomp_jax.reporting.plots.style import number, save
from vitcomp_jax.reporting.plots.tokens import paint_groups, token_map, token_maps

__all__ = [
  "accuracy_against_gmacs",
  "attention_map",
  "cls_attention",
  "kept_patches",
  "kept_units",
  "kept_widths",
  "mask_histograms",
  "number",
  "paint_groups",
  "save",
  "schedules",
  "search_curves",
  "token_map",
  "token_maps",
  "tokens_left",
]
