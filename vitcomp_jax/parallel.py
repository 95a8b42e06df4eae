"""Layouts of state and batches on the devices: data parallel, FSDP and pmap.

- `data`: the state is replicated and the batch is sharded;
- `fsdp`: the state is sharded too, and gathered only while a step needs it (fully sharded data
  parallel);
- `pmap`: like `data`, but under `jax.pmap`, with an explicit mean of the gradients in the step.

In `data` and `fsdp`, a step is written for the whole batch and XLA partitions it, so its results,
including random numbers, do not depend on the number of devices.
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

# Arrays with fewer elements are replicated: gathering them would cost more than holding them.
_SHARD_FROM = 2**13


class Layout:
  """Lays out states, batches and steps on devices."""

  def __init__(self, config: ParallelConfig | None = None) -> None:
    """Selects the devices.

    Args:
      config: The mode and the number of devices; None for `data` on all devices.

    Raises:
      UserError: If there are too few devices, or several processes would leave some unused.
    """
    config = config or ParallelConfig()
    self.mode = config.mode
    # A process holds contiguous rows of a batch only if its devices are contiguous.
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
    self._replicated = NamedSharding(self._mesh, PartitionSpec())
    self._by_row = NamedSharding(self._mesh, PartitionSpec(AXIS))

  @property
  def num_devices(self) -> int:
    return int(self._mesh.size)

  def check_batch_size(self, key: str, size: int, parts: int = 1, together: int = 1) -> None:
    """Checks that batches can be divided among devices and parts.

    Args:
      key: Config key of the batch size, for the error message.
      size: Batch size.
      parts: Number of parts of a batch, for gradient accumulation.
      together: Number of consecutive rows that must stay together.

    Raises:
      UserError: If the batch size is not a multiple of their product.
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
    """Returns the rows of a global batch that this process provides."""
    size = batch_size // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

  def put(self, tree: Any) -> Any:
    """Replicates host arrays on every device."""
    return jax.tree.map(lambda x: _put(x, self._replicated), tree)

  def put_state(self, state: Any) -> Any:
    """Copies a training state to the devices, sharded as the mode says; the copy may be donated."""
    return jax.tree.map(lambda x: _put(x, self._sharding(x)), state)

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Assembles a global batch from the rows that each process provides."""
    return {
      key: jax.make_array_from_process_local_data(self._by_row, np.asarray(value))
      for key, value in batch.items()
    }

  def get(self, tree: Any) -> Any:
    """Copies whole arrays to the host; every process gets the same."""
    return jax.tree.map(_get, tree)

  def compile(self, step: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Compiles a step.

    Args:
      step: (state, batch, fixed) -> (state, metrics), for the whole batch or, if called with
        `axis`, for one device's rows. The state is donated. A step may use `gather` and `shard`.

    Returns:
      A function of arguments from `put_state` and `put_batch`.
    """
    if self.mode == "pmap":
      return self._pmapped(step)
    return jax.jit(step, donate_argnums=0)

  def gather(self, tree: Any) -> Any:
    """Replicates arrays that may be sharded; call it inside a step."""
    return self._constrained(tree, lambda _: self._replicated)

  def shard(self, tree: Any) -> Any:
    """Shards arrays as `put_state` does; call it inside a step."""
    return self._constrained(tree, self._sharding)

  def _constrained(self, tree: Any, sharding: Callable[[Any], NamedSharding]) -> Any:
    if self.mode == "pmap":
      return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding(x)), tree)

  def _sharding(self, x: Any) -> NamedSharding:
    """Returns the sharding of a state array along its longest axis that the devices can divide."""
    sides = [i for i, side in enumerate(np.shape(x)) if side % self.num_devices == 0]
    if self.mode != "fsdp" or not sides or np.size(x) < _SHARD_FROM:
      return self._replicated
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
    """Returns this process's rows of a global array, [devices rows ...], without moving them."""
    shards = sorted(rows.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    parts = [shard.data[None] for shard in shards]
    shape = (len(parts), *parts[0].shape[1:])
    sharding = NamedSharding(self._local, PartitionSpec(AXIS))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)

  def _everywhere(self, x: jax.Array) -> jax.Array:
    """Turns an array replicated on this process's devices into one replicated on all devices."""
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, self._replicated, shards)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
  """Copies an array, even if it already has this sharding, as the step donates its arguments."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return jnp.copy(jax.device_put(x, sharding))
  host = np.asarray(x)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: np.array(host[index]))


def _get(x: Any) -> np.ndarray:
  if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)
