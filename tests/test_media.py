"""Media with damage: what PyAV throws on it."""

from __future__ import annotations

from collections.abc import Iterator

import av
import pytest

from dheads import media


class Damaged:
    """In place of a container whose reading ends in an error."""

    name = "speech.ts"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def demux(self, stream: None) -> Iterator[str]:
        yield from ("first", "second")
        raise self.error


@pytest.mark.parametrize("error", [av.error.InvalidDataError(1, "cut"), IndexError("list index out of range")])
def test_a_damaged_file_gives_the_packets_before_the_damage(error: Exception) -> None:
    assert list(media.packets(Damaged(error), None)) == ["first", "second"]
