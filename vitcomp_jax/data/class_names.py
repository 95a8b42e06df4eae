"""Looks up human-readable names of classes."""

import functools
import importlib.resources
from collections.abc import Sequence


def readable(names: Sequence[str]) -> tuple[str, ...]:
  """Replaces ImageNet-1k's WordNet ids, such as `n01440764`, with words; keeps other names."""
  words = _imagenet1k()
  return tuple(words.get(name, name) for name in names)


def guess(num_classes: int) -> tuple[str, ...]:
  """Guesses class names: ImageNet-1k's in timm's order for 1000 classes, or else `class 0`, ..."""
  if num_classes == 1000:
    return tuple(_imagenet1k().values())
  return tuple(f"class {i}" for i in range(num_classes))


def imagenet_ids() -> tuple[str, ...]:
  """Returns the WordNet ids of ImageNet-1k's classes, in the order of timm's outputs."""
  return tuple(_imagenet1k())


@functools.cache
def _imagenet1k() -> dict[str, str]:
  """Reads the words for each WordNet id, in the order of the classes."""
  file = importlib.resources.files("vitcomp_jax.data") / "bundled" / "imagenet1k.tsv"
  lines = file.read_text(encoding="utf-8").splitlines()
  return dict(line.split("\t") for line in lines)
