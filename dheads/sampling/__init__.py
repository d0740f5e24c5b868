"""From a face and a recording to a video."""
