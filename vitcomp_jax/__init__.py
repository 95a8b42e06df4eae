"""vitcomp_jax: makes a Vision Transformer smaller and faster at a budget you choose.

After `import vitcomp_jax as vc`, `vc.load` returns a model and its parameters, `vc.preprocess`
prepares its input, and `vc.apply` computes its logits. `vc.load_plan` loads published plans;
`vc.tome`, `vc.evit`, `vc.dynamicvit`, `vc.uniform`, `vc.linear` and `vc.random` make plans without
a search, and `vc.search` learns a plan for a model from its weights and some images.
`vc.compress` compresses a model by a plan, and `vc.count_cost` counts its cost. `vc.save` writes a
folder that `vc.load` reads; `vc.export` writes a file that runs without this library and that
`vc.load_exported` runs. `vc.unmerge` maps tokens back to the grid of patches, and `vc.model_plots`
draws what plans and models do.

`vc.run` runs the stages of a config in a workdir, and `vc.run_stage` runs one of them. `vc.plots`
draws metrics of a run, and `vc.published_accuracies` returns what others measured. `vc.methods` has
the methods themselves, for your own training loops.
"""

import ast
import importlib
import importlib.metadata
import pathlib
from typing import Any

__version__ = importlib.metadata.version("vitcomp_jax")


def _homes() -> dict[str, str]:
  """Returns the module of each public name, as listed in the stub for type checkers.

  The stub is the only list of names; each name is imported on first access.
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
