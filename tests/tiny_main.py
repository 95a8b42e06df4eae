"""`vitcomp_jax.main` with a model that compiles in seconds, as a process of its own."""

import dataclasses
import sys

from vitcomp_jax import main, parallel
from vitcomp_jax.models.spec import ViTSpec
from vitcomp_jax.models.variants import VARIANTS

TINY = "vit_tiny_for_tests"


def tiny_spec() -> ViTSpec:
  """Returns the model's spec."""
  spec = VARIANTS["vit_mini_patch3_30"]
  return dataclasses.replace(spec, name=TINY, patch_size=6, width=16, depth=3, mlp_dim=32)


def tiny_variant() -> None:
  """Adds the model to this process, and lets even its small arrays be cut up."""
  VARIANTS[TINY] = tiny_spec()
  parallel._SHARD_FROM = 256


if __name__ == "__main__":
  tiny_variant()
  sys.exit(main.main(sys.argv))
