"""Runs the PyTorch side of `accelerator.py`: dense timm models, and a ViT under a plan.

`accelerator.py` starts this script. It does not import vitcomp_jax, so it runs in any interpreter
with PyTorch and timm. The first line on standard input sets up a `Side`; each further line names
one of its methods and the arguments (see `torch_vit.serve`).
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
import torch_vit
from torch import Tensor, nn


class Side:
  """Holds a model and its runnable computations by name."""

  def __init__(self, setup: dict[str, Any]) -> None:
    """Chooses the device.

    Args:
      setup: Empty. The device is the GPU if there is one.
    """
    del setup
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    self.key: Any = None
    self.runs: dict[str, Callable[[], Tensor]] = {}

  def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
    """Runs a computation for the first time, which compiles it.

    Args:
      case: `name`, `options` and `plan` of the model as returned by `Subjects.in_timm`; `batch`;
        `dtype`; `way`, dense or plan, eager or compiled; and `arrays`, the .npz with `images`
        f32[b 3 h w] and `weights.NAME` for exact outputs in float32, or None for random arrays.

    Returns:
      The `outputs`, if arrays were given, or an `error`.
    """
    try:
      run = self._run(case)
      outputs = run()
      self._wait()
    except Exception as error:  # no memory or no compiler; other computations may still run
      return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    self.runs[case["way"]] = run
    return {"outputs": outputs.float().cpu().tolist()} if case["arrays"] else {}

  def time(self, way: str) -> dict[str, Any]:
    """Returns the `seconds` of another run, or an `error`."""
    if way not in self.runs:
      return {"error": "the process that had it was ended"}
    begin = time.perf_counter()
    self.runs[way]()
    self._wait()
    return {"seconds": time.perf_counter() - begin}

  def forget(self) -> dict[str, Any]:
    """Frees the memory of all computations."""
    self.key, self.model, self.runs = None, None, {}
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return {}

  def _wait(self) -> None:
    if self.device == "cuda":
      torch.cuda.synchronize()

  def _run(self, case: dict[str, Any]) -> Callable[[], Tensor]:
    is_exact, dtype = case["arrays"] is not None, getattr(torch, case["dtype"])
    # By default, XLA multiplies float32 in TF32 on GPUs that support it.
    torch.set_float32_matmul_precision("highest" if is_exact else "high")
    if self.key != (key := [case[name] for name in ("name", "options", "dtype", "arrays")]):
      self.forget()
      self.model = timm.create_model(case["name"], **case["options"]).eval()
      if is_exact:
        self.model.load_state_dict(_arrays(case, "weights."))
      self.model.to(self.device, dtype)
      self.key = key
    if is_exact:
      images = _arrays(case, "")["images"].to(self.device)
    else:
      shape = (case["batch"], 3, *case["options"]["img_size"])
      images = torch.randn(shape, device=self.device, dtype=dtype)
    what, how = case["way"].split()
    model: nn.Module = self.model
    if what == "plan":
      weights = {name: value.clone() for name, value in self.model.state_dict().items()}
      model = torch_vit.ViT(weights, case["options"]["num_heads"]).to(self.device, dtype)
      forward = functools.partial(model.reduced, images, case["plan"])
    else:
      # Kernel launches limit the speed for a single image; CUDA graphs avoid them.
      mode = "reduce-overhead" if case["batch"] == 1 else None
      dense = torch.compile(model, mode=mode) if how == "compiled" else model
      forward = functools.partial(dense, images)
    return torch.inference_mode()(forward)


def _arrays(case: dict[str, Any], prefix: str) -> dict[str, Tensor]:
  """Returns the arrays of a case whose names have a prefix, by name without the prefix."""
  with np.load(case["arrays"]) as file:
    names = [name for name in file.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.from_numpy(file[name]) for name in names}


if __name__ == "__main__":
  torch_vit.serve(Side)
