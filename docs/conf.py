"""Sphinx: `sphinx-build -W --keep-going -b html docs build/docs`."""

import importlib.metadata
import pathlib
import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import config_reference

project = "vitcomp_jax"
author = "the authors of vitcomp_jax"
release = importlib.metadata.version(project)
html_title = f"{project} {release}"
html_theme = "furo"
extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
]
default_role = "code"  # of single backticks in docstrings

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autosummary_generate = False  # the tables stand above what they list
napoleon_numpy_docstring = False


class ConfigReference(SphinxDirective):
  """`config-reference`: every key of the config, as the dataclasses' own comments explain it."""

  def run(self) -> list[nodes.Node]:
    self.env.note_dependency(config_reference.__file__)
    self.env.note_reread()
    return self.parse_text_to_nodes(config_reference.markdown(), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
  app.add_directive("config-reference", ConfigReference)
  return {"parallel_read_safe": True}
