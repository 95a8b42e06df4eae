"""Titles and captions of the plots in a report."""

CAPTIONS = {
  "schedule": (
    "Stair chart of tokens over layers",
    "Tokens that remain in each layer, after pruning and after merging.",
  ),
  "plans": (
    "Stair chart of tokens over layers, for several plans",
    "The same for this run's plans and for those that `config.visualize.plans` names.",
  ),
  "accuracy": (
    "Scatter chart of accuracy over GMACs",
    "Top-1 accuracy against compute, one point per row of the table.",
  ),
  "published": (
    "Scatter chart of accuracy over GMACs, with published points",
    "The same with published figures (open markers, dotted), which were not measured here: "
    "top-1 on ImageNet-1k and GMACs as their sources state them; if a source states no GMACs, "
    "those that this library counts.",
  ),
  "widths": (
    "Bar chart of kept shares over layers",
    "Share of the dense layer's units that each slimmed layer keeps, in percent.",
  ),
  "units": (
    "Map of kept units, one line for each layer",
    "The masks after the cut: which dimensions of each head and which hidden units are kept.",
  ),
  "patches": (
    "Maps of kept patches, one for each layer",
    "The patches that each layer keeps (dark), and how many.",
  ),
  "masks": (
    "Maps of the masks' values over steps",
    "Distribution of the soft masks' values over the steps of the slimming search, in percent of "
    "all masks.",
  ),
  "search": (
    "Line charts of loss and compute over steps",
    "Loss and compute over the steps of the search; the dashed line is the budget.",
  ),
  "token_maps": (
    "Images with their tokens after a quarter, half, three quarters and all of the layers",
    "Patches of a few images. Patches that share a token have their mean colour and an outline; "
    "pruned patches are dark.",
  ),
  "token_maps_by_layer": (
    "Images with their tokens after each layer",
    "Which patches share a token (outlined, in their mean colour) and which are pruned (dark), "
    "after each layer that removes some.",
  ),
  "attention": (
    "Maps of the attention of CLS, one for each layer",
    "Attention from CLS to each patch, from dark blue (little) to yellow (much).",
  ),
}
"""Title and caption of each plot in `figures/` by name, in the order of the report."""

ABSENT = {
  "schedule": "Schedules and token maps: no model of this run removes tokens.",
  "accuracy": (
    "Accuracy: not measured; the stages `evaluate` and `compare` measure it on labelled images."
  ),
  "published": (
    "Published figures: available for DeiT, MAE and ViT on ImageNet-1k, but not for this model and "
    "data set."
  ),
  "search": "Search curves: this run did not search token counts itself.",
  "widths": "Widths and masks: no plan of this run is slimmed.",
  "attention": "Pictures of images: `config.visualize.images` is 0, or the data set has no images.",
}
"""Reason for a missing plot, by name."""
