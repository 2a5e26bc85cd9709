"""Fine-tune BLIP-2 on your own captions: LoRA on a language model in 4 bits.

What goes in: pictures and their captions.

    train/caption/<name>.txt      one caption: the whole file
    train/Image/<name>/...        its pictures, in any depth; each makes one pair with that caption
    train/Image/<name>.<ending>   or one picture beside the folders

What comes out: blip2_lora_finetuned/ with the adapter, the processor, settings.json, skipped.csv.

    python finetune.py                       train with the settings below, which are also flags
    python finetune.py --check               read settings, captions and pictures; write nothing
    python finetune.py --caption PATH ...    caption pictures or folders with the trained adapter
"""

import argparse
import contextlib
import csv
import difflib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
import unicodedata
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

for talkative in ("bitsandbytes", "huggingface_hub"):  # at import; on every try without network
    logging.getLogger(talkative).setLevel(logging.ERROR)
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

# ==== Settings: edit these, or give them as flags (BATCH_SIZE is --batch-size) ====
# files
TRAIN_DIR = "train"  # folder with caption/ and Image/
VALIDATION_DIR = ""  # held-out pairs in the same layout; "": hold out a part of TRAIN_DIR
OUTPUT_DIR = "blip2_lora_finetuned"  # what the run writes; an earlier run there is moved aside
# model
MODEL_ID = "Salesforce/blip2-opt-2.7b"  # Hub id or folder of a BLIP-2 with OPT or Flan-T5
DEVICE = "auto"  # auto, cuda, cuda:1, cpu
DTYPE = "auto"  # of all that is not in 4 bits: auto, bfloat16, float16, float32
LOAD_IN_4BIT = True  # language model in NF4, for less memory; False: faster where it fits
# LoRA
LORA_RANK = 16  # size of the adapter: a larger one can learn more
LORA_ALPHA = 32.0  # the adapter's outputs are scaled by LORA_ALPHA / LORA_RANK
LORA_DROPOUT = 0.05  # share of the adapter's inputs dropped in training; 0: off
LORA_TARGETS = "attention"  # or all-linear, or a regular expression for module names
# captions
PROMPT = ""  # text before every caption, given and not learned; "": none
MAX_CAPTION_TOKENS = 64  # longer captions are cut, and counted
# training
EPOCHS = 10  # passes over the training pairs
BATCH_SIZE = 16  # pairs behind one optimizer step; what memory can't hold at once is split
LEARNING_RATE = 2e-4  # the highest; it rises to it and falls to 0 along a cosine
WARMUP_FRACTION = 0.05  # share of the steps in which the learning rate rises; 0: off
WEIGHT_DECAY = 0.01  # of AdamW; 0: off
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to this norm; 0: off
SEED = 42  # of what is held out, the order of the pairs, the adapter's first weights, dropout
NUM_WORKERS = 4  # processes that read pictures, at most one for each core; 0: no extra one
# watching
VALIDATION_FRACTION = 0.1  # share of the pairs held out to measure on; 0: train on all
SAMPLE_COUNT = 6  # held-out captions printed, before and after; 0: none
# ==== End of settings ====

RANGES = {  # setting: (lowest, highest), whose type is the setting's
    "LORA_RANK": (1, 4096), "LORA_ALPHA": (0.001, 1e6), "LORA_DROPOUT": (0.0, 0.99),
    "MAX_CAPTION_TOKENS": (1, 100_000), "EPOCHS": (1, 1_000_000), "BATCH_SIZE": (1, 1_000_000),
    "LEARNING_RATE": (1e-9, 1.0), "WARMUP_FRACTION": (0.0, 1.0), "WEIGHT_DECAY": (0.0, 10.0),
    "MAX_GRAD_NORM": (0.0, 1e6), "SEED": (0, 2**31), "NUM_WORKERS": (0, 1024),
    "VALIDATION_FRACTION": (0.0, 0.9), "SAMPLE_COUNT": (0, 256),
}
LORA_PATTERNS = {
    "attention": r"language_model\..*(self_attn|SelfAttention|EncDecAttention)"
    r"\.(q_proj|k_proj|v_proj|out_proj|q|k|v|o)",
    "all-linear": r"language_model\..*\.([qkv]_proj|out_proj|fc[12]|q|k|v|o|wi|wi_[01]|wo)",
}
UNQUANTIZED = ["lm_head", "language_projection", "qformer", "vision_model"]
PICTURE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]
DECODING = 1  # raised when read_picture returns something else, so that features are made anew
INFERENCE_BATCH = 16  # pictures encoded, measured or captioned at a time
GENERATED = 256  # held-out pictures captioned before and after, at most
NAMED = 10  # problems named on the screen; skipped.csv has all of them
CPU_PARAMETERS = 500_000_000  # a larger model runs on the CPU only when told to
TINY_PARAMETERS = 20_000_000  # below, one CPU thread: several wait for each other, not for work
FEW_STEPS = 100  # with fewer optimizer steps hardly anything is learned
IGNORE = -100  # the label of a position that is not learned


class UserError(Exception):
    """What only the user can mend: a sentence that says what is wrong, where, and what to do."""


# ---- Settings -----------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The settings under their own names, overridden by flags; and `check`, `caption`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="read everything; write nothing")
    parser.add_argument("--caption", nargs="+", metavar="PATH", help="pictures or folders")
    block = Path(__file__).read_text(encoding="utf-8").split("# ==== ")[1]
    for name, comment in re.findall(r"^([A-Z][A-Z0-9_]*) *=[^#\n]*(?:# *(.*))?$", block, re.M):
        default = globals()[name]
        kind = type(RANGES[name][0] if name in RANGES else default)
        how = {"type": kind, "metavar": kind.__name__.upper()}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        text = f"{comment} (now {default!r})".replace("%", "%%")
        flag = "--" + name.lower().replace("_", "-")
        parser.add_argument(flag, dest=name, default=default, help=text, **how)
    return parser.parse_args(argv)


def check_settings(settings: argparse.Namespace) -> None:
    """Raises one UserError with every problem of the settings."""
    needs = {}
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if type(value) not in (int, type(low)) or not low <= value <= high:
            needs[name] = f"a {'whole ' * isinstance(low, int)}number from {low} to {high}"
    for name in vars(settings).keys() - RANGES.keys() - {"check", "caption", "LOAD_IN_4BIT"}:
        if not isinstance(getattr(settings, name), str):
            needs[name] = "text in quotes"
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
    settings.PROMPT = " ".join(settings.PROMPT.split())  # a space at its end breaks the next token


# ---- Pairs --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    picture: str  # path
    caption: str


class Skipped(NamedTuple):
    kind: str  # caption, picture or folder
    path: str
    reason: str


def read_caption(path: str) -> tuple[str, str]:
    """The caption in a file, white space collapsed, and a remark on its encoding ("": none).

    UTF-8 with or without BOM, UTF-16 with BOM, else Windows-1252. Raises OSError and
    UnicodeDecodeError.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is not a file")  # a pipe would block for ever
    raw = Path(path).read_bytes()
    encoding, remark = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", ""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        if encoding == "utf-16":
            raise
        text, remark = raw.decode("cp1252", errors="replace"), "read as Windows-1252: not UTF-8"
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


def print_skipped(skipped: list[Skipped], named: int = NAMED) -> None:
    """Counts what is not used, and names the first `named` ones."""
    if counts := Counter(row.kind for row in skipped):
        print("not used:", ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts.items()))
    for row in skipped[:named]:
        print(f"  {row.path}: {row.reason}")
    if len(skipped) > named:
        print(f"  and {len(skipped) - named} more; --check lists all")


# ---- Pictures -----------------------------------------------------------------------------------


Decoded = tuple[list[tuple[str, int, int, str]], torch.Tensor | None]  # as of decode_batch


class PictureError(Exception):
    """The picture can't be used; the message says why."""


def read_picture(path: str, side: int) -> Image.Image:
    """A picture as RGB: upright, its first frame, transparency over white, 16-bit grey as 8-bit.

    JPEGs far larger than `side` pixels are decoded at a reduced scale, never below twice `side`.
    Raises PictureError, whatever is wrong with the file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PictureError("is not a file")  # a pipe would block for ever
        with warnings.catch_warnings():
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
    if not os.access(path, os.R_OK):
        return 0, 0
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


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
            print(f"pair\t{pair.picture}\t{pair.caption}")
    broken = [Skipped("picture", path, reason) for path, reason in reasons.items() if reason]
    for row in skipped + broken:
        print(f"not used\t{row.path}\t{row.reason}")
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
    device: str, dtype: str, config: Blip2Config
) -> tuple[torch.device, torch.dtype, str]:
    """The one decision about device and dtype, with its reason. Raises UserError."""
    is_t5, reason = config.text_config.model_type == "t5", "as DEVICE says"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        reason = (f"PyTorch finds no NVIDIA GPU, or an old driver for CUDA {torch.version.cuda}"
                  if torch.version.cuda else "this PyTorch was built without CUDA")
    if device.startswith("cuda") and int(device[5:] or 0) >= count:
        raise UserError(f"DEVICE is {device!r}, but there are {count} GPUs"
                        + (", counted from 0." if count else f": {reason}. Or use --device cpu."))
    if device == "cpu" or not count:
        with torch.device("meta"):
            size = Blip2ForConditionalGeneration(config).num_parameters()
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


def load_base(model_id: str, prompt: str, device: str, dtype: str, in_4bit: bool) -> Base:
    """The frozen model in eval mode on its device, with its processor. Raises UserError.

    A checkpoint of 2023 knows no image token; it is given one.
    """
    print(f"model: {model_id}")
    config = load_config(model_id)
    place, kind, reason = choose_device(device, dtype, config)
    print(f"device: {place}, {str(kind).removeprefix('torch.')} ({reason})")
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
                config.num_query_tokens, text.eos_token_id, text.pad_token_id,
                text.model_type == "t5")


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

    A process appends to two files of its own: <id>.bin holds features, <id>.jsonl a line for each
    picture, [path, size, mtime_ns, row or reason]. A line is written after what it names, and a
    torn last line is not read, so a killed process leaves nothing half. Reading maps the files.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.known: dict[str, tuple[int, int, str, int | str]] = {}  # size, mtime_ns, file, entry
        self.mapped: dict[str, torch.Tensor] = {}  # file -> (rows, *shape)
        for index in sorted(folder.glob("*.jsonl"), key=os.path.getmtime):
            for line in index.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    picture, size, mtime_ns, entry = json.loads(line)
                    self.known[picture] = size, mtime_ns, index.stem, entry

    def key(self, picture: str) -> str:
        """Relative to the folder above .features, which can be moved with all that is in it."""
        return os.path.relpath(picture, self.folder.parent.parent)

    def reason(self, picture: str) -> str | None:
        """Why the picture can't be used ("": it can). None: it is new, or has changed."""
        size, mtime_ns, _, entry = self.known.get(self.key(picture), (None, None, "", ""))
        if (size, mtime_ns) != picture_state(picture):
            return None
        return entry if isinstance(entry, str) else ""

    def append(self, batches: Iterable[Decoded]) -> None:
        """Keeps the rows, and the features in place of the pixel_values, for good."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, count = uuid.uuid4().hex, 0
        path = self.folder / file
        with open(f"{path}.bin", "wb") as data, open(f"{path}.jsonl", "w") as index:
            for rows, features in batches:
                if features is not None:
                    data.write(features.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                    data.flush()
                for picture, size, mtime_ns, reason in rows:
                    line = [self.key(picture), size, mtime_ns, reason or count]
                    count += not reason
                    self.known[line[0]] = size, mtime_ns, file, line[3]
                    index.write(json.dumps(line) + "\n")
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
    new = [picture for picture in pictures if store.reason(picture) is None]
    print(f"pictures: {len(new)} to encode, {len(pictures) - len(new)} known from an earlier run")
    if new:
        batches = read_pictures(new, base.processor, workers, "encoding")
        store.append((rows, None if p is None else encode(base, p)) for rows, p in batches)


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
    """A row for each pair: `picture`, `features` (num_query_tokens, hidden), `input_ids`, `labels`.

    OPT:     input_ids are image tokens, BOS, prompt, caption, stop; labels the last two of these
    Flan-T5: input_ids are image tokens, prompt, </s>, for the encoder; labels caption, stop
    """

    def __init__(self, pairs: list[Pair], store: FeatureStore, tokenized: dict, base: Base) -> None:
        self.pairs, self.store, self.tokenized, self.base = pairs, store, tokenized, base

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, given = self.pairs[index], self.base.prefix
        learned = self.tokenized[pair.caption]
        return {
            "picture": pair.picture,
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
    """The rows of a data set, INFERENCE_BATCH at a time, with a progress bar."""
    for start in tqdm(range(0, len(dataset), INFERENCE_BATCH), title, disable=None, leave=False):
        yield [dataset[i] for i in range(start, min(start + INFERENCE_BATCH, len(dataset)))]


@torch.no_grad()
def mean_loss(model: PeftModel, batches: Iterable[list[dict]], base: Base) -> float:
    """Loss per learned token of batches of rows. NaN where there is none."""
    total = tokens = 0.0
    for rows in batches:
        total += pair_losses(model, rows, base).sum().item()
        tokens += count_tokens(rows)
    return total / tokens if tokens else math.nan


def check_sight(model: PeftModel, dataset: ImageCaptioningDataset, base: Base) -> None:
    """Raises UserError where the loss is the same without the picture: nothing could be learned."""
    rows = [dataset[i] for i in range(min(4, len(dataset)))]
    blank = [row | {"features": torch.zeros_like(row["features"])} for row in rows]
    seen, unseen = mean_loss(model, [rows], base), mean_loss(model, [blank], base)
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


def caption_dataset(
    model: PeftModel, base: Base, dataset: ImageCaptioningDataset, limit: int
) -> list[str]:
    """A generated caption for each pair."""
    batches = batches_of(dataset, "captioning")
    features = (torch.stack([row["features"] for row in rows]) for rows in batches)
    return [text for some in features for text in generate_captions(model, base, some, limit)]


def compare_captions(
    dataset: ImageCaptioningDataset, before: list[str], after: list[str], count: int
) -> dict[str, str]:
    """Prints `count` pictures with reference, caption before and after. Returns the exact ones."""
    decode = dataset.base.processor.tokenizer.decode
    samples = [(pair.picture, decode(dataset.tokenized[pair.caption][:-1]).strip(), *texts)
               for pair, *texts in zip(dataset.pairs, before, after, strict=True)]
    for sample in samples[:: math.ceil(len(samples) / count)] if count and samples else []:
        print("{}\n  reference: {}\n  before:    {}\n  after:     {}".format(*sample))
    return {f"exact_captions_{name}": f"{sum(s[1] == s[column] for s in samples)} of {len(samples)}"
            for name, column in (("before", 2), ("after", 3)) if samples}


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


def train(
    settings: argparse.Namespace,
    base: Base,
    model: PeftModel,
    dataset: ImageCaptioningDataset,
    held_out: ImageCaptioningDataset,
) -> dict[str, Any]:
    """The training loop. Saves and leaves in `model` the adapter of the lowest held-out loss.

    Returns figures for the summary. Raises UserError on a loss that is not finite, and where not
    even one pair fits into memory.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dropouts = [module for name, module in model.named_modules() if ".lora_dropout." in name]
    optimizer = torch.optim.AdamW(weights, weight_decay=settings.WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
    steps_per_epoch = math.ceil(len(dataset) / settings.BATCH_SIZE)
    steps = steps_per_epoch * settings.EPOCHS
    micro_batch = min(settings.BATCH_SIZE, len(dataset))

    def rows_of(step: int) -> list[dict[str, Any]]:  # a pure function; longest first
        epoch, place = divmod(step, steps_per_epoch)
        chosen = slice(place * settings.BATCH_SIZE, (place + 1) * settings.BATCH_SIZE)
        rows = [dataset[i] for i in epoch_order(len(dataset), settings.SEED, epoch)[chosen]]
        return sorted(rows, key=lambda row: -len(row["labels"]))

    def held_out_loss() -> float:
        loss = mean_loss(model, batches_of(held_out, "held-out loss"), base)
        if held_out.pairs and not math.isfinite(loss):
            raise UserError(f"the held-out loss is {loss}. Lower LEARNING_RATE, or set DTYPE to "
                            "float32.")
        return loss

    before = held_out_loss()
    print(f"steps: {steps}, {steps_per_epoch} an epoch")
    if steps < FEW_STEPS:
        print(f"  too few to learn much: try EPOCHS = {math.ceil(FEW_STEPS / steps_per_epoch)}")
    print(f"held-out loss before: {before:.4f}" if held_out.pairs else "nothing is held out")
    best, best_epoch, best_weights = math.inf, 0, []
    epoch_loss, epoch_tokens, pairs, seconds = 0.0, 0, 0, 0.0
    rows = rows_of(0)
    for step in (bar := tqdm(range(steps), desc="training", unit="step", disable=None)):
        started = time.perf_counter()
        rate = learning_rate(step, steps, settings.LEARNING_RATE, settings.WARMUP_FRACTION)
        optimizer.param_groups[0]["lr"] = rate
        tokens = count_tokens(rows)
        for dropout in dropouts:  # all else stays in eval mode: frozen layers have dropout too
            dropout.train()
        while True:  # until the step fits into memory
            try:
                torch.manual_seed(settings.SEED * 1_000_003 + step)  # of the dropout
                optimizer.zero_grad()
                total = torch.zeros((), device=base.device)
                for start in range(0, len(rows), micro_batch):
                    losses = pair_losses(model, rows[start : start + micro_batch], base)
                    scaler.scale(losses.sum() / tokens).backward()
                    total += losses.detach().sum()
                break
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if micro_batch == 1:
                    raise UserError("not even one pair fits into memory. Lower MAX_CAPTION_TOKENS "
                                    "or LORA_RANK, or set LOAD_IN_4BIT.") from error
            losses = None  # it and the traceback, which is gone by now, held all activations
            micro_batch = math.ceil(micro_batch / 2)
            tqdm.write(f"out of memory: {micro_batch} pairs at a time from now on, same result")
            torch.cuda.empty_cache()
        for dropout in dropouts:
            dropout.eval()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(weights, settings.MAX_GRAD_NORM or math.inf)
        following = rows_of(step + 1)  # read while the GPU works
        loss, norm = torch.stack([total / tokens, norm]).tolist()  # the one synchronization
        # GradScaler leaves out steps whose gradient is not finite, and scales less from then on.
        if not math.isfinite(loss) or not (scaler.is_enabled() or math.isfinite(norm)):
            pictures = ", ".join(row["picture"] for row in rows[:NAMED])
            raise UserError(f"at step {step + 1} the loss is {loss} and the norm of its gradient "
                            f"{norm}, with {pictures}. Lower LEARNING_RATE, or set DTYPE to "
                            "float32.")
        scaler.step(optimizer)
        scaler.update()
        epoch_loss, epoch_tokens = epoch_loss + loss * tokens, epoch_tokens + tokens
        pairs, seconds = pairs + len(rows), seconds + time.perf_counter() - started
        rows = following
        bar.set_postfix_str(f"loss {loss:.3f}, {pairs / seconds:.1f} pairs/s", refresh=False)
        if (step + 1) % steps_per_epoch == 0:
            epoch, after = (step + 1) // steps_per_epoch, held_out_loss()
            improved = after < best or not held_out.pairs  # with none held out, the last is kept
            if improved:
                best, best_epoch = after, epoch
                best_weights = [weight.detach().clone() for weight in weights]
                save_adapter(model, Path(settings.OUTPUT_DIR))
            measured = f"held-out {after:.4f}{' (best)' * improved}, " if held_out.pairs else ""
            tqdm.write(f"epoch {epoch}/{settings.EPOCHS}: loss {epoch_loss / epoch_tokens:.4f}, "
                       f"{measured}{pairs / seconds:.1f} pairs/s")
            epoch_loss, epoch_tokens = 0.0, 0
    for weight, kept in zip(weights, best_weights, strict=True):
        weight.data.copy_(kept)
    figures = {"steps": steps, "training_seconds": round(seconds, 1),
               "pairs_per_second": round(pairs / seconds, 1), "best_epoch": best_epoch}
    losses = {"held_out_loss_before": round(before, 4), "held_out_loss_after": round(best, 4)}
    return figures | losses if held_out.pairs else figures


# ---- Saving -------------------------------------------------------------------------------------


def check_output(folder: Path) -> None:
    """Raises UserError where OUTPUT_DIR can't be written, or holds files that are not ours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        strange = any(folder.iterdir()) and not (folder / "settings.json").is_file()
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {str(folder)!r} can't be written: {error.strerror}. Name "
                        "another folder.") from error
    if strange:
        raise UserError(f"OUTPUT_DIR {str(folder)!r} holds files that are not from a run of this "
                        "script, and stay as they are. Name another folder.")


def open_output(folder: Path, skipped: list[Skipped]) -> None:
    """Moves an earlier run in OUTPUT_DIR aside, under a dated name, and writes skipped.csv."""
    if any(folder.iterdir()):
        aside, number = f"{folder}-{time.strftime('%Y-%m-%d')}", 1
        while os.path.lexists(name := aside + f"-{number}" * (number > 1)):
            number += 1
        folder.rename(name)
        folder.mkdir()
        print(f"the earlier run is in {name} now")
    path = folder / "skipped.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([Skipped._fields, *skipped])


def save_adapter(model: PeftModel, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, written aside, then renamed."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as aside:
        model.save_pretrained(aside, save_embedding_layers=False)  # else it would ask the Hub
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            os.replace(f"{aside}/{name}", folder / name)


def save_settings(folder: Path, settings: argparse.Namespace, base: Base, results: dict) -> None:
    """settings.json: what --caption needs to load the adapter, and a person to repeat the run."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "pillow")
    record = {
        "settings": {name: value for name, value in vars(settings).items() if name.isupper()},
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "base_commit": getattr(base.model.config, "_commit_hash", None),
        "stop_token": base.stop,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "results": results,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / "settings.json").write_text(text + "\n", encoding="utf-8")


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
        raise UserError(f"there is no picture in {', '.join(paths)}. Name other folders or files.")
    try:
        record = json.loads((output / "settings.json").read_text(encoding="utf-8"))
        trained, dtype = argparse.Namespace(**record["settings"]), record["dtype"]
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
                tqdm.write(f"{path}\t{caption}")  # to stdout, past the bar
            sys.stdout.flush()
    for row in skipped:
        print(f"not captioned: {row.path}: {row.reason}", file=sys.stderr)
    return 1 if skipped else 0


def run(settings: argparse.Namespace) -> int:
    """What the settings and flags ask for, from the pairs to the summary. Returns the exit code."""
    check_settings(settings)
    output, limit = Path(settings.OUTPUT_DIR), settings.MAX_CAPTION_TOKENS
    if settings.caption:
        return caption_pictures(settings.caption, output, settings.DEVICE, settings.NUM_WORKERS)

    named = sys.maxsize if settings.check else NAMED
    pairs, skipped, remarks = find_pairs(settings.TRAIN_DIR, named)
    more = find_pairs(settings.VALIDATION_DIR, named) if settings.VALIDATION_DIR else ([], [], [])
    validation, skipped, remarks = more[0], skipped + more[1], remarks + more[2]
    for remark in remarks[:named]:
        print(remark)
    if settings.check:
        return check_pictures(pairs + validation, skipped, settings.NUM_WORKERS)

    check_output(output)
    base = load_base(settings.MODEL_ID, settings.PROMPT, settings.DEVICE, settings.DTYPE,
                     settings.LOAD_IN_4BIT)
    store = open_features(base, settings.TRAIN_DIR, f"{output}.features")
    pictures = [pair.picture for pair in pairs + validation]
    encode_pictures(base, store, pictures, settings.NUM_WORKERS)
    for part in (base.model.vision_model, base.model.qformer):
        part.to("meta")  # its work is done, and its memory is for training
    broken = {picture: reason for picture in pictures if (reason := store.reason(picture))}
    skipped += [Skipped("picture", *item) for item in broken.items()]
    print_skipped(skipped)
    pairs = [pair for pair in pairs if pair.picture not in broken]
    validation = [pair for pair in validation if pair.picture not in broken]
    if not pairs or (settings.VALIDATION_DIR and not validation):
        folder = settings.VALIDATION_DIR if pairs else settings.TRAIN_DIR
        raise UserError(f"not one picture in {folder!r} can be read. Replace them; --check says "
                        "what is wrong with each.")

    captions = [pair.caption for pair in pairs + validation]
    tokenized, cut = tokenize_captions(captions, base, settings.PROMPT, limit)
    if cut:
        print(f"cut: {cut} captions, at MAX_CAPTION_TOKENS = {limit} tokens")
    if not settings.VALIDATION_DIR:
        pairs, validation = split_pairs(pairs, settings.VALIDATION_FRACTION, settings.SEED,
                                        settings.TRAIN_DIR)
    dataset = ImageCaptioningDataset(pairs, store, tokenized, base)
    held_out = ImageCaptioningDataset(validation, store, tokenized, base)
    print(f"pairs: {len(pairs)} to train on, {len(validation)} held out")
    print(f"row: {describe_row(dataset[0], base)}  ([...] is learned)")

    torch.manual_seed(settings.SEED)  # of the adapter's first weights
    model = add_lora(base.model, settings.LORA_TARGETS, settings.LORA_RANK, settings.LORA_ALPHA,
                     settings.LORA_DROPOUT)
    check_sight(model, dataset, base)
    some = validation[:: math.ceil(len(validation) / GENERATED) or 1]
    captioned = ImageCaptioningDataset(some, store, tokenized, base)
    before = caption_dataset(model, base, captioned, limit)
    open_output(output, skipped)
    base.processor.save_pretrained(output)
    save_settings(output, settings, base, {})
    results = train(settings, base, model, dataset, held_out)
    after = caption_dataset(model, base, captioned, limit)
    results |= compare_captions(captioned, before, after, settings.SAMPLE_COUNT)
    save_settings(output, settings, base, results)
    summary = {"training_pairs": len(pairs), "held_out_pairs": len(validation)}
    for name, value in {**summary, "not_used": len(skipped), **results, "adapter": output}.items():
        print(f"{name + ':':<23}{value}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    settings = parse_arguments(argv)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    transformers.utils.logging.set_verbosity_error()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # in a notebook
            stream.reconfigure(errors="backslashreplace")  # file names may be no valid Unicode
    try:
        return run(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        print("error: out of memory. Set LOAD_IN_4BIT, lower MAX_CAPTION_TOKENS, or free memory. "
              f"({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the adapter of the best epoch so far, if there was one, is saved",
              file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has had enough: --check | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that can't be renamed
        print(f"error: {error}. Mend that and run the same command again.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
