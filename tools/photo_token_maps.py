"""Draws which patches of a photo each method prunes and merges, at one cost, layer by layer.

    python tools/photo_token_maps.py WEIGHTS DIR --photo 923 --title "bull mastiff" \
      --credit "Foxcroft Academy, CC BY 2.0" --out docs/figures/token_maps.png

`WEIGHTS` are those of DeiT-Ti, `DIR` holds the TFDS data set `in1k_photos`, and the photo is one of
its `validation`. DiffRate's plan is its authors'; the others are made for the same cost.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

import vitcomp_jax as vc
from vitcomp_jax.data import sources
from vitcomp_jax.data.transforms import evaluation_image
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build
from vitcomp_jax.paths import expand
from vitcomp_jax.reporting import model_plots
from vitcomp_jax.reporting.plots import token_map
from vitcomp_jax.reporting.plots.image_grid import enlarge, mosaic
from vitcomp_jax.weights.loading import Params

VARIANT, PLAN = "deit_tiny_patch16_224", "diffrate/deit_tiny@0.6"
METHODS = {"DiffRate": None, "ToMe": "tome", "EViT": "evit"}
LAYERS = (3, 6, 9, 11)  # the head reads nothing but CLS of the twelfth


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("weights", help="of DeiT-Ti")
  parser.add_argument("dir", help="folder of the TFDS data set in1k_photos")
  parser.add_argument("--photo", type=int, required=True, help="index in the validation split")
  parser.add_argument("--title", required=True, help="what the photo shows")
  parser.add_argument("--credit", required=True, help="its author and licence")
  parser.add_argument("--out", required=True, help="the PNG to write")
  args = parser.parse_args(argv)
  try:
    model, params = vc.load(VARIANT, expand(args.weights))
    source = sources.make_source("in1k_photos", expand(args.dir), "validation", (224, 224), 1000)
    if not 0 <= args.photo < len(source):
      raise UserError(f"--photo: expected 0 to {len(source) - 1}, got {args.photo}.")
    image = evaluation_image(source[args.photo].image, model.spec.preprocess)
    figure = drawn(model, params, image, args.title, args.credit)
    figure.savefig(expand(args.out), facecolor="white", metadata={"Software": None})
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  return 0


def drawn(model: Backbone, params: Params, image: np.ndarray, title: str, credit: str) -> Figure:
  """Draws a photo and, for each method, its tokens after some layers."""
  spec, plan = model.spec, vc.load_plan(PLAN)
  blocks = []
  for name, method in METHODS.items():
    layers = vc.methods.within(method, spec, plan.gmacs) if method else plan.layers_for(spec)
    found = model_plots.patch_tokens(build(spec, layers), params, image[None])
    block = [(f"{title}: {name}", enlarge(image))]
    for layer in LAYERS:
      kept = found[layer - 1][0]
      count = spec.num_prefix + len(np.unique(kept[kept >= 0]))
      block.append((f"layer {layer}: {count} tokens", token_map(image, kept, spec.grid)))
    blocks.append(block)
  foot = (
    f"{spec.name} at {plan.gmacs:.3f} GMACs. Orange: outlines of tokens that stand for several "
    "patches, in their mean colour. Gray: patches with a token of their own. Dark, hatched: "
    f"pruned. Photo: {credit}."
  )
  return mosaic(blocks, foot)


if __name__ == "__main__":
  sys.exit(main())
