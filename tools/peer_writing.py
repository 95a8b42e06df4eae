"""Randomises models of other libraries, and writes them for tests; needs PyTorch."""

import json
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "weights" / "peers"
Fields = dict[str, Any]
State = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2}
SIZES |= {"depth": 2, "mlp_ratio": 2.5}
HEADS = {"num_heads": 2}
Rules = tuple[tuple[str, str], ...]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Draws every parameter, also those that start at zero or one, as half precision has them."""
  generator = torch.Generator().manual_seed(seed)
  for parameter in model.parameters():
    drawn = torch.randn(parameter.shape, generator=generator)
    starts_at_one = parameter.ndim == 1 and bool((parameter == 1).all())
    parameter.data = (drawn * 0.3 + float(starts_at_one)).half().float()
  return model.eval()


def write(
  name: str,
  model: torch.nn.Module,
  state: State,
  fields: Fields,
  last: torch.nn.Module,
) -> pathlib.Path:
  """Writes a folder with a model, and what the library that made it makes of images.

  Args:
    name: Of the folder, below `tests/weights/peers`.
    model: Makes logits of images.
    state: What the file holds.
    fields: Fields of the spec that nothing in the folder tells.
    last: Module whose output is the last tokens.
  """
  folder = FOLDER / name
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  images = torch.tensor(np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32))
  tokens = []
  hook = last.register_forward_hook(lambda module, args, output: tokens.append(output))
  with torch.no_grad():
    logits = model(images.permute(0, 3, 1, 2))
  hook.remove()
  arrays = {"logits": logits, "tokens": tokens[0]}
  np.savez(folder / "expected.npz", **{key: value.numpy() for key, value in arrays.items()})
  save_file({key: _stored(value) for key, value in state.items()}, folder / "model.safetensors")
  if fields:
    (folder / "fields.json").write_text(json.dumps(fields, indent=1) + "\n")
  return folder


def _stored(tensor: torch.Tensor) -> torch.Tensor:
  """Returns a copy, in half precision if that is exact."""
  half = tensor.half().contiguous()
  return half if torch.equal(half.float(), tensor) else tensor.clone().contiguous()


def drawn(*shape: int) -> torch.Tensor:
  return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def authors(
  name: str,
  model: torch.nn.Module,
  last: str,
  rules: Rules = (),
  change: Callable[[State], State] = dict,
  fields: Fields | None = None,
  timm_reads: bool = False,
) -> None:
  """Writes a model of timm's under its authors' names.

  Args:
    name: Of the folder.
    model: The model.
    last: Name of the module whose output is the last tokens.
    rules: Regular expressions and replacements that make the authors' names.
    change: What renaming alone does not do.
    fields: Fields of the spec that neither names nor shapes tell.
    timm_reads: Whether timm converts these names, which is checked.
  """
  model = randomise(model)
  state = {}
  for key, tensor in model.state_dict().items():
    for pattern, replacement in rules:
      key = re.sub(pattern, replacement, key)
    state[key] = tensor
  state = change(state)
  if timm_reads:
    module = sys.modules[type(model).__module__]
    back = module.checkpoint_filter_fn(dict(state), model)
    wanted = model.state_dict()
    assert back.keys() - {"head.bias"} == wanted.keys() - {"head.bias"}, back.keys() ^ wanted.keys()
    assert all(torch.allclose(back[key], wanted[key], atol=1e-6) for key in wanted)
  write(f"authors/{name}", model, state, fields or {}, model.get_submodule(last))


def run(writers: Sequence[Callable[[], None]]) -> None:
  """Runs the writers that the command names, or all."""
  for writer in writers:
    if not sys.argv[1:] or writer.__name__ in sys.argv[1:]:
      writer()
