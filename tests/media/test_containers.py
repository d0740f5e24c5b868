"""Damaged media: the errors that PyAV raises, and impossible time stamps."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from dheads.media import containers


class Damaged:
    """A substitute for a container: packets with these times, then the error, if any."""

    name = "speech.ts"

    def __init__(self, times: list[int | None], error: Exception | None = None) -> None:
        self.times, self.error = times, error

    def demux(self, stream: None) -> Iterator[av.Packet]:
        for time in self.times:
            packet = av.Packet(1)
            packet.pts = packet.dts = time
            yield packet
        if self.error:
            raise self.error


def times(container: Damaged) -> list[int | None]:
    return [packet.dts for packet in containers.packets(container, None)]


@pytest.mark.parametrize("error", [av.error.InvalidDataError(1, "cut"), IndexError("list index out of range")])
def test_a_damaged_file_gives_the_packets_before_the_damage(error: Exception) -> None:
    assert times(Damaged([1, 2], error)) == [1, 2]


def test_a_time_beyond_the_next_one_is_no_time() -> None:
    assert times(Damaged([1, 2, 900, 4, 4, None, 3])) == [1, 2, None, 4, 4, None, 3]
    assert times(Damaged([1, 900])) == [1, 900], "nothing says that the last is wrong"
    assert times(Damaged([])) == []
    (packet,) = [p for p in containers.packets(Damaged([5, 1]), None) if p.dts is None]
    assert packet.pts is None


def test_two_containers_read_one_stream_in_turns(examples: Path) -> None:
    def sound(container: av.container.InputContainer) -> Iterator[bytes]:
        return (frame.to_ndarray().tobytes() for frame in containers.decoded(container, container.streams.audio[0]))

    data = (examples / "speech.wav").read_bytes()
    stream = io.BytesIO(data)
    with containers.opened(stream, "a stream") as first, containers.opened(stream, "a stream") as second:
        assert first.name == "a stream"
        ours, theirs = zip(*zip(sound(first), sound(second), strict=True), strict=True)
    assert ours == theirs
    assert b"".join(ours) in data
    assert len(b"".join(ours)) > 100_000


@pytest.mark.parametrize("kind", ["mp4", "mp3"])
def test_tags_that_are_not_utf_8_hide_nothing_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    with av.open(str(path), "w") as container:
        container.metadata.update({"title": "Muller", "artist": "Ann"})
        stream = container.add_stream("libmp3lame" if kind == "mp3" else "aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = path.read_bytes()
    tag = (b"\x03" if kind == "mp3" else b"") + b"Muller"  # ID3 says the encoding in the byte before
    assert content.count(tag) == 1
    path.write_bytes(content.replace(tag, tag.replace(b"u", b"\xfc")))
    with containers.opened(path, "a file") as container:
        assert container.metadata["artist"] == "Ann"
        assert sum(frame.samples for frame in containers.decoded(container, container.streams.audio[0])) >= 4800


def test_a_container_of_another_format_is_refused_where_one_is_named(examples: Path) -> None:
    with (examples / "speech.wav").open("rb") as file, containers.open_container(file, "wav") as container:
        assert container.format.name == "wav"
    with (examples / "speech.wav").open("rb") as file, pytest.raises(av.FFmpegError):
        containers.open_container(file, "mp4")
