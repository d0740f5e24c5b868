"""Constants that hold everywhere."""

from typing import Literal

FPS = 25  # video frames a second
SAMPLE_RATE = 16_000  # Hz, of the sound that speech encoders hear
AudioCodec = Literal["aac", "copy"]  # of a video's sound: AAC, which plays everywhere, or as it is
