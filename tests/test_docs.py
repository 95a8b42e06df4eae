"""The documents are built without a warning, and the reference explains every key of the config."""

import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import vitcomp_jax as vc
from tools import timm_table
from vitcomp_jax.config import all_keys

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def _module(name: str):
  spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # where dataclasses look for their module
  spec.loader.exec_module(module)
  return module


def test_every_key_of_the_config_is_explained():
  keys = list(_module("config_reference").keys())
  assert [key.name for key in keys] == [f"config.{name}" for name in all_keys()]
  assert [key.name for key in keys if not re.search(r"\w\w", key.explanation)] == []
  by_name = {key.name: key for key in keys}
  inherited = by_name["config.slim.warmup_epochs"]
  assert (inherited.default, inherited.explanation) == ("1.0", "of linear warm-up")
  several_lines = by_name["config.model.attention"]
  assert several_lines.explanation.startswith("XLA's own, or") and "auto" in several_lines.accepted
  assert by_name["config.export.platforms"].explanation == "StableHLO's platforms"


def test_the_page_of_models_has_the_bundled_table():
  table, tags = timm_table.bundled()
  assert timm_table.markdown(table, tags) in (DOCS / "models.md").read_text()
  assert table["others"].keys() == timm_table.OTHERS.keys()
  assert set(map(timm_table.family, table["models"])) | {"CAFormer"} == timm_table.FAMILIES.keys()


@pytest.mark.slow
def test_the_documents_are_built_without_a_warning(tmp_path):
  out = tmp_path / "html"
  command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
  command += ["-d", str(tmp_path / "doctrees"), str(DOCS), str(out)]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  pages = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.html")}
  for source in DOCS.rglob("*.md"):
    assert source.relative_to(DOCS).with_suffix(".html").as_posix() in pages
  formulas = [f for page in pages.values() for f in re.findall(r"<math.*?</math>", page, re.DOTALL)]
  assert formulas and not [formula for formula in formulas if "\\" in formula]
  assert 'id="confval-config.search.steps"' in pages["config.html"]
  assert 'id="vitcomp_jax.load"' in pages["api.html"]
  # Linen's own methods are none of this library's.
  assert "tabulate" not in pages["api.html"]


@pytest.mark.slow
def test_the_figures_of_the_documents_can_be_drawn(tmp_path):
  subprocess.run([sys.executable, str(DOCS / "draw.py"), str(tmp_path)], cwd=ROOT, check=True)
  drawn = {path.name for path in tmp_path.glob("*.png")}
  there = {path.name for path in (DOCS / "figures").glob("*.png")}
  photos = {name for name in there - drawn if name.startswith("token_maps")}
  assert there == drawn | photos
  # tools/photo_token_maps.py draws them, of photos whose authors are to be named.
  notice = (ROOT / "NOTICE").read_text()
  assert all(name in notice for name in photos)
  pages = "".join(path.read_text() for path in (ROOT / "README.md", *DOCS.rglob("*.md")))
  assert set(re.findall(r"figures/(\w+\.png)", pages)) == there


def _public():
  """Every public function and class, and the public methods of the classes, by name."""
  for name in vc.__all__:
    found = getattr(vc, name)
    if inspect.ismodule(found):
      continue
    yield name, found
    if name in ("Exported", "Plan"):
      for method, value in vars(found).items():
        if not method.startswith("_") and (
          inspect.isfunction(value) or isinstance(value, property)
        ):
          yield f"{name}.{method}", value


PUBLIC = dict(_public())


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_listed_and_has_an_example(name):
  assert ">>> " in inspect.getdoc(PUBLIC[name])
  listed = re.findall(r"^\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
  assert name.split(".")[0] in listed
