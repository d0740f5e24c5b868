"""Frozen speech encoders: a waveform to one embedding a video frame."""
