"""The embedded default: a toy world with known ground truth, its demo scene, and the small editor trained on it.

Kept empty on purpose: importing the package must stay cheap, so its parts are imported by their own names.
"""
