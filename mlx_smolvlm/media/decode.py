"""Index a video stream and decode chosen frames of it, skipping as many others as possible.

This module imports PyAV, so it is only imported when a video file is opened.
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

SEEK_PACKETS = 256  # above this gap, seeking is faster than reading the packets

_UNKNOWN = -(2**63)  # FFmpeg's value for a missing time


class Keyframe(NamedTuple):
    """A keyframe: position and time of its packet, and the time to seek to."""

    place: int
    time: int
    seek_time: int


@dataclass(frozen=True)
class FrameIndex:
    """Times and packets of the frames of a stream. Times are in the stream's time base.

    Attributes:
        times: int64 (frames,), ascending: the timestamps of decoded frames, or the frame
            numbers if timestamps are missing or repeated.
        display_times: int64 (frames,), ascending: when frames are shown; None if unknown.
        last_duration: How long the last frame is shown; 0 if unknown.
        num_packets: Number of packets, including hidden ones.
        has_places: Whether timestamps identify packets.
    """

    times: np.ndarray
    display_times: np.ndarray | None
    last_duration: int
    num_packets: int
    has_places: bool
    _sorted: np.ndarray  # times of all packets, ascending
    _places: np.ndarray  # position in the file of each of these packets
    _keys: np.ndarray  # (keyframes, 3), the fields of `Keyframe`

    def find_packet(self, time: int | None) -> int | None:
        """Return the position in the file of the packet with this time, or None."""
        if time is None:
            return None
        at = int(self._sorted.searchsorted(time))
        is_indexed = at < len(self._sorted) and self._sorted[at] == time
        return int(self._places[at]) if is_indexed else None

    def find_keyframe(self, time: int) -> Keyframe:
        """Return the keyframe from which the frame at `time` can be decoded.

        A keyframe that is shown after the frame is not enough: in an open group of pictures,
        the frame also refers to frames before that keyframe.
        """
        place = self.find_packet(time)
        at = int(self._keys[:, 0].searchsorted(place, "right")) if place is not None else 0
        while at and self._keys[at - 1, 1] > time:
            at -= 1
        return Keyframe(*self._keys[at - 1].tolist()) if at else Keyframe(0, 0, 0)


def read_index(container: InputContainer, stream: VideoStream, name: str) -> FrameIndex:
    """Read all packets of `stream`, without decoding them, into an index.

    Reading stops at the first damaged packet.

    Raises:
        MediaError: There are more packets than `budget.MAX_FRAMES`.
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
    """Build an index from the times of packets and the positions of keyframes and hidden frames."""
    num_packets, is_shown = len(shown_at), np.ones(len(shown_at), bool)
    is_shown[hidden] = False
    places = np.argsort(shown_at, kind="stable")
    ordered = shown_at[places]
    is_known = not num_packets or ordered[0] != _UNKNOWN
    has_places = is_known and bool((np.diff(ordered) > 0).all())
    display_times: np.ndarray | None = ordered[is_shown[places]]
    if not is_known:  # decoding times have the same rate
        display_times = np.sort(decoded_at[is_shown])
        if not len(display_times) or display_times[0] == _UNKNOWN:
            display_times = None
    if not has_places:
        times = np.arange(int(is_shown.sum()))
        return FrameIndex(
            times, display_times, last, num_packets, False, *3 * (np.empty((0, 3), np.int64),)
        )
    assert display_times is not None
    seek_times = np.where(decoded_at == _UNKNOWN, shown_at, decoded_at)
    all_keys = np.stack([keys, shown_at[keys], seek_times[keys]], axis=1)
    return FrameIndex(
        display_times, display_times, last, num_packets, True, ordered, places, all_keys
    )


class Decoder:
    """Decodes the frames at `indices`, which ascend, and as few others as possible.

    Args:
        container: An open file.
        stream: Its video stream.
        index: The index of `stream`.
        indices: Numbers of the frames, ascending.
        jump: Whether to skip to keyframes and to leave out unreferenced frames; False
            decodes everything from the start.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        index: FrameIndex,
        indices: Sequence[int],
        jump: bool,
    ) -> None:
        self._container, self._stream, self._index = container, stream, index
        targets: list[int] = index.times[list(indices)].tolist()
        self._queue, self._targets = collections.deque(targets), frozenset(targets)
        self._jump = jump and index.has_places
        self._pending_key_time: int | None = None  # of the keyframe jumped to, until it is decoded
        self._count = 0
        stream.thread_type = "AUTO"

    def decode_frames(self) -> Iterator[tuple[VideoFrame, bool]]:
        """Yield (frame, is_exact) for each index; a damaged frame is replaced by the nearest one.

        If a packet marked as a keyframe yields no frame, or one that refers to other frames,
        the frames after it are not exact, even if the decoder reports no error.
        """
        before: VideoFrame | None = None
        before_time = 0
        for frame in self._decode_selected():
            time = self._get_time(frame)
            if time is None:
                continue
            if time == self._pending_key_time and frame.pict_type not in _INTER_TYPES:
                self._pending_key_time = None
            is_exact = self._pending_key_time is None and not frame.is_corrupt
            while self._queue and self._queue[0] <= time:
                target = self._queue[0]
                is_nearer = before is not None and target - before_time < time - target
                nearest = before if is_nearer and before is not None else frame
                yield nearest, is_exact and time == target
                self._queue.popleft()
            if not self._queue:
                return
            before, before_time = frame, time
        if before is not None:
            for _ in self._queue:
                yield before, False

    def _get_time(self, frame: VideoFrame) -> int | None:
        """Return the time of a frame as in `FrameIndex.times`."""
        self._count += 1
        return frame.pts if self._index.has_places else self._count - 1

    def _decode_selected(self) -> Iterator[VideoFrame]:
        """Yield the frames decoded from the selected packets."""
        has_input = False
        for packet in self._select_packets():
            if packet is None:  # a gap: drop the frames still in the decoder
                if has_input:
                    self._stream.codec_context.flush_buffers()
                has_input = False
                continue
            if self._jump:
                is_target = packet.pts in self._targets
                self._stream.codec_context.skip_frame = "DEFAULT" if is_target else "NONREF"
            has_input = True
            yield from self._decode_packet(packet)
        yield from self._decode_packet(None)

    def _decode_packet(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """Return the frames that `packet` completes; none if it is damaged."""
        try:
            return self._stream.codec_context.decode(packet)
        except av.FFmpegError:
            return []

    def _select_packets(self) -> Iterator[Packet[VideoStream] | None]:
        """Yield the packets to decode, with None wherever packets are skipped."""
        packets, sought_key = self._demux(), None
        key: Keyframe | None = None
        key_for: int | None = None  # time of the frame that `key` was looked up for
        while (packet := next(packets, None)) is not None:
            if not self._jump or not self._queue:
                key = None
            elif self._queue[0] != key_for:
                key_for = self._queue[0]
                key = self._index.find_keyframe(key_for)
            place = self._index.find_packet(packet.pts) if key else None
            if key is None or place is None or place >= key.place:
                if key is not None and key == sought_key and place != key.place:
                    return  # the seek ended after the keyframe: the index is wrong
                sought_key = None
                yield packet
                continue
            self._pending_key_time = key.time
            yield None
            if key.place - place > SEEK_PACKETS and key != sought_key:
                sought_key = key
                with contextlib.suppress(av.FFmpegError):
                    self._container.seek(key.seek_time, stream=self._stream)
                    packets = self._demux()

    def _demux(self) -> Iterator[Packet[VideoStream]]:
        """Yield packets from the current position to the end of the file or the first error."""
        with contextlib.suppress(av.FFmpegError):
            yield from (packet for packet in self._container.demux(self._stream) if packet.size)
