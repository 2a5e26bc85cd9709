"""How fast finetune.py is, next to the usual recipes and to the arithmetic that none can avoid.

    python tests/benchmark.py [--device auto] [--repeats 5] [--real FOLDER]

(a) the usual recipe, made right: NF4, prepare_model_for_kbit_training with gradient checkpointing,
    pictures through the vision tower in every step, the model's own loss over all positions
(b) a plain loop: as (a), but what is frozen stays in eval mode, and nothing is checkpointed
(c) finetune.py: its own Captioner and Learner, in the step of its training loop
(d) the floor: only the language model's matrix products, in the shapes of (c)

Medians of one run, measured in turns (A B C A B C ...). Weights are random: speed does not depend
on them. (a) and (b) find their pixel_values in memory: the decoding that they need in every epoch
is not counted. --real takes a folder that tests/make_real_size.py made, holds one model at a time,
and measures one after the other: for a GPU.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: everything is made here
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from make_real_size import write_model  # noqa: E402
from peft import PeftModel, prepare_model_for_kbit_training  # noqa: E402
from PIL import Image  # noqa: E402

import finetune  # noqa: E402

PAIRS = 16  # in TRAIN_DIR, in every step
COMPOSED_PAIRS = 1024  # in the runs that are computed
COMPOSED_EPOCHS = (1, 3, 10)
TEXT_TOKENS = 48  # of the longest caption, its stop token included
CORES = os.cpu_count() or 1
MINI = {  # the proportions of the real model; widths are multiples of 64, for 4 bits on the CPU
    "vision_config": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
    },
    "qformer_config": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "encoder_hidden_size": 384,
    },
    "text_config": {
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "vocab_size": 50272,
    },
}
LOOPS = {"a": "usual recipe", "b": "plain loop", "c": "finetune.py"}


class Kind(NamedTuple):
    """What a loop is, and in which arithmetic."""

    letter: str
    in_4bit: bool
    dtype: str

    def __str__(self) -> str:
        arithmetic = f"NF4, {self.dtype}" if self.in_4bit else self.dtype
        return f"({self.letter}) {LOOPS[self.letter]}, {arithmetic}"


class Setup(NamedTuple):
    """What all loops have in common."""

    model_id: str
    data: Path  # a TRAIN_DIR
    device: str
    dropout: float


def list_kinds(device: str) -> list[Kind]:
    """(a), (b), (c) as finetune.py does it by itself on this device; then other ones of (c)."""
    if device == "cuda":
        dtype = "bfloat16"
        others = [Kind("c", False, dtype)]
    else:
        dtype = "float32"
        others = [
            Kind("c", False, dtype),
            Kind("c", True, "bfloat16"),
            Kind("c", False, "bfloat16"),
        ]
    return [Kind(letter, True, dtype) for letter in LOOPS] + others


# ---- Data ---------------------------------------------------------------------------------------


def write_pictures(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """JPEGs of smooth noise, about as large as photographs: 4 are drawn, the others are copies."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    width, height = size
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for path in paths[:4]:
        picture = Image.new("RGB", size)
        for cell, share in ((160, 1.0), (40, 0.4), (10, 0.25), (2, 0.12)):  # the last is grain
            cells = rng.integers(0, 256, (height // cell, width // cell, 3), dtype=np.uint8)
            layer = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
            picture = Image.blend(picture, layer, share)
        picture.save(path, quality=90)
    for number, path in enumerate(paths[4:]):
        shutil.copy(paths[number % 4], path)
    return [str(path) for path in paths]


def write_data(folder: Path) -> None:
    """A TRAIN_DIR of PAIRS pairs, with captions of 9 to TEXT_TOKENS tokens, stop token included."""
    write_pictures(folder / "Image", (640, 480), PAIRS)
    (folder / "caption").mkdir()
    vocabulary = ["red", "circle", "green", "background", "on", "a", "yellow"]  # a token each
    rng = random.Random(0)
    for number in range(PAIRS):
        count = TEXT_TOKENS - 1  # of the first caption, the longest
        if number:
            count = rng.randint(8, TEXT_TOKENS)
        caption = " ".join(rng.choices(vocabulary, k=count))
        (folder / "caption" / f"{number:04}.txt").write_text(caption)


# ---- The loops ----------------------------------------------------------------------------------


class OurLoop:
    """(c): finetune.py's own Captioner and Learner, on features of the pictures."""

    def __init__(
        self,
        kind: Kind,
        captioner: finetune.Captioner,
        adapter: PeftModel,
        pairs: list[finetune.Pair],
        features: list[torch.Tensor],
    ) -> None:
        self.kind = kind
        self.captioner = captioner
        self.pairs = pairs
        self.learned = list_learned(captioner, pairs)
        self.features = features
        self.learner = finetune.Learner(captioner, adapter, finetune.WEIGHT_DECAY, PAIRS)
        self.rate = 2e-4

    def step(self, indices: Sequence[int]) -> float:
        """An optimizer step on these pairs; their loss per token."""
        indices = sorted(indices, key=lambda i: -len(self.learned[i]))
        examples = [finetune.Example(self.features[i], self.pairs[i].caption) for i in indices]
        tokens = sum(len(self.learned[i]) for i in indices)
        losses = self.learner.backward(examples, tokens)
        result = self.learner.sum_over_processes(losses, len(examples), False)
        self.learner.step(self.rate, result.norm, finetune.MAX_GRAD_NORM)
        return sum(result.pair_losses) / tokens


class PlainLoop:
    """(a) and (b): whole pictures through the model, whose own loss is taken."""

    def __init__(
        self,
        kind: Kind,
        captioner: finetune.Captioner,
        adapter: PeftModel,
        pairs: list[finetune.Pair],
        pixel_values: list[np.ndarray],
    ) -> None:
        self.kind = kind
        self.captioner = captioner
        self.adapter = adapter
        self.learned = list_learned(captioner, pairs)
        self.pixel_values = pixel_values
        self.rate = 2e-4

        self.weights = []
        for weight in adapter.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()  # as PEFT does by itself
                self.weights.append(weight)
        adapter.train(kind.letter == "a")  # checkpointing acts in train mode only
        for name, module in adapter.named_modules():
            if ".lora_dropout." in name:
                module.train()
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, weight_decay=finetune.WEIGHT_DECAY
        )

    def step(self, indices: Sequence[int]) -> float:
        """An optimizer step on these pairs; their loss per token."""
        config = self.captioner.model.config
        row_builder = self.captioner.row_builder
        given = [config.image_token_index] * config.num_query_tokens + row_builder.prompt_ids
        longest = max(len(self.learned[i]) for i in indices)
        ids = []
        mask = []
        for i in indices:
            learned = self.learned[i]
            padding = longest - len(learned)
            ids.append(given + learned + [row_builder.pad_id] * padding)
            mask.append([1] * (len(given) + len(learned)) + [0] * padding)

        device = self.captioner.device
        dtype = self.captioner.dtype
        mask = torch.tensor(mask, device=device)
        ids = torch.tensor(ids, device=device)
        labels = torch.where(mask == 1, ids, -100)
        labels[:, : len(given)] = -100
        pixels = torch.from_numpy(np.stack([self.pixel_values[i] for i in indices]))

        self.optimizer.zero_grad()
        self.optimizer.param_groups[0]["lr"] = self.rate
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = self.adapter(
                pixel_values=pixels.to(device, dtype),
                input_ids=ids,
                attention_mask=mask,
                labels=labels,
                use_cache=False,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, finetune.MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.item()


def list_learned(captioner: finetune.Captioner, pairs: list[finetune.Pair]) -> list[list[int]]:
    """What is learned of each pair: the ids of its caption, and the stop token."""
    return [captioner.row_builder.label_ids(pair.caption) for pair in pairs]


def load_captioner(kind: Kind, model_id: str, device: str) -> finetune.Captioner:
    flags = ["--model-id", model_id, "--device", device, "--dtype", kind.dtype]
    flags.append("--load-in-4bit" if kind.in_4bit else "--no-load-in-4bit")
    with contextlib.redirect_stdout(sys.stderr):
        return finetune.load_captioner(finetune.parse_arguments(flags))


def load_loop(
    kind: Kind, model_id: str, data: Path, device: str, dropout: float
) -> OurLoop | PlainLoop:
    """A loop over the pairs in `data`, with a LoRA whose weights are the same for all loops."""
    captioner = load_captioner(kind, model_id, device)
    model = captioner.model
    image_processor = captioner.processor.image_processor
    with contextlib.redirect_stdout(sys.stderr):
        pairs = finetune.find_pairs(str(data), finetune.Findings())
    pictures = [pair.picture for pair in pairs]
    decoded = finetune.decode_pictures(pictures, image_processor).pixels
    pixel_values = [decoded[picture] for picture in pictures]

    if kind.letter == "c":
        features = [captioner.encode([pixels])[0].cpu() for pixels in pixel_values]
        captioner.drop_vision_side()
    elif kind.letter == "a":
        prepare_model_for_kbit_training(model)

    torch.manual_seed(finetune.SEED)
    with contextlib.redirect_stdout(sys.stderr):
        adapter = finetune.add_lora(
            model, finetune.LORA_TARGETS, finetune.LORA_RANK, finetune.LORA_ALPHA, dropout
        )
    if kind.letter == "c":
        return OurLoop(kind, captioner, adapter, pairs, features)
    return PlainLoop(kind, captioner, adapter, pairs, pixel_values)


def build_floor(loop: OurLoop) -> Callable[[], None]:
    """(d): the language model's products in a step of this loop, whose base is not in 4 bits.

    x @ W^T forward, g @ W for the gradients of activations, into memory that is there already.
    lm_head has only the learned tokens. Left out: LoRA's products, the attention's own, the
    projection, and the gradient of the first layer's input, which is frozen.
    """
    captioner = loop.captioner
    given = captioner.model.config.num_query_tokens + len(captioner.row_builder.prompt_ids)
    longest = max(len(ids) for ids in loop.learned)
    positions = PAIRS * (given + longest)
    targets = sum(len(ids) for ids in loop.learned)
    matrices: dict[tuple[int, ...], torch.Tensor] = {}  # one for each shape
    products = []  # left, right, and the memory for the result

    def matrix(*shape: int) -> torch.Tensor:
        if shape not in matrices:
            matrices[shape] = torch.randn(shape, device=captioner.device, dtype=captioner.dtype)
        return matrices[shape]

    first_inputs = tuple(f"layers.0.self_attn.{part}_proj" for part in "qkv")
    for name, module in captioner.model.language_model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "lora_" in name:
            continue
        rows = targets if name.endswith("lm_head") else positions
        outputs, inputs = module.weight.shape
        products.append((matrix(rows, inputs), module.weight.t(), matrix(rows, outputs)))
        if not any(part in name for part in first_inputs):
            products.append((matrix(rows, outputs), module.weight, matrix(rows, inputs)))

    def multiply() -> None:
        with torch.no_grad():
            for left, right, result in products:
                torch.mm(left, right, out=result)

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
        latest = " ".join(f"{seconds[-1]:.3g}" for seconds in times.values())
        say(f"round {turn} of {repeats}: {latest}")
    return {name: median(seconds[1:]) for name, seconds in times.items()}


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS is what it has, VmHWM the most that it had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def measure_peak(kind: Kind, setup: Setup) -> int:
    """The most bytes in a step of this loop, its model included.

    On a GPU, or in a process that has nothing else.
    """
    before = resident("VmRSS")
    loop = load_loop(kind, *setup)
    gc.collect()
    if loop.captioner.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loop.step(range(PAIRS))
        return torch.cuda.max_memory_allocated()

    ctypes.CDLL(None).malloc_trim(0)  # give back what loading and encoding have used
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    loop.step(range(PAIRS))
    return resident("VmHWM") - before


def call_alone(device: str, work: Callable, *arguments: Any) -> Any:
    """The result of a call; for the CPU from a process of its own, whose memory is only its own.

    Only before torch has started threads, which do not survive a fork.
    """
    if device == "cuda":
        return work(*arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work, *arguments).result()


def measure_memory(kinds: list[Kind], setup: Setup) -> dict[Kind, int]:
    """The peak of each loop, in bytes."""
    memory = {}
    for kind in kinds:
        memory[kind] = call_alone(setup.device, measure_peak, kind, setup)
        say(f"memory: {kind}: {memory[kind] / 1e6:.0f} MB")
        gc.collect()
    return memory


def measure_steps(kinds: list[Kind], setup: Setup, repeats: int) -> dict[Kind | str, float]:
    """The seconds of a step of each loop, in turns; those of the floors are under their dtype."""
    works: dict[Kind | str, Callable[[], Any]] = {}
    floors: dict[str, Callable[[], None]] = {}
    for kind in kinds:
        loop = load_loop(kind, *setup)
        works[kind] = lambda loop=loop: loop.step(range(PAIRS))
        if not kind.in_4bit:
            floors[kind.dtype] = build_floor(loop)
    return take_turns(works | floors, repeats)


class EncodingRates(NamedTuple):
    """Pictures a second."""

    decoding: float  # alone, on one core
    encoding: float  # alone
    bound: float  # the most that both at once can reach
    both: float  # of the encoding pass of a run


def measure_encoding(kind: Kind, setup: Setup, pictures: list[str], repeats: int) -> EncodingRates:
    """How fast the features of these pictures are made."""
    captioner = load_captioner(kind, setup.model_id, setup.device)
    image_processor = captioner.processor.image_processor
    threads = torch.get_num_threads()
    size = finetune.INFERENCE_BATCH
    batches = [pictures[:size], pictures[size : 2 * size]]
    pixel_values = []
    for batch in batches:
        decoded = finetune.decode_pictures(batch, image_processor).pixels
        pixel_values.append(list(decoded.values()))

    def decode() -> None:
        torch.set_num_threads(1)
        for batch in batches:
            finetune.decode_pictures(batch, image_processor)
        torch.set_num_threads(threads)

    def encode() -> None:
        for pixels in pixel_values:
            captioner.encode(pixels).cpu()

    def do_both() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            finetune.encode_pictures(
                captioner, pictures, str(setup.data), Path(folder), CORES, finetune.Findings()
            )

    seconds = take_turns({"decode": decode, "encode": encode, "both": do_both}, repeats)
    decoding = seconds["decode"] / (2 * size)  # of one picture
    encoding = seconds["encode"] / (2 * size)
    if captioner.device.type == "cpu":
        # Both want all of the same cores, so that their times add up, however they overlap.
        bound = decoding / CORES + encoding
    else:
        # A GPU encodes while the cores decode: the slower one decides.
        bound = max(decoding / CORES, encoding)
    return EncodingRates(1 / decoding, 1 / encoding, 1 / bound, len(pictures) / seconds["both"])


# ---- Tables -------------------------------------------------------------------------------------


def describe_machine(device: str) -> str:
    """Its processor, and the packages."""
    processor = "CPU"
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        after = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2]
        processor = after.split("\n")[0]
    names = ("torch", "transformers", "bitsandbytes")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{processor}, {CORES} cores; {packages}"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print()
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_steps(seconds: dict[Kind | str, float], memory: dict[Kind, int]) -> None:
    """A line for each loop, and for the floors, which go by their dtype."""
    usual, plain, *_ = seconds.values()
    rows = []
    for kind, taken in seconds.items():
        title = f"(d) matrix products, {kind}"
        of_the_floor = ""
        peak = ""
        if isinstance(kind, Kind):
            title = str(kind)
            peak = f"{memory[kind] / 1e6:.0f} MB"
            if kind.dtype in seconds:
                of_the_floor = f"{seconds[kind.dtype] / taken:.0%}"
        row = [title, f"{PAIRS / taken:.1f}", f"{usual / taken:.1f}", f"{plain / taken:.1f}"]
        rows.append([*row, of_the_floor, peak])
    header = ["one step", "pairs/s", "against (a)", "against (b)", "of the floor", "peak memory"]
    print_table(header, rows)


def print_encodings(encodings: dict[str, EncodingRates]) -> None:
    """A line for each size of pictures."""
    rows = []
    for title, rates in encodings.items():
        row = [title, f"{rates.decoding:.1f}", f"{rates.encoding:.1f}", f"{rates.both:.1f}"]
        rows.append([*row, f"{rates.both / rates.bound:.0%}"])
    header = ["pictures/s", "decoding, one core", "encoding", "both at once", "of the bound"]
    print_table(header, rows)


def print_runs(steps: dict[str, float], rate: float) -> None:
    """Runs over COMPOSED_PAIRS, computed from the seconds of a step and from pictures a second."""
    epoch_steps = math.ceil(COMPOSED_PAIRS / PAIRS)
    times = {}
    for letter, step in steps.items():
        encoding = COMPOSED_PAIRS / rate if letter == "c" else 0.0
        times[letter] = [epochs * epoch_steps * step + encoding for epochs in COMPOSED_EPOCHS]

    rows = []
    for letter in steps:
        rows.append([f"({letter})", *(f"{seconds:.0f} s" for seconds in times[letter])])
    for letter in ("a", "b"):
        ratios = [theirs / ours for theirs, ours in zip(times[letter], times["c"], strict=True)]
        rows.append([f"({letter}) / (c)", *(f"{ratio:.1f}" for ratio in ratios)])
    header = [f"a run over {COMPOSED_PAIRS} pairs, computed"]
    header += [f"EPOCHS {epochs}" for epochs in COMPOSED_EPOCHS]
    print_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after one not counted")
    parser.add_argument("--real", metavar="FOLDER", help="a model of the real size; needs a GPU")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.real and device == "cpu":
        parser.error("--real is a model of 3.7 billion parameters, and there is no GPU for it.")

    transformers.utils.logging.disable_progress_bar()
    kinds = list_kinds(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data")
        model_id = arguments.real
        if not model_id:
            model_id = str(folder / "model")
            call_alone(device, write_model, model_id, MINI)
        setup = Setup(model_id, folder / "data", device, finetune.LORA_DROPOUT)

        memory = measure_memory(kinds, setup)
        seconds = {}
        groups = [[kind] for kind in kinds] if arguments.real else [kinds]
        for group in groups:
            seconds |= measure_steps(group, setup, arguments.repeats)
            gc.collect()

        encodings = {}
        for size in ((640, 480), (4000, 3000)):
            count = 3 * CORES * finetune.INFERENCE_BATCH
            pictures = write_pictures(folder / str(size), size, count)
            title = f"{size[0]}x{size[1]} JPEG"
            encodings[title] = measure_encoding(kinds[2], setup, pictures, arguments.repeats)

    print(
        f"{describe_machine(device)}; {PAIRS} pairs, captions of up to {TEXT_TOKENS} tokens, "
        f"{arguments.repeats} rounds"
    )
    print_steps(seconds, memory)
    print_encodings(encodings)
    steps = {kind.letter: seconds[kind] for kind in kinds[:3]}
    print_runs(steps, encodings["640x480 JPEG"].both)


if __name__ == "__main__":
    main()
