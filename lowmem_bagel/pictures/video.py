"""Videos, read and written by PyAV, which the extra `video` brings.

Only the containers named here are opened, from a file that is open already: whatever such a file names besides is
refused, and nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ImageError, MissingExtraError
from .containers import AVIF_BRANDS, HEIF_BRANDS, brands
from .encoded import Source, check_size, reason_of

if TYPE_CHECKING:
    from PIL import Image

MAX_SECONDS = 600
"""Of a video that pictures are taken of."""
MAX_PACKETS = 40_000
"""Of its stream: ten minutes at 60 pictures a second, and some."""
YUV_BYTES = 8
"""A pixel, of a decoded picture and of the RGB picture that is made of it, with those that the decoder keeps."""
HEAD_BYTES = 64


def _is_mp4(head: bytes) -> bool:
    said = brands(head)
    return (bool(said) or head[4:8] in (b"moov", b"mdat", b"wide", b"free")) and not any(
        brand in (*AVIF_BRANDS, *HEIF_BRANDS) for brand in said
    )


CONTAINERS: Mapping[str, Callable[[bytes], bool]] = {
    "mp4": _is_mp4,
    "matroska": lambda head: head.startswith(b"\x1aE\xdf\xa3"),
    "avi": lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ",
}
"""That are opened, by FFmpeg's names, told from a file's first bytes: MP4 and MOV, Matroska and WebM, AVI."""


def container_of(source: Source) -> str | None:
    """Which container a file is; None where it is none that is opened."""
    source.file.seek(0)
    head = source.file.read(HEAD_BYTES)
    source.file.seek(0)
    return next((name for name, fits in CONTAINERS.items() if fits(head)), None)


def read_video(source: Source, count: int) -> list[Image.Image]:
    """At most `count` pictures of a video, evenly spaced, the first and the last among them; RGB, upright.

    Raises:
        ImageError: it is no video that is read, damaged, too long or too large.
        MissingExtraError: PyAV is not there.
    """
    container = container_of(source)
    if container is None:
        raise ImageError(f"{source.name}: not a video that is read (MP4, MOV, WebM, Matroska or AVI)")
    av = _av(f"{source.name} is a video, which")
    try:
        length = sum(1 for _ in _packets(av, source, container))
        if not length:
            raise ImageError(f"{source.name}: a video without pictures")
        wanted = evenly(length, count)
        found = list(_pictures(av, source, container, wanted))
    except av.error.FFmpegError as error:
        raise ImageError(f"{source.name}: damaged or truncated video ({reason_of(error)}); save it again") from error
    if not found:
        raise ImageError(f"{source.name}: no picture of this video can be decoded; save it again")
    return found


def evenly(length: int, count: int) -> list[int]:
    """Places of at most `count` of `length`, the first and the last among them where there are two."""
    count = min(length, count)
    return [place * (length - 1) // max(1, count - 1) for place in range(count)]


def can_write_video() -> bool:
    """Whether PyAV is there and can be used."""
    try:
        _av("")
    except MissingExtraError:
        return False
    return True


def write_video(images: Sequence[Image.Image], file: BinaryIO, metadata: Mapping[str, Any], fps: float) -> None:
    """An MP4 of pictures of one size, whose comment is the metadata.

    Raises:
        MissingExtraError: PyAV is not there.
    """
    av = _av("writing a video")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = json.dumps(dict(metadata))
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = *images[0].size, "yuv420p"
        stream.options = {"crf": "16"} if codec == "libx264" else {"qscale": "2"}
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))


def _av(what: str) -> Any:
    try:
        import av
        import av.error
    except ImportError as error:
        raise MissingExtraError(f"{what} needs an extra: pip install 'lowmem-bagel[video]'") from error
    return av


def _opened(av: Any, source: Source, container: str) -> Any:
    source.file.seek(0)

    def refuse(url: str, flags: int, options: object) -> Any:
        raise ImageError(f"{source.name}: it names another file, which is not read")

    return av.open(source.file, format=container, io_open=refuse, metadata_errors="ignore")


def _packets(av: Any, source: Source, container: str) -> Iterator[Any]:
    """Of the first stream of pictures, without decoding them.

    Raises:
        ImageError: there is none, or there are too many.
    """
    with _opened(av, source, container) as opened:
        stream = _stream(opened, source)
        first: float | None = None
        for number, packet in enumerate(opened.demux(stream)):
            if packet.size == 0:  # which ends the stream
                continue
            time = float(packet.pts * packet.time_base) if packet.pts is not None else 0.0
            first = time if first is None else first
            if number >= MAX_PACKETS or time - first > MAX_SECONDS:
                raise ImageError(f"{source.name}: longer than {MAX_SECONDS // 60} minutes; cut out what matters")
            yield packet


def _stream(opened: Any, source: Source) -> Any:
    if not opened.streams.video:
        raise ImageError(f"{source.name}: it has sound and no pictures")
    stream = opened.streams.video[0]
    check_size(source.name, (stream.codec_context.width, stream.codec_context.height), YUV_BYTES)
    return stream


def _pictures(av: Any, source: Source, container: str, wanted: Sequence[int]) -> Iterator[Image.Image]:
    """Those at the wanted places, as far as the stream can be decoded."""
    with _opened(av, source, container) as opened:
        for place, frame in enumerate(opened.decode(_stream(opened, source))):
            check_size(source.name, (frame.width, frame.height), YUV_BYTES)
            if place in wanted:
                # FFmpeg says by how much a picture is to be turned counterclockwise, as Pillow counts.
                yield frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)
            if place >= wanted[-1]:
                return
