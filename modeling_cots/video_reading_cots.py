"""Frames of a video file, decoded one by one with PyAV; only those that are asked for are kept in memory.

transformers has a reader with PyAV too, which could not be used: it returns a repeated position once, so that a video
shorter than the sample gives too few frames, and it believes the number of frames in the file's header, which is 0
for webm. `tests/test_video_reading_cots.py` tests both cases.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from transformers.utils import is_av_available, requires_backends
from transformers.video_utils import VideoMetadata

from .image_reading_cots import MAX_IMAGE_SIDE

# The usual endings of video files; whoever looks for videos among other files goes by these.
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov")
# Containers that can seek to the key frame before a given time; others are decoded from their start.
SEEKABLE_CONTAINERS = ("mp4", "matroska")
# The containers that are opened. FFmpeg knows others whose content names further files or addresses, which it then
# opens: playlists (.m3u8, .mpd), lists of files (concat), numbered images.
ALLOWED_CONTAINERS = "mov,mp4,matroska,webm,avi,flv,asf,mpeg,mpegts,mpegvideo,ogg,gif,mp3"
# Sixteen frames of this size (8K) are 1.6 GB; a file that claims more is no video that anyone filmed.
MAX_FRAME_PIXELS = 7680 * 4320


class UnreadableVideoError(ValueError):
    """A file of which no frame can be decoded: missing, empty, cut off, without images, or no video at all."""


@dataclass(frozen=True)
class FrameTimes:
    """
    At what times the frames of a video stream are shown, read from its packets without decoding them.

    Args:
        num_frames: Number of frames, counted instead of taken from the file's header.
        shown_at: Time of every frame, ascending, in the time base of the stream; `None` where packets lack times.
        key_frames: Times of the frames that decoding can start from, ascending.
    """

    num_frames: int
    shown_at: list[int] | None
    key_frames: list[int]


def read_video(
    path: str, sample_indices_fn: Callable[..., np.ndarray] | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decode frames of a video file in one of `ALLOWED_CONTAINERS`: mp4, mov, webm, mkv, avi, mpeg, flv, wmv, ogg, gif.

    FFmpeg gets the open file alone: neither a name nor a protocol by which it could open another one.

    Frames are counted, not timed, so that a variable frame rate makes no difference. They are rotated upright as the
    file says. A damaged frame is replaced by the next one that can be decoded, or by the last.

    Args:
        path: The video file, a plain one on this machine.
        sample_indices_fn: Called with `metadata`, returns the positions (T,) of the frames, in any order, possibly
            repeated. `None` takes all frames.

    Returns frames (T, H, W, 3), uint8 RGB, and their `VideoMetadata`, as transformers' decoders do.

    Raises [`UnreadableVideoError`] for a file of which no frame can be decoded, and for frames of more than
    `MAX_FRAME_PIXELS`, or with a side of more than `MAX_IMAGE_SIDE`.
    """
    requires_backends(read_video, ["av"])
    with _opened(path) as container:
        stream = _image_stream(container)
        times = _frame_times(container, stream)
        rate = stream.average_rate or stream.guessed_rate
        metadata = VideoMetadata(
            total_num_frames=times.num_frames,
            fps=float(rate) if rate else None,
            width=stream.width,
            height=stream.height,
            duration=float(times.num_frames / rate) if rate else None,
            video_backend="pyav",
        )
    indices = np.arange(times.num_frames) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
    metadata.frames_indices = indices
    wanted, row = np.unique(np.asarray(indices), return_inverse=True)
    with _opened(path) as container:
        frames = _to_array(_frames_at(container, _image_stream(container), times, wanted.tolist()))
    return frames if np.array_equal(row, np.arange(len(wanted))) else frames[row], metadata


@contextmanager
def _opened(path: str) -> Iterator:
    if is_av_available():  # the Hub's import check takes an import for optional only under such an `if`
        import av
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or a device would never end
            raise UnreadableVideoError("It is no plain file.")
        options = {"format_whitelist": ALLOWED_CONTAINERS, "protocol_whitelist": ""}
        with open(path, "rb") as file, av.open(file, options=options) as container:
            yield container
    except UnreadableVideoError:
        raise
    except Exception as error:  # FFmpeg's errors derive from OSError, ValueError, EOFError, ...
        raise UnreadableVideoError(f"{type(error).__name__}: {error}") from error


def _image_stream(container):
    if is_av_available():
        from av.stream import Disposition
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:  # the cover of a music file
            continue
        _check_frame(stream)
        return stream
    raise UnreadableVideoError("The file has no video stream.")


def _check_frame(frame) -> None:
    """Refuse a stream or a frame that is too large, or so long that resizing it would fill the memory."""
    if frame.width * frame.height > MAX_FRAME_PIXELS or max(frame.width, frame.height) > MAX_IMAGE_SIDE:
        raise UnreadableVideoError(f"Its frames have {frame.width} x {frame.height} pixels, above the limit.")


def _frame_times(container, stream) -> FrameTimes:
    """Read the times of a stream from its packets, of which none is decoded or kept."""
    packets = [
        (packet.pts, packet.is_keyframe)
        for packet in container.demux(stream)
        if packet.size > 0 and not packet.is_discard
    ]
    if not packets:
        raise UnreadableVideoError("The video stream has no frames.")
    is_seekable = any(name in container.format.name for name in SEEKABLE_CONTAINERS)
    if not is_seekable or any(shown_at is None for shown_at, _ in packets):
        return FrameTimes(len(packets), None, [])
    shown_at = sorted({shown_at for shown_at, _ in packets})
    return FrameTimes(len(shown_at), shown_at, sorted(shown_at for shown_at, is_key in packets if is_key))


def _frames_at(container, stream, times: FrameTimes, wanted: list[int]) -> Iterator:
    """One decoded frame for each of the wanted positions, in ascending order."""
    is_timed = times.shown_at is not None
    targets = [times.shown_at[index] for index in wanted] if is_timed else wanted
    frames = _decoded(container, stream, is_timed)
    reached, frame = -np.inf, None
    for target in targets:
        key = bisect_right(times.key_frames, target) - 1
        # Only over a whole group of frames: a jump may land one key frame early, where frames were reordered.
        if key > bisect_right(times.key_frames, reached):
            container.seek(times.key_frames[key], stream=stream)
            frames = _decoded(container, stream, is_timed)
        while reached < target:
            following = next(frames, None)
            if following is None:
                break
            reached, frame = following
        if frame is None:
            raise UnreadableVideoError("None of its frames can be decoded.")
        yield frame


def _decoded(container, stream, is_timed: bool) -> Iterator[tuple[int, object]]:
    """Frames from the position of the container on, each with its time, or with its number if not `is_timed`."""
    number = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except ValueError:  # FFmpeg's InvalidDataError: a damaged packet; later ones may be whole
            continue
        for frame in frames:
            if not is_timed or frame.pts is not None:
                yield (frame.pts if is_timed else number), frame
            number += 1


def _to_array(frames: Iterator) -> np.ndarray:
    """(T, H, W, 3) uint8, upright, at the size of the first frame: a stream may change its size midway."""
    arrays, size = [], {}
    for frame in frames:
        _check_frame(frame)  # a stream may claim another size than its frames have
        size = size or {"width": frame.width, "height": frame.height}
        arrays.append(np.rot90(frame.to_ndarray(format="rgb24", **size), k=round(frame.rotation / 90)))
    return np.stack(arrays)


__all__ = ["VIDEO_SUFFIXES", "UnreadableVideoError", "read_video"]
