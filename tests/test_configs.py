"""Every config makes a valid `Config` of a variant that exists."""

import importlib
import pathlib

import pytest

from vitcomp_jax import configs
from vitcomp_jax.config import from_config_dict
from vitcomp_jax.models.variants import get_spec

FOLDER = pathlib.Path(configs.__path__[0])
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "common"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config(name):
  module = importlib.import_module(f"vitcomp_jax.configs.{name}")
  config = from_config_dict(module.get_config())
  get_spec(config.model.variant)
  assert f"configs/{name}.py" in module.__doc__
