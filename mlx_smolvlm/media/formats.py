"""Tell from the first bytes of a file what it is, to read it or to say what to do with it."""

from __future__ import annotations

import re

HEAD_BYTES = 1024  # of a file that tell what it is

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_SEQUENCE_BRANDS = {b"hevc", b"hevx", b"msf1", b"avis"}  # of files that may also be animations
_PICTURE = re.compile(rb"\xff\xd8\xff|BM|II\*\0|MM\0\*|\0\0\0\x0cjP  |\xff\x4f\xff\x51|P[1-6]\s")
_VIDEO = re.compile(
    rb"....(?:ftyp|moov|mdat|wide|free|skip)|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01|OggS"
    rb"|\0\0\x01[\xb3\xba]|\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x47.{187}\x47",
    re.DOTALL,
)


def is_heic(head: bytes) -> bool:
    """Return whether a file is a picture in HEIC, as far as `head` says."""
    brands = _read_brands(head)
    return bool(brands & _HEIC_BRANDS) and not brands & _AVIF_BRANDS


def describe_picture_in_video(head: bytes) -> str:
    """Return what is wrong with a picture that was given as a video; empty if it is none."""
    brands = _read_brands(head)
    is_still = brands & (_HEIC_BRANDS | _AVIF_BRANDS) and not brands & _SEQUENCE_BRANDS
    if is_still or _PICTURE.match(head):
        return "is a picture, not a video; give it as an image (-i, /image)"
    return ""


def describe_unknown_picture(head: bytes) -> str:
    """Return why a file whose first bytes are `head` cannot be read as a picture."""
    if b"%PDF-" in head:
        return (
            "is a PDF, whose pages cannot be read yet; save them as PNG: in Preview by File > "
            "Export, or by pdftoppm -r 150 -png"
        )
    if _VIDEO.match(head) and not _read_brands(head) & (_HEIC_BRANDS | _AVIF_BRANDS):
        return "is a video, not a picture; give it as a video (-v, /video)"
    if _read_brands(head) & _AVIF_BRANDS:
        return "is a truncated or damaged AVIF picture"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a picture; give the address of the picture itself"
    if text.startswith(b"<svg") or b"<svg" in text[:512]:
        return "is an SVG drawing; convert it to PNG, in a browser for example"
    return "is not a picture, or is in a format that cannot be read; convert it to PNG or JPEG"


def _read_brands(head: bytes) -> set[bytes]:
    """Return the brands of a file made of boxes, such as MP4 and HEIC; none of other files."""
    if head[4:8] != b"ftyp":
        return set()
    listed = head[8 : min(int.from_bytes(head[:4], "big"), len(head))]
    return {listed[place : place + 4] for place in range(0, len(listed) - 3, 4) if place != 4}
