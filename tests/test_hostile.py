"""Pictures from anywhere: odd, damaged, or made to do harm. Each is read right, or named."""

import io
import os
import random
import re
import resource
import signal
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from runner import Child
from test_data import assert_reasons, read_listing, write

import finetune

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
QUADRANTS = [RED, (0, 255, 0), (0, 0, 255), WHITE]  # in reading order
FORMATS = "JPEG PNG WEBP BMP GIF TIFF AVIF".split()
MUTATED, MEMORY, SECONDS = 320, 3 << 30, 100  # files; bytes above what is in use; for all of them


def quadrants(width: int = 64, height: int = 48) -> Image.Image:
    picture = Image.fromarray(np.array(QUADRANTS, np.uint8).reshape(2, 2, 3))
    return picture.resize((width, height), Image.Resampling.NEAREST)


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, quality=95, **options)
    return file.getvalue()


def good_pictures() -> dict[str, tuple[bytes, list[tuple]]]:
    """Name -> content, and the colours of the four quadrants."""
    four, exif = quadrants(), Image.Exif()
    exif[0x0112] = 6  # as a camera stores them that was held so
    half = four.convert("RGBA")  # opaque where there is red, else a fifth of it
    half.putdata([(*RED, 255 if red else 51) for red, *_ in half.get_flattened_data()])
    grey16 = np.kron([[65535, 0], [32896, 257]], np.ones((24, 32), int)).astype("<u2")
    big_endian = Image.frombytes("I;16B", four.size, grey16.byteswap().tobytes())
    frames = {"save_all": True, "append_images": [Image.new("RGB", four.size)]}
    pink, greys = (255, 204, 204), [WHITE, BLACK, (128,) * 3, (1,) * 3]
    table = {  # what: formats, picture, options, colours
        "plain": (" ".join(FORMATS), four, {}, QUADRANTS),
        "turned": ("JPEG PNG WEBP TIFF AVIF", four.transpose(Image.Transpose.ROTATE_90),
                   {"exif": exif}, QUADRANTS),
        "frames": ("GIF WEBP PNG TIFF AVIF MPO", four, frames, QUADRANTS),
        "transparent": ("PNG WEBP TIFF AVIF", half, {}, [RED, pink, pink, RED]),
        "transparent colour": ("PNG", four, {"transparency": RED}, [WHITE, *QUADRANTS[1:]]),
        "cmyk": ("JPEG TIFF", four.convert("CMYK"), {}, QUADRANTS),
        "palette": ("PNG", four.quantize(4), {}, QUADRANTS),
        "grey": ("JPEG", four.convert("L"), {}, [(v,) * 3 for v in (76, 150, 29, 255)]),
        "16 bits": ("PNG", Image.fromarray(grey16), {}, greys),
        "big-endian": ("TIFF", big_endian, {}, greys),
        "bad exif": ("JPEG", four, {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"}, QUADRANTS),
        "in.png/a.jpg/folder": ("PNG", four, {}, QUADRANTS),
    }
    return {f"{what} {kind}.txt": (saved(picture, kind, **options), colors)
            for what, (kinds, picture, options, colors) in table.items() for kind in kinds.split()}


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Name -> content, and a part of the reason."""
    jpeg, gif = saved(quadrants(), "JPEG"), saved(quadrants(), "GIF")
    size = jpeg.index(b"\xff\xc0") + 5
    foreign = {f"{kind}.jpg": saved(quadrants(), kind) for kind in ("EPS", "PPM", "PDF", "TGA")} | {
        "heic.jpg": b"\0\0\0\x18ftypheic" + bytes(100), "text.png": b"no picture",
        "empty.jpg": b"", "zeros.png": bytes(9999),
        "page.jpg": b"<!DOCTYPE html><title>404 Not Found</title>" * 50}
    floats, long_text = Image.fromarray(np.zeros((48, 64), np.float32)), PngInfo()
    long_text.add_text("a", "\0" * 10**7, zip=True)
    why = f"is none of {', '.join(FORMATS)}; save it as JPEG"
    files = {name: (raw, why) for name, raw in foreign.items()}
    for kind in FORMATS:
        raw = saved(quadrants(), kind)
        files[f"cut {kind}"] = (raw[: len(raw) // 2], "")
    return files | {
        "float.tiff": (saved(floats, "TIFF"), "32 bits for each pixel; save it with 8 or 16"),
        "bomb.jpg": (jpeg[:size] + b"\xff\xdc" * 2 + jpeg[size + 4 :], "pixels"),
        "bomb.gif": (gif[:6] + b"\xff" * 4 + gif[10:], "pixels"),
        "text bomb.png": (saved(quadrants(), "PNG", pnginfo=long_text), "too large")}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the pictures of the caption "odd" are."""
    write(tmp_path / "data/caption/odd.txt", b"odd")
    (tmp_path / "data/Image/odd").mkdir(parents=True)
    return tmp_path / "data/Image/odd"


def quadrant_colors(read: Image.Image) -> np.ndarray:
    assert type(read) is Image.Image and read.mode == "RGB"
    return np.array([read.getpixel((x, y)) for y in (read.height // 4, 3 * read.height // 4)
                     for x in (read.width // 4, 3 * read.width // 4)])


def test_each_kind_of_picture_is_read_right_or_named(command, folder, tmp_path, recwarn):
    good, bad = good_pictures(), bad_pictures()
    for name, (content, _) in (good | bad).items():
        write(folder / name, content)
    os.mkfifo(folder / "pipe.png")
    write(tmp_path / "outside")
    links = {"dangling.png": ("no", "No such file"), "itself.png": ("itself.png", "links"),
             "device.png": ("/dev/zero", "not a file"), "link.png": (tmp_path / "outside", "")}
    for name, (target, _) in links.items():
        (folder / name).symlink_to(target)
    expected = {name: colors for name, (_, colors) in good.items()} | {"link.png": [BLACK] * 4}
    reasons = {name: why for name, (_, why) in (bad | links).items() if name not in expected}
    reasons["pipe.png"] = "not a file"
    code, out, err = command("--check", TRAIN_DIR=folder.parent.parent)
    assert (code, err) == (0, "") and not recwarn.list
    pairs, skipped = read_listing(out, folder)
    assert sorted(path for path, _ in pairs) == sorted(expected), skipped
    assert_reasons(skipped, reasons)
    wrong = {}
    for name, colors in expected.items():
        read = quadrant_colors(finetune.read_picture(str(folder / name), 32))
        if np.abs(read - colors).max() > (12 if re.search("JPEG|WEBP|AVIF|MPO", name) else 1):
            wrong[name] = read.tolist()
    assert not wrong


@pytest.mark.parametrize("size, most", [((1600, 1200), 200), ((2000, 130), 130)])
def test_large_jpegs_are_decoded_smaller_but_not_too_small(tmp_path, size, most):
    quadrants(*size).save(tmp_path / "x.jpg", quality=95)
    read = finetune.read_picture(str(tmp_path / "x.jpg"), 32)
    assert min(64, *size) <= min(read.size) <= most
    assert read.width / read.height == pytest.approx(size[0] / size[1], rel=0.02)
    assert np.abs(quadrant_colors(read) - QUADRANTS).max() < 12


# ---- Mutations ----------------------------------------------------------------------------------


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes: a piece becomes another one, or a number, is cut out or doubled."""
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        head = rng.random() < 0.6  # where sizes and offsets are
        place = rng.randrange(min(len(changed), 100) if head else len(changed))
        length, number = rng.choice([1, 2, 4]), rng.choice([0, 1, 5000, 2**31 - 1, 2**32 - 1])
        number = (number % 256**length).to_bytes(length, rng.choice(["little", "big"]))
        piece = changed[place : place + rng.choice([length, 16, 256])]
        old, new = rng.choice([(1, rng.randbytes(1)), (length, number), (len(piece), b""),
                               (0, piece), (0, piece * 50)])
        changed[place : place + old] = new
        if len(changed) < 100:
            break
    return mend_checksums(changed) if raw.startswith(b"\x89PNG") else bytes(changed)


def mend_checksums(png: bytearray) -> bytes:
    """Else most mutated PNGs would fail by a checksum."""
    place = 8
    while (end := place + 8 + int.from_bytes(png[place : place + 4], "big")) + 4 <= len(png):
        png[end : end + 4] = zlib.crc32(png[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(png)


def limit_resources() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(SECONDS)  # ends C code too


def test_mutated_files_are_read_or_named(folder, tmp_path):
    rng = random.Random(1)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 40, 3), np.uint8))
    seeds = [saved(noise, kind) for kind in FORMATS] + [
        raw for raw, _ in good_pictures().values() if len(raw) < 9999]
    names = [f"{number:03}" for number in range(MUTATED)]
    for number, name in enumerate(names):
        write(folder / name, mutate(seeds[number % len(seeds)], rng))
    settings = {"TRAIN_DIR": tmp_path / "data", "OUTPUT_DIR": tmp_path / "out", "NUM_WORKERS": 2}
    ended = Child(settings, "--check", folder=tmp_path / "data", prepare=limit_resources).wait()
    assert ended.code == 0 and "Traceback" not in ended.err, ended
    pairs, skipped = read_listing(ended.out, folder)
    assert sorted([path for path, _ in pairs] + list(skipped)) == names
    assert min(len(pairs), len(skipped)) > MUTATED // 6 and all(skipped.values())


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


def test_threads_read_in_order_and_not_too_far_ahead(sample, watched, tmp_path):
    """Else a million decoded pictures would wait in memory for a slow GPU."""
    paths, skipped = sorted(map(str, sample.rglob("*.png"))), []
    broken = [str(tmp_path / f"{number:02}") for number in range(20)]  # more than a batch
    batches = finetune.read_pictures(paths + broken, None, 2, "reading", skipped)
    done = list(next(batches))
    time.sleep(0.6)
    assert len(watched) <= 16 * 5 < len(paths)
    done += [path for batch in batches for path in batch]
    assert done == paths and [path for path, _ in skipped] == broken
    assert sorted(path for path, _ in watched) == sorted(paths + broken)
    assert len({thread for _, thread in watched} - {threading.get_ident()}) == 2


def test_a_signal_ends_the_pass(command, sample, watched, monkeypatch):
    threads, slow = threading.active_count(), finetune.read_picture

    def interrupted(path: str, side: int) -> Image.Image:
        if len(watched) == 40:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # on a busy machine, the main thread takes its time to wake up
        return slow(path, side)

    monkeypatch.setattr(finetune, "read_picture", interrupted)
    code, _, err = command("--check", TRAIN_DIR=sample, NUM_WORKERS=1)
    assert code == 128 + signal.SIGTERM and "Traceback" not in err
    assert err.endswith("stopped; a training continues by the same command, without --restart "
                        "if its steps had begun\n")
    assert len(watched) <= 48 and threading.active_count() == threads  # of 208; a batch waited
