"""Position embeddings by a spec's `positions`."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vitcomp_jax.models.spec import ViTSpec


class AbsolutePositions(nn.Module):
  """Adds a learnt embedding to each token before the first layer.

  It shares the ViT's scope: its parameter is `pos_embed`, f[1 rows d]. Additions count no MACs.
  """

  spec: ViTSpec

  def setup(self) -> None:
    spec = self.spec
    shape = (1, spec.pos_prefix + spec.num_patches, spec.width)
    self.pos_embed = self.param("pos_embed", nn.initializers.truncated_normal(0.02), shape)

  def __call__(
    self, prefix: Float[Array, "b m d"], patches: Float[Array, "b p d"]
  ) -> Float[Array, "b n d"]:
    """Returns the sequence of prefix and patches, with positions."""
    positions = self.pos_embed.astype(patches.dtype)
    if self.spec.pos_on_prefix:
      return jnp.concatenate([prefix, patches], axis=1) + positions
    return jnp.concatenate([prefix, patches + positions], axis=1)


POSITIONS: dict[str, type[nn.Module]] = {"absolute": AbsolutePositions}
