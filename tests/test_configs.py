"""Every config makes a valid `Config` of a variant that exists."""

import importlib
import pathlib

import pytest

from vitcomp_jax import configs
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.configs import compare_fashion_mnist, compare_imagenet
from vitcomp_jax.errors import UserError
from vitcomp_jax.models.variants import get_spec

FOLDER = pathlib.Path(configs.__path__[0])
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "common"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config(name):
  module = importlib.import_module(f"vitcomp_jax.configs.{name}")
  config = from_config_dict(module.get_config())
  get_spec(config.model.variant)
  assert f"configs/{name}.py" in module.__doc__


@pytest.mark.parametrize("part", compare_fashion_mnist.PARTS)
def test_a_part_of_the_comparison(part):
  config = from_config_dict(compare_fashion_mnist.get_config(part))
  assert bool(config.compare.finetuned) == (part == "finetuned")
  assert bool(config.compare.random_schedules) == (part == "random")


@pytest.mark.parametrize("model", compare_imagenet.MODELS)
def test_a_model_of_the_comparison(model):
  config = from_config_dict(compare_imagenet.get_config(model))
  assert len(config.compare.plans) == len(config.compare.budgets) >= 3


@pytest.mark.parametrize("name", ["compare_fashion_mnist", "compare_imagenet"])
def test_an_unknown_part(name):
  module = importlib.import_module(f"vitcomp_jax.configs.{name}")
  with pytest.raises(UserError, match="behind the colon, got nothing"):
    module.get_config("nothing")
