"""Real video files for the tests, in which every frame tells its number by its gray level."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

LEVELS = 6  # gray levels between neighboring frames, more than compression changes
CODECS = {
    ".mp4": "libx264",
    ".mov": "mpeg4",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
    ".avi": "mpeg4",
    ".ts": "libx264",
}


def write_video(
    path: Path,
    numbers=range(40),
    *,
    codec: str | None = None,
    size: tuple[int, int] = (48, 64),
    frame_rate: int = 10,
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> str:
    """Encode one frame of `size` (height, width) for each number or image, shown at `times` in ms if given."""
    codec = CODECS[path.suffix] if codec is None else codec
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    # Reordered frames; MPEG-4 would blur a small step of gray away.
    encoder_options = {"libx264": {"bf": "2"}, "mpeg4": {"qmin": "1", "qmax": "2"}}.get(codec, {})
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=frame_rate, options=encoder_options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 8
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        container.start_encoding()  # writes the header, even if no frame follows
        for position, number in enumerate(numbers):
            image = number if isinstance(number, np.ndarray) else np.full((*size, 3), LEVELS * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[position], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def numbers_of(frames: np.ndarray) -> list[int]:
    """The numbers of frames (T, H, W, 3)."""
    return np.rint(frames.reshape(len(frames), -1).mean(axis=1) / LEVELS).astype(int).tolist()


def write_audio(path: Path, cover: bytes | None = None) -> str:
    """A tenth of a second of silence as mp3, with a cover image (JPEG) if given."""
    with av.open(str(path), "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.int16), format="s16", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if cover is not None:
        body = b"\0image/jpeg\0\x03\0" + cover
        tag = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
        length = bytes((len(tag) >> shift) & 0x7F for shift in (21, 14, 7, 0))
        path.write_bytes(b"ID3\x03\0\0" + length + tag + path.read_bytes())
    return str(path)
