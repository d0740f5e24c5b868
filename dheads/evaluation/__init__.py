"""Measuring how good generated videos are."""
