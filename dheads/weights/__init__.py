"""Weights: the list of known sets, their licences and downloads, and checkpoint files."""
