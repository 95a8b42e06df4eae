"""Titles and captions of the plots in a report."""

CAPTIONS = {
  "schedule": (
    "Stair chart of tokens over layers",
    "Tokens that each layer leaves, after pruning and after merging.",
  ),
  "plans": (
    "Stair chart of tokens over layers, for several plans",
    "The same for this run's plans beside those that `config.visualize.plans` names.",
  ),
  "accuracy": (
    "Scatter chart of accuracy over GMACs",
    "Top-1 accuracy against compute, one point per row of the table.",
  ),
  "published": (
    "Scatter chart of accuracy over GMACs, with published points",
    "The same beside published figures (open markers, dotted), which were not measured here: "
    "top-1 on ImageNet-1k as their sources state it, with the GMACs that they state, or, where "
    "they state none, those of this library's counter.",
  ),
  "widths": (
    "Bar chart of kept shares over layers",
    "What each slimmed layer keeps, in percent of the dense one's.",
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
    "The values of the soft masks over the steps of the slimming search: how many percent of them "
    "lie where.",
  ),
  "search": (
    "Line charts of loss and compute over steps",
    "Loss and compute over the steps of the search; the dashed line is the budget.",
  ),
  "token_maps": (
    "Images with their tokens after a quarter, half, three quarters and all of the layers",
    "What became of the patches of a few images: patches that share a token are painted in their "
    "mean colour and outlined, pruned ones are dark.",
  ),
  "token_maps_by_layer": (
    "Images with their tokens after each layer",
    "Which patches share a token (outlined, in their mean colour) and which are pruned (dark), "
    "after each layer that removes some.",
  ),
  "attention": (
    "Maps of the attention of CLS, one for each layer",
    "How much attention CLS pays each patch, from dark blue (little) to yellow (much).",
  ),
}
"""Title and caption of each plot in `figures/` by name, in the order of the report."""

ABSENT = {
  "schedule": "Schedules and token maps: no model of this run removes tokens.",
  "accuracy": (
    "Accuracy: no row has one; the stages `evaluate` and `compare` measure it, on labelled images."
  ),
  "published": (
    "Published figures: there are some for DeiT, MAE and ViT on ImageNet-1k, none for this model "
    "on these data."
  ),
  "search": "Search curves: this run itself has searched no token counts.",
  "widths": "Widths and masks: no plan of this run is slimmed.",
  "attention": "Pictures of images: `config.visualize.images` is 0, or the data hold none.",
}
"""Reason for a missing plot, by name."""
