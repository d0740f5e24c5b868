"""Weights: the list, download, licences, checkpoints."""
