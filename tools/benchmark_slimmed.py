"""Times DeiT-S with half of its attention dimensions and hidden units cut at random.

    python tools/benchmark_slimmed.py [--batch 16] [--rounds 7]

All models take turns, so that what else the machine does hits all alike; medians are compared. The
masks are random, as what a cut keeps does not change what it costs.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import vitcomp_jax as vc
from vitcomp_jax.convert.slicing import slice_params
from vitcomp_jax.methods.vit_slim import Masks, deploy
from vitcomp_jax.models.vit import ViT

TILES = (1, 8, 16)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=16, help="images at once")
  parser.add_argument("--rounds", type=int, default=7, help="timings of each model")
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

  images = jnp.asarray(rng.normal(size=(args.batch, *spec.image_size, 3)), jnp.float32)
  seconds: dict[str, list[float]] = {name: [] for name in models}
  for model, params in models.values():
    vc.apply(model, params, images).block_until_ready()
  for _ in range(args.rounds):
    for name, (model, params) in models.items():
      begin = time.perf_counter()
      vc.apply(model, params, images).block_until_ready()
      seconds[name].append(time.perf_counter() - begin)

  median = {name: statistics.median(times) for name, times in seconds.items()}
  print(f"{'':20} {'GMACs':>7} {'images/s':>9} {'promised':>9} {'speed-up':>9}")
  for name, (model, _) in models.items():
    gmacs = vc.count_cost(model).gmacs
    promised, gained = vc.count_cost(dense).gmacs / gmacs, median["dense"] / median[name]
    speed = args.batch / median[name]
    print(f"{name:20} {gmacs:7.3f} {speed:9.1f} {promised:8.2f}x {gained:8.2f}x")


if __name__ == "__main__":
  main()
