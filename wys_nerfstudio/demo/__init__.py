"""Toy world with ground truth, its demo scene, and the small editor and CLIP model trained on it.

Nothing is re-exported, so that importing the package is cheap.
"""
