"""Resampling equals timm's and PyTorch's, and plain loops over the formulas."""

import math
import pathlib

import numpy as np
import pytest

from vitcomp_jax.weights.positions import resample_positions

# Of timm 1.0 and PyTorch 2: an 8x8 table, one CLS row in front, resampled by both rules.
GOLDEN = dict(np.load(pathlib.Path(__file__).with_name("timm_positions.npz")))
CASES = sorted(name for name in GOLDEN if not name.endswith("table"))


@pytest.mark.parametrize("case", CASES)
def test_equals_timm(case):
  family, key = case.split("/")
  rule, grid, *double = key.split("_")
  table = GOLDEN[f"{family}/table"].astype(np.float64 if double else np.float32)
  height, width = map(int, grid.split("x"))
  got = resample_positions(table, 1, (8, 8), (height, width), antialias=rule == "aa")
  assert got.dtype == table.dtype
  np.testing.assert_allclose(got, GOLDEN[case], rtol=0, atol=1e-14 if double else 1e-7)


def test_golden_has_both_rules_and_other_shapes():
  names = {case.split("/")[1] for case in CASES}
  for rule in ("aa", "noaa"):
    for grid in ("12x12", "12x8", "5x7", "4x4", "16x16"):
      assert {f"{rule}_{grid}", f"{rule}_{grid}_f64"} <= names


def keys(x, a):
  x = abs(x)
  if x <= 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resize_line(line, new, antialias):
  old, result = len(line), []
  scale = old / new
  for i in range(new):
    if antialias:
      centre, stretch = (i + 0.5) * scale, max(scale, 1.0)
      taps = range(
        max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), old)
      )
      weights = [keys((j - centre + 0.5) / stretch, -0.5) for j in taps]
      total = sum(weights)
      result.append(sum(w / total * line[j] for w, j in zip(weights, taps, strict=True)))
    else:
      centre = (i + 0.5) * scale - 0.5
      taps = range(math.floor(centre) - 1, math.floor(centre) + 3)
      result.append(sum(keys(centre - j, -0.75) * line[min(max(j, 0), old - 1)] for j in taps))
  return result


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
  ("old", "new"), [((3, 5), (4, 2)), ((7, 2), (3, 3)), ((1, 4), (3, 9)), ((6, 6), (9, 4))]
)
def test_equals_plain_loops_on_non_square_grids(old, new, antialias):
  table = np.random.default_rng(0).normal(size=(1, 2 + old[0] * old[1], 3))
  got = resample_positions(table, 2, old, new, antialias)
  np.testing.assert_array_equal(got[:, :2], table[:, :2])
  for channel in range(3):
    grid = table[0, 2:, channel].reshape(old)
    rows = [resize_line(row, new[1], antialias) for row in grid]
    columns = [resize_line(column, new[0], antialias) for column in zip(*rows, strict=True)]
    want = np.array(columns).T.reshape(-1)
    np.testing.assert_allclose(got[0, 2:, channel], want, rtol=0, atol=1e-12)


def test_same_grid_changes_nothing():
  table = np.random.default_rng(0).normal(size=(1, 7, 3)).astype(np.float32)
  np.testing.assert_array_equal(resample_positions(table, 1, (2, 3), (2, 3), True), table)


def test_same_number_of_patches_in_another_shape_is_resampled():
  table = np.arange(16.0).reshape(1, 16, 1)
  got = resample_positions(table, 0, (4, 4), (2, 8), True)
  assert got.shape == table.shape
  assert not np.allclose(got, table)


def test_half_precision_becomes_float32():
  table = np.ones((1, 4, 2), np.float16)
  got = resample_positions(table, 0, (2, 2), (3, 3), False)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, 1.0, atol=1e-6)


def test_wrong_number_of_rows_is_refused():
  with pytest.raises(ValueError, match="rows"):
    resample_positions(np.ones((1, 5, 2)), 0, (2, 2), (3, 3), True)
