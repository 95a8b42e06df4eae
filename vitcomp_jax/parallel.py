"""Layouts of state and batches on the devices: data parallel, FSDP and pmap.

- `data`: every device holds the whole state and works on its rows of the batch;
- `fsdp`: the state is cut up too, and whole only while a step needs it (fully sharded data
  parallel);
- `pmap`: as `data`, under `jax.pmap`, which sums gradients because the step says so.

In `data` and `fsdp` a step is written for the whole batch and XLA divides it, so that nothing in it
depends on the number of devices, random numbers included.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vitcomp_jax.config import ParallelConfig
from vitcomp_jax.errors import UserError

AXIS = "data"

# Smaller arrays are whole everywhere: gathering one costs more than holding it.
_CUT_FROM = 2**13


class Layout:
  """A way to lay out steps on devices."""

  def __init__(self, config: ParallelConfig | None = None) -> None:
    """Takes the devices.

    Args:
      config: The mode, and how many devices; None: `data` on all.

    Raises:
      UserError: If there are not that many devices, or not the same number in each process.
    """
    config = config or ParallelConfig()
    self.mode = config.mode
    # Rows of a batch are contiguous in a process only if its devices are.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    count = config.devices or len(devices)
    if count > len(devices):
      raise UserError(
        f"config.parallel.devices: expected at most the {len(devices)} there are, got {count}."
      )
    if jax.process_count() > 1 and count < len(devices):
      raise UserError(
        f"config.parallel.devices: expected none, as {jax.process_count()} processes use all of "
        f"their {len(devices)} devices, got {count}."
      )
    self._mesh = Mesh(np.array(devices[:count]), (AXIS,), axis_types=(AxisType.Auto,))
    mine = [device for device in devices[:count] if device.process_index == jax.process_index()]
    self._local = Mesh(np.array(mine), (AXIS,), axis_types=(AxisType.Auto,))
    self._whole = NamedSharding(self._mesh, PartitionSpec())
    self._rows = NamedSharding(self._mesh, PartitionSpec(AXIS))

  @property
  def num_devices(self) -> int:
    return int(self._mesh.size)

  def check_batch_size(self, key: str, size: int, parts: int = 1, together: int = 1) -> None:
    """Refuses batches that cannot be divided.

    Args:
      key: Of the config.
      size: Of a batch.
      parts: That are worked on one after the other.
      together: Rows that must not be separated.
    """
    unit = self.num_devices * parts * together
    if size % unit:
      factors = [f"{self.num_devices} devices"]
      factors += [f"{parts} parts"] if parts > 1 else []
      factors += [f"{together} rows that mix"] if together > 1 else []
      raise UserError(
        f"config.{key}: expected a multiple of {unit} ({' x '.join(factors)}), got {size}; change "
        "it, or config.parallel.devices."
      )

  def rows(self, batch_size: int) -> slice:
    """The rows of a global batch that this process has to make."""
    size = batch_size // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

  def put(self, tree: Any) -> Any:
    """Whole copies of host arrays on every device."""
    return jax.tree.map(lambda x: _put(x, self._whole), tree)

  def put_state(self, state: Any) -> Any:
    """A training state, laid out as the mode asks for; the given one may be donated afterwards."""
    return jax.tree.map(lambda x: _put(x, self._of(x)), state)

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A global batch from this process's rows of it."""
    return {
      key: jax.make_array_from_process_local_data(self._rows, np.asarray(value))
      for key, value in batch.items()
    }

  def get(self, tree: Any) -> Any:
    """Host copies of whole arrays, in every process the same."""
    return jax.tree.map(_get, tree)

  def compile(self, step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Compiles a step.

    Args:
      step: (state, batch, fixed) -> (state, metrics), of the whole batch or, if it is called with
        `axis`, of one device's rows. The state is donated. It may use `gathered` and `cut`.

    Returns:
      A function of placed arguments.
    """
    if self.mode == "pmap":
      return self._pmapped(step)
    # Figures are wanted in every process; the state stays as it is laid out.
    return jax.jit(step, donate_argnums=0)

  def gathered(self, tree: Any) -> Any:
    """Inside of a step: whole arrays of what may be cut up."""
    return self._constrained(tree, lambda _: self._whole)

  def cut(self, tree: Any) -> Any:
    """Inside of a step: arrays laid out as the state is."""
    return self._constrained(tree, self._of)

  def _constrained(self, tree: Any, of: Callable[[Any], NamedSharding]) -> Any:
    if self.mode == "pmap":
      return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, of(x)), tree)

  def _of(self, x: Any) -> NamedSharding:
    """Returns the sharding of a state array: along its longest side that the devices divide."""
    sides = [i for i, side in enumerate(np.shape(x)) if side % self.num_devices == 0]
    if self.mode != "fsdp" or not sides or np.size(x) < _CUT_FROM:
      return self._whole
    longest = max(sides, key=lambda i: np.shape(x)[i])
    axes = [AXIS if i == longest else None for i in range(np.ndim(x))]
    return NamedSharding(self._mesh, PartitionSpec(*axes))

  def _pmapped(self, step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    mapped = jax.pmap(
      functools.partial(step, axis=AXIS),
      axis_name=AXIS,
      in_axes=(None, 0, None),
      out_axes=None,
      donate_argnums=0,
      devices=None if jax.process_count() > 1 else list(self._local.devices.flat),
    )

    def apply(state: Any, batch: Mapping[str, jax.Array], fixed: Any) -> tuple[Any, Any]:
      found = mapped(state, {key: self._parts(rows) for key, rows in batch.items()}, fixed)
      return jax.tree.map(self._everywhere, found)

    return apply

  def _parts(self, rows: jax.Array) -> jax.Array:
    """This process's rows of a global array, [devices rows ...], each where it is."""
    shards = sorted(rows.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    parts = [shard.data[None] for shard in shards]
    shape = (len(parts), *parts[0].shape[1:])
    sharding = NamedSharding(self._local, PartitionSpec(AXIS))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)

  def _everywhere(self, x: jax.Array) -> jax.Array:
    """An array that is whole on this process's devices, as one that is whole on all of them."""
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, self._whole, shards)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
  """A copy, even where it lies right already: the step donates what it is given."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return jnp.copy(jax.device_put(x, sharding))
  host = np.asarray(x)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: np.array(host[index]))


def _get(x: Any) -> np.ndarray:
  if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)
