"""Pictures from anywhere: odd, damaged, or made to do harm. Each is read right, or named."""

import io
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import HEIC, QUADRANTS, quadrants, read_listing

import finetune

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
GREYS = [(value,) * 3 for value in (76, 150, 29, 255)]  # the quadrants' luminance
TURNS = dict(enumerate(["", "", *(getattr(Image.Transpose, name) for name in (
    "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"
).split())]))
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]
MUTATED, MEMORY, SECONDS = 320, 3 << 30, 100  # files; bytes above what is in use; for all of them


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    lossy = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
    picture.save(file, kind, **lossy | options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(width: int, height: int, color: int, *chunks: bytes) -> bytes:
    """A PNG whose header claims this; the chunks are as they are."""
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


def bmp(side: int) -> bytes:
    return struct.pack("<2sIIIIiiHH24x", b"BM", 54, 0, 54, 40, side, side, 1, 24)


def turned(kind: str, orientation: int) -> bytes:
    """The quadrants as a camera stores them that was held so."""
    picture, exif = quadrants(), Image.Exif()
    exif[0x0112] = orientation
    picture = picture.transpose(TURNS[orientation]) if orientation > 1 else picture
    return saved(picture, kind, exif=exif)


def good_pictures() -> dict[str, tuple[bytes, list[tuple]]]:
    """Name -> content, and the colours of the four quadrants."""
    four, rgb = QUADRANTS, np.asarray(quadrants())
    more = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "black")]}
    half = Image.fromarray(np.dstack([np.full_like(rgb, RED), 51 + (204 * (rgb[..., 0] > 0))])
                           .astype(np.uint8))  # opaque where there is red
    clear = [RED, (255, 204, 204), (255, 204, 204), RED]
    grey16 = np.kron([[65535, 0], [32896, 257]], np.ones((24, 32), int)).astype("<u2")
    greys = [WHITE, BLACK, (128,) * 3, (1,) * 3]
    palette, data = quadrants().quantize(4), zlib.compress(
        b"".join(b"\0" + row.tobytes() for row in rgb))
    files = {f"{kind}.txt": (saved(quadrants(), kind), four) for kind in FORMATS}
    files |= {f"{kind} grey.jpg": (saved(quadrants().convert("L"), kind), GREYS)
              for kind in FORMATS}
    files |= {f"{kind} turned {number}": (turned(kind, number), four)
              for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") for number in range(1, 9)}
    files |= {f"{kind} of two frames": (saved(quadrants(), kind, **more), four)
              for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO")}
    files |= {f"{kind} transparent": (saved(half, kind), clear)
              for kind in ("PNG", "WEBP", "TIFF", "AVIF")}
    files |= {f"{kind} palette": (saved(palette, kind), four) for kind in ("PNG", "BMP", "TIFF")}
    files |= {f"{kind} 16 bits": (saved(Image.fromarray(grey16), kind), greys)
              for kind in ("PNG", "TIFF")}
    return files | {
        "JPEG as png.png": (saved(quadrants(), "JPEG", progressive=True), four),
        "no ending": (saved(quadrants(), "PNG"), four),
        "JPEG cmyk": (saved(quadrants().convert("CMYK"), "JPEG"), four),
        "TIFF cmyk": (saved(quadrants().convert("CMYK"), "TIFF"), four),
        "TIFF 16 bits, big-endian": (
            saved(Image.frombytes("I;16B", (64, 48), grey16.byteswap().tobytes()), "TIFF"), greys),
        "PNG 1 bit": (saved(quadrants().convert("1", dither=0), "PNG"),
                      [BLACK, WHITE, BLACK, WHITE]),
        "PNG transparent colour": (
            png(64, 48, 2, chunk(b"tRNS", struct.pack(">3H", *RED)), chunk(b"IDAT", data)),
            [WHITE, *four[1:]]),
        "PNG palette, all transparent": (saved(palette, "PNG", transparency=bytes(4)), [WHITE] * 4),
        "PNG grey and alpha": (saved(Image.new("LA", (8, 8), (0, 0)), "PNG"), [WHITE] * 4),
        "GIF transparent": (saved(palette, "GIF", transparency=palette.getpixel((0, 0))),
                            [WHITE, *four[1:]]),
        "BMP 32": (saved(half, "BMP"), [RED] * 4),
        "JPEG bad profile": (saved(quadrants(), "JPEG", icc_profile=b"no profile" * 9999), four),
        "JPEG bad exif": (saved(quadrants(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), four),
    }


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Name -> content, and a part of the reason."""
    floats, whole = Image.fromarray(np.zeros((48, 64), np.float32)), saved(quadrants(), "JPEG")
    size, archive = whole.index(b"\xff\xc0") + 5, io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("1.jpg", whole)
    text = zlib.compress(bytes(10**7))
    data = chunk(b"IDAT", zlib.compress(bytes(64 * 3 * 48 + 48)))
    files = {f"{kind}.{ending}": (saved(quadrants(32, 32), kind), "none of JPEG, .*; save it as")
             for kind in ("EPS", "PPM", "ICO", "PDF", "TGA")
             for ending in ("jpg", kind.lower())}
    files |= {f"{kind} cut": (saved(quadrants(), kind)[: len(saved(quadrants(), kind)) // 2], "")
              for kind in FORMATS}
    files |= {name: (raw, "none of JPEG, .*; save it as JPEG") for name, raw in {
        "heic.jpg": HEIC, "heix.avif": HEIC.replace(b"heic", b"heix"), "text.png": b"no picture",
        "empty.jpg": b"", "zeros.png": bytes(9999), "zip.jpg": archive.getvalue(),
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "page.jpg": b"<!DOCTYPE html><title>404 Not Found</title>" * 50}.items()}
    return files | {
        "float.tiff": (saved(floats, "TIFF"), "32 bits for each pixel; save it with 8 or 16"),
        "integer.tiff": (saved(floats.convert("I"), "TIFF"), "32 bits"),
        "bomb.png": (png(60000, 60000, 2, data), "pixels"), "bomb.bmp": (bmp(60000), "pixels"),
        "bomb in one line.png": (png(2**31 - 1, 1, 2, data), "pixels"),
        "bomb.jpg": (whole[:size] + b"\xff\xdc" * 2 + whole[size + 4 :], "pixels"),
        "bomb.gif": (b"GIF89a" + b"\xff" * 4 + saved(quadrants(), "GIF")[10:], "pixels"),
        "text bomb.png": (png(64, 48, 2, chunk(b"zTXt", b"a\0\0" + text), data), "too large"),
        "profile bomb.png": (png(64, 48, 2, chunk(b"iCCP", b"a\0\0" + text), data), "too large"),
        "large.bmp": (bmp(9000), "can't be read"), "no pixel.png": (png(0, 0, 2, data), ""),
    }


def write_special(folder: Path) -> tuple[dict, dict[str, str]]:
    """What is no plain file: those with a picture in them, and the others with the reason."""
    outside, whole = folder.parent.parent.parent / "outside", saved(quadrants(), "PNG")
    (folder / "a folder.png/deeper.jpg").mkdir(parents=True)
    outside.mkdir()
    for path in (outside / "1.png", folder / "a folder.png/deeper.jpg/x"):
        path.write_bytes(whole)
    os.mkfifo(folder / "pipe.png")
    links = {"dangling.png": ("no", "No such file"), "itself.png": ("itself.png", "links"),
             "device.png": ("/dev/zero", "not a file"), "circle": (folder, "is a link"),
             "away.png": (outside, "is a link"), "root": ("/", "is a link")}
    for name, (target, _) in (links | {"link.png": (outside / "1.png", "")}).items():
        (folder / name).symlink_to(target)
    for name in ("Thumbs.db", "desktop.ini", ".hidden.jpg", "__MACOSX/1.jpg", ".trash/1.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"ignored")
    return (dict.fromkeys(["link.png", "a folder.png/deeper.jpg/x"], QUADRANTS),
            {"pipe.png": "not a file"} | {name: why for name, (_, why) in links.items()})


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the pictures of the caption "odd" are."""
    (tmp_path / "data/Image/odd").mkdir(parents=True)
    (tmp_path / "data/caption").mkdir()
    (tmp_path / "data/caption/odd.txt").write_text("odd")
    return tmp_path / "data/Image/odd"


def quadrant_colors(path: Path) -> np.ndarray:
    read = finetune.read_picture(str(path), 32)
    assert type(read) is Image.Image and read.mode == "RGB"
    return np.array([read.getpixel((x, y)) for y in (read.height // 4, 3 * read.height // 4)
                     for x in (read.width // 4, 3 * read.width // 4)])


def test_each_kind_of_picture_is_read_right_or_named(command, folder, recwarn):
    good, bad = good_pictures(), bad_pictures()
    for name, (content, _) in (good | bad).items():
        (folder / name).write_bytes(content)
    expected, reasons = write_special(folder)
    expected |= {name: colors for name, (_, colors) in good.items()}
    reasons |= {name: why for name, (_, why) in bad.items()}
    code, out, err = command("--check", TRAIN_DIR=folder.parent.parent)
    assert (code, err) == (0, "") and not recwarn.list
    pairs, skipped = read_listing(out, folder)
    assert sorted(path for path, _ in pairs) == sorted(expected), skipped
    assert skipped.keys() == reasons.keys()
    wrong = {name: why for name, why in skipped.items() if not re.search(reasons[name], why)}
    for name, colors in expected.items():
        read = quadrant_colors(folder / name)
        exact = 0 if re.search("PNG|GIF|BMP|TIFF|png$|ending", name) else 12
        if np.abs(read - np.array(colors)).max() > (exact or 1):
            wrong[name] = read.tolist()
    assert not wrong


@pytest.mark.parametrize("size, most", [((1600, 1200), 200), ((2000, 130), 130), ((127, 900), 127),
                                        ((48, 4000), 48)])
def test_large_jpegs_are_decoded_smaller_but_not_too_small(tmp_path, size, most):
    quadrants(*size).save(tmp_path / "x.jpg", quality=95)
    read = finetune.read_picture(str(tmp_path / "x.jpg"), 32)
    assert min(64, *size) <= min(read.size) <= most
    assert read.width / read.height == pytest.approx(size[0] / size[1], rel=0.02)
    assert np.abs(quadrant_colors(tmp_path / "x.jpg") - QUADRANTS).max() < 12


# ---- Mutations ----------------------------------------------------------------------------------


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes: a bit, a number of 1, 2 or 4 bytes, a piece cut or doubled, the end."""
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        head = rng.random() < 0.6  # where sizes and offsets are
        place = rng.randrange(min(len(changed), 100) if head else len(changed))
        length, kind = rng.choice([1, 2, 4, 16, 256]), rng.randrange(5)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width, value = rng.choice([1, 2, 4]), rng.choice([0, 1, 5000, 2**31 - 1, 2**32 - 1])
            number = (value % 256**width).to_bytes(width, rng.choice(["little", "big"]))
            changed[place : place + width] = number
        elif kind == 2:
            changed[place:place] = changed[place : place + length] * rng.choice([1, 2, 50])
        else:
            start = place if kind == 3 else len(changed) - rng.randrange(64)
            del changed[start : start + length]
        if len(changed) < 100:
            break
    if raw.startswith(b"\x89PNG") and rng.random() < 0.8:  # else most would fail by a checksum
        place = 8
        while place + 12 <= len(changed):
            end = place + 8 + struct.unpack_from(">I", changed, place)[0]
            if end + 4 > len(changed):
                break
            struct.pack_into(">I", changed, end, zlib.crc32(changed[place + 4 : end]))
            place = end + 4
    return bytes(changed)


def test_mutated_files_are_read_or_named(folder, tmp_path):
    rng = random.Random(1)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 40, 3), np.uint8))
    seeds = [saved(noise, kind) for kind in FORMATS] + [
        raw for raw, _ in good_pictures().values() if len(raw) < 9999]
    for number in range(MUTATED):
        (folder / f"{number:03}").write_bytes(mutate(seeds[number % len(seeds)], rng))
    if not (child := os.fork()):
        try:  # the child never returns
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends C code too
            signal.alarm(SECONDS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY), number)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
            code = finetune.main(["--check", f"--train-dir={tmp_path}/data", "--num-workers=2"])
            sys.stdout.flush()
            os._exit(10 + code)
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10
    pairs, skipped = read_listing((tmp_path / "out").read_text(), folder)
    names = sorted([path for path, _ in pairs] + list(skipped))
    assert names == [f"{number:03}" for number in range(MUTATED)]
    assert min(len(pairs), len(skipped)) > MUTATED // 6 and all(skipped.values())
    assert "Traceback" not in (tmp_path / "err").read_text(errors="replace")


# ---- The pass over the pictures -----------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch) -> list[tuple[str, int]]:
    """What is read, by which thread; each takes 5 ms."""
    read, real = [], finetune.read_picture

    def watch(path: str, side: int) -> Image.Image:
        read.append((path, threading.get_ident()))
        time.sleep(0.005)
        return real(path, side)

    monkeypatch.setattr(finetune, "read_picture", watch)
    return read


def test_threads_read_in_order_and_not_too_far_ahead(sample, watched):
    """Else a million decoded pictures would wait in memory for a slow GPU."""
    paths = sorted(map(str, sample.rglob("*.png")))
    batches = finetune.read_pictures(paths, None, 2, "reading")
    done = next(batches)
    time.sleep(0.6)
    assert len(watched) <= 16 * 5 < len(paths)
    done += [one for batch in batches for one in batch]
    assert [one.path for one in done] == paths and not [one for one in done if one.reason]
    assert sorted(path for path, _ in watched) == paths
    assert len({thread for _, thread in watched} - {threading.get_ident()}) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("flags", [("--check",), ()], ids=["check", "encoding"])
def test_a_signal_ends_the_pass(
    command, sample, opt_base, watched, monkeypatch, tmp_path, flags, number, code
):
    settings = {"TRAIN_DIR": tmp_path / "data", "MODEL_ID": opt_base, "EPOCHS": 1,
                "NUM_WORKERS": 1, "SAMPLE_COUNT": 0}
    shutil.copytree(sample, tmp_path / "data", copy_function=os.link,
                    ignore=shutil.ignore_patterns(".features"))
    threads, slow = threading.active_count(), finetune.read_picture

    def interrupted(path: str, side: int) -> Image.Image:
        if len(watched) == 40:
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # on a busy machine, the main thread takes its time to wake up
        return slow(path, side)

    monkeypatch.setattr(finetune, "read_picture", interrupted)
    ended, _, err = command(*flags, **settings)
    assert ended == code and "stopped" in err and "Traceback" not in err
    assert len(watched) <= 48 and threading.active_count() == threads  # no batch was begun
    if not flags:
        del watched[:]
        monkeypatch.setattr(finetune, "read_picture", slow)
        ended, out, _ = command(**settings)
        assert ended == 0 and len(watched) <= 208 - 32  # what was encoded is kept
