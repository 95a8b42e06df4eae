"""Images and labels: where they come from, how they are transformed, in which order they come."""

from vitcomp_jax.data.dataset import Dataset
from vitcomp_jax.data.loader import load
from vitcomp_jax.data.transforms import Preprocess, evaluation_image, normalize

__all__ = ["Dataset", "Preprocess", "evaluation_image", "load", "normalize"]
