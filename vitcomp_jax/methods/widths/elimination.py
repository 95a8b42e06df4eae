"""Orders the inputs of a linear layer by importance, using least squares."""

import numpy as np
from jaxtyping import Float, Int

# Number of removals after which the matrices are updated, by matrix products.
_BLOCK = 64


def importance_order(
  covariance: Float[np.ndarray, "m m"], kernel: Float[np.ndarray, "m c"]
) -> Int[np.ndarray, " m"]:
  """Orders the inputs of a linear layer, the most important first, by backward elimination.

  Each step removes the input whose removal changes the output least in the mean square, after the
  kernel of the remaining inputs has been refitted. With G the inverse covariance of the remaining
  inputs and W their kernel, which the refit updates, removing j costs |W_j|²/G_jj.

  Each removal changes G and W by an outer product of two vectors. These vectors are collected for a
  block of removals, and only the costs are updated immediately, so that most of the time is spent
  in matrix products. The result is the same as if G and W were updated after each removal.

  Args:
    covariance: Second moments of the inputs, positive definite.
    kernel: The layer's kernel.

  Returns:
    Indices of the inputs.

  References:
    Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992,
    Eq. 5, for all weights of an input at once.
  """
  inverse, kernel = np.linalg.inv(covariance), kernel.T.copy()  # [m m], [c m]
  left = np.arange(len(inverse))
  removed: list[int] = []
  while left.size:
    gone, rows, columns = _remove(inverse, kernel, min(_BLOCK, left.size))
    removed.extend(left[gone])
    stay = np.setdiff1d(np.arange(left.size), gone)
    left, rows = left[stay], rows[:, stay]
    inverse = inverse[np.ix_(stay, stay)] - rows.T @ rows
    kernel = kernel[:, stay] - columns.T @ rows
  return np.array(removed[::-1])


def _remove(
  inverse: np.ndarray, kernel: np.ndarray, count: int
) -> tuple[list[int], np.ndarray, np.ndarray]:
  """Removes inputs without changing the matrices.

  Args:
    inverse: Inverse covariance, f[m m].
    kernel: Kernel, f[c m].
    count: Inputs to remove.

  Returns:
    Indices of the inputs in order of removal, and the vectors a, f[count m], and b, f[count c]:
    each removal changes the inverse by -aᵀa, and the kernel by -bᵀa.
  """
  diagonal, norms = np.diagonal(inverse).copy(), np.sum(kernel * kernel, axis=0)
  rows = np.zeros((count, len(inverse)))
  columns = np.zeros((count, len(kernel)))
  gone: list[int] = []
  for i in range(count):
    costs = norms / diagonal
    costs[gone] = np.inf
    j = int(np.argmin(costs))
    root = np.sqrt(diagonal[j])
    row = (inverse[j] - rows[:i, j] @ rows[:i]) / root
    column = (kernel[:, j] - rows[:i, j] @ columns[:i]) / root
    products = column @ kernel - (columns[:i] @ column) @ rows[:i]
    norms = norms - 2 * products * row + (column @ column) * row * row
    diagonal = diagonal - row * row
    gone.append(j)
    rows[i], columns[i] = row, column
    diagonal[j] = 1.0  # of a removed input, instead of 0
  return gone, rows, columns
