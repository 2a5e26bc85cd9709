"""How fast finetune.py is, beside the usual recipes and beside the arithmetic that none can avoid.

    python tests/benchmark.py [--device auto] [--repeats 5] [--real FOLDER]

(a) the usual recipe, made right: NF4, prepare_model_for_kbit_training with gradient checkpointing,
    pictures through the vision tower in every step, the model's own loss over all positions
(b) a plain loop: as (a), but what is frozen stays in eval mode, and nothing is checkpointed
(c) finetune.py: its own Captioner and Learner, in the step of its training loop
(d) the floor: only the language model's matrix products, in the shapes of (c)

Medians of one run, measured in turns (A B C A B C ...). Weights are random: speed does not depend
on them. (a) and (b) find their pixel_values in memory: the decoding that they need in every epoch
is not counted. --real takes a folder that tests/make_real_size.py made, holds one model at a time,
and measures each after the other: for a GPU.
"""

import argparse
import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: everything is made here
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from make_real_size import write_model  # noqa: E402
from peft import prepare_model_for_kbit_training  # noqa: E402
from PIL import Image  # noqa: E402

import finetune  # noqa: E402

PAIRS = 16  # in TRAIN_DIR, in every step
COMPOSED_PAIRS = 1024  # in the runs that are computed
TEXT_TOKENS = 48  # of the longest caption, its stop token included
CORES = os.cpu_count() or 1
MINI = {  # the proportions of the real model; widths are multiples of 64, for 4 bits on the CPU
    "vision_config": {"hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536,
                      "num_attention_heads": 6},
    "qformer_config": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024,
                       "num_attention_heads": 4, "encoder_hidden_size": 384},
    "text_config": {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072,
                    "num_hidden_layers": 8, "num_attention_heads": 12, "vocab_size": 50272},
}  # fmt: skip


class Kind(NamedTuple):
    """What a loop is, and in which arithmetic."""

    letter: str
    in_4bit: bool
    dtype: str

    def __str__(self) -> str:
        what = {"a": "usual recipe", "b": "plain loop", "c": "finetune.py"}[self.letter]
        return f"({self.letter}) {what}, {'NF4, ' * self.in_4bit}{self.dtype}"


def list_kinds(device: str) -> list[Kind]:
    """(a), (b), (c) as finetune.py does it by itself on this device; then other ones of (c)."""
    usual, other = ("bfloat16", "float32") if device == "cuda" else ("float32", "bfloat16")
    kinds = [Kind(letter, True, usual) for letter in "abc"] + [Kind("c", False, usual)]
    return kinds + [Kind("c", in_4bit, other) for in_4bit in (True, False) if device == "cpu"]


# ---- Data ---------------------------------------------------------------------------------------


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
        count = rng.randint(8, TEXT_TOKENS) if i else TEXT_TOKENS - 1
        (folder / "caption" / f"{i:04}.txt").write_text(" ".join(rng.choices(words, k=count)))


# ---- The loops ----------------------------------------------------------------------------------


def load_captioner(kind: Kind, model_id: str, device: str) -> finetune.Captioner:
    settings = finetune.parse_arguments(["--model-id", model_id, "--device", device, "--dtype",
                                         kind.dtype, *["--no-load-in-4bit"][kind.in_4bit :]])
    with contextlib.redirect_stdout(sys.stderr):
        return finetune.load_captioner(settings)


def load_loop(
    kind: Kind, model_id: str, data: Path, device: str, dropout: float
) -> SimpleNamespace:
    """A loop over the pairs in `data`: step(indices) -> loss, and what it is made of.

    (c) puts the vision side away, as finetune.py does.
    """
    captioner = load_captioner(kind, model_id, device)
    model, processor = captioner.model, captioner.processor.image_processor
    with contextlib.redirect_stdout(sys.stderr):
        pairs, _ = finetune.find_pairs(str(data))
        pixels, _ = finetune.decode([pair.picture for pair in pairs], processor)
        decoded = [pixels[pair.picture] for pair in pairs]
        features = [] if kind.letter != "c" else [
            captioner.encode([pixels])[0].cpu() for pixels in decoded]
        if kind.letter == "c":
            model.vision_model.to("meta")
            model.qformer.to("meta")
        if kind.letter == "a":
            prepare_model_for_kbit_training(model)
        torch.manual_seed(finetune.SEED)
        adapter = finetune.add_lora(model, finetune.LORA_TARGETS, finetune.LORA_RANK,
                                    finetune.LORA_ALPHA, dropout)
    learned = [[*captioner.tokenize(pair.caption), captioner.stop] for pair in pairs]
    loop = SimpleNamespace(kind=kind, captioner=captioner, learned=learned, rate=2e-4)
    if kind.letter == "c":
        learner = finetune.Learner(captioner, adapter, finetune.WEIGHT_DECAY)

        def step(indices: list[int]) -> float:
            indices = sorted(indices, key=lambda i: -len(learned[i]))
            rows = [finetune.Row(features[i], learned[i]) for i in indices]
            tokens = sum(len(row.learned) for row in rows)
            *losses, _, _, norm = learner.add_up(
                learner.backward(rows, tokens, len(rows)), len(rows), False)
            learner.step(loop.rate, norm, finetune.MAX_GRAD_NORM)
            return sum(losses) / tokens
    else:
        for weight in adapter.parameters():  # as PEFT does by itself
            weight.data = weight.data.float() if weight.requires_grad else weight.data
        adapter.train(kind.letter == "a")  # checkpointing acts in train mode only
        for name, module in adapter.named_modules():
            module.train(module.training or ".lora_dropout." in name)
        weights = [weight for weight in adapter.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=loop.rate, weight_decay=finetune.WEIGHT_DECAY)
        image = [model.config.image_token_index] * model.config.num_query_tokens

        def step(indices: list[int]) -> float:
            longest = max(len(learned[i]) for i in indices)
            given = image + captioner.prefix
            ids = [given + learned[i] + [captioner.pad] * (longest - len(learned[i]))
                   for i in indices]
            mask = [[1] * (len(given) + len(learned[i])) + [0] * (longest - len(learned[i]))
                    for i in indices]
            mask = torch.tensor(mask, device=captioner.device)
            ids = torch.tensor(ids, device=captioner.device)
            labels = torch.where(mask == 1, ids, -100)
            labels[:, : len(given)] = -100
            pixels = torch.from_numpy(np.stack([decoded[i] for i in indices]))
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = loop.rate
            dtype = captioner.dtype
            with torch.autocast(captioner.device.type, dtype, enabled=dtype != torch.float32):
                loss = adapter(pixel_values=pixels.to(captioner.device, dtype), input_ids=ids,
                               attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, finetune.MAX_GRAD_NORM)
            optimizer.step()
            return loss.item()

    loop.step = step
    return loop


def matrix_products(loop: SimpleNamespace) -> Callable[[], None]:
    """The language model's products in a step of this loop, whose base is not in 4 bits.

    x @ W^T forward, g @ W for the gradients of activations, into memory that is there already.
    lm_head has only the learned tokens. Left out: LoRA's products, the attention's own, the
    projection, and the gradient of the first layer's input, which is frozen.
    """
    captioner, made, products = loop.captioner, {}, []
    width = captioner.model.config.num_query_tokens + len(captioner.prefix)
    positions = PAIRS * (width + max(len(ids) for ids in loop.learned))

    def matrix(*shape: int) -> torch.Tensor:
        if shape not in made:
            made[shape] = torch.randn(shape, device=captioner.device, dtype=captioner.dtype)
        return made[shape]

    for name, module in captioner.model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            height = sum(map(len, loop.learned)) if name.endswith("lm_head") else positions
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
    gc.collect()
    if loop.captioner.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loop.step(range(PAIRS))
        return torch.cuda.max_memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what loading and encoding left behind
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from now on
    loop.step(range(PAIRS))
    return resident("VmHWM") - before


def in_child(work: Callable, *arguments: Any) -> Any:
    """The result of a call in a process of its own. Only before torch has started threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work, *arguments).result()


def measure_encoding(kind: Kind, where: tuple, pictures: list[str], repeats: int) -> list[float]:
    """Pictures a second: decoding alone on one core, encoding alone, the bound, the pass."""
    captioner, size = load_captioner(kind, where[0], where[2]), finetune.INFERENCE_BATCH
    processor, threads = captioner.processor.image_processor, torch.get_num_threads()
    some = [pictures[:size], pictures[size : 2 * size]]
    pixels = [list(finetune.decode(paths, processor)[0].values()) for paths in some]

    def decode() -> None:
        torch.set_num_threads(1)
        for paths in some:
            finetune.decode(paths, processor)
        torch.set_num_threads(threads)

    def encode() -> None:
        for batch in pixels:
            captioner.encode(batch).cpu()

    def both() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            finetune.encode_pictures(captioner, pictures, str(where[1]), Path(folder), CORES)

    seconds = take_turns({"decode": decode, "encode": encode, "both": both}, repeats)
    decoding, encoding = seconds["decode"] / 2 / size, seconds["encode"] / 2 / size
    parts = decoding / CORES, encoding
    # On the CPU both want all of the same cores, so that their times add up, however they overlap.
    # A GPU encodes while the cores decode: the slower one decides.
    most = sum(parts) if captioner.device.type == "cpu" else max(parts)
    return [1 / decoding, 1 / encoding, 1 / most, len(pictures) / seconds["both"]]


# ---- Tables -------------------------------------------------------------------------------------


def print_table(*rows: list[str]) -> None:
    """The first row is the header."""
    print()
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if not number:
            print("|" + "---|" * len(row))


def print_steps(seconds: dict[Any, float], memory: dict[Kind, int]) -> None:
    """A line for each loop, and for the floors, which go by their dtype."""
    usual, plain, *_ = seconds.values()
    rows = [["one step", "pairs/s", "against (a)", "against (b)", "of the floor", "peak memory"]]
    for kind, taken in seconds.items():
        is_loop = isinstance(kind, Kind)
        rows.append([str(kind) if is_loop else f"(d) matrix products, {kind}",
                     f"{PAIRS / taken:.1f}", f"{usual / taken:.1f}", f"{plain / taken:.1f}",
                     f"{seconds[kind.dtype] / taken:.0%}" if is_loop and kind.dtype in seconds
                     else "", f"{memory[kind] / 1e6:.0f} MB" if kind in memory else ""])
    print_table(*rows)


def print_runs(steps: list[float], rate: float) -> None:
    """Runs over COMPOSED_PAIRS: of the medians of steps of (a), (b), (c), and pictures a second."""
    epochs, count = (1, 3, 10), math.ceil(COMPOSED_PAIRS / PAIRS)
    times = {letter: [n * count * step + (letter == "c") * COMPOSED_PAIRS / rate for n in epochs]
             for letter, step in zip("abc", steps, strict=True)}
    print_table([f"a run over {COMPOSED_PAIRS} pairs, composed", *(f"{n} epochs" for n in epochs)],
                *([f"({letter})", *(f"{t:.0f} s" for t in some)] for letter, some in times.items()),
                *([f"({letter}) / (c)", *(f"{t / own:.1f}" for t, own in zip(
                    times[letter], times["c"], strict=True))] for letter in "ab"))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one not counted")
    parser.add_argument("--real", metavar="FOLDER", help="a model of the real size; needs a GPU")
    arguments = parser.parse_args()
    device, repeats, real = arguments.device, arguments.repeats, arguments.real
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if real and device == "cpu":
        parser.error("--real is a model of 3.7 billion parameters, and there is no GPU for it.")
    alone = in_child if device == "cpu" else lambda work, *rest: work(*rest)
    transformers.utils.logging.disable_progress_bar()
    memory, seconds, kinds = {}, {}, list_kinds(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data")
        if not real:
            alone(write_model, str(folder / "model"), MINI)
        where = real or str(folder / "model"), folder / "data", device, finetune.LORA_DROPOUT
        for kind in kinds:
            memory[kind] = alone(peak_memory, kind, *where)
            say(f"memory: {kind}: {memory[kind] / 1e6:.0f} MB")
            gc.collect()
        groups = [[kind] for kind in kinds] if real else [kinds]
        for group in groups:
            loops = {kind: load_loop(kind, *where) for kind in group}
            works = {kind: lambda loop=loop: loop.step(range(PAIRS))
                     for kind, loop in loops.items()}
            works |= {kind.dtype: matrix_products(loop)
                      for kind, loop in loops.items() if not kind.in_4bit}
            seconds |= take_turns(works, repeats)
            del loops, works
            gc.collect()
        encodings = {}
        for size in ((640, 480), (4000, 3000)):
            count = 3 * CORES * finetune.INFERENCE_BATCH
            paths = write_pictures(folder / str(size), size, count)
            title = f"{size[0]}x{size[1]} JPEG"
            encodings[title] = measure_encoding(kinds[2], where, paths, repeats)
    name = "CPU"
    if Path("/proc/cpuinfo").exists():
        name = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
    name = torch.cuda.get_device_name() if device == "cuda" else name
    packages = (f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    print(f"{name}, {CORES} cores; {', '.join(packages)}; {PAIRS} pairs, captions of up to "
          f"{TEXT_TOKENS} tokens, {repeats} rounds")
    print_steps(seconds, memory)
    print_table(["pictures/s", "decoding, one core", "encoding", "both at once", "of the bound"],
                *([title, *(f"{rate:.1f}" for rate in (rates[0], rates[1], rates[3])),
                   f"{rates[3] / rates[2]:.0%}"] for title, rates in encodings.items()))
    print_runs([seconds[kind] for kind in kinds[:3]], encodings["640x480 JPEG"][3])


if __name__ == "__main__":
    main()
