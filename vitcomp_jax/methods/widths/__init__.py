"""Narrower layers without training: sorts hidden units and the dimensions of each head into lists.

`calibration` measures a dense model on images. `factors` sorts its hidden units by how badly the
others can replace them, and rotates its heads. `masking` drops the ends of the lists inside the
dense model. `deployment` builds the smaller network that computes the same.
"""
