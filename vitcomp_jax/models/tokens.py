"""Tokens that layers pass on, and the statistics and interface of reducers."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.ops import select


class Tokens(flax.struct.PyTreeNode):
  """A batch of token sequences. Shapes: b images, n tokens, d width, p patches.

  Change a sequence only through its methods, which keep all fields consistent.
  """

  x: Array  # f[b n d]
  source: Array  # i[b p] token that holds each patch; -1: pruned
  num_prefix: int = flax.struct.field(pytree_node=False)  # never sorted, merged or removed
  size: Array | None = None  # f[b n] patches per token; None: one each, plain attention
  keep: Array | None = None  # f[b n] 1 kept, 0 dropped; None: nothing is masked
  num_kept: Array | None = None  # f[] tokens kept by the mask, if equal in every image
  pruned: Array | None = None  # f[b p d] last values of pruned patches; None: none pruned
  origin: Array | None = None  # i[b n] patch each token started as, -1: none; None: not tracked
  is_in_order: bool = flax.struct.field(pytree_node=False, default=True)  # no token was moved
  probe: Array | None = None  # f[h d] folded query of the pooling head; None: not used

  @classmethod
  def begin(
    cls,
    x: Array,
    num_prefix: int,
    size: Array | None = None,
    probe: Array | None = None,
    track_origin: bool = False,
  ) -> "Tokens":
    """Returns new tokens; each one after the prefix holds one patch.

    Args:
      x: Values, f[b n d].
      num_prefix: Tokens at the front that hold no patch.
      size: Patches per token, f[b n]; None: not tracked.
      probe: Folded query of the pooling head, f[h d].
      track_origin: Whether to track which patch each token started as.
    """
    b, n, _ = x.shape
    places = jnp.arange(num_prefix, n)
    source = jnp.broadcast_to(places, (b, places.size))
    patch = jnp.maximum(jnp.arange(n) - num_prefix, -1)
    origin = jnp.broadcast_to(patch, (b, n)) if track_origin else None
    return cls(x, source, num_prefix, size=size, origin=origin, probe=probe)

  @property
  def sizes(self) -> Array:
    """Returns the patches per token, f[b n]: one each if sizes are not tracked."""
    return self._ones() if self.size is None else self.size

  @property
  def kept(self) -> Array:
    """Returns 1 for kept tokens and 0 for masked ones, f[b n]: all 1 if nothing is masked."""
    return self._ones() if self.keep is None else self.keep

  def _ones(self) -> Array:
    return jnp.ones(self.x.shape[:2], jnp.promote_types(self.x.dtype, jnp.float32))

  def with_x(self, x: Array) -> "Tokens":
    """Returns the tokens with new values, f[b n d]."""
    return self.replace(x=x)

  def normed(self, norm: Callable[[Array], Array]) -> "Tokens":
    """Returns the tokens after a norm, which is also applied to the values of pruned patches."""
    return self.replace(x=norm(self.x), pruned=None if self.pruned is None else norm(self.pruned))

  def take(self, order: Array) -> "Tokens":
    """Returns the tokens at the given positions; the patches of the other tokens are pruned.

    Args:
      order: Positions, i[b c], each at most once.
    """
    n = self.x.shape[1]
    source = select.follow(self.source, order, n)
    is_whole = order.shape[1] == n
    return self.replace(
      x=select.permute(self.x, order) if is_whole else select.take(self.x, order),
      source=source,
      pruned=self.pruned if is_whole else self._last_values(source),
      is_in_order=False,
      **self._of_each(lambda values: select.take(values, order)),
    )

  def first(self, count: int) -> "Tokens":
    """Returns the first tokens by a slice, not a gather; the other tokens must hold no patches."""
    return self.replace(
      x=self.x[:, :count],
      is_in_order=self.is_in_order and count == self.x.shape[1],
      **self._of_each(lambda values: values[:, :count]),
    )

  def fuse(self, order: Array, weight: Array) -> "Tokens":
    """Takes some tokens, and fuses the others into a new last token that holds their patches.

    Args:
      order: Positions of the taken tokens, i[b c].
      weight: Weights in the sum that forms the fused token, f[b n].
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
    """Returns the first tokens, which now hold the patches of the last ones.

    Args:
      x: Values of the first t tokens after merging, f[b t d].
      size: Number of patches that each of the first t tokens now represents, f[b t].
      receiver: Token that receives the patches of each of the last s tokens, i[b s]. Without a
        mask, s = n - t. With a mask, s = t = n, as merged tokens stay in place; a token that does
        not merge is its own receiver.
    """
    start = self.x.shape[1] - receiver.shape[1]
    receiver = receiver.astype(self.source.dtype)
    moved = jnp.take_along_axis(receiver, jnp.maximum(self.source - start, 0), axis=1)
    source = jnp.where(self.source >= start, moved, self.source)
    return self.first(x.shape[1]).replace(x=x, size=size, source=source)

  def mask(self, is_pruned: Array, keep: Array, num_kept: Array | None = None) -> "Tokens":
    """Returns the tokens with a new mask; no token is removed.

    Args:
      is_pruned: Whether a token no longer holds its patches, b[b n] or b[1 n]. Masked tokens that
        are not pruned are still to be merged.
      keep: Mask, f[b n]: 1 kept, 0 dropped.
      num_kept: Tokens that the mask keeps, f[], if equal in every image.
    """
    is_pruned = jnp.broadcast_to(is_pruned, self.x.shape[:2])
    is_gone = jnp.take_along_axis(is_pruned, jnp.maximum(self.source, 0), axis=1)
    source = jnp.where(is_gone, -1, self.source)
    pruned = self._last_values(source)
    return self.replace(source=source, pruned=pruned, keep=keep, num_kept=num_kept)

  def _of_each(self, change: Callable[[Array], Array]) -> dict[str, Array | None]:
    """Applies a change to the fields with one value per token, except `x`."""
    fields = {"size": self.size, "keep": self.keep, "origin": self.origin}
    return {name: None if v is None else change(v) for name, v in fields.items()}

  def _last_values(self, source: Array) -> Array:
    """Returns `pruned` updated for the prunings that `source` already reflects."""
    is_new = (source < 0) & (self.source >= 0)
    last = select.take(self.x, jnp.maximum(self.source, 0))
    before = jnp.zeros_like(last) if self.pruned is None else self.pruned
    return jnp.where(is_new[..., None], last, before)


def _append(values: Array | None, last: Array) -> Array | None:
  return None if values is None else jnp.concatenate([values, last.astype(values.dtype)], axis=1)


def unmerge(tokens: Tokens) -> Float[Array, "b p d"]:
  """Puts tokens back on the full grid of patches, row by row, for dense tasks.

  A merged patch gets the value of its token. A pruned patch gets its last value, normalised if the
  tokens are.

  Args:
    tokens: Tokens of an `Output`: `tokens`, or one of `layers`.

  Examples:
    >>> import vitcomp_jax as vc
    >>> x = jnp.array([[[9.0], [1.0], [2.0]]])  # CLS and two tokens
    >>> source = jnp.array([[1, 2, 1]])  # tokens of three patches
    >>> tokens = Tokens(x=x, size=None, keep=None, source=source, num_prefix=1)
    >>> vc.unmerge(tokens)[0, :, 0].tolist()
    [1.0, 2.0, 1.0]
  """
  held = select.take(tokens.x, jnp.maximum(tokens.source, 0))
  if tokens.pruned is None:
    return held
  return jnp.where((tokens.source >= 0)[..., None], held, tokens.pruned)


class AttentionStats(flax.struct.PyTreeNode):
  """Statistics of a layer's attention for reducers; XLA drops unused ones."""

  q: Array  # f[b h n k] queries
  k: Array  # f[b h n k] keys
  v: Array  # f[b h n v] values
  log_size: Array | None  # f[b n] added to the logits of each key
  keep: Array | None  # as in Tokens
  scale: float = flax.struct.field(pytree_node=False)  # factor of the logits
  bias: Array | None = None  # f[b h n n] or f[1 h n n] added to the logits; None: no bias
  content: Array | None = None  # f[b h n k] keys before rotation by position; None: as `k`

  @property
  def mean_key(self) -> Array:
    """Returns each token's key, averaged over heads as in ToMe, f[b n k].

    It is the key before rotation, so that tokens are compared by content, not by distance.
    """
    return (self.k if self.content is None else self.content).mean(axis=1)


class Output(flax.struct.PyTreeNode):
  """Outputs of a forward pass."""

  logits: Array  # f[b classes]; features if the model has no classifier
  features: Array  # f[b d] pooled input of the classifier
  tokens: Tokens  # after the final norm
  layers: tuple[Tokens, ...]  # after each layer

  def representation(self, is_projection: bool) -> Array:
    """Returns the representation of the images: the model's embedding, or its pooled features."""
    return self.logits if is_projection else self.features


@runtime_checkable
class TokenReducer(Protocol):
  """Removes or masks tokens between two parts of a layer."""

  def __call__(self, tokens: Tokens, stats: AttentionStats | None) -> Tokens:
    """Returns the remaining tokens; `stats` is None before attention."""
    ...

  def count(self, n: int) -> int:
    """Returns how many of `n` tokens remain."""
    ...
