"""What the import and the command load: names of modules, since timings depend on the machine."""

import subprocess
import sys

import pytest

import vitcomp_jax as vc

SLOW = {"grain", "matplotlib", "optax", "orbax", "tensorboardX", "tensorflow_datasets"}
SLOW |= {"huggingface_hub", "jax2onnx", "onnx", "onnxruntime", "torch", "transformers"}
MAIN = """
import runpy, sys
sys.argv = ["main", {}]
try:
  runpy.run_module("vitcomp_jax.main", run_name="__main__")
except SystemExit as ended:
  assert ended.code == {}, ended.code
"""


def _loaded(code: str) -> set[str]:
  """Top-level modules that are loaded after some code ran in a process of its own."""
  code += "\nimport sys\nprint(*(name for name in sys.modules if '.' not in name), file=sys.stderr)"
  ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert ran.returncode == 0, ran.stderr
  return set(ran.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
  "code",
  [
    "import vitcomp_jax as vc; vc.default_config(), dir(vc), vc.UserError, vc.__version__",
    MAIN.format("'--help'", 0),
    MAIN.format("'--config', 'quickstart', '--speed=3'", 2),
    MAIN.format("'--config', 'quickstart', '--config.serch.steps=3'", 2),
    MAIN.format("'--config', 'quickstart', '--config.search.steps=many'", 2),
  ],
)
def test_nothing_slow_is_loaded(code):
  loaded = _loaded(code)
  assert "vitcomp_jax" in loaded
  assert not loaded & (SLOW | {"flax", "jax", "jaxlib", "numpy", "PIL"})


def test_models_and_searches_load_only_what_they_use():
  loaded = _loaded("import vitcomp_jax as vc; vc.load, vc.apply, vc.tome, vc.export, vc.search")
  assert {"jax", "flax"} <= loaded
  assert loaded & SLOW == {"optax"}  # which a search is made of


def test_public_names_are_listed_once():
  assert set(vc.__all__) <= set(dir(vc)) and {"__doc__", "__version__"} <= set(dir(vc))
  for name in vc.__all__:
    assert getattr(vc, name) is getattr(vc, name)
  with pytest.raises(AttributeError, match="module 'vitcomp_jax' has no attribute 'serch'"):
    _ = vc.serch
