"""Fine-tune BLIP-2 on your own captions: LoRA on a language model in 4 bits.

What goes in: pictures and their captions, in one of three layouts.

    train/caption/<name>.txt and      one caption, and the pictures that it is for, in any depth
    train/Image/<name>/...            (or Image/<name>.<ending>, one picture)
    train/metadata.csv or .jsonl      a table with columns file_name and text, a row for each pair
    train/<name>.txt and .<ending>    a caption of its own beside each picture, in any depth

What comes out: blip2_lora_finetuned/ with the adapter, the processor, a model card (README.md),
report.png, held_out.csv, pairs.csv, metrics.csv, skipped.csv and settings.json. Until it is
finished, a run is in blip2_lora_finetuned.unfinished/, with checkpoint.pt to continue from.

    python finetune.py                       train with the settings below, which are also flags;
                                             again after any interruption: it continues
    python finetune.py --restart             train from the start, whatever there is
    python finetune.py --check               read settings, captions and pictures; write nothing
    python finetune.py --caption PATH ...    caption pictures or folders with the trained adapter
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
import uuid
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, reduce
from filelock import FileLock
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm
from transformers import Blip2ForConditionalGeneration, Blip2Processor

# Some talk at import, some on every try without network; what matters about a picture raises.
for talkative in ("bitsandbytes", "huggingface_hub", "PIL", "matplotlib"):
    logging.getLogger(talkative).setLevel(logging.CRITICAL)
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

csv.field_size_limit(2**31 - 1)  # of a caption, too

# ==== Settings: edit these, or give them as flags (BATCH_SIZE is --batch-size) ====
# files
TRAIN_DIR: str = "train"  # folder of pictures and captions, in one of the layouts above
VALIDATION_DIR: str = ""  # pictures to measure on, in any layout; "": hold out a part of TRAIN_DIR
OUTPUT_DIR: str = "blip2_lora_finetuned"  # what the run leaves; an earlier one is moved aside then
# model
MODEL_ID: str = "Salesforce/blip2-opt-2.7b"  # Hub id or folder of a BLIP-2 with OPT or Flan-T5
DEVICE: str = "auto"  # auto, cuda, cuda:1, cpu
DTYPE: str = "auto"  # of all that is not in 4 bits: auto, bfloat16, float16, float32
LOAD_IN_4BIT: bool = True  # language model in NF4, for less memory; False: faster where it fits
# LoRA
LORA_RANK: int = 16  # size of the adapter: a larger one can learn more
LORA_ALPHA: float = 32.0  # the adapter's outputs are scaled by LORA_ALPHA / LORA_RANK
LORA_DROPOUT: float = 0.05  # share of the adapter's inputs dropped in training; 0: off
LORA_TARGETS: str = "attention"  # attention, all-linear, or a regular expression for module names
# captions
PROMPT: str = ""  # text before every caption, given and not learned; "": none
MAX_CAPTION_TOKENS: int = 64  # longer captions are cut, and counted
NUM_BEAMS: int = 1  # of the search for a caption; 1: greedy, the fastest
# training
EPOCHS: int = 10  # passes over the training pairs
BATCH_SIZE: int = 16  # pairs behind one optimizer step; what memory can't hold at once is split
LEARNING_RATE: float = 2e-4  # the highest; it rises to it and falls to 0 along a cosine
WARMUP_FRACTION: float = 0.05  # share of the steps in which the learning rate rises; 0: off
WEIGHT_DECAY: float = 0.01  # AdamW's weight decay; 0: off
MAX_GRAD_NORM: float = 1.0  # longer gradients are scaled down to this norm; 0: off
SEED: int = 42  # decides what is held out, the order of the pairs, first weights and dropout
NUM_WORKERS: int = 4  # threads that read pictures
# watching
VALIDATION_FRACTION: float = 0.1  # share of the pictures held out to measure on; 0: train on all
SAMPLE_COUNT: int = 6  # held-out captions printed, and drawn (12 at most); 0: none
CHECKPOINT_MINUTES: float = 10.0  # between checkpoints, beside those at epochs' ends; 0: only those
LOG_WITH: str = ""  # a tracker that accelerate knows: tensorboard, wandb, mlflow, ...; "": none
# ==== End of settings ====

SETTINGS = sys.modules[__name__].__annotations__  # name: type
HARMLESS = "OUTPUT_DIR DEVICE NUM_WORKERS CHECKPOINT_MINUTES SAMPLE_COUNT LOG_WITH".split()
FOR_CAPTION = "OUTPUT_DIR DEVICE NUM_WORKERS NUM_BEAMS".split()  # all else is as in the training
LORA_PATTERNS = {
    "attention": r"language_model\..*(self_attn|SelfAttention|EncDecAttention)"
    r"\.(q_proj|k_proj|v_proj|out_proj|q|k|v|o)",
    "all-linear": r"language_model\..*\.([qkv]_proj|out_proj|fc[12]|q|k|v|o|wi|wi_[01]|wo)",
}
NF4 = {  # the defaults of bitsandbytes are fp4, and arithmetic in float32
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": ["lm_head", "language_projection", "qformer", "vision_model"],
}
PICTURE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]
DECODING = 1  # raised when read_picture returns something else, so that features are made anew
CAPTION_BYTES = 1_000_000  # a larger file is no caption
INFERENCE_BATCH = 16  # pictures encoded, measured or captioned at a time
GENERATED = 256  # held-out pictures captioned before and after, at most; all of VALIDATION_DIR
NAMED = 10  # problems named on the screen; skipped.csv has all of them
CPU_PARAMETERS = 500_000_000  # a larger model runs on the CPU only when told to
TINY_PARAMETERS = 20_000_000  # below, one CPU thread: several wait for each other, not for work
FEW_STEPS = 100  # with fewer optimizer steps hardly anything is learned
METRICS = ("step epoch learning_rate train_loss held_out_loss grad_norm pairs_per_second "
           "seconds").split()
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC",
         "Noto Sans Devanagari", "Segoe UI Emoji", "Noto Emoji"]  # the first that has the letter
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "pillow")
TABLES = ("metadata.csv", "metadata.jsonl")
LAYOUTS = {name: name for name in TABLES} | {  # by what is there
    "caption": "caption/ and Image/", "": "<name>.txt beside each picture"}
NOT_SHARED = ("the processes see other files, or have other settings. Start all by one command, "
              "with TRAIN_DIR and OUTPUT_DIR on a file system that all machines share.")
# Whoever says it: an allocator, cuBLAS, the CUDA runtime or its driver.
OUT_OF_MEMORY = r"out of memory|can't allocate memory|CUBLAS_STATUS_(ALLOC_FAIL|NOT_INITIALIZ)ED"
REMEDIES = {  # of errors that are not ours, by their kinds and what they say
    "file lock": "Another run works on this OUTPUT_DIR: stop it, or name another one. Only if none "
    "does (it was killed on another machine), delete that file.",
    OUT_OF_MEMORY: "Lower MAX_CAPTION_TOKENS, LORA_RANK or NUM_BEAMS, set LOAD_IN_4BIT, or free "
    "memory.",
    r"OSError|os error \d": "Mend that, and run the same command again.",
    "DistError|gloo": "Another process has ended: see what it says.",
}


class UserError(Exception):
    """What only the user can mend: a sentence that says what is wrong, where, and what to do."""


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def share(items: Sequence) -> Sequence:
    """The part of a list that falls to this process."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def printable(text: str) -> str:
    """`text` on one line of a terminal: what breaks lines or moves the cursor is escaped."""
    return re.sub(r"[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda found: ascii(found[0])[1:-1], text)


def relative(path: str, root: str) -> str:
    """The path below `root`, in NFC: the same on every system, wherever `root` is moved to."""
    with contextlib.suppress(ValueError):  # on another drive of Windows
        path = os.path.relpath(path, root)
    return unicodedata.normalize("NFC", path.replace(os.sep, "/"))


def write_whole(path: Path, content: bytes) -> None:
    """A file that is whole, old or new, whoever is killed: written aside, flushed, renamed."""
    aside = path.with_name(f"{path.name}.part")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    """A table, its header first. NaN is an empty cell."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(["" if cell != cell else cell for cell in row] for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of such a table, by its header."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


# ---- Settings -----------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The settings under their own names, overridden by flags; `check`, `restart` and `caption`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        usage="%(prog)s [--check | --restart | --caption PATH ...] [--setting value ...]")
    parser.add_argument("--check", action="store_true", help="read everything; write nothing")
    parser.add_argument("--restart", action="store_true", help="train from the start")
    parser.add_argument("--caption", nargs="+", metavar="PATH", help="pictures or folders")
    source = Path(__file__).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z0-9_]+): .*?  # (.*)$", source, re.M))
    defaults = {name: globals().get(name) for name in SETTINGS}
    for name, kind in SETTINGS.items():
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": kind, "metavar": kind.__name__.upper()}
        text = f"{comments.get(name, '')} (now {defaults[name]!r})".replace("%", "%%")
        parser.add_argument("--" + name.lower().replace("_", "-"), dest=name, help=text, **how)
    given = vars(parser.parse_args(argv))
    ignored = ["--" + name.lower().replace("_", "-") for name in given
               if name not in ("caption", *FOR_CAPTION)]
    if "caption" in given and ignored:
        parser.error(f"with --caption all but {', '.join(FOR_CAPTION)} is as in the training; "
                     f"leave out {' '.join(ignored)}")
    return argparse.Namespace(**{"check": 0, "restart": 0, "caption": []} | defaults | given)


def check_settings(settings: argparse.Namespace) -> None:
    """Raises one UserError with every problem; gives paths and prompt one form."""
    trackers = ["", *sorted(map(str, get_available_trackers()))]
    rules = {  # what settings must be beside of their type, in words and as a test
        "LORA_RANK LORA_ALPHA EPOCHS BATCH_SIZE LEARNING_RATE":
            ("more than 0", lambda value: 0 < value < math.inf),
        "WEIGHT_DECAY MAX_GRAD_NORM SAMPLE_COUNT CHECKPOINT_MINUTES":
            ("0 or more", lambda value: 0 <= value < math.inf),
        "LORA_DROPOUT WARMUP_FRACTION VALIDATION_FRACTION":
            ("from 0 to below 1", lambda value: 0 <= value < 1),
        "MAX_CAPTION_TOKENS NUM_BEAMS NUM_WORKERS":
            ("from 1 to 1000", lambda value: 1 <= value <= 1000),
        "SEED": ("from 0 to 4294967295", lambda value: 0 <= value < 2**32),
        "TRAIN_DIR OUTPUT_DIR MODEL_ID": ("text, not empty", bool),
        "VALIDATION_DIR PROMPT": ("text", lambda value: True),
        "LOAD_IN_4BIT": ("True or False", lambda value: True),
        "LORA_TARGETS": ("attention, all-linear or a regular expression", re.compile),
        "DEVICE": ("auto, cpu, cuda or one GPU such as cuda:1",
                   re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch),
        "DTYPE": ("auto, bfloat16, float16 or float32",
                  "auto bfloat16 float16 float32".split().__contains__),
        "LOG_WITH": (f"a tracker whose package is installed: {trackers}", trackers.__contains__),
    }  # fmt: skip
    rules = {name: rule for names, rule in rules.items() for name in names.split()}
    problems = [f"{name} is missing, misspelled or no setting: each is a line, 'EPOCHS: int = 10'"
                for name in sorted(rules.keys() ^ SETTINGS.keys())]
    for name in (name for name in SETTINGS if name in rules):
        kind, (words, test), fits = SETTINGS[name], rules[name], False
        value = getattr(settings, name)
        with contextlib.suppress(re.error):
            fits = type(value) in (kind, int if kind is float else kind) and test(value)
        if not fits:
            problems.append(f"{name} is {value!r}; it must be {words} ({kind.__name__}).")
    if not problems and not settings.caption:
        problems = check_output_dir(settings)
    if problems:
        raise UserError("\n  ".join(["some settings can't be used:", *problems]))
    for name in ("TRAIN_DIR", "VALIDATION_DIR", "OUTPUT_DIR"):  # out/ is out
        if value := getattr(settings, name):
            setattr(settings, name, os.path.normpath(value))
    if os.path.isdir(settings.MODEL_ID):  # the adapter remembers it, and is used from elsewhere
        settings.MODEL_ID = os.path.abspath(settings.MODEL_ID)
    settings.PROMPT = " ".join(settings.PROMPT.split())  # a space at its end breaks the next token


def check_output_dir(settings: argparse.Namespace) -> list[str]:
    """Why OUTPUT_DIR can't be renamed, or would take with it what is not its own."""
    output = Path(os.path.realpath(settings.OUTPUT_DIR))  # of a link, what it points to
    problems = ["is the current folder, or above it"] * Path.cwd().is_relative_to(output)
    problems += ["is a mount point, which can't be renamed"] * os.path.ismount(output)
    for name in ("TRAIN_DIR", "VALIDATION_DIR", "MODEL_ID"):
        folder = Path(os.path.realpath(getattr(settings, name) or os.devnull))
        if folder.is_dir() and (output.is_relative_to(folder) or any(
                folder.is_relative_to(own) for own in (output, f"{output}.unfinished"))):
            problems.append(f"and {name} lie one in the other")
    return [f"OUTPUT_DIR {settings.OUTPUT_DIR!r} {problem}; name a folder of its own."
            for problem in problems[:1]]


# ---- Pairs --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    picture: str  # path
    caption: str


Skipped = tuple[str, str]  # path, and why it is not used


class Data(NamedTuple):
    pairs: list[Pair]  # of TRAIN_DIR
    validation: list[Pair]  # of VALIDATION_DIR
    skipped: list[Skipped]  # of both


def read_caption(path: str) -> str:
    """The caption in a UTF-8 or UTF-16 file, white space collapsed. Raises OSError, ValueError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("the caption is not a file")  # a pipe would block for ever
    with open(path, "rb") as file:
        raw = file.read(CAPTION_BYTES + 1)
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("the caption is not in UTF-8; save it so, README says how") from error
    if len(raw) > CAPTION_BYTES or "\0" in text:
        raise ValueError("the caption is above 1 MB, or no text in UTF-8")
    if not text.strip():
        raise ValueError("the caption is empty")
    return " ".join(text.split())


def list_files(folder: str, skipped: list[Skipped]) -> Iterator[str]:
    """Every file below `folder`, in a fixed order, without hidden ones and desktops' droppings."""
    ignored, errors = ("thumbs.db", "desktop.ini", "__macosx"), []
    for parent, folders, files in os.walk(folder, onerror=errors.append):
        folders[:], files = (sorted(name for name in names if not name.startswith(".")
                                    and name.lower() not in ignored) for names in (folders, files))
        skipped += [(os.path.join(parent, name), "is a link; only linked files are read")
                    for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from (os.path.join(parent, name) for name in files)
    skipped += [(error.filename, f"can't be opened: {error.strerror}") for error in errors
                if os.path.lexists(error.filename)]  # there may be no Image/


def read_names(folder: str, beside: bool, skipped: list[Skipped]) -> list[Pair]:
    """Caption files and the pictures of their name: the first layout or, if `beside`, the third."""
    captions, pictures, pairs = defaultdict(list), defaultdict(list), []
    for top in ("",) if beside else ("caption", "Image"):
        for path in list_files(os.path.join(folder, top), skipped):
            name = relative(path, os.path.join(folder, top))
            stem, ending = os.path.splitext(name)
            if top == "Image":
                pictures[name.split("/")[0] if "/" in name else stem].append(path)
            elif ending.lower() == ".txt" and (beside or "/" not in name):
                captions[stem].append(path)
            elif beside:
                pictures[stem].append(path)
            else:
                skipped.append((path, "is not caption/<name>.txt"))
    for name in sorted({*captions, *pictures}):
        texts, images = captions[name], pictures[name]
        try:
            if len(texts) > 1:
                raise ValueError(f"there are {len(texts)} captions of this name")
            if not texts or not images:
                raise ValueError(f"there is no {'picture' if texts else 'caption'} of this name")
            caption = read_caption(texts[0])
            pairs += [Pair(path, caption) for path in images]
        except (OSError, ValueError) as error:
            skipped += [(path, str(error)) for path in texts + images]
    return pairs


def read_rows(path: str) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """The rows of a table, counted from 1. Raises UserError."""
    number = 0
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        rows = csv.DictReader(lines, strict=True) if path.endswith(".csv") else (
            dict(json.loads(line)) for line in lines if line.strip())
        try:
            for number, row in enumerate(rows, 1):
                yield number, row
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(f"{path!r} can't be read from row {number + 1} on: {error}. Mend that, "
                            "or save it anew.") from error


def read_table(path: str, skipped: list[Skipped]) -> list[Pair]:
    """Hugging Face's ImageFolder, the second layout. Raises UserError."""
    folder, pairs, named = os.path.dirname(path), {}, set()
    files = {relative(file, folder): file for file in list_files(folder, skipped)}
    files.pop(os.path.basename(path), None)
    for number, row in read_rows(path):
        column = "text" if "text" in row else "caption"
        if number == 1 and not {"file_name", column} <= row.keys():
            raise UserError(
                f"{path!r} has the columns {[name for name in row if name]}, and needs file_name "
                "and text: rename those of paths and captions, and separate all by commas.")
        name = str(row.get("file_name") or "").replace("\\", "/")
        if name not in files:  # it may be ./a.jpg, absolute, or lead elsewhere
            name = relative(os.path.join(folder, name), folder)
        text = row[column] if isinstance(row.get(column), str) else ""
        pair = Pair(files.get(name, ""), " ".join(text.split()))
        reason = ("file_name leads out of the folder; copy the picture into it"
                  if name.startswith("../") else
                  "it has more cells than the header; put quotes around a caption with commas"
                  if None in row else
                  "there is no such file" if not pair.picture else
                  "the caption is empty, or no text" if not pair.caption else
                  "the caption is not in UTF-8; save the table so, README says how"
                  if re.search(r"[\ud800-\udfff]", text) else
                  "an earlier row is the same; they count once" if pair in pairs else "")
        if reason:
            skipped.append((f"{path}, row {number}: {printable(name)}", reason))
        else:
            pairs[pair] = None  # a dict, for its order
        named.add(name)
    skipped += [(file, f"is not in {path}") for name, file in files.items() if name not in named]
    return list(pairs)


def find_pairs(folder: str, named: int = NAMED) -> tuple[list[Pair], list[Skipped]]:
    """The pairs in whichever layout `folder` has, and what is not used. Raises UserError."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder!r}. Name the one with pictures and captions.")
    there = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    found, skipped = [name for name in LAYOUTS if name in there] or [""], []
    if len(found) > 1:
        raise UserError(f"there are {' and '.join(found)} in {folder!r}; captions come from one "
                        "place. Move the other out of it.")
    pairs = (read_table(os.path.join(folder, *found), skipped) if found[0] in TABLES
             else read_names(folder, found == [""], skipped))
    skipped = sorted((path, "a table is read in the folder itself alone: name this one for it"
                      if os.path.basename(path) in TABLES else reason) for path, reason in skipped)
    if not pairs:
        print_skipped(skipped, named)
        near = [f"{other!r}: rename it to {name!r}" for name in ("caption", "Image")
                for other in there if found[0] not in TABLES
                and other != name and other.lower().rstrip("s") == name.lower()]
        names = ", ".join(near or map(repr, there[:NAMED])) or "nothing"
        raise UserError(f"no picture in {folder!r} has a caption. There is {names}. Captions are "
                        "read from caption/<name>.txt for the pictures in Image/<name>/, or from "
                        "metadata.csv (file_name,text), or from <name>.txt beside <name>.jpg.")
    print(f"layout of {printable(folder)}: {LAYOUTS[found[0]]}")
    return sorted(pairs), skipped


def find_copies(pictures: set[str], others: set[str]) -> list[str]:
    """Those of `pictures` that are, byte for byte, one of `others`."""
    there = {path for path in pictures | others
             if os.path.isfile(path) and os.access(path, os.R_OK)}
    sizes = {os.path.getsize(path) for path in pictures & there}
    digests = {path: hashlib.sha256(Path(path).read_bytes()).digest()
               for path in there if os.path.getsize(path) in sizes}
    known = {digests[path] for path in others & digests.keys()}
    return sorted(path for path in pictures & digests.keys() if digests[path] in known)


def print_skipped(skipped: list[Skipped], named: int = NAMED) -> None:
    """Counts what is not used, and names the first `named` ones."""
    if skipped:
        print(f"not used: {len(skipped)}")
    for path, reason in skipped[:named]:
        print(f"  {printable(path)}: {printable(reason)}")
    if len(skipped) > named:
        print(f"  and {len(skipped) - named} more; --check lists all")


# ---- Pictures -----------------------------------------------------------------------------------


def read_picture(path: str, side: int) -> Image.Image:
    """A picture as RGB: upright, its first frame, transparency over white, 16-bit grey as 8-bit.

    JPEGs far larger than `side` pixels are decoded at a reduced scale, never below twice `side`.
    Raises whatever Pillow's decoders raise on damaged files, which is a dozen kinds.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("is not a file")  # a pipe would block for ever
    with Image.open(path, formats=PICTURE_FORMATS) as picture:
        picture.draft(None, (2 * side, 2 * side))
        upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):
        grey = np.asarray(upright).astype(np.float32) / 257
        upright = Image.fromarray(grey.round().astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise ValueError("has 32 bits for each pixel; save it with 8 or 16")
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")


def decode(paths: list[str], image_processor: Any) -> tuple[dict[str, Any], list[Skipped]]:
    """Pixel values, (3, height, width), or None without a processor; and what can't be read."""
    pixels, skipped, side = {}, [], image_processor.size["height"] if image_processor else 224
    for path in paths:
        try:
            picture = read_picture(path, side)
            pixels[path] = image_processor(picture).pixel_values[0] if image_processor else None
        except UnidentifiedImageError:
            skipped.append((path, f"is none of {', '.join(PICTURE_FORMATS)}; save it as JPEG"))
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            skipped.append((path, f"can't be read: {reason}"))
    return pixels, skipped


def read_pictures(paths: Sequence[str], image_processor: Any, workers: int, title: str,
                  skipped: list[Skipped]) -> Iterator[dict[str, np.ndarray]]:
    """What can be read, in order, about INFERENCE_BATCH at a time; the rest is added to `skipped`.

    By threads: Pillow and NumPy leave the GIL. At most two batches for each wait to be taken.
    """
    bar = tqdm(total=len(paths), desc=title, unit="picture", disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        tasks = (pool.submit(decode, paths[i : i + INFERENCE_BATCH], image_processor)
                 for i in range(0, len(paths), INFERENCE_BATCH))
        waiting = deque(itertools.islice(tasks, 2 * workers))
        try:
            while waiting:
                pixels, broken = waiting.popleft().result()
                waiting.extend(itertools.islice(tasks, 1))
                skipped += broken
                if pixels:
                    yield pixels
                bar.update(len(pixels) + len(broken))
        finally:
            pool.shutdown(cancel_futures=True)


# ---- The captioner: BLIP-2 on its device --------------------------------------------------------


class Row(NamedTuple):
    """A pair as it is learned."""

    features: torch.Tensor  # the Q-Former's output, (num_query_tokens, hidden)
    learned: list[int]  # ids of the caption and the stop token


def has_kernels(major: int, minor: int, architectures: list[str]) -> bool:
    """Whether a PyTorch built for these (torch.cuda.get_arch_list()) runs on such a GPU.

    sm_80 runs on 8.0 to 8.9; compute_80 is compiled for any newer one.
    """
    built = [(kind, divmod(int(number), 10)) for kind, number
             in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures))]
    return any(which <= (major, minor) and (kind == "compute" or which[0] == major)
               for kind, which in built)


def choose_device(device: str, dtype: str, is_t5: bool,
                  size: int) -> tuple[torch.device, torch.dtype, str]:
    """The one decision about both, with its reason; `size` in parameters. Raises UserError."""
    state, major, reason = PartialState(), 0, "as DEVICE says"
    if device.startswith("cuda:") and state.num_processes > 1:
        raise UserError(f"DEVICE is {device!r}, but each process takes a GPU of its own: say auto.")
    if device != "cpu":
        try:
            index = int(device[5:] or state.local_process_index)
            major, minor = torch.cuda.get_device_capability(index)
            reason = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
            built = torch.cuda.get_arch_list()
            if torch.version.hip is None and not has_kernels(major, minor, built):
                raise UserError(f"this PyTorch is compiled for {built}, and not for the GPU "
                                f"({reason}). Install one for an older CUDA, or say --device cpu.")
            device = f"cuda:{index}"
        except (AssertionError, RuntimeError) as error:  # PyTorch says why there is none
            reason = f"no GPU: {str(error).splitlines()[0].rstrip('.')}"
            if device != "auto" or size > CPU_PARAMETERS:
                raise UserError(f"DEVICE is {device!r}, but there is {reason}. Mend that, or say "
                                "--device cpu, which is slow with a large model.") from error
            device = "cpu"
    if dtype == "auto":  # is_bf16_supported() is true by emulation on older GPUs
        dtype = "bfloat16" if major >= 8 else "float16" if major and not is_t5 else "float32"
    if dtype == "float16" and (device == "cpu" or is_t5):
        raise UserError("DTYPE float16 is for OPT on a GPU; T5 overflows in it. Set it to auto; a "
                        "run that began in it continues on a GPU, or anew by --restart.")
    return torch.device(device), getattr(torch, dtype), reason


class Captioner:
    """The model in eval mode, frozen but for LoRA, and how a pair is laid out for it.

    OPT:     picture, BOS, prompt, caption, newline: one text, of which the last two are learned
    Flan-T5: picture, prompt, </s> for the encoder; caption, </s> from the decoder are learned
    """

    def __init__(self, model: Blip2ForConditionalGeneration, processor: Blip2Processor,
                 prompt: str, limit: int, beams: int) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.device, self.dtype = model.device, model.language_projection.weight.dtype
        text = model.config.text_config
        self.is_t5, self.pad = text.model_type == "t5", text.pad_token_id
        self.stop = text.eos_token_id  # OPT: a newline, not its tokenizer's </s>
        self.limit, self.beams = limit, beams  # tokens of a caption; of the search for one
        self.prefix = self.tokenizer(prompt, split_special_tokens=True).input_ids  # </s> is a word
        self.space = " " if prompt and not self.is_t5 else ""  # a T5's decoder begins anew
        other = "" if self.dtype == torch.float32 else ", or set DTYPE to float32"
        self.remedy = (f"Lower LEARNING_RATE{other}, and say --restart. If that does not help, "
                       "delete .features in TRAIN_DIR: a damaged file looks like this too.")

    def tokenize(self, caption: str) -> list[int]:
        """The ids of a caption, uncut and without the stop token."""
        return self.tokenizer(self.space + caption, add_special_tokens=False,
                              split_special_tokens=True).input_ids

    def send(self, values: Sequence | torch.Tensor) -> torch.Tensor:
        """To the device, through pinned memory, so that nothing waits."""
        tensor = torch.as_tensor(values)
        tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return tensor.to(self.device, non_blocking=True)

    @torch.no_grad()
    def encode(self, pixel_values: list[np.ndarray]) -> torch.Tensor:
        """(3, height, width) each, to the Q-Former's (pictures, num_query_tokens, hidden), CPU."""
        pixels = self.send(np.stack(pixel_values)).to(self.dtype)
        features = self.model.get_image_features(pixels).qformer_outputs[0]
        return features.to(self.dtype).cpu()  # the Q-Former stays in float32 beside float16

    def embed(self, features: Sequence[torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
        """What the language model reads, (rows, tokens, width): projected features, then text."""
        image = self.model.language_projection(self.send(torch.stack(list(features))))
        text = self.model.get_input_embeddings()(input_ids.view(len(image), -1))
        return torch.cat([image.to(text.dtype), text], dim=1)

    def losses(self, rows: Sequence[Row]) -> torch.Tensor:
        """Cross-entropy in float32, summed over each row's learned tokens, (rows,)."""
        features, learned = zip(*rows, strict=True)
        longest = max(len(ids) for ids in learned)
        padded = [ids + [self.pad] * (longest - len(ids)) for ids in learned]
        if self.is_t5:  # one prefix for all, so that there is no padding to mask
            start = self.model.config.text_config.decoder_start_token_id
            text, answers = [self.prefix] * len(rows), [[start, *ids[:-1]] for ids in padded]
            width, first = longest, 0
        else:  # causal: padding on the right needs no mask; a token is predicted before it
            text, answers = [self.prefix + ids for ids in padded], []
            width = len(features[0]) + len(text[0])
            first = width - longest - 1
        # A mask or a count on the device would be waited for: all is made here, and sent at once.
        flat = itertools.chain.from_iterable
        numbers = [
            list(flat(text)), list(flat(answers)), list(flat(learned)),
            # where each learned token is predicted, and whose it is
            [row * width + first + i for row, ids in enumerate(learned) for i in range(len(ids))],
            [row for row, ids in enumerate(learned) for _ in ids]]
        sent = self.send(list(flat(numbers))).split([len(some) for some in numbers])
        input_ids, decoder_ids, targets, positions, owners = sent
        model, inputs = self.model.language_model, self.embed(features, input_ids)
        if self.is_t5:
            states = model(inputs_embeds=inputs, decoder_input_ids=decoder_ids.view(len(rows), -1),
                           use_cache=False).logits
        else:
            states = model.model.decoder(inputs_embeds=inputs, use_cache=False)[0]
        logits = states.flatten(0, 1).index_select(0, positions)
        logits = logits if self.is_t5 else model.lm_head(logits)
        each = F.cross_entropy(logits.float(), targets, reduction="none")
        return each.new_zeros(len(rows)).index_add(0, owners, each)

    @torch.no_grad()
    def caption(self, features: Sequence[torch.Tensor]) -> list[tuple[str, float]]:
        """Captions for pictures, (num_query_tokens, hidden) each, and how sure the model is.

        That is the geometric mean of the probabilities of the ids, stop token included.
        """
        inputs = self.embed(features, self.send(self.prefix * len(features)))
        output = self.model.language_model.generate(
            inputs_embeds=inputs, attention_mask=torch.ones_like(inputs[..., 0], dtype=int),
            max_new_tokens=self.limit + 1, do_sample=False, num_beams=self.beams,
            eos_token_id=self.stop, pad_token_id=self.pad).tolist()
        output = [ids[self.is_t5 :] for ids in output]  # what a T5's decoder starts with
        output = [ids[: ids.index(self.stop) + 1] if self.stop in ids else ids for ids in output]
        losses = self.losses([Row(*row) for row in zip(features, output, strict=True)]).tolist()
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [(" ".join(text.split()), math.exp(-loss / len(ids)))
                for text, loss, ids in zip(texts, losses, output, strict=True)]


def load_captioner(settings: argparse.Namespace) -> Captioner:
    """BLIP-2 from safetensors, without foreign code. Raises UserError."""
    model_id, in_4bit = settings.MODEL_ID, settings.LOAD_IN_4BIT
    print(f"model: {printable(model_id)}")
    try:
        config = transformers.AutoConfig.from_pretrained(model_id, trust_remote_code=False)
        text = getattr(config, "text_config", config)
        kind = (config.architectures or ["Blip2ForConditionalGeneration"])[0]
        if (config.model_type, kind) != ("blip-2", "Blip2ForConditionalGeneration") or (
                text.model_type not in ("opt", "t5")):
            raise ValueError(f"it is a {config.model_type} ({kind}, {text.model_type}), not a "
                             "BLIP-2 that writes captions with OPT or Flan-T5")
        with torch.device("meta"):
            size = Blip2ForConditionalGeneration(config).num_parameters()
        device, dtype, reason = choose_device(settings.DEVICE, settings.DTYPE,
                                              text.model_type == "t5", size)
        print(f"device: {device}, {str(dtype).removeprefix('torch.')} ({reason})")
        # The Pillow class by name: the automatic one depends on whether torchvision is installed.
        image_processor = transformers.BlipImageProcessorPil.from_pretrained(model_id)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
        processor = Blip2Processor(image_processor, tokenizer, config.num_query_tokens)
        nf4 = transformers.BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
        model, loading = Blip2ForConditionalGeneration.from_pretrained(
            model_id, dtype=dtype, quantization_config=nf4 if in_4bit else None,
            device_map={"": device}, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True)  # they are an error here
        if wrong := sorted(map(str, loading["missing_keys"] | loading["mismatched_keys"])):
            raise ValueError(f"weights are missing or of another shape: {wrong[0]}")
    except Exception as error:  # missing and damaged files raise a dozen kinds
        if isinstance(error, UserError) or re.search(OUT_OF_MEMORY, str(error)):
            raise
        why = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"can't load MODEL_ID {model_id!r}: {why}. Check name and network; a "
                        "private model needs `hf auth login`.") from error
    for module in model.modules():
        # With avx512_bf16, bitsandbytes would repack 4-bit weights in place in the first forward
        # pass without gradients, for inference only: training on them is wrong from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if device.type == "cpu" and size < TINY_PARAMETERS:
        torch.set_num_threads(1)
    print(f"memory: {model.get_memory_footprint() / 1e9:.3g} GB for the weights")
    model.eval().requires_grad_(False)
    captioner = Captioner(model, processor, settings.PROMPT, settings.MAX_CAPTION_TOKENS,
                          settings.NUM_BEAMS)
    room = getattr(text, "max_position_embeddings", math.inf)
    if config.num_query_tokens + len(captioner.prefix) + captioner.limit + 1 > room:
        raise UserError(f"picture, PROMPT and MAX_CAPTION_TOKENS = {captioner.limit} need more "
                        f"than the {room} positions of this model. Lower MAX_CAPTION_TOKENS.")
    return captioner


def add_lora(model: Blip2ForConditionalGeneration, targets: str, rank: int, alpha: float,
             dropout: float) -> PeftModel:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) put into `model` where `targets` matches names.

    Raises UserError where that is nowhere, or outside the language model's linear layers.
    """
    pattern = LORA_PATTERNS.get(targets, targets)
    linear = {name for name, module in model.language_model.named_modules(prefix="language_model")
              if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")}
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    if not matched or matched - linear:
        kinds = sorted({re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) for name in linear})
        raise UserError("\n  ".join([
            f"LORA_TARGETS {targets!r} must be attention, all-linear, or match some of these:",
            *kinds, f"and nothing else. Now it matches {sorted(matched)[:3] or 'nothing'}."]))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)
    adapter = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    count, _ = adapter.get_nb_trainable_parameters()
    print(f"LoRA: {count:,} weights, of rank {rank}, on {len(matched)} linear layers")
    return adapter


# ---- Features: what the frozen vision side says of a picture, computed once ---------------------


def hash_vision_side(captioner: Captioner) -> str:
    """Of all that changes the features: weights, processor, dtype, decoding."""
    words = [captioner.dtype, DECODING, captioner.processor.image_processor.to_json_string()]
    for name, tensor in captioner.model.state_dict().items():
        if name.startswith(("vision_model.", "qformer.", "query_tokens")):
            words += [name, tensor.shape, torch.hash_tensor(tensor).item()]
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()[:16]


def feature_folder(train_dir: str, output_dir: str, key: str) -> Path:
    """TRAIN_DIR/.features/<key>, or, where that can't be written, OUTPUT_DIR.features/<key>."""
    folder = Path(train_dir, ".features")
    if not os.access(folder if folder.exists() else train_dir, os.W_OK):
        folder = Path(f"{output_dir}.features")
    (folder / key).mkdir(parents=True, exist_ok=True)
    return folder / key


def picture_key(path: str, root: str) -> str:
    """By these a picture is known again: relative path, size, time of the last change."""
    try:
        state = os.stat(path)
        return f"{relative(path, root)} {state.st_size} {state.st_mtime_ns}"
    except OSError:
        return f"{relative(path, root)} is not there"


def list_features(folder: Path) -> dict[str, tuple[Path, int]]:
    """File and row of the features of each picture_key: what all processes have written."""
    slots = {}
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(SafetensorError), safe_open(file, "pt") as batch:  # damaged:
            for row, key in enumerate(json.loads(batch.metadata()["pictures"])):  # encoded anew
                slots[key] = file, row
    return slots


def encode_pictures(captioner: Captioner, pictures: list[str], root: str, folder: Path,
                    workers: int) -> tuple[dict[str, tuple[Path, int]], list[Skipped]]:
    """Encodes what is not known. Returns where the features of each picture are, and who has none.

    Each batch is a file of its own, so that no two processes write the same one. Raises UserError.
    """
    keys = {picture: picture_key(picture, root) for picture in pictures}
    known, skipped = list_features(folder), []
    new = [picture for picture, key in keys.items() if key not in known]
    print(f"pictures: {len(new)} to encode, {len(keys) - len(new)} known from an earlier run")
    PartialState().wait_for_everyone()  # what one has encoded would be missing in another's list
    processor = captioner.processor.image_processor
    for pixels in read_pictures(share(new), processor, workers, "encoding", skipped):
        features = captioner.encode([*pixels.values()])
        names = json.dumps([keys[picture] for picture in pixels])
        write_whole(folder / f"{uuid.uuid4().hex}.safetensors",
                    save({"features": features}, {"pictures": names}))
    skipped = sorted(gather_object(skipped))  # which also waits for all
    known, broken = list_features(folder), {path for path, _ in skipped}
    if any(key not in known and picture not in broken for picture, key in keys.items()):
        raise UserError(NOT_SHARED)
    return {picture: known[key] for picture, key in keys.items() if key in known}, skipped


load_features = functools.lru_cache(maxsize=4096)(load_file)  # maps a file; reads what is used


# ---- Datasets -----------------------------------------------------------------------------------


class ImageCaptioningDataset:
    """A Row for each pair, and the pictures with all their captions."""

    def __init__(self, pairs: list[Pair], slots: dict, captioner: Captioner) -> None:
        self.pairs, self.slots, self.captioner = pairs, slots, captioner
        self.references = defaultdict(list)  # picture: its captions
        for picture, caption in pairs:
            self.references[picture].append(caption)
        ids = {caption: captioner.tokenize(caption) for caption in {pair.caption for pair in pairs}}
        limit, stop = captioner.limit, captioner.stop
        self.learned = {caption: [*some[:limit], stop] for caption, some in ids.items()}
        self.cut = sum(len(some) > limit for some in ids.values())
        self.unknown = sum(captioner.tokenizer.unk_token_id in some for some in ids.values())
        self.tokens = [len(self.learned[pair.caption]) for pair in pairs]  # learned ones

    def __len__(self) -> int:
        return len(self.pairs)

    def features(self, picture: str) -> torch.Tensor:
        """(num_query_tokens, hidden)."""
        file, row = self.slots[picture]
        return load_features(file)["features"][row]

    def __getitem__(self, index: int) -> Row:
        picture, caption = self.pairs[index]
        return Row(self.features(picture), self.learned[caption])


class Datasets(NamedTuple):
    training: ImageCaptioningDataset
    held_out: ImageCaptioningDataset
    captioned: list[str]  # the held-out pictures that are captioned before and after


def split_pairs(pairs: list[Pair], fraction: float, seed: int,
                root: str) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: all pairs of a picture are on one side.

    Pictures are ranked by a hash of seed and path: a new one does not reshuffle the rest.
    """
    ranked = sorted({pair.picture for pair in pairs}, key=lambda picture: hashlib.sha256(
        f"{seed} {relative(picture, root)}".encode(errors="surrogateescape")).digest())
    count = min(len(ranked) - 1, max(1, round(len(ranked) * fraction))) if fraction else 0
    held_out = set(ranked[:count])
    return ([pair for pair in pairs if pair.picture not in held_out],
            [pair for pair in pairs if pair.picture in held_out])


def build_datasets(settings: argparse.Namespace, captioner: Captioner, data: Data,
                   feature_dir: Path) -> tuple[Datasets, list[Skipped]]:
    """What is trained and measured on, and what can't be read. Raises UserError for nothing."""
    pictures = list(dict.fromkeys(pair.picture for pair in data.pairs + data.validation))
    slots, broken = encode_pictures(captioner, pictures, settings.TRAIN_DIR, feature_dir,
                                    settings.NUM_WORKERS)
    for part in (captioner.model.vision_model, captioner.model.qformer):
        part.to("meta")  # its work is done, and its memory is for training
    print_skipped(data.skipped + broken)
    pairs, validation = ([pair for pair in some if pair.picture in slots]
                         for some in (data.pairs, data.validation))
    if not pairs or (settings.VALIDATION_DIR and not validation):
        folder = settings.VALIDATION_DIR if pairs else settings.TRAIN_DIR
        raise UserError(f"not one picture in {folder!r} can be read. --check says why.")
    if not settings.VALIDATION_DIR:
        pairs, validation = split_pairs(pairs, settings.VALIDATION_FRACTION, settings.SEED,
                                        settings.TRAIN_DIR)
    training, held_out = (ImageCaptioningDataset(some, slots, captioner)
                          for some in (pairs, validation))
    print(f"pairs: {len(pairs)} to train on, {len(validation)} held out")
    if cut := training.cut + held_out.cut:
        print(f"cut: {cut} captions, at MAX_CAPTION_TOKENS = {captioner.limit} tokens")
    if unknown := training.unknown + held_out.unknown:
        print(f"unknown: {unknown} captions have letters that this language model does not know")
    (features, learned), text = training[0], captioner.tokenizer.decode
    row = f"<image> x {len(features)} | {text(captioner.prefix)} | [{text(learned[:-1])} | "
    print(f"row: {printable(row)}{text(learned[-1:])!r}]  ([...] is learned)")
    most = sys.maxsize if settings.VALIDATION_DIR else GENERATED
    return Datasets(training, held_out, spread(list(held_out.references), most)), broken


# ---- Measuring ----------------------------------------------------------------------------------


def batches(items: Sequence, title: str) -> Iterator[Sequence]:
    """This process's items, INFERENCE_BATCH at a time, with a progress bar."""
    own = share(items)
    for start in tqdm(range(0, len(own), INFERENCE_BATCH), title, disable=None, leave=False):
        yield own[start : start + INFERENCE_BATCH]


@torch.no_grad()
def measure_losses(dataset: ImageCaptioningDataset) -> torch.Tensor:
    """The loss of each pair, summed over its learned tokens, (pairs,), on the CPU."""
    losses = torch.zeros(len(dataset), device=dataset.captioner.device)
    for indices in batches(range(len(dataset)), "measuring"):
        losses[list(indices)] = dataset.captioner.losses([dataset[i] for i in indices])
    return reduce(losses, "sum").cpu()


def held_out_loss(held_out: ImageCaptioningDataset) -> float:
    """Per learned token; NaN with nothing held out. Raises UserError if it is not finite."""
    if not len(held_out):
        return math.nan
    loss = measure_losses(held_out).sum().item() / sum(held_out.tokens)
    if not math.isfinite(loss):
        raise UserError(f"the held-out loss is {loss}. {held_out.captioner.remedy}")
    return loss


def caption_held_out(datasets: Datasets) -> list[tuple[str, float]]:
    """A caption and its confidence for each picture that is captioned."""
    captions, held_out = {}, datasets.held_out
    for pictures in batches(datasets.captioned, "captioning"):
        texts = held_out.captioner.caption([held_out.features(path) for path in pictures])
        captions |= zip(pictures, texts, strict=True)
    captions = dict(gather_object(list(captions.items())))
    return [captions[picture] for picture in datasets.captioned]


class Captioned(NamedTuple):
    """A held-out picture: a row of held_out.csv."""

    picture: str
    references: list[str]  # all its captions
    before: str
    after: str
    confidence: float  # in the one after


def count_ngrams(caption: str) -> Counter:
    """Its n-grams of one to four words."""
    words = re.findall(r"\w+(?:'\w+)?", caption.lower())
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def cider_d(captions: list[str], references: list[list[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) of captions, as coco-caption computes it.

    `references` are those of each picture; idf is taken from them. 0 where it can say nothing.
    """
    counts = [[count_ngrams(text) for text in texts] for texts in references]
    documents = Counter(gram for texts in counts for gram in set().union(*texts))

    def compare(ours: Counter, theirs: Counter) -> float:
        """The mean over n of the clipped cosine, less where lengths, in pairs of words, differ."""
        total, lengths = 0.0, [sum(len(gram) == 2 for gram in grams.elements())
                               for grams in (ours, theirs)]
        for n in range(1, 5):
            mine, other = (
                {gram: count * math.log(len(references) / max(1, documents[gram]))
                 for gram, count in grams.items() if len(gram) == n} for grams in (ours, theirs))
            norms = math.hypot(*mine.values()) * math.hypot(*other.values())
            dot = sum(min(mine[gram], x) * x for gram, x in other.items() if gram in mine)
            total += dot / norms if norms else 0.0
        return total / 4 * math.exp(-((lengths[0] - lengths[1]) ** 2) / 72)

    scores = [sum(compare(count_ngrams(caption), text) for text in texts) / len(texts)
              for caption, texts in zip(captions, counts, strict=True)]
    return 10 * sum(scores) / len(scores)


def measure(rows: list[Captioned], when: str) -> dict[str, float | None]:
    """The share of captions equal to a reference, and CIDEr-D; None where they say nothing."""
    captions, references = [getattr(row, when) for row in rows], [row.references for row in rows]
    exact = [text in texts for text, texts in zip(captions, references, strict=True)]
    alike = len({text for texts in references for text in texts}) < 2
    return {"exact": sum(exact) / len(exact) if exact else None,
            "cider_d": None if alike or len(rows) < 2 else cider_d(captions, references)}


# ---- Training -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` pairs in an epoch: a pure function."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def learning_rate(step: int, steps: int, highest: float, warmup_fraction: float) -> float:
    """Linear warm-up, above zero at step 0, then a cosine to zero."""
    warmup = round(steps * warmup_fraction)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    return highest * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within, the first Ctrl-C or SIGTERM is noted in the list. A second one kills at once."""
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        noted.append(number)
        os.write(2, b"\nstopping after this step; once more stops at once\n")
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Learner:
    """LoRA's weights and all that changes them.

    AdamW works on one float32 vector, `master`. The weights are parts of it, or, in a model of
    another dtype, copies of its parts.
    """

    def __init__(self, captioner: Captioner, adapter: PeftModel, weight_decay: float) -> None:
        self.captioner, self.adapter = captioner, adapter
        named = {n: weight for n, weight in adapter.named_parameters() if weight.requires_grad}
        self.weights = list(named.values())
        flat = torch.cat([weight.detach().flatten().float() for weight in self.weights])
        self.master = torch.nn.Parameter(flat)
        self.master.grad = torch.zeros_like(flat)
        parts = flat.split([weight.numel() for weight in self.weights])
        self.parts = [part.view_as(w) for part, w in zip(parts, self.weights, strict=True)]
        self.state_dict = dict(zip(named, self.parts, strict=True))  # for PEFT to save
        for weight, part in zip(self.weights, self.parts, strict=True):
            weight.data = part.to(captioner.dtype)
        self.dropouts = torch.nn.ModuleList(
            module for name, module in adapter.named_modules() if ".lora_dropout." in name)
        self.optimizer = torch.optim.AdamW([self.master], weight_decay=weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(captioner.device.type,
                                           enabled=captioner.dtype == torch.float16)

    def backward(self, rows: list[Row], tokens: int, micro_batch: int) -> torch.Tensor | None:
        """The gradient of loss / tokens, into master.grad, however the rows are split.

        Returns each row's loss, (rows,); None: out of memory, and there is something to halve.
        """
        losses = [torch.zeros(0, device=self.captioner.device)]
        self.master.grad.zero_()
        self.dropouts.train()  # all else stays in eval mode: frozen layers have dropout too
        try:
            for start in range(0, len(rows), micro_batch):
                some = self.captioner.losses(rows[start : start + micro_batch])
                loss = self.scaler.scale(some.sum() / tokens)
                gradients = torch.autograd.grad(loss, self.weights)
                self.master.grad += torch.cat([gradient.flatten() for gradient in gradients])
                losses.append(some.detach())
        except RuntimeError as error:
            if not re.search(OUT_OF_MEMORY, str(error)) or min(micro_batch, len(rows)) == 1:
                raise
            return None  # and the traceback, which held all activations, is gone
        finally:
            self.dropouts.eval()
        return torch.cat(losses)

    def add_up(self, losses: torch.Tensor | None, pairs: int, stop: bool) -> list[float]:
        """Over all processes: losses of pairs, who is out of memory, who stops; the norm.

        Here a step waits for the GPU, once.
        """
        told = torch.zeros(pairs + 2, device=self.master.device)
        told[pairs:].copy_(self.captioner.send([losses is None, stop]))
        if losses is not None:
            share(told[:pairs]).copy_(losses)
        self.master.grad.copy_(reduce(self.master.grad, "sum"))
        norm = self.master.grad.norm() / self.scaler.scale(torch.ones_like(told[:1]))
        return torch.cat([reduce(told, "sum"), norm]).tolist()

    def step(self, rate: float, norm: float, max_norm: float) -> None:
        """Of AdamW; GradScaler leaves it out if the norm is not finite, and scales less then."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        if max_norm:
            self.master.grad *= min(1.0, max_norm / (norm + 1e-6))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.copy_parts()

    @torch.no_grad()
    def copy_parts(self) -> None:
        """From `master` to the weights; in float32 they are the same memory."""
        torch._foreach_copy_(self.weights, self.parts)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint keeps of it."""
        return {"master": self.master.detach().clone(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """The opposite."""
        self.master.data.copy_(state["master"])
        self.copy_parts()
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@dataclasses.dataclass
class Progress:
    """Where a run is, beside the state of its learner."""

    captions: list[str]  # of the held-out pictures that are captioned, before
    metrics: list[dict[str, float]]  # the rows of metrics.csv
    pair_losses: torch.Tensor  # (training pairs,), summed over tokens and epochs
    micro_batch: int = sys.maxsize  # the most pairs at a time
    step: int = 0  # the next one
    best: float = math.inf  # held-out loss
    best_step: int = 0  # the step after which it was measured
    best_master: torch.Tensor | None = None


def train(settings: argparse.Namespace, learner: Learner, datasets: Datasets, now: Progress,
          run: "Run") -> None:
    """The training loop, from `now` on; then the weights are those of the lowest held-out loss.

    Raises UserError on a loss that is not finite; KeyboardInterrupt after a signal, when the step
    is done and saved.
    """
    state, dataset = PartialState(), datasets.training
    epoch_steps = math.ceil(len(dataset) / settings.BATCH_SIZE)
    steps = epoch_steps * settings.EPOCHS
    print(f"steps: {steps}, {epoch_steps} an epoch" + f", {now.step} done" * bool(now.step))
    if steps < FEW_STEPS:
        print(f"  perhaps too few to learn: try EPOCHS = {math.ceil(FEW_STEPS / epoch_steps)}")
    saved, pause = time.monotonic(), 60 * settings.CHECKPOINT_MINUTES or math.inf
    bar = tqdm(total=steps, initial=now.step, desc="training", unit="step", disable=None)
    with bar, noted_signals() as signals:
        while now.step < steps:
            started, (epoch, done) = time.perf_counter(), divmod(now.step, epoch_steps)
            order = epoch_order(len(dataset), settings.SEED, epoch)[done * settings.BATCH_SIZE :]
            pairs = sorted(order[: settings.BATCH_SIZE], key=lambda i: -dataset.tokens[i])
            rows, tokens = [dataset[i] for i in share(pairs)], sum(dataset.tokens[i] for i in pairs)
            while True:  # until the step fits into memory
                torch.manual_seed((settings.SEED * 1_000_003 + now.step) * state.num_processes
                                  + state.process_index)  # of the dropout
                losses = learner.backward(rows, tokens, now.micro_batch)
                *losses, short, stop, norm = learner.add_up(losses, len(pairs), bool(signals))
                if not short:
                    break
                most = min(now.micro_batch, math.ceil(len(pairs) / state.num_processes))
                now.micro_batch = math.ceil(most / 2)
                torch.cuda.empty_cache()
                tqdm.write(f"out of memory: {now.micro_batch} pairs at a time from now on")
            loss = sum(losses) / tokens
            learnable = math.isfinite(norm) or learner.scaler.get_scale() > 1
            if not (math.isfinite(loss) and learnable):
                names = ", ".join(printable(dataset.pairs[i].picture) for i in pairs[:NAMED])
                raise UserError(f"at step {now.step + 1} the loss is {loss}, the norm of its "
                                f"gradient {norm}, with {names}. {learner.captioner.remedy}")
            rate = learning_rate(now.step, steps, settings.LEARNING_RATE, settings.WARMUP_FRACTION)
            learner.step(rate, norm, settings.MAX_GRAD_NORM)
            now.step += 1
            now.pair_losses[pairs] += torch.tensor(losses)
            seconds, after = time.perf_counter() - started, math.nan
            if ended := now.step % epoch_steps == 0:
                after = held_out_loss(datasets.held_out)
                if not after >= now.best:  # with nothing held out, the last is kept
                    now.best, now.best_step = after, now.step
                    now.best_master = learner.master.detach().clone()
            now.metrics.append(dict(zip(METRICS, (
                now.step, epoch + 1, rate, loss, after, norm, len(pairs) / seconds,
                now.metrics[-1]["seconds"] + seconds), strict=True)))
            run.log(now.metrics[-1])
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if ended:
                mean = sum(row["train_loss"] for row in now.metrics[-epoch_steps:]) / epoch_steps
                best = " (best)" * (now.best_step == now.step)
                tqdm.write(f"epoch {epoch + 1}/{settings.EPOCHS}: loss {mean:.4f}"
                           + f", held-out loss {after:.4f}{best}" * math.isfinite(after))
            if ended or stop or time.monotonic() > saved + pause:
                run.save(now, learner)
                saved = time.monotonic()
            if stop:
                state.wait_for_everyone()  # a launcher may kill all when the first one ends
                raise KeyboardInterrupt(*signals[:1])
        if signals and state.num_processes == 1:  # in the last step; others would wait for this one
            raise KeyboardInterrupt(*signals[:1])
    learner.master.data.copy_(now.best_master)
    learner.copy_parts()


# ---- What a run leaves --------------------------------------------------------------------------


def save_adapter(folder: Path, record: dict[str, Any], learner: Learner) -> None:
    """What --caption needs, PEFT and transformers; the weights in float32."""
    learner.adapter.save_pretrained(folder, state_dict=learner.state_dict,
                                    save_embedding_layers=False)  # else PEFT asks the Hub
    learner.captioner.processor.save_pretrained(folder)
    write_whole(folder / "settings.json", (json.dumps(record, indent=2) + "\n").encode())


def list_pairs(split: str, dataset: ImageCaptioningDataset, losses: torch.Tensor) -> list[tuple]:
    """Rows of pairs.csv: split, loss per token, tokens, picture, caption; highest loss first."""
    rows = [(split, round(loss / count, 4), count, *pair) for pair, loss, count
            in zip(dataset.pairs, losses.tolist(), dataset.tokens, strict=True)]
    return sorted(rows, key=lambda row: -row[1])


def summarize(rows: list[Captioned], datasets: Datasets, now: Progress) -> dict[str, Any]:
    """`results` of settings.json, with `remarks` on what is wrong. None: nothing can be said."""
    before, after = measure(rows, "before"), measure(rows, "after")
    measures = {name: {"before": before[name], "after": after[name]} for name in before}
    loss = {"before": now.metrics[0]["held_out_loss"], "after": now.best} if rows else (
        dict.fromkeys(("before", "after")))
    alike, alike_references = (max(Counter(texts).values(), default=0) for texts in (
        [row.after for row in rows], [row.references[0] for row in rows]))
    unchanged = bool(rows) and after["exact"] < 1 and all(row.after == row.before for row in rows)
    remarks = {
        "nothing is held out, so that nothing can be measured": not rows,
        "CIDEr-D is '-': it needs two held-out pictures or more, with captions that differ":
            bool(rows) and after["cider_d"] is None,
        "the held-out loss is not below that before training: lower LEARNING_RATE, or add pictures":
            bool(rows) and not loss["after"] < loss["before"],
        "no held-out caption has changed: raise EPOCHS or LEARNING_RATE": unchanged,
        "nearly all held-out captions are alike: lower LEARNING_RATE, and look at held_out.csv":
            alike >= 0.9 * len(rows) > alike_references and not unchanged}
    return {"training_pairs": len(datasets.training), "held_out_pairs": len(datasets.held_out),
            "captioned": len(rows), "steps": now.step, "best_step": now.best_step,
            "seconds": round(now.metrics[-1]["seconds"], 1), "held_out_loss": loss, **measures,
            "remarks": [remark for remark, holds in remarks.items() if holds]}


def describe_results(results: dict[str, Any]) -> dict[str, str]:
    """As they are printed, drawn and put into the card."""
    shown = {name: str(value) for name, value in results.items() if name != "remarks"}
    for name in ("held_out_loss", "exact", "cider_d"):
        before, after = results[name].values()
        shown[name] = "-" if before is None else f"{before:.4f} before, {after:.4f} after"
    if count := results["captioned"]:
        before, after = (round(part * count) for part in results["exact"].values())
        shown["exact"] = f"{before} before, {after} after, of {count}"
    return shown


def draw_report(folder: Path, record: dict[str, Any]) -> None:
    """report.png: the losses in metrics.csv; pictures of held_out.csv with their captions."""
    from matplotlib.figure import Figure  # takes a second

    rows = spread(read_csv(folder / "held_out.csv"), min(12, record["settings"]["SAMPLE_COUNT"]))
    lines = math.ceil(len(rows) / 2)
    figure = Figure(figsize=(13, 4 + 1.8 * lines), layout="constrained")
    grid = figure.add_gridspec(1 + lines, 4, height_ratios=[4, *[1.8] * lines],
                               width_ratios=[1.8, 4.7] * 2)
    losses, metrics = figure.add_subplot(grid[0, :]), read_csv(folder / "metrics.csv")
    for name, style, label in (("train_loss", ".-", "training"),
                               ("held_out_loss", "o-", "held out")):
        points = [(int(row["step"]), float(row[name])) for row in metrics if row[name]]
        if points:
            losses.plot(*zip(*points, strict=True), style, lw=1, ms=5, label=label)
    losses.plot(0, 0)  # nothing to see, but room above the highest
    losses.locator_params("x", integer=True)
    losses.set(xlabel="step", ylabel="loss per token", ylim=(0, None),
               title="held-out loss: {held_out_loss}; exact: {exact}; CIDEr-D: {cider_d}".format(
                   **describe_results(record["results"])))
    losses.legend(frameon=False)
    losses.spines[["top", "right"]].set_visible(False)
    for number, row in enumerate(rows):
        picture, words = (figure.add_subplot(grid[1 + number // 2, number % 2 * 2 + column])
                          for column in (0, 1))
        picture.axis("off")
        words.axis("off")
        with contextlib.suppress(Exception):  # it is gone by now
            picture.imshow(read_picture(row["picture"], 224))
        references, height = json.loads(row["references"]), 1.0
        after = ("✓", "tab:green") if row["after"] in references else ("✗", "tab:red")
        for text, color in ((f"caption: {' / '.join(references)}", "black"),
                            (f"before: {row['before']}", "gray"),
                            (f"{after[0]} after: {row['after']}", after[1])):
            wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in text)
            wrapped = textwrap.wrap(text, 24 if wide else 48, max_lines=3, placeholder=" ...")
            words.text(0, height, "\n".join(wrapped), color=color, family=FONTS, va="top",
                       parse_math=False, transform=words.transAxes, in_layout=False, clip_on=True)
            height -= 0.105 * len(wrapped) + 0.03
    with io.BytesIO() as drawn, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a line for every letter that no font has
        figure.savefig(drawn, format="png")
        write_whole(folder / "report.png", drawn.getvalue())


CARD = """---
{metadata}
---

# BLIP-2 captions: {name}

A LoRA adapter for `{base}`, whose language model was loaded in {loaded}.

| | |
|---|---|
{results}
{remarks}
![Losses, and held-out pictures with their caption, that before and that after](report.png)

## Load it

```python
import torch
from peft import PeftModel
from PIL import Image
from transformers import BitsAndBytesConfig, Blip2ForConditionalGeneration, Blip2Processor

folder = {name!r}  # where this is, or its name on the Hub
dtype = torch.{dtype}
quantization = {quantization}
processor = Blip2Processor.from_pretrained(folder)
base = Blip2ForConditionalGeneration.from_pretrained(
    {base!r}, dtype=dtype, quantization_config=quantization, device_map="auto")
model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()

picture = Image.open("picture.jpg").convert("RGB")
inputs = processor(images=picture, text={prompt!r}, return_tensors="pt").to(base.device, dtype)
ids = model.generate(**inputs, max_new_tokens={tokens}){cut}
print(processor.decode(ids[0], skip_special_tokens=True).strip())
```

The licence of the base model holds for what is made from it; that of OPT is for research only.
"""


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """README.md: a model card for the Hub."""
    settings, base = record["settings"], record["settings"]["MODEL_ID"]
    metadata = ModelCardData(
        base_model=None if os.path.isabs(base) else base, library_name="peft", license="other",
        pipeline_tag="image-to-text", tags=["blip-2", "lora", "image-captioning"])
    nf4 = ",\n".join(f"    {name}={value!r}" for name, value in NF4.items())
    card = CARD.format(
        metadata=metadata.to_yaml(), name=Path(os.path.abspath(settings["OUTPUT_DIR"])).name,
        base=base, dtype=record["dtype"], prompt=settings["PROMPT"],
        loaded="4 bits" if settings["LOAD_IN_4BIT"] else record["dtype"],
        quantization=f"BitsAndBytesConfig(\n{nf4},\n    bnb_4bit_compute_dtype=dtype)"
        if settings["LOAD_IN_4BIT"] else None,
        results="\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value
                          in describe_results(record["results"]).items()),
        remarks="".join(f"\nTo look at: {remark}.\n" for remark in record["results"]["remarks"]),
        tokens=settings["MAX_CAPTION_TOKENS"] + 1,
        cut='[:, inputs["input_ids"].shape[1] :]' if record["language_model"] == "opt" else "")
    write_whole(folder / "README.md", str(ModelCard(card)).encode(errors="surrogateescape"))


def make_pages(folder: Path, record: dict[str, Any]) -> int:
    """Report and card, where they are missing. Returns the exit code: 1 if one can't be made."""
    code = 0
    for name, make in (("report.png", draw_report), ("README.md", write_card)):
        try:
            if not (folder / name).exists():
                make(folder, record)
        except OSError:  # a full disk: the same command goes on when there is room
            raise
        except Exception as error:  # these must never cost the adapter
            print(f"error: {name} can't be made: {error!r}. The adapter is saved; the same command "
                  "tries again.", file=sys.stderr)
            code = 1
    return code


# ---- Runs: one folder, and one file to continue from, until all is done -------------------------


def fingerprint(settings: argparse.Namespace, data: Data) -> str:
    """Of the pictures' relative paths, their sizes, and the captions."""
    folders = (data.pairs, settings.TRAIN_DIR), (data.validation, settings.VALIDATION_DIR)
    lines = [picture_key(picture, root).rpartition(" ")[0] + "\n" + caption  # without the time
             for pairs, root in folders for picture, caption in pairs]
    digest = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape"))
    return f"{len(lines)} pairs, {digest.hexdigest()[:16]}"


def list_differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes this run another one than the earlier, of what is known now."""
    old, new = (record["settings"] | {
        "pictures or captions": record.get("data"),
        "the vision side of MODEL_ID": record.get("vision_side"),
        "pictures that can't be read": record.get("unreadable")} for record in (earlier, now))
    return [f"{name}: {old.get(name)!r} then, {value!r} now" for name, value in new.items()
            if name not in HARMLESS and value is not None and old.get(name) != value]


def read_record(folder: Path) -> dict[str, Any]:
    """The settings.json of a run, with `results` when it is finished; {}: none, or damaged."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        record = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        return record if isinstance(record.get("settings"), dict) else {}
    return {}


@dataclasses.dataclass
class Run:
    """What a run is known by, and where it writes."""

    output: Path  # OUTPUT_DIR, where it is when it is finished
    folder: Path  # where it is until then
    record: dict[str, Any]  # settings.json
    accelerator: Accelerator

    def put_in_place(self) -> None:
        """Renames a finished run to OUTPUT_DIR, and what was there by the date.

        Raises UserError where something else than a run is there.
        """
        earlier = self.output.exists() and any(self.output.iterdir())
        if earlier and not read_record(self.output):
            raise UserError(f"OUTPUT_DIR {str(self.output)!r} holds files that are not from a run "
                            "of this script. Name another folder, or move them.")
        if (self.folder / "checkpoint.pt").exists() or not read_record(self.folder).get("results"):
            return
        if earlier:
            name = f"{self.output}-{time.strftime('%Y-%m-%d')}"
            names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            self.output.rename(aside)
            print(f"the earlier run is in {printable(aside)} now")
        elif self.output.exists():
            self.output.rmdir()
        self.folder.rename(self.output)

    def find_checkpoint(self, restart: bool) -> dict[str, Any] | None:
        """What to continue from, {} for a new run; None: it is finished. Raises UserError."""
        path, earlier = self.folder / "checkpoint.pt", read_record(self.output)
        if restart or not path.exists():
            same = earlier.get("results") and not list_differences(earlier, self.record)
            return None if same and not restart else {}
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises a dozen kinds
            raise UserError(f"{str(path)!r} is damaged. Put back a copy of it, or give --restart "
                            "to train anew.") from error
        self.refuse_another(checkpoint)
        return checkpoint

    def refuse_another(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError where a checkpoint, {} for none, is that of another run."""
        if changed := checkpoint and list_differences(checkpoint["record"], self.record):
            raise UserError("\n  ".join([
                f"{str(self.folder)!r} holds an unfinished run, and:", *changed, "Set that back to "
                "continue, give --restart to train anew, or name another OUTPUT_DIR."]))

    def log(self, row: dict[str, float]) -> None:
        """A row of metrics.csv, to the tracker."""
        known = {name: value for name, value in row.items() if value == value}  # no NaN
        self.accelerator.log(known, step=row["step"])

    def close_trackers(self) -> None:
        """They hold files in this folder."""
        while self.accelerator.trackers:
            self.accelerator.trackers.pop().finish()

    def save(self, now: Progress, learner: Learner) -> None:
        """First, if it is the best so far, the adapter; then what the run continues from."""
        if not self.accelerator.is_main_process:
            return
        if now.best_step == now.step:
            save_adapter(self.folder, self.record, learner)
        buffer = io.BytesIO()  # of a full disk, torch.save itself has no sentence
        torch.save({"record": self.record, "progress": vars(now), "learner": learner.state()},
                   buffer)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_csv(self.folder / "metrics.csv", [METRICS, *(row.values() for row in now.metrics)])
        write_whole(self.folder / "checkpoint.pt", buffer.getvalue())


def begin(settings: argparse.Namespace, captioner: Captioner, datasets: Datasets,
          checkpoint: dict[str, Any]) -> tuple[Learner, Progress]:
    """A learner, and where it is: at the checkpoint, or {}, at the start."""
    torch.manual_seed(settings.SEED)  # of the adapter's first weights
    adapter = add_lora(captioner.model, settings.LORA_TARGETS, settings.LORA_RANK,
                       settings.LORA_ALPHA, settings.LORA_DROPOUT)
    learner = Learner(captioner, adapter, settings.WEIGHT_DECAY)
    if captioner.device.type == "cuda":  # a backward makes cuBLAS's handles, while there is room
        learner.backward([datasets.training[0]], 1, 1)
    if checkpoint:
        learner.load(checkpoint["learner"])
        return learner, Progress(**checkpoint["progress"])
    before = dict.fromkeys(METRICS, math.nan) | {"step": 0, "epoch": 0, "seconds": 0.0}
    before["held_out_loss"] = held_out_loss(datasets.held_out)
    print(f"held-out loss before: {before['held_out_loss']:.4f}" if len(datasets.held_out)
          else "nothing held out: the last adapter is saved")
    captions = [text for text, _ in caption_held_out(datasets)]
    return learner, Progress(captions, [before], torch.zeros(len(datasets.training)))


def finish(run: Run, learner: Learner, datasets: Datasets, now: Progress,
           skipped: list[Skipped]) -> int:
    """All that a run leaves, to be killed and finished again anywhere. Returns the exit code."""
    losses, captions = measure_losses(datasets.held_out), caption_held_out(datasets)
    if not run.accelerator.is_main_process:
        return 0
    folder, settings, references = run.folder, run.record["settings"], datasets.held_out.references
    save_adapter(folder, run.record, learner)
    pairs = [list_pairs("train", datasets.training, now.pair_losses / settings["EPOCHS"]),
             list_pairs("held out", datasets.held_out, losses)]
    rows = [Captioned(picture, references[picture], before, *after) for picture, before, after
            in zip(datasets.captioned, now.captions, captions, strict=True)]
    record = run.record | {"not_used": len(skipped), "results": summarize(rows, datasets, now)}
    write_csv(folder / "pairs.csv", [("split", "loss", "tokens", "picture", "caption"),
                                     *itertools.chain(*pairs)])
    write_csv(folder / "held_out.csv", [Captioned._fields, *(
        row._replace(references=json.dumps(row.references, ensure_ascii=False)) for row in rows)])
    write_csv(folder / "skipped.csv", [("path", "reason"), *skipped])
    for page in ("report.png", "README.md"):  # PEFT's, or of an earlier try
        (folder / page).unlink(missing_ok=True)
    code = make_pages(folder, record)
    for path in (path for path in folder.iterdir() if path.is_file()):
        shutil.copymode(folder / "settings.json", path)  # safetensors are for their owner alone
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    # All is on the disk: what the run continues from can go.
    write_whole(folder / "settings.json", (json.dumps(record, indent=2) + "\n").encode())
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    run.close_trackers()
    run.put_in_place()
    print_summary(record, rows, pairs)
    print(f"adapter:         {printable(str(run.output))}")
    return code


def print_summary(record: dict, rows: list[Captioned], pairs: list[list[tuple]]) -> None:
    """Some captions, the hardest pairs, and the results."""
    for row in spread(rows, record["settings"]["SAMPLE_COUNT"]):
        print(f"{printable(row.picture)}\n  reference: {printable(' / '.join(row.references))}\n"
              f"  before:    {printable(row.before)}\n  after:     {printable(row.after)}")
    print("highest losses, perhaps wrong captions (pairs.csv has all):")
    for split, loss, _, picture, caption in itertools.chain(*(some[:3] for some in pairs)):
        print(f"  {loss:.3f} {split}, {printable(picture)}: {printable(caption)[:60]}")
    for name, value in describe_results(record["results"]).items():
        print(f"{name + ':':<17}{value}")
    for remark in record["results"]["remarks"]:
        print(f"to look at:      {remark}")


def fine_tune(settings: argparse.Namespace, data: Data) -> int:
    """A run, or the rest of it. Returns the exit code."""
    output = Path(os.path.realpath(settings.OUTPUT_DIR))  # of a link, what it points to
    accelerator = Accelerator(cpu=settings.DEVICE == "cpu", log_with=settings.LOG_WITH or None,
                              project_dir=f"{output}.unfinished")
    record = {"settings": {name: getattr(settings, name) for name in SETTINGS},
              "data": fingerprint(settings, data)}
    run = Run(output, Path(f"{output}.unfinished"), record, accelerator)
    with contextlib.ExitStack() as stack:
        # Not after an error: it would wait for the others, and they for this process.
        stack.push(lambda kind, *_: None if kind and issubclass(kind, Exception)
                   else accelerator.end_training())
        stack.callback(run.close_trackers)
        if accelerator.is_main_process:
            output.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{output}.lock", timeout=0))
            run.put_in_place()
        accelerator.wait_for_everyone()
        checkpoint = run.find_checkpoint(settings.restart)
        seen = gather_object([(run.record, checkpoint and checkpoint["progress"]["step"])])
        if any(list_differences(seen[0][0], other) or at != seen[0][1] for other, at in seen):
            raise UserError(NOT_SHARED)
        if checkpoint is None:
            print(f"this run is finished: its adapter is in {printable(str(output))}. To train "
                  "anew, change a setting or give --restart.")
            return make_pages(output, read_record(output)) if accelerator.is_main_process else 0
        if checkpoint:
            settings.DTYPE = checkpoint["record"]["dtype"]  # whatever this device's would be
        captioner = load_captioner(settings)
        run.record |= {
            "vision_side": hash_vision_side(captioner), "processes": accelerator.num_processes,
            "language_model": captioner.model.config.text_config.model_type,
            "base_commit": getattr(captioner.model.config, "_commit_hash", None),
            "device": str(captioner.device), "dtype": str(captioner.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in PACKAGES}}
        run.refuse_another(checkpoint)
        feature_dir = feature_folder(settings.TRAIN_DIR, str(output), run.record["vision_side"])
        datasets, broken = build_datasets(settings, captioner, data, feature_dir)
        run.record["unreadable"] = [path for path, _ in broken]
        run.refuse_another(checkpoint)
        learner, now = begin(settings, captioner, datasets, checkpoint)
        accelerator.init_trackers("blip2", config=run.record["settings"])
        if not checkpoint and accelerator.is_main_process:
            for name in ("settings.json", "checkpoint.pt"):  # of a run that is given up
                (run.folder / name).unlink(missing_ok=True)
        if not now.step:
            run.log(now.metrics[0])
        train(settings, learner, datasets, now, run)
        return finish(run, learner, datasets, now, data.skipped + broken)


# ---- Commands -----------------------------------------------------------------------------------


def check_pictures(settings: argparse.Namespace, data: Data) -> int:
    """Lists every pair, and what is not used. Returns the exit code: 1 if no pair is left."""
    captions, skipped, readable = defaultdict(list), list(data.skipped), set()
    for picture, caption in data.pairs + data.validation:
        captions[picture].append(caption)
    for pictures in read_pictures(list(captions), None, settings.NUM_WORKERS, "checking", skipped):
        readable.update(pictures)
        for picture in pictures:
            for caption in captions[picture]:
                print(f"{printable(picture)}\t{printable(caption)}")
    print_skipped(skipped, named=sys.maxsize)
    counts = [sum(pair.picture in readable for pair in some) for some in data[:2]]
    print(f"pairs: {sum(counts)}")
    return 0 if all(counts if settings.VALIDATION_DIR else counts[:1]) else 1


def caption_pictures(settings: argparse.Namespace) -> int:
    """Prints path<TAB>caption<TAB>confidence for pictures, and those in folders.

    Adapter, base, prompt and quantization are those in OUTPUT_DIR. All else goes to stderr.
    Returns the exit code: 1 if a picture could not be captioned.
    """
    pictures, skipped, output = {}, [], settings.OUTPUT_DIR  # a dict: each picture once, in order
    for path in settings.caption:
        found = list_files(path, skipped) if os.path.isdir(path) else [path]
        pictures |= dict.fromkeys(
            file for file in found  # captions beside pictures are no pictures
            if file == path or not file.lower().endswith((".txt", ".csv", ".jsonl")))
    if not pictures:
        raise UserError(f"there is no file in {settings.caption}. Name pictures, or folders.")
    print(f"adapter: {printable(output)}", file=sys.stderr)
    try:
        record = json.loads(Path(output, "settings.json").read_text(encoding="utf-8"))
        trained = argparse.Namespace(**record["settings"] | {
            "DEVICE": settings.DEVICE, "NUM_BEAMS": settings.NUM_BEAMS,
            "DTYPE": "auto" if record["dtype"] == "float16" else record["dtype"]})
        load_file(f"{output}/adapter_model.safetensors")  # else peft would look for it on the Hub
        with contextlib.redirect_stdout(sys.stderr):
            captioner = load_captioner(trained)
        PeftModel.from_pretrained(captioner.model, output, torch_device=str(captioner.device),
                                  autocast_adapter_dtype=False)
    except (OSError, KeyError, AttributeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"OUTPUT_DIR {output!r} holds no adapter that can be read: {error}. Train "
                        "one first, or finish a run by its own command.") from error
    processor, workers = captioner.processor.image_processor, settings.NUM_WORKERS
    for pixels in read_pictures(list(pictures), processor, workers, "captioning", skipped):
        texts = captioner.caption(captioner.encode([*pixels.values()]))
        for picture, (text, confidence) in zip(pixels, texts, strict=True):
            tqdm.write(f"{printable(picture)}\t{printable(text)}\t{confidence:.4f}")
    with contextlib.redirect_stdout(sys.stderr):
        print_skipped(skipped, named=sys.maxsize)
    return 1 if skipped else 0


def run_command(settings: argparse.Namespace) -> int:
    """What the settings and flags ask for. Returns the exit code."""
    # Processes wait for each other for a day at most: a download or an encoding pass may be slow.
    state = PartialState(cpu=getattr(settings, "DEVICE", "") == "cpu", timeout=timedelta(days=1))
    if int(os.environ.get("WORLD_SIZE", 1)) > state.num_processes:
        raise UserError("several processes were started, but there is no GPU for them. Mend that, "
                        "or try it with --device cpu.")
    check_settings(settings)
    if settings.caption:
        return caption_pictures(settings)
    named = sys.maxsize if settings.check else NAMED
    pairs, skipped = find_pairs(settings.TRAIN_DIR, named)
    validation, more = (find_pairs(settings.VALIDATION_DIR, named) if settings.VALIDATION_DIR
                        else ([], []))
    data = Data(pairs, validation, skipped + more)
    if copies := find_copies(*({pair.picture for pair in some} for some in (validation, pairs))):
        print(f"warning: {len(copies)} pictures of VALIDATION_DIR are in TRAIN_DIR too, and make "
              f"the held-out loss too good: {', '.join(map(printable, copies[:named]))}")
    if settings.check:
        return check_pictures(settings, data)
    return fine_tune(settings, data)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    errors, who = sys.stderr, ""
    if process := int(os.environ.get("RANK", 0)):  # one of several: the first speaks for all
        who = f"process {process}: "
        sys.stdout = sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):  # file names may be no valid Unicode
        with contextlib.suppress(AttributeError):  # in a notebook
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8",
                               errors="backslashreplace", line_buffering=True)
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="PIL|transformers|peft|matplotlib")

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)  # as Ctrl-C
    try:
        return run_command(parse_arguments(argv))
    except KeyboardInterrupt as interrupt:
        print(f"{who}stopped; a training continues by the same command, without --restart if its "
              "steps had begun", file=errors)
        return 128 + (interrupt.args or (signal.SIGINT,))[0]
    except UserError as error:
        print(f"{who}error: {error}", file=errors)
        return 1
    except BrokenPipeError:  # the reader has had enough: --check | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        said = f"{[kind.__name__ for kind in type(error).__mro__]}: {error}"
        remedy = next((text for what, text in REMEDIES.items() if re.search(what, said)), "")
        if not remedy:
            raise
        print(f"{who}error: {str(error).rstrip('.')}. {remedy}", file=errors)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.stderr = errors  # of what is not expected, every process shows the traceback


if __name__ == "__main__":
    sys.exit(main())
