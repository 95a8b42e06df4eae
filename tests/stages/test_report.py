"""The figures are valid and show what they should; the report has what was measured, once."""

import pathlib

import numpy as np
import PIL.Image
import pytest

from vitcomp_jax.stages import figures, report

PLAN = [(17, 17), (16, 14), (13, 10), (9, 6)]
ROWS = [
  {"name": "dense", "top1": 91.2, "top5": 99.8, "loss": 0.31, "gmacs": 4.0, "params_m": 22.05},
  {"name": "diffrate", "top1": 90.5, "top5": 99.7, "loss": 0.33, "gmacs": 2.9, "params_m": 22.05},
  {"name": "uniform", "top1": 88.25, "top5": 99.1, "loss": 0.41, "gmacs": 2.9, "params_m": 22.05},
]
RESULT = {
  "dataset": "fashion_mnist",
  "split": "test",
  "examples": 1000,
  "device": "1 x cpu",
  "versions": {"jax": "0.9", "flax": "0.12"},
  "rows": ROWS,
}
SUMMARY = {
  "steps": 300,
  "images": 19200,
  "minutes": 3.25,
  "budget_gmacs": 2.8,
  "raw_gmacs": 2.91,
  "gmacs": 2.795,
  "offset": -1,
  "raw_counts": [[17, 17], [16, 15], [14, 11], [10, 7]],
  "counts": [list(pair) for pair in PLAN],
}
PLAN_JSON = {
  "variant": "vit_x",
  "num_tokens": 17,
  "gmacs": 2.795,
  "layers": [
    {"reduce": {"type": "keep_all"}},
    {"reduce": {"type": "prune_merge", "prune_keep": 16, "merge_keep": 14}},
    {"prune_keep": 13, "merge_keep": 10},
    {"reduce": {"type": "prune_merge", "prune_keep": 9, "merge_keep": 6}},
  ],
}


def check_png(path: pathlib.Path) -> None:
  with PIL.Image.open(path) as image:
    assert image.format == "PNG"
    assert min(image.size) > 300
    colors = image.convert("RGB").getcolors(maxcolors=image.width * image.height)
  assert colors is not None and len(colors) > 8
  assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def some_images(n: int, side: int) -> np.ndarray:
  return np.random.default_rng(0).integers(256, size=(n, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("num_plans", [1, 3])
def test_schedule(tmp_path, num_plans):
  path = tmp_path / "figures" / "schedule.png"
  figures.schedule(path, {f"plan {i}": PLAN for i in range(num_plans)}, 17)
  check_png(path)


@pytest.mark.parametrize("loss", [0.5, 50.0])  # on a linear and on a logarithmic scale
def test_search_curves(tmp_path, loss):
  records = [
    {"step": s, "loss": loss / s, "task_loss": 0.3, "gmacs": 4 - 0.1 * s, "tokens": [17, 9]}
    for s in range(1, 11)
  ]
  figures.search_curves(tmp_path / "search.png", records, [2.9] * 6 + [2.5] * 4)
  check_png(tmp_path / "search.png")


def test_accuracy_against_gmacs(tmp_path):
  unmeasured = {"name": "random", "gmacs": 2.9}
  figures.accuracy_against_gmacs(tmp_path / "accuracy.png", [*ROWS, unmeasured])
  check_png(tmp_path / "accuracy.png")


def test_labels_of_near_points_do_not_overlap():
  figure, axes = figures._subplots(width=7.0, height=4.6)
  points = [(2.9 + 0.01 * i, 79 + 0.02 * (i % 2), f"method{i}@2.9", "#000000") for i in range(8)]
  axes.plot([2, 4], [70, 80])
  figures._label_points(figure, axes, points)
  boxes = [text.get_window_extent() for text in axes.texts]
  assert len(boxes) == 8
  assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize("side", [12, 224])
def test_token_maps(tmp_path, side):
  sources = [np.tile(np.arange(16) + 1, (2, 1)), np.tile(np.arange(16) % 5 - 1, (2, 1))]
  figures.token_maps(
    tmp_path / "maps.png",
    some_images(2, side),
    sources,
    num_prefix=1,
    grid=(4, 4),
    layer_names=["layer 1", "layer 3"],
    titles=["boot", "shirt"],
  )
  check_png(tmp_path / "maps.png")


def test_paint_groups_equals_the_plain_loop():
  image, grid, patch = some_images(1, 12)[0], (4, 3), (3, 4)
  source = np.array([1, 2, 2, -1, 5, 1, 1, 2, -1, 7, 7, 2])
  painted = figures.paint_groups(image, source, grid)
  cells = {
    p: (slice(3 * (p // 3), 3 * (p // 3) + 3), slice(4 * (p % 3), 4 * (p % 3) + 4))
    for p in range(12)
  }
  for token in (1, 2, 7):
    members = [p for p in range(12) if source[p] == token]
    total = np.zeros(3)
    for p in members:
      for y in range(patch[0]):
        for x in range(patch[1]):
          total += image[cells[p]][y, x]
    mean = np.rint(total / (len(members) * patch[0] * patch[1]))
    for p in members:
      assert (painted[cells[p]] == mean).all()
  assert (painted[cells[4]] == image[cells[4]]).all()  # a token of its own
  for p in (3, 8):
    assert painted[cells[p]].max() <= 51  # pruned
  assert painted.dtype == np.uint8


def test_token_map_outlines_merged_groups_only():
  image = np.full((4, 4, 3), 200, np.uint8)
  alone = figures.token_map(image, np.array([1, 2, 3, 4]), (2, 2))
  merged = figures.token_map(image, np.array([1, 1, 3, 4]), (2, 2))
  orange = np.array(figures._OUTLINE)
  assert alone.shape == (240, 240, 3)
  assert not (alone == orange).all(-1).any()
  outlined = (merged == orange).all(-1)
  assert outlined[119:121].all() and not outlined[:115, 115:125].any()
  assert not outlined[125:].any()


def test_tokens_left_never_grow():
  assert figures.tokens_left([(20, 17), (12, 14), (13, 9)], 17) == [(17, 17), (12, 12), (12, 9)]
  assert figures.tokens_left([(16, 15), (20, 20)]) == [(16, 15), (15, 15)]


def test_report_has_each_row_once_and_all_that_was_measured(tmp_path):
  rows = [dict(row) for row in ROWS]
  rows[1]["images_per_second"] = {"32": 88.0, "1": 40.06}
  (tmp_path / "figures").mkdir()
  for name in ("schedule.png", "own_drawing.png"):
    (tmp_path / "figures" / name).touch()
  report.write_report(tmp_path, {**RESULT, "rows": rows}, PLAN_JSON, PLAN, SUMMARY, "70 % of dense")
  text = (tmp_path / "report.md").read_text(encoding="utf-8")
  lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
  for row in rows:
    assert sum(cells[:1] == [row["name"]] for cells in lines) == 1
  speeds = ["40.1", "88.0"]
  expected = ["diffrate", "90.50", "99.70", "0.3300", "2.900", "72.5 %", "22.05", *speeds]
  assert expected in lines
  assert ["2", "16", "15", "16", "14"] in lines
  for part in (
    "1,000 examples",
    "1 x cpu",
    "70 % of dense (2.800 GMACs)",
    "-1",
    "19,200",
    "jax 0.9",
  ):
    assert part in text
  assert "figures/schedule.png" in text and "figures/own_drawing.png" in text
  assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "report.md"]


def test_report_leaves_out_what_is_not_there(tmp_path):
  rows = [{"name": "diffrate", "top1": 90.5, "loss": 0.3, "gmacs": 0.0359}]
  report.write_report(tmp_path, {**RESULT, "rows": rows}, None, [], None, "")
  text = (tmp_path / "report.md").read_text(encoding="utf-8")
  for absent in ("figures/", "Search", "Plan", "top-5", "of dense", "images/s", "params", "None"):
    assert absent not in text
  assert "0.03590" in text


def test_report_of_a_given_plan(tmp_path):
  report.write_report(tmp_path, RESULT, PLAN_JSON, PLAN, None, "")
  text = (tmp_path / "report.md").read_text(encoding="utf-8")
  lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
  assert [lines[i] for i in range(len(lines)) if lines[i][:1] in (["1"], ["2"], ["3"])] == [
    ["1", "17", "17"],
    ["2", "16", "14"],
    ["3", "13", "10"],
  ]
  assert "learnt" not in text


def test_report_of_a_search_without_an_offset(tmp_path):
  summary = {key: value for key, value in SUMMARY.items() if key != "offset"}
  report.write_report(tmp_path, RESULT, PLAN_JSON, PLAN, summary, "")
  text = (tmp_path / "report.md").read_text(encoding="utf-8")
  assert "adjusted to the budget: 2.795 GMACs\n" in text and "offset" not in text
