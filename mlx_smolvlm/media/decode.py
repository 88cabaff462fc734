"""Chosen frames of a video stream, decoding as few others as can be.

Imported when a video file is opened, since PyAV is.
"""

from __future__ import annotations

import array
import collections
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from mlx_smolvlm.media.budget import check_frames

_INTER_TYPES = (PictureType.P, PictureType.B)

SEEK_PACKETS = 256  # a gap from which on seeking beats reading over it


_UNKNOWN = -(2**63)  # FFmpeg's time of a packet that has none


class Keyframe(NamedTuple):
    """A keyframe: the place and the time of its packet, and the time to seek to."""

    place: int
    time: int
    seek_time: int


@dataclass(frozen=True)
class FrameIndex:
    """Where the frames of a stream are. All times are in the stream's unit.

    Attributes:
        times: int64 (frames,), ascending: the times that decoded frames bear; their numbers
            if these do not tell frames apart.
        clock: int64 (frames,), ascending: when frames are shown; None if it is not known.
        last: How long the last frame is shown; 0 if it is not known.
        packets: How many there are.
        has_places: Whether the packet of a frame can be found by its time.
    """

    times: np.ndarray
    clock: np.ndarray | None
    last: int
    packets: int
    has_places: bool
    _sorted: np.ndarray  # all packets' times, ascending
    _places: np.ndarray  # of each of these in the file's order
    _keys: np.ndarray  # (keyframes, 3), the fields of `Keyframe`

    def find_packet(self, time: int | None) -> int | None:
        """Place of the packet with this time in the file's order."""
        if time is None:
            return None
        at = int(self._sorted.searchsorted(time))
        found = at < len(self._sorted) and self._sorted[at] == time
        return int(self._places[at]) if found else None

    def find_keyframe(self, time: int) -> Keyframe:
        """The keyframe from which the frame at `time` can be decoded.

        One that is shown later does not do: frames between the two refer to what was before.
        """
        place = self.find_packet(time)
        at = int(self._keys[:, 0].searchsorted(place, "right")) if place is not None else 0
        while at and self._keys[at - 1, 1] > time:
            at -= 1
        return Keyframe(*self._keys[at - 1].tolist()) if at else Keyframe(0, 0, 0)


def read_index(container: InputContainer, stream: VideoStream, name: str) -> FrameIndex:
    """The index of `stream`, from its packets; what comes after damage is not in it.

    Raises:
        MediaError: There are more packets than a video may have frames.
    """
    shown_at, decoded_at, keys, hidden = (array.array("q") for _ in range(4))
    latest: Packet[VideoStream] | None = None
    latest_time = _UNKNOWN
    with contextlib.suppress(av.FFmpegError):
        for packet in container.demux(stream):
            if not packet.size:
                continue
            pts, dts = packet.pts, packet.dts
            if packet.is_keyframe and pts is not None:
                keys.append(len(shown_at))
            if packet.is_discard:
                hidden.append(len(shown_at))
            shown_at.append(_UNKNOWN if pts is None else pts)
            decoded_at.append(_UNKNOWN if dts is None else dts)
            if shown_at[-1] >= latest_time:
                latest, latest_time = packet, shown_at[-1]
            if not len(shown_at) & 0xFFFF:
                check_frames(len(shown_at), name)
    last = latest.duration if latest is not None else None
    return _build_index(
        _to_array(shown_at), _to_array(decoded_at), _to_array(keys), _to_array(hidden), last or 0
    )


def _to_array(values: array.array[int]) -> np.ndarray:
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)


def _build_index(
    shown_at: np.ndarray, decoded_at: np.ndarray, keys: np.ndarray, hidden: np.ndarray, last: int
) -> FrameIndex:
    """The index of packets with these times, places of keyframes and of hidden frames."""
    packets, is_shown = len(shown_at), np.ones(len(shown_at), bool)
    is_shown[hidden] = False
    places = np.argsort(shown_at, kind="stable")
    ordered = shown_at[places]
    is_known = not packets or ordered[0] != _UNKNOWN
    has_places = is_known and bool((np.diff(ordered) > 0).all())
    clock: np.ndarray | None = ordered[is_shown[places]]
    if not is_known:  # times of decoding have the same rate
        clock = np.sort(decoded_at[is_shown])
        clock = clock if len(clock) and clock[0] != _UNKNOWN else None
    if not has_places:
        times = np.arange(int(is_shown.sum()))
        return FrameIndex(times, clock, last, packets, False, *3 * (np.empty((0, 3), np.int64),))
    assert clock is not None
    seek_times = np.where(decoded_at == _UNKNOWN, shown_at, decoded_at)
    all_keys = np.stack([keys, shown_at[keys], seek_times[keys]], axis=1)
    return FrameIndex(clock, clock, last, packets, True, ordered, places, all_keys)


class Decoder:
    """Decodes the frames at `indices`, in ascending order, and as few others as can be."""

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        index: FrameIndex,
        indices: Sequence[int],
        jump: bool,
    ) -> None:
        self._container, self._stream, self._index = container, stream, index
        wanted: list[int] = index.times[list(indices)].tolist()
        self._queue, self._targets = collections.deque(wanted), frozenset(wanted)
        self._jump = jump and index.has_places
        self._pending_key_time: int | None = (
            None  # time of the keyframe jumped to, until it is decoded
        )
        self._count = 0
        stream.thread_type = "AUTO"

    def decode_frames(self) -> Iterator[tuple[VideoFrame, bool]]:
        """Each wanted frame and True; in place of a damaged one, the nearest and False.

        What is called a keyframe and does not come out of the decoder, or refers to others,
        is none: what follows it is not right, even if the decoder shows it.
        """
        before: VideoFrame | None = None
        before_time = 0
        for frame in self._decode_selected():
            time = self._get_time(frame)
            if time is None:
                continue
            if time == self._pending_key_time and frame.pict_type not in _INTER_TYPES:
                self._pending_key_time = None
            exact = self._pending_key_time is None and not frame.is_corrupt
            while self._queue and self._queue[0] <= time:
                wanted = self._queue[0]
                nearer = before is not None and wanted - before_time < time - wanted
                yield (before if nearer and before is not None else frame), exact and time == wanted
                self._queue.popleft()
            if not self._queue:
                return
            before, before_time = frame, time
        if before is not None:
            for _ in self._queue:
                yield before, False

    def _get_time(self, frame: VideoFrame) -> int | None:
        """The time of a frame in the units of the index."""
        self._count += 1
        return frame.pts if self._index.has_places else self._count - 1

    def _decode_selected(self) -> Iterator[VideoFrame]:
        """Frames as they leave the decoder, which is fed what the next wanted one needs."""
        fed = False
        for packet in self._select_packets():
            if packet is None:  # a gap: what the decoder still holds is not wanted
                if fed:
                    self._stream.codec_context.flush_buffers()
                fed = False
                continue
            if self._jump:
                wanted = packet.pts in self._targets
                self._stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"
            fed = True
            yield from self._decode_packet(packet)
        yield from self._decode_packet(None)

    def _decode_packet(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """The frames that `packet` completes; none if it is damaged."""
        try:
            return self._stream.codec_context.decode(packet)
        except av.FFmpegError:
            return []

    def _select_packets(self) -> Iterator[Packet[VideoStream] | None]:
        """Packets for the decoder, with None where some are left out."""
        packets, sought = self._demux(), None
        key: Keyframe | None = None
        key_for: int | None = None  # the time of the frame that `key` is for
        while (packet := next(packets, None)) is not None:
            if not self._jump or not self._queue:
                key = None
            elif self._queue[0] != key_for:
                key_for = self._queue[0]
                key = self._index.find_keyframe(key_for)
            place = self._index.find_packet(packet.pts) if key else None
            if key is None or place is None or place >= key.place:
                if key is not None and key == sought and place != key.place:
                    return  # past the keyframe: the file cannot be relied on
                sought = None
                yield packet
                continue
            self._pending_key_time = key.time
            yield None
            if key.place - place > SEEK_PACKETS and key != sought:
                sought = key
                with contextlib.suppress(av.FFmpegError):
                    self._container.seek(key.seek_time, stream=self._stream)
                    packets = self._demux()

    def _demux(self) -> Iterator[Packet[VideoStream]]:
        """The stream's packets from where the file is read, up to its end or to damage."""
        with contextlib.suppress(av.FFmpegError):
            yield from (packet for packet in self._container.demux(self._stream) if packet.size)
