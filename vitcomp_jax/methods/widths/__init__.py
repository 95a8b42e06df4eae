"""Widths without training: sorted lists of hidden units and of each head's dimensions.

`calibration` measures a dense model on images, `factors` sorts its units by what the others cannot
replace and rotates its heads, `masking` drops the ends of the lists inside the dense model, and
`deployment` builds the smaller network that computes the same.
"""
