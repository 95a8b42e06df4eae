"""Times DeiT-S after half of its attention dimensions and hidden units are cut at random.

    python tools/benchmark_slimmed.py [--batch 16] [--rounds 7]

The models are timed in turn, so that other load on the machine affects all of them equally, and
medians are compared. The masks are random, because the choice of units does not affect the speed.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import vitcomp_jax as vc
from vitcomp_jax.cost import timing
from vitcomp_jax.methods.vit_slim.search import Masks, deploy
from vitcomp_jax.models.slicing import slice_params
from vitcomp_jax.models.vit import ViT

TILES = (1, 8, 16)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=16, help="batch size")
  parser.add_argument(
    "--rounds", type=int, default=7, help="turns of each model, three timings each"
  )
  args = parser.parse_args()

  dense, params = vc.load("deit_small_patch16_224")
  spec, rng = dense.spec, np.random.default_rng(0)
  masks = Masks(
    rng.random((spec.depth, spec.num_heads, spec.width // spec.num_heads)) < 0.5,
    rng.random((spec.depth, spec.mlp_dim)) < 0.5,
    np.ones((spec.depth, spec.num_tokens), bool),
  )
  models = {"dense": (dense, params)}
  for tile in TILES:
    layers, indices = deploy(spec, masks, tile)
    slimmed = jax.tree.map(jnp.asarray, slice_params(params, indices))
    models[f"slimmed, tile {tile}"] = ViT(spec, layers), slimmed

  subjects = [timing.compiled(name, *pair, args.batch) for name, pair in models.items()]
  timing.take_turns(subjects, seconds=0.0, rounds=args.rounds)
  median = [statistics.median(subject.seconds) for subject in subjects]
  gmacs = [vc.count_cost(model).gmacs for model, _ in models.values()]
  print(f"{'':20} {'GMACs':>7} {'images/s':>9} {'promised':>9} {'speed-up':>9}")
  for name, cost, seconds in zip(models, gmacs, median, strict=True):
    promised, gained, speed = gmacs[0] / cost, median[0] / seconds, args.batch / seconds
    print(f"{name:20} {cost:7.3f} {speed:9.1f} {promised:8.2f}x {gained:8.2f}x")


if __name__ == "__main__":
  main()
