"""Images and labels: sources, transforms, augmentation and batches."""
