"""The figures of a run, as PNG files: each function draws measured values to a path.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; line styles and markers
tell the same, for gray print.
"""

import math
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from vitcomp_jax.atomic import replacing

DPI = 150
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GRAY = "#CC79A7", "#56B4E9", "#000000", "#6E6E6E"
_COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_MOST_LABELS = 12  # points with names of their own; more get a legend
_TITLE, _TEXT, _SMALL = 11, 10, 9  # font sizes in points

_OUTLINE = (230, 159, 0)  # ORANGE: seen on black as on white
_GRID = (110, 110, 110)  # between patches that still are tokens of their own
_CELL = 240  # pixels, about, of the side of an image in the token maps
_GAP, _HEAD, _ROW_HEAD, _FOOT_LINE = 14, 56, 34, 24  # pixels


def tokens_left(
  counts: Sequence[Sequence[int]], num_tokens: int | None = None
) -> list[tuple[int, int]]:
  """Tokens after pruning and after merging, where a count above what is there does nothing.

  Args:
    counts: `prune_keep` and `merge_keep` of each layer.
    num_tokens: Before the first layer; none: its `prune_keep`.

  Returns:
    Of each layer, the tokens after pruning and after merging.
  """
  left, n = [], num_tokens
  for prune_keep, merge_keep in counts:
    pruned = prune_keep if n is None else min(n, prune_keep)
    n = min(pruned, merge_keep)
    left.append((pruned, n))
  return left


def schedule(
  path: pathlib.Path, plans: Mapping[str, Sequence[tuple[int, int]]], num_tokens: int
) -> None:
  """Draws the tokens that each layer leaves.

  Args:
    path: Of the PNG.
    plans: By name, `prune_keep` and `merge_keep` of each layer, prefix included.
    num_tokens: Before the first layer.
  """
  depth = max(map(len, plans.values()), default=1)
  figure, axes = _subplots(width=max(7.0, 0.32 * depth + 1.5), height=4.2)
  axes.axhline(num_tokens, color=GRAY, linewidth=0.9, label=f"dense ({num_tokens})")
  for index, (name, counts) in enumerate(plans.items()):
    _draw_plan(axes, index, name, tokens_left(counts, num_tokens), num_tokens)
  for fill, what in (("none", "after pruning"), (GRAY, "after merging")):
    axes.plot([], [], "o", color=GRAY, markerfacecolor=fill, markersize=5, label=what)
  axes.set_xlim(0.4, depth + 0.6)
  axes.set_ylim(0, num_tokens * 1.06)
  axes.set_xticks(range(1, depth + 1, 1 if depth <= 26 else 2))
  _name_axes(axes, "layer", "tokens, prefix included")
  axes.legend(fontsize=_SMALL, loc="best", framealpha=0.9)
  _save(figure, path)


def _draw_plan(
  axes: Axes, index: int, name: str, left: Sequence[tuple[int, int]], num_tokens: int
) -> None:
  """A staircase: a step down where the layer prunes, and one a little later where it merges."""
  color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
  x, y, n = [0.5], [num_tokens], num_tokens
  drops: dict[str, list[tuple[float, int]]] = {"none": [], color: []}
  for layer, (pruned, merged) in enumerate(left, 1):
    for at, count, fill in ((layer - 0.2, pruned, "none"), (layer + 0.2, merged, color)):
      x.append(at)
      y.append(count)
      if count < n:
        drops[fill].append((at, count))
      n = count
  x.append(len(left) + 0.5)
  y.append(n)
  line = _LINES[index % len(_LINES)]
  width, size = 2.4 - 0.4 * min(index, 2), 7.5 - 1.3 * min(index, 2)
  axes.plot(x, y, color=color, linestyle=line, linewidth=width, drawstyle="steps-post", label=name)
  for fill, points in drops.items():
    face = "white" if fill == "none" else fill
    axes.plot(*_columns(points), marker, color=color, markerfacecolor=face, markersize=size)


def search_curves(
  path: pathlib.Path,
  records: Sequence[Mapping[str, Any]],
  targets: Sequence[float],
  key: str = "gmacs",
  label: str = "GMACs per image",
) -> None:
  """Draws how loss and cost went during a search.

  Args:
    path: Of the PNG.
    records: Logged figures, with `step`, `loss`, `task_loss` and the cost.
    targets: The budget at each of them.
    key: Of the cost.
    label: Its name and unit.
  """
  figure, losses = _subplots(width=7.0, height=5.4, rows=2)
  compute = figure.axes[1]
  dot = "." if len(records) <= 60 else ""
  for key, label, color, line in (
    ("loss", "loss with the budget term", BLUE, "-"),
    ("task_loss", "task loss", VERMILION, (0, (4, 1.2))),
  ):
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    if points:
      losses.plot(*_columns(points), color=color, ls=line, marker=dot, lw=1.5, label=label)
  values = [r[k] for r in records for k in ("loss", "task_loss") if r.get(k) is not None]
  if values and 0 < 20 * min(values) < max(values):
    losses.set_yscale("log")
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    losses.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    losses.yaxis.set_minor_formatter(NullFormatter())
  points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
  compute.plot(*_columns(points), color=GREEN, marker=dot, lw=1.8, label="this step's plan")
  budget = f"budget ({', '.join(map(number, dict.fromkeys(targets)))})"
  limits = _columns([(r["step"], target) for r, target in zip(records, targets, strict=True)])
  dashes = (0, (6, 3))
  compute.plot(*limits, color=BLACK, ls=dashes, lw=1.2, label=budget, drawstyle="steps-pre")
  _name_axes(losses, "", "loss")
  _name_axes(compute, "step", label)
  compute.xaxis.set_major_locator(MaxNLocator(integer=True))
  for axes in (losses, compute):
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=_SMALL, loc="upper right", framealpha=0.9)
  _save(figure, path)


def mask_histograms(
  path: pathlib.Path, records: Sequence[Mapping[str, Any]], limits: Sequence[float]
) -> None:
  """Draws how the values of the soft masks spread while ViT-Slim searches.

  Args:
    path: Of the PNG.
    records: Logged figures, with `step` and the histogram of each kind of mask that learns.
    limits: Lower end of the first bin and upper end of the last.
  """
  names = {"attn": "attention", "mlp": "hidden units", "patch": "patches"}
  kinds = [kind for kind in names if any(f"{kind}_histogram" in r for r in records)]
  figure, _ = _subplots(width=7.0, height=2.4 * len(kinds), rows=len(kinds))
  for axes, kind in zip(figure.axes, kinds, strict=True):
    found = [r for r in records if f"{kind}_histogram" in r]
    shares = np.array([r[f"{kind}_histogram"] for r in found], float)
    shares /= shares.sum(axis=1, keepdims=True)
    steps = [0, *(r["step"] for r in found)]
    edges = np.linspace(limits[0], limits[1], shares.shape[1] + 1)
    mesh = axes.pcolormesh(steps, edges, 100 * shares.T, cmap="Blues", norm=LogNorm(0.1, 100))
    figure.colorbar(mesh, ax=axes, label="share (%)", format="%g", pad=0.02)
    _name_axes(axes, "step" if kind == kinds[-1] else "", f"masks: {names[kind]}")
  _save(figure, path)


def kept_widths(path: pathlib.Path, kept: Mapping[str, Sequence[float]]) -> None:
  """Draws the shares that each slimmed layer keeps.

  Args:
    path: Of the PNG.
    kept: By what is kept (such as hidden units), the share in every layer.
  """
  depth = max(map(len, kept.values()))
  figure, axes = _subplots(width=max(7.0, 0.5 * depth + 1.5), height=4.0)
  for index, (name, shares) in enumerate(kept.items()):
    x = [layer + 0.25 * (index - (len(kept) - 1) / 2) for layer in range(1, depth + 1)]
    color, hatch = _COLORS[index], ("", "//", "..")[index % 3]
    percent = [100 * share for share in shares]
    axes.bar(x, percent, 0.22, color=color, hatch=hatch, edgecolor="white", label=name)
  axes.set_ylim(0, 105)
  axes.set_xticks(range(1, depth + 1))
  _name_axes(axes, "layer", "kept (%)")
  axes.legend(fontsize=_SMALL, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
  _save(figure, path)


def kept_patches(path: pathlib.Path, kept: Sequence[np.ndarray], grid: tuple[int, int]) -> None:
  """Draws which patches each layer keeps.

  Args:
    path: Of the PNG.
    kept: Of every layer, bool[p], row by row.
    grid: Rows and columns of patches.
  """
  columns = min(len(kept), 6)
  rows = math.ceil(len(kept) / columns)
  figure = Figure(figsize=(1.5 * columns, 1.75 * rows), dpi=DPI, layout="constrained")
  FigureCanvasAgg(figure)
  colors = ListedColormap(["#D0D0D0", BLUE])
  for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
    if index >= len(kept):
      axes.set_axis_off()
      continue
    axes.pcolormesh(
      kept[index].reshape(grid), cmap=colors, vmin=0, vmax=1, edgecolors="white", linewidth=0.6
    )
    axes.invert_yaxis()
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.set_title(f"layer {index + 1}: {int(kept[index].sum())}", fontsize=_SMALL)
  _save(figure, path)


def accuracy_against_gmacs(
  path: pathlib.Path,
  rows: Sequence[Mapping[str, Any]],
  cloud: Sequence[tuple[float, float]] = (),
) -> None:
  """Draws top-1 accuracy against compute; rows of one method at several budgets are joined.

  Args:
    path: Of the PNG.
    rows: Of result.json; those without `top1` or `gmacs` are left out.
    cloud: GMACs and top-1 of random schedules.
  """
  figure, axes = _subplots(width=7.0, height=4.6)
  if cloud:
    axes.plot(*_columns(cloud), ".", color="#B0B0B0", markersize=3, zorder=1)
  methods: dict[str, list[tuple[float, float]]] = {}
  labels: list[tuple[float, float, str, str]] = []
  for row in rows:
    if row.get("top1") is not None and row.get("gmacs") is not None:
      method, point = _method(row["name"]), (row["gmacs"], row["top1"])
      methods.setdefault(method, []).append(point)
      labels.append((*point, row["name"], _method_style(method, list(methods))[0]))
  for index, (method, points) in enumerate(methods.items()):
    color, marker, size = _method_style(method, list(methods))
    line = _LINES[index // len(_COLORS) % len(_LINES)]
    axes.plot(
      *_columns(sorted(points)),
      label=method,
      color=color,
      linestyle=line,
      linewidth=1,
      marker=marker,
      markersize=size,
    )
  axes.margins(0.18)
  _name_axes(axes, "GMACs per image", "top-1 accuracy (%)")
  axes.ticklabel_format(useOffset=False)
  if len(labels) > _MOST_LABELS:
    axes.margins(0.05)
    axes.legend(fontsize=_SMALL, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
  else:
    _label_points(figure, axes, labels)
  _save(figure, path)


def _method(name: str) -> str:
  """`tome@0.5` is tome at a budget; `vit_slim@masked` is something of its own."""
  method, _, budget = name.partition("@")
  return method if budget.replace(".", "", 1).isdigit() else name


def _method_style(method: str, methods: list[str]) -> tuple[str, str, float]:
  """Colour, marker and its size."""
  if method == "dense":
    return BLACK, "*", 13
  index = [m for m in methods if m != "dense"].index(method)
  return _COLORS[index % (len(_COLORS) - 1)], _MARKERS[index % len(_MARKERS)], 8


def _label_points(
  figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str, str]]
) -> None:
  """Writes a label beside each point, where it covers no other label, no point and no line.

  Args:
    figure: Laid out here, for good.
    axes: With the points drawn.
    labels: Of each point, its place, text and colour.
  """
  figure.draw_without_rendering()
  figure.set_layout_engine("none")  # What was laid out must not move any more.
  centers = [axes.transData.transform(label[:2]) for label in labels]
  taken = [Bbox.from_bounds(x - 12, y - 12, 24, 24) for x, y in centers]
  taken += _along_lines(axes)
  order = sorted(range(len(labels)), key=lambda i: (-centers[i][1], centers[i][0]))
  for i in order:
    x, y, name, color = labels[i]
    text = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=_SMALL)
    text.set(va="bottom", color=_darker(color))
    text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    extent = text.get_window_extent()
    boxes = list(_boxes(centers[i], extent.width, extent.height))
    badness = [_badness(b, taken, axes.bbox) + _covered(b, centers[i], centers) for b in boxes]
    box = boxes[int(np.argmin(badness))]
    text.set_position(tuple((box.p0 - centers[i]) * 72 / figure.dpi))
    taken.append(box)
    if _distance(box, centers[i]) > 24:
      end = np.clip(centers[i], box.p0, box.p1)
      ends = axes.transData.inverted().transform([centers[i], end])
      axes.plot(*ends.T, color=GRAY, linewidth=0.7, zorder=1, scalex=False, scaley=False)


def _along_lines(axes: Axes) -> list[Bbox]:
  """Small boxes on the lines that are drawn, in pixels."""
  boxes = []
  for line in axes.lines:
    points = axes.transData.transform(line.get_xydata())
    for start, end in zip(points[:-1], points[1:], strict=True):
      steps = 2 + int(np.hypot(*(end - start)) / 6)
      boxes += [Bbox([p - 2, p + 2]) for p in np.linspace(start, end, steps)]
  return boxes


def _darker(color: str) -> tuple[float, ...]:
  """For text, which needs more contrast than a marker."""
  return tuple(0.65 * part for part in to_rgb(color))


def _boxes(center: np.ndarray, width: float, height: float) -> Iterator[Bbox]:
  """Where a label could stand, the best places first, in pixels."""
  for away in (17, 32, 52, 76, 105):
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
      x = center[0] + dx * away - width * (1 - dx) / 2
      y = center[1] + dy * away - height * (1 - dy) / 2
      yield Bbox.from_bounds(x, y, width, height)


def _badness(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
  """The area that the box shares with others, or has outside the frame, in pixels."""
  inside = Bbox.intersection(box, frame)
  outside = box.width * box.height - (inside.width * inside.height if inside else 0)
  shared = (Bbox.intersection(box, other) for other in taken)
  return float(round(outside + sum(s.width * s.height for s in shared if s), 3))


def _covered(box: Bbox, center: np.ndarray, centers: Sequence[np.ndarray]) -> float:
  """A penalty for each other point that the line from the point to its label runs through."""
  path = np.linspace(center, np.clip(center, box.p0, box.p1), 20)
  others = [c for c in centers if np.hypot(*(c - center)) > 8]
  return 50.0 * sum(bool(np.any(np.hypot(*(path - c).T) < 8)) for c in others)


def _distance(box: Bbox, point: np.ndarray) -> float:
  return float(np.hypot(*(np.clip(point, box.p0, box.p1) - point)))


def token_maps(
  path: pathlib.Path,
  images: np.ndarray,
  sources: Sequence[np.ndarray],
  num_prefix: int,
  grid: tuple[int, int],
  layer_names: Sequence[str],
  titles: Sequence[str],
) -> None:
  """Draws which patches were pruned and which share a token: one row per image.

  Args:
    path: Of the PNG.
    images: uint8[n h w 3].
    sources: Of each chosen layer, int[n p]: the token that holds each patch; -1 pruned.
    num_prefix: Tokens that hold no patch.
    grid: Rows and columns of patches.
    layer_names: Of the chosen layers.
    titles: Of the images.
  """
  columns = [np.stack([enlarge(image) for image in images])]
  columns += [
    np.stack([token_map(i, s, grid) for i, s in zip(images, source, strict=True)])
    for source in sources
  ]
  heads = [f"image\n{grid[0] * grid[1]} patches"] + [
    f"{name}\n{_count_text(source, num_prefix)}"
    for name, source in zip(layer_names, sources, strict=True)
  ]
  _save(_mosaic(columns, heads, titles), path)


def _mosaic(columns: Sequence[np.ndarray], heads: Sequence[str], titles: Sequence[str]) -> Figure:
  """A figure in which each pixel of a picture is one pixel of the file."""
  n, h, w, _ = columns[0].shape
  width = _GAP + len(columns) * (w + _GAP)
  foot = textwrap.wrap(
    "Orange: outlines of tokens that stand for several patches, in their mean colour (parts of "
    "one token may lie apart). Gray: patches with a token of their own. Dark, hatched: pruned.",
    max(30, width // 11),
  )
  height = _HEAD + n * (_ROW_HEAD + h) + (len(foot) + 1) * _FOOT_LINE
  figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
  FigureCanvasAgg(figure)

  def write(x: float, y: float, text: str, size: float, **options: Any) -> None:
    figure.text(x / width, 1 - y / height, text, fontsize=size, **options)

  for c, (column, head) in enumerate(zip(columns, heads, strict=True)):
    left = _GAP + c * (w + _GAP)
    write(left + w / 2, 8, head, _SMALL, ha="center", va="top")
    for r, picture in enumerate(column):
      top = _HEAD + r * (_ROW_HEAD + h) + _ROW_HEAD
      box = (left / width, 1 - (top + h) / height, w / width, h / height)
      axes = figure.add_axes(box)
      axes.imshow(picture, interpolation="nearest", aspect="auto")
      axes.set_axis_off()
  for r, title in enumerate(titles):
    write(_GAP, _HEAD + r * (_ROW_HEAD + h) + _ROW_HEAD - 6, title, _SMALL, va="bottom")
  write(_GAP, height - _FOOT_LINE / 2, "\n".join(foot), 7.5, va="bottom", color="#303030")
  return figure


def _count_text(source: np.ndarray, num_prefix: int) -> str:
  """How many tokens there are, if it is the same for all images."""
  counts = {num_prefix + len(np.unique(row[row >= 0])) for row in np.asarray(source)}
  least, most = min(counts), max(counts)
  return f"{least} tokens" if least == most else f"{least} to {most} tokens"


def token_map(image: np.ndarray, source: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """An image's groups, enlarged, with outlines between them and hatched where pruned.

  Args:
    image: uint8[h w 3].
    source: int[p], as in `paint_groups`.
    grid: Rows and columns of patches.

  Returns:
    uint8[h w 3], each side `scale` times as long.
  """
  picture = enlarge(paint_groups(image, source, grid))
  group = _spread(np.asarray(source), picture.shape, grid)
  y, x = np.indices(group.shape)
  hatch = (group < 0) & ((x + y) % 12 < 2)
  picture[hatch] += 45  # Pruned patches are at most 51.
  patch = _spread(np.arange(grid[0] * grid[1]), picture.shape, grid)
  size = np.array([np.sum(source == s) if s >= 0 else 0 for s in source])[patch]
  picture[_edges(group, 1)] = _GRID
  picture[_edges(group, 2) & _near(size > 1, 2)] = _OUTLINE
  return picture


def _edges(group: np.ndarray, width: int) -> np.ndarray:
  """Pixels at most `width / 2` from another group."""
  edges = np.zeros(group.shape, bool)
  across, down = group[:, 1:] != group[:, :-1], group[1:] != group[:-1]
  edges[:, 1:] |= across
  edges[1:] |= down
  if width > 1:
    edges[:, :-1] |= across
    edges[:-1] |= down
  return edges


def _near(mask: np.ndarray, distance: int) -> np.ndarray:
  """Pixels at most `distance` from one in the mask, along each axis."""
  padded = np.pad(mask, distance)
  span = 2 * distance + 1
  windows = np.lib.stride_tricks.sliding_window_view(padded, (span, span))
  return np.asarray(windows.any((2, 3)))


def enlarge(image: np.ndarray) -> np.ndarray:
  """Repeats pixels until the longer side has about 240."""
  scale = max(1, round(_CELL / max(image.shape[:2])))
  return image.repeat(scale, 0).repeat(scale, 1)


def paint_groups(image: np.ndarray, source: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Paints patches that share a token in their mean colour; pruned ones at 20 % brightness.

  A patch that shares its token with no other stays as it is.

  Args:
    image: uint8[h w 3].
    source: int[p]: the token that holds each patch, row by row; -1 pruned.
    grid: Rows and columns of patches.

  Returns:
    uint8[h w 3].
  """
  source = np.asarray(source)
  group = _spread(source, image.shape, grid)
  painted = image.copy()
  for token in np.unique(source):
    inside = group == token
    if token < 0:
      painted[inside] = np.rint(0.2 * image[inside]).astype(np.uint8)
    elif np.sum(source == token) > 1:
      painted[inside] = np.rint(image[inside].mean(axis=0)).astype(np.uint8)
  return painted


def _spread(values: np.ndarray, shape: tuple[int, ...], grid: tuple[int, int]) -> np.ndarray:
  """The value of the patch that each pixel lies in."""
  y = np.arange(shape[0]) * grid[0] // shape[0]
  x = np.arange(shape[1]) * grid[1] // shape[1]
  return np.asarray(values).reshape(grid)[y[:, None], x[None]]


def number(value: float) -> str:
  """A figure with four significant digits, such as GMACs."""
  if value == 0 or not math.isfinite(value):
    return str(value)
  return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
  return [x for x, _ in points], [y for _, y in points]


def _subplots(width: float, height: float, rows: int = 1) -> tuple[Figure, Axes]:
  """A figure of panels above each other; returns the upper one, the others are in `axes`."""
  figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(rows, 1, sharex=True, squeeze=False)
  return figure, panels[0, 0]


def _name_axes(axes: Axes, x: str, y: str) -> None:
  axes.set_xlabel(x, fontsize=_TITLE)
  axes.set_ylabel(y, fontsize=_TITLE)
  axes.tick_params(labelsize=_TEXT)
  axes.grid(True, color="#DDDDDD", linewidth=0.6)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)


def _save(figure: Figure, path: pathlib.Path) -> None:
  """Writes the PNG, all of it or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as temporary:
    figure.savefig(temporary, format="png", dpi=DPI, facecolor="white")
