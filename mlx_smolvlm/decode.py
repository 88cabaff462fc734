"""Chosen frames of a video stream, decoding as few others as can be.

Imported when a video file is opened, since PyAV is.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

SEEK_PACKETS = 256  # a gap from which on seeking beats reading over it


class Key(NamedTuple):
    """A keyframe: the place and the time of its packet, and the time to seek to."""

    place: int
    time: int
    seek_time: int


@dataclass(frozen=True)
class Index:
    """Where the frames of a stream are.

    Attributes:
        times: Of the frames, ascending, in the stream's unit of time; their numbers if
            the packets have no usable times.
        fps: From the times; for files that state none.
        packets: How many there are.
        positions: Place of each time's packet in the file's order; empty without times.
        keys: The keyframes.
    """

    times: list[int]
    fps: float
    packets: int
    positions: dict[int, int]
    keys: list[Key]

    def key_before(self, time: int) -> Key:
        """The keyframe from which the frame at `time` can be decoded.

        One that is shown later does not do: frames between the two refer to what was before.
        """
        place = self.positions[time]
        at = bisect.bisect_right(self.keys, (place + 1,))
        while at and self.keys[at - 1].time > time:
            at -= 1
        return self.keys[at - 1] if at else Key(0, 0, 0)


def read_index(container: InputContainer, stream: VideoStream) -> Index:
    """The index of `stream`, from its packets; what comes after damage is not in it."""
    shown: list[int | None] = []
    every: list[int | None] = []
    keys: list[Key] = []
    with contextlib.suppress(av.FFmpegError):
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_keyframe and packet.pts is not None:
                dts = packet.pts if packet.dts is None else packet.dts
                keys.append(Key(len(every), packet.pts, dts))
            every.append(packet.pts)
            if not packet.is_discard:
                shown.append(packet.pts)
    times = sorted(time for time in every if time is not None)
    if len(set(times)) < len(every):  # some are missing, or given twice
        return Index(list(range(len(shown))), 25.0, len(every), {}, [])
    times = sorted(time for time in shown if time is not None)
    span = (times[-1] - times[0]) * (stream.time_base or 1) if times else 0
    fps = float((len(times) - 1) / span) if span else 25.0
    positions = {time: place for place, time in enumerate(every) if time is not None}
    return Index(times, fps, len(every), positions, keys)


class Decoder:
    """Decodes the frames at `indices`, in ascending order, and as few others as can be."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        index: Index,
        indices: Sequence[int],
        jump: bool,
    ) -> None:
        self._container, self._stream, self._index = container, stream, index
        self._wanted = collections.deque(index.times[i] for i in indices)
        self._all_wanted = frozenset(self._wanted)
        self._jump = jump and bool(index.positions)
        self._count = 0
        stream.thread_type = "AUTO"

    def frames(self) -> Iterator[tuple[VideoFrame, bool]]:
        """Each wanted frame and True; in place of a damaged one, the nearest and False."""
        before: VideoFrame | None = None
        before_time = 0
        for frame in self._decoded():
            time = self._time(frame)
            if time is None:
                continue
            while self._wanted and self._wanted[0] <= time:
                wanted = self._wanted[0]
                nearer = before is not None and wanted - before_time < time - wanted
                yield (before if nearer and before is not None else frame), time == wanted
                self._wanted.popleft()
            if not self._wanted:
                return
            before, before_time = frame, time
        if before is not None:
            for _ in self._wanted:
                yield before, False

    def _time(self, frame: VideoFrame) -> int | None:
        """The time of a frame in the units of the index."""
        self._count += 1
        return frame.pts if self._index.positions else self._count - 1

    def _decoded(self) -> Iterator[VideoFrame]:
        """Frames as they leave the decoder, which is fed what the next wanted one needs."""
        fed = False
        for packet in self._packets():
            if packet is None:  # a gap: what the decoder still holds is not wanted
                if fed:
                    self._stream.codec_context.flush_buffers()
                fed = False
                continue
            if self._jump:
                wanted = packet.pts in self._all_wanted
                self._stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"
            fed = True
            yield from self._decode(packet)
        yield from self._decode(None)

    def _decode(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """The frames that `packet` completes; none if it is damaged."""
        try:
            return self._stream.codec_context.decode(packet)
        except av.FFmpegError:
            return []

    def _packets(self) -> Iterator[Packet[VideoStream] | None]:
        """Packets for the decoder, with None where some are left out."""
        packets, sought = self._demuxed(), None
        while (packet := next(packets, None)) is not None:
            key = self._index.key_before(self._wanted[0]) if self._jump and self._wanted else None
            place = self._index.positions.get(packet.pts) if key else None  # type: ignore[arg-type]
            if key is None or place is None or place >= key.place:
                if key is not None and key == sought and place != key.place:
                    return  # past the keyframe: the file cannot be relied on
                sought = None
                yield packet
                continue
            yield None
            if key.place - place > SEEK_PACKETS and key != sought:
                sought = key
                with contextlib.suppress(av.FFmpegError):
                    self._container.seek(key.seek_time, stream=self._stream)
                    packets = self._demuxed()

    def _demuxed(self) -> Iterator[Packet[VideoStream]]:
        """The stream's packets from where the file is read, up to its end or to damage."""
        with contextlib.suppress(av.FFmpegError):
            yield from (packet for packet in self._container.demux(self._stream) if packet.size)
