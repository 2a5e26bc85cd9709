"""Pictures, captions and names from anywhere: odd, damaged, or made to do harm."""

import csv
import io
import os
import random
import re
import resource
import signal
import socket
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import HEIC, QUADRANTS, add, listed, quadrants

import finetune

WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)
GREYS = [(v, v, v) for v in (76, 150, 29, 255)]  # the quadrants' luminance
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_270}  # fmt: skip
BROKEN, EITHER = "can't be read|is none of", None
MAX_BYTES = 3 << 30  # of address space for reading mutated files, above what is in use
MUTATED = 1000  # files of each format
MAX_SECONDS = 20  # for one of them


@contextmanager
def written_to_stderr(path: Path):
    """Puts what C code and Python write to file descriptor 2 into a file."""
    kept = os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


# ---- Files that Pillow can't write --------------------------------------------------------------


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(pixels: np.ndarray, bits: int, color: int, *extra: bytes, adam7=False, size=None) -> bytes:
    """A PNG of (height, width[, channels]); `size` is what its header claims."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2)]  # x, y, step in x, step in y
    raw = bytearray()
    for x, y, dx, dy in passes if adam7 else [(0, 0, 1, 1)]:
        for row in pixels[y::dy, x::dx]:
            if bits == 16:
                content = row.astype(">u2").tobytes()
            elif bits == 8:
                content = row.astype(np.uint8).tobytes()
            else:
                single = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
                content = np.packbits(single.reshape(-1)).tobytes()
            raw += b"\0" + content
    width, height = size or pixels.shape[1::-1]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, adam7)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra)
            + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


def tiff(tags: dict[int, tuple[str, list[int]]], content: bytes, order: str = "<") -> bytes:
    """A TIFF of one directory; tag -> (H, L or d, values). `content` begins at byte 8."""
    kinds = {"B": 1, "H": 3, "L": 4, "d": 12}
    content += b"\0" * (len(content) % 2)
    place = 8 + len(content)
    after, entries = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(raw) > 4:
            offset = place + 2 + 12 * len(tags) + 4 + len(after)
            after, raw = after + raw, struct.pack(f"{order}L", offset)
        entries += struct.pack(f"{order}HHL", tag, kinds[kind], len(values)) + raw.ljust(4, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HL", 42, place)
    return start + content + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + after


def strip(width: int, height: int, bits: list[int], photometric: int, size: int, **more) -> dict:
    """The tags of an uncompressed TIFF in one strip; `more` is t322=("H", [16])."""
    return {256: ("L", [width]), 257: ("L", [height]), 258: ("H", bits), 259: ("H", [1]),
            262: ("H", [photometric]), 273: ("L", [8]), 277: ("H", [len(bits)]),
            278: ("L", [height]), 279: ("L", [size])} | {
            int(tag[1:]): value for tag, value in more.items()}  # fmt: skip


def bmp(width: int, height: int, bits: int, colors: list[tuple], content: bytes, method=0) -> bytes:
    table = b"".join(bytes([b, g, r, 0]) for r, g, b in colors)
    start = 54 + len(table)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, method, len(content), 0, 0,
                         len(colors), 0)
    sizes = struct.pack("<IHHI", start + len(content), 0, 0, start)
    return b"BM" + sizes + header + table + content


def ycck() -> bytes:
    """A CMYK JPEG whose inks are stored as luminance and colour, as Photoshop does."""
    inverted = Image.fromarray(255 - np.asarray(quadrants())).convert("YCbCr")
    black = Image.new("L", inverted.size, 255)
    stored = Image.merge("CMYK", [*inverted.split(), black]).point(lambda value: 255 - value)
    raw = bytearray(saved(stored, "JPEG", quality=95))
    raw[raw.index(b"Adobe") + 11] = 2
    return bytes(raw)


def turned(kind: str, orientation: int) -> bytes:
    picture, exif = quadrants(), Image.Exif()
    exif[0x0112] = orientation
    picture = picture.transpose(TURNS[orientation]) if orientation in TURNS else picture
    return saved(picture, kind, exif=exif)


def exif_jpeg(block: bytes, picture: Image.Image | None = None) -> bytes:
    """A JPEG of the picture, or of the quadrants, with these bytes as its EXIF."""
    whole = saved(picture or quadrants(), "JPEG")
    content = b"Exif\0\0" + block
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + whole[2:]


def exif_entries(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A block of EXIF: tag, type, count, value or offset."""
    rows = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + rows + bytes(4)


# ---- The corpus: name -> (content, colours of the quadrants or why it is refused) ---------------


def jpegs() -> dict:
    four, cmyk = QUADRANTS, quadrants().convert("CMYK")
    small = Image.new("RGB", (64, 48), "black")
    files = {
        "baseline": (saved(quadrants(), "JPEG"), four),
        "progressive": (saved(quadrants(), "JPEG", progressive=True), four),
        "4:4:4": (saved(quadrants(), "JPEG", subsampling=0), four),
        "coarse": (saved(quadrants(), "JPEG", quality=10), four),
        "rgb": (saved(quadrants(), "JPEG", keep_rgb=True), four),
        "restarts": (saved(quadrants(), "JPEG", restart_marker_blocks=1), four),
        "grey": (saved(quadrants().convert("L"), "JPEG"), GREYS),
        "cmyk": (saved(cmyk, "JPEG"), four), "ycck": (ycck(), four),
        "mpo": (saved(quadrants(), "MPO", save_all=True, append_images=[small]), four),
        "comment": (saved(quadrants(), "JPEG", comment=b"\x1b[31m\0\n" * 100), four),
        "bad profile": (saved(quadrants(), "JPEG", icc_profile=b"no profile" * 9999), four),
        "trailing": (saved(quadrants(), "JPEG") + b"<?php echo 1 ?>" * 100, four),
        "one pixel": (saved(Image.new("RGB", (1, 1), "red"), "JPEG"), [RED] * 4),
        "1x5000": (saved(Image.new("RGB", (1, 5000), "red"), "JPEG"), [RED] * 4),
        "60000x1": (saved(Image.new("RGB", (60000, 1), "red"), "JPEG"), [RED] * 4),
    }
    for orientation in (0, 9, 65535):
        files[f"orientation {orientation}"] = (turned("JPEG", orientation), four)
    upright = exif_jpeg(exif_entries((0x0112, 3, 1, b"\1")))
    files["orientation"] = (upright, four)
    damaged = {
        "empty": b"", "nothing": b"\0" * 8, "text": b"no EXIF at all, but a text",
        "short": b"II*\0", "order": b"XX*\0\x08\0\0\0", "far": b"II*\0\xff\xff\xff\xff",
        "loop": b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "many": b"II*\0\x08\0\0\0\xff\xff",
        "cut": exif_entries((0x0112, 3, 1, b"\1"))[:14],
        "type": exif_entries((0x0112, 99, 1, b"\6")),
        "count": exif_entries((0x0112, 3, 0xFFFFFFFF, b"\6")),
        "zero": exif_entries((0x0112, 3, 0, b"\6")),
        "ascii": exif_entries((0x0112, 2, 2, b"6")),
        "rational": exif_entries((0x0112, 5, 1, b"\xff\xff")),
        "sub": exif_entries((0x8769, 4, 1, b"\x08"), (0x8825, 4, 1, b"\xff\xff\xff\x7f")),
        "maker": exif_entries((0x927C, 7, 0x7FFFFFFF, b"\x08"), (0x8769, 2, 4, b"abcd")),
    }
    files |= {f"exif {name}": (exif_jpeg(block), four) for name, block in damaged.items()}
    odd = exif_entries((0x0100, 99, 7, b"ab"), (0x010F, 2, 0xFFFFFF, b"\x08"),
                       (0x0112, 3, 1, b"\6"), (0x011A, 5, 1, b"\xff\xff"), (0x8769, 4, 1, b"\x08"),
                       (0x8825, 2, 4, b"abcd"), (0xEA1C, 13, 2, b"abcd"))  # fmt: skip
    files["exif odd, turned"] = (exif_jpeg(odd, quadrants().transpose(TURNS[6])), four)
    size = saved(quadrants(), "JPEG")
    place = size.index(b"\xff\xc0") + 5
    files |= {
        "zero high": (size[:place] + bytes(2) + size[place + 2 :], BROKEN),
        "65500x65500": (size[:place] + b"\xff\xdc" * 2 + size[place + 4 :], "pixels"),
        "no tables": (re.sub(rb"\xff\xdb", b"\xff\xfe", size), BROKEN),
        "only markers": (b"\xff\xd8" + b"\xff\xd9", BROKEN),
        "12 bits": (size[: place - 1] + b"\x0c" + size[place:], BROKEN),
    }
    return {f"JPEG {name}": row for name, row in files.items()}


def pngs() -> dict:
    four, rgb = QUADRANTS, np.asarray(quadrants())
    square = quadrants(16, 16)
    pal = quadrants().quantize(4)
    bits = np.kron([[1, 0], [0, 1]], np.ones((24, 32), int))
    black_white = [WHITE, BLACK, BLACK, WHITE]
    grey16 = np.kron([[65535, 0], [32896, 257]], np.ones((24, 32), int))
    alpha = np.dstack([np.full_like(rgb, (255, 0, 0)), rgb[..., 0]])  # opaque where red is
    files = {
        "rgb": (saved(quadrants(), "PNG"), four),
        "palette": (saved(pal, "PNG"), four),
        "palette, all transparent": (saved(pal, "PNG", transparency=bytes(4)), [WHITE] * 4),
        "palette, short tRNS": (saved(pal, "PNG", transparency=b""), four),
        "1 bit": (saved(quadrants().convert("1", dither=0), "PNG"), [BLACK, WHITE, BLACK, WHITE]),
        "grey": (saved(quadrants().convert("L"), "PNG"), GREYS),
        "grey and alpha": (png(np.dstack([grey16 >> 8, bits * 255]), 8, 4),
                           [WHITE, WHITE, WHITE, (1, 1, 1)]),
        "grey and alpha, 16 bits": (png(np.dstack([grey16, bits * 65535]), 16, 4),
                                    [WHITE, WHITE, WHITE, (1, 1, 1)]),
        "rgba": (png(alpha, 8, 6), [RED, WHITE, WHITE, RED]),
        "rgba, 16 bits": (png(alpha.astype(int) * 257, 16, 6), [RED, WHITE, WHITE, RED]),
        "rgb, 16 bits": (png(rgb.astype(int) * 257, 16, 2), four),
        "grey, 16 bits": (png(grey16, 16, 0), [WHITE, BLACK, (128,) * 3, (1,) * 3]),
        "rgb, tRNS": (png(rgb, 8, 2, chunk(b"tRNS", struct.pack(">3H", 255, 0, 0))),
                      [WHITE, *four[1:]]),
        "grey, tRNS": (png(bits * 255, 8, 0, chunk(b"tRNS", bytes(2))), [WHITE] * 4),
        "no pixel": (png(rgb[:0], 8, 2), BROKEN),
        "no column": (png(rgb[:, :0], 8, 2), BROKEN),
        "one pixel": (png(rgb[:1, :1], 8, 2), [RED] * 4),
        "1x5000": (png(np.full((5000, 1, 3), RED), 8, 2), [RED] * 4),
        "5000x1": (png(np.full((1, 5000, 3), RED), 8, 2), [RED] * 4),
        "bomb": (png(rgb, 8, 2, size=(60000, 60000)), "pixels"),
        "bomb in one line": (png(rgb, 8, 2, size=(2**31 - 1, 1)), "pixels"),
        "negative": (png(rgb, 8, 2, size=(2**32 - 1, 2**32 - 1)), "pixels"),
        "larger than its data": (png(rgb, 8, 2, size=(64, 49)), four),
        "smaller than its data": (png(rgb, 8, 2, size=(64, 24)), [*four[:2], *four[:2]]),
        "text bomb": (png(rgb, 8, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))),
                      "too large"),
        "profile bomb": (png(rgb, 8, 2, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**7)))),
                         "too large"),
        "long text": (png(rgb, 8, 2, chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(10**7)))),
                      "too large"),
        "much too much data": (png(np.zeros((200, 60000)), 8, 0, size=(8, 8)), [BLACK] * 4),
        "bad palette": (png(bits, 8, 3), EITHER),
        "bad bits": (png(bits, 8, 0).replace(b"\x08\x00\x00\x00\x00", b"\x07\x00\x00\x00\x00", 1),
                     BROKEN),
        "wrong checksum": (png(rgb, 8, 2)[:-16] + b"abcd" + png(rgb, 8, 2)[-12:], four),
        "wrong data": (png(rgb, 8, 2)[:-26] + b"abcd" + png(rgb, 8, 2)[-22:], BROKEN),
        "animated": (saved(square, "PNG", save_all=True,
                           append_images=[Image.new("RGB", (16, 16))]), four),
    }  # fmt: skip
    for size in (1, 2, 4):
        files[f"grey, {size} bits"] = (png(bits * (2**size - 1), size, 0), black_white)
        palette = chunk(b"PLTE", bytes([0, 0, 0, 255, 0, 0]))
        files[f"palette, {size} bits"] = (png(bits, size, 3, palette), [RED, BLACK, BLACK, RED])
        some = chunk(b"tRNS", b"\0")
        files[f"palette, {size} bits, tRNS"] = (png(bits, size, 3, palette, some),
                                               [RED, WHITE, WHITE, RED])
    files["interlaced"] = (png(rgb, 8, 2, adam7=True), four)
    files["interlaced, 16 bits"] = (png(rgb.astype(int) * 257, 16, 2, adam7=True), four)
    files["interlaced, rgba"] = (png(alpha, 8, 6, adam7=True), [RED, WHITE, WHITE, RED])
    files["interlaced, 1 bit"] = (png(bits, 1, 0, adam7=True), black_white)
    return {f"PNG {name}": row for name, row in files.items()}


def others() -> dict:
    """WebP, AVIF, GIF, BMP."""
    four, rgb = QUADRANTS, np.asarray(quadrants())
    clear = Image.fromarray(np.dstack([np.full_like(rgb, (255, 0, 0)), rgb[..., 0]]))
    more = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "black")]}
    half = [RED, WHITE, WHITE, RED]
    index = np.kron([[0, 1], [2, 3]], np.ones((24, 32))).astype(np.uint8)[::-1]  # BMPs begin below
    gif = saved(quadrants(), "GIF")
    webp = saved(clear, "WEBP", lossless=True, icc_profile=b"x")  # for a header of its own
    canvas = webp.index(b"VP8X") + 12
    avif = saved(quadrants(), "AVIF", quality=95)
    ispe = avif.index(b"ispe") + 8
    return {
        "WebP lossy": (saved(quadrants(), "WEBP", quality=95), four),
        "WebP lossless": (saved(quadrants(), "WEBP", lossless=True), four),
        "WebP alpha": (saved(clear, "WEBP", lossless=True), half),
        "WebP lossy alpha": (saved(clear, "WEBP", quality=95), half),
        "WebP grey": (saved(quadrants().convert("L"), "WEBP", lossless=True), GREYS),
        "WebP animated": (saved(quadrants(), "WEBP", quality=95, **more), four),
        "WebP 1x5000": (saved(Image.new("RGB", (1, 5000), "red"), "WEBP"), [RED] * 4),
        "WebP bomb": (webp[:canvas] + b"\xff" * 6 + webp[canvas + 6 :], BROKEN),
        "AVIF": (avif, four), "AVIF alpha": (saved(clear, "AVIF", quality=95), half),
        "AVIF grey": (saved(quadrants().convert("L"), "AVIF", quality=95), GREYS),
        "AVIF animated": (saved(quadrants(), "AVIF", quality=95, **more), four),
        "AVIF 4:4:4": (saved(quadrants(), "AVIF", quality=95, subsampling="4:4:4"), four),
        "AVIF bomb": (avif[:ispe] + b"\0\0\xff\xff" * 2 + avif[ispe + 8 :], BROKEN),
        "AVIF header": (b"\0\0\0\x1cftypavif" + bytes(100), BROKEN),
        "GIF": (gif, four), "GIF animated": (saved(quadrants(), "GIF", **more), four),
        "GIF transparent": (saved(clear, "GIF"), half),
        "GIF not interlaced": (saved(quadrants(), "GIF", interlace=0), four),
        "GIF 87a": (gif.replace(b"GIF89a", b"GIF87a"), four),
        "GIF screen bomb": (gif[:6] + b"\xff" * 4 + gif[10:], "pixels"),
        "GIF no screen": (gif[:6] + bytes(4) + gif[10:], four),
        "GIF no frame": (gif[:13] + b";", BROKEN),
        "BMP 24": (saved(quadrants(), "BMP"), four),
        "BMP 32": (saved(clear, "BMP"), [RED] * 4),
        "BMP 8": (saved(quadrants().quantize(4), "BMP"), four),
        "BMP grey": (saved(quadrants().convert("L"), "BMP"), GREYS),
        "BMP 1": (saved(quadrants().convert("1", dither=0), "BMP"), [BLACK, WHITE, BLACK, WHITE]),
        "BMP 4": (bmp(64, 48, 4, four, np.packbits(np.unpackbits(
            index[..., None], axis=2)[..., 4:].reshape(-1)).tobytes()), four),
        "BMP upside down": (bmp(64, -48, 8, four, index[::-1].tobytes()), four),
        "BMP run lengths": (bmp(64, 48, 8, four, b"".join(
            bytes([32, row[0], 32, row[63], 0, 0]) for row in index) + b"\0\1", 1), four),
        "BMP no width": (bmp(0, 48, 24, [], bytes(100)), BROKEN),
        "BMP negative": (bmp(-64, 48, 24, [], bytes(64 * 48 * 3)), BROKEN),
        "BMP bomb": (bmp(60000, 60000, 24, [], bytes(100)), "pixels"),
        "BMP lowest": (bmp(64, -(2**31), 24, [], bytes(100)), BROKEN),
        "BMP large": (bmp(9500, 9400, 24, [], bytes(100)), BROKEN),
        "BMP 3 bits": (bmp(64, 48, 3, four, bytes(9999)), BROKEN),
    }  # fmt: skip


def tiffs() -> dict:
    four, rgb = QUADRANTS, np.asarray(quadrants())
    flat, size = rgb.tobytes(), rgb.nbytes
    tiles = b"".join(rgb[y : y + 16, x : x + 16].tobytes()
                     for y in range(0, 48, 16) for x in range(0, 64, 16))
    grey16 = np.kron([[65535, 0], [32896, 257]], np.ones((24, 32), int)).astype("<u2")
    floats = Image.fromarray(np.zeros((48, 64), np.float32))
    plain, alpha = strip(64, 48, [8] * 3, 2, size), np.dstack([rgb, rgb[..., 0]])
    two = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "black")]}
    black_white = quadrants().convert("1", dither=0)
    files = {
        "plain": (tiff(plain, flat), four), "big-endian": (tiff(plain, flat, ">"), four),
        "pages": (saved(quadrants(), "TIFF", **two), four),
        "big": (saved(quadrants(), "TIFF", big_tiff=True), four),
        "cmyk": (saved(quadrants().convert("CMYK"), "TIFF"), four),
        "ycbcr": (saved(quadrants().convert("YCbCr"), "TIFF"), four),
        "lab": (saved(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"), [WHITE] * 4),
        "palette": (saved(quadrants().quantize(4), "TIFF"), four),
        "grey": (saved(quadrants().convert("L"), "TIFF"), GREYS),
        "grey and alpha": (saved(Image.new("LA", (8, 8), (0, 0)), "TIFF"), [WHITE] * 4),
        "rgba": (tiff(strip(64, 48, [8] * 4, 2, alpha.nbytes, t338=("H", [2])), alpha.tobytes()),
                 [RED, WHITE, WHITE, WHITE]),
        "1 bit": (saved(black_white, "TIFF"), [BLACK, WHITE, BLACK, WHITE]),
        "grey, 16 bits": (tiff(strip(64, 48, [16], 1, grey16.nbytes), grey16.tobytes()),
                          [WHITE, BLACK, (128,) * 3, (1,) * 3]),
        "grey, 16 bits, big-endian": (
            tiff(strip(64, 48, [16], 1, grey16.nbytes), grey16.astype(">u2").tobytes(), ">"),
            [WHITE, BLACK, (128,) * 3, (1,) * 3]),
        "grey, white is 0": (
            tiff(strip(64, 48, [8], 0, 64 * 48), (grey16 >> 8).astype(np.uint8).tobytes()),
            [BLACK, WHITE, (127,) * 3, (254,) * 3]),
        "rgb, 16 bits": (tiff(strip(64, 48, [16] * 3, 2, 2 * size),
                              (rgb.astype("<u2") * 257).tobytes()), four),
        "float": (saved(floats, "TIFF"), "32 bits"),
        "float, deflate": (saved(floats, "TIFF", compression="tiff_deflate"), "32 bits"),
        "32 bits": (saved(floats.convert("I"), "TIFF"), "32 bits"),
        "64 bits": (tiff(strip(64, 48, [64], 1, 8 * 64 * 48, t339=("H", [3])), bytes(8 * 64 * 48)),
                    BROKEN),
        "tiles": (tiff({k: v for k, v in plain.items() if k not in (273, 278, 279)} | {
            322: ("H", [16]), 323: ("H", [16]), 324: ("L", [8 + 768 * n for n in range(12)]),
            325: ("L", [768] * 12)}, tiles), four),
        "tiles of no size": (tiff({k: v for k, v in plain.items() if k not in (273, 278, 279)} | {
            322: ("H", [0]), 323: ("H", [0]), 324: ("L", [8]), 325: ("L", [768])}, tiles),
            BROKEN),
        "bomb": (tiff(strip(60000, 60000, [8] * 3, 2, size), flat), "pixels"),
        "no width": (tiff(strip(0, 48, [8] * 3, 2, size), flat), BROKEN),
        "larger": (tiff(strip(64, 4800, [8] * 3, 2, size), flat), BROKEN),
        "strip outside": (tiff(plain | {273: ("L", [2**31])}, flat), BROKEN),
        "orientation of type double": (
            tiff(plain | {274: ("d", [6.0])}, flat), [four[2], four[0], four[3], four[1]]),
        "no compression known": (tiff(plain | {259: ("H", [9999])}, flat), BROKEN),
        "300 samples": (tiff(plain | {277: ("H", [300])}, flat), BROKEN),
        "bits of 0": (tiff(plain | {258: ("H", [0, 0, 0])}, flat), BROKEN),
        "deflate of nothing": (tiff(plain | {259: ("H", [8])}, flat), BROKEN),
        "lzw of nothing": (tiff(plain | {259: ("H", [5])}, flat), BROKEN),
        "jpeg of nothing": (tiff(plain | {259: ("H", [7])}, flat), BROKEN),
        "old jpeg": (tiff(plain | {259: ("H", [6])}, flat), BROKEN),
        "fax of colours": (tiff(plain | {259: ("H", [4])}, flat), BROKEN),
        "directory of itself": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", BROKEN),
        "header": (b"II*\0\x08\0\0\0", BROKEN),
        "far directory": (b"II*\0\xff\xff\xff\x7f", BROKEN),
    }  # fmt: skip
    for method in ("tiff_lzw", "packbits", "tiff_deflate", "tiff_adobe_deflate", "lzma", "zstd",
                   "jpeg"):  # fmt: skip
        files[method] = (saved(quadrants(), "TIFF", compression=method), four)
    for method in ("group3", "group4", "tiff_ccitt"):
        files[method] = (saved(black_white, "TIFF", compression=method),
                         [BLACK, WHITE, BLACK, WHITE])
    files["grey, 16 bits, lzw"] = (
        saved(Image.fromarray(grey16), "TIFF", compression="tiff_lzw"),
        [WHITE, BLACK, (128,) * 3, (1,) * 3])
    return {f"TIFF {name}": row for name, row in files.items()}


def seeds() -> dict[str, list[bytes]]:
    """Whole small files in several modes, for each format."""
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8))
    four = quadrants(48, 32)
    clear = four.convert("RGBA")
    clear.putalpha(128)
    return {
        "JPEG": [saved(noise, "JPEG"), saved(four, "JPEG", progressive=True), turned("JPEG", 6),
                 saved(four.convert("CMYK"), "JPEG"), saved(four.convert("L"), "JPEG"),
                 saved(four, "MPO", save_all=True, append_images=[noise])],
        "PNG": [saved(noise, "PNG"), saved(clear, "PNG"), saved(four.quantize(4), "PNG"),
                png(np.asarray(noise), 8, 2, adam7=True), turned("PNG", 8),
                saved(Image.fromarray(np.asarray(noise)[..., 0].astype(np.uint16) << 8), "PNG"),
                saved(four, "PNG", save_all=True, append_images=[clear.convert("RGB")])],
        "WebP": [saved(noise, "WEBP"), saved(four, "WEBP", lossless=True), saved(clear, "WEBP"),
                 turned("WEBP", 3), saved(four, "WEBP", save_all=True, append_images=[clear])],
        "GIF": [saved(noise, "GIF"), saved(clear, "GIF"),
                saved(four, "GIF", save_all=True, append_images=[clear])],
        "TIFF": [saved(noise, "TIFF"), saved(clear, "TIFF", compression="tiff_lzw"),
                 saved(noise, "TIFF", compression="tiff_deflate"), turned("TIFF", 5),
                 saved(noise, "TIFF", compression="jpeg"), saved(four, "TIFF", compression="zstd"),
                 saved(four.convert("1"), "TIFF", compression="group4"),
                 saved(four.convert("CMYK"), "TIFF", compression="packbits"),
                 saved(four, "TIFF", compression="lzma"),
                 saved(four, "TIFF", save_all=True, append_images=[noise])],
        "BMP": [saved(noise, "BMP"), saved(clear, "BMP"), saved(four.quantize(4), "BMP"),
                saved(four.convert("1"), "BMP")],
        "AVIF": [saved(noise, "AVIF", speed=10), saved(clear, "AVIF", speed=10),
                 turned("AVIF", 6)],
    }  # fmt: skip


def foreign() -> dict:
    """What is no picture of the seven formats, by content: name with ending -> content, reason."""
    whole = {"JPEG": saved(quadrants(), "JPEG"), "PNG": saved(quadrants(), "PNG")}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("1.png", whole["PNG"])
    files = {
        "x.svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        "x.html": b"<!DOCTYPE html><title>404 Not Found</title>" * 50,
        "zip.jpg": archive.getvalue(),
        "x.psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 48, 64, 8, 3) + bytes(9999),
        "x.eps": saved(quadrants(), "EPS"), "eps.jpg": saved(quadrants(), "EPS"),
        "x.ps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n(/tmp/x) (w) file\n",
        "x.pdf": saved(quadrants(), "PDF"), "x.ico": saved(quadrants(32, 32), "ICO"),
        "x.ppm": saved(quadrants(), "PPM"), "x.tga": saved(quadrants(), "TGA"),
        "x.pcx": saved(quadrants(), "PCX"), "x.jp2": saved(quadrants(), "JPEG2000"),
        "x.sgi": saved(quadrants(), "SGI"),
        "x.dds": saved(quadrants(), "DDS"), "x.icns": saved(quadrants(32, 32), "ICNS"),
        "x.txt": b"no picture", "text.png": b"no picture", "pointer.jpg":
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        "zeros.jpg": bytes(9999), "x.mp4": b"\0\0\0\x18ftypisom" + bytes(100),
        "x.wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(99), "x.exe": b"MZ" + bytes(999),
        "x.pickle": b"\x80\4cos\nsystem\n(S'touch x'\ntR.", "gzip.png": b"\x1f\x8b" + bytes(99),
    }
    files = {name: (raw, "is none of JPEG") for name, raw in files.items()}
    files |= {f"{brand}.jpg": (HEIC.replace(b"heic", brand.encode()), "HEIC; save it as JPEG")
              for brand in ("heic", "heix", "hevc", "mif1")}
    files |= {f"empty{ending}": (b"", "is empty") for ending in (".jpg", ".png", ".webp", ".gif",
                                                                   ".bmp", ".tif", ".avif", "")}
    files |= {name: (whole[kind], QUADRANTS) for kind, name in [
        ("PNG", "a png.jpg"), ("PNG", "a png.txt"), ("PNG", "no ending"), ("JPEG", "a jpeg.png"),
        ("JPEG", "a jpeg.eps"), ("JPEG", "a jpeg.tar.gz"), ("JPEG", "a jpeg.")]}
    return files


def truncations() -> dict:
    """Whole files of one frame, cut at 15 places and by their last byte."""
    files = {}
    for kind in finetune.PICTURE_FORMATS:
        whole = saved(quadrants(), kind)
        lengths = [len(whole) * part // 16 for part in range(1, 16)]
        files |= {f"{kind} cut {length}": (whole[:length], BROKEN if length <= len(whole) // 2
                                           else EITHER) for length in {*lengths, len(whole) - 1}}
    progressive = saved(quadrants(640, 480), "JPEG", progressive=True)
    deflate = saved(quadrants(), "TIFF", compression="tiff_deflate")
    for name, whole in {"progressive": progressive, "deflate": deflate}.items():
        files |= {f"{name} cut {length}": (whole[:length], BROKEN)
                  for length in range(1, len(whole) // 2, len(whole) // 20)}
    return files


def write_special(folder: Path, outside: Path) -> dict[str, str | list | None]:
    """What is no plain file: name -> colours, or why it is not used."""
    whole = saved(quadrants(), "PNG")
    outside.mkdir()
    (outside / "linked.png").write_bytes(whole)
    (folder / "a folder.png/deeper.jpg").mkdir(parents=True)
    (folder / "a folder.png/deeper.jpg/x").write_bytes(whole)
    (folder / "empty folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        where = os.getcwd()  # a socket's path can't be long
        os.chdir(folder)
        server.bind("socket.png")
        os.chdir(where)
    links = {"link.png": (outside / "linked.png", QUADRANTS),
             "dangling.png": ("no", "No such file"),
             "itself.png": ("itself.png", "symbolic links"),
             "to device": ("/dev/zero", "not a file"),
             "a.png": ("b.png", "symbolic links"), "b.png": ("a.png", "symbolic links"),
             "linked folder.png": (outside, "is a link"), "circle": (folder, "is a link"),
             "above": ("../..", "is a link"), "root": ("/", "is a link")}  # fmt: skip
    for name, (target, _) in links.items():
        (folder / name).symlink_to(target)
    expected = {name: why for name, (_, why) in links.items()}
    if os.geteuid():  # root may read all
        (folder / "secret.png").write_bytes(whole)
        (folder / "secret.png").chmod(0)
        expected["secret.png"] = "Permission denied"
    return expected | {"a folder.png/deeper.jpg/x": QUADRANTS, "pipe.png": "not a file",
                       "socket.png": "not a file"}


def write_captions(train_dir: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Captions that can be used, with what they mean; and those that can't, with why."""
    limit = finetune.CAPTION_BYTES
    good = {
        "plain": (b"a cat", "a cat"), "newline": (b"\r\n a\n\ncat \r\n", "a cat"),
        "tabs": (b"\ta\t\tcat\x0b\x0c", "a cat"), "bom": (b"\xef\xbb\xbfa cat", "a cat"),
        "only latin": ("a café".encode("cp1252"), "a café"), "utf-8": ("a café".encode(), "a café"),
        "utf-16 little": (b"\xff\xfe" + "a café".encode("utf-16-le"), "a café"),
        "utf-16 big": (b"\xfe\xff" + "a café".encode("utf-16-be"), "a café"),
        "rtl": ("חתול a قطة".encode(), "חתול a قطة"), "emoji": ("👩‍👩‍👧 🇪🇺".encode(), "👩‍👩‍👧 🇪🇺"),
        "combining": (b"e" + b"\xcc\x81" * 1000, "e" + "\u0301" * 1000),
        "special tokens": (b"</s> <image> <pad>", "</s> <image> <pad>"),
        "escape": (b"a \x1b[31mred\x1b]0;x\x07 cat\x7f", r"a \x1b[31mred\x1b]0;x\x07 cat\x7f"),
        "override": ("a \u202etac\u2066".encode(), r"a \u202etac\u2066"),
        "separators": ("a\u2028b\u2029c\x85d\xa0e\u3000f\x1cg".encode(), "a b c d e f g"),
        "c1": (b"a \x81\xfe cat", "a \ufffdþ cat"), "dash": (b"--restart", "--restart"),
        "format": (b"%s {0} \\n $(x) 'q' \"", "%s {0} \\n $(x) 'q' \""),
        "forged": (b"a cat\npair\tx.png\ta dog", "a cat pair x.png a dog"),
        "private": ("\ue000\U0010ffff\ufdd0".encode(), "\ue000\U0010ffff\ufdd0"),
        "overlong": (b"\xc0\xaf", "À¯"),
        "surrogate": (b"\xed\xa0\x80", "í €"),
        "words": (b"cat " * (limit // 4), " ".join(["cat"] * (limit // 4))),
        "one word": (b"x" * limit, "x" * limit),
    }  # fmt: skip
    bad = {
        "empty": (b"", "empty"), "white": (b" \t\r\n\xe3\x80\x80", "empty"),
        "only bom": (b"\xef\xbb\xbf", "empty"), "only utf-16 bom": (b"\xff\xfe", "empty"),
        "half utf-16": (b"\xff\xfea", "utf-16"), "bad utf-16": (b"\xff\xfe\0\xd8a\0", "utf-16"),
        "zeros": (bytes(1000), "zero bytes"),
        "utf-16, no bom": ("a cat".encode("utf-16-le"), "zero"),
        "binary": (saved(quadrants(), "JPEG"), "zero bytes"),
        "too large": (b"x" * (limit + 1), "larger"),
    }  # fmt: skip
    for name, (raw, _) in (good | bad).items():
        add(train_dir, name, raw, f"{name}.png")
    folder = train_dir / "caption"
    for name in ("folder", "pipe", "link", "dangling", "circle", "device"):
        add(train_dir, name, None, f"{name}.png")
    (folder / "folder.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    for name, target in {"link": "plain", "dangling": "no", "circle": "circle"}.items():
        (folder / f"{name}.txt").symlink_to(f"{target}.txt")
    (folder / "device.txt").symlink_to("/dev/zero")
    reasons = {name: why for name, (_, why) in bad.items()}
    reasons |= {"folder": "there is no", "pipe": "not a file", "dangling": "No such file",
                "circle": "symbolic links", "device": "not a file"}
    return {name: text for name, (_, text) in good.items()} | {"link": "a cat"}, reasons


def differences(path: str, expected: list | str | None, pairs: set, named: dict) -> str:
    """How a picture's lines, or its content, are not as expected ("": all is right)."""
    if ((path, "odd") in pairs) == (path in named):
        return "is not listed once"
    if isinstance(expected, str):
        return "" if re.search(expected, named.get(path, "")) else f"{named.get(path)}: {expected}"
    if path in named:
        return "" if expected is EITHER else f"is refused: {named[path]}"
    read = finetune.read_picture(path, 32)
    places = [(x, y) for y in (read.height // 4, 3 * read.height // 4)
              for x in (read.width // 4, 3 * read.width // 4)]
    got = [read.getpixel(place) for place in places]
    off = expected and np.abs(np.subtract(got, expected)).max() > 25  # of lossy formats
    return f"has {got}, not {expected}" if off or read.mode != "RGB" else ""


@pytest.fixture
def train_dir(tmp_path) -> Path:
    """A TRAIN_DIR with no pair yet."""
    for name in ("caption", "Image"):
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program that Pillow starts for PostScript: it leaves a mark."""
    mark = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return mark


def test_a_corpus_of_odd_pictures(command, train_dir, tmp_path, ghostscript, recwarn, caplog):
    (train_dir / "caption/odd.txt").write_text("odd")
    folder = train_dir / "Image/odd"
    folder.mkdir()
    corpus = jpegs() | pngs() | others() | tiffs() | truncations() | foreign()
    corpus |= {f"{kind} orientation {number}": (turned(kind, number), QUADRANTS)
               for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") for number in range(1, 9)}
    for name, (raw, _) in corpus.items():
        (folder / name).write_bytes(raw)
    expected = {name: result for name, (_, result) in corpus.items()}
    expected |= write_special(folder, tmp_path / "outside")
    with written_to_stderr(tmp_path / "noise"):
        code, out, err = command("--check", TRAIN_DIR=train_dir)
    assert (code, err, (tmp_path / "noise").read_text()) == (0, "", "")
    assert not recwarn.list, [str(warning.message) for warning in recwarn]
    assert not caplog.records and not ghostscript.exists()
    pairs, named = listed(out, "pair"), dict(listed(out, "not used"))
    wrong = {name: text for name, result in expected.items()
             if (text := differences(str(folder / name), result, pairs, named))}
    assert not wrong, "\n".join(f"{name} {text}" for name, text in wrong.items())
    paths = {str(folder / name) for name in expected}
    assert {path for path, _ in pairs} | named.keys() == paths and len(paths) >= 300
    with pytest.raises(OSError), Image.open(folder / "x.eps") as picture:
        picture.load()
    assert ghostscript.exists()  # so the trap works


def test_odd_captions(command, train_dir, tmp_path):
    good, bad = write_captions(train_dir)
    assert len(good) + len(bad) >= 30
    add(train_dir, "100 MB", None, "100 MB.png")
    large = train_dir / "caption/100 MB.txt"
    with open(large, "wb") as file:
        file.writelines(b"a cat and " * 10**5 for _ in range(100))
    bad["100 MB"] = "larger"
    before = resource.getrusage(resource.RUSAGE_SELF)
    code, out, err = command("--check", TRAIN_DIR=train_dir)
    after = resource.getrusage(resource.RUSAGE_SELF)
    large.unlink()
    assert (code, err) == (0, "")
    captions = {Path(path).stem: text for path, text in listed(out, "pair")}
    assert {name for name in good if captions.get(name) != good[name]} == set()
    assert captions.keys() == good.keys()
    named = dict(listed(out, "not used"))
    for name, why in bad.items():
        assert why in named.pop(f"{train_dir}/Image/{name}.png"), name
        if name != "folder":  # nothing is in it
            assert why in named.pop(f"{train_dir}/caption/{name}.txt"), name
    assert not named
    remarked = set(re.findall(r"^.*/caption/(.*)\.txt: read as Windows-1252", out, re.M))
    assert remarked == {"only latin", "c1", "overlong", "surrogate"}
    assert after.ru_utime - before.ru_utime < 20 and after.ru_maxrss - before.ru_maxrss < 300_000


def test_training_on_odd_captions(command, train_dir, opt_base):
    good, bad = write_captions(train_dir)
    code, out, err = command(TRAIN_DIR=train_dir, MODEL_ID=opt_base, EPOCHS=1, SAMPLE_COUNT=99,
                             VALIDATION_FRACTION=0.5)
    assert (code, err) == (0, "") and "cut: " in out
    parts = re.search(r"^pairs: (\d+) to train on, (\d+) held out", out, re.M).groups()
    assert sum(map(int, parts)) == len(good)
    assert not re.search(CONTROL, out)


# ---- Names --------------------------------------------------------------------------------------


CONTROL = r"[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"  # but the newline
NAMES = {  # name -> how it is printed
    "new\nline": r"new\nline", "x\npair\tforged.png\ta cat": r"x\npair\tforged.png\ta cat",
    "return\r": r"return\r", "tab\t": r"tab\t",
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",
    "\x7f\x9b31m": r"\x7f\x9b31m", "next\x85line": r"next\x85line", "\u2028\u2029": r"\u2028\u2029",
    "\u202egnp.exe": r"\u202egnp.exe", os.fsdecode(b"caf\xe9 \xff"): r"caf\udce9 \udcff",
} | {name: name for name in (
    "quote's", 'double "quotes"', "a,comma", "semi;colon", "=1+1", "-dash", "--restart", " space ",
    "%s {0}", "$(touch x)", "*?[a]", "back\\nslash", "日本語", "חתול", "قطة", "👩\u200d👩\u200d👧",
    "CON",
    "a" * 251, "é" * 125, unicodedata.normalize("NFD", "Ångström"), "ß", "ſ", "ﬁ", "a..b", "~", "#",
)}  # fmt: skip


@pytest.fixture
def named_data(train_dir) -> dict[str, str]:
    """Two pairs, a broken picture and a lonely caption for each name: path -> how it is printed."""
    printed = {}
    for name, shown in NAMES.items():
        add(train_dir, name, b"a \x1b[1mcaf\xe9", f"{name}/1.png", f"{name}/{name}")
        (train_dir / "Image" / name / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        for path in ("1.png", "{}", "cut.png"):
            printed[f"{train_dir}/Image/{name}/{path.format(name)}"] = (
                f"{train_dir}/Image/{shown}/{path.format(shown)}")
        if len(os.fsencode(name)) < 200:
            add(train_dir, f"{name} alone")
            lonely = f"{train_dir}/caption/{{}} alone.txt"
            printed[lonely.format(name)] = lonely.format(shown)
    return printed


def test_check_prints_one_line_for_each_name(command, train_dir, named_data):
    code, out, err = command("--check", TRAIN_DIR=train_dir)
    assert (code, err) == (0, "")
    assert not re.search(CONTROL, out.replace("\t", ""))
    *lines, _ = out.split("\n")
    remarks, lines, summary = lines[: len(NAMES)], lines[len(NAMES) : -1], lines[-1]
    assert {line.partition(".txt: read as Windows-1252")[0] for line in remarks} == {
        f"{train_dir}/caption/{shown}" for shown in NAMES.values()}
    assert all(line.count("\t") == 2 for line in lines) and len(lines) == len(named_data)
    assert re.fullmatch(r"\d+ pairs; \d+ files not used", summary)
    broken = {path for path in named_data if path.endswith(("/cut.png", " alone.txt"))}
    used = named_data.keys() - broken
    assert listed(out, "pair") == {
        (named_data[path], r"a \x1b[1mcafé") for path in used}
    assert {path for path, _ in listed(out, "not used")} == {named_data[path] for path in broken}


def test_training_and_captioning_with_odd_names(
    command, train_dir, named_data, opt_base, tmp_path
):  # fmt: skip
    code, out, err = command(TRAIN_DIR=train_dir, MODEL_ID=opt_base, EPOCHS=1, SAMPLE_COUNT=99)
    assert (code, err) == (0, "") and not re.search(CONTROL, out)
    with open(tmp_path / "out/skipped.csv", newline="", encoding="utf-8",
              errors="surrogateescape") as file:
        rows = list(csv.reader(file))[1:]
    broken = {path for path in named_data if path.endswith(("/cut.png", " alone.txt"))}
    assert {path for _, path, _ in rows} == broken and {len(row) for row in rows} == {3}

    pictures = {named_data[path] for path in named_data if "/Image/" in path} - {
        named_data[path] for path in broken}
    code, out, err = command("--caption", str(train_dir / "Image"))
    assert code == 1
    printed = [line.split("\t") for line in out.split("\n")[:-1]]
    assert {path for path, _ in printed} == pictures and len(printed) == len(pictures)
    refused = [line for line in err.split("\n") if line.startswith("not captioned: ")]
    assert len(refused) == len(NAMES) and not re.search(CONTROL, err)


# ---- Mutations ----------------------------------------------------------------------------------


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, numbers of 2 or 4 bytes, pieces cut, moved, doubled."""
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        head = rng.random() < 0.6  # where sizes and offsets are
        place = rng.randrange(min(len(changed), 100) if head else len(changed))
        length = rng.choice([1, 2, 4, 8, 16, 64, 256])
        piece = changed[place : place + length]
        kind = rng.randrange(8)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif kind == 2:
            width = rng.choice([2, 4])
            value = rng.choice([0, 1, 2, 255, 256, 5000, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1])
            number = (value % 256**width).to_bytes(width, rng.choice(["little", "big"]))
            changed[place : place + width] = number
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = rng.randbytes(length)
        elif kind == 5:
            changed[place:place] = piece * rng.choice([1, 2, 50])
        elif kind == 6:
            del changed[place : place + length]
            where = rng.randrange(len(changed) + 1)
            changed[where:where] = piece
        else:
            del changed[len(changed) - rng.randrange(min(len(changed), 64)) :]
        if not changed:
            break
    if raw.startswith(b"\x89PNG") and rng.random() < 0.8:  # else most would fail by a checksum
        place = 8
        while place + 12 <= len(changed):
            (length,) = struct.unpack_from(">I", changed, place)
            if (end := place + 8 + length) + 4 > len(changed):
                break
            struct.pack_into(">I", changed, end, zlib.crc32(changed[place + 4 : end]))
            place = end + 4
    return bytes(changed)


def read_in_child(path: Path, files: list[bytes], log: Path) -> int:
    """Reads the files in a forked process with little memory, and logs a line for each.

    Gives the process's status. What it read last is at `path`.
    """
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    try:  # the child never returns
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends C code too
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(log, "w", buffering=1) as results:
            for raw in files:
                path.write_bytes(raw)
                signal.alarm(MAX_SECONDS)
                try:
                    picture = finetune.read_picture(str(path), 32)
                    right = type(picture) is Image.Image and picture.mode == "RGB"
                    pixels = np.asarray(picture).size // 3
                    right = right and 0 < pixels <= 2 * Image.MAX_IMAGE_PIXELS
                    results.write("opened\n" if right else f"wrong: {picture}\n")
                except finetune.PictureError as error:
                    results.write("refused\n" if str(error) else "wrong: no reason\n")
                except BaseException as error:
                    kept = path.with_name(f"wrong {sum(raw)}")
                    kept.write_bytes(raw)
                    results.write(f"wrong: {error!r} for {kept}\n")
                signal.alarm(0)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("kind, raws", seeds().items(), ids=seeds().keys())
def test_mutated_files(tmp_path, kind, raws):
    rng = random.Random(kind)
    files = [mutate(rng.choice(raws), rng) for _ in range(MUTATED)]
    with written_to_stderr(tmp_path / "noise"):
        status = read_in_child(tmp_path / "last", files, tmp_path / "log")
    results = Counter((tmp_path / "log").read_text().splitlines())
    print(kind, *(f"{count} {what}" for what, count in results.items()))
    assert status == 0, f"ended with {status} after {results.total()}: see {tmp_path / 'last'}"
    assert results.keys() == {"opened", "refused"} and min(results.values()) >= MUTATED // 50
    assert results.total() == MUTATED and (tmp_path / "noise").read_text(errors="replace") == ""
