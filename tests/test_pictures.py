"""Pictures are read as a viewer shows them, and what can't be read is named with the reason.

Files that were made to do harm are in test_hostile.py.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers import (
    BLACK,
    LFS_POINTER,
    PICTURE_FORMATS,
    QUADRANTS,
    WHITE,
    Case,
    assert_reasons,
    draw_quadrants,
    encode_picture,
    for_each_case,
    make_good_pictures,
    read_listing,
    read_quadrants,
    write_file,
    write_files,
    write_picture,
)
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin

import finetune

# ---- Formats ------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path) -> Path:
    """The folder for the pictures of the caption "odd"."""
    write_file(tmp_path / "data/caption/odd.txt", b"odd")
    folder = tmp_path / "data/Image/odd"
    folder.mkdir(parents=True)
    return folder


def test_pictures_of_all_kinds_are_used(command, odd, recwarn):
    names = []
    for picture in make_good_pictures():
        write_file(odd / picture.name, picture.content)
        names.append(picture.name)

    code, out, err = command("--check", TRAIN_DIR=odd.parent.parent)

    assert (code, err) == (0, "")
    pairs, skipped = read_listing(out, odd)
    assert skipped == {}
    assert [name for name, _ in pairs] == sorted(names)
    assert recwarn.list == []


@pytest.mark.parametrize("picture", make_good_pictures(), ids=lambda picture: picture.name)
def test_a_picture_is_read_in_its_colors(tmp_path, picture):
    path = tmp_path / Path(picture.name).name
    path.write_bytes(picture.content)
    difference = np.abs(read_quadrants(path) - picture.colors)
    assert difference.max() <= picture.tolerance


def test_a_link_to_a_picture_is_read(check, odd, tmp_path):
    write_picture(tmp_path / "outside")
    (odd / "link.png").symlink_to(tmp_path / "outside")
    assert check(odd.parent.parent).pairs == [("Image/odd/link.png", "odd")]


def test_what_is_no_file_is_named_and_blocks_nothing(check, odd):
    write_picture(odd / "good.png")
    os.mkfifo(odd / "pipe.png")
    (odd / "dangling.png").symlink_to("no")
    (odd / "itself.png").symlink_to("itself.png")
    (odd / "device.png").symlink_to("/dev/zero")

    result = check(odd.parent.parent)

    assert result.pairs == [("Image/odd/good.png", "odd")]
    assert_reasons(
        result.skipped,
        {
            "Image/odd/pipe.png": "not a file",
            "Image/odd/dangling.png": "No such file",
            "Image/odd/itself.png": "links",
            "Image/odd/device.png": "not a file",
        },
    )


def picture_is_not_used(name: str, content: bytes | str, *words: str, file="bad.jpg") -> Case:
    """A file that is not read, with words of the reason, next to one that is."""
    return Case(
        name,
        {"good.png": None, "good.txt": "a cat", file: content, f"{Path(file).stem}.txt": "a dog"},
        pairs=[("good.png", "a cat")],
        reasons={file: words},
    )


def encode_zeros(mode: str, dtype: type) -> bytes:
    return encode_picture(Image.fromarray(np.zeros((48, 64), dtype), mode), "TIFF")


def encode_signed() -> bytes:
    """A TIFF whose pixels are numbers of 16 bits with a sign."""
    picture = Image.fromarray(np.zeros((48, 64), np.uint16))
    with io.BytesIO() as file:
        picture.save(file, "TIFF", tiffinfo={339: 2})  # SampleFormat
        return file.getvalue()


NO_KNOWN_FORMAT = f"is not a {', '.join(PICTURE_FORMATS)}; if it is a picture, save it as JPEG"
DAMAGED = "is damaged after its first bytes"

UNREADABLE = [
    picture_is_not_used("EPS", encode_picture(draw_quadrants(), "EPS"), "is PostScript"),
    picture_is_not_used("PPM", encode_picture(draw_quadrants(), "PPM"), "is a PPM"),
    picture_is_not_used("TGA", encode_picture(draw_quadrants(), "TGA"), NO_KNOWN_FORMAT),
    picture_is_not_used("PDF", encode_picture(draw_quadrants(), "PDF"), "is a PDF"),
    picture_is_not_used("HEIC", b"\0\0\0\x18ftypheic" + bytes(100), "is HEIC"),
    picture_is_not_used("a video", b"\0\0\0\x18ftypisom" + bytes(100), "is a video"),
    picture_is_not_used("sound", b"RIFF\x24\0\0\0WAVEfmt " + bytes(100), "is a video or sound"),
    picture_is_not_used("text", b"no picture", "is text, not a picture"),
    picture_is_not_used("JSON", b'{"error": "not found"}', "is text, not a picture"),
    picture_is_not_used("a ZIP file", b"PK\x03\x04" + bytes(100), "unpack it"),
    *(
        picture_is_not_used(
            f"the start of a {kind}", encode_picture(draw_quadrants(), kind)[:length], DAMAGED
        )
        for kind, length in (("JPEG", 20), ("PNG", 8), ("TIFF", 40), ("AVIF", 40))
    ),
    picture_is_not_used("zeros", bytes(9999), NO_KNOWN_FORMAT),
    picture_is_not_used(
        "32 bits", encode_zeros("F", np.float32), "its pixels are 32-bit or negative numbers"
    ),
    picture_is_not_used(
        "16 bits with sign", encode_signed(), "its pixels are 32-bit or negative numbers"
    ),
]


@for_each_case(UNREADABLE)
def test_a_picture_that_can_not_be_read_is_named(check_case, case):
    check_case(case)


@pytest.mark.parametrize("dtype, white", [(np.uint8, 255), (np.uint16, 65535)])
def test_where_white_is_zero_a_picture_is_no_negative(tmp_path, dtype, white):
    """As in X-rays: a TIFF whose PhotometricInterpretation is 0, dark on the left."""
    stored = np.zeros((48, 64), dtype)
    stored[:, :32] = white
    content = bytearray(encode_picture(Image.fromarray(stored), "TIFF"))
    place = content.index(struct.pack("<HHI", 262, 3, 1))
    content[place + 8 : place + 10] = struct.pack("<H", 0)
    (tmp_path / "xray.tif").write_bytes(content)

    picture = finetune.read_picture(str(tmp_path / "xray.tif"), 64)

    assert picture.getpixel((10, 10)) == (0, 0, 0)
    assert picture.getpixel((50, 10)) == (255, 255, 255)


@pytest.mark.parametrize("kind", PICTURE_FORMATS)
def test_a_picture_that_is_cut_off_is_named(check, tmp_path, kind):
    content = encode_picture(draw_quadrants(), kind)
    write_files(tmp_path / "data", {"a.jpg": content[: len(content) // 2], "a.txt": "a cat"})
    result = check(tmp_path / "data")
    assert result.code == 1
    assert result.pairs == []
    assert result.skipped["a.jpg"]


@pytest.mark.parametrize("size, most", [((1600, 1200), 200), ((2000, 130), 130)])
def test_a_large_jpeg_is_decoded_smaller_but_not_too_small(tmp_path, size, most):
    """For a model that sees 32 pixels: at least twice as many are decoded."""
    path = tmp_path / "x.jpg"
    draw_quadrants(*size).save(path, quality=95)

    picture = finetune.read_picture(str(path), 32)

    assert min(64, *size) <= min(picture.size) <= most
    assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.02)
    assert np.abs(read_quadrants(path) - QUADRANTS).max() < 12


# ---- New: color profiles ------------------------------------------------------------------------


def fixed(value: float) -> bytes:
    """A number as ICC profiles store it."""
    return struct.pack(">i", round(value * 65536))


def xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(x) + fixed(y) + fixed(z)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def make_profile(device: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 (ICC.1:2001-04)."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(0.9642, 1, 0.8249),
    } | tags
    start = 132 + 12 * len(tags)
    directory = b""
    body = b""
    for name, value in tags.items():
        directory += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)

    header = struct.pack(">I4xI", start + len(body), 0x02400000) + device + space + connection
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642) + fixed(1) + fixed(0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + directory + body


def make_ink_profile() -> bytes:
    """A printer's table: the color (CIELAB) of each of the 16 mixtures of four inks."""
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0])
    for number in (1, 0, 0, 0, 1, 0, 0, 0, 1):
        table += fixed(number)
    table += bytes(range(256)) * 4
    for mixture in range(16):
        cyan, magenta, yellow, black = (mixture >> bit & 1 for bit in (3, 2, 1, 0))
        light = max(0, 255 - 60 * cyan - 70 * magenta - 10 * yellow - 200 * black)
        red = 128 + (60 * magenta - 40 * cyan) * (1 - black)
        warm = 128 + (80 * yellow - 40 * cyan) * (1 - black)
        table += bytes([light, red, warm])
    table += bytes(range(256)) * 3
    return make_profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


SRGB = ImageCms.createProfile("sRGB")
SRGB_BYTES = ImageCms.ImageCmsProfile(SRGB).tobytes()
INK = make_ink_profile()
LINEAR_GREY = make_profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": gamma(1)})
WIDE_GAMUT = make_profile(  # ProPhoto RGB: its red is far outside of sRGB
    b"mntr",
    b"RGB ",
    b"XYZ ",
    {
        b"rXYZ": xyz(0.7977, 0.2880, 0),
        b"gXYZ": xyz(0.1352, 0.7119, 0),
        b"bXYZ": xyz(0.0313, 0.0001, 0.8249),
        b"rTRC": gamma(1.8),
        b"gTRC": gamma(1.8),
        b"bTRC": gamma(1.8),
    },
)

SHOWN = (220, 30, 30)  # in every viewer
STORED = (150, 64, 33)  # the same in ProPhoto RGB
SIZE = (32, 32)


def wide_gamut(kind: str) -> bytes:
    return encode_picture(Image.new("RGB", SIZE, STORED), kind, icc_profile=WIDE_GAMUT)


def wide_gamut_palette() -> bytes:
    picture = Image.new("P", SIZE, 1)
    picture.putpalette([0, 0, 0, *STORED])
    return encode_picture(picture, "PNG", icc_profile=WIDE_GAMUT)


def wide_gamut_transparent() -> bytes:
    """A fifth of the color, over white."""
    picture = Image.new("RGBA", SIZE, (*STORED, 51))
    return encode_picture(picture, "PNG", icc_profile=WIDE_GAMUT)


def wide_gamut_turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", SIZE, STORED)
    return encode_picture(picture, "JPEG", icc_profile=WIDE_GAMUT, exif=exif)


def linear_grey() -> bytes:
    return encode_picture(Image.new("L", SIZE, 128), "PNG", icc_profile=LINEAR_GREY)


def linear_grey_16_bits() -> bytes:
    picture = Image.fromarray(np.full(SIZE, 128 * 257, np.uint16))
    return encode_picture(picture, "PNG", icc_profile=LINEAR_GREY)


def cyan_ink(kind: str) -> bytes:
    return encode_picture(Image.new("CMYK", SIZE, (255, 0, 0, 0)), kind, icc_profile=INK)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_a_large_picture_is_as_upright_as_a_small_one(tmp_path, monkeypatch, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a"
    path.write_bytes(encode_picture(draw_quadrants(), kind, exif=exif))
    small = finetune.read_picture(str(path), 16)

    monkeypatch.setattr(finetune, "LARGE_PIXELS", 100)
    large = finetune.read_picture(str(path), 16)

    assert large.size == (small.width, small.height)
    difference = np.abs(np.asarray(large, int) - np.asarray(small, int))
    assert difference.mean() < 1


class Profiled(NamedTuple):
    """A picture of one color with a profile, and the color that a viewer shows."""

    name: str
    make: Callable[[], bytes]
    color: tuple[int, int, int]


PROFILED = [
    *(
        Profiled(f"wide gamut {kind}", lambda kind=kind: wide_gamut(kind), SHOWN)
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")
    ),
    Profiled("wide gamut, palette", wide_gamut_palette, SHOWN),
    Profiled("wide gamut, transparent", wide_gamut_transparent, (248, 210, 210)),
    Profiled("wide gamut, turned", wide_gamut_turned, SHOWN),
    Profiled("grey", linear_grey, (188, 188, 188)),
    Profiled("grey with 16 bits", linear_grey_16_bits, (188, 188, 188)),
    Profiled("ink JPEG", lambda: cyan_ink("JPEG"), (0, 211, 255)),
    Profiled("ink TIFF", lambda: cyan_ink("TIFF"), (0, 211, 255)),
]


@pytest.mark.parametrize("picture", PROFILED, ids=lambda picture: picture.name)
def test_colors_are_those_that_a_viewer_shows(tmp_path, picture):
    path = tmp_path / "a.jpg"
    path.write_bytes(picture.make())
    assert np.abs(read_quadrants(path) - picture.color).max() <= 3


BROKEN_PROFILES = {
    "zeros": bytes(2000),
    "cut off": WIDE_GAMUT[:300],
    "only its head": WIDE_GAMUT[:128],
    "text": b"sRGB IEC61966-2.1" * 20,
    "of grey pictures": LINEAR_GREY,
    "of a printer": INK,
}


@pytest.mark.parametrize("name", BROKEN_PROFILES)
def test_a_profile_that_says_nothing_is_ignored(tmp_path, recwarn, name):
    path = tmp_path / "a.png"
    draw_quadrants().save(path, icc_profile=BROKEN_PROFILES[name])
    assert (read_quadrants(path) == QUADRANTS).all()
    assert recwarn.list == []


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_a_profile_of_another_kind_of_picture_is_ignored(tmp_path, mode):
    """Programs that turn a photograph to grey keep its RGB profile."""
    with_profile = tmp_path / "a.tif"
    without = tmp_path / "b.tif"
    profile = LINEAR_GREY if mode == "P" else WIDE_GAMUT
    draw_quadrants().convert(mode).save(with_profile, icc_profile=profile)
    draw_quadrants().convert(mode).save(without)
    assert (read_quadrants(with_profile) == read_quadrants(without)).all()


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (32, 40, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(noise).save(path, icc_profile=SRGB_BYTES)
    assert (np.asarray(finetune.read_picture(str(path), 32)) == noise).all()


# ---- New: large pictures ------------------------------------------------------------------------

SIDE = 13_400  # 180 megapixels: more than Pillow reads by itself


def large_photograph() -> bytes:
    return encode_picture(Image.new("L", (SIDE, SIDE), 200), "JPEG")


def large_scan() -> bytes:
    return encode_picture(Image.new("1", (SIDE, SIDE), 1), "TIFF", compression="group4")


@pytest.mark.parametrize("make", [large_photograph, large_scan])
def test_a_large_picture_is_used(check, tmp_path, recwarn, make):
    write_files(tmp_path / "data", {"a.jpg": make(), "a.txt": "a cat"})
    result = check(tmp_path / "data")
    assert result.pairs == [("a.jpg", "a cat")]
    assert result.skipped == {}
    assert recwarn.list == []


def picture_with_text(length: int, **options) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "{" + "x" * length + "}", **options)
    return encode_picture(draw_quadrants(), "PNG", pnginfo=notes)


def picture_with_many_texts() -> bytes:
    notes = PngImagePlugin.PngInfo()
    for number in range(100):
        notes.add_text(f"note {number}", "x" * 900_000, zip=True)
    return encode_picture(draw_quadrants(), "PNG", pnginfo=notes)


def picture_with_unicode_text() -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("parameters", "ü" * 3_000_000, zip=True)
    return encode_picture(draw_quadrants(), "PNG", pnginfo=notes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: picture_with_text(3_000_000, zip=True),
        lambda: picture_with_text(10_000_000, zip=True),
        lambda: picture_with_text(3_000_000),
        picture_with_many_texts,
        picture_with_unicode_text,
    ],
    ids=["3 MB", "10 MB", "3 MB, not compressed", "90 MB in 100 notes", "3 million letters"],
)
def test_a_picture_with_much_text_is_used(check, tmp_path, make):
    """As programs that generate pictures write it: the whole workflow."""
    write_files(tmp_path / "data", {"a.png": make(), "a.txt": "a cat"})
    result = check(tmp_path / "data")
    assert result.pairs == [("a.png", "a cat")]
    assert result.skipped == {}
    assert (read_quadrants(tmp_path / "data/a.png") == QUADRANTS).all()


# ---- New: pictures of one color -----------------------------------------------------------------


def x_ray() -> bytes:
    """12 bits in 16."""
    rows, columns = np.mgrid[:64, :64]
    disc = (rows - 32) ** 2 + (columns - 32) ** 2 < 400
    return encode_picture(Image.fromarray((disc * 3500 + 300).astype(np.uint16)), "PNG")


def icon() -> bytes:
    """White on transparency."""
    picture = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill=WHITE)
    return encode_picture(picture, "PNG")


def failed_frame() -> bytes:
    return encode_picture(Image.new("RGB", (64, 64), BLACK), "JPEG")


def nearly_grey() -> bytes:
    noise = np.random.default_rng(1).integers(127, 130, (64, 64, 3), np.uint8)
    return encode_picture(Image.fromarray(noise), "PNG")


ONE_COLOR = {
    "x-ray": x_ray,
    "icon": icon,
    "failed frame": failed_frame,
    "nearly grey": nearly_grey,
}


def test_pictures_of_one_color_are_used_and_named_by_check(check, tmp_path):
    for name, make in ONE_COLOR.items():
        write_files(tmp_path / "data", {f"{name}.png": make(), f"{name}.txt": "a cat"})
    write_files(tmp_path / "data", {"good.png": None, "good.txt": "a dog"})

    result = check(tmp_path / "data")

    assert result.code == 0
    assert len(result.pairs) == len(ONE_COLOR) + 1
    assert result.skipped == {}
    lines = [line for line in result.out.splitlines() if "\t" not in line]
    [count] = [line for line in lines if f"{len(ONE_COLOR)} pictures" in line]
    for words in ("single colour", "16", "transparen", "frame"):
        assert words in count
    for name in ONE_COLOR:
        assert f"{name}.png" in "\n".join(lines)
    assert "good.png" not in "\n".join(lines)


def test_a_training_counts_pictures_of_one_color(command, small_data, opt_base):
    for number in range(3):
        folder = small_data / f"Image/black{number}"
        write_file(folder / "1.png", encode_picture(Image.new("RGB", (30 + number, 30)), "PNG"))
        write_file(small_data / f"caption/black{number}.txt", b"a cat")

    code, out, _ = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=1, SAMPLE_COUNT=0)

    assert code == 0
    [line] = [line for line in out.splitlines() if "single colour" in line]
    assert "3 pictures" in line


def gentle_gradient() -> bytes:
    """Mist: few greys, but something is seen."""
    shades = np.linspace(150, 200, 64).astype(np.uint8)
    return encode_picture(Image.fromarray(np.tile(shades, (64, 1))), "PNG")


def dark_room() -> bytes:
    picture = Image.new("RGB", (64, 64), (4, 4, 6))
    ImageDraw.Draw(picture).ellipse((20, 20, 40, 40), fill=(60, 50, 30))
    return encode_picture(picture, "PNG")


def thin_lines() -> bytes:
    picture = Image.new("L", (200, 200), 255)
    for place in (30, 90, 150):
        ImageDraw.Draw(picture).line((place, 10, 200 - place, 190), fill=0)
    return encode_picture(picture, "PNG")


@pytest.mark.parametrize("make", [gentle_gradient, dark_room, thin_lines])
def test_a_picture_in_which_something_is_seen_is_not_of_one_color(check, tmp_path, make):
    write_files(tmp_path / "data", {"a.png": make(), "a.txt": "a cat"})
    result = check(tmp_path / "data")
    assert result.pairs == [("a.png", "a cat")]
    assert "single colour" not in result.out


# ---- New: files that are something else ---------------------------------------------------------

SOMETHING_ELSE = [
    picture_is_not_used("an empty file", b"", "empty"),
    picture_is_not_used(
        "a web page", "<!DOCTYPE html><title>404 Not Found</title>" * 50, "web page", "download"
    ),
    picture_is_not_used("a web page in small letters", "\n\n<html><p>403</html>", "web page"),
    picture_is_not_used("a web page after a mark", "\ufeff<!doctype html>", "web page"),
    picture_is_not_used(
        "the answer of a file store",
        "<?xml version='1.0' encoding='UTF-8'?><Error><Code>AccessDenied</Code></Error>",
        "download",
    ),
    picture_is_not_used("a Git LFS pointer", LFS_POINTER, "git lfs pull"),
    picture_is_not_used("a Git LFS pointer for a PNG", LFS_POINTER, "git lfs pull", file="a.png"),
    picture_is_not_used("RTF", "{\\rtf1\\ansi a picture}", "RTF"),
]


def forged_png(side: int) -> bytes:
    """A small PNG that says it is larger: it is named before anything is decoded."""
    content = bytearray(encode_picture(draw_quadrants(), "PNG"))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


TOO_LARGE = [
    picture_is_not_used("520 megapixels", forged_png(22_800), "500 megapixels"),
    picture_is_not_used("4 gigapixels", forged_png(65_000), "500 megapixels"),
]


@for_each_case(SOMETHING_ELSE, TOO_LARGE)
def test_a_file_that_is_something_else_is_told_as_what_it_is(check_case, case):
    check_case(case)
