"""Fine-tune BLIP-2 on your own captions: LoRA on a language model in 4 bits.

What goes in: pictures and their captions.

    train/caption/<name>.txt      one caption: the whole file
    train/Image/<name>/...        its pictures, in any depth; each makes one pair with that caption
    train/Image/<name>.<ending>   or one picture beside the folders

What comes out: blip2_lora_finetuned/ with the adapter, the processor, a model card (README.md),
report.png, pairs.csv, metrics.csv, skipped.csv, settings.json.

    python finetune.py                       train with the settings below, which are also flags;
                                             again after any interruption: it continues
    python finetune.py --restart             move an unfinished run aside, and train from the start
    python finetune.py --check               read settings, captions and pictures; write nothing
    python finetune.py --caption PATH ...    caption pictures or folders with the trained adapter
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import stat
import sys
import textwrap
import time
import unicodedata
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import psutil
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, reduce
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

for talkative in ("bitsandbytes", "huggingface_hub"):  # at import; on every try without network
    logging.getLogger(talkative).setLevel(logging.ERROR)
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict  # noqa: E402

# ==== Settings: edit these, or give them as flags (BATCH_SIZE is --batch-size) ====
# files
TRAIN_DIR = "train"  # folder with caption/ and Image/
VALIDATION_DIR = ""  # held-out pairs in the same layout; "": hold out a part of TRAIN_DIR
OUTPUT_DIR = "blip2_lora_finetuned"  # what the run writes; a finished run there is moved aside
# model
MODEL_ID = "Salesforce/blip2-opt-2.7b"  # Hub id or folder of a BLIP-2 with OPT or Flan-T5
DEVICE = "auto"  # auto, cuda, cuda:1, cpu
DTYPE = "auto"  # of all that is not in 4 bits: auto, bfloat16, float16, float32
LOAD_IN_4BIT = True  # language model in NF4, for less memory; False: faster where it fits
# LoRA
LORA_RANK = 16  # size of the adapter: a larger one can learn more
LORA_ALPHA = 32.0  # the adapter's outputs are scaled by LORA_ALPHA / LORA_RANK
LORA_DROPOUT = 0.05  # share of the adapter's inputs dropped in training; 0: off
LORA_TARGETS = "attention"  # attention, all-linear, or a regular expression for module names
# captions
PROMPT = ""  # text before every caption, given and not learned; "": none
MAX_CAPTION_TOKENS = 64  # longer captions are cut, and counted
# training
EPOCHS = 10  # passes over the training pairs
BATCH_SIZE = 16  # pairs behind one optimizer step; what memory can't hold at once is split
LEARNING_RATE = 2e-4  # the highest; it rises to it and falls to 0 along a cosine
WARMUP_FRACTION = 0.05  # share of the steps in which the learning rate rises; 0: off
WEIGHT_DECAY = 0.01  # AdamW's weight decay; 0: off
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to this norm; 0: off
SEED = 42  # decides what is held out, the order of the pairs, first weights and dropout
NUM_WORKERS = 4  # processes that read pictures, at most one for each core; 0: no extra one
# watching
VALIDATION_FRACTION = 0.1  # share of the pairs held out to measure on; 0: train on all
SAMPLE_COUNT = 6  # held-out captions printed, and drawn (12 at most); 0: none
CHECKPOINT_MINUTES = 10.0  # between checkpoints, beside those at epochs' ends; 0: only those
LOG_WITH = ""  # a tracker that accelerate knows: tensorboard, wandb, mlflow, ...; "": none
# ==== End of settings ====

RANGES = {  # setting: (lowest, highest), whose type is the setting's
    "LORA_RANK": (1, 4096), "LORA_ALPHA": (0.001, 1e6), "LORA_DROPOUT": (0.0, 0.99),
    "MAX_CAPTION_TOKENS": (1, 100_000), "EPOCHS": (1, 1_000_000), "BATCH_SIZE": (1, 1_000_000),
    "LEARNING_RATE": (1e-9, 1.0), "WARMUP_FRACTION": (0.0, 1.0), "WEIGHT_DECAY": (0.0, 10.0),
    "MAX_GRAD_NORM": (0.0, 1e6), "SEED": (0, 2**31), "NUM_WORKERS": (0, 1024),
    "VALIDATION_FRACTION": (0.0, 0.9), "SAMPLE_COUNT": (0, 256),
    "CHECKPOINT_MINUTES": (0.0, 1e6),
}
TEXTS = ("TRAIN_DIR", "VALIDATION_DIR", "OUTPUT_DIR", "MODEL_ID", "DEVICE", "DTYPE", "LORA_TARGETS",
         "PROMPT", "LOG_WITH")
LORA_PATTERNS = {
    "attention": r"language_model\..*(self_attn|SelfAttention|EncDecAttention)"
    r"\.(q_proj|k_proj|v_proj|out_proj|q|k|v|o)",
    "all-linear": r"language_model\..*\.([qkv]_proj|out_proj|fc[12]|q|k|v|o|wi|wi_[01]|wo)",
}
UNQUANTIZED = ["lm_head", "language_projection", "qformer", "vision_model"]
PICTURE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]
DECODING = 1  # raised when read_picture returns something else, so that features are made anew
CAPTION_BYTES = 1_000_000  # a larger file is no caption
UNPRINTABLE = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"  # ends lines, moves the cursor
INFERENCE_BATCH = 16  # pictures encoded, measured or captioned at a time
GENERATED = 256  # held-out pictures captioned before and after, at most
REPORT_SECONDS = 60  # between two drawings of report.png, at least
NAMED = 10  # problems named on the screen; skipped.csv has all of them
CPU_PARAMETERS = 500_000_000  # a larger model runs on the CPU only when told to
TINY_PARAMETERS = 20_000_000  # below, one CPU thread: several wait for each other, not for work
FEW_STEPS = 100  # with fewer optimizer steps hardly anything is learned
HARMLESS = (  # for the result
    "OUTPUT_DIR", "DEVICE", "NUM_WORKERS", "CHECKPOINT_MINUTES", "SAMPLE_COUNT", "LOG_WITH",
    "check", "restart", "caption")
METRICS = ("step", "epoch", "learning_rate", "train_loss", "held_out_loss", "grad_norm",
           "pairs_per_second", "seconds")
NOT_SHARED = ("the processes don't see the same files. Put TRAIN_DIR and OUTPUT_DIR on a file "
              "system that all machines share.")
LOCK = ".finetune.lock"  # in OUTPUT_DIR, while a run writes there
IGNORE = -100  # the label of a position that is not learned


class UserError(Exception):
    """What only the user can mend: a sentence that says what is wrong, where, and what to do."""


def spread(items: Sequence, count: int) -> Sequence:
    """At most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def share(items: Sequence) -> Sequence:
    """The part of a list that falls to this process."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def printable(text: str) -> str:
    """`text` on one line of a terminal: what breaks lines or controls the terminal is escaped."""
    return re.sub(UNPRINTABLE, lambda found: ascii(found[0])[1:-1], text)


# ---- Settings -----------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The settings under their own names, overridden by flags; `check`, `restart` and `caption`.

    Raises UserError where a setting is missing or has another name.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="read everything; write nothing")
    parser.add_argument("--restart", action="store_true", help="move an unfinished run aside")
    parser.add_argument("--caption", nargs="+", metavar="PATH", help="pictures or folders")
    block = Path(__file__).read_text(encoding="utf-8").split("# ==== ")[1]
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) *=[^#\n]*(?:# *(.*))?$", block, re.M))
    if wrong := comments.keys() ^ {*RANGES, *TEXTS, "LOAD_IN_4BIT"}:
        raise UserError(f"the settings {', '.join(sorted(wrong))} are missing or misspelled. Put "
                        "each on a line of its own: EPOCHS = 10")
    settings = argparse.Namespace(**{name: globals()[name] for name in comments})
    for name, comment in comments.items():
        kind = bool if name == "LOAD_IN_4BIT" else type(RANGES.get(name, ("",))[0])
        how = {"type": kind, "metavar": kind.__name__.upper()}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        text = f"{comment} (now {getattr(settings, name)!r})".replace("%", "%%")
        flag = "--" + name.lower().replace("_", "-")
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **how)
    return parser.parse_args(argv, settings)


def check_settings(settings: argparse.Namespace) -> None:
    """Raises one UserError with every problem of the settings."""
    needs = {}
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if type(value) not in (int, type(low)) or not low <= value <= high:
            needs[name] = f"a {'whole ' * isinstance(low, int)}number from {low} to {high}"
    for name in TEXTS:
        may_be_empty = name in ("VALIDATION_DIR", "PROMPT", "LOG_WITH")
        if not isinstance(value := getattr(settings, name), str) or not (value or may_be_empty):
            needs[name] = "text in quotes" + ", not empty" * (not may_be_empty)
    trackers = sorted(map(str, get_available_trackers()))
    if settings.LOG_WITH not in ("", *trackers):
        needs["LOG_WITH"] = ("empty, or a tracker whose package is installed: "
                             + (", ".join(trackers) or "there is none"))
    if not isinstance(settings.LOAD_IN_4BIT, bool):
        needs["LOAD_IN_4BIT"] = "True or False"
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d?))?", str(settings.DEVICE)):
        needs["DEVICE"] = "auto, cpu, cuda or one GPU such as cuda:1"
    if settings.DTYPE not in ("auto", "bfloat16", "float16", "float32"):
        needs["DTYPE"] = "auto, bfloat16, float16 or float32"
    try:
        re.compile(str(settings.LORA_TARGETS))
    except re.error as error:
        needs["LORA_TARGETS"] = f"attention, all-linear or a regular expression ({error})"
    if needs:
        problems = [f"{name} is {getattr(settings, name)!r}; it must be {need}."
                    for name, need in sorted(needs.items())]
        raise UserError("\n  ".join(["some settings can't be used:", *problems]))
    for name in ("TRAIN_DIR", "VALIDATION_DIR", "OUTPUT_DIR"):  # out/ is out
        if value := getattr(settings, name):
            setattr(settings, name, os.path.normpath(value))
    if os.path.isdir(settings.MODEL_ID):  # the adapter remembers it, and is used from elsewhere
        settings.MODEL_ID = os.path.abspath(settings.MODEL_ID)
    settings.PROMPT = " ".join(settings.PROMPT.split())  # a space at its end breaks the next token


# ---- Pairs --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    picture: str  # path
    caption: str


class Skipped(NamedTuple):
    kind: str  # caption, picture or folder
    path: str
    reason: str


class Data(NamedTuple):
    pairs: list[Pair]  # of TRAIN_DIR
    validation: list[Pair]  # of VALIDATION_DIR
    skipped: list[Skipped]  # of both


def read_caption(path: str) -> tuple[str, str]:
    """The caption in a file, white space collapsed, and a remark on its encoding ("": none).

    UTF-8 with or without BOM, UTF-16 with BOM, else Windows-1252. Raises OSError, also for
    what is no text, and UnicodeDecodeError.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is not a file")  # a pipe would block for ever
    with open(path, "rb") as file:
        raw = file.read(CAPTION_BYTES + 1)
    if len(raw) > CAPTION_BYTES:
        raise OSError(f"it is larger than {CAPTION_BYTES} bytes")
    encoding, remark = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", ""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        if encoding == "utf-16":
            raise
        text, remark = raw.decode("cp1252", errors="replace"), "read as Windows-1252: not UTF-8"
    if "\0" in text:  # UTF-16 without BOM, or no text at all
        raise OSError("it holds zero bytes; save it as UTF-8")
    return " ".join(text.split()), remark


def list_files(folder: str, skipped: list[Skipped]) -> Iterator[str]:
    """Every file below `folder`, in a fixed order, without hidden ones and desktops' droppings."""

    def refuse(error: OSError) -> None:
        skipped.append(Skipped("folder", error.filename, f"can't be opened: {error.strerror}"))

    def wanted(names: list[str]) -> list[str]:
        ignored = ("thumbs.db", "desktop.ini", "__macosx")
        return sorted(n for n in names if not n.startswith(".") and n.lower() not in ignored)

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = wanted(folders)
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path):
                skipped.append(Skipped("folder", path, "is a link; only linked files are read"))
        yield from (os.path.join(parent, name) for name in wanted(files))


def find_pairs(
    folder: str, named: int = NAMED
) -> tuple[list[Pair], list[Skipped], list[str]]:
    """Captions and pictures matched by name (in NFC): pairs, what is not used, and remarks.

    Raises UserError where the folders are not there, or not one pair is; then `named` of the
    captions and pictures are printed.
    """
    caption_dir, image_dir = os.path.join(folder, "caption"), os.path.join(folder, "Image")
    for path in (folder, caption_dir, image_dir):
        if not os.path.isdir(path):
            raise UserError(f"there is no folder {path!r}. Captions belong into {caption_dir}/"
                            f"<name>.txt, their pictures into {image_dir}/<name>/.")
    pairs, skipped, remarks = [], [], []
    captions: dict[str, list[str]] = {}  # name -> paths
    pictures: dict[str, list[str]] = {}
    for path in list_files(caption_dir, skipped):
        name, ending = os.path.splitext(os.path.relpath(path, caption_dir))
        if ending.lower() == ".txt" and os.sep not in name:
            captions.setdefault(unicodedata.normalize("NFC", name), []).append(path)
        else:
            skipped.append(Skipped("caption", path, "is not caption/<name>.txt"))
    for path in list_files(image_dir, skipped):
        first, _, rest = os.path.relpath(path, image_dir).partition(os.sep)
        name = first if rest else os.path.splitext(first)[0]
        pictures.setdefault(unicodedata.normalize("NFC", name), []).append(path)

    lonely = captions.keys() ^ pictures.keys()
    few = len(lonely) < 100  # comparing all with all takes minutes for thousands

    def missing(what: str, name: str, others: dict[str, list[str]]) -> str:
        near = difflib.get_close_matches(name, [n for n in lonely if n in others], 1) if few else []
        return f"there is no {what}" + "".join(f"; did you mean {other!r}?" for other in near)

    for name in sorted(captions.keys() | pictures.keys()):
        texts, images = captions.get(name, []), pictures.get(name, [])
        caption = problem = remark = ""
        if not images:
            problem = missing(f"{image_dir}/{name}/", name, pictures)
        elif not texts:
            problem = missing(f"{caption_dir}/{name}.txt", name, captions)
        elif len(texts) > 1:
            problem = f"there are {len(texts)} captions of this name"
        else:
            try:
                caption, remark = read_caption(texts[0])
                problem = "" if caption else "the caption is empty"
            except (OSError, UnicodeDecodeError) as error:
                problem = f"the caption can't be read: {error}"
        remarks += [f"{texts[0]}: {remark}"] if remark else []
        if problem:
            skipped += [Skipped("caption", path, problem) for path in texts]
            skipped += [Skipped("picture", path, problem) for path in images]
        else:
            pairs += [Pair(path, caption) for path in images]
    if not pairs:
        print_skipped(sorted(skipped), named)
        raise UserError(f"no picture in {image_dir} has a caption in {caption_dir}. Name a folder "
                        "of pictures as its caption: Image/rose/ for caption/rose.txt.")
    return sorted(pairs), sorted(skipped), remarks


def find_data(settings: argparse.Namespace) -> Data:
    """The pairs in TRAIN_DIR and VALIDATION_DIR. Raises UserError as find_pairs."""
    named = sys.maxsize if settings.check else NAMED
    pairs, skipped, remarks = find_pairs(settings.TRAIN_DIR, named)
    validation, *more = [], [], []
    if settings.VALIDATION_DIR:
        validation, *more = find_pairs(settings.VALIDATION_DIR, named)
    for remark in (remarks + more[1])[:named]:
        print(printable(remark))
    return Data(pairs, validation, skipped + more[0])


def print_skipped(skipped: list[Skipped], named: int = NAMED) -> None:
    """Counts what is not used, and names the first `named` ones."""
    if counts := Counter(row.kind for row in skipped):
        print("not used:", ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts.items()))
    for row in skipped[:named]:
        print(printable(f"  {row.path}: {row.reason}"))
    if len(skipped) > named:
        print(f"  and {len(skipped) - named} more; --check lists all")


# ---- Pictures -----------------------------------------------------------------------------------


Decoded = tuple[list[tuple[str, int, int, str]], torch.Tensor | None]  # as of decode_batch


class PictureError(Exception):
    """The picture can't be used; the message says why."""


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drops what is written to file descriptor 2: libtiff's remarks on damaged files."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def read_picture(path: str, side: int) -> Image.Image:
    """A picture as RGB: upright, its first frame, transparency over white, 16-bit grey as 8-bit.

    JPEGs far larger than `side` pixels are decoded at a reduced scale, never below twice `side`.
    Raises PictureError, whatever is wrong with the file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PictureError("is not a file")  # a pipe would block for ever
        with warnings.catch_warnings(), silenced():
            warnings.simplefilter("ignore")  # about EXIF, palettes, sizes; what matters raises
            with Image.open(path, formats=PICTURE_FORMATS) as picture:
                picture.draft(None, (2 * side, 2 * side))
                upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I;16"):
                grey = np.asarray(upright).astype(np.float32) / 257
                upright = Image.fromarray(grey.round().astype(np.uint8))
            if upright.mode in ("I", "F"):
                raise PictureError("has 32 bits for each pixel; save it with 8 or 16")
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            return upright.convert("RGB")
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        with open(path, "rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1"):
            raise PictureError("is HEIC; save it as JPEG") from error
        reason = f"is none of {', '.join(PICTURE_FORMATS)}" if head else "is empty"
        raise PictureError(reason) from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise PictureError(f"can't be read: {error or type(error).__name__}") from error


def picture_state(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns: by these a picture is known again.

    (0, 0) for one that is not there or may not be read: it is tried again when that is mended.
    """
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return (status.st_size, status.st_mtime_ns) if os.access(path, os.R_OK) else (0, 0)


def decode_batch(paths: list[str], processor: Blip2Processor | None) -> Decoded:
    """A row (path, size, mtime_ns, why it can't be used or "") for each picture; pixel_values.

    The latter are those of the usable ones, (pictures, 3, height, width), or None if there are
    none, or no processor.
    """
    side = processor.image_processor.size["height"] if processor else 224
    rows, pixels = [], []
    for path in paths:
        state, reason = picture_state(path), ""  # first: a change from now on is seen next time
        try:
            picture = read_picture(path, side)
            if processor:
                pixels.append(processor.image_processor(picture, return_tensors="pt").pixel_values)
        except PictureError as error:
            reason = str(error)
            cause = error.__cause__
            if isinstance(cause, MemoryError) or getattr(cause, "errno", None):
                state = 0, 0  # the machine's fault, not the picture's: it is tried again next time
        rows.append((path, *state, reason))
    return rows, torch.cat(pixels) if pixels else None


def read_pictures(
    paths: list[str], processor: Blip2Processor | None, workers: int, title: str
) -> Iterator[Decoded]:
    """decode_batch of all paths, in order, done by `workers` processes, with a progress bar."""
    # Batches wait in shared memory, two for each worker; without room (a container's 64 MB) a
    # DataLoader hangs. 4 bytes x 3 channels x 384 x 384 pixels, and as much again to spare.
    room = shutil.disk_usage("/dev/shm").free // (4 * INFERENCE_BATCH * 4 * 3 * 384**2)
    workers = min(workers, room, len(os.sched_getaffinity(0)), len(paths) // INFERENCE_BATCH)
    decode = functools.partial(decode_batch, processor=processor)
    with tqdm(total=len(paths), desc=title, unit="picture", disable=None) as bar:
        for batch in DataLoader(paths, INFERENCE_BATCH, num_workers=workers, collate_fn=decode):
            yield batch
            bar.update(len(batch[0]))


def check_pictures(pairs: list[Pair], skipped: list[Skipped], workers: int) -> int:
    """Lists every pair, and what is not used. Returns the exit code: 1 if no pair is left."""
    reasons = {}
    for rows, _ in read_pictures([pair.picture for pair in pairs], None, workers, "checking"):
        reasons |= {path: reason for path, _, _, reason in rows}
    for pair in pairs:
        if not reasons[pair.picture]:
            print(f"pair\t{printable(pair.picture)}\t{printable(pair.caption)}")
    broken = [Skipped("picture", path, reason) for path, reason in reasons.items() if reason]
    for row in skipped + broken:
        print(f"not used\t{printable(row.path)}\t{printable(row.reason)}")
    print(f"{len(pairs) - len(broken)} pairs; {len(skipped) + len(broken)} files not used")
    return 0 if len(pairs) > len(broken) else 1


# ---- Model and processor ------------------------------------------------------------------------


class Base(NamedTuple):
    """The frozen model, and how a row for it is laid out: prefix, caption, stop, padding."""

    model: Blip2ForConditionalGeneration
    processor: Blip2Processor
    device: torch.device
    dtype: torch.dtype
    prefix: list[int]  # what the processor gives for a picture and PROMPT: image tokens, then text
    num_query_tokens: int  # that is, image tokens
    stop: int  # what generation stops on: a newline for OPT, not the tokenizer's own </s>
    pad: int
    is_t5: bool  # prefix to the encoder, caption and stop to the decoder

    def autocast(self) -> torch.autocast:
        """LoRA's weights are float32 in a model of `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def load_config(model_id: str) -> Blip2Config:
    """Raises UserError where there is no model, or none that writes captions as BLIP-2 does."""
    try:
        config = transformers.AutoConfig.from_pretrained(model_id, trust_remote_code=False)
    except Exception as error:  # a dozen kinds
        reason = ("this folder holds no model" if os.path.isdir(model_id) else "there is no such "
                  "folder, and no such model on the Hub, or the Hub can't be reached")
        raise UserError(f"can't load MODEL_ID {model_id!r}: {reason}. Check the name and the "
                        "network; a private model needs `hf auth login`.") from error
    kind = (config.architectures or [config.model_type])[0]
    if kind not in ("Blip2ForConditionalGeneration", "blip-2") or config.model_type != "blip-2":
        raise UserError(f"MODEL_ID {model_id!r} is a {kind}, not a BLIP-2 that writes captions. "
                        "Try Salesforce/blip2-opt-2.7b.")
    if (language := config.text_config.model_type) not in ("opt", "t5"):
        raise UserError(f"MODEL_ID {model_id!r} has the language model {language!r}, not OPT or "
                        "Flan-T5. Try Salesforce/blip2-opt-2.7b.")
    return config


def choose_device(
    device: str, dtype: str, is_t5: bool, size: int
) -> tuple[torch.device, torch.dtype, str]:
    """The one decision about device and dtype, with its reason, for a model of `size` parameters.

    Raises UserError.
    """
    reason = "as DEVICE says"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        reason = (f"PyTorch finds no NVIDIA GPU, or an old driver for CUDA {torch.version.cuda}"
                  if torch.version.cuda else "this PyTorch was built without CUDA")
    if device.startswith("cuda:") and PartialState().num_processes > 1:
        raise UserError(f"DEVICE is {device!r}, but each process takes a GPU of its own. Set it to "
                        "auto.")
    if device.startswith("cuda") and int(device[5:] or 0) >= count:
        raise UserError(f"DEVICE is {device!r}, but there are {count} GPUs"
                        + (", counted from 0." if count else f": {reason}. Or use --device cpu."))
    if device == "cpu" or not count:
        if device == "auto" and size > CPU_PARAMETERS:
            raise UserError(f"{reason}, and a model of {size / 1e9:.1f} billion parameters is very "
                            "slow on the CPU. Mend that, or say --device cpu if you mean it.")
        device, dtype = "cpu", "float32" if dtype == "auto" else dtype
    else:
        device = f"cuda:{device[5:] or torch.cuda.current_device()}"
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        if dtype == "auto":  # is_bf16_supported() is true by emulation on older GPUs
            dtype = "bfloat16" if major >= 8 else "float32" if is_t5 else "float16"
    if dtype == "float16" and (device == "cpu" or is_t5):
        raise UserError("DTYPE float16 is for OPT on a GPU; T5 overflows in it. Set it to auto.")
    return torch.device(device), getattr(torch, dtype), reason


def count_bytes(
    skeleton: Blip2ForConditionalGeneration, dtype: torch.dtype, in_4bit: bool
) -> float:
    """The memory that the weights of a model take when loaded."""
    quantized = {  # T5's wo overflows in float16, and transformers keeps it out of 4 bits
        id(module.weight) for name, module in skeleton.language_model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(("lm_head", ".wo"))}
    # With double quantization: 64 weights share 1 byte, 256 such blocks 4 more.
    small = 0.5 + 1 / 64 + 4 / 64 / 256 if in_4bit else dtype.itemsize
    kept = ("qformer.", "query_tokens") if dtype == torch.float16 else ()  # transformers: float32
    return sum(weight.numel() * (small if id(weight) in quantized else
                                 4 if name.startswith(kept) else dtype.itemsize)
               for name, weight in skeleton.named_parameters())


def tell_memory(
    skeleton: Blip2ForConditionalGeneration, device: torch.device, dtype: torch.dtype, in_4bit: bool
) -> None:
    """Prints what is needed and what is free, and what to do about it."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    needed = count_bytes(skeleton, dtype, in_4bit)
    print(f"memory: {needed / 1e9:.3g} GB for the weights, {free / 1e9:.3g} GB free")
    if needed > free:
        print("  that is too little" + ": set LOAD_IN_4BIT" * (not in_4bit))
    elif in_4bit and on_gpu and free > 2 * count_bytes(skeleton, dtype, False):
        print("  there is room for the model without 4 bits, which is faster: set LOAD_IN_4BIT to "
              "False")


def load_base(model_id: str, prompt: str, device: str, dtype: str, in_4bit: bool) -> Base:
    """The frozen model in eval mode on its device, with its processor. Raises UserError.

    A checkpoint of 2023 knows no image token; it is given one.
    """
    print(f"model: {model_id}")
    config = load_config(model_id)
    with torch.device("meta"):
        skeleton = Blip2ForConditionalGeneration(config)
    is_t5, size = config.text_config.model_type == "t5", skeleton.num_parameters()
    place, kind, reason = choose_device(device, dtype, is_t5, size)
    print(f"device: {place}, {str(kind).removeprefix('torch.')} ({reason})")
    tell_memory(skeleton, place, kind, in_4bit)
    nf4 = transformers.BitsAndBytesConfig(  # its own defaults are fp4, and arithmetic in fp32
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind, llm_int8_skip_modules=UNQUANTIZED)
    try:
        # The Pillow class by name: the automatic one depends on whether torchvision is installed.
        image_processor = transformers.BlipImageProcessorPil.from_pretrained(model_id)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
        processor = Blip2Processor(image_processor, tokenizer, config.num_query_tokens)
        model, loading = Blip2ForConditionalGeneration.from_pretrained(
            model_id, dtype=kind, quantization_config=nf4 if in_4bit else None,
            device_map={"": place}, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True)  # they are an error below
        if not tokenizer.decode(config.text_config.eos_token_id):
            raise ValueError("its tokenizer is missing")
        if wrong := sorted(map(str, loading["missing_keys"] | loading["mismatched_keys"])):
            raise ValueError(f"weights are missing or of another shape: {wrong[0]}")
    except Exception as error:  # missing and damaged files raise a dozen kinds
        if should_reduce_batch_size(error):
            raise
        raise UserError(f"can't load MODEL_ID {model_id!r}: {error}. Get the model again, in "
                        "safetensors, or name another one.") from error
    if place.type == "cpu" and model.num_parameters() < TINY_PARAMETERS:
        torch.set_num_threads(1)
    for module in model.modules():
        # With avx512_bf16, bitsandbytes would repack 4-bit weights in place in the first forward
        # pass without gradients, for inference only: training on them is wrong from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    if config.image_token_index != image_token:
        if image_token >= model.get_input_embeddings().num_embeddings:
            raise UserError(f"MODEL_ID {model_id!r} has no room for an image token.")
        model.config.image_token_index = image_token
        print(f"mended: a checkpoint of 2023 without an image token; <image> is {image_token} now")
    prefix = [image_token] * config.num_query_tokens
    prefix += tokenizer(prompt, split_special_tokens=True)["input_ids"]  # an <image> in it is text
    text = config.text_config
    return Base(model.eval().requires_grad_(False), processor, place, kind, prefix,
                config.num_query_tokens, text.eos_token_id, text.pad_token_id, is_t5)


# ---- LoRA ---------------------------------------------------------------------------------------


def add_lora(
    model: Blip2ForConditionalGeneration, targets: str, rank: int, alpha: float, dropout: float
) -> PeftModel:
    """`model` with LoRA (Hu et al. 2021, arXiv:2106.09685) where `targets` matches module names.

    Raises UserError where that is nowhere, or outside the language model's linear layers.
    """
    pattern = LORA_PATTERNS.get(targets, targets)
    matched = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    linear = {
        name for name, module in model.language_model.named_modules(prefix="language_model")
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
    if not matched or matched - linear:
        problem = f"matches {min(matched - linear)}" if matched else "matches nothing"
        kinds = sorted({re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) for name in linear})
        raise UserError("\n  ".join([f"LORA_TARGETS {targets!r} {problem}; it can match:", *kinds]))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)
    lora = get_peft_model(model, config).eval()
    count, _ = lora.get_nb_trainable_parameters()
    print(f"LoRA: {count:,} weights, of rank {rank}, on {len(matched)} linear layers")
    return lora


# ---- Features: what the frozen vision side says of a picture ------------------------------------


class FeatureStore:
    """The Q-Former's output of every picture, (num_query_tokens, hidden), kept in a folder.

    A pass appends to two files of its own: <number>-<id>.bin holds features, .jsonl a line for each
    picture, [path, size, mtime_ns, row or reason]. The lines of a batch are one write, after what
    they name, and a torn last line is not read, so a killed pass leaves nothing half, and the next
    one encodes the same batches. Reading maps the files.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.known: dict[str, tuple[int, int, str, int | str]] = {}  # size, mtime_ns, file, entry
        self.mapped: dict[str, torch.Tensor] = {}  # file -> (rows, *shape)
        self.read()

    def read(self) -> None:
        """What all processes have written so far."""
        row_bytes = math.prod(self.shape) * self.dtype.itemsize
        for index in sorted(self.folder.glob("*.jsonl")):
            data = index.with_suffix(".bin")
            rows = data.stat().st_size // row_bytes if data.exists() else 0
            for line in index.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):  # torn by a kill or a power cut
                    picture, size, mtime_ns, entry = json.loads(line)
                    if isinstance(entry, str) or entry < rows:
                        self.known[picture] = size, mtime_ns, index.stem, entry

    def key(self, picture: str) -> str:
        """Relative to the folder above .features, which can be moved with all that is in it."""
        return os.path.relpath(picture, self.folder.parent.parent)

    def knows(self, picture: str) -> bool:
        """Whether there is an entry for the picture in its present state."""
        return self.known.get(self.key(picture), ())[:2] == picture_state(picture)

    def reason(self, picture: str) -> str:
        """Why the picture could not be used ("": it could)."""
        entry = self.known[self.key(picture)][3]
        return entry if isinstance(entry, str) else ""

    def append(self, batches: Iterable[Decoded]) -> None:
        """Keeps the rows, and the features in place of the pixel_values, for good."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number, count = len(list(self.folder.glob("*.jsonl"))), 0  # no clock: it can be set back
        file = f"{number:06}-{uuid.uuid4().hex}"
        path = self.folder / file
        with open(f"{path}.bin", "wb") as data, open(f"{path}.jsonl", "wb") as index:
            for rows, features in batches:
                if features is not None:
                    data.write(features.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                    data.flush()
                lines = []
                for picture, size, mtime_ns, reason in rows:
                    line = [self.key(picture), size, mtime_ns, reason or count]
                    count += not reason
                    self.known[line[0]] = size, mtime_ns, file, line[3]
                    lines.append(json.dumps(line) + "\n")
                index.write("".join(lines).encode())
                index.flush()

    def __getitem__(self, picture: str) -> torch.Tensor:
        _, _, file, row = self.known[self.key(picture)]
        if file not in self.mapped:
            path = self.folder / f"{file}.bin"
            size = path.stat().st_size // self.dtype.itemsize
            size -= size % math.prod(self.shape)  # of a killed process: its torn last row
            flat = torch.from_file(str(path), size=size, dtype=self.dtype)
            self.mapped[file] = flat.view(-1, *self.shape)
        return self.mapped[file][row]


def open_features(base: Base, folder: str, fallback: str) -> FeatureStore:
    """The store for this base in `folder`/.features, or in `fallback` if that can't be written.

    Its name is a hash of all that changes the features: weights, processor, dtype, decoding.
    """
    digest = hashlib.sha256(f"{base.dtype} {DECODING}".encode())
    settings = base.processor.image_processor.to_dict()
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in base.model.state_dict().items():
        if name.startswith(("vision_model.", "qformer.", "query_tokens")):
            digest.update(f"{name} {tensor.shape} {torch.hash_tensor(tensor).item()}".encode())
    place = f"{folder}/.features"
    if not os.access(place if os.path.isdir(place) else folder, os.W_OK):
        place = fallback
    shape = base.num_query_tokens, base.model.config.qformer_config.hidden_size
    return FeatureStore(Path(place, digest.hexdigest()[:16]), shape, base.dtype)


@torch.no_grad()
def encode(base: Base, pixel_values: torch.Tensor) -> torch.Tensor:
    """(pictures, 3, height, width) to the Q-Former's (pictures, num_query_tokens, hidden)."""
    pixel_values = pixel_values.to(base.device, base.dtype, non_blocking=True)
    features = base.model.get_image_features(pixel_values).qformer_outputs[0]
    return features.to(base.dtype)  # transformers keeps the Q-Former in float32 beside float16


def encode_pictures(base: Base, store: FeatureStore, pictures: list[str], workers: int) -> None:
    """Decodes and encodes those pictures that the store does not know in their present state."""
    new = [picture for picture in pictures if not store.knows(picture)]
    print(f"pictures: {len(new)} to encode, {len(pictures) - len(new)} known from an earlier run")
    PartialState().wait_for_everyone()  # what one has encoded would be missing in another's list
    if own := share(new):
        batches = read_pictures(own, base.processor, workers, "encoding")
        store.append((rows, None if p is None else encode(base, p)) for rows, p in batches)
    PartialState().wait_for_everyone()
    store.read()
    if any(store.key(picture) not in store.known for picture in pictures):
        raise UserError(NOT_SHARED)


# ---- Dataset ------------------------------------------------------------------------------------


def tokenize_captions(
    captions: Iterable[str], base: Base, prompt: str, limit: int
) -> tuple[dict[str, list[int]], int]:
    """The ids of each caption, at most `limit`, then the stop token; and how many were cut.

    After a prompt comes a space, but for Flan-T5, whose decoder begins with the caption. Raises
    UserError where the model has too few positions for `limit`.
    """
    room = getattr(base.model.config.text_config, "max_position_embeddings", None)
    if room and len(base.prefix) + limit + 1 > room:
        raise UserError(f"picture, PROMPT and MAX_CAPTION_TOKENS = {limit} need more than the "
                        f"{room} positions of this model. Lower MAX_CAPTION_TOKENS.")
    space, tokenized, cut = " " if prompt and not base.is_t5 else "", {}, 0
    for caption in dict.fromkeys(captions):
        ids = base.processor.tokenizer(
            space + caption, add_special_tokens=False, split_special_tokens=True).input_ids
        cut += len(ids) > limit
        tokenized[caption] = ids[:limit] + [base.stop]
    return tokenized, cut


class ImageCaptioningDataset(Dataset):
    """A row for each pair: `index`, `features` (num_query_tokens, hidden), `input_ids`, `labels`.

    OPT:     input_ids are image tokens, BOS, prompt, caption, stop; labels the last two of these
    Flan-T5: input_ids are image tokens, prompt, </s>, for the encoder; labels caption, stop
    """

    def __init__(self, pairs: list[Pair], store: FeatureStore, tokenized: dict, base: Base) -> None:
        self.pairs, self.store, self.tokenized, self.base = pairs, store, tokenized, base

    def __len__(self) -> int:
        return len(self.pairs)

    def some(self, count: int) -> "ImageCaptioningDataset":
        """At most `count` of the pairs."""
        pairs = spread(self.pairs, count)
        return ImageCaptioningDataset(pairs, self.store, self.tokenized, self.base)

    def tokens(self) -> torch.Tensor:
        """The number of learned tokens of each pair: its caption's, and the stop token."""
        return torch.tensor([len(self.tokenized[pair.caption]) for pair in self.pairs])

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, given = self.pairs[index], self.base.prefix
        learned = self.tokenized[pair.caption]
        return {
            "index": index,
            "features": self.store[pair.picture],
            "input_ids": torch.tensor(given if self.base.is_t5 else given + learned),
            "labels": torch.tensor((0 if self.base.is_t5 else len(given)) * [IGNORE] + learned),
        }


def collate_fn(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right, and its `attention_mask`."""

    def padded(tensors: Iterable[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(tensors), True, value)

    return {
        "features": torch.stack([row["features"] for row in rows]),
        "input_ids": padded((row["input_ids"] for row in rows), pad),
        "attention_mask": padded((torch.ones_like(row["input_ids"]) for row in rows), 0),
        "labels": padded((row["labels"] for row in rows), IGNORE),
    }


def describe_row(row: dict[str, Any], base: Base) -> str:
    """A row decoded, what is learned in brackets: <image> x 32 | </s> | [a caption | '\\n']."""
    decode, ids = base.processor.tokenizer.decode, row["input_ids"]
    images = int((ids == base.model.config.image_token_index).sum())
    learned = row["labels"][row["labels"] != IGNORE]
    text = decode(ids[images : len(base.prefix)])
    return f"<image> x {images} | {text} | [{decode(learned[:-1])} | {decode(learned[-1:])!r}]"


# ---- Loss and captions --------------------------------------------------------------------------


def embed_rows(model: PeftModel, batch: dict[str, torch.Tensor], base: Base) -> torch.Tensor:
    """What the language model reads, (rows, tokens, width): projected features, then the text."""
    image = model.language_projection(batch["features"].to(base.device, non_blocking=True))
    ids = batch["input_ids"][:, base.num_query_tokens :].to(base.device, non_blocking=True)
    text = model.get_input_embeddings()(ids)
    return torch.cat([image.to(text.dtype), text], dim=1)


def pair_losses(model: PeftModel, rows: list[dict[str, Any]], base: Base) -> torch.Tensor:
    """Cross-entropy in float32, summed over each row's learned tokens, (rows,)."""
    batch = collate_fn(rows, base.pad)
    learned = batch["labels"] != IGNORE  # on the CPU: a mask on the GPU would be waited for
    language_model = model.language_model
    with base.autocast():
        given = {"inputs_embeds": embed_rows(model, batch, base), "use_cache": False}
        if base.is_t5:
            shifted = language_model.prepare_decoder_input_ids_from_labels(batch["labels"])
            given["decoder_input_ids"] = shifted.to(base.device, non_blocking=True)
            given["attention_mask"] = batch["attention_mask"].to(base.device, non_blocking=True)
            logits = language_model(**given).logits[learned]
        else:  # causal, so that padding on the right needs no mask; a token is predicted before it
            logits = language_model(**given, logits_to_keep=learned.roll(-1, dims=1)).logits
    targets = batch["labels"][learned].to(base.device, non_blocking=True)
    counts = learned.sum(dim=1).tolist()
    each = zip(logits.split(counts), targets.split(counts), strict=True)
    return torch.stack([F.cross_entropy(some.float(), ids, reduction="sum") for some, ids in each])


def count_tokens(rows: list[dict[str, Any]]) -> int:
    """Learned tokens: captions and stop tokens."""
    return sum(int((row["labels"] != IGNORE).sum()) for row in rows)


def batches_of(dataset: ImageCaptioningDataset, title: str) -> Iterator[list[dict]]:
    """This process's rows of a data set, INFERENCE_BATCH at a time, with a progress bar."""
    own = share(range(len(dataset)))
    for start in tqdm(range(0, len(own), INFERENCE_BATCH), title, disable=None, leave=False):
        yield [dataset[i] for i in own[start : start + INFERENCE_BATCH]]


@torch.no_grad()
def measure_losses(model: PeftModel, dataset: ImageCaptioningDataset) -> torch.Tensor:
    """The loss of each pair, summed over its learned tokens, (pairs,), on the CPU."""
    losses = torch.zeros(len(dataset), device=dataset.base.device)
    for rows in batches_of(dataset, "measuring"):
        losses[[row["index"] for row in rows]] = pair_losses(model, rows, dataset.base)
    return reduce(losses, "sum").cpu()


@torch.no_grad()
def check_sight(model: PeftModel, dataset: ImageCaptioningDataset) -> None:
    """Raises UserError where the loss is the same without the picture: nothing could be learned."""
    rows = [dataset[i] for i in range(min(4, len(dataset)))]
    blank = [row | {"features": torch.zeros_like(row["features"])} for row in rows]
    seen, unseen = (pair_losses(model, some, dataset.base).sum().item() / count_tokens(rows)
                    for some in (rows, blank))
    print(f"picture check: loss {seen:.4f} with the pictures, {unseen:.4f} with blank ones")
    if not math.isfinite(seen):
        raise UserError(f"the loss is {seen} before any training. Set DTYPE to float32.")
    if math.isclose(seen, unseen, rel_tol=1e-6):
        raise UserError("the loss is the same with blank pictures: this model ignores them. "
                        "Set MODEL_ID to another one.")


@torch.no_grad()
def generate_captions(
    model: PeftModel, base: Base, features: torch.Tensor, limit: int
) -> list[str]:
    """Greedy captions of at most `limit` tokens for (pictures, num_query_tokens, hidden)."""
    with base.autocast():
        prefixes = torch.tensor([base.prefix] * len(features))
        batch = {"features": features, "input_ids": prefixes}
        inputs_embeds = embed_rows(model, batch, base)
        output = model.language_model.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=torch.ones_like(inputs_embeds[:, :, 0], dtype=torch.long),
            max_new_tokens=limit + 1, do_sample=False, num_beams=1,
            eos_token_id=base.stop, pad_token_id=base.pad).tolist()
    ended = [ids[: ids.index(base.stop)] if base.stop in ids else ids for ids in output]
    texts = base.processor.batch_decode(ended, skip_special_tokens=True)
    return [text.strip() for text in texts]


def caption_dataset(model: PeftModel, dataset: ImageCaptioningDataset, limit: int) -> list[str]:
    """A generated caption for each pair."""
    captions = []
    for rows in batches_of(dataset, "captioning"):
        features = torch.stack([row["features"] for row in rows])
        texts = generate_captions(model, dataset.base, features, limit)
        captions += [(row["index"], text) for row, text in zip(rows, texts, strict=True)]
    return [text for _, text in sorted(gather_object(captions))]


# ---- Output folder: whole or absent at every moment ----------------------------------------------


def replace_file(path: Path, data: bytes) -> None:
    """Whole, old or new, whenever the process is killed: written aside, flushed, renamed."""
    aside = path.with_name(path.name + ".part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def replace_csv(path: Path, rows: Iterable[Iterable]) -> None:
    """A table, its header first."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    replace_file(path, text.getvalue().encode(errors="surrogateescape"))


@contextlib.contextmanager
def lock_output(folder: Path) -> Iterator[None]:
    """Raises UserError where OUTPUT_DIR can't be written, or another run writes into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {str(folder)!r} can't be written: {error.strerror}. Name "
                        "another folder.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # removed since it was opened: no lock
                raise BlockingIOError
        except BlockingIOError as error:
            raise UserError(f"another run writes into OUTPUT_DIR {str(folder)!r} now. Name another "
                            "folder, or stop that one.") from error
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def read_earlier_run(folder: Path) -> dict[str, Any]:
    """settings.json of the run in OUTPUT_DIR; {}: there is none. Raises UserError."""
    names = {path.name for path in folder.iterdir()} - {LOCK, "settings.json.part"}
    if not names:
        return {}
    if "settings.json" not in names:
        raise UserError(f"OUTPUT_DIR {str(folder)!r} holds files that are not from a run of this "
                        "script, and stay as they are. Name another folder.")
    try:
        record = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        record["settings"].items()
        return {name: record[name] for name in ("settings", "data", "dtype", "finished")}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'settings.json'} is damaged. Name another OUTPUT_DIR, or put "
                        "that one aside.") from error


def read_skipped(folder: Path) -> list[Skipped]:
    """skipped.csv with its header; empty where it is not there."""
    if not (folder / "skipped.csv").is_file():
        return []
    with open(folder / "skipped.csv", newline="", errors="surrogateescape") as file:
        return [Skipped(*row) for row in csv.reader(file) if len(row) == len(Skipped._fields)]


def fingerprint(data: Data, settings: argparse.Namespace) -> str:
    """Of the pictures' relative paths, their sizes, and the captions."""
    digest = hashlib.sha256()
    for pairs, root in zip(data, (settings.TRAIN_DIR, settings.VALIDATION_DIR), strict=False):
        for path, caption in pairs:
            line = json.dumps([os.path.relpath(path, root), picture_state(path)[0], caption])
            digest.update(line.encode())
        digest.update(b"\n")
    return f"{len(data.pairs) + len(data.validation)} pairs, {digest.hexdigest()[:16]}"


def list_differences(earlier: dict[str, Any], settings: dict[str, Any], trace: str) -> list[str]:
    """What makes this run another one than the earlier: settings, pictures, captions."""
    old, new = earlier["settings"] | {"data": earlier["data"]}, settings | {"data": trace}
    return [f"{'pictures or captions' if name == 'data' else name}: {old.get(name)!r} then, "
            f"{new[name]!r} now" for name in sorted(new)
            if name not in HARMLESS and old.get(name) != new[name]]


def move_aside(folder: Path) -> None:
    """Renames OUTPUT_DIR with the run in it, dated. The lock stays in the new OUTPUT_DIR."""
    aside, number = f"{folder}-{time.strftime('%Y-%m-%d')}", 1
    while os.path.lexists(name := aside + f"-{number}" * (number > 1)):
        number += 1
    folder.rename(name)
    folder.mkdir()
    os.rename(f"{name}/{LOCK}", folder / LOCK)
    print(f"the earlier run is in {name} now")


def describe_run(settings: argparse.Namespace, trace: str, base: Base) -> dict[str, Any]:
    """settings.json: what --caption needs to load the adapter, and a person to repeat the run."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "pillow")
    return {
        "finished": False,
        "settings": {name: value for name, value in vars(settings).items() if name.isupper()},
        "data": trace,
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "processes": PartialState().num_processes,
        "base_commit": getattr(base.model.config, "_commit_hash", None),
        "language_model": base.model.config.text_config.model_type,
        "stop_token": base.stop,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "results": {},
    }


def save_settings(folder: Path, record: dict[str, Any]) -> None:
    """settings.json: see describe_run."""
    replace_file(folder / "settings.json", (json.dumps(record, indent=2) + "\n").encode())


def save_adapter(model: PeftModel, folder: Path) -> None:
    """adapter_config.json, then adapter_model.safetensors, each at once."""
    aside = folder / "adapter.part"
    model.save_pretrained(aside, save_embedding_layers=False)  # else it would ask the Hub
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        replace_file(folder / name, (aside / name).read_bytes())
    shutil.rmtree(aside)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """<step>.pt: the SHA-256 of what torch.save writes, 32 bytes, and that. Two are kept."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    folder.mkdir(exist_ok=True)
    replace_file(folder / f"{step:09}.pt", hashlib.sha256(data).digest() + data)
    for old in sorted(folder.glob("*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest one that is whole; {}: there is none. Damaged ones are named."""
    for path in sorted(folder.glob("*.pt"), reverse=True):
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
        print(f"{path} is damaged: the one before it is taken")
    return {}


def open_metrics(path: Path, step: int) -> TextIO:
    """metrics.csv, to append to, cut back to the rows until `step`."""
    rows = []
    if step and path.is_file():
        with open(path, newline="", errors="replace") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(METRICS)
                    and row[0].isdigit() and int(row[0]) <= step]
    replace_csv(path, [METRICS, *rows])
    return open(path, "a", newline="")


# ---- Training -----------------------------------------------------------------------------------


def split_pairs(
    pairs: list[Pair], fraction: float, seed: int, root: str
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; captions of more than one picture give theirs first.

    Pairs are ranked by a hash of seed and path, so that a new picture does not reshuffle the rest.
    """

    def rank(pair: Pair) -> str:
        name = f"{seed} {os.path.relpath(pair.picture, root)}"
        return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()

    wanted = min(len(pairs) - 1, max(1, round(len(pairs) * fraction))) if fraction else 0
    left = Counter(pair.caption for pair in pairs)
    shared, last = [], []
    for pair in sorted(pairs, key=rank):
        (shared if left[pair.caption] > 1 else last).append(pair)
        left[pair.caption] -= 1
    held_out = set((shared + last)[:wanted])
    return [pair for pair in pairs if pair not in held_out], sorted(held_out)


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
def caught_signals(patient: bool) -> Iterator[list[int]]:
    """Within, Ctrl-C and SIGTERM raise KeyboardInterrupt with the number, for the exit code.

    If `patient`, the first one is only noted, in the list, and raised at the end.
    """
    noted: list[int] = []

    def handle(number: int, _: Any) -> None:
        if noted or not patient:
            raise KeyboardInterrupt(number)
        noted.append(number)
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
    if noted:  # in the last step
        raise KeyboardInterrupt(noted[0])


def rows_of_step(
    dataset: ImageCaptioningDataset, step: int, batch_size: int, seed: int
) -> list[dict[str, Any]]:
    """The rows of all processes, longest first: a pure function."""
    epoch, place = divmod(step, math.ceil(len(dataset) / batch_size))
    chosen = epoch_order(len(dataset), seed, epoch)[place * batch_size : (place + 1) * batch_size]
    return sorted((dataset[i] for i in chosen), key=lambda row: -len(row["labels"]))


def held_out_loss(model: PeftModel, held_out: ImageCaptioningDataset) -> float:
    """Per learned token; NaN with nothing held out. Raises UserError if it is not finite."""
    if not held_out.pairs:
        return math.nan
    loss = (measure_losses(model, held_out).sum() / held_out.tokens().sum()).item()
    if not math.isfinite(loss):
        raise UserError(f"the held-out loss is {loss}. Lower LEARNING_RATE, or set DTYPE to "
                        "float32, and say --restart.")
    return loss


@dataclasses.dataclass
class Progress:
    """Where a training run is, beside its weights and the optimizer's and scaler's state."""

    captions: list[str]  # of the held-out pictures, before
    micro_batch: int = sys.maxsize  # the most pairs at a time
    step: int = 0  # the next one
    before: float = math.nan  # held-out loss
    best: float = math.inf  # held-out loss
    best_epoch: int = 0
    loss: float = 0.0  # of this epoch so far, summed over its learned tokens
    tokens: int = 0
    pairs: int = 0  # of all steps
    seconds: float = 0.0


def train(
    settings: argparse.Namespace,
    accelerator: Accelerator,
    model: PeftModel,
    dataset: ImageCaptioningDataset,
    held_out: ImageCaptioningDataset,
) -> tuple[Progress, torch.Tensor]:
    """The training loop, from the newest checkpoint in OUTPUT_DIR on, if there is one.

    Saves and leaves in `model` the adapter of the lowest held-out loss. Returns with the progress
    each training pair's loss, (pairs,), the mean over the epochs. Raises UserError on a loss that
    is not finite, and where not even one pair fits into memory; KeyboardInterrupt after a signal,
    when the step is done and saved.
    """
    base, folder, is_main = dataset.base, Path(settings.OUTPUT_DIR), accelerator.is_main_process
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dropouts = [module for name, module in model.named_modules() if ".lora_dropout." in name]
    optimizer = torch.optim.AdamW(weights, weight_decay=settings.WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
    # One tensor to add up over the processes: all gradients, then the loss, and how many processes
    # are out of memory, have had a signal, want a checkpoint, want a new report.
    sizes = [weight.numel() for weight in weights]
    flat = torch.zeros(sum(sizes) + 5, device=base.device)
    gradient, flags = flat[:-5], flat[-5:]
    for weight, part in zip(weights, gradient.split(sizes), strict=True):
        weight.grad = part.view_as(weight)
    pair_sums = torch.zeros(len(dataset), device=base.device)
    captioned, limit = held_out.some(GENERATED), settings.MAX_CAPTION_TOKENS

    if checkpoint := load_checkpoint(folder / "checkpoint"):
        now = Progress(**checkpoint["progress"])
        for weight, kept in zip(weights, checkpoint["weights"], strict=True):
            weight.data.copy_(kept)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        pair_sums += is_main * checkpoint["pair_sums"].to(base.device)
    else:
        now = Progress(caption_dataset(model, captioned, limit))
    steps_per_epoch = math.ceil(len(dataset) / settings.BATCH_SIZE)
    steps = steps_per_epoch * settings.EPOCHS
    print(f"steps: {steps}, {steps_per_epoch} an epoch")
    if steps < FEW_STEPS:
        print(f"  too few to learn much: try EPOCHS = {math.ceil(FEW_STEPS / steps_per_epoch)}")
    metrics = open_metrics(folder / "metrics.csv", now.step) if is_main else io.StringIO()

    def log(*values: Any) -> None:
        csv.writer(metrics).writerow("" if value != value else value for value in values)  # NaN
        row = {name: value for name, value in zip(METRICS, values, strict=True) if value == value}
        accelerator.log(row, step=values[0])

    with caught_signals(patient=True) as signals, metrics:
        if now.step:
            print(f"continuing after step {now.step}")
        else:
            now.before = held_out_loss(model, held_out)
            log(0, 0, math.nan, math.nan, now.before, math.nan, math.nan, 0)
        print(f"held-out loss before: {now.before:.4f}" if held_out.pairs else "nothing held out")
        pause, drawn = 60 * settings.CHECKPOINT_MINUTES or math.inf, time.monotonic()
        due = drawn + pause
        rows = rows_of_step(dataset, now.step, settings.BATCH_SIZE, settings.SEED)
        bar = tqdm(range(now.step, steps), "training", steps, initial=now.step, unit="step",
                   disable=None)
        for step in bar:
            started = time.perf_counter()
            rate = learning_rate(step, steps, settings.LEARNING_RATE, settings.WARMUP_FRACTION)
            optimizer.param_groups[0]["lr"] = rate
            tokens, own = count_tokens(rows), share(rows)
            for dropout in dropouts:  # all else stays in eval mode: frozen layers have dropout too
                dropout.train()
            while True:  # until the step fits into memory
                clock, losses = time.monotonic(), [pair_sums[:0]]
                wanted = is_main and clock > due, is_main and clock > drawn + REPORT_SECONDS
                flat.zero_()
                flags.copy_(torch.tensor([0, 0, len(signals), *wanted]), non_blocking=True)
                try:
                    seed = (settings.SEED * 1_000_003 + step) * accelerator.num_processes
                    torch.manual_seed(seed + accelerator.process_index)  # of the dropout
                    for start in range(0, len(own), now.micro_batch):
                        some = pair_losses(model, own[start : start + now.micro_batch], base)
                        scaler.scale(some.sum() / tokens).backward()
                        losses.append(some.detach())
                except RuntimeError as error:
                    if not should_reduce_batch_size(error):
                        raise
                    flags[1] = 1
                some = None  # it and the traceback, which is gone by now, held all activations
                flags[0] = torch.cat(losses).sum()
                flat.copy_(reduce(flat, "sum"))
                scale = scaler.scale(torch.ones_like(flags[:1]))
                norm = gradient.norm() / scale
                following = rows_of_step(dataset, step + 1, settings.BATCH_SIZE, settings.SEED)
                for row in share(following):  # from the disk, while the GPU works
                    row["features"] = row["features"].clone()
                # The one synchronization of a step.
                total, short, stop, save, draw, norm, scale = torch.cat(
                    [flags, norm, scale]).tolist()
                if not short:
                    break
                most = min(now.micro_batch, math.ceil(len(rows) / accelerator.num_processes))
                if most == 1:
                    raise UserError("not even one pair fits into memory. Lower MAX_CAPTION_TOKENS "
                                    "or LORA_RANK, or set LOAD_IN_4BIT.")
                now.micro_batch = math.ceil(most / 2)
                tqdm.write(f"out of memory: {now.micro_batch} pairs at a time from now on, "
                           "same result")
                torch.cuda.empty_cache()
            for dropout in dropouts:
                dropout.eval()
            loss = total / tokens
            # GradScaler leaves out a step whose gradient isn't finite, and scales less next time.
            if not math.isfinite(loss) or (scale <= 1 and not math.isfinite(norm)):
                pictures = ", ".join(dataset.pairs[row["index"]].picture for row in rows[:NAMED])
                raise UserError(
                    f"at step {step + 1} the loss is {loss} and the norm of its gradient {norm}, "
                    f"with {printable(pictures)}. Lower LEARNING_RATE, or set DTYPE to float32, "
                    "and say --restart.")
            scaler.unscale_(optimizer)
            if settings.MAX_GRAD_NORM:
                gradient *= min(1.0, settings.MAX_GRAD_NORM / (norm + 1e-6))
            scaler.step(optimizer)
            scaler.update()
            indices = torch.tensor([row["index"] for row in own], dtype=torch.long)
            indices = indices.to(base.device, non_blocking=True)
            pair_sums.index_add_(0, indices, torch.cat(losses))
            seconds, after = time.perf_counter() - started, math.nan
            now.step, now.loss, now.tokens = step + 1, now.loss + total, now.tokens + tokens
            now.pairs, now.seconds = now.pairs + len(rows), now.seconds + seconds
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            epoch, place = divmod(step, steps_per_epoch)
            if ended := place == steps_per_epoch - 1:
                after = held_out_loss(model, held_out)
                improved = not after >= now.best  # with nothing held out, the last is kept
                if improved:
                    now.best, now.best_epoch = after, epoch + 1
                if improved and is_main:
                    save_adapter(model, folder)
                measured = f"held-out {after:.4f}{' (best)' * improved}, " if held_out.pairs else ""
                tqdm.write(f"epoch {epoch + 1}/{settings.EPOCHS}: loss {now.loss / now.tokens:.4f},"
                           f" {measured}{now.pairs / now.seconds:.1f} pairs/s")
                now.loss, now.tokens = 0.0, 0
            log(step + 1, epoch + 1, rate, loss, after, norm, len(rows) / seconds, now.seconds)
            if ended or stop or save:
                metrics.flush()
                sums = reduce(pair_sums, "sum")
                if is_main:
                    save_checkpoint(folder / "checkpoint", now.step, {
                        "progress": dataclasses.asdict(now), "pair_sums": sums,
                        "weights": [weight.detach() for weight in weights],
                        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
                due = time.monotonic() + pause
            if stop:
                raise KeyboardInterrupt(*signals[:1])
            if ended and draw:
                shown = captioned.some(settings.SAMPLE_COUNT)
                texts = spread(now.captions, settings.SAMPLE_COUNT), caption_dataset(
                    model, shown, limit)
                if is_main:
                    attempt(draw_report, folder, list_samples(shown, *texts), {})
                drawn = time.monotonic()
            rows = following
    accelerator.wait_for_everyone()
    best = load_file(folder / "adapter_model.safetensors", device=str(base.device))
    set_peft_model_state_dict(model, best)
    return now, reduce(pair_sums, "sum").cpu() / settings.EPOCHS


# ---- Report -------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A held-out picture."""

    picture: str
    reference: str  # its caption
    before: str
    after: str


def list_samples(
    dataset: ImageCaptioningDataset, before: list[str], after: list[str]
) -> list[Sample]:
    """The pairs of a data set, their captions as the model is taught them, and generated ones."""
    decode = dataset.base.processor.tokenizer.decode
    return [Sample(pair.picture, decode(dataset.tokenized[pair.caption][:-1]).strip(), *texts)
            for pair, *texts in zip(dataset.pairs, before, after, strict=True)]


def attempt(make: Callable, *arguments: Any) -> int:
    """Calls what must never cost the adapter. Returns the exit code."""
    try:
        make(*arguments)
    except Exception as error:
        if getattr(error, "errno", None):  # a full disk: the run continues when there is room
            raise
        what = make.__name__.replace("_", " ")
        print(f"error: could not {what}: {error!r}. The adapter is saved.", file=sys.stderr)
        return 1
    return 0


def find_fonts(text: str) -> tuple[list[str], str]:
    """Installed font families that can show `text` together, and the characters that none can."""
    from matplotlib import font_manager, ft2font

    families = ["DejaVu Sans"]  # comes with matplotlib
    missing = {letter for letter in text if unicodedata.category(letter)[0] not in "CZM"}
    fonts = [font for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name]
    for entry in sorted(fonts, key=lambda font: font.name != families[0]):
        with contextlib.suppress(RuntimeError, OSError):  # of bitmaps, or gone since listed
            font = ft2font.FT2Font(entry.fname)
            found = {letter for letter in missing if font.get_char_index(ord(letter))}
            families += [entry.name] * bool(found)
            missing -= found
        if not missing:
            break
    return families, "".join(sorted(missing))


def summarize(
    done: Progress, dataset: ImageCaptioningDataset, samples: list[Sample]
) -> dict[str, Any]:
    """What was learned, in figures."""
    results = {"training_pairs": len(dataset), "steps": done.step,
               "training_seconds": round(done.seconds, 1),
               "pairs_per_second": round(done.pairs / done.seconds, 1)}
    if samples:
        results |= {"best_epoch": done.best_epoch, "held_out_loss_before": round(done.before, 4),
                    "held_out_loss_after": round(done.best, 4)}
        for when in ("before", "after"):
            exact = sum(getattr(sample, when) == sample.reference for sample in samples)
            results[f"exact_captions_{when}"] = f"{exact} of {len(samples)}"
    return results


def draw_report(folder: Path, samples: list[Sample], results: dict[str, Any]) -> None:
    """report.png: the losses in metrics.csv; pictures with reference, caption before and after."""
    from matplotlib.figure import Figure  # takes a second

    samples = spread(samples, 12)
    families, missing = find_fonts("".join(text for sample in samples for text in sample[1:]))
    lines = math.ceil(len(samples) / 2)
    figure = Figure(figsize=(13, 4 + 1.8 * lines), layout="constrained")
    grid = figure.add_gridspec(1 + lines, 4, height_ratios=[4, *[1.8] * lines],
                               width_ratios=[1.8, 4.7, 1.8, 4.7])
    losses = figure.add_subplot(grid[0, :])
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, style in (("train_loss", {"lw": 1, "marker": ".", "ms": 3, "color": "tab:blue",
                                        "label": "training"}),
                        ("held_out_loss", {"marker": "o", "color": "tab:orange",
                                           "label": "held out"})):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        losses.plot(*zip(*points, strict=True), **style)
    losses.update_datalim([(0, 0)])
    losses.autoscale_view()  # so that there is room above the highest
    losses.locator_params("x", integer=True)
    losses.set(xlabel="step", ylabel="loss per token", ylim=(0, None))
    losses.set_title(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value
                               in results.items() if name.startswith(("held_out_loss", "exact")))
                     or "nothing held out" * (not points))
    losses.legend(frameon=False)
    losses.spines[["top", "right"]].set_visible(False)
    for number, sample in enumerate(samples):
        line, column = 1 + number // 2, number % 2 * 2
        picture, words = (figure.add_subplot(grid[line, column + i]) for i in (0, 1))
        picture.axis("off")
        words.axis("off")
        with contextlib.suppress(PictureError):  # it is gone by now
            picture.imshow(read_picture(sample.picture, 224))
        exact, height = sample.after == sample.reference, 1.0
        for text, color in ((f"caption: {sample.reference}", "black"),
                            (f"before: {sample.before}", "gray"),
                            (f"{'✓' if exact else '✗'} after: {sample.after}",
                             "tab:green" if exact else "tab:red")):
            wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in text)
            wrapped = textwrap.wrap(text, 24 if wide else 48, max_lines=3, placeholder=" ...")
            words.text(0, height, "\n".join(wrapped), color=color, family=families, va="top",
                       parse_math=False, transform=words.transAxes, in_layout=False)
            height -= 0.1 * len(wrapped) + 0.03
    if missing:
        figure.supxlabel(f"No installed font has {len(missing)} of the characters: they are boxes.")
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a line for every box
        figure.savefig(image, format="png")
    replace_file(folder / "report.png", image.getvalue())


def save_pairs(
    folder: Path, parts: dict[str, tuple[ImageCaptioningDataset, torch.Tensor]]
) -> list[list]:
    """pairs.csv: split, loss per token, tokens, picture, caption; the highest loss first.

    `parts` are data sets and the summed loss of each of their pairs, by the name of the split.
    """
    rows = []
    for split, (dataset, losses) in parts.items():
        tokens = dataset.tokens()
        figures = zip(dataset.pairs, (losses / tokens).tolist(), tokens.tolist(), strict=True)
        rows += [[split, round(loss, 4), count, *pair] for pair, loss, count in figures]
    rows.sort(key=lambda row: -row[1])
    header = ["split", "loss", "tokens", "picture", "caption"]
    replace_csv(folder / "pairs.csv", [header, *rows])
    return rows


def log_report(folder: Path, accelerator: Accelerator, step: int) -> None:
    """Hands report.png to the trackers that take pictures."""
    with Image.open(folder / "report.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))[None]
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images({"report": pixels}, step=step, **layout)


CARD = """---
{metadata}
---

# BLIP-2 captions: {name}

A LoRA adapter for `{base}`, whose language model was loaded in {loaded}.

| | |
|---|---|
{figures}

{samples}

![Losses, and held-out pictures](report.png)

## Load it

```python
import torch
from peft import PeftModel
from PIL import Image
from transformers import {config}Blip2ForConditionalGeneration, Blip2Processor

folder = {folder!r}  # where this is, or its name on the Hub
dtype = torch.{dtype}
{nf4}processor = Blip2Processor.from_pretrained(folder)
base = Blip2ForConditionalGeneration.from_pretrained(
    {base!r}, dtype=dtype, {quantization}device_map="auto")
model = PeftModel.from_pretrained(base, folder).eval()

picture = Image.open("picture.jpg").convert("RGB")
inputs = processor(images=picture, text={prompt!r}, return_tensors="pt").to(base.device, dtype)
ids = model.generate(**inputs, max_new_tokens={tokens}){cut}
print(processor.decode(ids[0], skip_special_tokens=True).strip())
```

## Settings and versions

```json
{settings}
```

The licence of the base model holds for what is made from it.{licence}
"""


CARD_NF4 = f"""nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules={UNQUANTIZED})
"""


def save_card(folder: Path, samples: list[Sample], record: dict[str, Any]) -> None:
    """README.md: a model card for the Hub, with what is in settings.json, and a few samples."""
    settings, is_t5 = record["settings"], record["language_model"] == "t5"
    base, dtype, in_4bit = settings["MODEL_ID"], record["dtype"], settings["LOAD_IN_4BIT"]
    on_hub = not os.path.isdir(base)
    metadata = ModelCardData(
        base_model=base if on_hub else None, library_name="peft",
        pipeline_tag="image-to-text", tags=["blip-2", "lora", "image-captioning"],
        license="apache-2.0" if is_t5 and on_hub else "other",
        license_name=None if is_t5 and on_hub else "opt" if on_hub else "of-the-base-model",
        metrics=["loss", "exact_match"])
    figures = (f"| {name.replace('_', ' ')} | {value} |" for name, value
               in record["results"].items())
    header = ["| caption | before | after |", "|---|---|---|"] * bool(samples)
    shown = (" | ".join(printable(text).replace("|", "/") for text in sample[1:])
             for sample in spread(samples, 6))
    card = CARD.format(
        metadata=metadata.to_yaml(), name=folder.resolve().name, base=base, dtype=dtype,
        figures="\n".join(figures), samples="\n".join([*header, *(f"| {row} |" for row in shown)]),
        loaded="4 bits" if in_4bit else dtype, folder=str(folder),
        nf4=CARD_NF4 * in_4bit, config="BitsAndBytesConfig, " * in_4bit,
        quantization="quantization_config=nf4, " * in_4bit,
        prompt=settings["PROMPT"], tokens=settings["MAX_CAPTION_TOKENS"] + 1,
        cut="" if is_t5 else '[:, inputs["input_ids"].shape[1] :]',
        licence=" OPT's weights are for research only." * (on_hub and not is_t5),
        settings=json.dumps({name: record[name] for name in ("settings", "versions")}, indent=2))
    replace_file(folder / "README.md", str(ModelCard(card)).encode(errors="surrogateescape"))


# ---- Commands -----------------------------------------------------------------------------------


def caption_pictures(paths: list[str], output: Path, device: str, workers: int) -> int:
    """Prints path<TAB>caption for pictures, and those in folders, with the adapter in `output`.

    Base, prompt, dtype and quantization are those of the training. All else goes to stderr.
    Returns the exit code: 1 if a picture could not be captioned.
    """
    skipped: list[Skipped] = []
    pictures = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"there is no picture or folder {path!r}.")
        pictures += list_files(path, skipped) if os.path.isdir(path) else [path]
    if not pictures:
        raise UserError(f"there is no picture in {printable(', '.join(paths))}. Name other folders "
                        "or files.")
    try:
        record = json.loads((output / "settings.json").read_text(encoding="utf-8"))
        trained, dtype = argparse.Namespace(**record["settings"]), record["dtype"]
        dtype = "auto" if dtype == "float16" else dtype  # which not every device has
        if not record["finished"]:
            print("this run is not finished: the adapter is its best so far", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):
            base = load_base(trained.MODEL_ID, trained.PROMPT, device, dtype, trained.LOAD_IN_4BIT)
        load_file(output / "adapter_model.safetensors")  # else peft would look for it on the Hub
        model = PeftModel.from_pretrained(base.model, str(output), torch_device=str(base.device))
    except UserError:
        raise
    except Exception as error:  # missing and damaged files raise a dozen kinds
        if should_reduce_batch_size(error):
            raise
        raise UserError(f"OUTPUT_DIR {str(output)!r} holds no adapter that can be read: {error}. "
                        "Train one first.") from error
    for rows, pixel_values in read_pictures(pictures, base.processor, workers, "captioning"):
        skipped += [Skipped("picture", path, reason) for path, _, _, reason in rows if reason]
        usable = [path for path, _, _, reason in rows if not reason]
        if usable:
            features = encode(base, pixel_values)
            captions = generate_captions(model, base, features, trained.MAX_CAPTION_TOKENS)
            for path, caption in zip(usable, captions, strict=True):
                tqdm.write(f"{printable(path)}\t{printable(caption)}")  # to stdout, past the bar
            sys.stdout.flush()
    for row in skipped:
        print(printable(f"not captioned: {row.path}: {row.reason}"), file=sys.stderr)
    return 1 if skipped else 0


def run(settings: argparse.Namespace) -> int:
    """What the settings and flags ask for, from the pairs to the summary. Returns the exit code."""
    # Who fails before this is waited for without end; a download or an encoding pass may be slow.
    state = PartialState(cpu=settings.DEVICE == "cpu", timeout=timedelta(days=1))
    if int(os.environ.get("WORLD_SIZE", 1)) > state.num_processes:
        raise UserError("several processes were started, but there is no GPU for them. Mend that, "
                        "or try it with --device cpu.")
    check_settings(settings)
    output = Path(settings.OUTPUT_DIR)
    if settings.caption:
        return caption_pictures(settings.caption, output, settings.DEVICE, settings.NUM_WORKERS)

    data = find_data(settings)
    if settings.check:
        return check_pictures(data.pairs + data.validation, data.skipped, settings.NUM_WORKERS)

    accelerator = Accelerator(cpu=settings.DEVICE == "cpu", log_with=settings.LOG_WITH or None,
                              project_dir=settings.OUTPUT_DIR)
    try:
        with lock_output(output) if accelerator.is_main_process else contextlib.nullcontext():
            return fine_tune(settings, accelerator, data)
    finally:
        accelerator.end_training()


def find_earlier_run(
    settings: argparse.Namespace, accelerator: Accelerator, trace: str
) -> tuple[dict[str, Any], bool]:
    """The run that is in OUTPUT_DIR, {} for none, and whether this one continues it.

    Raises UserError where that is another, unfinished one, and where processes see other files.
    """
    output = Path(settings.OUTPUT_DIR)
    accelerator.wait_for_everyone()  # for the lock
    earlier = read_earlier_run(output) if (output / LOCK).exists() else None
    seen = gather_object([(trace, earlier, vars(settings))])
    if [files[:2] for files in seen] != [seen[0][:2]] * len(seen):
        raise UserError(NOT_SHARED)
    if different := {name for *_, own in seen for name in own
                     if name not in HARMLESS and own[name] != seen[0][2][name]}:
        raise UserError(f"the processes have different values of {', '.join(sorted(different))}. "
                        "Give all machines the same settings.")
    changed = list_differences(earlier, vars(settings), trace) if earlier else []
    if changed and not earlier["finished"] and not settings.restart:
        raise UserError("\n  ".join([
            f"OUTPUT_DIR {str(output)!r} holds an unfinished run, and:", *changed,
            "Set that back to continue, give --restart to move that run aside, or name another "
            "OUTPUT_DIR."]))
    return earlier, bool(earlier) and not changed and not settings.restart


def build_datasets(
    settings: argparse.Namespace, base: Base, data: Data
) -> tuple[ImageCaptioningDataset, ImageCaptioningDataset]:
    """Encodes the pictures. Returns what to train on, and what is held out.

    Adds what can't be read to `data.skipped`. Raises UserError where nothing is left.
    """
    pairs, validation, skipped = data
    store = open_features(base, settings.TRAIN_DIR, f"{settings.OUTPUT_DIR}.features")
    left_out = {row.path for row in skipped}
    pictures = [p.picture for p in pairs + validation if p.picture not in left_out]
    encode_pictures(base, store, pictures, settings.NUM_WORKERS)
    for part in (base.model.vision_model, base.model.qformer):
        part.to("meta")  # its work is done, and its memory is for training
    broken = {picture: reason for picture in pictures if (reason := store.reason(picture))}
    skipped += [Skipped("picture", *item) for item in broken.items()]
    print_skipped(skipped)
    left_out |= broken.keys()
    pairs, validation = ([pair for pair in some if pair.picture not in left_out]
                         for some in (pairs, validation))
    if not pairs or (settings.VALIDATION_DIR and not validation):
        folder = settings.VALIDATION_DIR if pairs else settings.TRAIN_DIR
        raise UserError(f"not one picture in {folder!r} can be read. Replace them; --check says "
                        "what is wrong with each.")
    captions = [pair.caption for pair in pairs + validation]
    limit = settings.MAX_CAPTION_TOKENS
    tokenized, cut = tokenize_captions(captions, base, settings.PROMPT, limit)
    if cut:
        print(f"cut: {cut} captions, at MAX_CAPTION_TOKENS = {limit} tokens")
    if not settings.VALIDATION_DIR:
        pairs, validation = split_pairs(pairs, settings.VALIDATION_FRACTION, settings.SEED,
                                        settings.TRAIN_DIR)
    print(f"pairs: {len(pairs)} to train on, {len(validation)} held out")
    dataset = ImageCaptioningDataset(pairs, store, tokenized, base)
    print(f"row: {printable(describe_row(dataset[0], base))}  ([...] is learned)")
    return dataset, ImageCaptioningDataset(validation, store, tokenized, base)


def fine_tune(settings: argparse.Namespace, accelerator: Accelerator, data: Data) -> int:
    """All of a run that writes, under the lock of OUTPUT_DIR. Returns the exit code."""
    output, skipped = Path(settings.OUTPUT_DIR), data.skipped
    trace = fingerprint(data, settings)
    earlier, continuing = find_earlier_run(settings, accelerator, trace)
    if continuing and earlier["finished"]:
        shutil.rmtree(output / "checkpoint", ignore_errors=True)  # killed just before this
        print(f"this run is finished: its adapter is in {output}. To train anew, change a setting "
              "or give --restart.")
        return 0
    if accelerator.num_processes > 1:
        print(f"processes: {accelerator.num_processes}, {settings.BATCH_SIZE} pairs a step in all")
    earlier_skipped = read_skipped(output) if continuing else []
    found = {pair.picture for pair in data.pairs + data.validation}
    skipped += [row for row in earlier_skipped if row.path in found]  # even if it is readable now
    count = len(skipped)
    dtype = earlier["dtype"] if continuing else settings.DTYPE
    base = load_base(settings.MODEL_ID, settings.PROMPT, settings.DEVICE, dtype,
                     settings.LOAD_IN_4BIT)
    dataset, held_out = build_datasets(settings, base, data)
    if earlier_skipped and len(skipped) > count:
        raise UserError(f"{printable(skipped[-1].path)} could be read when this run began, and now "
                        f"it {skipped[-1].reason}. Put it back, or give --restart.")
    torch.manual_seed(settings.SEED)  # of the adapter's first weights
    model = add_lora(base.model, settings.LORA_TARGETS, settings.LORA_RANK, settings.LORA_ALPHA,
                     settings.LORA_DROPOUT)
    check_sight(model, dataset)

    record = describe_run(settings, trace, base)
    if accelerator.is_main_process:
        if earlier and not continuing:
            move_aside(output)
        save_settings(output, record)
        replace_csv(output / "skipped.csv", [Skipped._fields, *skipped])
        base.processor.save_pretrained(output)
    accelerator.init_trackers("blip2", config=record["settings"])
    accelerator.wait_for_everyone()
    done, train_losses = train(settings, accelerator, model, dataset, held_out)
    held_out_losses, captioned = measure_losses(model, held_out), held_out.some(GENERATED)
    after = caption_dataset(model, captioned, settings.MAX_CAPTION_TOKENS)
    if not accelerator.is_main_process:
        return 0

    samples = list_samples(captioned, done.captions, after)
    shown = spread(samples, settings.SAMPLE_COUNT)
    results = summarize(done, dataset, samples)
    record |= {"finished": True, "results": results | {"not_used": len(skipped)}}
    parts = {"train": (dataset, train_losses), "held out": (held_out, held_out_losses)}
    worst = save_pairs(output, parts)[:3]
    code = attempt(draw_report, output, shown, results)
    code |= code or attempt(log_report, output, accelerator, done.step)
    code |= attempt(save_card, output, samples, record)
    save_settings(output, record)
    shutil.rmtree(output / "checkpoint")
    for sample in shown:
        print("{}\n  reference: {}\n  before:    {}\n  after:     {}".format(
            *map(printable, sample)))
    print("highest losses, perhaps wrong captions (pairs.csv has all):")
    for _, loss, _, picture, caption in worst:
        print(printable(f"  {loss:.3f} {picture}: {textwrap.shorten(caption, 60)}"))
    for name, value in {**record["results"], "adapter": output}.items():
        print(f"{name + ':':<23}{value}")
    return code


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    errors, who = sys.stderr, ""
    if process := int(os.environ.get("RANK", 0)):  # one of several: the first speaks for all
        who = f"process {process}: "
        print(f"{who}started; the first one says how it goes")
        sys.stdout = sys.stderr = open(os.devnull, "w")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what matters about a picture raises
    transformers.utils.logging.set_verbosity_error()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # in a notebook
            stream.reconfigure(errors="backslashreplace")  # file names may be no valid Unicode
    try:
        settings = parse_arguments(argv)
        with caught_signals(patient=False):
            return run(settings)
    except UserError as error:
        problem = str(error)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            problem = (f"{error}. What it read is kept. Lower NUM_WORKERS if memory is short, and "
                       "run the same command again.")
        elif should_reduce_batch_size(error):
            problem = ("out of memory. Set LOAD_IN_4BIT, lower MAX_CAPTION_TOKENS, or free memory. "
                       f"({error})")
        elif isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            problem = f"another process has ended, or can't be reached; see what it says. ({error})"
        else:
            raise
    except KeyboardInterrupt as stop:
        without = " without --restart" * ("--restart" in (argv or sys.argv))
        print(f"{who}stopped; the same command{without} continues", file=errors)
        return 128 + (stop.args or (signal.SIGINT,))[0]
    except BrokenPipeError:  # the reader has had enough: --check | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # a full disk, a folder that can't be renamed
        # What safetensors and tokenizers can't write is no OSError: "... (os error 28)".
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        problem = f"{error}. Mend that and run the same command again."
    finally:
        sys.stderr = errors  # of what is not expected, every process shows the traceback
    print(f"{who}error: {problem}", file=errors)
    return 1


if __name__ == "__main__":
    sys.exit(main())
