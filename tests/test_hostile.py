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
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_data import read_listing

import finetune

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
QUADRANTS = [RED, (0, 255, 0), (0, 0, 255), WHITE]  # in reading order
GREYS = [(value,) * 3 for value in (76, 150, 29, 255)]  # the quadrants' luminance
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]
MUTATED, MEMORY, SECONDS = 320, 3 << 30, 100  # files; bytes above what is in use; for all of them


def quadrants(width: int = 64, height: int = 48) -> Image.Image:
    picture = Image.fromarray(np.array(QUADRANTS, np.uint8).reshape(2, 2, 3))
    return picture.resize((width, height), Image.Resampling.NEAREST)


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    lossy = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
    picture.save(file, kind, **lossy | options)
    return file.getvalue()


def good_pictures() -> dict[str, tuple[bytes, list[tuple]]]:
    """Name -> content, and the colours of the four quadrants."""
    four, cmyk, palette = QUADRANTS, quadrants().convert("CMYK"), quadrants().quantize(4)
    half = quadrants().convert("RGBA")  # opaque where there is red, else a fifth of it
    half.putdata([(*RED, 255 if red else 51) for red, *_ in half.get_flattened_data()])
    clear = [RED, (255, 204, 204), (255, 204, 204), RED]
    grey16 = np.kron([[65535, 0], [32896, 257]], np.ones((24, 32), int)).astype("<u2")
    greys = [WHITE, BLACK, (128,) * 3, (1,) * 3]
    big_endian = Image.frombytes("I;16B", (64, 48), grey16.byteswap().tobytes())
    turned, exif = quadrants().transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # as a camera stores them that was held so
    frames = {"save_all": True, "append_images": [Image.new("RGB", (64, 48))]}
    files = {f"{kind}.txt": (saved(quadrants(), kind), four) for kind in FORMATS}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        files[f"{kind} turned"] = (saved(turned, kind, exif=exif), four)
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"):
        files[f"{kind} of two frames"] = (saved(quadrants(), kind, **frames), four)
    for kind in ("PNG", "WEBP", "TIFF", "AVIF"):
        files[f"{kind} transparent"] = (saved(half, kind), clear)
    return files | {
        "JPEG grey": (saved(quadrants().convert("L"), "JPEG"), GREYS),
        "JPEG cmyk": (saved(cmyk, "JPEG"), four), "TIFF cmyk": (saved(cmyk, "TIFF"), four),
        "PNG palette": (saved(palette, "PNG"), four),
        "PNG 16 bits": (saved(Image.fromarray(grey16), "PNG"), greys),
        "TIFF 16 bits, big-endian": (saved(big_endian, "TIFF"), greys),
        "PNG transparent colour": (saved(quadrants(), "PNG", transparency=RED),
                                   [WHITE, *four[1:]]),
        "JPEG bad exif": (saved(quadrants(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), four),
    }


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Name -> content, and a part of the reason."""
    jpeg, gif = saved(quadrants(), "JPEG"), saved(quadrants(), "GIF")
    floats, size = Image.fromarray(np.zeros((48, 64), np.float32)), jpeg.index(b"\xff\xc0") + 5
    long_text = PngInfo()
    long_text.add_text("a", "\0" * 10**7, zip=True)
    foreign = {f"{kind}.jpg": saved(quadrants(), kind) for kind in ("EPS", "PPM", "PDF", "TGA")}
    foreign |= {
        "heic.jpg": b"\0\0\0\x18ftypheic" + bytes(100), "text.png": b"no picture",
        "empty.jpg": b"", "zeros.png": bytes(9999),
        "page.jpg": b"<!DOCTYPE html><title>404 Not Found</title>" * 50}
    files = {name: (raw, "none of JPEG, .*; save it as JPEG") for name, raw in foreign.items()}
    for kind in FORMATS:
        raw = saved(quadrants(), kind)
        files[f"{kind} cut"] = (raw[: len(raw) // 2], "")
    return files | {
        "float.tiff": (saved(floats, "TIFF"), "32 bits for each pixel; save it with 8 or 16"),
        "bomb.jpg": (jpeg[:size] + b"\xff\xdc" * 2 + jpeg[size + 4 :], "pixels"),
        "bomb.gif": (gif[:6] + b"\xff" * 4 + gif[10:], "pixels"),
        "text bomb.png": (saved(quadrants(), "PNG", pnginfo=long_text), "too large"),
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
             "away.png": (outside, "is a link")}
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


def quadrant_colors(read: Image.Image) -> np.ndarray:
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
    while place + 12 <= len(png):
        end = place + 8 + struct.unpack_from(">I", png, place)[0]
        if end + 4 > len(png):
            break
        struct.pack_into(">I", png, end, zlib.crc32(png[place + 4 : end]))
        place = end + 4
    return bytes(png)


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


def test_threads_read_in_order_and_not_too_far_ahead(sample, watched, tmp_path):
    """Else a million decoded pictures would wait in memory for a slow GPU."""
    paths, skipped = sorted(map(str, sample.rglob("*.png"))), []
    broken = [str(tmp_path / f"{number:02}") for number in range(20)]  # more than a batch
    batches = finetune.read_pictures(paths + broken, None, 2, "reading", skipped)
    done = next(batches)
    time.sleep(0.6)
    assert len(watched) <= 16 * 5 < len(paths)
    done += [one for batch in batches for one in batch]
    assert [one.path for one in done] == paths and [path for path, _ in skipped] == broken
    assert sorted(path for path, _ in watched) == sorted(paths + broken)
    assert len({thread for _, thread in watched} - {threading.get_ident()}) == 2


@pytest.mark.parametrize("number, flags", [(signal.SIGINT, ["--check"]), (signal.SIGTERM, [])])
def test_a_signal_ends_the_pass(
    command, sample, opt_base, watched, monkeypatch, tmp_path, number, flags
):
    settings = {"TRAIN_DIR": tmp_path / "data", "MODEL_ID": opt_base, "EPOCHS": 1,
                "NUM_WORKERS": 1, "SAMPLE_COUNT": 0}
    shutil.copytree(sample, tmp_path / "data", ignore=shutil.ignore_patterns(".features"))
    threads, slow = threading.active_count(), finetune.read_picture

    def interrupted(path: str, side: int) -> Image.Image:
        if len(watched) == 40:
            while not flags and len(list((tmp_path / "data").rglob("*.safetensors"))) < 2:
                time.sleep(0.01)  # this thread is ahead of what encodes and writes
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # on a busy machine, the main thread takes its time to wake up
        return slow(path, side)

    monkeypatch.setattr(finetune, "read_picture", interrupted)
    ended, _, err = command(*flags, **settings)
    assert ended == 128 + number and "Traceback" not in err
    assert err.endswith("stopped; a training continues by the same command, without --restart\n")
    assert len(watched) <= 48 and threading.active_count() == threads  # of 208; a batch waited
    if not flags:
        del watched[:]
        monkeypatch.setattr(finetune, "read_picture", slow)
        ended, out, _ = command(**settings)
        assert ended == 0 and len(watched) <= 208 - 32  # what was encoded is kept
