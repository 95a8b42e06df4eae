"""Runs the PyTorch side of `side_by_side.py`: a ViT, dense, under a plan, and in a search.

`side_by_side.py` starts this script. It does not import vitcomp_jax, so it runs in any interpreter
with PyTorch. The first line on standard input, JSON, sets up a `Side`; each further line is
`["prepare" or "time", name, batch]`. Each gets a one-line answer on standard output: the PyTorch
version; the outputs of a first run, or an error; or the seconds of another run.
"""

import copy
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

_NOISE = 2.0**-22  # of an expected count, relative to the number of patches
_SPREAD = 0.03  # of the distribution around a count, relative to the number of patches


class Block(nn.Module):
  """Implements an encoder layer with timm's parameter names."""

  def __init__(self, width: int, heads: int, hidden: int) -> None:
    super().__init__()
    self.heads = heads
    self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
    self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
    self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

  def forward(self, x: Tensor) -> Tensor:
    return self.feed(self.add(x, functional.scaled_dot_product_attention(*self.project(x))))

  def reduced(
    self, x: Tensor, size: Tensor | None, prune: int, merge: int
  ) -> tuple[Tensor, Tensor | None]:
    """Applies the layer under a plan.

    Args:
      x: Tokens [b n d].
      size: Sizes of the tokens [b n]; None if all are 1.
      prune: Tokens left after pruning.
      merge: Tokens left after merging.

    Returns:
      The remaining tokens and their sizes.
    """
    q, k, v = self.project(x)
    bias = None if size is None else size.log()[:, None, None]
    x = self.add(x, functional.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    n = x.shape[1]
    prune, merge = min(n, prune), min(n, prune, merge)
    if merge < n:
      order = most_important(cls_attention(q, k, bias), prune)
      x, size = take(x, order), None if size is None else size.gather(1, order)
    if merge < prune:
      size = torch.ones_like(x[:, :, 0]) if size is None else size
      x, size = merged(x, size, merge, prune)
    return self.feed(x), size

  def searched(self, tokens: "Masked", rates: tuple[Tensor, Tensor] | None) -> "Masked":
    """Applies the layer with learnable counts; masks tokens instead of removing them.

    Args:
      tokens: The tokens.
      rates: Shares of the patches left after pruning and after merging; None in the last layer,
        which keeps one patch, because the others are not used.
    """
    x, size, keep, count = tokens
    q, k, v = self.project(x)
    before = float(count.detach())
    if keep is None or size is None:
      y, importance = functional.scaled_dot_product_attention(q, k, v), cls_attention(q, k)
      size, keep = torch.ones_like(x[:, :, 0]), torch.ones_like(x[:, :, 0])
    else:
      bias = size.log()[:, None, None]
      y, importance = masked_attention(q, k, v, bias, keep), cls_attention(q, k, bias, keep)
    x = self.add(x, y)
    if rates is None:
      return self.feed(x), size, keep, torch.tensor(2.0)
    order = most_important(importance, x.shape[1])
    x, size, keep = take(x, order), size.gather(1, order), keep.gather(1, order)
    n = x.shape[1]
    merge_mask, merge = choice(rates[1], n, 2.0, before)
    prune_mask, _ = choice(rates[0], n, float(merge.detach()), before)
    keep = keep * prune_mask
    x, size = joined(x, size, keep * (1 - merge_mask), int(merge.detach()))
    return self.feed(x), size, keep * merge_mask, merge

  def project(self, x: Tensor) -> tuple[Tensor, ...]:
    """Returns queries, keys and values, [b h n k] each."""
    b, n, _ = x.shape
    qkv = self.attn["qkv"](self.norm1(x)).view(b, n, 3, self.heads, -1)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)

  def add(self, x: Tensor, y: Tensor) -> Tensor:
    return x + self.attn["proj"](y.transpose(1, 2).flatten(2))

  def feed(self, x: Tensor) -> Tensor:
    return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


# Tokens [b n d], their sizes and masks [b n] (None if all are 1), and the unmasked count.
Masked = tuple[Tensor, Tensor | None, Tensor | None, Tensor]


class ViT(nn.Module):
  """Implements a Vision Transformer that classifies CLS, with sizes taken from its weights."""

  def __init__(self, weights: dict[str, Tensor], heads: int) -> None:
    super().__init__()
    width, _, _, patch = weights["patch_embed.proj.weight"].shape
    hidden = len(weights["blocks.0.mlp.fc1.bias"])
    depth = sum(name.endswith("norm1.bias") for name in weights)
    self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
    self.cls_token = nn.Parameter(torch.empty(1, 1, width))
    self.pos_embed = nn.Parameter(torch.empty_like(weights["pos_embed"]))
    self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
    self.norm = nn.LayerNorm(width, eps=1e-6)
    self.head = nn.Linear(width, len(weights["head.bias"]))
    self.load_state_dict(weights)

  def embed(self, images: Tensor) -> Tensor:
    x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
    return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed

  def classify(self, x: Tensor) -> Tensor:
    return self.head(self.norm(x[:, 0]))

  def forward(self, images: Tensor) -> Tensor:
    x = self.embed(images)
    for block in self.blocks:
      x = block(x)
    return self.classify(x)

  def reduced(self, images: Tensor, plan: list[list[int]]) -> Tensor:
    """Computes logits under a plan: the pruned and the merged count of every layer."""
    x, size = self.embed(images), None
    for block, counts in zip(self.blocks, plan, strict=True):
      x, size = block.reduced(x, size, *counts)
    return self.classify(x)

  def searched(
    self, images: Tensor, rates: dict[int, tuple[Tensor, Tensor]]
  ) -> tuple[Tensor, Tensor]:
    """Computes logits and multiply-accumulates, given the rates of layers that reduce tokens."""
    x = self.embed(images)
    tokens: Masked = x, None, None, torch.tensor(float(x.shape[1]))
    width, hidden = self.head.in_features, self.blocks[0].mlp["fc1"].out_features
    macs = self.patch_embed["proj"].weight.numel() * tokens[3] + self.head.weight.numel()
    for i, block in enumerate(self.blocks):
      before = tokens[3]
      if i in rates or i == len(self.blocks) - 1:
        tokens = block.searched(tokens, rates.get(i))
      else:
        assert tokens[2] is None, "only layers ahead of those with rates, and the last, have none"
        tokens = block(tokens[0]), *tokens[1:]
      macs = macs + before * 4 * width**2 + before**2 * 2 * width + tokens[3] * 2 * width * hidden
    return self.classify(tokens[0]), macs


def take(x: Tensor, order: Tensor) -> Tensor:
  return x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))


@torch.no_grad()
def cls_attention(
  q: Tensor, k: Tensor, bias: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
  """Computes the attention of CLS, averaged over heads, [b n]; -1 if masked."""
  logits = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT
  logits = logits if bias is None else logits + bias
  if keep is None:
    return logits.softmax(-1).mean(1)[:, 0]
  dropped = keep < 0.5
  score = logits.masked_fill(dropped[:, None, None], -torch.inf).softmax(-1).mean(1)[:, 0]
  return score.masked_fill(dropped, -1)


def most_important(importance: Tensor, count: int) -> Tensor:
  """Returns the positions of the most important tokens, CLS first, [b count]."""
  order = 1 + importance[:, 1:].argsort(dim=1, descending=True, stable=True)[:, : count - 1]
  return torch.cat([torch.zeros_like(order[:, :1]), order], dim=1)


def merged(x: Tensor, size: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
  """Merges tokens of rank [start, stop) into the most similar of the first `start` tokens."""
  unit = functional.normalize(x.detach(), dim=-1)
  score, receiver = (unit[:, start:stop] @ unit[:, 1:start].mT).max(dim=-1)
  receiver = receiver + 1
  place = receiver[:, :, None].expand(-1, -1, x.shape[2])
  mean = x[:, :start].scatter_reduce(1, place, x[:, start:stop], "mean")
  share = size[:, start:stop] * score.clamp(min=0)
  return mean, size[:, :start].scatter_add(1, receiver, share)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
  """Computes attention of every row to kept keys and itself (Rao et al., DynamicViT, Eq. 11)."""
  logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias
  keep = keep[:, None, None]
  seen = keep + (1 - keep) * torch.eye(keep.shape[-1])
  weights = (logits - logits.detach().amax(-1, keepdim=True)).exp() * seen
  return (weights @ v) / weights.sum(-1, keepdim=True)


def choice(share: Tensor, n: int, low: float, high: float) -> tuple[Tensor, Tensor]:
  """Returns which ranks are kept, and how many, both with CLS.

  Args:
    share: Share of the patches to keep.
    n: Tokens.
    low: Least count.
    high: Largest count; another mask handles the ranks from there on.
  """
  raw = share * (n - 1) + 1
  if raw < low:  # gradient descent must not push it further out
    raw.register_hook(lambda grad: grad.clamp(max=0))
  if raw > high:
    raw.register_hook(lambda grad: grad.clamp(min=0))
  expected = raw + (raw.clamp(low, high) - raw).detach()
  count = expected + (torch.ceil(expected - (n - 1) * _NOISE) - expected).detach()
  rank = torch.arange(float(n))
  probability = ((expected - rank - 0.5) / (_SPREAD * (n - 1))).sigmoid()
  probability = torch.where(rank < low, 1.0, probability)
  hard = ((rank < count) | (rank >= high)).float()
  return hard - probability.detach() + probability, count


def joined(x: Tensor, size: Tensor, joining: Tensor, start: int) -> tuple[Tensor, Tensor]:
  """Merges shares of tokens into the most similar of the first `start` tokens, without removal."""
  unit = functional.normalize(x.detach(), dim=-1)
  score = unit @ unit[:, 1:start].mT
  score[:, torch.arange(1, start), torch.arange(start - 1)] = -2
  score, receiver = score.max(dim=-1)
  receiver = receiver + 1
  place = receiver[:, :, None].expand(-1, -1, x.shape[2])
  total = x.scatter_add(1, place, x * joining[:, :, None])
  count = torch.ones_like(joining).scatter_add(1, receiver, joining)
  size = size.scatter_add(1, receiver, size * score.clamp(min=0) * joining)
  return total / count[:, :, None], size


class Search:
  """Runs steps of a search, which trains only the rates."""

  def __init__(self, model: ViT, arrays: dict[str, Tensor], options: dict, through: bool) -> None:
    """Sets up a search from its first step.

    Args:
      model: Model with fixed weights.
      arrays: Images, labels and initial rates.
      options: Budget and hyperparameters of the optimizer.
      through: Whether unused gradients of the weights are computed.
    """
    # A copy, because changing `requires_grad` recompiles a compiled model.
    self.model, self.options = copy.deepcopy(model).requires_grad_(through), options
    self.images, self.labels = arrays["search_images"], arrays["labels"]
    self.rates: dict[int, tuple[Tensor, Tensor]] = {}
    for i in range(len(model.blocks)):
      if f"rates.{i}.prune" in arrays:
        pair = (arrays[f"rates.{i}.{action}"].clone() for action in ("prune", "merge"))
        prune, merge = (share.requires_grad_() for share in pair)
        self.rates[i] = prune, merge
    self.trained = list(itertools.chain(*self.rates.values()))
    rate, betas = options["learning_rate"], tuple(options["betas"])
    self.adam = torch.optim.Adam(self.trained, lr=rate, betas=betas)

  def __call__(self) -> Tensor:
    """Runs a step, and returns the gradient of all rates."""
    self.model.zero_grad()
    self.adam.zero_grad()
    logits, macs = self.model.searched(self.images, self.rates)
    distance = (macs - self.options["target"]) / self.options["unit"]
    task = functional.cross_entropy(logits, self.labels)
    (task + self.options["weight"] * distance**2).backward()
    self.adam.step()
    return torch.stack([rate.grad for rate in self.trained])


class Side:
  """Holds the runnable computations by name."""

  def __init__(self, setup: dict[str, Any]) -> None:
    """Loads the arrays.

    Args:
      setup: `threads`; `heads` of a layer; `plan`, both counts of every layer; `search`, the
        options of `Search`; `arrays`, the .npz with `images` and `search_images`, f32[b 3 h w],
        `labels`, `weights.NAME` under timm's names, and `rates.LAYER.ACTION`.
    """
    torch.set_num_threads(setup["threads"])
    with np.load(setup["arrays"]) as file:
      arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    prefix = "weights."
    weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    self.setup, self.arrays, self.model = setup, arrays, ViT(weights, setup["heads"])
    self.runs: dict[tuple[str, int], Callable[[], Tensor]] = {}

  def prepare(self, name: str, batch: int) -> dict[str, Any]:
    """Returns the outputs of a first run, or the error if it cannot be compiled."""
    self.runs[name, batch] = run = self._run(name, batch)
    try:
      return {"outputs": run().flatten().tolist()}
    except Exception as error:
      if name != "dense compiled":
        raise
      # Any compiler error; the other computations are still measured.
      return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}

  def time(self, name: str, batch: int) -> dict[str, Any]:
    run, begin = self.runs[name, batch], time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - begin}

  def _run(self, name: str, batch: int) -> Callable[[], Tensor]:
    if name.startswith("search"):
      return Search(self.model, self.arrays, self.setup["search"], name == "search")
    images, plan = self.arrays["images"][:batch], self.setup["plan"]
    compiled = torch.compile(self.model)  # compiles at its first call
    forward: Callable[[], Tensor] = {
      "dense eager": lambda: self.model(images),
      "dense compiled": lambda: compiled(images),
      "plan eager": lambda: self.model.reduced(images, plan),
    }[name]
    return torch.inference_mode()(forward)


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
  """Answers questions on standard input with methods of the object that the first line sets up."""
  # The compiler's output must not be mistaken for an answer.
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  side = make(*json.loads(sys.stdin.readline()))
  print(json.dumps({"version": torch.__version__}), file=answers)
  for line in sys.stdin:
    what, *arguments = json.loads(line)
    print(json.dumps(getattr(side, what)(*arguments)), file=answers)


if __name__ == "__main__":
  serve(Side)
