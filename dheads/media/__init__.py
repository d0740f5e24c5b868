"""Containers, sound, photos and video: read and written."""
