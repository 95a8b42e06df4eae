"""Images and labels: sources, transforms, augmentation and batches."""

from vitcomp_jax.data.dataset import Dataset
from vitcomp_jax.data.loader import load
from vitcomp_jax.data.transforms import Preprocess, evaluation_image, normalize

__all__ = ["Dataset", "Preprocess", "evaluation_image", "load", "normalize"]
