"""Fine-tune BLIP-2 on your own captions: LoRA on a language model in 4 bits.

What goes in: pictures and their captions, in one of three layouts.

    train/caption/<name>.txt and      one caption, and the pictures that it is for, at any depth
    train/Image/<name>/...            (or Image/<name>.<extension>, one picture)
    train/metadata.csv or .jsonl      a table with columns file_name and text, a row for each pair
    train/<name>.txt and <name>.jpg   a caption of its own next to each picture, at any depth

What comes out: blip2_lora_finetuned/ with the adapter, the processor, a model card (README.md),
report.html to look at, losses.png, held_out.csv, pairs.csv, metrics.csv, skipped.csv and
settings.json. Until it is finished, a run is in blip2_lora_finetuned.unfinished/, with
checkpoint.pt to continue from. The frozen part's output for each picture is kept in
train/.features/, for the next run. blip2_lora_finetuned.lock keeps out a second run.

    python finetune.py                       train with the settings below, which are also flags;
                                             after an interruption, the same command continues
    python finetune.py --restart             train from scratch, even if a run could continue
    python finetune.py --check               read settings, captions and pictures; write nothing
    python finetune.py --caption PATH ...    caption pictures or folders with the trained adapter
        --page FILE                          and show them on a page, the least sure first
        --write-txt                          and write <name>.txt next to each that has none
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import difflib
import errno
import functools
import glob
import hashlib
import html
import io
import itertools
import json
import logging
import math
import mimetypes
import os
import re
import shutil
import signal
import string
import sys
import threading
import time
import unicodedata
import urllib.parse
import uuid
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, broadcast_object_list, gather_object, reduce
from filelock import FileLock, Timeout
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

# These libraries log warnings when they are imported, or when there is no network.
for name in ("bitsandbytes", "huggingface_hub", "PIL", "matplotlib"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

# ==== Settings: edit these, or give them as flags (BATCH_SIZE is --batch-size) ====
# files
TRAIN_DIR: str = "train"  # folder of pictures and captions, in one of the layouts above
VALIDATION_DIR: str = ""  # pictures to measure on, in any layout; "": hold out a part of TRAIN_DIR
OUTPUT_DIR: str = "blip2_lora_finetuned"  # what the run leaves; an earlier run there is renamed
# model
MODEL_ID: str = "Salesforce/blip2-opt-2.7b"  # Hub name or folder of a BLIP-2 with OPT or Flan-T5
START_FROM: str = ""  # folder of a finished run, to go on with its adapter; "": a new adapter
DEVICE: str = "auto"  # where it runs: auto, cuda, cuda:1, cpu
DTYPE: str = "auto"  # precision of what is not in 4 bits: auto, bfloat16, float16, float32
LOAD_IN_4BIT: bool = True  # language model in NF4, for less memory; False: faster where it fits
# LoRA
LORA_RANK: int = 16  # size of the adapter: a larger one can learn more
LORA_ALPHA: float = 32.0  # the adapter's outputs are scaled by LORA_ALPHA / LORA_RANK
LORA_DROPOUT: float = 0.05  # share of the adapter's inputs dropped in training; 0: off
LORA_TARGETS: str = "attention"  # layers that learn; or all-linear, qformer, qformer+attention
# captions
PROMPT: str = ""  # text before every caption, given and not learned; "": none
MAX_CAPTION_TOKENS: int = 64  # longer captions are cut, and counted
NUM_BEAMS: int = 1  # beams of the search for a caption; 1: greedy, the fastest
# training
EPOCHS: int = 10  # passes over the training pairs
BATCH_SIZE: int = 16  # pairs in one optimizer step; what does not fit into memory is split
LEARNING_RATE: float = 2e-4  # the peak: rises during warm-up, then falls to 0 along a cosine
WARMUP_FRACTION: float = 0.05  # share of the steps in which the learning rate rises; 0: off
WEIGHT_DECAY: float = 0.01  # AdamW's weight decay; 0: off
MAX_GRAD_NORM: float = 1.0  # longer gradients are scaled down to this norm; 0: off
SEED: int = 42  # decides the held-out pictures, the order of the pairs, initial weights, dropout
NUM_WORKERS: int = 4  # threads that read pictures
# watching
VALIDATION_FRACTION: float = 0.1  # share of the pictures held out to measure on; 0: train on all
SAMPLE_COUNT: int = 6  # held-out captions printed at the end; 0: none
CHECKPOINT_MINUTES: float = 10.0  # minutes between extra checkpoints; 0: only after each epoch
LOG_WITH: str = ""  # a tracker that accelerate knows: tensorboard, wandb, mlflow, ...; "": none
# ==== End of settings ====

# Name and type of each setting: what is annotated above. Constants below have no annotations.
SETTINGS = dict(sys.modules[__name__].__annotations__)
PATH_SETTINGS = ("TRAIN_DIR", "VALIDATION_DIR", "OUTPUT_DIR", "MODEL_ID", "START_FROM")
CHANGEABLE = (  # settings that may be changed while a run is unfinished
    "OUTPUT_DIR",  # if its .unfinished folder is renamed too
    "DEVICE",
    "NUM_WORKERS",
    "CHECKPOINT_MINUTES",
    "SAMPLE_COUNT",
    "LOG_WITH",
)
# The flags that are no settings, as they are when they are not given.
NO_COMMAND = {"check": False, "restart": False, "caption": [], "page": "", "write_txt": False}
FOR_CAPTION = ("OUTPUT_DIR", "DEVICE", "NUM_WORKERS", "NUM_BEAMS")  # settings of --caption

LORA_PATTERNS = {
    "attention": (
        r"language_model\..*(self_attn|SelfAttention|EncDecAttention)"
        r"\.(q_proj|k_proj|v_proj|out_proj|q|k|v|o)"
    ),
    "all-linear": r"language_model\..*\.([qkv]_proj|out_proj|fc[12]|q|k|v|o|wi|wi_[01]|wo)",
    "qformer": r"qformer\..*\.(query|key|value|dense)|language_projection",
}
for name in ("attention", "all-linear"):
    LORA_PATTERNS[f"qformer+{name}"] = f"{LORA_PATTERNS['qformer']}|{LORA_PATTERNS[name]}"
NF4 = {  # bitsandbytes' own default is FP4
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": ["lm_head", "language_projection", "qformer", "vision_model"],
}

READ_EXTENSIONS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
DECODER_VERSION = 3  # raise it when read_picture returns something else: features are made again
MAX_PIXELS = 500_000_000  # a larger picture is not read
LARGE_PIXELS = 50_000_000  # larger ones are read one at a time, and reduced: memory is bounded
MAX_PNG_TEXT = 256_000_000  # bytes of text in a PNG, such as a workflow
ONE_COLOUR_RANGE = 16  # of 256 levels: a picture with fewer looks like one colour
MAX_CAPTION_BYTES = 1_000_000  # a larger file is not a caption
INFERENCE_BATCH = 16  # pictures encoded, measured or captioned at a time
MAX_CAPTIONED = 256  # pictures of TRAIN_DIR captioned before and after; of VALIDATION_DIR all are
MAX_PICTURES_SHOWN = 300  # on a page
MAX_PAIRS_SHOWN = 60  # of them, training pairs with the highest losses
MAX_NAMED = 10  # problems named on the screen; skipped.csv has all of them
MAX_CPU_PARAMETERS = 500_000_000  # a larger model runs on the CPU only when told to
TINY_PARAMETERS = 20_000_000  # a smaller model is faster with one CPU thread, up to 20 times
FEW_STEPS = 100  # with fewer optimizer steps hardly anything is learned
FEW_QFORMER_PICTURES = 1500  # with fewer a Q-Former learns little
FEW_QFORMER_STEPS = 1000

METRICS = (
    "step",
    "epoch",
    "learning_rate",
    "train_loss",
    "held_out_loss",
    "grad_norm",
    "pairs_per_second",
    "seconds",
)
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "pillow")

NOT_SHARED = (
    "the processes do not see the same files or settings. Start them all with one command, "
    "with TRAIN_DIR and OUTPUT_DIR on a file system that all machines share."
)

csv.field_size_limit(2**31 - 1)  # by default a cell above 128 kB is an error
Image.MAX_IMAGE_PIXELS = None  # Pillow calls large pictures an attack; read_picture has a limit
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PNG_TEXT
PngImagePlugin.MAX_TEXT_MEMORY = MAX_PNG_TEXT


class UserError(Exception):
    """What only the user can fix: a sentence that says what is wrong, where, and what to do."""


class Stopped(Exception):
    """Stopped(number of the signal): Ctrl-C or SIGTERM, after a checkpoint was saved.

    All processes stop between the same two steps.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out."""
    phrases = (
        "out of memory",
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED",
    )
    if isinstance(error, RuntimeError):
        return any(phrase in str(error) for phrase in phrases)
    return isinstance(error, MemoryError)


def describe_error(error: BaseException) -> str:
    """What went wrong, without the path, which the message around it names."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def count_of(count: int, one: str, many: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{count} {one if count == 1 else many}"


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


# What several processes share. In a training each of them runs all of this script, on a GPU of its
# own, with the same settings, files and seeds, and holds its own copy of the weights. Work is
# divided by `share` where it is long: pictures to encode, to measure and to caption, and the pairs
# of a step. The results are combined by accelerate (`reduce` for tensors, `gather_object` for the
# rest; `broadcast_object_list` where the first process decides), so that all processes know the
# same and go the same way. Only the first one, the main process, prints and writes, except for
# features. It does --check and --caption alone.


def share(items: Sequence) -> Sequence:
    """This process's part of a list."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def printable(text: str) -> str:
    """`text` on one line of a terminal: what breaks lines or moves the cursor is escaped."""
    return re.sub(
        r"[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda found: ascii(found[0])[1:-1],
        text,
    )


def relative(path: str, root: str) -> str:
    """The path below `root`, in NFC: the same on every system, also if `root` is moved."""
    with contextlib.suppress(ValueError):  # Windows: it is on another drive
        path = os.path.relpath(path, root)
    return unicodedata.normalize("NFC", path.replace(os.sep, "/"))


def write_whole(path: Path, content: bytes) -> None:
    """Leaves the old file or the new one, never a part of it.

    The content goes to a temporary file next to it, is flushed to the disk, and is renamed.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    """A table, its header first. NaN becomes an empty cell."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        for row in rows:
            cells = []
            for cell in row:
                is_nan = isinstance(cell, float) and math.isnan(cell)
                cells.append("" if is_nan else cell)
            writer.writerow(cells)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table that write_csv wrote, each by the names in the header."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


# ---- Settings -----------------------------------------------------------------------------------


def did_you_mean(word: str, possible: Iterable[str]) -> str:
    """The end of an error message: which of these was probably meant; "": none is near."""
    near = difflib.get_close_matches(word, possible, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def default_settings() -> dict[str, Any]:
    """The constants at the top of this file."""
    return {name: globals().get(name) for name in SETTINGS}


def flag_of(name: str) -> str:
    """--batch-size for BATCH_SIZE."""
    return "--" + name.lower().replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """Three commands, and a flag for each setting, whose help is the comment after it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what is given is returned
        allow_abbrev=False,
        usage="%(prog)s [--check | --restart | --caption PATH ...] [--setting value ...]",
    )
    parser.add_argument("--check", action="store_true", help="read everything; write nothing")
    parser.add_argument("--restart", action="store_true", help="train from scratch")
    parser.add_argument("--caption", nargs="+", metavar="PATH", help="pictures or folders")
    parser.add_argument("--page", metavar="FILE", help="with --caption: a page that shows them")
    parser.add_argument(
        "--write-txt",
        action="store_true",
        help="with --caption: <name>.txt next to each that has none",
    )

    source = Path(__file__).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z0-9_]+): .*?  # (.*)$", source, re.M))
    defaults = default_settings()
    for name, kind in SETTINGS.items():
        help_text = f"{comments.get(name, '')} (now {defaults[name]!r})".replace("%", "%%")
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options = {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(flag_of(name), dest=name, help=help_text, **options)
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The settings under their own names, overridden by flags, and the other flags.

    Paths and prompt have one form, so that the same run is recognized.
    """
    parser = build_parser()
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(explain_unknown(unknown))
    given = vars(known)
    if "caption" in given:
        usable = ("caption", "page", "write_txt", *FOR_CAPTION)
        ignored = [flag_of(name) for name in given if name not in usable]
        if ignored:
            parser.error(
                "--caption uses the settings of the training; only "
                f"{', '.join(FOR_CAPTION)} can be changed: leave out {' '.join(ignored)}"
            )
    elif "page" in given or "write_txt" in given:
        parser.error("--page and --write-txt are for --caption PATH ...")
    settings = argparse.Namespace(**(NO_COMMAND | default_settings() | given))
    normalize_settings(settings)
    return settings


def explain_unknown(words: list[str]) -> str:
    """That these words of the command line mean nothing, and which flags were probably meant."""
    flags = [flag_of(name) for name in (*NO_COMMAND, *SETTINGS)]
    questions = []
    for word in words:
        if word.startswith("-"):
            name, _, _ = word.partition("=")
            questions.append(did_you_mean(flag_of(name.strip("-")), flags))
    return f"unrecognized arguments: {' '.join(words)}.{''.join(questions)} --help lists the flags."


def normalize_settings(settings: argparse.Namespace) -> None:
    """Changes `settings`: "out/" becomes "out", "~" the home folder; wrong types stay."""
    for name in ("TRAIN_DIR", "VALIDATION_DIR", "OUTPUT_DIR", "START_FROM"):
        value = getattr(settings, name, None)  # check_settings names what is missing
        if isinstance(value, str) and value and not is_url(value):
            setattr(settings, name, os.path.normpath(os.path.expanduser(value)))

    model_id = getattr(settings, "MODEL_ID", None)
    if isinstance(model_id, str):
        model_id = os.path.expanduser(model_id.strip(" "))
        if os.path.isdir(model_id):  # the adapter names it, and is used from elsewhere
            model_id = os.path.abspath(model_id)
        settings.MODEL_ID = model_id
    prompt = getattr(settings, "PROMPT", None)
    if isinstance(prompt, str):  # a space at its end changes how the caption is tokenized
        settings.PROMPT = " ".join(prompt.split())


class Rule(NamedTuple):
    """What a setting must be besides being of its type."""

    words: str
    test: Callable[[Any], bool]


def is_pattern(value: str) -> bool:
    """Whether it is a regular expression."""
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def list_rules() -> dict[str, Rule]:
    """The rule of each setting."""
    dtypes = ("auto", "bfloat16", "float16", "float32")
    trackers = ["", *sorted({str(tracker) for tracker in LoggerType} - {"all"})]
    any_text = Rule("text", lambda value: True)
    not_empty = Rule("text, not empty", lambda value: value != "")
    positive = Rule("more than 0", lambda value: 0 < value < math.inf)
    not_negative = Rule("0 or more", lambda value: 0 <= value < math.inf)
    fraction = Rule("from 0 to below 1", lambda value: 0 <= value < 1)
    up_to_1000 = Rule("from 1 to 1000", lambda value: 1 <= value <= 1000)
    return {
        "TRAIN_DIR": not_empty,
        "VALIDATION_DIR": any_text,
        "OUTPUT_DIR": not_empty,
        "MODEL_ID": not_empty,
        "START_FROM": any_text,
        "DEVICE": Rule(
            "auto, cpu, cuda or one GPU such as cuda:1",
            lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None,
        ),
        "DTYPE": Rule("auto, bfloat16, float16 or float32", lambda value: value in dtypes),
        "LOAD_IN_4BIT": Rule("True or False", lambda value: True),
        "LORA_RANK": positive,
        "LORA_ALPHA": positive,
        "LORA_DROPOUT": fraction,
        "LORA_TARGETS": Rule(f"{', '.join(LORA_PATTERNS)} or a regular expression", is_pattern),
        "PROMPT": any_text,
        "MAX_CAPTION_TOKENS": up_to_1000,
        "NUM_BEAMS": up_to_1000,
        "EPOCHS": positive,
        "BATCH_SIZE": positive,
        "LEARNING_RATE": positive,
        "WARMUP_FRACTION": fraction,
        "WEIGHT_DECAY": not_negative,
        "MAX_GRAD_NORM": not_negative,
        "SEED": Rule("from 0 to 4294967295", lambda value: 0 <= value < 2**32),
        "NUM_WORKERS": up_to_1000,
        "VALIDATION_FRACTION": fraction,
        "SAMPLE_COUNT": not_negative,
        "CHECKPOINT_MINUTES": not_negative,
        "LOG_WITH": Rule(f"one of {trackers}", lambda value: value in trackers),
    }


def is_valid(value: Any, kind: type, rule: Rule) -> bool:
    """Whether a setting is of its type, and passes the test of its rule."""
    kinds = (float, int) if kind is float else (kind,)
    if type(value) not in kinds:  # not isinstance, for which a bool is an int
        return False
    return rule.test(value)


def check_settings(settings: argparse.Namespace) -> None:
    """Raises one UserError that names every problem."""
    rules = list_rules()
    problems = []
    for name in sorted(rules.keys() ^ SETTINGS.keys()):
        problems.append(
            f"{name} is missing, misspelled or not a setting: each is a line like "
            "'EPOCHS: int = 10'."
        )
    for name, kind in SETTINGS.items():
        value = getattr(settings, name)
        if name in rules and not is_valid(value, kind, rules[name]):
            problem = f"{name} is {value!r}; it must be {rules[name].words} ({kind.__name__})"
            if isinstance(value, str) and kind is not str:
                problem += ", without quotes"
            problems.append(f"{problem}.")

    if not problems:
        problems = [*check_paths(settings), *check_tracker(settings.LOG_WITH)]
    if not problems and not settings.caption:
        problems = check_output_dir(settings)
    if problems:
        raise UserError("\n  ".join(["some settings can't be used:", *problems]))


CONTROL_CHARACTER_REMEDY = (
    "which holds a control character: in a Python string a backslash starts one. Write each "
    "backslash twice, or write / instead"
)


def is_url(path: str) -> bool:
    return re.match(r"\w+:/", path) is not None and not re.match(r"[A-Za-z]:/", path)


def has_control_character(path: str) -> bool:
    return re.search(r"[\0-\x1f]", path) is not None


def check_paths(settings: argparse.Namespace) -> list[str]:
    """A sentence for each path with a control character, as '\\n' in 'D:\\new', and each URL."""
    problems = []
    for name in PATH_SETTINGS:
        value = getattr(settings, name)
        if is_url(value) and name != "MODEL_ID":  # of which there is more to say
            problems.append(
                f"{name} is {value!r}, a URL. Download it, and set {name} to the folder."
            )
        if has_control_character(value):
            problems.append(f"{name} is {value!r}, {CONTROL_CHARACTER_REMEDY}.")
    return problems


def check_tracker(tracker: str) -> list[str]:
    """A sentence if the package of LOG_WITH is not installed."""
    if not tracker or tracker in [str(installed) for installed in get_available_trackers()]:
        return []
    package = tracker.replace("_", "-")
    return [f"LOG_WITH is {tracker!r}, whose package is not installed: pip install {package}."]


def check_output_dir(settings: argparse.Namespace) -> list[str]:
    """Sentences if OUTPUT_DIR can't be renamed, or would move files that are not from a run."""
    output = Path(os.path.realpath(settings.OUTPUT_DIR))  # of a link, what it points to
    unfinished = Path(f"{output}.unfinished")
    faults = []
    for name in ("TRAIN_DIR", "VALIDATION_DIR", "MODEL_ID", "START_FROM"):
        folder = getattr(settings, name)
        if not os.path.isdir(folder):
            continue
        folder = Path(os.path.realpath(folder))
        if name == "START_FROM" and folder == output:  # it is renamed when this run is finished
            continue
        is_inside = output.is_relative_to(folder)
        contains = folder.is_relative_to(output) or folder.is_relative_to(unfinished)
        if is_inside or contains:
            faults.append(f"is inside {name}, or contains it")

    if Path.cwd().is_relative_to(output):
        faults.append("is the current folder, or contains it")
    elif os.path.ismount(output):
        faults.append("is a mount point, which can't be renamed")
    name = f"OUTPUT_DIR {settings.OUTPUT_DIR!r}"
    return [f"{name} {fault}; choose a separate folder." for fault in faults]


# ---- Pairs: what the captions are, and which pictures they are for ------------------------------


class Pair(NamedTuple):
    picture: str  # path
    caption: str


class Skipped(NamedTuple):
    path: str  # or the place in a table
    reason: str  # why it is not used


@dataclasses.dataclass
class Findings:
    """What is reported about the data. Readers only append to it.

    This is how a picture is left out: whoever can't use it calls `skip` with the reason, and makes
    no pair of it. That is a reader of a layout, or, for a picture that can't be decoded,
    `decode_pictures`; `list_readable` then leaves out the pairs of those. print_findings
    reports it, and skipped.csv has all of `skipped`.
    """

    skipped: list[Skipped] = dataclasses.field(default_factory=list)  # what is not used
    joined: list[str] = dataclasses.field(default_factory=list)  # captions of several lines
    not_pictures: list[str] = dataclasses.field(default_factory=list)  # by extension or content
    one_colour: list[str] = dataclasses.field(default_factory=list)  # pictures, which are used
    sharing: list[str] = dataclasses.field(default_factory=list)  # pictures with one .txt

    def skip(self, path: str, reason: str) -> None:
        self.skipped.append(Skipped(path, reason))


class Data(NamedTuple):
    pairs: list[Pair]  # of TRAIN_DIR
    validation: list[Pair]  # of VALIDATION_DIR
    pictures: list[str]  # of both, each once


def print_findings(findings: Findings, show_all: bool) -> None:
    """What was found in the data: all of it, or counts and the first MAX_NAMED problems."""
    print_notes(findings, show_all)
    print_skipped(findings.skipped, show_all)


def print_notes(findings: Findings, name_files: bool) -> None:
    """Counts what is good to know about files that are used, or that do not matter."""
    notes = (
        (
            findings.joined,
            "caption file has several lines, which were joined",
            "caption files have several lines, which were joined",
            "If each line is a separate caption, use a table.",
        ),
        (
            findings.sharing,
            "picture shares its .txt with another of the same name",
            "pictures share their .txt with another of the same name",
            "If each has its own caption, rename one of the two, and give it its own .txt.",
        ),
        (
            findings.not_pictures,
            "file is not a picture, judging by its extension or content",
            "files are not pictures, judging by their extension or content",
            "Ignored.",
        ),
        (
            findings.one_colour,
            "picture is (almost) a single colour, as it is read",
            "pictures are (almost) a single colour, as they are read",
            "Used all the same: look at them. Usual causes: 12 bits in a 16-bit file, white on a "
            "transparent background, a frame that was not recorded.",
        ),
    )
    for paths, one, many, advice in notes:
        if paths:
            print(f"{count_of(len(paths), one, many)}. {advice}")
        if name_files:
            for path in sorted(paths):
                print(f"  {printable(path)}")


def sort_skipped(skipped: Iterable[Skipped]) -> list[Skipped]:
    """By path or place, line 2 before line 10."""

    def rank(item: Skipped) -> tuple[str, str]:
        padded = re.sub("[0-9]+", lambda number: number[0].zfill(12), item.path)
        return padded, item.reason

    return sorted(skipped, key=rank)


def print_skipped(skipped: Iterable[Skipped], show_all: bool) -> None:
    """Counts what is not used, and names all of it, or the first MAX_NAMED."""
    skipped = sort_skipped(skipped)
    named = skipped if show_all else skipped[:MAX_NAMED]
    if skipped:
        print(f"not used: {len(skipped)}")
    for path, reason in named:
        print(f"  {printable(path)}: {printable(reason)}")
    if len(named) < len(skipped):
        print(f"  and {len(skipped) - len(named)} more; --check lists all")


# ---- Files: what they are, and where they are


WEB_PAGE = "is a web page (a failed download?); download the file again"
XML = "is XML (an SVG, or a failed download); save a picture as JPEG, or download the file again"
ARCHIVE = (
    "is a spreadsheet, an Office document or a ZIP file; save it as CSV or plain text, or unpack it"
)
OLD_OFFICE = "is an old spreadsheet or Office document; save it as CSV or plain text"
HEIC = "is HEIC, which is not read; save it as JPEG"
RAW = "is a camera's raw file, which is not read; save it as JPEG"
VIDEO_OR_SOUND = "is a video or sound; remove it"
PICTURE = "is a picture, not text"
FIRST_BYTES = (  # of files that are often found in the place of another: what they are, what to do
    (rb"version https://git-lfs", "is a Git LFS pointer; run `git lfs pull` to get the file"),
    (rb"/annex/objects/", "is a git-annex pointer; run `git annex get` to get the file"),
    (rb"<!doctype html", WEB_PAGE),
    (rb"<html", WEB_PAGE),
    (rb"<\?xml", XML),
    (rb"<svg", XML),
    (rb"\{\\rtf", "is RTF; save it as plain text"),
    (rb"PK\x03\x04", ARCHIVE),
    (rb"\xd0\xcf\x11\xe0", OLD_OFFICE),
    (rb"%!PS-Adobe", "is PostScript; save it as JPEG"),
    (rb"P[2356]\s+\d+\s+\d+\s+\d+\s", "is a PPM, which is not read; save it as JPEG"),
    (rb"SIMPLE  =", "is a FITS, which is not read; save it as JPEG"),
    (rb"NRRD000", "is an NRRD, which is not read; save it as JPEG"),
    (rb"%PDF-", "is a PDF; save pictures as JPEG, text as plain text"),
    (rb"\x1f\x8b", "is a gzip archive; unpack it"),
    (rb"\x89PNG", PICTURE),
    (rb"\xff\xd8\xff", PICTURE),  # JPEG
    (rb"GIF8[79]a.{6}\0", PICTURE),
    (rb"II\*\0", PICTURE),  # TIFF
    (rb"MM\0\*", PICTURE),
    (rb"RIFF....WEBP", PICTURE),
    (rb"RIFF....(AVI |WAVE)", VIDEO_OR_SOUND),
    (rb"\0...ftypavi[fs]", PICTURE),
    (rb"\0...ftyp(hei|hev|mif1|msf1)", HEIC),
    (rb"\0...ftypcrx", RAW),
    (rb"\0...ftyp", VIDEO_OR_SOUND),
)


def recognize(first_bytes: bytes) -> str:
    """What a misplaced file really is, and what to do; "": it is not recognized."""
    without_space = first_bytes.removeprefix(b"\xef\xbb\xbf").lstrip()  # before text
    for pattern, meaning in FIRST_BYTES:
        for start in (first_bytes, without_space):
            if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
                return meaning
    return ""


BUILT_IN_TYPES = mimetypes.MimeTypes()  # without the system's own, which differ
OTHER_EXTENSIONS = (
    ".7z",
    ".aae",
    ".caption",
    ".db",
    ".docx",
    ".flac",
    ".jsonl",
    ".lnk",
    ".log",
    ".m4a",
    ".md",
    ".mkv",
    ".npy",
    ".npz",
    ".parquet",
    ".pptx",
    ".pt",
    ".rar",
    ".safetensors",
    ".toml",
    ".ttf",
    ".url",
    ".xlsx",
    ".xmp",
    ".yaml",
    ".yml",
)

# Camera's raw files look like a TIFF, of which a reader sees a thumbnail.
RAW_EXTENSIONS = (".arw", ".cr2", ".dng", ".nef", ".nrw", ".orf", ".pef", ".rw2", ".srw")
TEXT_EXTENSIONS = (".caption", ".json", ".md", ".rtf", ".text", ".yaml", ".yml")


@functools.lru_cache(maxsize=1000)
def is_picture_extension(extension: str) -> bool:
    kind, _ = BUILT_IN_TYPES.guess_type(f"name{extension}")
    return kind is not None and kind.startswith("image/")


@functools.lru_cache(maxsize=1000)
def is_other_extension(extension: str) -> bool:
    """Whether an extension stands for something other than pictures: video, text, archives."""
    if extension.lower() in OTHER_EXTENSIONS:
        return True
    kind, compression = BUILT_IN_TYPES.guess_type(f"name{extension}")
    if compression:
        return True
    return kind is not None and not kind.startswith("image/")


def is_wanted(name: str) -> bool:
    """Neither hidden, nor one of the files that desktops leave in every folder."""
    return not name.startswith(".") and name.lower() not in ("thumbs.db", "desktop.ini", "__macosx")


def list_files(folder: str, findings: Findings) -> Iterator[str]:
    """Every wanted file below `folder`, in a fixed order."""

    def note_error(error: OSError) -> None:
        if os.path.lexists(error.filename):  # there may be no Image/
            findings.skip(error.filename, f"can't be opened: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=note_error):
        folders[:] = sorted(filter(is_wanted, folders))  # in place: os.walk goes on with these
        for name in folders:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                findings.skip(path, "is a link to a folder; only links to files are followed")
        for name in sorted(filter(is_wanted, files)):
            yield os.path.join(parent, name)


def list_neighbours(path: str) -> list[str]:
    """The names of all that is in the folder of a path, which need not exist."""
    try:
        return os.listdir(os.path.dirname(path) or ".")
    except OSError:
        return []


def list_loose_forms(name: str) -> list[str]:
    """A file's name without what people get wrong, the nearest form first.

    That is its case, %20 for a space, its extension (both of a.jpg.txt), its folder, and the number
    of a caption (a.jpg#0).
    """
    name = re.sub(r"#\d+$", "", name)
    loose = unicodedata.normalize("NFC", urllib.parse.unquote(name)).replace("\\", "/").casefold()
    stem, _ = os.path.splitext(loose)
    forms = [loose, stem]
    inner_stem, inner_extension = os.path.splitext(stem)
    if is_picture_extension(inner_extension):
        forms.append(inner_stem)
    without_folder = [form.rpartition("/")[2] for form in forms]
    return forms + without_folder


class NearNames:
    """Files by what people may call them. Only to name a file in a reason, never to use it."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = {}
        for name in names:
            for form in list_loose_forms(name):
                self.names.setdefault(form, name)

    def describe(self, name: str) -> str:
        """The end of a reason: that there is a file with nearly this name; "": there is none."""
        for form in list_loose_forms(name):
            if form in self.names:
                return f"; there is {self.names[form]!r}"
        return ""


# ---- Captions


# Characters of no width, and letters that show nothing.
INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200c\u200d\u200e\u200f"
    "\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\u2063\u2064\u2066\u2067\u2068\u2069"
    "\u206a\u206b\u206c\u206d\u206e\u206f\u2800\u3164\ufeff\uffa0\ufff9\ufffa\ufffb"
)
# White space and control characters, which also go at the ends.
BLANK = INVISIBLE + "".join(map(chr, range(0x21))) + "\x7f\x85\xa0\u2028\u2029\u3000"
NO_CONTENT = INVISIBLE + "\ufffc\ufffd" + "".join(map(chr, range(0xFE00, 0xFE10)))


def clean_caption(text: str) -> str:
    """On one line, without what shows nothing at its ends; "": nothing in it can be seen."""
    caption = " ".join(text.split()).strip(BLANK)
    if caption.isascii() and caption[:1].isalnum():  # most are, and this is quick
        return caption
    for character in caption:
        # letters, marks, numbers and symbols; not punctuation alone
        if unicodedata.category(character)[0] in "LMNS" and character not in NO_CONTENT:
            return caption
    return ""


ISO_2022 = re.compile(r"\x1b[$(]")  # begins letters in the encodings of that name
NOT_PLAIN = "is in ISO-2022-JP, or in a similar encoding"


class CaptionFile(NamedTuple):
    """What is in a caption file."""

    caption: str
    lines: int  # that are not empty
    reason: str  # why it can't be used; "": it can


def read_caption(path: str) -> CaptionFile:
    """The caption in a file of UTF-8, with or without BOM, or of UTF-16 with one."""

    def unusable(reason: str) -> CaptionFile:
        return CaptionFile("", 0, f"the caption {reason}")

    if os.path.exists(path) and not os.path.isfile(path):
        return unusable("is not a file")  # a pipe would block for ever
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        return unusable(f"can't be read: {describe_error(error)}")

    if len(raw) > MAX_CAPTION_BYTES:
        return unusable("is larger than 1 MB")
    if not raw:
        return unusable("is empty: the file has no content")
    other_kind = recognize(raw[:100])
    if other_kind:
        return unusable(other_kind)
    is_utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = raw.decode("utf-16" if is_utf16 else "utf-8")
    except UnicodeDecodeError:
        return unusable("is not in UTF-8; save it in UTF-8, the README says how")
    if ISO_2022.search(text):
        return unusable(f"{NOT_PLAIN}; save it in UTF-8")
    if "\0" in text:  # in UTF-8 each letter of UTF-16 is followed by one
        return unusable("is UTF-16 without a byte order mark, or not text; save it in UTF-8")

    caption = clean_caption(text)
    if not caption:
        return unusable("is empty: there is no letter, digit or symbol in it")
    lines = sum(clean_caption(line) != "" for line in text.splitlines())
    return CaptionFile(caption, lines, "")


def list_possible_captions(
    captions: dict[str, list[str]], pictures: dict[str, list[str]], findings: Findings
) -> list[str]:
    """Names of caption files without a picture, and of others that may be meant as captions."""
    names = []
    for name, files in captions.items():
        if name not in pictures:
            names.append(name + os.path.splitext(files[0])[1])
    for path in findings.not_pictures:
        if os.path.splitext(path)[1].lower() in TEXT_EXTENSIONS:
            names.append(os.path.basename(path))
    return names


def list_possible_pictures(
    captions: dict[str, list[str]], pictures: dict[str, list[str]]
) -> list[str]:
    """Names of pictures without a caption, or of the folder in Image/ that they are in."""
    names = []
    for name, files in pictures.items():
        if name in captions:
            continue
        stem, extension = os.path.splitext(files[0])
        if os.path.basename(stem) == os.path.basename(name):
            names.append(name + extension)
        else:  # the name is that of the folder
            names.append(f"Image/{name}")
    return names


def match_names(
    captions: dict[str, list[str]], pictures: dict[str, list[str]], findings: Findings
) -> list[Pair]:
    """Pairs each picture with the caption file of the same name.

    `captions` and `pictures` map a name to the paths of its files. What has no partner, several
    captions, or a caption that can't be read, goes to `findings`.
    """
    near_captions = NearNames(list_possible_captions(captions, pictures, findings))
    near_pictures = NearNames(list_possible_pictures(captions, pictures))

    pairs = []
    for name in sorted(captions.keys() | pictures.keys()):
        caption_files = captions.get(name, [])
        picture_files = pictures.get(name, [])
        caption = ""
        if not caption_files:
            reason = f"there is no caption with this name, {name}.txt{near_captions.describe(name)}"
        elif len(caption_files) > 1:
            reason = f"there are {len(caption_files)} captions with this name; keep one of them"
        elif not picture_files:
            reason = f"there is no picture with this name{near_pictures.describe(name)}"
        else:
            caption_file = read_caption(caption_files[0])
            caption = caption_file.caption
            reason = caption_file.reason
            if caption_file.lines > 1:
                findings.joined.append(caption_files[0])

        if reason:
            for path in caption_files + picture_files:
                findings.skip(path, reason)
        else:
            for path in picture_files:
                pairs.append(Pair(path, caption))
    return pairs


# ---- Layouts


TABLE_BELOW = "tables in subfolders are not read; set TRAIN_DIR or VALIDATION_DIR to that folder"


def read_folders(folder: str, findings: Findings) -> list[Pair]:
    """The layout caption/<name>.txt for Image/<name>/... or Image/<name>.<extension>."""
    captions = defaultdict(list)
    root = os.path.join(folder, "caption")
    for path in list_files(root, findings):
        name, extension = os.path.splitext(relative(path, root))
        if extension.lower() == ".txt" and "/" not in name:
            captions[name].append(path)
        else:
            reason = "is not used: only .txt files in caption/ itself are read"
            if is_table_name(os.path.basename(path)) and extension.lower() != ".txt":
                reason = TABLE_BELOW
            findings.skip(path, reason)

    pictures = defaultdict(list)
    root = os.path.join(folder, "Image")
    for path in list_files(root, findings):
        inner_path = relative(path, root)
        stem, extension = os.path.splitext(inner_path)
        if is_other_extension(extension):
            findings.not_pictures.append(path)
        else:
            name = inner_path.split("/")[0] if "/" in inner_path else stem
            pictures[name].append(path)

    for name in sorted(filter(is_wanted, os.listdir(folder))):
        path = os.path.join(folder, name)
        if name in ("caption", "Image"):
            continue
        extension = os.path.splitext(path)[1].lower()
        if os.path.isdir(path):
            findings.skip(
                path, "is a folder other than caption/ and Image/; its files are not read"
            )
        elif extension != ".txt" and is_other_extension(extension):
            findings.not_pictures.append(path)
        else:
            findings.skip(path, "is neither in caption/ nor in Image/, where this layout looks")
    return match_names(captions, pictures, findings)


def read_beside(folder: str, findings: Findings) -> list[Pair]:
    """The layout <name>.txt next to <name>.<extension>, at any depth."""
    captions = defaultdict(list)
    pictures = defaultdict(list)
    for path in list_files(folder, findings):
        name, extension = os.path.splitext(relative(path, folder))
        is_table_below = is_table_name(os.path.basename(path)) and os.path.dirname(path) != folder
        if is_table_below and extension.lower() != ".txt":
            findings.skip(path, TABLE_BELOW)
        elif extension.lower() == ".txt":
            captions[name].append(path)
        elif is_other_extension(extension):
            findings.not_pictures.append(path)
        else:
            pictures[name].append(path)

    for name in sorted(captions.keys() - pictures.keys()):
        paths = captions[name]
        if is_table_name(os.path.basename(paths[0])):  # captions.txt, meant as a table
            for path in paths:
                findings.skip(path, explain_text_table(path))
            del captions[name]

    for name, paths in pictures.items():
        sharing = [path for path in paths if path.lower().endswith(READ_EXTENSIONS)]
        if name in captions and len(sharing) > 1:  # a.jpg, a.png, and a.txt
            findings.sharing.extend(sharing)
    return match_names(captions, pictures, findings)


def explain_text_table(path: str) -> str:
    """Why captions.txt or the like, which is next to no picture of its name, is not used."""
    try:
        next(read_rows(path), None)
    except UserError as error:
        return f"there is no picture with this name, and it is not a table either: {error}"
    return TABLE_BELOW


class TableRow(NamedTuple):
    """A row of a table of captions, as it is in the file."""

    place: str  # "line 3", as an editor counts them
    file_name: Any
    captions: list[Any]
    problem: str  # why it can't be used; "": nothing is wrong so far


FILE_COLUMNS = ("file_name", "image", "image_name", "filename")
CAPTION_COLUMNS = ("text", "caption", "comment")
WANTED_COLUMNS = "the columns file_name and text (or image and caption)"


DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
JSON_EXAMPLE = '{"file_name": "a.jpg", "text": "a rose"}'


def is_table_name(name: str) -> bool:
    """metadata.csv, captions.txt, captions_val2017.json and the like, in any case."""
    stem, extension = os.path.splitext(name.casefold())
    is_named = re.match(r"(metadata|captions|results)(?![a-z])", stem) is not None
    return is_named and extension in (".csv", ".tsv", ".txt", ".json", ".jsonl")


def find_columns(path: str, names: Iterable[Any]) -> tuple[Any, Any] | None:
    """The two of these column names that are those of files and captions; None: they aren't there.

    Returned as they are written, in whatever case. A column text goes before one called caption.
    Raises UserError where there are two of one name.
    """
    by_plain_name = {}
    for name in names:
        plain_name = str(name).strip(BLANK).casefold()
        if plain_name in by_plain_name and plain_name in FILE_COLUMNS + CAPTION_COLUMNS:
            raise UserError(f"{path!r} has two columns {name!r}: rename or remove one of them.")
        by_plain_name[plain_name] = name
    file_columns = [by_plain_name[name] for name in FILE_COLUMNS if name in by_plain_name]
    caption_columns = [by_plain_name[name] for name in CAPTION_COLUMNS if name in by_plain_name]
    if not file_columns or not caption_columns:
        return None
    return file_columns[0], caption_columns[0]


def read_rows(path: str) -> Iterator[TableRow]:
    """The rows of a CSV, JSON, JSON lines or COCO file, told apart by content. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"{path!r} is not a file.")
    raw = Path(path).read_bytes()
    other_kind = recognize(raw[:100])
    if other_kind:
        raise UserError(f"{path!r} {other_kind}.")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = raw.decode("utf-16", "replace")
    else:
        text = raw.decode("utf-8", "surrogateescape")  # rows that are not in UTF-8 are named
    text = text.lstrip("\ufeff")

    if "\0" in text[:10_000]:
        raise UserError(f"{path!r} is not text in UTF-8; save the table again, as CSV in UTF-8.")
    if not text.strip():
        raise UserError(f"{path!r} is empty: it has no rows. Save the table again.")
    if text.lstrip()[0] in "[{":
        return read_json(path, text)
    return read_csv_rows(path, text)


# Before a delimiter or the end of a line. "" is a quote inside a cell, and does not close it.
SPACES_AFTER_CLOSING_QUOTE = re.compile(r'(?<!")" +(?=[,;|\t\r\n])')


class Header(NamedTuple):
    """The first row of a CSV file, and a csv.reader for the rows after it."""

    cells: list[str]
    reader: Any


def read_header(text: str, delimiter: str) -> Header:
    """The header of a CSV file, if its cells are delimited so. Raises csv.Error, StopIteration."""
    first_line = text.lstrip()[:100_000].splitlines()[0]  # to split all lines would take seconds
    # Flickr30k's table has no quotes around its cells, and quotes in its captions.
    is_unquoted = delimiter == "|" and '"' not in first_line
    if not is_unquoted and '" ' in text:
        text = SPACES_AFTER_CLOSING_QUOTE.sub('"', text)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if is_unquoted else csv.QUOTE_MINIMAL,
        skipinitialspace=True,
        strict=True,
    )
    cells = next(row for row in reader if any(cell.strip() for cell in row))
    if first_line.lower().startswith("sep="):  # a line of Excel's own
        cells = next(reader)
    return Header(cells, reader)


def read_csv_rows(path: str, text: str) -> Iterator[TableRow]:
    """The rows of a CSV file. The delimiter is the one that gives the header both columns."""
    widest_header: list[str] = []
    for delimiter in DELIMITERS:
        try:
            header = read_header(text, delimiter)
        except (csv.Error, StopIteration):
            continue
        columns = find_columns(path, header.cells)
        if columns:
            return read_cells(path, header, columns)
        if len(header.cells) > len(widest_header):
            widest_header = header.cells

    raise UserError(f"{path!r} {explain_header(widest_header)}")


def explain_header(cells: list[str]) -> str:
    """What is wrong with a first row that does not have both columns, and the remedy."""
    names = [re.sub(r"#\d+$", "", cell.strip()) for cell in cells]  # a.jpg#0, as in Flickr8k
    if any(is_picture_extension(os.path.splitext(name)[1]) for name in names):
        return (
            f"has no column names: its first row is {cells[:20]}. Add a row above it with "
            f"{WANTED_COLUMNS}."
        )
    if len(cells) <= 1:
        return f"has one column {cells}, and needs {WANTED_COLUMNS}. Save the table as CSV."
    return f"has the columns {cells[:20]}, and needs {WANTED_COLUMNS}. Rename the columns."


def read_cells(path: str, header: Header, columns: tuple[str, str]) -> Iterator[TableRow]:
    """The rows after the header. `columns` are the names of those of files and captions."""
    file_index = header.cells.index(columns[0])
    caption_index = header.cells.index(columns[1])
    width = len(header.cells)
    while not header.cells[width - 1].strip():  # spreadsheets write empty columns
        width -= 1

    last_index = max(file_index, caption_index)
    reader = header.reader
    delimiter = DELIMITERS[reader.dialect.delimiter]
    remedy = f"put quotes around a caption with {delimiter}"
    if reader.dialect.quoting == csv.QUOTE_NONE:
        remedy = f"a caption can't have {delimiter} in it"
    next_line = reader.line_num + 1  # where the next row starts, as an editor counts lines
    try:
        for row in reader:
            line = next_line
            next_line = reader.line_num + 1
            problem = ""
            if len(row) > width and "".join(row[width:]).strip():
                problem = f"it has more cells than there are columns; {remedy}"
            elif len(row) <= last_index:
                if not "".join(row).strip():  # an empty line
                    continue
                cells = count_of(len(row), "cell", "cells")
                problem = f"it has {cells}, and the header {width}"
                row = row + [""] * width  # so that both cells exist
            file_name = row[file_index].strip()
            caption = row[caption_index].strip()
            if file_name or caption:
                yield TableRow(f"line {line}", file_name, [caption], problem)
    except csv.Error as error:
        raise UserError(
            f"{path!r} can't be read from line {next_line} on: {error}. Fix the quotes there "
            "(inside a quoted cell, a quote is written twice), or save the table again."
        ) from error


def read_json(path: str, text: str) -> Iterator[TableRow]:
    """The rows of a JSON array, of JSON lines, or of COCO's captions."""
    values = parse_values(path, text)
    first_place, first = next(values)
    if isinstance(first, dict) and "annotations" in first and "images" in first:
        return read_coco(path, first)
    if isinstance(first, list):
        items = [(f"item {number}", item) for number, item in enumerate(first, 1)]
        return read_objects(path, items)
    return read_objects(path, itertools.chain([(first_place, first)], values))


def parse_values(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """JSON values, each with its line. Commas between them are ignored. Raises UserError."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    position = between.match(text).end()
    line = 1 + text.count("\n", 0, position)
    while position < len(text):
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path!r} can't be read from line {line} on: it is not valid JSON at line "
                f"{error.lineno} ({error.msg}). Fix the commas, quotes and brackets there and just "
                "before: one object per line, or one array of objects."
            ) from error
        except RecursionError as error:
            raise UserError(
                f"{path!r} can't be read from line {line} on: brackets are nested too deeply. "
                f"Write one object such as {JSON_EXAMPLE} for each picture."
            ) from error
        yield f"line {line}", value
        next_position = between.match(text, end).end()
        line += text.count("\n", position, next_position)
        position = next_position


def read_objects(path: str, objects: Iterable[tuple[str, Any]]) -> Iterator[TableRow]:
    """The rows of JSON objects, each with its place in the file."""
    is_first = True
    for place, item in objects:
        if not isinstance(item, dict):
            raise UserError(
                f"{path!r}, {place}: write one object such as {JSON_EXAMPLE} for each picture."
            )
        columns = find_columns(path, item)
        if is_first and not columns:
            raise UserError(
                f"{path!r} has the columns {list(item)[:20]}, and needs {WANTED_COLUMNS}. Rename "
                f"them, or write one object such as {JSON_EXAMPLE} for each picture."
            )
        if is_first and isinstance(item[columns[0]], (dict, list)):  # all rows in one object
            raise UserError(
                f"{path!r} holds columns, not rows: write one object such as {JSON_EXAMPLE} "
                'for each picture. With pandas: to_json(path, orient="records").'
            )
        is_first = False
        if not columns:
            yield TableRow(place, "", [""], f"it has the columns {list(item)[:20]}")
            continue
        captions = item[columns[1]]
        if not isinstance(captions, list):
            captions = [captions]
        yield TableRow(place, item[columns[0]], captions or [""], "")


def read_coco(path: str, content: dict[str, Any]) -> Iterator[TableRow]:
    """The rows of COCO's caption file, which names pictures by number. Raises UserError."""
    images = content["images"]
    annotations = content["annotations"]
    for items, key in ((images, "id"), (images, "file_name"), (annotations, "image_id")):
        for number, item in enumerate(items, 1):
            if not isinstance(item, dict) or key not in item:
                kind = "image" if items is images else "annotation"
                raise UserError(
                    f"{path!r} looks like a COCO file, but its {kind} {number} has no {key!r}. "
                    "Add it, or download the file again."
                )
    if not annotations:
        raise UserError(f"{path!r} has no rows: no captions are in it. Download it again.")
    if not any("caption" in annotation for annotation in annotations):
        raise UserError(
            f"{path!r} looks like a COCO file, but has no captions: use the file called "
            "captions_..."
        )

    names = {}
    for image in images:
        name = names.setdefault(str(image["id"]), image["file_name"])
        if name != image["file_name"]:
            raise UserError(
                f"{path!r} gives two pictures the id {image['id']!r}: {name!r} and "
                f"{image['file_name']!r}. Give each an id of its own."
            )
    for number, annotation in enumerate(annotations, 1):
        image_id = annotation["image_id"]
        problem = ""
        if str(image_id) not in names:
            problem = f"no image has the id {image_id!r}"
        file_name = names.get(str(image_id))
        yield TableRow(f"annotation {number}", file_name, [annotation.get("caption")], problem)


class Lookup(NamedTuple):
    """A file that a row of a table names."""

    key: str  # its path below the folder
    path: str  # "": there is none, for a reason
    reason: str


class FileFinder:
    """The files below the folder of a table, found by what its rows call them."""

    def __init__(self, folder: str, paths: Iterable[str]) -> None:
        self.folder = folder
        self.files = {}  # by their path below the folder
        self.keys = defaultdict(list)  # by bare name
        for path in paths:
            key = relative(path, folder)
            self.files[key] = Lookup(key, path, "")
            self.keys[key.rpartition("/")[2]].append(key)

    @functools.cached_property
    def near_names(self) -> NearNames:
        return NearNames(self.files)

    def find(self, file_name: Any) -> Lookup:
        """By its path below the folder, or else by its bare name, if only one file has it."""
        if not isinstance(file_name, str) or not file_name.strip(BLANK):
            return Lookup("", "", "its file_name is empty, or not text")
        if file_name in self.files:  # most are, and this is quick
            return self.files[file_name]
        key = file_name.strip(BLANK).replace("\\", "/")
        if key not in self.files:  # it may be ./a.jpg, absolute, or in another form of Unicode
            key = relative(os.path.join(self.folder, key), self.folder)
        if key in self.files:
            return self.files[key]

        same_name = self.keys.get(key, [])
        if len(same_name) == 1:
            return self.files[same_name[0]]
        if len(same_name) > 1:
            examples = " and ".join(map(repr, same_name[:2]))
            reason = f"{len(same_name)} files have this name, such as {examples}"
            return Lookup(key, "", f"{reason}; write the path below the folder")
        if key.startswith("../"):
            reason = "it points outside the folder; copy the picture into it"
            return Lookup(key, "", reason + self.near_names.describe(key))
        if has_foreign_bytes(key):
            return Lookup(key, "", f"the file name {NOT_UTF8}")
        is_hidden = key.startswith(".") or "/." in key
        if is_hidden and os.path.exists(os.path.join(self.folder, key)):
            reason = "it is a hidden file, with a dot at the start of its name or its folder's"
            return Lookup(key, "", f"{reason}; rename it")
        return Lookup(key, "", f"there is no such file{self.near_names.describe(key)}")


NOT_UTF8 = "is not in UTF-8; save the table in UTF-8, the README says how"


def has_foreign_bytes(text: str) -> bool:
    """Whether the text was read from bytes that are not UTF-8."""
    return re.search(r"[\udc80-\udcff]", text) is not None


def find_fault(caption: Any, cleaned: str) -> str:
    """Why a caption of a table can't be used; "": it can. `cleaned` is what is left of it."""
    if caption is None or caption == "":
        return "the caption is empty"
    if not isinstance(caption, str):
        return "the caption is not text"
    if "\x1b" in caption and ISO_2022.search(caption):
        return f"the caption {NOT_PLAIN}; save the table in UTF-8"
    if cleaned and cleaned.isascii():  # most are, and this is quick
        return ""
    if has_foreign_bytes(caption):
        return f"the caption {NOT_UTF8}"
    if re.search(r"[\ud800-\udfff]", caption):  # as JSON may write it
        return "the caption contains half a character, such as a cut emoji; write it whole"
    if not cleaned:
        return "the caption is empty: there is no letter, digit or symbol in it"
    return ""


def read_table(path: str, findings: Findings) -> list[Pair]:
    """The pairs of a table, for the files in its folder. Raises UserError."""
    folder = os.path.dirname(path)
    files = [file for file in list_files(folder, findings) if file != path]
    finder = FileFinder(folder, files)
    refuse_captions_beside(path, finder)

    pairs: dict[Pair, None] = {}  # a set that keeps the order
    named = set()
    row_count = 0
    for row in read_rows(path):
        row_count += 1
        found = finder.find(row.file_name)
        named.add(found.key)
        for caption in row.captions:
            cleaned = clean_caption(caption) if isinstance(caption, str) else ""
            reason = row.problem or found.reason or find_fault(caption, cleaned)
            if not reason:
                pair = Pair(found.path, cleaned)
                if pair not in pairs:
                    pairs[pair] = None
                    continue
                reason = "it repeats an earlier row"
            place = f"{path}, {row.place}"
            if row.file_name:
                place += f": {printable(str(row.file_name))}"
            findings.skip(place, reason)
    if not row_count:
        raise UserError(f"{path!r} has no rows. Save the table again.")

    for key, file in finder.files.items():
        if key in named:
            continue
        if is_other_extension(os.path.splitext(key)[1]):
            findings.not_pictures.append(file.path)
        else:
            findings.skip(file.path, f"has no caption in {path}")
    return list(pairs)


def refuse_captions_beside(path: str, finder: FileFinder) -> None:
    """Raises UserError if there are also caption files next to pictures."""
    pictures = set()
    for key in finder.files:
        stem, extension = os.path.splitext(key)
        if not is_other_extension(extension):
            pictures.add(stem)
    for key in finder.files:
        stem, extension = os.path.splitext(key)
        if extension.lower() == ".txt" and stem in pictures:
            raise UserError(
                f"captions are in two places: in {path!r}, and in .txt files next to pictures, "
                f"such as {key!r}. Keep the table or the .txt files, and move the others out of "
                "the folder."
            )


class Layout(NamedTuple):
    name: str
    path: str  # what is read: a folder, or a table
    read: Callable[[str, Findings], list[Pair]]


def find_layout(folder: str) -> Layout:
    """The layout of a folder. Raises UserError where there are several."""
    layouts = []
    names = sorted(os.listdir(folder))
    for name in names:
        path = os.path.join(folder, name)
        if name == "caption" and os.path.isdir(path):
            layouts.append(Layout("caption/ and Image/", folder, read_folders))
        elif is_wanted(name) and is_table_name(name) and is_table(path, names):
            layouts.append(Layout(name, path, read_table))

    if len(layouts) > 1:
        found = " and ".join(layout.name for layout in layouts)
        raise UserError(
            f"captions are in several places in {folder!r}: {found}. Keep one of them, and move "
            "the others out of the folder."
        )
    if layouts:
        return layouts[0]
    return Layout("<name>.txt next to each picture", folder, read_beside)


def is_caption_of_picture(name: str, names: list[str]) -> bool:
    """Whether metadata.txt or the like is the caption of metadata.jpg, and no table."""
    stem, extension = os.path.splitext(name)
    if extension.lower() != ".txt":
        return False
    for other in names:
        other_stem, other_extension = os.path.splitext(other)
        if other_stem == stem and is_picture_extension(other_extension):
            return True
    return False


def is_table(path: str, names: list[str]) -> bool:
    """Whether a file with a table's name is one: metadata.* always, others if they have columns.

    `names` are those of all files there: metadata.txt may be the caption of metadata.jpg.
    """
    name = os.path.basename(path)
    if is_caption_of_picture(name, names):
        return False
    if name.casefold().startswith("metadata"):
        return True
    try:
        next(read_rows(path), None)
    except UserError:
        return False
    return True


def find_pairs(folder: str, findings: Findings) -> list[Pair]:
    """The pairs in a folder, sorted, of whichever layout, which is printed. Raises UserError."""
    if not os.path.isdir(folder):
        raise UserError(
            f"there is no folder {folder!r}. Choose the one with your pictures and captions."
            + describe_near_folder(folder)
        )
    layout = find_layout(folder)
    print(f"layout of {printable(folder)}: {printable(layout.name)}")
    pairs = layout.read(layout.path, findings)
    if not pairs:
        names = sorted(name for name in os.listdir(folder) if is_wanted(name))
        content = ", ".join(map(repr, names[:MAX_NAMED])) or "nothing"
        raise UserError(
            f"no picture in {folder!r} has a caption. The folder contains {content}. Captions are "
            "read from caption/<name>.txt for the pictures in Image/<name>/, or from metadata.csv "
            "(file_name,text), or from <name>.txt next to <name>.jpg."
            + describe_near_layout(folder)
        )
    return sorted(pairs)


def describe_near_folder(folder: str) -> str:
    """The end of an error message: which folder was probably meant; "": none is near."""
    parent, name = os.path.split(folder)
    names = list_neighbours(folder)
    folders = [other for other in names if os.path.isdir(os.path.join(parent, other))]
    return did_you_mean(name, folders)


def describe_near_layout(folder: str) -> str:
    """What in a folder is nearly one of the layouts; "": nothing is."""
    names = [name for name in sorted(os.listdir(folder)) if is_wanted(name)]
    hints = []
    for name in names:
        stem, extension = os.path.splitext(name.casefold())
        if extension in (".xlsx", ".xls", ".ods", ".numbers"):
            hints.append(f"{name!r} is a spreadsheet: save it as CSV, named metadata.csv.")
        elif is_table_name(name) and extension != ".txt":
            try:
                next(read_rows(os.path.join(folder, name)), None)
            except UserError as error:
                hints.append(f"It can't be used as a table: {error}")
        elif extension in (".csv", ".tsv", ".jsonl"):
            hints.append(f"If {name!r} is a table of captions, rename it to metadata{extension}.")
    hints += describe_near_folders(folder, names)
    if not hints and "caption" in names and "Image" not in names:
        hints.append("There is caption/, but no Image/ for the pictures.")
    return "".join(f" {hint}" for hint in hints)


def describe_near_folders(folder: str, names: list[str]) -> list[str]:
    """Which folders to rename, where there is one for captions and one for pictures."""
    found = {}
    for wanted in ("caption", "Image"):
        for name in names:
            path = os.path.join(folder, name)
            is_near = name.casefold().rstrip("s") == wanted.casefold()
            if is_near and os.path.isdir(path) and not os.path.islink(path):
                found[wanted] = name
        if wanted in names:
            found[wanted] = wanted
    if len(found) < 2:
        return []
    return [
        f"There is {name!r}: rename it to {wanted!r}."
        for wanted, name in found.items()
        if name != wanted
    ]


def read_tail(path: str) -> bytes:
    """The last bytes of a file: cheap, and enough to tell most files of one size apart."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 4096))
        return file.read()


def hash_content(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def find_copies(pictures: Iterable[str]) -> dict[str, str]:
    """Maps each picture that is a copy of another, byte for byte, to the first of them by name."""
    groups = [sorted(path for path in set(pictures) if os.path.isfile(path))]
    for key in (os.path.getsize, read_tail, hash_content):  # the cheapest first
        smaller_groups = []
        for group in groups:
            by_key = defaultdict(list)
            for path in group:
                with contextlib.suppress(OSError):  # it is named when it is read as a picture
                    by_key[key(path)].append(path)
            smaller_groups += [paths for paths in by_key.values() if len(paths) > 1]
        groups = smaller_groups

    copies = {}
    for first, *others in groups:
        for path in others:
            copies[path] = first
    return copies


# ---- Pictures -----------------------------------------------------------------------------------


# Errors of a disk, a network drive or the system, rather than of the file that is read.
MACHINE_ERRORS = (
    errno.EIO,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.ENOTCONN,
)
LARGE_PICTURE = threading.Lock()  # held while one is decoded


def read_picture(path: str, side: int) -> Image.Image:
    """A picture as RGB, as a viewer shows it: upright, in sRGB, its first frame, over white.

    16-bit grey becomes 8-bit. JPEGs far larger than `side` pixels are decoded at a reduced scale,
    never below twice `side`. Other pictures of more than LARGE_PIXELS are decoded as they are, one
    at a time, and then scaled down likewise. Raises ValueError for
    what is not a picture to learn from, and many kinds of exceptions of Pillow's decoders.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a file")  # a pipe would block for ever
    if os.path.splitext(path)[1].lower() in RAW_EXTENSIONS:
        raise ValueError(f"it {RAW}")
    with Image.open(path, formats=PICTURE_FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(
                f"it has {picture.width} x {picture.height} pixels, and the limit is "
                f"{MAX_PIXELS // 1_000_000} megapixels; save it smaller"
            )
        picture.draft(None, (2 * side, 2 * side))
        white_is_zero = getattr(picture, "tag_v2", {}).get(262) == 0  # of TIFF
        is_inverted = white_is_zero and picture.mode.startswith("I;16")  # Pillow forgets these
        if picture.width * picture.height <= LARGE_PIXELS:
            return show(picture, is_inverted)
        with LARGE_PICTURE:  # another thread with a large picture waits
            return show(reduce_picture(picture, side), is_inverted)


def show(picture: Image.Image, is_inverted: bool) -> Image.Image:
    """An opened picture as a viewer shows it, see read_picture."""
    picture = convert_to_rgb(ImageOps.exif_transpose(picture))
    return ImageOps.invert(picture) if is_inverted else picture


def reduce_picture(picture: Image.Image, side: int) -> Image.Image:
    """A picture scaled down by a whole factor, never below twice `side`; profile and EXIF kept."""
    picture.load()  # Pillow turns a TIFF upright then, and its EXIF says so afterwards
    info = picture.info | {"exif": picture.getexif().tobytes()}
    if picture.mode in ("1", "P"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    factor = max(1, min(picture.size) // (2 * side))
    if picture.mode.startswith("I;16"):
        picture = picture.resize((picture.width // factor, picture.height // factor))
    else:
        picture = picture.reduce(factor)
    picture.info = info
    return picture


def convert_to_rgb(picture: Image.Image) -> Image.Image:
    """From any mode and colour profile to RGB, which is sRGB; transparency over white."""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(grey.round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(
            "its pixels are 32-bit or negative numbers, whose range is not known; save it with 8 "
            "bits, or 16 unsigned bits"
        )

    alpha = None
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
    if picture.mode in ("1", "L", "LA"):  # stays grey: its profile is one for grey
        picture = picture.convert("L")
    elif picture.mode not in ("RGB", "CMYK"):
        picture = picture.convert("RGB")

    transform = make_transform(profile, picture.mode) if profile else None
    if transform:
        picture = ImageCms.applyTransform(picture, transform)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if alpha:
        white = Image.new("RGB", picture.size, "white")
        picture = Image.composite(picture, white, alpha)
    return picture


@functools.lru_cache(maxsize=64)
def make_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an embedded colour profile to sRGB; None: it is sRGB, damaged, or for another mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None

    # A profile is sRGB's if it changes no colour: there are many of them, under many names.
    levels = range(0, 256, 51)
    colours = Image.new("RGB", (len(levels) ** 3, 1))
    colours.putdata(list(itertools.product(levels, repeat=3)))
    colours = colours.convert(mode)
    unchanged = np.asarray(colours.convert("RGB"), dtype=int)
    converted = np.asarray(ImageCms.applyTransform(colours, transform), dtype=int)
    if np.abs(converted - unchanged).max() <= 2:
        return None
    return transform


def is_one_colour(picture: Image.Image) -> bool:
    """Whether a picture (RGB) looks like one colour, judged by a grid of 64 x 64 points."""
    points = picture.resize((64, 64), Image.Resampling.NEAREST)
    return all(high - low < ONE_COLOUR_RANGE for low, high in points.getextrema())


def explain_unreadable(path: str, error: Exception) -> str:
    """Why a picture can't be read, and what to do."""
    if "MAX_TEXT" in str(error):
        megabytes = MAX_PNG_TEXT // 1_000_000
        return f"can't be read: more than {megabytes} MB of text in it; save it without metadata"
    if "truncated" in str(error).lower():
        return f"can't be read: it is cut off ({error}); copy or download it again"
    if not isinstance(error, UnidentifiedImageError):
        return f"can't be read: {describe_error(error)}"

    try:
        with open(path, "rb") as file:
            first_bytes = file.read(100)
    except OSError as not_readable:
        return f"can't be read: {describe_error(not_readable)}"
    if not first_bytes:
        return "is empty: the file has no content; copy or download it again"
    other_kind = recognize(first_bytes)
    if other_kind == PICTURE:
        return (
            "is damaged after its first bytes, or in a rare format; copy or download it again, or "
            "save it as JPEG"
        )
    if other_kind:
        return other_kind
    if is_text(first_bytes):
        return "is text, not a picture (a failed download?); download it again"
    return f"is not a {', '.join(PICTURE_FORMATS)}; if it is a picture, save it as JPEG"


def is_text(first_bytes: bytes) -> bool:
    """Whether a file begins with printable ASCII."""
    return re.fullmatch(rb"[\t\n\r\x20-\x7e]+", first_bytes) is not None


def is_other_text(path: str) -> bool:
    """Whether a file is text, and not named as a picture either: LICENSE, a.tags, a.txt~."""
    if is_picture_extension(os.path.splitext(path)[1]) or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            first_bytes = file.read(100)
    except OSError:  # explain_unreadable says why
        return False
    return is_text(first_bytes) and not recognize(first_bytes)


class Decoded(NamedTuple):
    """Some pictures, read."""

    pixels: dict[str, np.ndarray | None]  # of those that can be, see decode_pictures
    findings: Findings


def decode_pictures(paths: list[str], image_processor: Any) -> Decoded:
    """Pixel values, (3, height, width), of the pictures that can be read.

    Without an image processor, for --check, pictures are only read, and the values are None.
    Raises OSError if the disk fails, and UserError if there is no memory for a picture.
    """
    side = image_processor.size["height"] if image_processor else 224
    decoded = Decoded({}, Findings())
    for path in paths:
        try:
            picture = read_picture(path, side)
            pixels = image_processor(picture).pixel_values[0] if image_processor else None
        except MemoryError as error:
            raise UserError(
                f"there is no memory left to read {path!r}. Close other programs, lower "
                "NUM_WORKERS, or save the picture smaller."
            ) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
                raise
            if is_other_text(path):
                decoded.findings.not_pictures.append(path)
            else:
                decoded.findings.skip(path, explain_unreadable(path, error))
            continue
        decoded.pixels[path] = pixels
        if is_one_colour(picture):
            decoded.findings.one_colour.append(path)
    return decoded


def read_pictures(
    paths: Sequence[str], image_processor: Any, workers: int, title: str, findings: Findings
) -> Iterator[dict[str, np.ndarray | None]]:
    """What can be read, in order, up to INFERENCE_BATCH pictures at a time, as decode_pictures.

    Threads do it: Pillow and NumPy release the GIL. At most two batches for each thread wait to be
    taken, so that memory stays bounded.
    """
    batches = deque(paths[i : i + INFERENCE_BATCH] for i in range(0, len(paths), INFERENCE_BATCH))
    waiting = deque()
    bar = tqdm(total=len(paths), desc=title, unit="picture", disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        try:
            while batches or waiting:
                while batches and len(waiting) < 2 * workers:
                    waiting.append(pool.submit(decode_pictures, batches.popleft(), image_processor))
                decoded = waiting.popleft().result()
                findings.skipped += decoded.findings.skipped
                findings.not_pictures += decoded.findings.not_pictures
                findings.one_colour += decoded.findings.one_colour
                if decoded.pixels:
                    yield decoded.pixels
                not_read = decoded.findings.skipped + decoded.findings.not_pictures
                bar.update(len(decoded.pixels) + len(not_read))
        finally:
            pool.shutdown(cancel_futures=True)


# ---- Memory: as much at a time as there is room for ---------------------------------------------


class PartSize:
    """How many items are worked on at a time: halved whenever memory runs out, and then kept."""

    def __init__(self, size: int, remedy: str) -> None:
        self.size = size
        self.remedy = remedy  # for when there is no memory for a single one

    def run(self, work: Callable[[Sequence], Any], items: Sequence) -> list[Any]:
        """work(part) for one part of the items after another. Raises UserError."""
        results = []
        start = 0
        while start < len(items):
            part = items[start : start + self.size]
            is_too_large = False
            try:
                results.append(work(part))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    reason = " ".join(str(error).split()).rstrip(".")
                    raise UserError(f"{reason or 'out of memory'}. {self.remedy}") from error
                is_too_large = True

            # Only here, after `except`, is the traceback freed, which holds all activations.
            if is_too_large:
                self.size = math.ceil(len(part) / 2)
                torch.cuda.empty_cache()
                tqdm.write(f"out of memory with {len(part)} at a time: {self.size} from now on")
            else:
                start += len(part)
        return results


# ---- The captioner: BLIP-2 on its device, and how a pair is laid out for it ---------------------


class Example(NamedTuple):
    """A pair, ready for training or measuring."""

    features: torch.Tensor  # of the picture, see Captioner.encode
    caption: str


class Batch(NamedTuple):
    """Examples as the language model takes them, on the CPU.

    There are no masks: to select by one is to wait for the device. Instead, `positions` say where
    each target is predicted in the output, flattened to (rows * length, ...), and `owners` which
    row it belongs to.
    """

    input_ids: torch.Tensor  # (rows, tokens), what is read after the picture
    decoder_input_ids: torch.Tensor  # (rows, tokens) for the decoder of T5; (rows, 0) for OPT
    targets: torch.Tensor  # (targets,), ids of captions and stop tokens, of all rows
    positions: torch.Tensor  # (targets,)
    owners: torch.Tensor  # (targets,)
    features: torch.Tensor  # (rows, ...), see Captioner.encode


class RowBuilder:
    """Lays pairs out for the language model, without needing it.

    OPT:     picture, BOS, prompt, caption, newline: one text, of which the last two are learned
    Flan-T5: picture, prompt, </s> for the encoder; caption, </s> from the decoder are learned
    """

    def __init__(self, tokenizer: Any, config: Blip2Config, prompt: str, max_tokens: int) -> None:
        text_config = config.text_config
        self.tokenizer = tokenizer
        self.is_t5 = text_config.model_type == "t5"
        self.pad_id = text_config.pad_token_id
        self.stop_id = text_config.eos_token_id  # OPT's is a newline, not its tokenizer's </s>
        self.start_id = getattr(text_config, "decoder_start_token_id", None)  # of T5
        self.num_query_tokens = config.num_query_tokens  # of a picture
        self.max_tokens = max_tokens  # of a caption; the rest is cut
        # In what users write, "</s>" is a word: it is never a special token.
        self.prompt_ids = tokenizer(prompt, split_special_tokens=True).input_ids
        # For OPT the caption follows the prompt, so it needs a space; T5's decoder starts fresh.
        self.space = " " if prompt and not self.is_t5 else ""
        self.ids_by_caption: dict[str, list[int]] = {}  # a caption is tokenized only once

    def tokenize(self, caption: str) -> list[int]:
        """The ids of a caption, not cut, without the stop token."""
        if caption not in self.ids_by_caption:
            self.ids_by_caption[caption] = self.tokenizer(
                self.space + caption, add_special_tokens=False, split_special_tokens=True
            ).input_ids
        return self.ids_by_caption[caption]

    def label_ids(self, caption: str) -> list[int]:
        """What is learned of a caption: its ids, cut, and the stop token."""
        return [*self.tokenize(caption)[: self.max_tokens], self.stop_id]

    def decode(self, ids: list[int]) -> str:
        """A caption, on one line."""
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    def collate_fn(self, examples: Sequence[Example]) -> Batch:
        """Tokenizes the captions, and batches them with the features."""
        features = torch.stack([example.features for example in examples])
        labels = [self.label_ids(example.caption) for example in examples]
        return self.build_batch(features, labels)

    def build_batch(self, features: torch.Tensor, labels: list[list[int]]) -> Batch:
        """Batches the features of pictures, (rows, ...), and the ids to be predicted for each."""
        longest = max(len(ids) for ids in labels)
        padded = [ids + [self.pad_id] * (longest - len(ids)) for ids in labels]
        if self.is_t5:
            input_ids = [self.prompt_ids for _ in labels]  # all the same: nothing to pad or mask
            decoder_input_ids = [[self.start_id, *ids[:-1]] for ids in padded]
            # The decoder's output has only the caption, whose first token its start predicts.
            row_length = longest
            first_position = 0
        else:  # causal: no token sees the padding to its right, so that it needs no mask
            input_ids = [self.prompt_ids + ids for ids in padded]
            decoder_input_ids = [[] for _ in labels]
            # The output has picture, prompt and caption; each token predicts the one after it.
            length_before = self.num_query_tokens + len(self.prompt_ids)
            row_length = length_before + longest
            first_position = length_before - 1

        targets = []
        positions = []
        owners = []
        for row, ids in enumerate(labels):
            position = row * row_length + first_position
            targets += ids
            positions += range(position, position + len(ids))
            owners += [row] * len(ids)

        def to_tensor(values: list) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long)  # of an empty list, too

        return Batch(
            to_tensor(input_ids),
            to_tensor(decoder_input_ids),
            to_tensor(targets),
            to_tensor(positions),
            to_tensor(owners),
            features,
        )


class Caption(NamedTuple):
    """A caption that was generated for a picture."""

    text: str
    confidence: float  # geometric mean of the probabilities of the tokens, stop token included


MEMORY_REMEDY = "Free memory on the device (nvidia-smi shows what uses a GPU)"
ENCODE_REMEDY = f"{MEMORY_REMEDY}, or use a smaller MODEL_ID."
MEASURE_REMEDY = (
    f"{MEMORY_REMEDY}, or train with a lower MAX_CAPTION_TOKENS, or with LOAD_IN_4BIT if it is off."
)
CAPTION_REMEDY = f"{MEMORY_REMEDY}, or lower NUM_BEAMS."


class Captioner:
    """The model, in eval mode and frozen except for LoRA, on its device."""

    def __init__(
        self,
        model: Blip2ForConditionalGeneration,
        processor: Blip2Processor,
        prompt: str,
        max_tokens: int,
        num_beams: int,
        trains_qformer: bool,
    ) -> None:
        self.model = model
        self.processor = processor
        self.row_builder = RowBuilder(processor.tokenizer, model.config, prompt, max_tokens)
        self.num_beams = num_beams
        self.trains_qformer = trains_qformer  # it runs in every step then
        self.device = model.device
        self.dtype = model.language_projection.weight.dtype
        self.encode_size = PartSize(INFERENCE_BATCH, ENCODE_REMEDY)
        self.measure_size = PartSize(INFERENCE_BATCH, MEASURE_REMEDY)
        self.caption_size = PartSize(INFERENCE_BATCH, CAPTION_REMEDY)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device, through pinned memory, so that nothing waits."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def send_batch(self, batch: Batch) -> Batch:
        """To the device: all integers in one copy, then the features."""
        *integers, features = batch
        together = torch.cat([tensor.flatten() for tensor in integers])
        parts = self.send(together).split([tensor.numel() for tensor in integers])
        sent = [part.view_as(tensor) for part, tensor in zip(parts, integers, strict=True)]
        return Batch(*sent, self.send(features))

    def feature_shape(self) -> tuple[int, int]:
        """The shape of one picture's features, see `encode`."""
        config = self.model.config
        if self.trains_qformer:
            vision = config.vision_config
            patches = (vision.image_size // vision.patch_size) ** 2
            return patches + 1, vision.hidden_size
        return config.num_query_tokens, config.qformer_config.hidden_size

    @torch.no_grad()
    def encode(self, pixel_values: Sequence[np.ndarray]) -> torch.Tensor:
        """The features of pictures, which never change, on the CPU.

        `pixel_values` are (3, height, width) for each. Features are the output of the frozen
        layers before the first one with LoRA: that of the Q-Former, (pictures, num_query_tokens,
        hidden), or, if the Q-Former is trained, its input, (pictures, patches + 1, width).
        """

        def encode_part(part: Sequence[np.ndarray]) -> torch.Tensor:
            pixels = self.send(torch.from_numpy(np.stack(part))).to(self.dtype)
            features = self.model.vision_model(pixels)[0]
            if not self.trains_qformer:
                features = self.run_qformer(features)
            return features.cpu()

        return torch.cat(self.encode_size.run(encode_part, pixel_values))

    def run_qformer(self, patches: torch.Tensor) -> torch.Tensor:
        """(pictures, patches + 1, width) to (pictures, num_query_tokens, hidden)."""
        queries = self.model.query_tokens.expand(len(patches), -1, -1)
        output = self.model.qformer(query_embeds=queries, encoder_hidden_states=patches)
        return output[0].to(self.dtype)  # with float16, the Q-Former stays in float32

    def drop_vision_side(self) -> None:
        """Frees the memory of the parts that are not needed once all pictures are encoded."""
        self.model.vision_model.to("meta")
        if not self.trains_qformer:
            self.model.qformer.to("meta")

    def embed(self, features: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """What the language model reads, (rows, tokens, width): projected features, then text."""
        if self.trains_qformer:
            features = self.run_qformer(features)
        image = self.model.language_projection(features)
        text = self.model.get_input_embeddings()(input_ids)
        return torch.cat([image.to(text.dtype), text], dim=1)

    def target_losses(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy in float32 of each target of a batch on the device, (targets,)."""
        inputs = self.embed(batch.features, batch.input_ids)
        language_model = self.model.language_model
        if self.row_builder.is_t5:
            output = language_model(
                inputs_embeds=inputs, decoder_input_ids=batch.decoder_input_ids, use_cache=False
            )
            logits = output.logits.flatten(0, 1).index_select(0, batch.positions)
        else:  # the head, which is large, runs only where a target is predicted
            output = language_model.model.decoder(inputs_embeds=inputs, use_cache=False)
            hidden = output[0].flatten(0, 1).index_select(0, batch.positions)
            logits = language_model.lm_head(hidden)
        return F.cross_entropy(logits.float(), batch.targets, reduction="none")

    def losses(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy in float32, summed over each row's targets, (rows,)."""
        batch = self.send_batch(batch)
        target_losses = self.target_losses(batch)
        row_losses = target_losses.new_zeros(len(batch.features))
        return row_losses.index_add(0, batch.owners, target_losses)

    @torch.no_grad()
    def measure(self, examples: Sequence[Example]) -> torch.Tensor:
        """The loss of each example, summed over its tokens, (examples,), on the CPU."""

        def measure_part(part: Sequence[Example]) -> torch.Tensor:
            return self.losses(self.row_builder.collate_fn(part)).cpu()

        return torch.cat(self.measure_size.run(measure_part, examples))

    @torch.no_grad()
    def measure_tokens(self, examples: Sequence[Example]) -> list[list[float]]:
        """The loss of each token that the examples teach, the stop token last."""
        losses: list[list[float]] = []

        def measure_part(part: Sequence[Example]) -> None:
            batch = self.send_batch(self.row_builder.collate_fn(part))
            counts = batch.owners.bincount(minlength=len(part)).tolist()
            for row_losses in self.target_losses(batch).split(counts):
                losses.append(row_losses.tolist())

        self.measure_size.run(measure_part, examples)
        return losses

    def caption(self, features: torch.Tensor) -> list[Caption]:
        """Captions for the features of pictures, (pictures, ...), see `encode`."""
        captions = []
        for part in self.caption_size.run(self.caption_part, features):
            captions += part
        return captions

    @torch.no_grad()
    def caption_part(self, features: torch.Tensor) -> list[Caption]:
        """Captions for as many pictures as fit into memory."""
        row_builder = self.row_builder
        prompts = torch.tensor([row_builder.prompt_ids] * len(features))
        inputs = self.embed(self.send(features), self.send(prompts))
        generated = self.model.language_model.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones_like(inputs[..., 0], dtype=int),
            max_new_tokens=row_builder.max_tokens + 1,
            do_sample=False,
            num_beams=self.num_beams,
            eos_token_id=row_builder.stop_id,
            pad_token_id=row_builder.pad_id,
        )
        labels = []
        for ids in generated.tolist():
            if row_builder.is_t5:
                ids = ids[1:]  # without what the decoder starts with
            if row_builder.stop_id in ids:
                ids = ids[: ids.index(row_builder.stop_id) + 1]
            labels.append(ids)

        captions = []
        losses = self.losses(row_builder.build_batch(features, labels)).tolist()
        for ids, loss in zip(labels, losses, strict=True):
            captions.append(Caption(row_builder.decode(ids), math.exp(-loss / len(ids))))
        return captions


# ---- Loading the model --------------------------------------------------------------------------


LOADING_REMEDY = f"{MEMORY_REMEDY}, set LOAD_IN_4BIT, or use a smaller MODEL_ID."
OLD_DRIVER_REMEDY = (
    "Install a driver of version 580 or newer, or a PyTorch for older ones: "
    'pip install "torch<2.11"'
)
NO_KERNELS_REMEDY = (
    'Install an older PyTorch: pip install "torch<2.11" for compute capability 7.0 (V100); for an '
    "older GPU, see PyTorch's own page of builds"
)


def has_kernels(major: int, minor: int, architectures: list[str]) -> bool:
    """Whether a PyTorch built for these (torch.cuda.get_arch_list()) runs on such a GPU.

    sm_80 runs on 8.0 to 8.9; compute_80 is compiled for any newer one.
    """
    for prefix, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures)):
        built = divmod(int(digits), 10)
        if built <= (major, minor) and (prefix == "compute" or built[0] == major):
            return True
    return False


class DeviceChoice(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of all that is not in 4 bits
    reason: str  # for the user


def find_gpu(name: str) -> torch.device:
    """The GPU that DEVICE names, else that of this process.

    Where there is none, PyTorch says why, in an AssertionError or a RuntimeError.
    """
    gpu = torch.device(name if name.startswith("cuda:") else "cuda")
    assigned = PartialState().device  # accelerate gives each of several processes one
    if gpu.index is None and assigned.index is not None:
        gpu = assigned
    torch.cuda.get_device_capability(gpu)  # raises these errors
    if gpu.index is None:
        gpu = torch.device("cuda", torch.cuda.current_device())
    return gpu


def choose_dtype(dtype: str, capability: tuple[int, int], is_t5: bool) -> str:
    """What DTYPE "auto" is on a GPU of this compute capability; on the CPU it is (0, 0)."""
    if dtype != "auto":
        return dtype
    if capability >= (8, 0):  # is_bf16_supported() is true by emulation on older GPUs
        return "bfloat16"
    if capability > (0, 0) and not is_t5:
        return "float16"
    return "float32"


def choose_device(name: str, dtype: str, is_t5: bool, parameters: int) -> DeviceChoice:
    """Device and dtype for these settings and a model of this size. Raises UserError."""
    if name.startswith("cuda:") and PartialState().num_processes > 1:
        raise UserError(f"DEVICE is {name!r}, but each process uses its own GPU: set it to auto.")
    device = torch.device("cpu")
    reason = "as DEVICE says"
    if name != "cpu":
        try:
            device = find_gpu(name)
        except (AssertionError, RuntimeError) as error:
            why = str(error).splitlines()[0].rstrip(".")
            if name != "auto" or parameters > MAX_CPU_PARAMETERS:
                raise UserError(
                    f"DEVICE is {name!r}, but {explain_missing_gpu(name, why)}, or use --device "
                    "cpu, which is slow with a large model."
                ) from error
            reason = f"no GPU: {why}"

    capability = (0, 0)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        major, minor = capability
        reason = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        architectures = torch.cuda.get_arch_list()
        if torch.version.hip is None and not has_kernels(major, minor, architectures):
            raise UserError(
                f"this PyTorch is compiled for {architectures}, and not for the GPU ({reason}). "
                f"{NO_KERNELS_REMEDY}, or use --device cpu."
            )

    dtype = choose_dtype(dtype, capability, is_t5)
    if dtype == "float16" and (is_t5 or device.type == "cpu"):
        raise UserError(
            "DTYPE float16 works only for OPT on a GPU (T5 overflows). Set DTYPE to auto. A run "
            "that was started in float16 can be continued on a GPU only; elsewhere, --restart "
            "trains from scratch."
        )
    return DeviceChoice(device, getattr(torch, dtype), reason)


def explain_missing_gpu(name: str, why: str) -> str:
    """What PyTorch says of the GPU that is asked for, and what to do, without a full stop."""
    count = torch.cuda.device_count()
    if "too old" in why:
        remedy = OLD_DRIVER_REMEDY
    elif name.startswith("cuda:") and 0 < count <= int(name.removeprefix("cuda:")):
        existing = "only cuda:0"
        if count > 1:
            existing = f"only cuda:0 to cuda:{count - 1}"
        return f"there is {existing} ({why}). Choose one that exists"
    elif torch.version.cuda is None and torch.version.hip is None:
        remedy = "Install a PyTorch with CUDA"
    elif "driver" in why:
        remedy = "Install NVIDIA's driver"
    else:
        remedy = "See what nvidia-smi shows, and whether CUDA_VISIBLE_DEVICES hides it"
    return f"there is no GPU: {why}. {remedy}"


def check_model_folder(folder: str) -> None:
    """Raises ValueError with what is missing or damaged in a folder that should hold a model."""
    path = Path(folder)
    names = {entry.name for entry in path.iterdir()}
    if "adapter_config.json" in names:
        base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise ValueError(
            f"it is an adapter, not a model. Set MODEL_ID to its base, {base!r}, and START_FROM to "
            "this folder to continue training it"
        )
    if "config.json" not in names:
        for pattern in ("*/config.json", "*/*/config.json"):  # as in the Hub's cache
            for config in sorted(path.glob(pattern)):
                raise ValueError(f"it holds a model in {str(config.parent)!r}: name that folder")
        raise ValueError("there is no config.json in it; download the whole model")

    for file in sorted(path.iterdir()):
        if file.is_file():
            refuse_damaged_file(file)

    weights = {"model.safetensors"}
    index_path = path / "model.safetensors.index.json"
    if index_path.exists():
        weights = set(json.loads(index_path.read_text())["weight_map"].values())
    missing = sorted(weights - names)
    if missing:
        other_weights = sorted(name for name in names if name.endswith((".bin", ".pt", ".ckpt")))
        if other_weights:
            raise ValueError(
                f"its weights are in {other_weights[0]}, not in {missing[0]}; only safetensors are "
                "read. Take the safetensors of the model, or save it again with save_pretrained"
            )
        raise ValueError(f"there is no {missing[0]} in it; download the whole model")
    if not names & {"tokenizer.json", "vocab.json", "spiece.model"}:
        raise ValueError("there is no tokenizer.json in it; download the whole model")
    if "tokenizer_config.json" not in names:
        raise ValueError("there is no tokenizer_config.json in it; download the whole model")
    if not names & {"preprocessor_config.json", "processor_config.json"}:
        raise ValueError("there is no preprocessor_config.json in it; download the whole model")
    for name in sorted(weights):
        refuse_damaged_weights(path / name)


def refuse_damaged_file(path: Path) -> None:
    """Raises ValueError if a file of a model is obviously not what it should be."""
    with open(path, "rb") as file:
        first_bytes = file.read(100)
    other_kind = recognize(first_bytes)
    if path.suffix in (".json", ".safetensors") and not first_bytes:
        raise ValueError(f"{path.name} is empty; download or copy it again")
    if path.suffix in (".json", ".safetensors") and other_kind:
        raise ValueError(f"{path.name} {other_kind}")
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path.name} is damaged, or only partly downloaded ({error}); download it again"
            ) from error


def refuse_damaged_weights(path: Path) -> None:
    """Raises ValueError if a safetensors file is not whole. Only its header is read."""
    refuse_damaged_file(path)
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is damaged, or only partly downloaded ({error}); download or copy it "
            "again"
        ) from error


def read_config(model_id: str) -> Blip2Config:
    """Raises ValueError for all but a BLIP-2 that writes captions with OPT or T5."""
    content, _ = Blip2Config.get_config_dict(model_id)
    model_type = content.get("model_type")
    architecture = "Blip2ForConditionalGeneration"
    if content.get("architectures"):
        architecture = content["architectures"][0]
    if model_type != "blip-2" or architecture != "Blip2ForConditionalGeneration":
        raise ValueError(
            f"it is of type {model_type!r} ({architecture}), not a BLIP-2 that writes captions "
            "with OPT or Flan-T5"
        )
    config = Blip2Config.from_pretrained(model_id)
    language_model = config.text_config.model_type
    if language_model not in ("opt", "t5"):
        raise ValueError(f"its language model is {language_model}; only OPT and Flan-T5 are known")
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "it was saved quantized. Set it to the original model: LOAD_IN_4BIT quantizes it"
        )
    return config


def read_processor(model_id: str, config: Blip2Config) -> Blip2Processor:
    """Image processor and tokenizer. Raises ValueError where they don't fit the model."""
    # The Pillow class by name: the automatic one depends on whether torchvision is installed.
    image_processor = transformers.BlipImageProcessorPil.from_pretrained(model_id)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)

    image_size = config.vision_config.image_size
    not_square = Image.new("RGB", (image_size + 1, image_size + 2))
    _, height, width = image_processor(not_square).pixel_values[0].shape
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"its processor makes pictures of {width} x {height} pixels, and its vision tower "
            f"reads {image_size} x {image_size}. Take both from the same model"
        )
    vocabulary = config.text_config.vocab_size
    largest_id = max(tokenizer.get_vocab().values(), default=-1)
    if largest_id < 0 or largest_id >= vocabulary:
        raise ValueError(
            f"its tokenizer has {largest_id + 1} tokens, and its language model {vocabulary}. Take "
            "both from the same model"
        )
    return Blip2Processor(image_processor, tokenizer, config.num_query_tokens)


def load_model(
    settings: argparse.Namespace,
) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """BLIP-2 on its device, from safetensors; never runs code from the model's repository.

    Raises UserError, ValueError and what the libraries raise.
    """
    model_id = settings.MODEL_ID
    if os.path.isdir(model_id):
        check_model_folder(model_id)
    config = read_config(model_id)
    processor = read_processor(model_id, config)
    with torch.device("meta"):  # takes no memory
        parameters = Blip2ForConditionalGeneration(config).num_parameters()
    is_t5 = config.text_config.model_type == "t5"
    device, dtype, reason = choose_device(settings.DEVICE, settings.DTYPE, is_t5, parameters)
    print(f"device: {device}, {str(dtype).removeprefix('torch.')} ({reason})")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else pinned memory opens a context on GPU 0 too
    elif parameters < TINY_PARAMETERS:
        torch.set_num_threads(1)

    quantization = None
    if settings.LOAD_IN_4BIT:
        quantization = transformers.BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    model, loading = Blip2ForConditionalGeneration.from_pretrained(
        model_id,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": device},
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the error below names them
    )
    wrong = sorted(str(key) for key in loading["missing_keys"] | loading["mismatched_keys"])
    if wrong:
        raise ValueError(f"weights are missing or have the wrong shape: {wrong[0]}")
    layers = {name.rpartition(".")[0] for name in model.state_dict()}
    for key in sorted(loading["unexpected_keys"]):
        layer = re.match(r".*\.layers?\.\d+\.", key)
        if layer and not any(name.startswith(layer[0]) for name in layers):
            raise ValueError(
                f"its weights have a layer that config.json does not name ({key}); take both from "
                "the same model"
            )

    for module in model.modules():
        # With avx512_bf16, bitsandbytes would repack 4-bit weights in place in the first forward
        # pass without gradients, for inference only: training on them is wrong from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False), processor


def explain_loading_error(model_id: str, error: Exception) -> str:
    """Why a model can't be loaded, in the words of what failed, and what to do."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    sentence = f"can't load MODEL_ID {model_id!r}: {reason}."
    if "driver version is insufficient" in reason or "driver on your system is too old" in reason:
        return f"{sentence} {OLD_DRIVER_REMEDY}, or use --device cpu."
    if "no kernel image" in reason:
        return f"{sentence} {NO_KERNELS_REMEDY}, or use --device cpu."
    if "bitsandbytes" in reason:
        return f"{sentence} A newer bitsandbytes may help: pip install --upgrade bitsandbytes."
    if not isinstance(error, OSError) or os.path.isdir(model_id):
        return sentence

    if re.match(r"\w+://|hf\.co/|huggingface\.co/", model_id):
        return (
            f"can't load MODEL_ID {model_id!r}: it is a URL. Write the model's name, as in "
            "Salesforce/blip2-opt-2.7b."
        )
    # What the Hub's libraries can't find or fetch is an OSError.
    if os.path.exists(model_id):
        return f"can't load MODEL_ID {model_id!r}: it is a file. Set it to the folder of a model."
    if model_id.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id):
        return (
            f"can't load MODEL_ID {model_id!r}: there is no such folder, and a name on the Hub "
            "looks like Salesforce/blip2-opt-2.7b."
        )
    return (
        f"{sentence} There is no such folder, so it was looked up on the Hub: check the name and "
        "the network; a private model needs `hf auth login`."
    )


def load_captioner(settings: argparse.Namespace) -> Captioner:
    """The model that the settings name. Raises UserError."""
    print(f"model: {printable(settings.MODEL_ID)}")
    try:
        model, processor = load_model(settings)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds
        if is_out_of_memory(error):
            reason = str(error).rstrip(".") or "out of memory"
            raise UserError(f"{reason}, while the model was loaded. {LOADING_REMEDY}") from error
        raise UserError(explain_loading_error(settings.MODEL_ID, error)) from error
    print(f"memory: {model.get_memory_footprint() / 1e9:.3g} GB for the weights")

    limit = settings.MAX_CAPTION_TOKENS
    layers = find_lora_layers(model, settings.LORA_TARGETS)
    trains_qformer = any(name.startswith("qformer.") for name in layers)
    captioner = Captioner(
        model, processor, settings.PROMPT, limit, settings.NUM_BEAMS, trains_qformer
    )
    prompt_length = len(captioner.row_builder.prompt_ids)
    needed = model.config.num_query_tokens + prompt_length + limit + 1
    available = getattr(model.config.text_config, "max_position_embeddings", math.inf)
    if needed > available:
        raise UserError(
            f"picture, PROMPT and MAX_CAPTION_TOKENS = {limit} need more than the {available} "
            "positions of this model. Lower MAX_CAPTION_TOKENS, or shorten PROMPT."
        )
    return captioner


def find_lora_layers(model: Blip2ForConditionalGeneration, targets: str) -> list[str]:
    """Names of the layers that LORA_TARGETS matches.

    Raises UserError where these are none, or not only linear layers after the vision tower.
    """
    pattern = LORA_PATTERNS.get(targets, targets)
    linear = set()
    for name, module in model.named_modules():
        is_after = not name.startswith("vision_model.") and not name.endswith("lm_head")
        if isinstance(module, torch.nn.Linear) and is_after:
            linear.add(name)
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    if not matched or matched - linear:
        patterns = sorted({re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) for name in linear})
        lines = [
            f"LORA_TARGETS {targets!r} must be {', '.join(LORA_PATTERNS)}, or match some of these:",
            *patterns,
            f"and nothing else. Now it matches {sorted(matched)[:3] or 'nothing'}.",
        ]
        raise UserError("\n  ".join(lines))
    return sorted(matched)


def add_lora(
    model: Blip2ForConditionalGeneration, targets: str, rank: int, alpha: float, dropout: float
) -> PeftModel:
    """Puts LoRA (Hu et al. 2021, arXiv:2106.09685) into `model`, which PEFT changes in place.

    Raises UserError for the same reasons as find_lora_layers.
    """
    layers = find_lora_layers(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LORA_PATTERNS.get(targets, targets),
    )
    adapter = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    count, _ = adapter.get_nb_trainable_parameters()
    print(f"LoRA: {count:,} weights, of rank {rank}, on {len(layers)} linear layers")
    return adapter


# ---- Features: the frozen vision side's output for a picture, computed once ---------------------


def hash_vision_side(captioner: Captioner) -> str:
    """A hash of all that changes the features: weights, processor, dtype, decoder."""
    words = [captioner.dtype, DECODER_VERSION, captioner.processor.image_processor.to_json_string()]
    if captioner.trains_qformer:
        words.append("patches")
    for name, tensor in captioner.model.state_dict().items():
        if name.startswith(("vision_model.", "qformer.", "query_tokens")):
            words += [name, tensor.shape, torch.hash_tensor(tensor).item()]
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()[:16]


def make_feature_folder(train_dir: str, output: Path, vision_side: str) -> Path:
    """Makes TRAIN_DIR/.features/<hash>, or, if it is read-only, OUTPUT_DIR.features/<hash>."""
    parent = Path(train_dir, ".features")
    if not os.access(parent if parent.exists() else train_dir, os.W_OK):
        parent = Path(f"{output}.features")
    folder = parent / vision_side
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def picture_key(path: str, root: str) -> str:
    """Identifies a picture across runs: its relative path and its size in bytes."""
    name = relative(path, root)
    try:
        return f"{name} {os.stat(path).st_size}"
    except OSError:
        return f"{name} is not there"


def feature_name(path: str, root: str) -> str:
    """The name of the file of a picture's features: another one when the picture has changed."""
    key = picture_key(path, root)
    with contextlib.suppress(OSError):  # it is not there any more
        key += f" {os.stat(path).st_mtime_ns}"
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32] + ".safetensors"


def save_features(path: Path, features: torch.Tensor) -> None:
    """Writes a temporary file with a unique name, as another run may write the same, and renames.

    It is not flushed to the disk: after a power failure a damaged file is computed again.
    """
    temporary = path.with_name(f"{uuid.uuid4().hex}.part")
    try:
        temporary.write_bytes(save({"features": features}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_features(path: Path) -> torch.Tensor:
    """The features of a picture, see Captioner.encode. Raises UserError if they are damaged."""
    try:
        return load_file(path)["features"]
    except (OSError, SafetensorError, KeyError) as error:
        path.unlink(missing_ok=True)
        raise UserError(
            f"the features of a picture in {str(path)!r} could not be read ({error}). The file has "
            "been removed: the same command, without --restart, computes it again, and continues."
        ) from error


def read_start(path: str, length: int) -> bytes:
    """The first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(length)


def list_whole_files(folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> set[str]:
    """Names of the files in a folder that hold whole features: all have one size and one header.

    To load each of them would take minutes.
    """
    whole = save({"features": torch.zeros(shape, dtype=dtype)})
    header = whole[: len(whole) - math.prod(shape) * dtype.itemsize]
    names = set()
    for entry in os.scandir(folder):
        try:
            if entry.stat().st_size == len(whole) and read_start(entry.path, len(header)) == header:
                names.add(entry.name)
        except FileNotFoundError:  # another run has just renamed it
            continue
    return names


def encode_pictures(
    captioner: Captioner,
    pictures: list[str],
    root: str,
    folder: Path,
    workers: int,
    findings: Findings,
) -> dict[str, Path]:
    """The file with the features of each picture that can be read. Raises UserError."""
    state = PartialState()
    files = {picture: folder / feature_name(picture, root) for picture in pictures}
    shape = captioner.feature_shape()
    known = list_whole_files(folder, shape, captioner.dtype)
    new = [picture for picture, file in files.items() if file.name not in known]
    # The first process decides, since another run may be writing into the folder.
    decided = [new]
    broadcast_object_list(decided)  # in place
    new = decided[0]
    print(f"pictures: {len(new)} to encode, {len(files) - len(new)} known from an earlier run")
    if state.is_main_process:
        refuse_full_disk(folder, len(new) * math.prod(shape) * captioner.dtype.itemsize)

    encoding = Findings()
    processor = captioner.processor.image_processor
    for pixels in read_pictures(share(new), processor, workers, "encoding", encoding):
        features = captioner.encode(list(pixels.values()))
        for picture, picture_features in zip(pixels, features, strict=True):
            save_features(files[picture], picture_features)

    # These also wait for all processes.
    encoding.skipped = gather_object(encoding.skipped)
    encoding.not_pictures = gather_object(encoding.not_pictures)
    encoding.one_colour = gather_object(encoding.one_colour)
    print_findings(encoding, show_all=False)
    findings.skipped += encoding.skipped
    findings.one_colour += encoding.one_colour
    for path in [skipped.path for skipped in encoding.skipped] + encoding.not_pictures:
        files.pop(path, None)
    missing = [str(file) for file in files.values() if not file.exists()]
    if missing and state.num_processes > 1:
        raise UserError(NOT_SHARED)
    if missing:
        raise UserError(f"{missing[0]!r} has disappeared. Run the same command again.")
    return files


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Tells how many bytes features will take; raises UserError if the disk has less."""
    free = shutil.disk_usage(folder).free
    if needed > 100_000_000:
        print(f"  they will take {needed / 1e9:.1f} GB in {printable(str(folder))}")
    if needed > free:
        raise UserError(
            f"the features of the pictures need {needed / 1e6:,.1f} MB, and the disk of "
            f"{str(folder)!r} has {free / 1e6:,.1f} MB. Make room there, and run the same command "
            "again."
        )


# ---- Datasets -----------------------------------------------------------------------------------


class ImageCaptioningDataset:
    """An Example for each pair whose picture can be read."""

    def __init__(
        self, pairs: list[Pair], feature_files: dict[str, Path], row_builder: RowBuilder
    ) -> None:
        self.pairs = pairs
        self.feature_files = feature_files  # by picture
        # How many tokens each pair teaches: losses are per token, and steps sorted by length.
        self.token_counts = [len(row_builder.label_ids(pair.caption)) for pair in pairs]
        self.references = defaultdict(list)  # all captions, by picture
        for picture, caption in pairs:
            self.references[picture].append(caption)
        self.read_ahead: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def count_tokens(self, indices: Iterable[int]) -> int:
        """How many tokens these pairs teach."""
        return sum(self.token_counts[i] for i in indices)

    def load_picture(self, picture: str) -> torch.Tensor:
        """The features of a picture, see Captioner.encode."""
        return load_features(self.feature_files[picture])

    def __getitem__(self, index: int) -> Example:
        if index in self.read_ahead:
            return self.read_ahead[index]
        picture, caption = self.pairs[index]
        return Example(self.load_picture(picture), caption)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Reads the examples that are wanted next, and forgets those before."""
        self.read_ahead = {index: self[index] for index in indices}


class Datasets(NamedTuple):
    training: ImageCaptioningDataset
    held_out: ImageCaptioningDataset
    to_caption: list[str]  # the held-out pictures that are captioned before and after


def split_pairs(
    pairs: list[Pair], fraction: float, seed: int, root: str, copies: dict[str, str]
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: all pairs of a picture, and of its copies, are on one side.

    Pictures are ranked by a hash of seed and path: a new one does not reshuffle the others.
    """

    def rank(picture: str) -> bytes:
        name = f"{seed} {relative(picture, root)}"
        return hashlib.sha256(name.encode(errors="surrogateescape")).digest()

    originals = {copies.get(pair.picture, pair.picture) for pair in pairs}
    ranked = sorted(originals, key=rank)
    count = 0
    if fraction:
        count = max(1, round(len(ranked) * fraction))
        count = min(count, len(ranked) - 1)  # something must be left to train on
    held_out = set(ranked[:count])

    training_pairs = []
    held_out_pairs = []
    for pair in pairs:
        if copies.get(pair.picture, pair.picture) in held_out:
            held_out_pairs.append(pair)
        else:
            training_pairs.append(pair)
    return training_pairs, held_out_pairs


def list_readable(pairs: list[Pair], feature_files: dict[str, Path], folder: str) -> list[Pair]:
    """The pairs whose pictures could be read. Raises UserError if that is none of them."""
    readable = [pair for pair in pairs if pair.picture in feature_files]
    if pairs and not readable:
        raise UserError(f"no picture in {folder!r} can be read. --check lists the reasons.")
    return readable


def build_datasets(
    settings: argparse.Namespace,
    data: Data,
    feature_files: dict[str, Path],
    row_builder: RowBuilder,
) -> Datasets:
    """What is trained and measured on. Raises UserError where nothing is left."""
    training_pairs = list_readable(data.pairs, feature_files, settings.TRAIN_DIR)
    held_out_pairs = list_readable(data.validation, feature_files, settings.VALIDATION_DIR)
    if not settings.VALIDATION_DIR:
        copies = find_copies(pair.picture for pair in training_pairs)
        if copies and settings.VALIDATION_FRACTION:
            one = "picture is an exact copy of another: both are trained on, or both are held out"
            many = "pictures are exact copies of others: copies are all trained on, or all held out"
            print(count_of(len(copies), one, many))
        training_pairs, held_out_pairs = split_pairs(
            training_pairs,
            settings.VALIDATION_FRACTION,
            settings.SEED,
            settings.TRAIN_DIR,
            copies,
        )
    training = ImageCaptioningDataset(training_pairs, feature_files, row_builder)
    held_out = ImageCaptioningDataset(held_out_pairs, feature_files, row_builder)
    to_caption = list(held_out.references)
    if not settings.VALIDATION_DIR:
        to_caption = spread(to_caption, MAX_CAPTIONED)
    return Datasets(training, held_out, to_caption)


def describe_datasets(datasets: Datasets, row_builder: RowBuilder) -> None:
    """Prints how many pairs there are, what the model does not see as it is, and one row."""
    training, held_out, _ = datasets
    print(f"pairs: {len(training)} to train on, {len(held_out)} held out")
    cut = 0
    unknown = 0
    for caption in {pair.caption for pair in training.pairs + held_out.pairs}:
        ids = row_builder.tokenize(caption)
        if len(ids) > row_builder.max_tokens:
            cut += 1
        if row_builder.tokenizer.unk_token_id in ids:
            unknown += 1
    if cut:
        limit = row_builder.max_tokens
        what = count_of(cut, "caption is", "captions are")
        print(f"cut: {what} longer than MAX_CAPTION_TOKENS = {limit} tokens")
    if unknown:
        what = count_of(unknown, "caption has", "captions have")
        print(f"unknown: {what} characters that this language model does not know")

    decode = row_builder.tokenizer.decode
    label_ids = row_builder.label_ids(training.pairs[0].caption)
    parts = [
        f"<image> x {row_builder.num_query_tokens}",
        decode(row_builder.prompt_ids),
        f"[{decode(label_ids[:-1])}",
        f"{decode(label_ids[-1:])!r}]",
    ]
    print(f"row: {printable(' | '.join(parts))}  ([...] is learned)")


# ---- Measuring ----------------------------------------------------------------------------------


def own_batches(items: Sequence, title: str) -> Iterator[Sequence]:
    """This process's share, INFERENCE_BATCH at a time, with a progress bar."""
    own = share(items)
    for start in tqdm(range(0, len(own), INFERENCE_BATCH), title, disable=None, leave=False):
        yield own[start : start + INFERENCE_BATCH]


def measure_losses(captioner: Captioner, dataset: ImageCaptioningDataset) -> torch.Tensor:
    """The loss of each pair, summed over its tokens, (pairs,), on the CPU."""
    losses = torch.zeros(len(dataset))
    if not len(dataset):
        return losses
    for indices in own_batches(range(len(dataset)), "measuring"):
        losses[list(indices)] = captioner.measure([dataset[i] for i in indices])
    return reduce(losses.to(captioner.device), "sum").cpu()


def held_out_loss(captioner: Captioner, held_out: ImageCaptioningDataset) -> float:
    """The mean loss per token of the held-out pairs; NaN if there are none."""
    if not len(held_out):
        return math.nan
    return measure_losses(captioner, held_out).sum().item() / sum(held_out.token_counts)


def caption_held_out(captioner: Captioner, datasets: Datasets) -> list[Caption]:
    """Captions for datasets.to_caption, in its order."""
    captioned = []
    for pictures in own_batches(datasets.to_caption, "captioning"):
        features = [datasets.held_out.load_picture(picture) for picture in pictures]
        captioned += zip(pictures, captioner.caption(torch.stack(features)), strict=True)
    by_picture = dict(gather_object(captioned))  # of all processes
    return [by_picture[picture] for picture in datasets.to_caption]


class HardWords(NamedTuple):
    """What the words of the held-out captions cost: the mean loss of their tokens."""

    hardest: dict[str, float]  # at most ten words that are in many captions, the highest loss first
    mean: float  # of all words


def average_by_word(tokenizer: Any, text: str, losses: list[float]) -> dict[str, float]:
    """The mean loss of each word of a text. `losses` are those of its tokens and the stop token."""
    encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    losses_by_word = defaultdict(list)
    for word_id, loss in zip(encoding.word_ids(), losses[:-1], strict=False):  # it may be cut
        start, end = encoding.word_to_chars(word_id)
        losses_by_word[text[start:end].strip()].append(loss)
    means = {}
    for word, word_losses in losses_by_word.items():
        means[word] = sum(word_losses) / len(word_losses)
    return means


def find_hard_words(captioner: Captioner, dataset: ImageCaptioningDataset) -> HardWords:
    """The words that cost most: in at least 5 captions, and 5 % of them."""
    row_builder = captioner.row_builder
    by_caption = []
    for indices in own_batches(range(len(dataset)), "measuring words"):
        examples = [dataset[i] for i in indices]
        for example, losses in zip(examples, captioner.measure_tokens(examples), strict=True):
            text = row_builder.space + example.caption
            by_caption.append(average_by_word(row_builder.tokenizer, text, losses))

    losses_by_word = defaultdict(list)
    all_losses = []
    for averages in gather_object(by_caption):
        for word, loss in averages.items():
            losses_by_word[word].append(loss)
            all_losses.append(loss)

    fewest = max(5, 0.05 * len(dataset))
    means = {}
    for word, losses in losses_by_word.items():
        if len(losses) >= fewest and any(character.isalnum() for character in word):
            means[word] = sum(losses) / len(losses)
    hardest = sorted(means, key=lambda word: -means[word])[:10]
    mean = sum(all_losses) / len(all_losses) if all_losses else math.nan
    return HardWords({word: means[word] for word in hardest}, mean)


class CaptionedPicture(NamedTuple):
    """A held-out picture before and after training: a row of held_out.csv."""

    picture: str
    references: list[str]  # all its captions
    before: str
    after: str
    confidence: float  # in the one after


def count_ngrams(caption: str) -> dict[int, Counter]:
    """How often it has each n-gram, for n from one to four words."""
    words = re.findall(r"\w+(?:'\w+)?", caption.lower())
    counts = {}
    for n in range(1, 5):
        counts[n] = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return counts


def cider_d(captions: list[str], references: list[list[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) of captions, as coco-caption computes it.

    `references` are those of each picture; idf is taken from them. 0 where it can say nothing.
    """
    reference_counts = []
    pictures_with = Counter()  # in how many pictures' references an n-gram is
    for texts in references:
        counts_of_texts = [count_ngrams(text) for text in texts]
        reference_counts.append(counts_of_texts)
        ngrams_of_picture = set()
        for counts in counts_of_texts:
            for n in counts:
                ngrams_of_picture.update(counts[n])
        pictures_with.update(ngrams_of_picture)

    def weigh(counts: Counter) -> dict[tuple[str, ...], float]:
        """tf-idf of n-grams."""
        weights = {}
        for ngram, count in counts.items():
            weights[ngram] = count * math.log(len(references) / max(1, pictures_with[ngram]))
        return weights

    def compare(ours: dict[int, Counter], theirs: dict[int, Counter]) -> float:
        """The mean over n of the clipped cosine, times a penalty where the lengths differ.

        Lengths are counted in bigrams, as coco-caption does it.
        """
        cosines = []
        for n in ours:
            our_weights = weigh(ours[n])
            their_weights = weigh(theirs[n])
            dot = 0.0
            for ngram, weight in their_weights.items():
                if ngram in our_weights:
                    dot += min(our_weights[ngram], weight) * weight
            norms = math.hypot(*our_weights.values()) * math.hypot(*their_weights.values())
            cosines.append(dot / norms if norms else 0.0)
        difference = ours[2].total() - theirs[2].total()
        sigma = 6
        penalty = math.exp(-(difference**2) / (2 * sigma**2))
        return sum(cosines) / len(cosines) * penalty

    scores = []
    for caption, counts_of_texts in zip(captions, reference_counts, strict=True):
        ours = count_ngrams(caption)
        similarities = [compare(ours, theirs) for theirs in counts_of_texts]
        scores.append(sum(similarities) / len(similarities))
    return 10 * sum(scores) / len(scores)


def measure_captions(captions: list[str], references: list[list[str]]) -> dict[str, float | None]:
    """The share of captions equal to a reference, and CIDEr-D; None where they say nothing."""
    measures: dict[str, float | None] = {"exact": None, "cider_d": None}
    if captions:
        equal = [caption in texts for caption, texts in zip(captions, references, strict=True)]
        measures["exact"] = sum(equal) / len(equal)
    different = {text for texts in references for text in texts}
    if len(captions) > 1 and len(different) > 1:
        measures["cider_d"] = cider_d(captions, references)
    return measures


# ---- The learner: LoRA's weights, and all that changes them -------------------------------------


class StepResult(NamedTuple):
    """The results of a step, over all processes."""

    pair_losses: list[float]  # summed over the tokens of each
    stop: bool  # at least one of them has been told to stop
    norm: float  # of the gradient


class Learner:
    """AdamW on one float32 vector, `master`, which holds all of LoRA's weights.

    The weights in the model are views of its parts, or, in a model of another dtype, copies. Those
    of the Q-Former and the projection come first, then those of the language model. Where LoRA is
    in both, the Q-Former learns alone at first: the language model learns so much faster that it
    would leave the Q-Former nothing to learn.
    """

    def __init__(
        self, captioner: Captioner, adapter: PeftModel, weight_decay: float, batch_size: int
    ) -> None:
        self.captioner = captioner
        self.adapter = adapter
        self.part_size = PartSize(batch_size, MEASURE_REMEDY)
        trained = {}
        for name, weight in adapter.named_parameters():
            if weight.requires_grad:
                trained[name] = weight
        self.weights = list(trained.values())

        self.master = torch.cat([weight.detach().flatten().float() for weight in self.weights])
        self.gradient = torch.zeros_like(self.master)
        sizes = [weight.numel() for weight in self.weights]
        self.views = []  # of `master`: one for each weight, in its shape
        for weight, flat in zip(self.weights, self.master.split(sizes), strict=True):
            view = flat.view_as(weight)
            weight.data = view.to(captioner.dtype)  # in float32 this copies nothing: it is the view
            self.views.append(view)
        self.adapter_weights = dict(zip(trained, self.views, strict=True))  # for PEFT to save

        self.qformer_size = 0  # of `master`, how many weights are not the language model's
        for name, weight in trained.items():
            if ".language_model." not in name:
                self.qformer_size += weight.numel()
        self.has_two_phases = captioner.trains_qformer and self.qformer_size < len(self.master)
        # What AdamW updates: all of `master`, or two parts, of which a step can leave out one.
        self.optimized = [torch.nn.Parameter(self.master)]
        if self.has_two_phases:
            halves = self.master.tensor_split([self.qformer_size])
            self.optimized = [torch.nn.Parameter(half) for half in halves]

        self.dropouts = torch.nn.ModuleList()
        for name, module in adapter.named_modules():
            if ".lora_dropout." in name:
                self.dropouts.append(module)
        self.optimizer = torch.optim.AdamW(self.optimized, weight_decay=weight_decay, fused=True)
        # A scaler that is not enabled scales by 1, and skips nothing.
        is_float16 = captioner.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(captioner.device.type, enabled=is_float16)

    def backward(self, examples: list[Example], tokens: int) -> torch.Tensor:
        """The gradient of loss / tokens, into self.gradient, however the examples are split.

        Returns the loss of each example, summed over its tokens, (examples,).
        """

        def backward_part(part: list[Example]) -> torch.Tensor:
            batch = self.captioner.row_builder.collate_fn(part)
            losses = self.captioner.losses(batch)
            loss = self.scaler.scale(losses.sum() / tokens)
            gradients = torch.autograd.grad(loss, self.weights)
            self.gradient += torch.cat([gradient.flatten() for gradient in gradients])
            return losses.detach()

        self.gradient.zero_()
        self.dropouts.train()  # all else stays in eval mode: frozen layers have dropout too
        try:
            losses = self.part_size.run(backward_part, examples)
        finally:
            self.dropouts.eval()
        if not losses:  # a last batch may have fewer pairs than there are processes
            return torch.zeros(0, device=self.captioner.device)
        return torch.cat(losses)

    def sum_over_processes(
        self, own_losses: torch.Tensor, count: int, stop: bool, qformer_alone: bool = False
    ) -> StepResult:
        """The sums over all processes; `own_losses` are those of this one's share of `count` pairs.

        With `qformer_alone`, the language model has no gradient, and none in the norm. A step waits
        for the GPU only here, once: what is needed of it comes in one vector.
        """
        pair_losses = torch.zeros(count, device=self.master.device)
        own_places = share(pair_losses)  # a view
        own_places.copy_(own_losses)
        stop_flag = self.captioner.send(torch.tensor([float(stop)]))
        losses_and_stop = reduce(torch.cat([pair_losses, stop_flag]), "sum")
        self.gradient.copy_(reduce(self.gradient, "sum"))
        if qformer_alone:
            self.gradient[self.qformer_size :].zero_()

        # The scaler's factor as a tensor: get_scale() would wait for the GPU.
        one = torch.ones(1, device=self.master.device)
        norm = self.gradient.norm() / self.scaler.scale(one)
        *losses, processes_to_stop, norm = torch.cat([losses_and_stop, norm]).tolist()
        return StepResult(pair_losses=losses, stop=processes_to_stop > 0, norm=norm)

    def step(self, rate: float, norm: float, max_norm: float, qformer_alone: bool = False) -> None:
        """A step of AdamW; GradScaler skips it if the norm is not finite, and lowers its scale."""
        gradients = self.gradient.split([len(weights) for weights in self.optimized])
        for weights, gradient in zip(self.optimized, gradients, strict=True):
            weights.grad = gradient
        if qformer_alone:
            self.optimized[1].grad = None  # neither moments nor step count nor decay for these

        # Each grad is a view of self.gradient: unscaling and clipping change both.
        self.scaler.unscale_(self.optimizer)
        if max_norm:
            self.gradient *= min(1.0, max_norm / (norm + 1e-6))

        self.optimizer.param_groups[0]["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.copy_to_weights()

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """From `master`; in float32 they are the same memory."""
        torch._foreach_copy_(self.weights, self.views)

    def set_master(self, master: torch.Tensor) -> None:
        self.master.copy_(master)
        self.copy_to_weights()

    def load_adapter(self, path: Path) -> None:
        """The weights of a saved adapter, which are in float32. Raises UserError."""
        try:
            saved = load_file(path)
            for name, part in self.adapter_weights.items():
                part.copy_(saved[name.replace(".default.", ".")])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(
                f"the adapter {str(path)!r} does not fit this model: {error}. Set START_FROM to "
                "the OUTPUT_DIR of a run with the same settings."
            ) from error
        self.copy_to_weights()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "master": self.master.clone(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what state() returned."""
        self.set_master(state["master"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@dataclasses.dataclass
class Progress:
    """How far a run has come, besides the state of its learner."""

    captions: list[str]  # of the held-out pictures that are captioned, before training
    metrics: list[dict[str, float]]  # the rows of metrics.csv
    pair_losses: torch.Tensor  # (training pairs,), summed over tokens and epochs
    qformer_steps: int = 0  # steps at the start in which only the Q-Former learns
    epoch_loss: float = 0.0  # summed over the tokens of this epoch so far
    step: int = 0  # the next one, from 0
    best: float = math.inf  # the lowest held-out loss
    best_step: int = 0  # the number of steps after which it was measured
    best_master: torch.Tensor | None = None  # the weights then


# ---- Runs: one folder, and one file to continue from, until all is done -------------------------


# Settings that records of earlier versions lack, and the values that were in effect then.
LATER_SETTINGS = {"NUM_BEAMS": 1, "START_FROM": ""}


def complete_record(record: dict[str, Any]) -> dict[str, Any]:
    """With values for the settings that did not exist when it was written.

    They are those of LATER_SETTINGS, and for a setting that is not among them, today's.
    """
    settings = default_settings() | LATER_SETTINGS | record["settings"]
    return {"start_from_hash": ""} | record | {"settings": settings}


def read_record(folder: Path) -> dict[str, Any]:
    """The settings.json of a run, with `results` when it is finished; {}: none, or damaged."""
    try:
        text = (folder / "settings.json").read_text(encoding="utf-8")
        return complete_record(json.loads(text))
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_whole(folder / "settings.json", (json.dumps(record, indent=2) + "\n").encode())


def hash_data(settings: argparse.Namespace, data: Data) -> str:
    """A hash of the pictures' relative paths, their sizes, and the captions.

    Not of their modification times: a copied folder holds the same data.
    """
    lines = []
    for pairs, root in (
        (data.pairs, settings.TRAIN_DIR),
        (data.validation, settings.VALIDATION_DIR),
    ):
        for picture, caption in pairs:
            lines += [picture_key(picture, root), caption]
    digest = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
    return f"{len(data.pairs) + len(data.validation)} pairs, {digest[:16]}"


def hash_start_from(settings: argparse.Namespace) -> str:
    """A hash of the adapter in START_FROM; "": there is none to start from.

    Raises UserError if the folder holds no finished run, or if the settings of that run for model
    and LoRA differ from ours. The message names the values to set.
    """
    if not settings.START_FROM:
        return ""
    folder = Path(settings.START_FROM)
    record = read_record(folder)
    weights = folder / "adapter_model.safetensors"
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {str(folder)!r}, which START_FROM names."
            + describe_near_folder(str(folder))
        )
    if record.get("results") and not weights.exists():
        raise UserError(
            f"START_FROM {str(folder)!r} has no adapter_model.safetensors. Copy the whole folder."
        )
    if not record.get("results"):
        raise UserError(
            f"START_FROM {str(folder)!r} does not hold a finished run of this script. Set it to "
            "the OUTPUT_DIR of one."
        )
    try:
        refuse_damaged_weights(weights)
    except ValueError as error:
        raise UserError(f"START_FROM {str(folder)!r} can't be used: {error}.") from error

    trained_on = record["settings"]["MODEL_ID"]
    if trained_on != settings.MODEL_ID and is_missing_folder(trained_on):
        raise UserError(
            f"the base of the adapter in START_FROM {str(folder)!r} is {trained_on!r}, which is "
            f"not on this machine. If {settings.MODEL_ID!r} is a copy of it, set MODEL_ID in "
            f"{str(folder / 'settings.json')!r} to that."
        )

    differences = []
    for name in ("MODEL_ID", "LOAD_IN_4BIT", "LORA_RANK", "LORA_ALPHA", "LORA_TARGETS"):
        there = record["settings"][name]
        here = getattr(settings, name)
        if there != here:
            differences.append(f"{name} = {there!r} (now {here!r})")
    if differences:
        raise UserError(
            f"the adapter in START_FROM {str(folder)!r} was trained with other settings. To go on "
            f"from it, set {', '.join(differences)}."
        )
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def describe_other_data(settings: argparse.Namespace) -> None:
    """Says it if START_FROM was trained on another TRAIN_DIR: a flag may have been forgotten."""
    if not settings.START_FROM:
        return
    earlier = read_record(Path(settings.START_FROM))["settings"]["TRAIN_DIR"]
    if earlier != settings.TRAIN_DIR:
        print(
            f"data: START_FROM was trained on {printable(earlier)}; this run trains on "
            f"{printable(settings.TRAIN_DIR)}"
        )


def is_missing_folder(model_id: str) -> bool:
    """Whether this is the path of a folder, and nothing is there."""
    return os.path.isabs(model_id) and not os.path.isdir(model_id)


def list_facts(record: dict[str, Any]) -> dict[str, Any]:
    """What must not change in a run, under the names that a user is told."""
    facts = {}
    for name, value in record["settings"].items():
        if name not in CHANGEABLE:
            facts[name] = value
    facts["pictures or captions"] = record.get("data")
    facts["the adapter in START_FROM"] = record.get("start_from_hash")
    facts["the vision side of MODEL_ID"] = record.get("vision_side")
    facts["pictures that can't be read"] = record.get("unreadable")
    return facts


def list_differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How this run differs from an earlier one, in the facts known so far: a line each."""
    earlier_facts = list_facts(earlier)
    differences = []
    for name, value in list_facts(now).items():
        earlier_value = earlier_facts.get(name)
        if value is None or value == earlier_value:  # None: not known yet
            continue
        if isinstance(value, list):
            changed = sorted(set(value) ^ set(earlier_value or []))
            names = ", ".join(map(printable, changed[:MAX_NAMED]))
            differences.append(f"{name}: {len(changed)} have changed, such as {names}")
        else:
            differences.append(f"{name}: {earlier_value!r} then, {value!r} now")
    return differences


def save_adapter(folder: Path, record: dict[str, Any], learner: Learner) -> None:
    """What --caption, PEFT and transformers need; the weights in float32."""
    learner.adapter.save_pretrained(
        folder,
        state_dict=learner.adapter_weights,
        save_embedding_layers=False,  # else PEFT asks the Hub
    )
    learner.captioner.processor.save_pretrained(folder)
    write_record(folder, record)


class Tracking:
    """Gives the rows of metrics.csv to the tracker of LOG_WITH; does nothing if there is none."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def start(self, settings: dict[str, Any]) -> None:
        self.accelerator.init_trackers("blip2", config=settings)

    def log(self, metrics: dict[str, float]) -> None:
        """A row, without what is NaN."""
        finite = {name: value for name, value in metrics.items() if not math.isnan(value)}
        self.accelerator.log(finite, step=metrics["step"])

    def close(self) -> None:
        """Trackers hold files open in the folder of a run, which is to be renamed."""
        while self.accelerator.trackers:
            self.accelerator.trackers.pop().finish()


@dataclasses.dataclass
class Run:
    """What identifies a run, how far it has come, and where it writes.

    It is in `folder` until it is finished, then in `output`, which is OUTPUT_DIR.

    This is what makes a run continue: checkpoint.pt in `folder`, which `save` writes after each
    epoch, every few minutes and after a signal. `find_checkpoint` loads it, unless --restart is
    given. `refuse_changes` then raises where settings, data or model differ from those in it.
    """

    output: Path
    folder: Path
    record: dict[str, Any]  # settings.json: settings, and facts that are added as they are found
    tracking: Tracking
    is_main: bool  # this process prints and writes
    is_finished: bool = False  # `output` holds this very run
    checkpoint: dict[str, Any] | None = None  # what to continue from: see save()

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.pt"

    def refuse_foreign_files(self) -> None:
        """Raises UserError where OUTPUT_DIR holds something other than a run."""
        if not self.output.exists() or not any(self.output.iterdir()) or read_record(self.output):
            return
        if (self.output / "settings.json").exists():
            raise UserError(
                f"settings.json in OUTPUT_DIR {str(self.output)!r} is damaged, so it is not "
                "clear whether it contains a run. Choose another folder, or move this one away."
            )
        raise UserError(
            f"OUTPUT_DIR {str(self.output)!r} holds files that are not from a run of this "
            "script. Choose another folder, or move them."
        )

    def is_complete(self) -> bool:
        """Whether all is done in `folder`, which then only has to be published."""
        return not self.checkpoint_path.exists() and bool(read_record(self.folder).get("results"))

    def publish(self) -> None:
        """Renames `folder` to OUTPUT_DIR; an earlier run there is renamed with the date."""
        if self.output.exists() and any(self.output.iterdir()):
            dated = f"{self.output}-{time.strftime('%Y-%m-%d')}"
            new_name = dated
            number = 1
            while os.path.lexists(new_name):
                number += 1
                new_name = f"{dated}-{number}"
            self.output.rename(new_name)
            print(f"the earlier run is in {printable(new_name)} now")
        elif self.output.exists():
            self.output.rmdir()
        self.folder.rename(self.output)

    def find_checkpoint(self, restart: bool) -> None:
        """Sets `checkpoint`, if this run can be continued, and `is_finished`.

        Raises UserError where the checkpoint is damaged, or that of another run.
        """
        if restart:
            return
        if self.checkpoint_path.exists():
            self.checkpoint = self.load_checkpoint()
            self.refuse_changes()
            return
        finished = read_record(self.output)
        if self.record["settings"]["START_FROM"] and self.starts_from_output():
            # The finished run has taken the place of what it started from. That can't be compared
            # any more, so it counts as the same.
            finished["start_from_hash"] = self.record["start_from_hash"]
        if finished.get("results"):
            self.is_finished = not list_differences(finished, self.record)

    def starts_from_output(self) -> bool:
        """Whether START_FROM is OUTPUT_DIR itself."""
        return os.path.realpath(self.record["settings"]["START_FROM"]) == str(self.output)

    def load_checkpoint(self) -> dict[str, Any]:
        """Raises UserError if it is damaged, and OSError if it can't be read."""
        try:
            checkpoint = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            checkpoint["record"] = complete_record(checkpoint["record"])
            checkpoint["progress"].pop("micro_batch", None)  # of an earlier version
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged file raises many kinds of exceptions
            reason = describe_error(error).splitlines()[0]
            raise UserError(
                f"{str(self.checkpoint_path)!r} is damaged: {reason}. Put back a copy of it, or "
                "use --restart to train from scratch."
            ) from error
        return checkpoint

    def note(self, **facts: Any) -> None:
        """Adds facts to the record. Raises UserError where those of an unfinished run differ."""
        self.record |= facts
        self.refuse_changes()

    def refuse_changes(self) -> None:
        """Raises UserError where the facts in the checkpoint are not those of this run.

        This alone decides whether an unfinished run may be continued.
        """
        if not self.checkpoint:
            return
        differences = list_differences(self.checkpoint["record"], self.record)
        if differences:
            lines = [
                f"{str(self.folder)!r} holds an unfinished run that differs from this one:",
                *differences,
                "Undo these changes to continue, use --restart to train from scratch, or choose "
                "another OUTPUT_DIR.",
            ]
            raise UserError("\n  ".join(lines))

    def refuse_other_processes(self) -> None:
        """Raises UserError on all processes where one sees other settings, files or progress."""
        step = self.checkpoint["progress"]["step"] if self.checkpoint else None
        seen_by_all = gather_object([(self.record, self.is_finished, step)])
        first_record, first_is_finished, first_step = seen_by_all[0]
        for record, is_finished, step in seen_by_all:
            is_same = is_finished == first_is_finished and step == first_step
            if not is_same or list_differences(first_record, record):
                raise UserError(NOT_SHARED)

    def discard_earlier(self) -> None:
        """Deletes an earlier run's files that are not continued.

        Called after model, pictures and captions were read: a start that fails there loses nothing.
        """
        if self.checkpoint or not self.is_main:
            return
        # In this order: with results and without checkpoint it would pass for a finished run.
        (self.folder / "settings.json").unlink(missing_ok=True)
        self.checkpoint_path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, progress: Progress, learner: Learner) -> None:
        """The adapter, if it is the best so far; then what the run continues from."""
        if not self.is_main:
            return
        if progress.best_step == progress.step:
            save_adapter(self.folder, self.record, learner)
        checkpoint = {"record": self.record, "progress": vars(progress), "learner": learner.state()}
        buffer = io.BytesIO()  # torch.save itself does not say when a disk is full
        torch.save(checkpoint, buffer)
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [list(METRICS)]
        for metrics in progress.metrics:
            rows.append([metrics[name] for name in METRICS])
        write_csv(self.folder / "metrics.csv", rows)
        write_whole(self.checkpoint_path, buffer.getvalue())


@contextlib.contextmanager
def open_run(settings: argparse.Namespace, data: Data) -> Iterator[Run]:
    """The run of these settings and data, with its folder locked. Raises UserError."""
    output = Path(os.path.realpath(settings.OUTPUT_DIR))  # of a link, what it points to
    folder = Path(f"{output}.unfinished")
    accelerator = Accelerator(
        cpu=settings.DEVICE == "cpu", log_with=settings.LOG_WITH or None, project_dir=str(folder)
    )
    record = {
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "data": hash_data(settings, data),
    }
    run = Run(output, folder, record, Tracking(accelerator), accelerator.is_main_process)

    lock = contextlib.nullcontext()
    if run.is_main:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{output}.lock", timeout=0)

    all_processes_arrive = False  # at the end of this function
    try:
        with lock:
            if run.is_main:
                run.refuse_foreign_files()
                if run.is_complete():  # it was killed just before it was published
                    run.publish()
            accelerator.wait_for_everyone()
            # Only now: the adapter to start from may just have been published.
            run.record["start_from_hash"] = hash_start_from(settings)
            yield run
        all_processes_arrive = True
    except Stopped:  # it is raised in all of them
        all_processes_arrive = True
        raise
    finally:
        run.tracking.close()
        if all_processes_arrive:  # after an error in one, it would wait for the others for ever
            accelerator.end_training()


# ---- Training -----------------------------------------------------------------------------------


def count_epoch_steps(pair_count: int, batch_size: int) -> int:
    """Optimizer steps in an epoch."""
    return math.ceil(pair_count / batch_size)


def count_steps(settings: argparse.Namespace, pair_count: int) -> int:
    """Optimizer steps in all epochs."""
    return count_epoch_steps(pair_count, settings.BATCH_SIZE) * settings.EPOCHS


def derive_seed(seed: int, number: int) -> int:
    """A seed for an epoch or a step: SEEDs next to each other share none of them."""
    return seed * 1_000_003 + number


@functools.lru_cache(maxsize=2)  # each step asks for those of its epoch, and of the next step
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` pairs in an epoch: the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def pick_pairs(dataset: ImageCaptioningDataset, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the pairs of a step, the longest captions first: parts need little padding."""
    epoch, step_of_epoch = divmod(step, count_epoch_steps(len(dataset), batch_size))
    order = epoch_order(len(dataset), seed, epoch)
    indices = order[step_of_epoch * batch_size : (step_of_epoch + 1) * batch_size]
    return sorted(indices, key=lambda i: -dataset.token_counts[i])


def learning_rate(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up, above zero at step 0, then a cosine to zero."""
    warmup = round(steps * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within, the first Ctrl-C or SIGTERM is noted in the list. A second one kills at once.

    `train` looks into the list after each step: it saves a checkpoint, and raises Stopped in all
    processes. Outside of training, Ctrl-C and SIGTERM raise KeyboardInterrupt. `main` prints a line
    for either of them.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    is_main = PartialState().is_main_process
    noted: list[int] = []

    def note_signal(number: int, _: Any) -> None:
        noted.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        if is_main:  # not print, which a signal may have interrupted
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop immediately\n")

    for number in numbers:
        signal.signal(number, note_signal)
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def build_learner(settings: argparse.Namespace, captioner: Captioner) -> Learner:
    """LoRA with initial weights, or those in START_FROM, and its optimizer. Raises UserError."""
    torch.manual_seed(settings.SEED)
    adapter = add_lora(
        captioner.model,
        settings.LORA_TARGETS,
        settings.LORA_RANK,
        settings.LORA_ALPHA,
        settings.LORA_DROPOUT,
    )
    learner = Learner(captioner, adapter, settings.WEIGHT_DECAY, settings.BATCH_SIZE)
    if settings.START_FROM:
        learner.load_adapter(Path(settings.START_FROM, "adapter_model.safetensors"))
    return learner


def measure_before(
    captioner: Captioner, datasets: Datasets, feature_folder: Path, qformer_steps: int
) -> Progress:
    """The progress of a new run, which first measures the model as it is. Raises UserError."""
    loss = held_out_loss(captioner, datasets.held_out)
    if len(datasets.held_out):
        print(f"held-out loss before: {loss:.4f}")
        if not math.isfinite(loss):
            raise UserError(
                f"the held-out loss before training is {loss}. Set DTYPE to float32. If that does "
                f"not help, delete {str(feature_folder)!r} (it will be made again). If that does "
                "not help either, the weights of MODEL_ID may be damaged: download them again."
            )
    else:
        print("nothing held out: the last adapter is saved")

    before = dict.fromkeys(METRICS, math.nan)
    before |= {"step": 0, "epoch": 0, "seconds": 0.0, "held_out_loss": loss}
    captions = [caption.text for caption in caption_held_out(captioner, datasets)]
    pair_losses = torch.zeros(len(datasets.training))
    return Progress(captions, [before], pair_losses, qformer_steps)


def start(
    settings: argparse.Namespace,
    captioner: Captioner,
    datasets: Datasets,
    checkpoint: dict[str, Any] | None,
) -> tuple[Learner, Progress]:
    """What training continues from: a checkpoint, or a new learner and the first measurement."""
    learner = build_learner(settings, captioner)
    if captioner.device.type == "cuda":
        # cuBLAS takes memory of its own in the first backward pass. This is one, while memory is
        # still free.
        learner.backward([datasets.training[0]], 1)
    if checkpoint:
        learner.load(checkpoint["learner"])
        return learner, Progress(**checkpoint["progress"])
    feature_folder = next(iter(datasets.training.feature_files.values())).parent
    qformer_steps = 0
    if learner.has_two_phases:
        qformer_steps = count_steps(settings, len(datasets.training)) // 3
    return learner, measure_before(captioner, datasets, feature_folder, qformer_steps)


class StepPlan(NamedTuple):
    """What is decided about a step before it is taken: all of it follows from its number."""

    number: int  # from 0
    indices: list[int]  # of the pairs
    next_indices: list[int]  # of the pairs of the step after this one
    rate: float  # the learning rate
    seed: int  # for dropout; each process derives one of its own from it
    qformer_alone: bool  # the language model does not learn in this step


def plan_step(
    settings: argparse.Namespace, dataset: ImageCaptioningDataset, progress: Progress
) -> StepPlan:
    """The plan of the next step."""
    step = progress.step
    steps = count_steps(settings, len(dataset))
    return StepPlan(
        number=step,
        indices=pick_pairs(dataset, settings.BATCH_SIZE, settings.SEED, step),
        next_indices=pick_pairs(dataset, settings.BATCH_SIZE, settings.SEED, step + 1),
        rate=learning_rate(step, steps, settings.LEARNING_RATE, settings.WARMUP_FRACTION),
        seed=derive_seed(settings.SEED, step),
        qformer_alone=step < progress.qformer_steps,
    )


def take_step(
    learner: Learner,
    dataset: ImageCaptioningDataset,
    plan: StepPlan,
    max_norm: float,
    is_told_to_stop: bool,
) -> StepResult:
    """One optimizer step, on all processes together. Raises UserError.

    In float16 a gradient may overflow. GradScaler then skips the step and lowers its scale, and the
    step is taken again: it counts once.
    """
    state = PartialState()
    examples = [dataset[i] for i in share(plan.indices)]
    tokens = dataset.count_tokens(plan.indices)
    pictures = [dataset.pairs[i].picture for i in plan.indices]
    while True:
        torch.manual_seed(plan.seed * state.num_processes + state.process_index)
        own_losses = learner.backward(examples, tokens)
        dataset.prefetch(share(plan.next_indices))  # while a GPU is busy
        result = learner.sum_over_processes(
            own_losses, len(plan.indices), is_told_to_stop, plan.qformer_alone
        )
        refuse_not_finite(result, learner, plan.number + 1, pictures)
        learner.step(plan.rate, result.norm, max_norm, plan.qformer_alone)
        if math.isfinite(result.norm):
            return result


def refuse_not_finite(result: StepResult, learner: Learner, step: int, pictures: list[str]) -> None:
    """Raises UserError where a loss is not finite, or a gradient that can't be scaled lower."""
    causes = []
    for picture, loss in zip(pictures, result.pair_losses, strict=True):
        if not math.isfinite(loss):
            causes.append(printable(picture))
    if not causes and math.isfinite(result.norm):
        return
    can_scale_lower = learner.scaler.is_enabled() and learner.scaler.get_scale() > 1
    if not causes and can_scale_lower:
        return

    what = f"the norm of the gradient is {result.norm}"
    if causes:
        what = f"the loss is not finite for {', '.join(causes[:MAX_NAMED])}"
    remedy = "Lower LEARNING_RATE"
    if learner.captioner.dtype != torch.float32:
        remedy += ", or set DTYPE to float32"
    raise UserError(
        f"at step {step} {what}. {remedy}, and use --restart. If that does not help, a file of "
        "features may be damaged: delete .features in TRAIN_DIR (or, if that can't be "
        "written to, OUTPUT_DIR.features); it will be made again."
    )


def measure_epoch(learner: Learner, held_out: ImageCaptioningDataset, progress: Progress) -> float:
    """The held-out loss after an epoch; `progress` remembers the weights if it is the lowest."""
    loss = held_out_loss(learner.captioner, held_out)
    if len(held_out) and not math.isfinite(loss):
        raise UserError(
            f"the held-out loss after step {progress.step} is {loss}. Lower LEARNING_RATE, and "
            "use --restart."
        )
    if not len(held_out) or loss < progress.best:  # with nothing held out, the last is the best
        progress.best = loss
        progress.best_step = progress.step
        progress.best_master = learner.master.clone()
    return loss


def describe_epoch(progress: Progress, epochs: int, train_loss: float) -> str:
    """A line on the epoch that has just ended. `train_loss` is per token, as the held-out one."""
    last = progress.metrics[-1]
    line = f"epoch {last['epoch']}/{epochs}: loss {train_loss:.4f}"
    if not math.isnan(last["held_out_loss"]):
        line += f", held-out loss {last['held_out_loss']:.4f}"
        if progress.best_step == progress.step:
            line += " (best)"
    return line


def train(
    settings: argparse.Namespace, learner: Learner, datasets: Datasets, progress: Progress, run: Run
) -> None:
    """The training loop; at its end the weights are those of the lowest held-out loss.

    Raises UserError on a loss that is not finite; Stopped after a signal, when the step is saved.
    """
    dataset = datasets.training
    epoch_steps = count_epoch_steps(len(dataset), settings.BATCH_SIZE)
    epoch_tokens = sum(dataset.token_counts)
    steps = count_steps(settings, len(dataset))
    is_alone = PartialState().num_processes == 1
    pause = math.inf
    if settings.CHECKPOINT_MINUTES:
        pause = 60 * settings.CHECKPOINT_MINUTES
    saved = time.monotonic()
    bar = tqdm(total=steps, initial=progress.step, desc="training", unit="step", disable=None)
    with bar, noted_signals() as signals:
        while progress.step < steps:
            # A step.
            started = time.perf_counter()
            plan = plan_step(settings, dataset, progress)
            result = take_step(learner, dataset, plan, settings.MAX_GRAD_NORM, bool(signals))
            progress.step += 1
            progress.pair_losses[plan.indices] += torch.tensor(result.pair_losses)
            progress.epoch_loss += sum(result.pair_losses)
            seconds = time.perf_counter() - started

            # After each epoch: the held-out loss.
            epoch_ended = progress.step % epoch_steps == 0
            epoch_loss = math.nan
            if epoch_ended:
                epoch_loss = measure_epoch(learner, datasets.held_out, progress)

            # Metrics, for metrics.csv, the tracker and the screen.
            loss = sum(result.pair_losses) / dataset.count_tokens(plan.indices)
            metrics = {
                "step": progress.step,
                "epoch": math.ceil(progress.step / epoch_steps),
                "learning_rate": plan.rate,
                "train_loss": loss,
                "held_out_loss": epoch_loss,
                "grad_norm": result.norm,
                "pairs_per_second": len(plan.indices) / seconds,
                "seconds": progress.metrics[-1]["seconds"] + seconds,
            }
            progress.metrics.append(metrics)
            run.tracking.log(metrics)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if epoch_ended:
                train_loss = progress.epoch_loss / epoch_tokens
                tqdm.write(describe_epoch(progress, settings.EPOCHS, train_loss))
                progress.epoch_loss = 0.0

            # A checkpoint, and the end, if a signal asked for it. Several processes agree on that
            # in the sums of a step, so that all stop after the same one. A single one stops now.
            must_stop = result.stop or (is_alone and bool(signals))
            if epoch_ended or must_stop or time.monotonic() > saved + pause:
                run.save(progress, learner)
                saved = time.monotonic()
            if must_stop:
                stop_together(signals)

        # A signal that came during the last step was in no sum: all processes are asked.
        if any(gather_object([bool(signals)])):
            stop_together(signals)
    learner.set_master(progress.best_master)


def stop_together(signals: list[int]) -> None:
    """Raises Stopped in all processes, once each has reached this point."""
    PartialState().wait_for_everyone()  # a launcher kills all when the first one ends
    number = signals[0] if signals else signal.SIGINT  # none, if another process got it
    raise Stopped(number)


def describe_steps(settings: argparse.Namespace, pair_count: int, progress: Progress) -> str:
    """How many steps there will be, and what to expect of them."""
    epoch_steps = count_epoch_steps(pair_count, settings.BATCH_SIZE)
    steps = count_steps(settings, pair_count)
    lines = [f"steps: {steps}, {epoch_steps} per epoch"]
    if progress.step:
        lines[0] += f", {progress.step} done"
    if steps < FEW_STEPS:
        epochs = math.ceil(FEW_STEPS / epoch_steps)
        lines.append(f"  perhaps too few steps to learn much: try EPOCHS = {epochs}")
    if progress.qformer_steps:
        lines.append(
            f"  for the first {progress.qformer_steps} steps the Q-Former learns alone; the loss "
            "falls when the language model joins"
        )
    return "\n".join(lines)


# ---- What a run leaves --------------------------------------------------------------------------


class PairLoss(NamedTuple):
    """A row of pairs.csv."""

    split: str  # "train" or "held out"
    loss: float  # per token
    tokens: int
    picture: str
    caption: str


def list_pairs(split: str, dataset: ImageCaptioningDataset, losses: torch.Tensor) -> list[PairLoss]:
    """Rows of pairs.csv, the highest loss first. `losses` are sums over tokens, (pairs,)."""
    rows = []
    for pair, loss, tokens in zip(
        dataset.pairs, losses.tolist(), dataset.token_counts, strict=True
    ):
        rows.append(PairLoss(split, round(loss / tokens, 4), tokens, pair.picture, pair.caption))
    rows.sort(key=lambda row: -row.loss)
    return rows


def summarize(
    captioned: list[CaptionedPicture],
    datasets: Datasets,
    progress: Progress,
    hard_words: HardWords,
    learner: Learner,
) -> dict[str, Any]:
    """`results` of settings.json, with `remarks` on what is wrong. None: it can't be measured."""
    held_out = {"before": None, "after": None}
    if captioned:
        held_out = {"before": progress.metrics[0]["held_out_loss"], "after": progress.best}
    results = {
        "training_pairs": len(datasets.training),
        "held_out_pairs": len(datasets.held_out),
        "captioned": len(captioned),
        "steps": progress.step,
        "best_step": progress.best_step,
        "seconds": round(progress.metrics[-1]["seconds"], 1),
        "held_out_loss": held_out,
    }

    references = [row.references for row in captioned]
    before = measure_captions([row.before for row in captioned], references)
    after = measure_captions([row.after for row in captioned], references)
    for name in before:
        results[name] = {"before": before[name], "after": after[name]}
    if progress.qformer_steps:
        results["qformer_steps"] = progress.qformer_steps
    if hard_words.hardest:
        results["hard_words"] = hard_words.hardest
        results["mean_word_loss"] = hard_words.mean

    trains_qformer = learner.captioner.trains_qformer
    qformer_alone = trains_qformer and not learner.has_two_phases
    results["remarks"] = list_remarks(captioned, results, qformer_alone)
    is_little = (
        len(datasets.training.references) < FEW_QFORMER_PICTURES
        or progress.step < FEW_QFORMER_STEPS
    )
    if trains_qformer and is_little:
        results["remarks"].append(
            f"a Q-Former learns little from fewer than {FEW_QFORMER_PICTURES} pictures or "
            f"{FEW_QFORMER_STEPS} steps: LORA_TARGETS attention may be just as good"
        )
    return results


def list_remarks(
    captioned: list[CaptionedPicture], results: dict[str, Any], qformer_alone: bool
) -> list[str]:
    """What a user should check."""
    if not captioned:
        return ["nothing is held out, so nothing can be measured"]
    remarks = []
    if results["cider_d"]["after"] is None:
        remarks.append(
            "cider_d is '-': it needs two held-out pictures or more, with captions that differ"
        )
    loss = results["held_out_loss"]
    if loss["after"] >= loss["before"]:
        remarks.append(
            "the held-out loss is no lower than before training: lower LEARNING_RATE, "
            "or add pictures"
        )

    nearly_all = 0.9 * len(captioned)
    is_unchanged = all(row.after == row.before for row in captioned)
    most_common = max(Counter(row.after for row in captioned).values())
    most_common_reference = max(Counter(row.references[0] for row in captioned).values())
    if is_unchanged and results["exact"]["after"] < 1 and qformer_alone:
        remarks.append(
            "the captions of the held-out pictures did not change: LORA_TARGETS qformer alone "
            "teaches no wording; use qformer+attention"
        )
    elif is_unchanged and results["exact"]["after"] < 1:
        remarks.append(
            "the captions of the held-out pictures did not change: raise EPOCHS or LEARNING_RATE"
        )
    elif most_common >= nearly_all and most_common_reference < nearly_all:
        remarks.append(
            "the model writes nearly the same caption for all held-out pictures: lower "
            "LEARNING_RATE, and look at held_out.csv"
        )
    return remarks


def describe_results(results: dict[str, Any]) -> dict[str, str]:
    """The results as text, by name: for the screen, the page and the card."""
    described = {}
    for name, value in results.items():
        if name == "hard_words":
            words = ", ".join(f"{word} {loss:.2f}" for word, loss in value.items())
            mean = results["mean_word_loss"]
            described["hard_words"] = f"{words} (loss; mean of all words: {mean:.2f})"
        elif name not in ("remarks", "mean_word_loss"):
            described[name] = str(value)
    count = results["captioned"]
    for name in ("held_out_loss", "exact", "cider_d"):
        before = results[name]["before"]
        after = results[name]["after"]
        if before is None:
            described[name] = "-"
        elif name == "exact":
            before_count = round(before * count)
            after_count = round(after * count)
            described[name] = f"{before_count} before, {after_count} after, of {count}"
        else:
            described[name] = f"{before:.4f} before, {after:.4f} after"
    return described


def write_tables(
    folder: Path, pairs: list[PairLoss], captioned: list[CaptionedPicture], findings: Findings
) -> None:
    """pairs.csv, held_out.csv and skipped.csv; metrics.csv is written with each checkpoint."""
    write_csv(folder / "pairs.csv", [PairLoss._fields, *pairs])
    rows = []
    for row in captioned:
        rows.append(row._replace(references=json.dumps(row.references, ensure_ascii=False)))
    write_csv(folder / "held_out.csv", [CaptionedPicture._fields, *rows])
    write_csv(folder / "skipped.csv", [Skipped._fields, *sort_skipped(findings.skipped)])


def draw_losses(folder: Path, record: dict[str, Any]) -> None:
    """losses.png: the losses in metrics.csv over the steps."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    metrics = read_csv(folder / "metrics.csv")
    for name, style, label in (
        ("train_loss", ".-", "training"),
        ("held_out_loss", "o-", "held out"),
    ):
        rows = [row for row in metrics if row[name]]
        steps = [int(row["step"]) for row in rows]
        losses = [float(row[name]) for row in rows]
        if rows:
            axes.plot(steps, losses, style, linewidth=1, markersize=5, label=label)
    qformer_steps = record["results"].get("qformer_steps", 0)
    if qformer_steps:
        axes.axvline(qformer_steps, color="gray", linestyle=":", label="language model joins")
    axes.plot(0, 0)  # shows nothing, but the margin above the curve counts from 0 then
    axes.locator_params("x", integer=True)
    axes.set(xlabel="step", ylabel="loss per token", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with io.BytesIO() as drawn:
        figure.savefig(drawn, format="png", dpi=120)
        write_whole(folder / "losses.png", drawn.getvalue())


PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
  :root { color-scheme: light dark; --right: #187a2f; --wrong: #b3261e; --quiet: #666; }
  @media (prefers-color-scheme: dark) {
    :root { --right: #6fd08a; --wrong: #ff8a80; --quiet: #aaa; }
  }
  body { font: 16px/1.45 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto;
         padding: 0 1rem; overflow-wrap: anywhere; }
  table { border-collapse: collapse; }
  th, td { padding: .15rem 1rem .15rem 0; text-align: left; font-weight: normal; }
  th, small, .quiet { color: var(--quiet); }
  th { white-space: nowrap; }
  section { display: grid; gap: 1.5rem;
            grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
  figure { display: flex; gap: .8rem; margin: 0; }
  figure img { width: 8rem; height: 8rem; object-fit: contain; flex: none; }
  figcaption { min-width: 0; }
  p { margin: 0 0 .2rem; }
  .right { color: var(--right); }
  .wrong { color: var(--wrong); }
  .losses { max-width: 100%; background: white; border-radius: .4rem; }
</style>
<h1>$title</h1>
$content
</html>
""")


def write_page(path: Path, title: str, content: list[str]) -> None:
    """A page that any browser shows without a network. `content` is HTML."""
    page = PAGE.substitute(title=html.escape(title), content="\n".join(content))
    write_whole(path, page.encode(errors="replace"))


def embed_picture(path: str) -> str:
    """A small copy of a picture in an <img>; a line of text where it can't be read any more."""
    try:
        picture = read_picture(path, 128)
        picture.thumbnail((256, 256))
        with io.BytesIO() as file:
            picture.save(file, "JPEG", quality=75)
            content = base64.b64encode(file.getvalue()).decode()
    except Exception:  # many kinds; a picture that is gone must not keep the page from being made
        return '<p class="quiet">(the picture can\'t be read)</p>'
    return f'<img src="data:image/jpeg;base64,{content}" alt="">'


class Line(NamedTuple):
    """A line of text next to a picture."""

    label: str
    text: str
    kind: str = ""  # "right", "wrong" or "quiet" decides its colour


class Card(NamedTuple):
    """A picture on a page, with what is said about it."""

    picture: str
    lines: list[Line]


def format_card(card: Card, root: str) -> str:
    """The HTML of a card. The picture is named by its path below `root`."""
    lines = []
    for line in card.lines:
        text = html.escape(printable(line.text))
        # Only the text has a direction of its own: a label before it would decide it.
        lines.append(
            f'<p class="{line.kind}"><small>{html.escape(line.label)}</small> '
            f'<span dir="auto">{text}</span></p>'
        )
    name = html.escape(printable(relative(card.picture, root)))
    return (
        f"<figure>{embed_picture(card.picture)}<figcaption>{''.join(lines)}"
        f'<small dir="auto">{name}</small></figcaption></figure>'
    )


def format_section(title: str, cards: list[Card], limit: int, root: str) -> list[str]:
    """HTML of the first `limit` cards. Threads read the pictures."""
    if not cards:
        return []
    shown = cards[:limit]
    with ThreadPoolExecutor(4) as pool:
        figures = list(pool.map(lambda card: format_card(card, root), shown))
    parts = [f"<h2>{html.escape(title)}</h2>"]
    if len(shown) < len(cards):
        parts.append(f"<p>{len(shown)} of {len(cards)} are shown.</p>")
    return [*parts, "<section>", *figures, "</section>"]


def list_held_out_cards(rows: list[dict[str, str]]) -> list[Card]:
    """Cards for the rows of held_out.csv: wrong captions first, then the least sure ones."""

    def rank(row: dict[str, str]) -> tuple[bool, float]:
        is_right = row["after"] in json.loads(row["references"])
        return is_right, float(row["confidence"])

    cards = []
    for row in sorted(rows, key=rank):
        is_right, confidence = rank(row)
        lines = []
        for reference in json.loads(row["references"]):
            lines.append(Line("caption", reference))
        lines.append(Line("before", row["before"], "quiet"))
        mark = "✓" if is_right else "✗"
        kind = "right" if is_right else "wrong"
        lines.append(Line(f"after {mark}", row["after"], kind))
        lines.append(Line("confidence", f"{confidence:.2f}", "quiet"))
        cards.append(Card(row["picture"], lines))
    return cards


def write_report(folder: Path, record: dict[str, Any]) -> None:
    """report.html: from the tables in the folder, losses.png, and the record."""
    parts = []
    for remark in record["results"]["remarks"]:
        parts.append(f"<p><strong>Please check:</strong> {html.escape(remark)}.</p>")
    parts.append(f"<p>{html.escape(describe_before(record))}</p>")
    parts.append("<table>")
    for name, value in describe_results(record["results"]).items():
        parts.append(f"<tr><th>{name.replace('_', ' ')}</th><td>{html.escape(value)}</td></tr>")
    parts.append("</table>")
    with contextlib.suppress(FileNotFoundError):  # it could not be drawn
        losses = base64.b64encode((folder / "losses.png").read_bytes()).decode()
        parts.append(f'<img class="losses" src="data:image/png;base64,{losses}" alt="Losses">')

    pairs = []
    for row in read_csv(folder / "pairs.csv"):
        if row["split"] == "train":
            lines = [Line("caption", row["caption"]), Line("loss", row["loss"], "quiet")]
            pairs.append(Card(row["picture"], lines))
    root = record["settings"]["TRAIN_DIR"]
    parts += format_section(
        "Held-out pictures: wrong captions first, then the least sure ones",
        list_held_out_cards(read_csv(folder / "held_out.csv")),
        MAX_PICTURES_SHOWN - MAX_PAIRS_SHOWN,
        root,
    )
    parts += format_section(
        "Training pairs with the highest losses: are their captions right?",
        pairs,
        MAX_PAIRS_SHOWN,
        root,
    )
    name = Path(os.path.abspath(record["settings"]["OUTPUT_DIR"])).name
    write_page(folder / "report.html", f"BLIP-2 captions: {name}", parts)


def describe_before(record: dict[str, Any]) -> str:
    """What "before" means in the results."""
    start = record["settings"]["START_FROM"]
    if start:
        return f'"before" is the adapter that was in {printable(start)} when this training began.'
    return '"before" is the base model, without an adapter.'


CARD = string.Template("""---
${base_model}library_name: peft
license: other
pipeline_tag: image-to-text
tags:
- blip-2
- lora
- image-captioning
---

# BLIP-2 captions: $name

A LoRA adapter for `$base`, whose language model was loaded in $loaded. $start

| | |
|---|---|
$results
$remarks
![Losses over the steps](losses.png)
$examples
## Load it

```python
import torch
from peft import PeftModel
from PIL import Image
from transformers import BitsAndBytesConfig, Blip2ForConditionalGeneration, Blip2Processor

folder = $folder  # where this is, or its name on the Hub
dtype = torch.$dtype
quantization = $quantization
processor = Blip2Processor.from_pretrained(folder)
base = Blip2ForConditionalGeneration.from_pretrained(
    $base_literal, dtype=dtype, quantization_config=quantization, device_map="auto")
for module in base.modules():  # else bitsandbytes calculates differently on some CPUs
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()

picture = Image.open("picture.jpg").convert("RGB")
inputs = processor(images=picture, text=$prompt, return_tensors="pt").to(base.device, dtype)
ids = model.generate(**inputs, max_new_tokens=$tokens)$without_prompt
print(processor.decode(ids[0], skip_special_tokens=True).strip())
```

## Publish it

    hf upload your-name/your-captioner . --exclude report.html --exclude "*.csv"

The page and the tables hold pictures and captions of the training data: leave them out unless they
may be published. The licence of the base model also applies to this adapter; OPT's allows research
only.
""")


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """README.md: a model card for the Hub."""
    settings = record["settings"]
    base = settings["MODEL_ID"]
    base_model = f"base_model: {base}\n"
    if os.path.isabs(base):  # a folder, which the Hub does not have
        base_model = ""
    loaded = record["dtype"]
    quantization = "None"
    if settings["LOAD_IN_4BIT"]:
        loaded = "4 bits"
        options = ",\n".join(f"    {name}={value!r}" for name, value in NF4.items())
        quantization = f"BitsAndBytesConfig(\n{options},\n    bnb_4bit_compute_dtype=dtype)"
    without_prompt = ""
    if record["language_model"] == "opt":  # which repeats the prompt
        without_prompt = '[:, inputs["input_ids"].shape[1] :]'

    results = []
    for name, value in describe_results(record["results"]).items():
        results.append(f"| {name.replace('_', ' ')} | {value} |")
    remarks = []
    for remark in record["results"]["remarks"]:
        remarks.append(f"\nPlease check: {remark}.\n")
    examples = []
    for row in spread(read_csv(folder / "held_out.csv"), 3):
        references = " / ".join(json.loads(row["references"]))
        # Indented text is shown as it is, whatever is in it.
        examples.append(f"\n    reference: {references}\n    before:    {row['before']}")
        examples.append(f"    after:     {row['after']}\n")

    name = Path(os.path.abspath(settings["OUTPUT_DIR"])).name
    card = CARD.substitute(
        base_model=base_model,
        name=name,
        base=base,
        loaded=loaded,
        start=describe_before(record),
        results="\n".join(results),
        remarks="".join(remarks),
        examples="\n".join(examples),
        folder=repr(name),
        dtype=record["dtype"],
        quantization=quantization,
        base_literal=repr(base),
        prompt=repr(settings["PROMPT"]),
        tokens=settings["MAX_CAPTION_TOKENS"] + 1,
        without_prompt=without_prompt,
    )
    write_whole(folder / "README.md", card.encode(errors="surrogateescape"))


PAGES = ("losses.png", "report.html", "README.md")


def make_missing_pages(folder: Path, record: dict[str, Any]) -> int:
    """Makes the pages that are not in the folder. Returns the exit code: 1 if one can't be made."""
    code = 0
    makers = (draw_losses, write_report, write_card)  # in this order: the page shows the losses
    for name, make in zip(PAGES, makers, strict=True):
        try:
            if not (folder / name).exists():
                make(folder, record)
        except OSError:  # a full disk: the same command continues when there is room
            raise
        except Exception as error:  # a failed page must not lose the adapter
            print(
                f"error: {name} can't be made: {error!r}. The adapter is saved; the same command, "
                "without --restart, tries again.",
                file=sys.stderr,
            )
            code = 1
    return code


def flush_files(folder: Path) -> None:
    """Flushes all files to the disk, and gives them the permissions of settings.json."""
    for path in folder.iterdir():
        if path.is_file():
            # PEFT's can be read only by their owner.
            shutil.copymode(folder / "settings.json", path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def write_results(
    run: Run, learner: Learner, datasets: Datasets, progress: Progress, findings: Findings
) -> int:
    """Writes all that a run leaves, and returns the exit code.

    If it is killed at any point, the same command does the rest.
    """
    held_out_losses = measure_losses(learner.captioner, datasets.held_out)
    captions = caption_held_out(learner.captioner, datasets)
    hard_words = find_hard_words(learner.captioner, datasets.held_out)
    if not run.is_main:
        return 0
    training_losses = progress.pair_losses / run.record["settings"]["EPOCHS"]
    training_pairs = list_pairs("train", datasets.training, training_losses)
    held_out_pairs = list_pairs("held out", datasets.held_out, held_out_losses)
    captioned = []
    for picture, before, after in zip(
        datasets.to_caption, progress.captions, captions, strict=True
    ):
        references = datasets.held_out.references[picture]
        captioned.append(
            CaptionedPicture(picture, references, before, after.text, after.confidence)
        )
    results = summarize(captioned, datasets, progress, hard_words, learner)
    record = run.record | {"not_used": len(findings.skipped), "results": results}

    save_adapter(run.folder, run.record, learner)
    write_tables(run.folder, training_pairs + held_out_pairs, captioned, findings)
    for name in PAGES:  # of an earlier attempt; PEFT has written a README.md of its own
        (run.folder / name).unlink(missing_ok=True)
    code = make_missing_pages(run.folder, record)
    flush_files(run.folder)

    # All is on the disk: it can be said to be finished, and what it continued from can go.
    write_record(run.folder, record)
    run.checkpoint_path.unlink(missing_ok=True)
    run.tracking.close()
    run.refuse_foreign_files()  # some may have appeared since the run began
    run.publish()
    print_summary(record, captioned)
    print(f"adapter:         {printable(str(run.output))}")
    page = run.output / "report.html"
    if page.exists():
        print(f"look at:         {printable(str(page))}")
    return code


def print_summary(record: dict[str, Any], captioned: list[CaptionedPicture]) -> None:
    """A few captions, and the results."""
    for row in spread(captioned, record["settings"]["SAMPLE_COUNT"]):
        print(printable(row.picture))
        print(f"  reference: {printable(' / '.join(row.references))}")
        print(f"  before:    {printable(row.before)}")
        print(f"  after:     {printable(row.after)}")
    for name, value in describe_results(record["results"]).items():
        print(f"{name + ':':<17}{value}")
    for remark in record["results"]["remarks"]:
        print(f"please check:    {remark}")


# ---- Commands -----------------------------------------------------------------------------------


def describe_model(captioner: Captioner) -> dict[str, Any]:
    """The facts about the loaded model."""
    config = captioner.model.config
    versions = {"torch": str(torch.__version__)}  # with its build, as in 2.13.0+cu130
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # bitsandbytes, without LOAD_IN_4BIT
            versions.setdefault(name, version(name))
    return {
        "vision_side": hash_vision_side(captioner),
        "processes": PartialState().num_processes,
        "language_model": config.text_config.model_type,
        "base_commit": getattr(config, "_commit_hash", None),
        "device": str(captioner.device),
        "dtype": str(captioner.dtype).removeprefix("torch."),
        "versions": versions,
    }


def fine_tune(settings: argparse.Namespace, data: Data, findings: Findings) -> int:
    """Starts or continues a run, and finishes it. Returns the exit code."""
    with open_run(settings, data) as run:
        run.find_checkpoint(settings.restart)
        run.refuse_other_processes()
        if run.is_finished:
            where = "from scratch"
            if settings.START_FROM:
                where = "once more from the adapter in START_FROM"
            print(
                f"this run is finished: its adapter is in {printable(str(run.output))}. To train "
                f"{where}, use --restart."
            )
            return make_missing_pages(run.output, read_record(run.output)) if run.is_main else 0

        describe_other_data(settings)
        if run.checkpoint:  # whatever "auto" would be on this device; the record keeps "auto"
            settings.DTYPE = run.checkpoint["record"]["dtype"]
        captioner = load_captioner(settings)
        run.note(**describe_model(captioner))

        folder = make_feature_folder(settings.TRAIN_DIR, run.output, run.record["vision_side"])
        feature_files = encode_pictures(
            captioner, data.pictures, settings.TRAIN_DIR, folder, settings.NUM_WORKERS, findings
        )
        run.note(unreadable=sorted(set(data.pictures) - feature_files.keys()))
        captioner.drop_vision_side()

        datasets = build_datasets(settings, data, feature_files, captioner.row_builder)
        describe_datasets(datasets, captioner.row_builder)
        learner, progress = start(settings, captioner, datasets, run.checkpoint)
        run.discard_earlier()
        run.tracking.start(run.record["settings"])
        if not progress.step:
            run.tracking.log(progress.metrics[0])
        print(describe_steps(settings, len(datasets.training), progress))
        train(settings, learner, datasets, progress, run)
        return write_results(run, learner, datasets, progress, findings)


def check_pictures(settings: argparse.Namespace, data: Data, findings: Findings) -> int:
    """Lists every pair, and what is not used. Returns the exit code: 1 if no pair is left."""
    captions = defaultdict(list)
    for picture, caption in data.pairs + data.validation:
        captions[picture].append(caption)
    readable = set()
    for pixels in read_pictures(data.pictures, None, settings.NUM_WORKERS, "checking", findings):
        readable.update(pixels)
        for picture in pixels:
            for caption in captions[picture]:
                print(f"{printable(picture)}\t{printable(caption)}")

    print_findings(findings, show_all=True)
    to_train = sum(pair.picture in readable for pair in data.pairs)
    to_measure = sum(pair.picture in readable for pair in data.validation)
    print(f"pairs: {to_train + to_measure}")
    is_missing = not to_train or (settings.VALIDATION_DIR and not to_measure)
    return 1 if is_missing else 0


def expand_path(path: str) -> list[str]:
    """The files and folders that a path of --caption names. Raises UserError.

    "~" is the home folder. A pattern with * is expanded, since Windows' shells don't do it.
    """
    if is_url(path):
        raise UserError(f"{path!r} is a URL. Download the picture, and give the path of the file.")
    path = os.path.expanduser(path)
    if os.path.lexists(path):
        return [path]
    folder, name = os.path.split(path)
    if os.path.isdir(folder):  # it may have brackets in its name
        path = os.path.join(glob.escape(folder), name)
    return sorted(glob.glob(path, recursive=True))


def list_pictures(paths: list[str], findings: Findings) -> list[str]:
    """These files, and those in these folders, each once. Raises UserError for none."""
    pictures: dict[str, None] = {}  # a set that keeps the order
    for path in paths:
        matches = expand_path(path)
        if not matches and has_control_character(path):
            raise UserError(f"there is no {path!r}, {CONTROL_CHARACTER_REMEDY}.")
        if not matches:
            findings.skip(path, f"there is no such file or folder{describe_near_file(path)}")
        for match in matches:
            files = [match]
            if os.path.isdir(match):
                files = list_files(match, findings)
            for file in files:
                if is_other_extension(os.path.splitext(file)[1]):
                    findings.not_pictures.append(file)
                else:
                    pictures[os.path.normpath(file)] = None
    if not pictures:
        reasons = [f"{path!r}: {reason}" for path, reason in findings.skipped[:MAX_NAMED]]
        why = "; ".join(reasons) or f"there is no picture in {paths}"
        raise UserError(f"nothing to caption: {why}. Give pictures or folders after --caption.")
    return list(pictures)


def describe_near_file(path: str) -> str:
    """The end of a reason: that there is a file with nearly this path; "": there is none."""
    return NearNames(list_neighbours(path)).describe(os.path.basename(path))


def load_trained(settings: argparse.Namespace) -> Captioner:
    """The model with the adapter in OUTPUT_DIR, as it was trained. Raises UserError."""
    output = Path(settings.OUTPUT_DIR)

    def no_adapter(reason: Any) -> UserError:
        return UserError(f"OUTPUT_DIR {str(output)!r} holds no adapter that can be read: {reason}.")

    for name in ("settings.json", "adapter_model.safetensors", "adapter_config.json"):
        if not (output / name).exists():
            raise no_adapter(
                f"there is no {name}. If you trained with --output-dir, give it again; if the run "
                "is unfinished, run its command again"
            )
    try:
        text = (output / "settings.json").read_text(encoding="utf-8")
        record = complete_record(json.loads(text))
        trained = argparse.Namespace(**record["settings"])
        dtype = record["dtype"]
        refuse_damaged_weights(output / "adapter_model.safetensors")
    except KeyError as error:
        raise no_adapter(f"settings.json lacks {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise no_adapter(error) from error

    if is_missing_folder(trained.MODEL_ID):
        raise no_adapter(
            f"its base {trained.MODEL_ID!r} is not on this machine. If you have it in another "
            f"folder, set MODEL_ID in {str(output / 'settings.json')!r} to that path"
        )

    trained.DEVICE = settings.DEVICE
    trained.NUM_BEAMS = settings.NUM_BEAMS
    trained.DTYPE = "auto" if dtype == "float16" else dtype  # which not all devices have
    captioner = load_captioner(trained)
    try:
        # This puts LoRA into captioner.model, in place: what is returned is not needed.
        PeftModel.from_pretrained(
            captioner.model,
            str(output),
            torch_device=str(captioner.device),
            autocast_adapter_dtype=False,
        )
    except (RuntimeError, ValueError, TypeError, OSError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise no_adapter(f"it does not fit the base: {reason}") from error
    return captioner


def caption_pictures(settings: argparse.Namespace) -> int:
    """Prints path<TAB>caption<TAB>confidence for pictures, and those in folders.

    All else goes to stderr. Returns the exit code: 1 if a picture could not be captioned.
    """
    findings = Findings()
    pictures = list_pictures(settings.caption, findings)
    if has_control_character(settings.page):
        raise UserError(f"--page is {settings.page!r}, {CONTROL_CHARACTER_REMEDY}.")
    page_folder = os.path.dirname(os.path.expanduser(settings.page))
    if page_folder and not os.path.isdir(page_folder):
        raise UserError(
            f"there is no folder {page_folder!r} for --page. Make it, or choose another."
        )
    if settings.page and not settings.page.lower().endswith((".html", ".htm")):
        raise UserError(
            f"--page {settings.page!r} does not end in .html, and a page is not written over "
            "another kind of file. Use, for example, --page new.html."
        )
    if settings.write_txt:
        refuse_tables(pictures)
    print(f"adapter: {printable(settings.OUTPUT_DIR)}", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):
        captioner = load_trained(settings)

    captions: dict[str, Caption] = {}
    processor = captioner.processor.image_processor
    for pixels in read_pictures(pictures, processor, settings.NUM_WORKERS, "captioning", findings):
        with contextlib.redirect_stdout(sys.stderr):  # it says there if memory runs out
            new_captions = captioner.caption(captioner.encode(list(pixels.values())))
        for picture, caption in zip(pixels, new_captions, strict=True):
            line = f"{printable(picture)}\t{printable(caption.text)}\t{caption.confidence:.4f}"
            tqdm.write(line)
            captions[picture] = caption

    with contextlib.redirect_stdout(sys.stderr):
        unwritten: list[str] = []
        if settings.write_txt:
            unwritten = write_caption_files(captions)
        if settings.page:
            write_caption_page(Path(settings.page).expanduser(), captions, unwritten)
        print_notes(findings, name_files=False)
        print_skipped(findings.skipped, show_all=True)
    return 1 if findings.skipped else 0


def refuse_tables(pictures: list[str]) -> None:
    """Raises UserError where a table is next to a picture: a folder can't have .txt files too."""
    folders = {os.path.dirname(picture) or "." for picture in pictures}
    for folder in sorted(folders):
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        for name in names:
            path = os.path.join(folder, name)
            if is_wanted(name) and is_table_name(name) and is_table(path, names):
                raise UserError(
                    f"there is the table {path!r}, and a folder can have a table or .txt files, "
                    "not both. Leave out --write-txt, or copy the pictures into another folder."
                )


def write_caption_files(captions: dict[str, Caption]) -> list[str]:
    """<name>.txt next to each picture that has none. Returns the other pictures."""
    written: set[str] = set()  # in lower case, since on some disks A.txt is a.txt
    unwritten = []
    for picture, caption in captions.items():
        path = Path(picture).with_suffix(".txt")
        names = [name.casefold() for name in os.listdir(path.parent)]
        if not clean_caption(caption.text):  # which training would not accept
            print(f"{printable(picture)}: no .txt is written, because its caption is empty.")
        elif str(path).casefold() in written:
            print(
                f"{printable(picture)}: no .txt is written, because {path.name} belongs to "
                "another picture of the same name. Rename one of the two."
            )
            unwritten.append(picture)
        elif path.name.casefold() in names:
            unwritten.append(picture)
        else:
            write_whole(path, (caption.text + "\n").encode())  # on a full disk, nothing is left
            written.add(str(path).casefold())
    print(
        f"captions written next to pictures, as .txt: {len(written)}; not written, because there "
        f"is one already: {len(unwritten)}"
    )
    return unwritten


def write_caption_page(path: Path, captions: dict[str, Caption], unwritten: list[str]) -> None:
    """A page of new pictures and their captions, the least sure first.

    `unwritten` are those whose .txt has other words than the page.
    """
    cards = []
    for picture, caption in sorted(captions.items(), key=lambda item: item[1].confidence):
        lines = [
            Line("", caption.text),
            Line("confidence", f"{caption.confidence:.2f}", "quiet"),
        ]
        if picture in unwritten:
            lines.append(Line("", "not written: there is a .txt already", "quiet"))
        cards.append(Card(picture, lines))
    content = format_section("The least sure first", cards, MAX_PICTURES_SHOWN, os.curdir)
    write_page(path, "BLIP-2 captions", content)
    print(f"page: {printable(str(path))}")


def read_data(settings: argparse.Namespace, findings: Findings) -> Data:
    """The pairs of both folders, and what is not used of them. Raises UserError."""
    pairs = find_pairs(settings.TRAIN_DIR, findings)
    validation: list[Pair] = []
    if settings.VALIDATION_DIR:
        validation = find_pairs(settings.VALIDATION_DIR, findings)
        warn_of_copies(pairs, validation, show_all=settings.check)
    pictures = list(dict.fromkeys(pair.picture for pair in pairs + validation))
    return Data(pairs, validation, pictures)


def warn_of_copies(pairs: list[Pair], validation: list[Pair], show_all: bool) -> None:
    """Names pictures of VALIDATION_DIR that are, byte for byte, in TRAIN_DIR too."""
    trained = {pair.picture for pair in pairs}
    measured = {pair.picture for pair in validation}
    copies = find_copies(trained | measured)
    trained_originals = {copies.get(picture, picture) for picture in trained}
    both = [path for path in sorted(measured) if copies.get(path, path) in trained_originals]
    if both:
        named = both if show_all else both[:MAX_NAMED]
        what = count_of(len(both), "picture of VALIDATION_DIR is", "pictures of VALIDATION_DIR are")
        print(
            f"warning: {what} in TRAIN_DIR too, so the held-out loss will look better than it is: "
            + ", ".join(map(printable, named))
        )


def refuse_other_launchers() -> None:
    """Raises UserError if accelerate was set up for something that this script does not do."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        variable = f"ACCELERATE_USE_{name}"
        if os.environ.get(variable, "false").lower() not in ("", "0", "false", "no"):
            raise UserError(
                f"{variable} is set in the environment, but this script does plain data parallel "
                "training only. Unset it, or answer no to it in `accelerate config`."
            )


def run_command(settings: argparse.Namespace) -> int:
    """What the settings and flags ask for. Returns the exit code."""
    refuse_other_launchers()
    # Processes wait for each other up to a day: a download or an encoding pass may be slow.
    on_cpu = getattr(settings, "DEVICE", "") == "cpu"  # check_settings names what is missing
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=1))
    if int(os.environ.get("WORLD_SIZE", 1)) > state.num_processes:
        raise UserError(
            "several processes were started, but there is no GPU for them. See what "
            "nvidia-smi shows, or try it with --device cpu."
        )
    check_settings(settings)
    if (settings.caption or settings.check) and not state.is_main_process:
        return 0
    if settings.caption:
        return caption_pictures(settings)

    findings = Findings()
    try:
        data = read_data(settings, findings)
    except UserError:  # the reason is among the findings
        print_findings(findings, show_all=settings.check)
        raise
    if settings.check:
        return check_pictures(settings, data, findings)
    print_findings(findings, show_all=False)
    return fine_tune(settings, data, findings)


def find_remedy(error: Exception, how_to_continue: str) -> str:
    """What to do about an error that a library raised; "": none is known."""
    if isinstance(error, Timeout):  # of the lock of OUTPUT_DIR
        return (
            "Another run is using this OUTPUT_DIR: stop it, or choose another folder. Only if "
            "there is none (it was killed on another machine), delete that file."
        )
    if is_out_of_memory(error):
        return f"{MEMORY_REMEDY}."
    if isinstance(error, OSError) or "os error" in str(error):  # safetensors' have no class
        return f"Fix that. Then {how_to_continue}."
    is_of_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    if isinstance(error, torch.distributed.DistError) or is_of_gloo:
        return "Another process has ended: see its message."
    return ""


def prepare_output() -> None:
    """File names that are not valid Unicode can be printed; libraries print only errors."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # in a notebook
            stream.reconfigure(
                encoding=None if stream.isatty() else "utf-8",
                errors="backslashreplace",
                line_buffering=True,
            )
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="PIL|transformers|peft|matplotlib")


def interrupt(number: int, _: Any) -> None:
    """For SIGTERM, as Python does it for Ctrl-C."""
    raise KeyboardInterrupt(number)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    real_stderr = sys.stderr
    prefix = ""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:  # only the first of several processes prints; the others print errors
        prefix = f"process {rank}: "
        sys.stdout = sys.stderr = open(os.devnull, "w")
    prepare_output()
    settings = parse_arguments(argv)
    is_training = not settings.check and not settings.caption
    how_to_continue = "run the same command again"
    if is_training and settings.restart:  # which would give up what the restarted run has saved
        how_to_continue = (
            "run the same command without --restart (if no training step was shown yet, keep it)"
        )

    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        return run_command(settings)
    except (KeyboardInterrupt, Stopped) as stopped:
        line = f"{prefix}stopped"
        if is_training:
            line += f"; to continue, {how_to_continue}"
        print(line, file=real_stderr)
        number = stopped.args[0] if stopped.args else signal.SIGINT
        return 128 + number
    except UserError as error:
        print(f"{prefix}error: {error}", file=real_stderr)
        return 1
    except BrokenPipeError:  # nobody reads the output any more: --check | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if is_training:
            print(
                f"{prefix}stopped, because the output was closed; to continue, {how_to_continue}",
                file=real_stderr,
            )
        return 1
    except Exception as error:
        remedy = find_remedy(error, how_to_continue)
        if not remedy:
            raise
        reason = str(error).rstrip(".") or type(error).__name__
        print(f"{prefix}error: {reason}. {remedy}", file=real_stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.stderr = real_stderr  # each process shows the traceback of what is not expected


if __name__ == "__main__":
    sys.exit(main())
