"""Sphinx: `sphinx-build -W --keep-going -b html docs build/docs`."""

import importlib.metadata
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import config_reference

project = "vitcomp_jax"
author = "the authors of vitcomp_jax"
release = importlib.metadata.version(project)
html_title = f"{project} {release}"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["custom.css"]
html_show_copyright = False
html_math_renderer = "mathml"  # which browsers show by themselves, without network
extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
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


def _math(display: str) -> Callable[[HTML5Translator, nodes.Element], None]:
  """Writes a formula as MathML."""

  def visit(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode

  return visit


def _short_signature(
  app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str | None, str | None]:
  """Arrays by the name that the code calls them by."""
  short = [text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returns)]
  return short[0], short[1]


def setup(app: Sphinx) -> dict[str, Any]:
  app.add_directive("config-reference", ConfigReference)
  app.add_html_math_renderer("mathml", (_math("inline"), None), (_math("block"), None))
  app.connect("autodoc-process-signature", _short_signature)
  return {"parallel_read_safe": True}
