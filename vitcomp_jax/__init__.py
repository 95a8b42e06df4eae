"""vitcomp_jax: makes a Vision Transformer smaller and faster at a budget you choose.

With `import vitcomp_jax as vc`, `vc.load` gives a model and its parameters, `vc.preprocess` its
input, `vc.apply` its logits. `vc.load_plan` knows the published plans; `vc.tome`, `vc.evit`,
`vc.dynamicvit`, `vc.uniform`, `vc.linear` and `vc.random` make plans without a search, and
`vc.search` learns one for a model, its weights and some images.
`vc.compress` puts a model under a plan, and `vc.count_cost` tells what it costs. `vc.save` writes a
folder that `vc.load` reads, `vc.export` a file that runs without this library and that
`vc.load_exported` runs. `vc.unmerge` brings tokens back to the grid of patches, and
`vc.model_plots` draws what plans and models do.

`vc.run` runs the stages of a config in a workdir, `vc.run_stage` one of them. `vc.plots` draws
metrics of a run, `vc.published_accuracies` gives what others measured. `vc.methods` has the methods
themselves, for training loops of one's own.
"""

import ast
import importlib
import importlib.metadata
import pathlib
from typing import Any

__version__ = importlib.metadata.version("vitcomp_jax")


def _homes() -> dict[str, str]:
  """Returns the module that each public name comes from, as the stub for type checkers says.

  The stub is the only list of names; each is imported when it is first asked for.
  """
  stub = pathlib.Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
  homes = {}
  for statement in ast.parse(stub).body:
    if isinstance(statement, ast.ImportFrom):
      homes |= {name.name: str(statement.module) for name in statement.names}
  return homes


_HOMES = _homes()
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  members = vars(importlib.import_module(_HOMES[name]))
  value = members[name] if name in members else importlib.import_module(f"{_HOMES[name]}.{name}")
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted(globals().keys() | _HOMES.keys())
