"""Randomizes models of other libraries, and writes them for tests; needs PyTorch."""

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
  """Draws every parameter, even those that start at zero or one, rounded to half precision."""
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
  """Writes a folder with a model and the outputs of its own library for images.

  Args:
    name: Name of the folder, below `tests/weights/peers`.
    model: Model that computes logits from images.
    state: Tensors to store in the file.
    fields: Fields of the spec that the other files in the folder do not contain.
    last: Module that outputs the last tokens.
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
  """Returns a copy, in half precision if this loses nothing."""
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
  """Writes a timm model with its authors' tensor names.

  Args:
    name: Name of the folder.
    model: The model.
    last: Name of the module that outputs the last tokens.
    rules: Regular expressions and replacements that produce the authors' names.
    change: Further changes to the state dict, after renaming.
    fields: Fields of the spec that names and shapes do not determine.
    timm_reads: Whether timm can convert these names back; if so, this is checked.
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
  """Runs the writers named on the command line, or all of them."""
  for writer in writers:
    if not sys.argv[1:] or writer.__name__ in sys.argv[1:]:
      writer()
