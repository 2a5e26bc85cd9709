"""What several test files share.

Files to try the script on, reading what it says, plain models to compare it with, and the command
line in a child process at which things happen.
"""

import builtins
import csv
import fnmatch
import functools
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib.figure
import numpy as np
import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import Blip2ForConditionalGeneration, Blip2Processor

import finetune

# ---- Settings and files -------------------------------------------------------------------------


def flags_of(settings: dict) -> list[str]:
    """{"BATCH_SIZE": 4, "LOAD_IN_4BIT": False} as --batch-size 4 --no-load-in-4bit."""
    words = []
    for name, value in settings.items():
        flag = name.lower().replace("_", "-")
        if value is True:
            words.append(f"--{flag}")
        elif value is False:
            words.append(f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes | None]]:
    """Everything in a folder, at any depth: the time of its last change, and its content."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[path] = (status.st_mtime_ns, content)
    return found


def write_file(path: Path, content: bytes) -> None:
    """A file, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_picture(path: Path, number: int = 0) -> None:
    """A small PNG, whatever the extension, and the folders that it is in.

    Each number is another picture: a disc of another color.
    """
    picture = Image.new("RGB", (24, 24), "white")
    color = (number % 256, number // 256, 160)
    ImageDraw.Draw(picture).ellipse((4, 4, 19, 19), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG")


def write_files(folder: Path, files: dict[str, str | bytes | None]) -> None:
    """Files by their path in the folder: text, bytes, or None for a picture, each another one."""
    for number, (name, content) in enumerate(files.items()):
        if content is None:
            write_picture(folder / name, number)
        elif isinstance(content, str):
            write_file(folder / name, content.encode())
        else:
            write_file(folder / name, content)


def copy_small(sample: Path, folder: Path) -> Path:
    """Three captions of the sample with four pictures each, in a new folder."""
    (folder / "caption").mkdir(parents=True)
    for text in sorted((sample / "caption").glob("*.txt"))[::6]:
        shutil.copy(text, folder / "caption")
        (folder / "Image" / text.stem).mkdir(parents=True)
        for picture in sorted((sample / "Image" / text.stem).iterdir())[:4]:
            shutil.copy(picture, folder / "Image" / text.stem)
    return folder


def write_several(folder: Path, sample: Path, count: int) -> Path:
    """A TRAIN_DIR with a table: `count` pictures, each with three, four or five captions."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for number, picture in enumerate(finetune.spread(sorted(sample.glob("Image/*/*.png")), count)):
        name = f"pictures/{number:02}.png"
        shutil.copy(picture, folder / name)
        shape, color, _, ground = picture.parent.name.split("-")  # such as star-red-on-purple
        captions = [
            f"{color} {shape}",
            f"{color} disc over {ground}",
            f"a {shape}, {color}",
            f"a {ground} background with a {color} {shape}",
            f"ein «{shape}»",
        ]
        for caption in captions[: 3 + number % 3]:
            rows.append({"file_name": name, "text": caption})
    lines = [json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


# ---- Odd files ----------------------------------------------------------------------------------

LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 61\n"
ODD_NAMES = {  # names of files, and how they are printed: one line, and no control characters
    "new\nline": r"new\nline",
    "x\tforged\ta cat": r"x\tforged\ta cat",
    "return\r": r"return\r",
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",
    "\x7f\x9b31m": r"\x7f\x9b31m",
    "next\x85line\u2028\u2029": r"next\x85line\u2028\u2029",
    "\u202egnp.exe": r"\u202egnp.exe",
    os.fsdecode(b"caf\xe9 \xff"): r"caf\udce9 \udcff",
    'double "quotes\'s"': 'double "quotes\'s"',
    "a,comma": "a,comma",
    "=1+1": "=1+1",
    "--restart": "--restart",
    " space ": " space ",
    "%s {0}": "%s {0}",
    "$(touch x)": "$(touch x)",
    "*?": "*?",
    "back\\nslash": "back\\nslash",
    "日本語": "日本語",
    "می\u200cخواهم": "می\u200cخواهم",  # this joiner is needed
    "👩\u200d👩\u200d👧": "👩\u200d👩\u200d👧",  # these too
}


# ---- Pictures -----------------------------------------------------------------------------------

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
RED = (255, 0, 0)
GREEN = (0, 255, 0)
BLUE = (0, 0, 255)
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
QUADRANTS = (RED, GREEN, BLUE, WHITE)  # in reading order


def draw_quadrants(width: int = 64, height: int = 48) -> Image.Image:
    """Red and green above blue and white."""
    small = Image.fromarray(np.array(QUADRANTS, np.uint8).reshape(2, 2, 3))
    return small.resize((width, height), Image.Resampling.NEAREST)


def encode_picture(picture: Image.Image, kind: str, **options) -> bytes:
    """The content of a picture's file in this format."""
    if kind in ("JPEG", "WEBP", "AVIF", "MPO"):
        options["quality"] = 95
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


class GoodPicture(NamedTuple):
    """A file that must be read, and what is seen in it."""

    name: str  # the extension is that of a JPEG, whatever it is
    content: bytes
    colors: tuple[tuple[int, int, int], ...]  # of the four quadrants, in reading order
    tolerance: int  # formats that lose something may differ more


def make_good_pictures() -> list[GoodPicture]:
    """Pictures of each format, turned, transparent, with several frames and the like."""
    made = []

    def add(name: str, kinds: tuple[str, ...], picture: Image.Image, colors=QUADRANTS, **options):
        for kind in kinds:
            content = encode_picture(picture, kind, **options)
            tolerance = 12 if kind in ("JPEG", "WEBP", "AVIF", "MPO") else 1
            made.append(GoodPicture(f"{name} {kind}.jpg", content, colors, tolerance))

    four = draw_quadrants()
    add("plain", PICTURE_FORMATS, four)
    add("in.png/a.jpg/folder", ("PNG",), four)
    add("palette", ("PNG",), four.quantize(4))
    add("cmyk", ("JPEG", "TIFF"), four.convert("CMYK"))
    greys = ((76,) * 3, (150,) * 3, (29,) * 3, WHITE)
    add("grey", ("JPEG",), four.convert("L"), greys)

    turned = four.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # as a camera stores a picture for which it was turned
    add("turned", ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"), turned, exif=exif)
    add("bad exif", ("JPEG",), four, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")

    black_frame = Image.new("RGB", four.size)
    kinds = ("GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO")
    add("frames", kinds, four, save_all=True, append_images=[black_frame])

    alpha = Image.new("L", four.size, 51)  # a fifth
    alpha.paste(255, (0, 0, 32, 24))  # red is opaque
    alpha.paste(255, (32, 24, 64, 48))  # and so is the opposite quadrant, which is red too
    red = Image.new("RGB", four.size, RED)
    red.putalpha(alpha)
    pink = (255, 204, 204)  # a fifth of red over white
    add("transparent", ("PNG", "WEBP", "TIFF", "AVIF"), red, (RED, pink, pink, RED))
    add("transparent red", ("PNG",), four, (WHITE, GREEN, BLUE, WHITE), transparency=RED)

    deep = np.kron([[65535, 0], [32896, 257]], np.ones((24, 32), int)).astype("<u2")
    greys = (WHITE, BLACK, (128,) * 3, (1,) * 3)
    add("16 bits", ("PNG",), Image.fromarray(deep), greys)
    big_endian = Image.frombytes("I;16B", four.size, deep.byteswap().tobytes())
    add("16 bits big-endian", ("TIFF",), big_endian, greys)
    return made


def read_quadrants(path: Path, side: int = 32) -> np.ndarray:
    """The colors in the middle of the four quadrants, (4, 3), as the script reads them."""
    picture = finetune.read_picture(str(path), side)
    assert type(picture) is Image.Image
    assert picture.mode == "RGB"
    colors = []
    for y in (picture.height // 4, 3 * picture.height // 4):
        for x in (picture.width // 4, 3 * picture.width // 4):
            colors.append(picture.getpixel((x, y)))
    return np.array(colors)


# ---- What the script writes and says ------------------------------------------------------------

CONTROL_CHARACTERS = (
    r"[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, each by the names in its header."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_listing(output: str, folder: Path) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """What --check lists: the pairs, and the reason for each file that is not used.

    Paths are relative to `folder`; a row of a table is "metadata.csv, line 3".
    """
    root = f"{finetune.printable(str(folder))}/"
    lines = output.splitlines()
    pairs = []
    skipped = {}
    for number, line in enumerate(lines):
        if "\t" in line:
            picture, caption = line.split("\t")
            pairs.append((picture.removeprefix(root), caption))

        count = re.fullmatch(r"not used: (\d+)", line)
        if count:
            for listed in lines[number + 1 : number + 1 + int(count[1])]:
                path, reason = re.fullmatch(r"  (.+?): (.+)", listed).groups()
                skipped[path.removeprefix(root)] = reason
            assert len(skipped) == int(count[1])
    return sorted(pairs), skipped


def read_captions(output: str) -> dict[str, tuple[str, float]]:
    """What --caption prints: the caption and the confidence of each picture."""
    captions = {}
    for line in output.splitlines():
        picture, caption, confidence = line.split("\t")
        captions[picture] = (caption, float(confidence))
    return captions


def assert_no_control_characters(text: str) -> None:
    """Nothing but line ends moves the cursor, changes colors or the direction of writing."""
    assert not re.search(CONTROL_CHARACTERS, text)


def assert_words(text: str, words: str | tuple[str, ...]) -> None:
    """The text contains these words, all of them."""
    if isinstance(words, str):
        words = (words,)
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


def assert_reasons(skipped: dict[str, str], expected: dict[str, str | tuple[str, ...]]) -> None:
    """Exactly these are not used, each for a reason that contains these words.

    In `expected`, "metadata.csv" may also stand for one row of it, whichever it is.
    """
    reasons = {}
    for path, reason in skipped.items():
        if path not in expected:
            path = re.split(r", (line|item|annotation) ", path)[0]
        assert path not in reasons
        reasons[path] = reason
    assert reasons.keys() == expected.keys()
    for path, words in expected.items():
        assert_words(reasons[path], words)


# ---- Folders as people have them, and what --check says of them ---------------------------------


class Case(NamedTuple):
    """A folder as people have it, and what --check must say of it."""

    name: str
    files: dict[str, str | bytes | None]  # path: content; None: a picture
    pairs: list[tuple[str, str]] = []  # pictures and captions; []: it ends with an error
    reasons: dict[str, str | tuple[str, ...]] = {}  # what is not used: words of the reason
    says: tuple[str, ...] = ()  # words that one line of the output contains
    error: str | tuple[str, ...] = ()  # words of the error


def for_each_case(*lists: list[Case]) -> pytest.MarkDecorator:
    """Runs a test with each case, as the argument `case`."""
    cases = list(itertools.chain(*lists))
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def assert_case(case: Case, result: SimpleNamespace) -> None:
    """What the fixture `check` returns is what the case expects."""
    assert result.pairs == sorted(case.pairs)
    if case.pairs or case.reasons:
        assert_reasons(result.skipped, case.reasons)
    if case.pairs:
        assert (result.code, result.err) == (0, "")
        assert f"pairs: {len(case.pairs)}\n" in result.out
    else:
        assert result.code == 1
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert_words(result.err, case.error)
    if case.says:
        lines = [line for line in result.out.splitlines() if "\t" not in line]
        matching = [line for line in lines if all(words in line for words in case.says)]
        assert len(matching) == 1, lines


# ---- The parts of a run, and plain models to compare them with ----------------------------------


def rows_of(built) -> list[finetune.Example]:
    """All examples of what the fixture `build` returns."""
    return [built.dataset[i] for i in range(len(built.dataset))]


def train(built, held_out=None, **settings) -> finetune.Progress:
    """finetune.train on all pairs, from a start that is not zero; `held_out`: other pairs."""
    vars(built.settings).update(settings)
    nothing = finetune.ImageCaptioningDataset([], {}, built.captioner.row_builder)
    datasets = finetune.Datasets(built.dataset, held_out or nothing, [])

    metrics = dict.fromkeys(finetune.METRICS, math.nan)
    metrics |= {"step": 0, "seconds": 0.0}
    pair_losses = torch.zeros(len(built.dataset))
    progress = finetune.Progress([], [metrics], pair_losses)

    folder = Path(built.settings.OUTPUT_DIR)
    record = {"settings": {}, "data": ""}
    tracking = finetune.Tracking(Accelerator(cpu=True))
    run = finetune.Run(folder, folder, record, tracking, is_main=True)
    finetune.train(built.settings, built.learner, datasets, progress, run)
    return progress


class PlainModel:
    """The base with the adapter, by plain transformers and PEFT: whole pictures, whole passes."""

    def __init__(self, base: str, folder: Path, prompt: str = "") -> None:
        model = Blip2ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        text_config = model.config.text_config
        self.model = peft.PeftModel.from_pretrained(model, folder).eval()
        self.processor = Blip2Processor.from_pretrained(folder)
        self.prompt = prompt
        self.stop = text_config.eos_token_id
        self.is_t5 = text_config.model_type == "t5"

    def read(self, picture: str) -> dict[str, torch.Tensor]:
        image = Image.open(picture).convert("RGB")
        return dict(self.processor(images=image, text=self.prompt, return_tensors="pt"))

    @torch.no_grad()
    def predict(self, picture: str, ids: list[int]) -> torch.Tensor:
        """The probabilities of all tokens in the place of each of the ids, (ids, vocabulary)."""
        inputs = self.read(picture)
        known = torch.tensor([ids[:-1]], dtype=torch.long)
        if self.is_t5:
            start = torch.tensor([[self.model.config.text_config.decoder_start_token_id]])
            inputs["decoder_input_ids"] = torch.cat([start, known], dim=1)
        else:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], known], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return self.model(**inputs).logits[0, -len(ids) :].softmax(-1)

    def caption(self, picture: str, most: int, beams: int) -> tuple[str, float, bool]:
        """Caption, confidence, and whether it ends with the stop token."""
        inputs = self.read(picture)
        ids = self.model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=most)
        first = 1 if self.is_t5 else inputs["input_ids"].shape[1]
        ids = ids[0, first:].tolist()
        ends = self.stop in ids
        if ends:
            ids = ids[: ids.index(self.stop) + 1]

        probabilities = self.predict(picture, ids)
        if beams == 1:
            assert ids == probabilities.argmax(-1).tolist()
        product = math.prod(probabilities[range(len(ids)), ids].tolist())
        text = " ".join(self.processor.decode(ids, skip_special_tokens=True).split())
        return text, product ** (1 / len(ids)), ends


# ---- The command in a child process, and events at which something happens to it ----------------

LIMIT = 120  # seconds that anything may take
PLACES = {  # where something may happen: the function that is called there
    "load": (transformers.Blip2ForConditionalGeneration, "from_pretrained"),
    "encode": (finetune.Captioner, "encode"),
    "caption": (finetune.Captioner, "caption"),
    "measure": (finetune, "held_out_loss"),
    "step": (torch.optim.AdamW, "step"),
    "adapter": (peft.PeftModel, "save_pretrained"),
    "processor": (transformers.Blip2Processor, "save_pretrained"),
    "serialize": (torch, "save"),
    "draw": (matplotlib.figure.Figure, "savefig"),
    "open": (builtins, "open"),
    "replace": (os, "replace"),
    "rename": (Path, "rename"),
    "unlink": (Path, "unlink"),
}


def on(event: str, action: Callable[[], None]) -> None:
    """Patches this process: action() before or after the n-th call of a place.

    "before encode 2"; "after replace *.pt 2": of those calls with such a path.
    """
    when, place, *patterns, number = event.split()
    owner, name = PLACES[place]
    real = getattr(owner, name)
    calls = itertools.count(1)

    def is_meant(arguments: tuple) -> bool:
        if not patterns:
            return True
        paths = [os.fspath(value) for value in arguments if isinstance(value, str | Path)]
        return any(fnmatch.fnmatch(path, patterns[0]) for path in paths)

    @functools.wraps(real)
    def watched(*arguments, **named):
        is_now = is_meant(arguments) and next(calls) == int(number)
        if is_now and when == "before":
            action()
        result = real(*arguments, **named)
        if is_now and when == "after":
            action()
        return result

    setattr(owner, name, watched)


def send(number: int) -> Callable[[], None]:
    """An action: a signal to this very process."""
    return lambda: os.kill(os.getpid(), number)


def fail_with(error: BaseException) -> Callable[[], None]:
    """An action: raises."""

    def action() -> None:
        raise error

    return action


def step_of(folder: Path) -> int:
    """That of the checkpoint in out.unfinished/, which must be whole; 0: there is none."""
    path = folder / "out.unfinished/checkpoint.pt"
    if not path.exists():
        return 0
    return torch.load(path, weights_only=True)["progress"]["step"]


def forget_the_device() -> None:
    """accelerate gives every run of a process the device of the first one: the next is the first.

    It remembers how many processes there are, too.
    """
    for state in (PartialState, AcceleratorState, GradientState):
        state._shared_state.clear()


class Ended(NamedTuple):
    """How a child process has ended, and what it has said."""

    code: int  # negative: the signal that killed it
    out: str
    err: str


class Child(multiprocessing.get_context("fork").Process):
    """The command in a forked process, which has imported everything already.

    It runs in `folder`, next to which its output is written; prepare() is called first, in the
    new process, and may patch it.
    """

    def __init__(
        self,
        settings: dict,
        *flags: str,
        folder: Path,
        rank: int = 0,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(daemon=True)
        self.settings = settings
        self.flags = flags
        self.folder = folder
        self.prepare = prepare
        self.out = folder.with_name(f"out-{rank}")
        self.err = folder.with_name(f"err-{rank}")
        self.start()

    def run(self) -> None:
        gc.freeze()  # else the first collection copies all that was imported
        for number, path in ((1, self.out), (2, self.err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background too
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tqdm.set_lock(threading.RLock())  # not the one that a killed child may hold
        torch.set_num_threads(1)  # a pool of threads does not survive the fork
        forget_the_device()  # of tests in the parent
        os.chdir(self.folder)
        self.prepare()
        sys.exit(finetune.main([*flags_of(self.settings), *self.flags]))

    def wait(self) -> Ended:
        self.join(LIMIT)
        hangs = self.is_alive()
        self.kill()
        assert not hangs, f"what writes into {self.out} and {self.err} hangs"
        return Ended(self.exitcode, self.out.read_text(), self.err.read_text())
