"""Tokens that flow between layers, and the statistics and interfaces of reducers."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.ops import select


class Tokens(flax.struct.PyTreeNode):
  """A batch of token sequences. Shapes: b images, n tokens, d width, p patches.

  Only its methods change a sequence, as all fields have to follow.
  """

  x: Array  # f[b n d]
  source: Array  # i[b p] token that now holds each patch; -1 pruned
  num_prefix: int = flax.struct.field(pytree_node=False)  # never sorted, merged or removed
  size: Array | None = None  # f[b n] patches a token stands for; None: one each, plain attention
  keep: Array | None = None  # f[b n] 1 kept, 0 dropped; None: nothing is masked
  num_kept: Array | None = None  # f[] tokens that a mask keeps, if as many in every image
  pruned: Array | None = None  # f[b p d] the value that a pruned patch had last; None: none was
  origin: Array | None = None  # i[b n] patch that each token began as, -1: none; None: not asked
  probe: Array | None = None  # f[h d] what the pooling head looks for in a normed token

  @classmethod
  def begin(
    cls,
    x: Array,
    num_prefix: int,
    size: Array | None = None,
    probe: Array | None = None,
    track_origin: bool = False,
  ) -> "Tokens":
    """Returns new tokens, of which each one behind the prefix holds a patch of its own.

    Args:
      x: f[b n d].
      num_prefix: Tokens at the front that hold no patch.
      size: See the field.
      probe: See the field.
      track_origin: Whether to follow which patch a token began as.
    """
    b, n, _ = x.shape
    places = jnp.arange(num_prefix, n)
    source = jnp.broadcast_to(places, (b, places.size))
    patch = jnp.maximum(jnp.arange(n) - num_prefix, -1)
    origin = jnp.broadcast_to(patch, (b, n)) if track_origin else None
    return cls(x, source, num_prefix, size=size, origin=origin, probe=probe)

  @property
  def sizes(self) -> Array:
    """Returns the patches that each token stands for, f[b n]: one each if they are not tracked."""
    return self._ones() if self.size is None else self.size

  @property
  def kept(self) -> Array:
    """Returns 1 for kept tokens and 0 for masked ones, f[b n]: all 1 if nothing is masked."""
    return self._ones() if self.keep is None else self.keep

  def _ones(self) -> Array:
    return jnp.ones(self.x.shape[:2], jnp.promote_types(self.x.dtype, jnp.float32))

  def with_x(self, x: Array) -> "Tokens":
    """Returns the same tokens with other values, f[b n d]."""
    return self.replace(x=x)

  def normed(self, norm: Callable[[Array], Array]) -> "Tokens":
    """Returns the tokens, and what is left of pruned patches, after a norm."""
    return self.replace(x=norm(self.x), pruned=None if self.pruned is None else norm(self.pruned))

  def take(self, order: Array) -> "Tokens":
    """Returns the tokens at some positions in that order; patches of the others are pruned.

    Args:
      order: i[b c], each position at most once.
    """
    n = self.x.shape[1]
    source = select.follow(self.source, order, n)
    is_whole = order.shape[1] == n
    return self.replace(
      x=select.permute(self.x, order) if is_whole else select.take(self.x, order),
      source=source,
      pruned=self.pruned if is_whole else self._last_values(source),
      **self._of_each(lambda values: select.take(values, order)),
    )

  def first(self, count: int) -> "Tokens":
    """Returns the first tokens, by a cut instead of a gather; the others must hold no patches."""
    return self.replace(x=self.x[:, :count], **self._of_each(lambda values: values[:, :count]))

  def fuse(self, order: Array, weight: Array) -> "Tokens":
    """Takes some tokens, and fuses the others into one that stands last and holds their patches.

    Args:
      order: i[b c], positions of those that are taken.
      weight: f[b n], factor of each of the others in their sum, which the new token is.
    """
    is_fused = jnp.all(order[:, :, None] != jnp.arange(self.x.shape[1])[None, None], axis=1)
    weight = jnp.where(is_fused, weight, 0).astype(self.x.dtype)
    x = jnp.einsum("bn,bnd->bd", weight, self.x)[:, None]
    size = jnp.sum(jnp.where(is_fused, self.sizes, 0), axis=1, keepdims=True)
    taken = self.take(order)
    is_moved = (taken.source < 0) & (self.source >= 0)
    return taken.replace(
      x=jnp.concatenate([taken.x, x], axis=1),
      source=jnp.where(is_moved, order.shape[1], taken.source),
      size=_append(taken.size, size),
      keep=_append(taken.keep, jnp.ones_like(size)),
      origin=_append(taken.origin, jnp.full_like(order[:, :1], -1)),
      pruned=self.pruned,
    )

  def merge(self, x: Array, size: Array, receiver: Array) -> "Tokens":
    """Returns the first tokens, to which the patches of the last ones have gone.

    Args:
      x: f[b t d], what merging made of the first t tokens. The others are gone.
      size: f[b t], the patches that each of them stands for now.
      receiver: i[b s], the token that now has the patches of each of the last s ones. Without a
        mask s = n - t. With a mask t = n, as what has merged stays in its place; then s = n, and a
        token that does not merge is its own receiver.
    """
    start = self.x.shape[1] - receiver.shape[1]
    receiver = receiver.astype(self.source.dtype)
    moved = jnp.take_along_axis(receiver, jnp.maximum(self.source - start, 0), axis=1)
    source = jnp.where(self.source >= start, moved, self.source)
    return self.first(x.shape[1]).replace(x=x, size=size, source=source)

  def mask(self, is_pruned: Array, keep: Array, num_kept: Array | None = None) -> "Tokens":
    """Returns the same tokens with another mask; none is removed.

    Args:
      is_pruned: b[b n] or b[1 n], whether a token no longer holds its patches. Of those that are
        masked, the others are yet to be merged.
      keep: f[b n], see the field.
      num_kept: f[], see the field.
    """
    is_pruned = jnp.broadcast_to(is_pruned, self.x.shape[:2])
    is_gone = jnp.take_along_axis(is_pruned, jnp.maximum(self.source, 0), axis=1)
    source = jnp.where(is_gone, -1, self.source)
    pruned = self._last_values(source)
    return self.replace(source=source, pruned=pruned, keep=keep, num_kept=num_kept)

  def _of_each(self, change: Callable[[Array], Array]) -> dict[str, Array | None]:
    """Changes the fields that have one value for each token, without `x`."""
    fields = {"size": self.size, "keep": self.keep, "origin": self.origin}
    return {name: None if v is None else change(v) for name, v in fields.items()}

  def _last_values(self, source: Array) -> Array:
    """Returns `pruned` after some patches were pruned, which `source` knows already."""
    is_new = (source < 0) & (self.source >= 0)
    last = select.take(self.x, jnp.maximum(self.source, 0))
    before = jnp.zeros_like(last) if self.pruned is None else self.pruned
    return jnp.where(is_new[..., None], last, before)


def _append(values: Array | None, last: Array) -> Array | None:
  return None if values is None else jnp.concatenate([values, last.astype(values.dtype)], axis=1)


def unmerge(tokens: Tokens) -> Float[Array, "b p d"]:
  """Puts tokens back on the full grid of patches, row by row, for dense tasks.

  A patch shows the token that it became a part of; a pruned one shows the value that it had last,
  normed like the others where they are.

  Args:
    tokens: Of an `Output`: `tokens`, or one of `layers`.

  Examples:
    >>> import vitcomp_jax as vc
    >>> x = jnp.array([[[9.0], [1.0], [2.0]]])  # CLS and two tokens
    >>> source = jnp.array([[1, 2, 1]])  # where each of three patches is
    >>> tokens = Tokens(x=x, size=None, keep=None, source=source, num_prefix=1)
    >>> vc.unmerge(tokens)[0, :, 0].tolist()
    [1.0, 2.0, 1.0]
  """
  held = select.take(tokens.x, jnp.maximum(tokens.source, 0))
  if tokens.pruned is None:
    return held
  return jnp.where((tokens.source >= 0)[..., None], held, tokens.pruned)


class AttentionStats(flax.struct.PyTreeNode):
  """Statistics of a layer's attention for reducers; XLA drops those that none uses."""

  q: Array  # f[b h n k] queries
  k: Array  # f[b h n k] keys
  v: Array  # f[b h n k] values
  log_size: Array | None  # f[b n] added to the logits of each key
  keep: Array | None  # as in Tokens
  scale: float = flax.struct.field(pytree_node=False)  # factor of the products

  @property
  def mean_key(self) -> Array:
    """Returns each token's key, mean over heads, f[b n k]: what ToMe compares."""
    return self.k.mean(axis=1)


class Output(flax.struct.PyTreeNode):
  """Outputs of a forward pass."""

  logits: Array  # f[b classes]; the features where the model has no classifier
  features: Array  # f[b d] pooled, what the classifier sees
  tokens: Tokens  # after the final norm
  layers: tuple[Tokens, ...]  # after each layer


@runtime_checkable
class TokenReducer(Protocol):
  """Removes tokens, or masks them, between two parts of a layer."""

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    """Returns the tokens that go on; `stats` is None before attention."""
    ...

  def count(self, n: int) -> int:
    """Returns how many of `n` tokens remain."""
    ...
