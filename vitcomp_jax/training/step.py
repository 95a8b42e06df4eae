"""Training steps: pure functions of the state and a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from vitcomp_jax.parallel import Layout

Metrics = dict[str, Array]
Batch = Mapping[str, Array]


class TrainState(flax.struct.PyTreeNode):
  """Holds the state of a training run.

  The order of the examples and all randomness depend only on the seed and the step.

  Attributes:
    step: Number of steps done, i[].
    params: The weights.
    arch: Search variables; empty without a search.
    opt_state: State of the optimizer.
    ema: Exponential moving average of the weights; None if there is none.
    rng: Random key data of the run.
    passed: Search variables at selected steps, each [k ...]; None if they are not kept.
  """

  step: Any
  params: Any
  arch: Any
  opt_state: Any
  ema: Any
  rng: Any
  passed: Any = None


# (params, arch, fixed, batch, random key, step) -> (loss, metrics). The batch also holds `row`,
# i[b]: the rows' positions in the whole batch, for random numbers that differ between rows.
LossFn = Callable[..., tuple[Array, Metrics]]

# (state, batch, fixed) -> (state, metrics)
StepFn = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


def init_state(
  params: Any,
  arch: Any,
  tx: optax.GradientTransformation,
  trains: Sequence[str],
  seed: int,
  ema: bool = False,
  keeps: int = 0,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    params: The weights.
    arch: Search variables.
    tx: Optimizer of the trained variables.
    trains: Trained variables, out of `params` and `arch`.
    seed: Seed of all randomness.
    ema: Whether averaged weights are kept.
    keeps: Number of steps at which the search variables are kept.
  """
  variables = {"params": params, "arch": arch}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    arch=arch,
    opt_state=tx.init({name: variables[name] for name in trains}),
    ema=params if ema else None,
    rng=jax.random.key_data(jax.random.key(seed)),
    passed=jax.tree.map(lambda x: jnp.stack([x] * keeps), arch) if keeps else None,
  )


def make_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  trains: Sequence[str],
  layout: Layout,
  ema_decay: float | None = None,
  parts: int = 1,
  keeps: Sequence[int] = (),
) -> StepFn:
  """Returns the compiled training step.

  Args:
    loss_fn: Mean loss of the batch. It is differentiated with respect to the trained variables
      only, so the compiled step computes no other gradients.
    tx: Optimizer of the trained variables.
    trains: Trained variables, out of `params` and `arch`.
    layout: Layout of state and batches on the devices.
    ema_decay: Decay of the averaged weights.
    parts: Number of parts that the batch is divided into, for gradient accumulation.
    keeps: Steps, counted from 0, before which the search variables are kept in `passed`.

  Returns:
    A function that maps the state, a batch and fixed arrays (such as a teacher's weights) to the
    next state and the metrics. The state is donated.
  """

  def step(
    state: TrainState, batch: Batch, fixed: Any, axis: str | None = None
  ) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    variables, fixed = layout.gather(({"params": state.params, "arch": state.arch}, fixed))
    trained = {name: variables[name] for name in trains}

    def loss_of(trained: dict[str, Any], part: Batch) -> tuple[Array, Metrics]:
      whole = variables | trained
      return loss_fn(**whole, fixed=fixed, batch=part, key=key, step=state.step)

    grads, metrics = _mean_grads(loss_of, trained, with_rows(batch, axis), parts)
    if axis:
      grads, metrics = jax.lax.pmean((grads, metrics), axis)
    grads = layout.shard(grads)
    held = {name: getattr(state, name) for name in trains}
    updates, opt_state = tx.update(grads, state.opt_state, held)
    held = optax.apply_updates(held, updates)
    ema = state.ema
    if ema is not None and ema_decay is not None:
      # The warm-up lets a short run's average forget its random start.
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema = optax.incremental_update(held["params"], ema, 1 - decay)
    passed = _kept(state, keeps)
    state = state.replace(step=state.step + 1, opt_state=opt_state, ema=ema, passed=passed, **held)
    return layout.shard(state), metrics

  return layout.compile(step)


def _kept(state: TrainState, steps: Sequence[int]) -> Any:
  """Returns `state.passed`, with the current search variables added if this is one of the steps."""
  if not steps:
    return state.passed
  is_now = jnp.asarray(steps) == state.step

  def kept(passed: Array, now: Array) -> Array:
    return jnp.where(is_now.reshape(-1, *[1] * now.ndim), now[None], passed)

  return jax.tree.map(kept, state.passed, state.arch)


def random_streams(key: Array, batch: Batch, names: Sequence[str]) -> dict[str, Array]:
  """Returns the random keys of a module, which differ between the parts of a batch."""
  key = jax.random.fold_in(key, batch["row"][0])
  return dict(zip(names, jax.random.split(key, len(names)), strict=True))


def top1(logits: Array, targets: Array) -> Array:
  """Computes the percentage of rows whose largest logit and largest target coincide.

  Rows with a logit that is not finite count as wrong: argmax would return the first NaN.
  """
  is_right = jnp.argmax(logits, axis=1) == jnp.argmax(targets, axis=1)
  is_right &= jnp.all(jnp.isfinite(logits), axis=1)
  return 100 * jnp.mean(is_right.astype(jnp.float32))


def with_rows(batch: Batch, axis: str | None = None) -> dict[str, Array]:
  """Adds `row`, i[b], the position of each row in the whole batch."""
  count = len(batch["label"])
  first = jax.lax.axis_index(axis) * count if axis else 0
  return {**batch, "row": first + jnp.arange(count, dtype=jnp.int32)}


def _mean_grads(
  loss_of: Callable[..., tuple[Array, Metrics]], trained: Any, batch: Batch, parts: int
) -> tuple[Any, Metrics]:
  """Returns gradients and metrics (including the loss), averaged over the parts of a batch."""

  def one(part: Batch) -> tuple[Any, Metrics]:
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, part)
    return grads, {"loss": loss, **metrics}

  if parts == 1:
    return one(batch)

  def split(x: Array) -> Array:
    """Returns [parts b/parts ...]; pairs of rows are dealt out in turn, so that rows stay on their
    device and next to the row that they are mixed with."""
    together = 2 if x.shape[0] // parts % 2 == 0 else 1
    dealt = x.reshape(-1, parts, together, *x.shape[1:])
    return jnp.swapaxes(dealt, 0, 1).reshape(parts, -1, *x.shape[1:])

  pieces = {key: split(x) for key, x in batch.items()}
  total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, batch))
  total, _ = jax.lax.scan(
    lambda total, piece: (jax.tree.map(jnp.add, total, one(piece)), None), total, pieces
  )
  return jax.tree.map(lambda x: x / parts, total)
