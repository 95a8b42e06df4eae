"""One optimizer step: a pure function of the state and a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

Metrics = dict[str, Array]
Batch = Mapping[str, Array]


class TrainState(flax.struct.PyTreeNode):
  """All that a run needs to go on: what is trained, and what is not but belongs to it.

  The order of the examples and all randomness are functions of the seed and the step.
  """

  step: Any  # i[]
  params: Any  # the weights
  arch: Any  # search variables; empty where there are none
  opt_state: Any
  ema: Any  # averaged weights; none where they are not kept
  rng: Any  # key data of the run


# (params, arch, batch, random key, step) -> loss and figures
LossFn = Callable[..., tuple[Array, Metrics]]

StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(
  params: Any,
  arch: Any,
  tx: optax.GradientTransformation,
  trains: Sequence[str],
  seed: int,
  ema: bool = False,
) -> TrainState:
  """The state before the first step.

  Args:
    params: The weights.
    arch: Search variables.
    tx: Optimizer of what is trained.
    trains: Of `params` and `arch`, those that are trained.
    seed: Of all randomness.
    ema: Whether averaged weights are kept.
  """
  variables = {"params": params, "arch": arch}
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    arch=arch,
    opt_state=tx.init({name: variables[name] for name in trains}),
    ema=params if ema else None,
    rng=jax.random.key_data(jax.random.key(seed)),
  )
  # The step donates the state; what the caller holds must not go with it.
  return jax.tree.map(jnp.copy, state)


def make_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  trains: Sequence[str],
  ema_decay: float | None = None,
) -> StepFn:
  """The jitted step.

  Args:
    loss_fn: Differentiated with respect to what is trained only, so that no gradient of anything
      else exists in the compiled step.
    tx: Optimizer of what is trained.
    trains: Of `params` and `arch`, those that are trained.
    ema_decay: Of the averaged weights.

  Returns:
    A function that maps state and batch to the next state and figures. The state is donated.
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    variables = {"params": state.params, "arch": state.arch}

    def loss_of(trained: dict[str, Any]) -> tuple[Array, Metrics]:
      return loss_fn(**(variables | trained), batch=batch, key=key, step=state.step)

    trained = {name: variables[name] for name in trains}
    (loss, figures), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    ema = state.ema
    if ema is not None and ema_decay is not None:
      # The warm-up lets a short run's average forget its random start.
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema = optax.incremental_update(trained["params"], ema, 1 - decay)
    state = state.replace(step=state.step + 1, opt_state=opt_state, ema=ema, **trained)
    return state, {"loss": loss, **figures}

  return jax.jit(step, donate_argnums=0)
