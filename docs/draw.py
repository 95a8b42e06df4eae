"""Draws the figures of the concepts and the guide: `python docs/draw.py [FOLDER]`.

What they show is computed by the library: counts by its schedules and plans, choices by its own
operations. The folder is docs/figures unless given.
"""

import argparse
import dataclasses
import json
import pathlib
import textwrap
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import vitcomp_jax as vc
from vitcomp_jax.cost.macs import static_counts
from vitcomp_jax.data import sources
from vitcomp_jax.data.transforms import evaluation_image, normalize
from vitcomp_jax.methods import proxy
from vitcomp_jax.methods.diffrate import counts as diffrate
from vitcomp_jax.methods.vit_slim import search as vit_slim
from vitcomp_jax.models.attention import Attention
from vitcomp_jax.models.importance import cls_attention
from vitcomp_jax.models.spec import LayerSpec, ViTSpec
from vitcomp_jax.ops import merge
from vitcomp_jax.reporting import run_plots
from vitcomp_jax.reporting.plots import token_map, tokens_left
from vitcomp_jax.reporting.plots.style import BLUE, GRAY, GREEN, ORANGE, PURPLE, VERMILION

DEIT = vc.get_spec("deit_small_patch16_224")
MINI = vc.get_spec("vit_mini_patch3_30")
PLAN = vc.load_plan("diffrate/deit_small@2.9")
PALE = "#D9D9D9"
RESULTS = pathlib.Path(__file__).with_name("results")


def main(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name, draw in FIGURES.items():
    figure = Figure(layout="constrained", dpi=150)
    draw(figure)
    figure.savefig(folder / f"{name}.png", facecolor="white", metadata={"Software": None})


def _panels(figure: Figure, count: int, width: float, height: float) -> Sequence[Axes]:
  figure.set_size_inches(width, height)
  return figure.subplots(1, count, squeeze=False)[0]


def _plain(axes: Axes, title: str, x: str = "", y: str = "") -> None:
  axes.set_title(textwrap.fill(title, 28), fontsize=9)
  axes.set_xlabel(x, fontsize=9)
  axes.set_ylabel(y, fontsize=9)
  axes.tick_params(labelsize=8)
  axes.spines[["top", "right"]].set_visible(False)


def _tokens_by_layer(axes: Axes, title: str, plans: dict[str, tuple[LayerSpec, ...]]) -> None:
  """Tokens that the MLP of each layer sees."""
  styles = zip((BLUE, VERMILION, GREEN, ORANGE, PURPLE), "os^Dv", strict=True)
  for (name, layers), (color, marker) in zip(plans.items(), styles, strict=False):
    left = [n for _, n in static_counts(DEIT, layers)]
    numbers = range(1, len(left) + 1)
    axes.plot(numbers, left, color=color, marker=marker, markersize=4.5, label=name)
  axes.axhline(DEIT.num_tokens, color=GRAY, linewidth=0.9)
  axes.text(12.4, DEIT.num_tokens + 3, "dense", color=GRAY, fontsize=8, ha="right")
  axes.set(ylim=(0, 218), xticks=range(1, 13, 1 if len(plans) > 3 else 2))
  _plain(axes, title, "layer", "tokens after the layer")
  axes.legend(fontsize=7.5, frameon=False, loc="lower left")


def _at_budget(name: str) -> tuple[LayerSpec, ...]:
  return vc.methods.within(name, DEIT, PLAN.gmacs)


def overview(figure: Figure) -> None:
  (axes,) = _panels(figure, 1, 7.2, 3.8)
  plans = {"DiffRate (published)": PLAN.layers_for(DEIT)}
  for name, method in (("ToMe", "tome"), ("EViT", "evit"), ("DynamicViT", "dynamicvit")):
    plans[name] = _at_budget(method)
  plans["flat (uniform)"] = _at_budget("uniform")
  _tokens_by_layer(axes, f"DeiT-S at {PLAN.gmacs:.2f} of 4.60 GMACs", plans)


def diffrate_figure(figure: Figure) -> None:
  left, middle, right = _panels(figure, 3, 9.0, 3.0)
  options = diffrate.candidates(DEIT.num_patches, 4)
  logits = jnp.asarray(-(((options - 132) / 26.0) ** 2), jnp.float32)
  expected = diffrate.expected_count(logits, options)
  kept = float(diffrate.kept_count(expected, DEIT.num_patches))
  left.bar(options, jax.nn.softmax(logits), width=3.2, color=BLUE)
  left.axvline(kept, color=VERMILION, linestyle="--")
  left.text(-4, 0.065, f"expectation,\nrounded up:\n{kept:.0f} tokens", fontsize=8, color=VERMILION)
  left.set_ylim(0, 0.095)
  _plain(left, "1. Probability of each candidate count", "patch tokens kept", "probability")

  probability = diffrate.keep_probability(logits, options, 1, DEIT.num_tokens)
  ranks = np.arange(DEIT.num_tokens)
  middle.plot(ranks, probability, color=BLUE, label="probability: takes the gradient")
  middle.step(ranks, ranks < kept + 1, color=VERMILION, linestyle="--", label="mask: forward pass")
  middle.set_ylim(-0.03, 1.5)
  middle.legend(fontsize=8, frameon=False, loc="upper right")
  _plain(middle, "2. Is the token of this rank kept?", "rank by importance", "kept")

  counts = run_plots.kept_counts(DEIT, PLAN.layers_for(DEIT))
  after_pruning, after_merging = np.transpose(tokens_left(counts, DEIT.num_tokens))
  numbers = np.arange(1, DEIT.depth + 1)
  before = np.array([DEIT.num_tokens, *after_merging[:-1]])
  pruned, merged = before - after_pruning, after_pruning - after_merging
  right.bar(numbers, after_merging, color=BLUE, label="go on")
  right.bar(numbers, merged, bottom=after_merging, color=ORANGE, label="merged", hatch="//")
  top = after_merging + merged
  right.bar(numbers, pruned, bottom=top, color=PALE, label="pruned", hatch="..")
  right.set(xticks=numbers[::2], ylim=(0, 210))
  right.legend(fontsize=8, frameon=False, loc="upper right")
  _plain(right, "3. The plan diffrate/deit_small@2.9", "layer", "tokens")


def one_proxy_figure(figure: Figure) -> None:
  figure.set_size_inches(9.2, 3.4)
  left, right = figure.subplots(1, 2, width_ratios=[1, 1.7])
  length, share = DEIT.num_patches, jnp.asarray(0.605)
  least, most = jnp.asarray(1.0), jnp.asarray(float(length))
  mask, kept = proxy.learnt_count(share, length, least, most)
  slope, _ = jax.jacrev(proxy.learnt_count)(share, length, least, most)
  ranks = np.arange(length)
  left.bar(ranks, slope / slope.max(), width=1.0, color=BLUE, label="distribution: gradient")
  left.step(ranks, mask, where="mid", color=VERMILION, linestyle="--", label="mask: forward pass")
  left.axvline(float(share * length), color=GRAY, linewidth=0.9)
  words = dict(fontsize=8, ha="right")
  left.text(float(share * length) - 4, 1.05, f"share {share:.3f}: keeps {kept:.0f}", **words)
  left.set(ylim=(-0.03, 1.5), yticks=(0, 0.5, 1))
  left.legend(fontsize=8, frameon=False, loc="upper left")
  _plain(left, f"A list of {length} elements", "rank", "kept")

  measured = json.loads((RESULTS / "marginal_costs.json").read_text())
  styles = {
    "pruned": ("tokens pruned", VERMILION, "s"),
    "merged": ("tokens merged", ORANGE, "D"),
    "hidden": ("hidden units", BLUE, "o"),
    "qk": ("queries and keys", PURPLE, "v"),
    "value": ("values", GREEN, "^"),
  }
  bounds = (-5, 8)  # costs beyond are written out
  for place, (kind, (name, color, marker)) in enumerate(styles.items()):
    for row in (row for row in measured["rows"] if row["kind"] == kind):
      face = "white" if row["kept"] == row["of"] else color
      x, y = row["layer"] + 0.15 * (place - 2), np.clip(row["cost"], *bounds)
      style = dict(color=color, marker=marker, markersize=4.5, markerfacecolor=face)
      right.errorbar(x, y, row["se"] if y == row["cost"] else None, elinewidth=0.9, **style)
      if y != row["cost"]:
        right.text(x - 0.15, y, f"{row['cost']:.0f}", fontsize=8, ha="right", va="center")
    right.plot([], [], color=color, marker=marker, markersize=4.5, linestyle="", label=name)
  right.axhline(0, color=GRAY, linewidth=0.9)
  right.set(xticks=range(1, DEIT.depth + 1), ylim=(-5.4, 8.4))
  right.legend(fontsize=7.5, frameon=False, loc="lower left")
  _plain(
    right,
    f"DeiT-Tiny at {measured['gmacs']:.2f} GMACs",
    "layer",
    "rise of the loss for each GMAC taken",
  )


def accuracy_figure(figure: Figure) -> None:
  figure.set_size_inches(7.4, 3.4)
  rows = json.loads((RESULTS / "photos.json").read_text())["rows"]
  (dense,) = [row for row in rows if row["method"] == "dense"]
  lines = {  # names of rows up to the budget
    "searched, tokens and widths": ("diffrate[what=both]", BLUE, "o"),
    "searched, tokens": ("diffrate", VERMILION, "s"),
    "the authors' plans": ("diffrate/deit_tiny", GRAY, "D"),
    "ToMe": ("tome", GREEN, "^"),
    "linear, merged": ("linear_merge", PURPLE, "v"),
  }
  left, right = figure.subplots(1, 2)
  titles = {"top1": "top-1 (%)", "loss": "cross-entropy, log scale"}
  for axes, (key, title) in zip((left, right), titles.items(), strict=True):
    for name, (start, color, marker) in lines.items():
      found = [row for row in rows if row["name"].partition("@")[0] == start]
      x, y, error = np.transpose([(row["gmacs"], row[key], row[f"{key}_se"]) for row in found])
      order = np.argsort(x)
      style = dict(color=color, marker=marker, markersize=4.5, linewidth=1.2, capsize=2)
      axes.errorbar(x[order], y[order], error[order], label=name, **style)
    axes.axhline(dense[key], color=GRAY, linewidth=0.9)
    axes.annotate("dense", (0.4, dense[key]), (0, 3), textcoords="offset points", fontsize=8)
    _plain(axes, title, "GMACs")
  right.set_yscale("log")
  right.set_yticks((0.8, 1, 1.5, 2, 3, 5), ("0.8", "1", "1.5", "2", "3", "5"))
  right.minorticks_off()
  left.legend(fontsize=8, frameon=False, loc="lower right")


def vit_slim_figure(figure: Figure) -> None:
  left, middle, right = _panels(figure, 3, 9.0, 2.9)
  spec = dataclasses.replace(
    DEIT, name="example", width=24, depth=2, num_heads=3, mlp_dim=8, image_size=(32, 32)
  )
  random = np.random.default_rng(3)
  method = vit_slim.ViTSlim(spec)
  arch = method.init()
  for gates in arch.values():
    gates["head_gate"]["zeta"] = random.beta(0.9, 0.8, (1, 1, 3, 1, 8))
    gates["hidden_gate"]["zeta"] = random.random((1, 1, 8))
  budget = 0.6
  masks = method.cut(arch, (budget, 1.0, 1.0))
  threshold = vit_slim.thresholds(arch, (budget, 1.0, 1.0))[0]
  values = np.sort(np.concatenate([np.ravel(g["head_gate"]["zeta"]) for g in arch.values()]))
  colors = [BLUE if value >= threshold else PALE for value in values]
  left.bar(range(len(values)), values, color=colors, width=0.8)
  left.axhline(threshold, color=VERMILION, linestyle="--")
  left.text(0, threshold + 0.05, "one threshold\nfor all layers", color=VERMILION, fontsize=8)
  _plain(left, "1. Factors of all head dimensions, sorted", "head dimension", "factor")

  layers, indices = vit_slim.deploy(spec, masks)
  _kernel(middle, masks.attn[0].ravel(), 8, "2. Masked: columns of the queries' kernel, layer 1")
  kept = np.ravel(indices[0].attn) >= 0
  _kernel(right, kept, layers[0].head_dim, "3. Slimmed: gathered; head 2 filled up with zeros")


def _kernel(axes: Axes, kept: np.ndarray, head_dim: int, title: str) -> None:
  """Columns of a kernel, head by head; pale where there is nothing."""
  for i, is_kept in enumerate(kept):
    x = i + i // head_dim
    style = dict(facecolor=BLUE) if is_kept else dict(facecolor=PALE, hatch="//")
    axes.add_patch(_box(x, 0, 0.85, 6, **style))
  for head in range(len(kept) // head_dim):
    center = head * (head_dim + 1) + head_dim / 2
    axes.text(center, -0.9, f"head {head + 1}", ha="center", fontsize=8)
  axes.set(xlim=(-1, 27), ylim=(-1.6, 6.6))
  _plain(axes, title)
  axes.set_axis_off()


def _box(x: float, y: float, width: float, height: float, **style: str) -> Rectangle:
  return Rectangle((x, y), width, height, edgecolor="white", linewidth=0.5, **style)


def tome_figure(figure: Figure) -> None:
  left, right = _panels(figure, 2, 9.4, 3.5)
  keys = jax.random.normal(jax.random.key(5), (1, 11, 3))
  remove = 3
  order, receiver = merge.bipartite_match(keys, remove, num_prefix=1)
  joins = {int(s): int(order[0, r]) for s, r in zip(order[0, -remove:], receiver[0], strict=True)}
  scores = merge.similarity(keys[:, 2::2], keys[:, 1::2])
  best = {2 * i + 2: 2 * int(j) + 1 for i, j in enumerate(jnp.argmax(scores[0], axis=1))}
  for source, target in best.items():
    is_merged = source in joins
    assert not is_merged or joins[source] == target
    style = dict(color=VERMILION, linewidth=2) if is_merged else dict(color=GRAY, linestyle=":")
    left.plot([source, target], [1, 0], **style)
  for i in range(11):
    color = PALE if i == 0 else (ORANGE if i in joins else BLUE)
    left.plot(i, 1 - i % 2, "o", color=color, markersize=15)
    name = "CLS" if i == 0 else str(i)
    ink = "black" if color != BLUE else "white"
    left.text(i, 1 - i % 2, name, ha="center", va="center", fontsize=8, color=ink)
  left.text(10.8, 1, "set A", va="center", fontsize=9)
  left.text(10.8, 0, "set B", va="center", fontsize=9)
  left.set(xlim=(-0.8, 12.2), ylim=(-0.5, 1.5))
  left.set_axis_off()
  left.set_title(
    "Each token of A has an edge to its most similar one in B;\nr = 3 stay", fontsize=10
  )
  plans = {f"r = {r}": vc.methods.tome.layers(DEIT, r) for r in (8, 13, 16)}
  plans["mean 13, falling"] = vc.methods.tome.layers(DEIT, (13, -1))
  _tokens_by_layer(right, "DeiT-S", plans)


def _bundled(spec: ViTSpec, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Images of the bundled data set, as pixels and normalised."""
  pre = dataclasses.replace(spec.preprocess, pad=1)
  source = sources.make_source("bundled", None, "test", (1, 1), 0)
  pixels = np.stack([evaluation_image(source[i].image, pre) for i in range(count)])
  return pixels, np.asarray(normalize(pixels, pre))


def evit_figure(figure: Figure) -> None:
  left, middle, right = _panels(figure, 3, 9.0, 3.0)
  model, params = vc.load(MINI.name, "bundled")
  pixels, images = _bundled(MINI, 3)
  out, captured = model.apply(
    {"params": params},
    images[2:3],
    method="forward",
    mutable=["intermediates"],
    capture_intermediates=lambda module, _: isinstance(module, Attention),
  )
  _, stats = captured["intermediates"]["blocks_1"]["attn"]["__call__"][0]
  attention = np.asarray(cls_attention(stats, out.layers[1]))[0, 1:]
  keep = int(np.ceil(0.7 * len(attention)))
  ranks, order = np.arange(len(attention)), np.argsort(-attention)
  colors = [BLUE if rank < keep else ORANGE for rank in ranks]
  left.bar(ranks, attention[order], color=colors, width=1.0)
  left.plot([], [], "s", color=BLUE, label=f"kept: {keep}")
  left.plot([], [], "s", color=ORANGE, label=f"fused: {len(attention) - keep}")
  left.set_yscale("log")
  left.legend(fontsize=8, frameon=False)
  _plain(left, "Attention that CLS pays the patches, sorted", "rank", "attention")

  source = np.where(np.isin(ranks, order[:keep]), ranks, -1)
  middle.imshow(token_map(pixels[2], source, MINI.grid), interpolation="nearest")
  middle.set_axis_off()
  middle.set_title("The patches that are kept\n(others hatched)", fontsize=9)
  rates = {}
  for rate in (0.9, 0.7, 0.5):
    places = (3, 6, 9)
    kept = [rate if i in places else 1 for i in range(DEIT.depth)]
    rates[f"keep rate {rate}"] = vc.methods.evit.layers(DEIT, kept)
  _tokens_by_layer(right, "DeiT-S, after layers 4, 7 and 10", rates)


def dynamicvit_figure(figure: Figure) -> None:
  left, middle, right = _panels(figure, 3, 9.0, 3.0)
  for axes, title, after in (
    (left, "Training: a draw per token, which masks", "all tokens go on,\nmasked or not"),
    (middle, "Deployed: the highest scores, which select", "the kept tokens go on"),
  ):
    is_training = axes is left
    keep = np.array([1, 0, 1, 1, 0, 1])
    for i, kept in enumerate(keep):
      axes.add_patch(_box(i, 4, 0.8, 0.8, facecolor=BLUE))
      axes.annotate(
        "", (i + 0.4, 3.3), (i + 0.4, 3.95), arrowprops=dict(arrowstyle="->", color=GRAY)
      )
      style = dict(facecolor=BLUE) if kept else dict(facecolor=PALE, hatch="//")
      if is_training:
        axes.add_patch(_box(i, 0.6, 0.8, 0.8, **style))
        axes.annotate(
          "", (i + 0.4, 1.45), (i + 0.4, 2.2), arrowprops=dict(arrowstyle="->", color=GRAY)
        )
    if not is_training:
      for to, i in enumerate(np.flatnonzero(keep)):
        axes.add_patch(_box(to, 0.6, 0.8, 0.8, facecolor=BLUE))
        axes.annotate(
          "", (to + 0.4, 1.45), (i + 0.4, 2.2), arrowprops=dict(arrowstyle="->", color=GRAY)
        )
    axes.add_patch(_box(-0.1, 2.25, 6.0, 1.0, facecolor="#F3E3C3"))
    module = "prediction module" + (" + Gumbel noise" if is_training else "")
    axes.text(2.9, 2.75, module, ha="center", va="center", fontsize=9)
    axes.text(2.9, 5.05, "patch tokens before the layer", ha="center", fontsize=8)
    axes.text(2.9, 0.35, after, ha="center", va="top", fontsize=8)
    axes.set(xlim=(-0.5, 6.3), ylim=(-0.5, 5.5))
    axes.set_axis_off()
    axes.set_title(textwrap.fill(title, 28), fontsize=9)
  plans = {
    f"ratio {ratio}": vc.methods.dynamicvit.layers(DEIT, (3, 6, 9), [ratio, ratio**2, ratio**3])
    for ratio in (0.9, 0.7, 0.5)
  }
  _tokens_by_layer(right, "DeiT-S, before layers 4, 7 and 10", plans)


def unmerge_figure(figure: Figure) -> None:
  folder = pathlib.Path(__file__).parents[1] / "configs" / "plans" / "fashion_mnist"
  plan = vc.load_plan(str(folder / "diffrate@0.5-seed0.json"))
  pixels, images = _bundled(MINI, 3)
  tokens = []
  for chosen in (None, plan):
    model, params = vc.load(MINI.name, "bundled", chosen)
    tokens.append(model.apply({"params": params}, images, method="forward").tokens)
  dense, short = tokens
  prefix = short.num_prefix
  maps = [vc.unmerge(t) for t in tokens]
  # As it stands in memory: the tokens that are left, row by row, and nothing behind them.
  raw = np.full(dense.x[:, prefix:].shape, np.nan)
  raw[:, : short.x.shape[1] - prefix] = short.x[:, prefix:]
  colours = _colours(np.asarray(maps[0]))
  figure.set_size_inches(8.4, 6.5)
  panels = figure.subplots(3, 4)
  names = (
    "image",
    "dense model",
    f"before: {short.x.shape[1] - prefix} tokens",
    "after vc.unmerge",
  )
  for row in range(3):
    pictures = [pixels[row]] + [colours(np.asarray(m)[row]) for m in (maps[0], raw, maps[1])]
    for axes, picture, name in zip(panels[row], pictures, names, strict=True):
      axes.imshow(picture, interpolation="nearest")
      axes.set_axis_off()
      if row == 0:
        axes.set_title(name, fontsize=10)


def _colours(reference: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """Three principal components of features as colours, white where there are none."""
  flat = reference.reshape(-1, reference.shape[-1])
  mean = flat.mean(axis=0)
  _, _, axes = np.linalg.svd(flat - mean, full_matrices=False)
  low, high = np.percentile((flat - mean) @ axes[:3].T, (2, 98), axis=0)

  def paint(features: np.ndarray) -> np.ndarray:
    colour = ((features - mean) @ axes[:3].T - low) / (high - low)
    return np.nan_to_num(np.clip(colour, 0, 1), nan=1.0).reshape(*MINI.grid, 3)

  return paint


FIGURES: dict[str, Callable[[Figure], None]] = {
  "overview": overview,
  "diffrate": diffrate_figure,
  "accuracy": accuracy_figure,
  "one_proxy": one_proxy_figure,
  "vit_slim": vit_slim_figure,
  "tome": tome_figure,
  "evit": evit_figure,
  "dynamicvit": dynamicvit_figure,
  "unmerge": unmerge_figure,
}


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  default = pathlib.Path(__file__).with_name("figures")
  parser.add_argument("folder", nargs="?", type=pathlib.Path, default=default)
  main(parser.parse_args().folder)
