"""Draws the patches of a photo that each method prunes and merges at equal cost, by layer.

    python tools/photo_token_maps.py WEIGHTS DIR --photo 937 --title "Dung beetle" \\
      --credit "gailhampshire, CC BY 2.0" --out docs/figures/token_maps.png

`WEIGHTS` are the weights of DeiT-Ti, `DIR` contains the TFDS data set `in1k_photos`, and the photo
is from its `validation` split. DiffRate uses its authors' plan; the other methods get plans of the
same cost.
"""

import argparse
import io
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
from matplotlib.figure import Figure

import vitcomp_jax as vc
from vitcomp_jax.data import sources
from vitcomp_jax.data.transforms import evaluation_image
from vitcomp_jax.errors import UserError
from vitcomp_jax.methods.base import Layers
from vitcomp_jax.models.backbone import Backbone
from vitcomp_jax.models.build import build
from vitcomp_jax.paths import expand
from vitcomp_jax.reporting import model_plots
from vitcomp_jax.reporting.plots import token_map
from vitcomp_jax.reporting.plots.image_grid import enlarge, mosaic
from vitcomp_jax.weights.loading import Params

VARIANT, PLAN = "deit_tiny_patch16_224", "diffrate/deit_tiny@0.6"
METHODS = {"ToMe": "tome", "EViT": "evit"}
LAYERS = (3, 6, 9, 11)  # the head reads only CLS from the twelfth


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
    plan = vc.load_plan(PLAN)
    plans = {"DiffRate": plan.layers_for(model.spec)}
    for name, method in METHODS.items():
      plans[name] = vc.methods.within(method, model.spec, plan.gmacs)
    foot = f"{VARIANT} at {plan.gmacs:.3f} GMACs. Photo: {args.credit}."
    figure = drawn(model, params, plans, image, LAYERS, args.title, foot)
    save(figure, expand(args.out))
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  return 0


def save(figure: Figure, path: str) -> None:
  """Writes a PNG with 256 colours, which is a third of the size of a full-colour one."""
  with io.BytesIO() as stream:
    figure.savefig(stream, facecolor="white")
    picture = PIL.Image.open(stream).convert("RGB")
  picture.quantize(256, dither=PIL.Image.Dither.NONE).save(path, optimize=True)


def drawn(
  model: Backbone,
  params: Params,
  plans: Mapping[str, Layers],
  image: np.ndarray,
  layers: Sequence[int],
  title: str,
  foot: str,
) -> Figure:
  """Draws a photo and, for each plan, its tokens after some layers.

  Args:
    model: The dense model.
    params: Weights of the model.
    plans: Layers by the name of their method.
    image: The photo, uint8[h w 3].
    layers: Layers to draw, from 1.
    title: What the photo shows.
    foot: Text below the figure.
  """
  spec, blocks = model.spec, []
  for name, plan in plans.items():
    found = model_plots.patch_tokens(build(spec, plan), params, image[None])
    block = [(f"{title}: {name}", enlarge(image))]
    for layer in layers:
      kept = found[layer - 1][0]
      count = spec.num_prefix + len(np.unique(kept[kept >= 0]))
      block.append((f"layer {layer}: {count} tokens", token_map(image, kept, spec.grid)))
    blocks.append(block)
  legend = (
    "Orange: outlines of tokens that stand for several patches, in their mean colour. Gray: "
    "patches with a token of their own. Dark, hatched: pruned."
  )
  return mosaic(blocks, f"{legend} {foot}")


if __name__ == "__main__":
  sys.exit(main())
