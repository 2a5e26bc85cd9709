"""How fast finetune.py is, beside the usual recipes and beside the arithmetic that none can avoid.

    python tests/benchmark.py [--device auto] [--repeats 3] [--no-memory] [--no-runs] [--real]

(a) the usual recipe, made right: NF4, prepare_model_for_kbit_training with gradient checkpointing,
    pictures through the vision tower in every step, the model's own loss over all positions
(b) a plain loop: as (a), but what is frozen stays in eval mode, and nothing is checkpointed
(c) finetune.py: its own encoding pass, and its own pair_losses in the step of its training loop
(d) the floor: only the language model's matrix products, in the shapes of (c)

All is measured in one run, in turns (A B C A B C ...); medians are printed. Weights are random:
speed does not depend on them. (a) and (b) find their pixel_values in memory: the decoding that they
need in every epoch is not counted. --real is the size of OPT-2.7b's BLIP-2, and needs a GPU.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: everything is made here
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from peft import PeftModel, prepare_model_for_kbit_training  # noqa: E402
from PIL import Image  # noqa: E402

import finetune  # noqa: E402

PAIRS = 16  # in TRAIN_DIR, in every step, and in the runs that are really done
COMPOSED_PAIRS = 1024  # in the runs that are computed
TEXT_TOKENS = 48  # of the longest caption, its stop token included
CORES = len(os.sched_getaffinity(0))
WHAT = {"a": "usual recipe", "b": "plain loop", "c": "finetune.py"}


class Kind(NamedTuple):
    """What a loop is, and in which arithmetic."""

    letter: str
    in_4bit: bool
    dtype: str

    def __str__(self) -> str:
        return f"({self.letter}) {WHAT[self.letter]}, {'NF4, ' * self.in_4bit}{self.dtype}"


def list_kinds(device: str) -> list[Kind]:
    """(a), (b), (c) as finetune.py does it by itself on this device; then other ones of (c)."""
    usual = "bfloat16" if device == "cuda" else "float32"
    kinds = [Kind(letter, True, usual) for letter in "abc"] + [Kind("c", False, usual)]
    others = [] if device == "cuda" else [Kind("c", True, "bfloat16"), Kind("c", False, "bfloat16")]
    return kinds + others


# ---- Model and data -----------------------------------------------------------------------------


def write_model(folder: Path, real: bool) -> None:
    """A MODEL_ID with random weights: the real one's proportions, or its size, made on the GPU.

    Tokenizer and special tokens are those of tiny_blip2.
    """
    tiny = transformers.Blip2Config.from_pretrained(HERE / "tiny_blip2")
    vision, qformer, (width, layers, heads) = {}, {}, (2560, 32, 32)
    if not real:  # widths are multiples of 64: bitsandbytes' 4-bit kernels for the CPU want that
        vision = {"hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536,
                  "num_attention_heads": 6}
        qformer = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024,
                   "num_attention_heads": 4, "encoder_hidden_size": 384}
        width, layers, heads = 768, 8, 12
    vision["initializer_range"] = 0.02  # the default, 1e-10, makes pictures all the same
    text = {"model_type": "opt", "hidden_size": width, "word_embed_proj_dim": width,
            "ffn_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        text[name] = getattr(tiny.text_config, name)
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=32,
        image_token_index=tiny.image_token_index)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if real else torch.float32)
    with torch.device("cuda" if real else "cpu"):
        transformers.Blip2ForConditionalGeneration(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    processor = transformers.Blip2Processor.from_pretrained(HERE / "tiny_blip2")
    processor.image_processor.size = {"height": 224, "width": 224}
    processor.num_query_tokens = config.num_query_tokens
    processor.save_pretrained(folder)


def write_pictures(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """JPEGs of smooth noise, about as large as photographs: 4 are drawn, the others are copies."""
    folder.mkdir(parents=True)
    rng, paths = np.random.default_rng(0), [folder / f"{i:04}.jpg" for i in range(count)]
    for path in paths[:4]:
        picture = Image.new("RGB", size)
        for cell, share in ((160, 1.0), (40, 0.4), (10, 0.25), (2, 0.12)):  # the last is grain
            cells = rng.integers(0, 256, (size[1] // cell, size[0] // cell, 3), dtype=np.uint8)
            layer = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
            picture = Image.blend(picture, layer, share)
        picture.save(path, quality=90)
    for i, path in enumerate(paths[4:]):
        shutil.copy(paths[i % 4], path)
    return [str(path) for path in paths]


def write_data(folder: Path) -> None:
    """A TRAIN_DIR of PAIRS pairs, with captions of 9 to TEXT_TOKENS tokens."""
    write_pictures(folder / "Image", (640, 480), PAIRS)
    (folder / "caption").mkdir()
    words, rng = ["red", "circle", "green", "background", "on", "a", "yellow"], random.Random(0)
    for i in range(PAIRS):  # a word is a token; the first caption is the longest
        count = rng.randint(8, TEXT_TOKENS) if i else TEXT_TOKENS
        (folder / "caption" / f"{i:04}.txt").write_text(" ".join(rng.choices(words, k=count)))


# ---- The loops ----------------------------------------------------------------------------------


class Loop(NamedTuple):
    """One of the contenders, ready to step."""

    base: finetune.Base
    model: PeftModel
    dataset: finetune.ImageCaptioningDataset  # (a), (b): pixel_values in the place of features
    optimizer: torch.optim.Optimizer

    def update(self) -> None:
        """The end of every step."""
        weights = self.optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(weights, finetune.MAX_GRAD_NORM)
        self.optimizer.step()


def live_step(loop: Loop, chosen: Iterable[int]) -> float:
    """A step of (a) or (b) on the chosen rows. Returns the loss."""
    batch = finetune.collate_fn([loop.dataset[i] for i in chosen], loop.base.pad)
    batch = {name: tensor.to(loop.base.device) for name, tensor in batch.items()}
    pixel_values = batch.pop("features").to(loop.base.dtype)
    loop.optimizer.zero_grad()
    with loop.base.autocast():
        loss = loop.model(pixel_values=pixel_values, use_cache=False, **batch).loss
    loss.backward()
    loop.update()
    return loss.item()


def our_step(loop: Loop, chosen: Iterable[int]) -> float:
    """A step of (c), as in finetune.train, on the chosen rows. Returns the loss."""
    rows = sorted((loop.dataset[i] for i in chosen), key=lambda row: -len(row["labels"]))
    tokens = finetune.count_tokens(rows)
    loop.optimizer.zero_grad()
    losses = finetune.pair_losses(loop.model, rows, loop.base)
    (losses.sum() / tokens).backward()
    loop.update()
    return losses.detach().sum().item() / tokens


STEPS = {"a": live_step, "b": live_step, "c": our_step}


def load_loop(kind: Kind, model_id: str, data: Path, device: str, dropout: float) -> Loop:
    """A loop over the pairs in `data`. (c) puts the vision side away, as finetune.run does."""
    base = finetune.load_base(model_id, "", device, kind.dtype, kind.in_4bit)
    pairs, _, _ = finetune.find_pairs(str(data), 0)
    captions, paths = [pair.caption for pair in pairs], [pair.picture for pair in pairs]
    tokenized, _ = finetune.tokenize_captions(captions, base, "", TEXT_TOKENS - 1)
    if kind.letter == "c":
        store = finetune.open_features(base, str(data), "")
        finetune.encode_pictures(base, store, paths, 0)
        for part in (base.model.vision_model, base.model.qformer):
            part.to("meta")
    else:
        store = {path: finetune.decode_batch([path], base.processor)[1][0] for path in paths}
    if kind.letter == "a":
        prepare_model_for_kbit_training(base.model)
    torch.manual_seed(finetune.SEED)
    model = finetune.add_lora(base.model, finetune.LORA_TARGETS, finetune.LORA_RANK,
                              finetune.LORA_ALPHA, dropout)
    model.train(kind.letter == "a")  # checkpointing acts in train mode only
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            module.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=finetune.LEARNING_RATE, fused=kind.letter == "c",
                                  weight_decay=finetune.WEIGHT_DECAY)
    dataset = finetune.ImageCaptioningDataset(pairs, store, tokenized, base)
    return Loop(base, model, dataset, optimizer)


def matrix_products(loop: Loop) -> Callable[[], None]:
    """The language model's products in a step of this loop, whose base is not in 4 bits.

    x @ W^T forward, g @ W for the gradients of activations, into memory that is there already.
    lm_head has only the learned tokens. Left out: LoRA's products, the attention's own, the
    projection, and the gradient of the first layer's input, which is frozen.
    """
    rows, made, products = [loop.dataset[i] for i in range(PAIRS)], {}, []
    positions = len(rows) * max(len(row["input_ids"]) for row in rows)

    def matrix(*shape: int) -> torch.Tensor:
        if shape not in made:
            made[shape] = torch.randn(shape, device=loop.base.device, dtype=loop.base.dtype)
        return made[shape]

    for name, module in loop.model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            height = finetune.count_tokens(rows) if name.endswith("lm_head") else positions
            outs, ins = module.weight.shape
            products.append((matrix(height, ins), module.weight.t(), matrix(height, outs)))
            if not any(f"layers.0.self_attn.{part}_proj" in name for part in "qkv"):
                products.append((matrix(height, outs), module.weight, matrix(height, ins)))

    def multiply() -> None:
        with torch.no_grad():
            for left, right, out in products:
                torch.mm(left, right, out=out)

    return multiply


# ---- Measuring ----------------------------------------------------------------------------------


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def take_turns(works: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """The median seconds of each, measured in turns, after a round that does not count."""
    times = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
        say(f"round {turn} of {repeats}: " + " ".join(f"{t[-1]:.3g}" for t in times.values()))
    return {name: median(kept[1:]) for name, kept in times.items()}


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS is what it has, VmHWM the most that it had."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def peak_memory(kind: Kind, *where: Any) -> int:
    """The most bytes in a step of load_loop(kind, *where), its model included.

    On a GPU or in a process with nothing else.
    """
    before, loop = resident("VmRSS"), load_loop(kind, *where)
    device = loop.base.device.type
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading and encoding left behind
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:  # as ru_maxrss, but from now on
        Path("/proc/self/clear_refs").write_text("5")
    STEPS[kind.letter](loop, range(PAIRS))
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before


def in_child(work: Callable, *arguments: Any) -> Any:
    """The result of a call in a process of its own. Only before torch has started threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work, *arguments).result()


def encode_all(base: finetune.Base, pictures: list[str], folder: Path) -> finetune.FeatureStore:
    """The encoding pass, by as many processes as there are cores, into a new store."""
    shape = base.num_query_tokens, base.model.config.qformer_config.hidden_size
    store = finetune.FeatureStore(folder, shape, base.dtype)
    finetune.encode_pictures(base, store, pictures, CORES)
    return store


def measure_encoding(base: finetune.Base, pictures: list[str], repeats: int) -> list[float]:
    """Pictures a second: decoding alone on one core, encoding alone, the bound, the pass."""
    size, threads = finetune.INFERENCE_BATCH, torch.get_num_threads()
    some = [pictures[:size], pictures[size : 2 * size]]
    pixels = [finetune.decode_batch(paths, base.processor)[1] for paths in some]

    def decode() -> None:
        torch.set_num_threads(1)
        for paths in some:
            finetune.decode_batch(paths, base.processor)
        torch.set_num_threads(threads)

    def encode() -> None:
        for batch in pixels:
            finetune.encode(base, batch).cpu()

    def both() -> None:
        with tempfile.TemporaryDirectory() as folder:
            encode_all(base, pictures, Path(folder))

    seconds = take_turns({"decode": decode, "encode": encode, "both": both}, repeats)
    decoding, encoding = seconds["decode"] / 2 / size, seconds["encode"] / 2 / size
    parts = decoding / CORES, encoding
    # On the CPU both want all of the same cores, so that their times add up, however they overlap.
    # A GPU encodes while the cores decode: the slower one decides.
    most = sum(parts) if base.device.type == "cpu" else max(parts)
    return [1 / decoding, 1 / encoding, 1 / most, len(pictures) / seconds["both"]]


def run_usual(loop: Loop, epochs: int) -> list[float]:
    """A run of (a): the seconds until the end of each epoch, which is one step."""
    started, ends = time.perf_counter(), []
    for epoch in range(epochs):
        live_step(loop, finetune.epoch_order(PAIRS, finetune.SEED, epoch))
        ends.append(time.perf_counter() - started)
    return ends


def run_ours(loop: Loop, seeing: finetune.Base, folder: Path, epochs: int) -> float:
    """A run of (c): the seconds of finetune's encoding pass, by `seeing`, and its train()."""
    settings = finetune.parse_arguments(["--epochs", str(epochs), "--output-dir", str(folder),
                                         "--batch-size", str(PAIRS)])
    started, pairs = time.perf_counter(), loop.dataset.pairs
    store = encode_all(seeing, [pair.picture for pair in pairs], folder / "features")
    training, none = (
        finetune.ImageCaptioningDataset(some, store, loop.dataset.tokenized, loop.base)
        for some in (pairs, []))
    finetune.train(settings, Accelerator(cpu=loop.base.device.type == "cpu"), loop.model, training,
                   none)
    return time.perf_counter() - started


# ---- Tables -------------------------------------------------------------------------------------


def print_table(*rows: list[str]) -> None:
    """The first cell of a row is its name."""
    print()
    for name, *cells in rows:
        print(f"{name:<34}" + "".join(f"{cell:>11}" for cell in cells))


def describe(loop: Loop) -> str:
    """Machine and versions, then the batch."""
    name = Path("/proc/cpuinfo").read_text().partition("model name")[2].split("\n")[0].strip("\t: ")
    if loop.base.device.type == "cuda":
        name = torch.cuda.get_device_name(loop.base.device)
    packages = (f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    batch = finetune.collate_fn([loop.dataset[i] for i in range(PAIRS)], loop.base.pad)
    pairs, positions = batch["input_ids"].shape
    padding, images = 1 - batch["attention_mask"].float().mean(), loop.base.num_query_tokens
    return (f"{name}, {CORES} cores, {torch.get_num_threads()} threads; {', '.join(packages)}\n"
            f"a step: {pairs} pairs, {images} image and up to {positions - images} text tokens in "
            f"each; {padding:.0%} of all are padding")


def print_steps(seconds: dict[Any, float], memory: dict[Kind, int]) -> None:
    """A line for each loop, and for the floors, which go by their dtype."""
    usual, plain, *_ = seconds.values()
    rows = [["one step", "seconds", "pairs/s", "(a)/this", "(b)/this", "(d)/this", "peak MB"]]
    for kind, time_ in seconds.items():
        is_loop = isinstance(kind, Kind)
        rows.append([str(kind) if is_loop else f"(d) matrix products, {kind}", f"{time_:.3f}",
                     f"{PAIRS / time_:.1f}", f"{usual / time_:.2f}", f"{plain / time_:.2f}",
                     f"{seconds[kind.dtype] / time_:.0%}" if is_loop else "",
                     f"{memory[kind] / 1e6:.0f}" if kind in memory else "-"])
    print_table(*rows)


def print_runs(pairs: int, steps: list[float], rate: float, done: dict[str, list[float]]) -> None:
    """Runs composed of the medians: steps of (a), (b), (c), pictures a second; and those `done`."""
    epochs, count = (1, 3, 10), math.ceil(pairs / PAIRS)
    times = {letter: [n * count * step + (letter == "c") * pairs / rate for n in epochs]
             for letter, step in zip("abc", steps, strict=True)}
    rows = [[f"runs over {pairs} pairs", *(f"{n} epoch{'s' * (n > 1)}" for n in epochs)]]
    for what, some in (("composed", times), ("really run", done)):
        rows += [[f"({letter}) {WHAT[letter]}, {what}", *(f"{t:.1f} s" for t in some[letter])]
                 for letter in some]
    for letter in "ab":
        ratios = (f"{t / own:.2f}" for t, own in zip(times[letter], times["c"], strict=True))
        rows.append([f"({letter}) / (c), composed", *ratios])
    print_table(*rows)


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3, help="rounds, after one not counted")
    parser.add_argument("--no-memory", action="store_true", help="do not measure the memory")
    parser.add_argument("--no-runs", action="store_true", help="no encoding pass, no whole runs")
    parser.add_argument("--real", action="store_true", help="OPT-2.7b's size; needs a GPU")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.real and arguments.device == "cpu":
        parser.error("--real is a model of 3.7 billion parameters, and there is no GPU for it.")
    return arguments


def main() -> None:
    arguments, started = parse_arguments(), time.perf_counter()
    device, repeats = arguments.device, arguments.repeats
    alone = in_child if device == "cpu" else lambda work, *rest: work(*rest)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    encodings, done, memory, kinds = {}, {}, {}, list_kinds(device)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        write_data(folder / "data")
        alone(write_model, folder / "model", arguments.real)
        where = str(folder / "model"), folder / "data", device, finetune.LORA_DROPOUT
        for kind in [] if arguments.no_memory else kinds:
            memory[kind] = alone(peak_memory, kind, *where)
            say(f"memory: {kind}: {memory[kind] / 1e6:.0f} MB")
            gc.collect()
        loops = {kind: load_loop(kind, *where) for kind in kinds}
        works = {kind: functools.partial(STEPS[kind.letter], loop, range(PAIRS))
                 for kind, loop in loops.items()}
        works |= {kind.dtype: matrix_products(loop)
                  for kind, loop in loops.items() if not kind.in_4bit}
        seconds = take_turns(works, repeats)
        usual, plain, ours, *_ = loops.values()
        if not arguments.no_runs:
            for size in ((640, 480), (4000, 3000)):
                count = 3 * CORES * finetune.INFERENCE_BATCH
                paths = write_pictures(folder / str(size), size, count)
                title = f"{count} of {size[0]}x{size[1]}, {os.path.getsize(paths[0]) // 1000} kB"
                encodings[title] = measure_encoding(plain.base, paths, repeats)
            done["a"] = run_usual(usual, 3)[::2]
            done["c"] = [run_ours(ours, plain.base, folder / f"{n}", n) for n in (1, 3)]
    print(describe(ours))
    print_steps(seconds, memory)
    if encodings:
        rows = [[title, *(f"{rate:.1f}" for rate in rates), f"{rates[3] / rates[2]:.0%}"]
                for title, rates in encodings.items()]
        print_table(["encoding, pictures/s", "decode *", "encode", "bound", "pass", "pass/bound"],
                    *rows, ["* alone, on one core"])
        medians, rate = [seconds[kind] for kind in kinds[:3]], list(encodings.values())[0][3]
        print_runs(COMPOSED_PAIRS, medians, rate, {})
        print_runs(PAIRS, medians, rate, done)
    say(f"took {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
