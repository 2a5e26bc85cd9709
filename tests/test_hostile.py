"""Pictures that are damaged or made to do harm, and a pass over many of them that is not."""

import os
import random
import resource
import signal
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    PICTURE_FORMATS,
    Case,
    Child,
    draw_quadrants,
    encode_picture,
    for_each_case,
    make_good_pictures,
    read_listing,
    write_file,
)
from PIL import Image

import finetune

# ---- A few bytes that claim to be a huge picture ------------------------------------------------


def huge_jpeg() -> bytes:
    content = encode_picture(draw_quadrants(), "JPEG")
    size = content.index(b"\xff\xc0") + 5  # the height and the width of its frame
    return content[:size] + b"\xff\xdc" * 2 + content[size + 4 :]


def huge_gif() -> bytes:
    content = encode_picture(draw_quadrants(), "GIF")
    return content[:6] + b"\xff" * 4 + content[10:]


HUGE = [
    Case(
        name,
        {"good.png": None, "good.txt": "a cat", "huge.jpg": content, "huge.txt": "a dog"},
        pairs=[("good.png", "a cat")],
        reasons={"huge.jpg": "pixels"},
    )
    for name, content in (("JPEG", huge_jpeg()), ("GIF", huge_gif()))
]


@for_each_case(HUGE)
def test_a_picture_that_claims_to_be_huge_is_named(check_case, case):
    check_case(case)


# ---- Mutations ----------------------------------------------------------------------------------

MUTATED = 320  # files
MEMORY = 3 << 30  # bytes that may be used in addition to those of the process
SECONDS = 100  # that all of them may take


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: a byte or a number becomes another, a piece is cut out or repeated."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        is_in_head = rng.random() < 0.6  # where sizes and offsets are
        place = rng.randrange(min(len(changed), 100) if is_in_head else len(changed))
        length = rng.choice([1, 2, 4])
        number = rng.choice([0, 1, 5000, 2**31 - 1, 2**32 - 1]) % 256**length
        piece = changed[place : place + rng.choice([length, 16, 256])]

        change = rng.choice(["byte", "number", "cut out", "repeat", "repeat often"])
        if change == "byte":
            changed[place : place + 1] = rng.randbytes(1)
        elif change == "number":
            order = rng.choice(["little", "big"])
            changed[place : place + length] = number.to_bytes(length, order)
        elif change == "cut out":
            del changed[place : place + len(piece)]
        elif change == "repeat":
            changed[place:place] = piece
        else:
            changed[place:place] = piece * 50

        if len(changed) < 100:
            break
    if content.startswith(b"\x89PNG"):
        fix_checksums(changed)
    return bytes(changed)


def fix_checksums(png: bytearray) -> None:
    """Else most mutated PNGs would fail by a checksum, before anything else is read."""
    place = 8
    while place + 8 <= len(png):
        end = place + 8 + int.from_bytes(png[place : place + 4], "big")
        if end + 4 > len(png):
            break
        png[end : end + 4] = zlib.crc32(png[place + 4 : end]).to_bytes(4, "big")
        place = end + 4


def limit_resources() -> None:
    """Of this process: memory and time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(SECONDS)  # ends C code too


def test_mutated_files_are_read_or_named(tmp_path):
    """In a process with little memory and time, which must not crash."""
    noise = np.random.default_rng(1).integers(0, 256, (32, 40, 3), np.uint8)
    originals = [encode_picture(Image.fromarray(noise), kind) for kind in PICTURE_FORMATS]
    for picture in make_good_pictures():
        if len(picture.content) < 9999:
            originals.append(picture.content)

    rng = random.Random(1)
    data = tmp_path / "data"
    write_file(data / "caption/odd.txt", b"odd")
    names = []
    for number in range(MUTATED):
        name = f"{number:03}"
        mutated = mutate(originals[number % len(originals)], rng)
        write_file(data / "Image/odd" / name, mutated)
        names.append(name)

    settings = {"TRAIN_DIR": data, "OUTPUT_DIR": tmp_path / "out", "NUM_WORKERS": 2}
    ended = Child(settings, "--check", folder=data, prepare=limit_resources).wait()

    assert ended.code == 0, ended
    assert "Traceback" not in ended.err
    pairs, skipped = read_listing(ended.out, data / "Image/odd")
    assert sorted([name for name, _ in pairs] + list(skipped)) == names
    assert len(pairs) > MUTATED // 6
    assert len(skipped) > MUTATED // 6
    assert all(skipped.values())


# ---- The pass over the pictures -----------------------------------------------------------------


class Reading:
    """finetune.read_picture, which tells what is read by which thread, and takes 5 ms longer."""

    def __init__(self) -> None:
        self.paths = []
        self.threads = set()
        self.read_picture = finetune.read_picture

    def __call__(self, path: str, *arguments) -> Image.Image:
        self.paths.append(path)
        self.threads.add(threading.get_ident())
        time.sleep(0.005)
        return self.read_picture(path, *arguments)


@pytest.fixture
def reading(monkeypatch) -> Reading:
    reading = Reading()
    monkeypatch.setattr(finetune, "read_picture", reading)
    return reading


def test_threads_read_in_order_and_not_too_far_ahead(sample, reading, tmp_path):
    """Else a million decoded pictures would wait in memory for a slow GPU."""
    paths = sorted(str(path) for path in sample.rglob("*.png"))
    broken = [str(tmp_path / f"{number:02}") for number in range(20)]  # more than a batch
    findings = finetune.Findings()

    batches = finetune.read_pictures(paths + broken, None, 2, "reading", findings)
    done = list(next(batches))
    time.sleep(0.6)
    read_ahead = len(reading.paths)
    for batch in batches:
        done += batch

    assert read_ahead <= 16 * 5 < len(paths)
    assert done == paths
    assert sorted(path for path, _ in findings.skipped) == broken
    assert sorted(reading.paths) == sorted(paths + broken)
    assert len(reading.threads - {threading.get_ident()}) == 2


def test_a_signal_ends_the_pass(command, sample, reading, monkeypatch):
    threads = threading.active_count()

    def interrupted(path: str, *arguments) -> Image.Image:
        if len(reading.paths) == 40:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # on a busy machine, the main thread takes its time to wake up
        return reading(path, *arguments)

    monkeypatch.setattr(finetune, "read_picture", interrupted)
    code, _, err = command("--check", TRAIN_DIR=sample, NUM_WORKERS=1)

    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert err.endswith("stopped\n")
    assert len(reading.paths) <= 48  # of 208; a batch waited
    assert threading.active_count() == threads
