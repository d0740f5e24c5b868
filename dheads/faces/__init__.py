"""Faces: detection, landmarks, alignment, eyelids, pasting back."""
