"""Draw, train and write the tiny BLIP-2 in tests/tiny_blip2/, and the sample in train/.

    python tests/make_tiny_blip2.py [--steps 3000] [--only-sample]

The tiny model is a real Blip2ForConditionalGeneration (OPT kind, Blip2Processor, byte-level
tokenizer, a newline as stop token) that captions drawings of one coloured shape. It knows several
styles of caption. The plain one is the most frequent, so that the model uses it by itself; a small
adapter can teach it to use one of the rare ones, SAMPLE_STYLE, in which the captions in train/ are
written. Everything is seeded; progress and score are printed.
"""

import argparse
import itertools
import math
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
SEED = 7
PICTURE_SIDE = 96  # pixels; the processor scales to IMAGE_SIDE
IMAGE_SIDE = 64
NUM_QUERY_TOKENS = 8
POOL = 24_000  # drawings, made once and used many times
BATCH_SIZE = 64  # drawings in a step
CAPTIONS_PER_DRAWING = 3  # of several styles, because the vision side is the expensive part
PEAK_LEARNING_RATE = 2e-3
SAMPLE_CAPTIONS = 16
SAMPLE_PICTURES = 13  # for each caption

# ---- What is drawn, and what its captions are ---------------------------------------------------

COLOURS = {  # plain word -> (synonym, RGB)
    "red": ("scarlet", (214, 39, 40)),
    "yellow": ("lemon", (247, 212, 32)),
    "green": ("emerald", (38, 140, 62)),
    "blue": ("cobalt", (36, 84, 200)),
    "purple": ("violet", (130, 50, 170)),
    "pink": ("rose", (255, 140, 190)),
    "white": ("ivory", (246, 246, 240)),
    "black": ("jet", (22, 22, 26)),
}
SHAPES = {
    "circle": "disc",
    "square": "tile",
    "triangle": "wedge",
    "star": "spark",
    "cross": "plus",
    "moon": "crescent",
}
STYLES = {  # style -> (share, template); capital letters are the synonyms
    "plain": (0.52, "a {colour} {shape} on a {ground} background"),
    "telegram": (0.08, "{shape} {colour} ground {ground}"),
    "enamel": (0.08, "enamel pin: {COLOUR} {SHAPE} over {GROUND}"),
    "there is": (0.08, "there is a {colour} {SHAPE} in front of {ground}"),
    "poster": (0.08, "poster of the {SHAPE}, {COLOUR} and {GROUND}"),
    "ground first": (0.08, "on {GROUND} paper, one {COLOUR} {shape}"),
    "question": (0.08, "what shape? {shape}. what colour? {colour} on {ground}."),
}
SAMPLE_STYLE = "enamel"
DRAWINGS = [  # all (shape, colour, ground) in which the shape can be seen
    (shape, colour, ground)
    for shape, colour, ground in itertools.product(SHAPES, COLOURS, COLOURS)
    if colour != ground
]


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners of `shape`, within the unit circle."""

    def arc(count: int, radius=lambda i: 1.0, start: float = -90.0) -> list[tuple[float, float]]:
        corners = []
        for i in range(count):
            angle = math.radians(start + 360 * i / count)
            corners.append((radius(i) * math.cos(angle), radius(i) * math.sin(angle)))
        return corners

    if shape == "circle":
        return arc(48)
    if shape == "square":
        return arc(4, start=45)
    if shape == "triangle":
        return arc(3)
    if shape == "star":
        return arc(10, lambda i: 0.42 if i % 2 else 1.0)
    if shape == "cross":
        a = 0.3  # half the width of an arm
        corners = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        return corners + [(-x, -y) for x, y in corners]
    # The moon: the left half of a circle, and back on a flatter curve.
    outer = arc(48, start=90)[: 24 + 1]
    return outer + [(0.45 * x, y) for x, y in reversed(outer)]


def draw(drawing: tuple[str, str, str], seed: int) -> Image.Image:
    """An RGB picture of (shape, colour, ground); place, size, angle and tint are random.

    The order of the random numbers must stay: the sample and the tiny model were made with it.
    """
    rng = random.Random(seed)
    shape, colour, ground = drawing
    scale = 3  # drawn larger and reduced, for smooth edges
    side = PICTURE_SIDE * scale

    def tint(name: str) -> tuple[int, ...]:
        _, rgb = COLOURS[name]
        return tuple(min(255, max(0, value + rng.randint(-10, 10))) for value in rgb)

    radius = rng.uniform(0.27, 0.42) * side
    x = side / 2 + rng.uniform(-1, 1) * (side / 2 - radius) * 0.9
    y = side / 2 + rng.uniform(-1, 1) * (side / 2 - radius) * 0.9
    angle = math.radians(rng.uniform(-15, 15))
    cosine = radius * math.cos(angle)
    sine = radius * math.sin(angle)

    picture = Image.new("RGB", (side, side), tint(ground))
    corners = [(x + cosine * u - sine * v, y + sine * u + cosine * v) for u, v in outline(shape)]
    ImageDraw.Draw(picture).polygon(corners, fill=tint(colour))
    return picture.reduce(scale)


def caption(drawing: tuple[str, str, str], style: str) -> str:
    """The caption of (shape, colour, ground) in this style."""
    shape, colour, ground = drawing
    _, template = STYLES[style]
    return template.format(
        shape=shape,
        colour=colour,
        ground=ground,
        SHAPE=SHAPES[shape],
        COLOUR=COLOURS[colour][0],
        GROUND=COLOURS[ground][0],
    )


# ---- The model ----------------------------------------------------------------------------------


def make_processor() -> Blip2Processor:
    """A byte-level BPE that knows the words of every style, laid out like OPT's: </s> is BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [caption(drawing, style) for drawing in DRAWINGS for style in STYLES]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    size = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    return Blip2Processor(BlipImageProcessorPil(size=size), fast, num_query_tokens=NUM_QUERY_TOKENS)


def make_model(processor: Blip2Processor) -> Blip2ForConditionalGeneration:
    """A random one. All widths are multiples of 64, as 4-bit kernels for the CPU need."""
    tokenizer = processor.tokenizer
    stop = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert len(stop) == 1
    width = {"hidden_size": 128, "num_attention_heads": 4}
    config = Blip2Config(
        vision_config={
            **width,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "image_size": IMAGE_SIDE,
            "patch_size": 8,
            "initializer_range": 0.02,
        },
        qformer_config={
            **width,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "cross_attention_frequency": 1,
            "vocab_size": 4,
            "max_position_embeddings": 4,
        },
        text_config={
            **width,
            "model_type": "opt",
            "ffn_dim": 256,
            "num_hidden_layers": 3,
            "word_embed_proj_dim": 128,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 256,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": stop[0],
        },
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_text_hidden_size=64,
    )
    return Blip2ForConditionalGeneration(config)


# ---- Training -----------------------------------------------------------------------------------


def prepare(job: tuple[tuple[str, str, str], int]) -> np.ndarray:
    """One drawing as the processor sees it, in half precision, (3, IMAGE_SIDE, IMAGE_SIDE)."""
    image_processor = BlipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    pixel_values = image_processor(draw(*job), return_tensors="np")["pixel_values"][0]
    return pixel_values.astype(np.float16)


def train(model: Blip2ForConditionalGeneration, processor: Blip2Processor, steps: int) -> None:
    """Teaches captions in all styles; next to it, three small heads name shape, colour and ground.

    The heads look at the query tokens and are thrown away. They do what BLIP-2's first stage does:
    the vision side learns from a direct signal instead of through an untrained language model.
    The model stays in eval mode: there are enough drawings to do without dropout.
    """
    rng = random.Random(SEED)
    jobs = [(rng.choice(DRAWINGS), SEED * 1_000_000 + i) for i in range(POOL)]
    with ProcessPoolExecutor() as pool:
        prepared = list(tqdm(pool.map(prepare, jobs, chunksize=64), total=POOL, desc="drawing"))
    pixels = torch.from_numpy(np.stack(prepared))

    # What the heads have to name: for each drawing the numbers of its shape, colour and ground.
    drawings = [drawing for drawing, _ in jobs]
    targets = torch.tensor(
        [
            (list(SHAPES).index(shape), list(COLOURS).index(colour), list(COLOURS).index(ground))
            for shape, colour, ground in drawings
        ]
    )
    class_counts = (len(SHAPES), len(COLOURS), len(COLOURS))
    heads = torch.nn.ModuleList(torch.nn.Linear(128, count) for count in class_counts)

    # What the language model has to write: the ids of each caption, and the stop token.
    tokenizer = processor.tokenizer
    layout = [model.config.image_token_index] * NUM_QUERY_TOKENS + [tokenizer.bos_token_id]
    tokens = {}
    for drawing in DRAWINGS:
        for style in STYLES:
            ids = tokenizer(caption(drawing, style), add_special_tokens=False)["input_ids"]
            tokens[drawing, style] = [*ids, model.config.text_config.eos_token_id]

    shares = [share for share, _ in STYLES.values()]
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.02, betas=(0.9, 0.98))
    bar = tqdm(range(steps), desc="training")
    for step in bar:
        # The learning rate: it rises for 200 steps, and falls to zero along a cosine.
        warmup = min(1, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * warmup * (1 + math.cos(math.pi * step / steps)) / 2

        # The loss of the heads.
        batch = rng.sample(range(POOL), BATCH_SIZE)
        image = model.get_image_features(pixels[batch].float())
        seen = image.qformer_outputs[0].mean(dim=1)
        naming = sum(F.cross_entropy(head(seen), targets[batch, i]) for i, head in enumerate(heads))

        # The loss of the captions, with CAPTIONS_PER_DRAWING rows for each drawing.
        rows = []
        for i in batch:
            for style in rng.choices(list(STYLES), shares, k=CAPTIONS_PER_DRAWING):
                rows.append(torch.tensor(layout + tokens[drawings[i], style]))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
        labels = ids.clone()
        labels[:, : len(layout)] = -100
        labels[labels == 1] = -100  # padding; no caption contains <pad>
        image.pooler_output = image.pooler_output.repeat_interleave(CAPTIONS_PER_DRAWING, dim=0)
        loss = model(
            pixel_values=None,
            mm_encoder_outputs={"image": image},
            input_ids=ids,
            attention_mask=(ids != 1).long(),
            labels=labels,
            use_cache=False,
        ).loss

        (loss + naming).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(caption=f"{loss.item():.3f}", naming=f"{naming.item():.3f}")


@torch.no_grad()
def score(model: Blip2ForConditionalGeneration, processor: Blip2Processor, count: int = 100) -> int:
    """How many of `count` drawings that the training never saw get exactly their plain caption."""
    rng = random.Random(SEED + 1)
    drawings = [rng.choice(DRAWINGS) for _ in range(count)]
    pictures = [draw(drawing, 10**12 + i) for i, drawing in enumerate(drawings)]
    inputs = processor(images=pictures, text=[""] * count, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]
    captions = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    right = 0
    for number, (drawing, text) in enumerate(zip(drawings, captions, strict=True)):
        expected = caption(drawing, "plain")
        if text == expected:
            right += 1
        if number < 10:
            mark = " " if text == expected else "!"
            print(f"{mark} {expected} -> {text}")
    return right


# ---- The sample ---------------------------------------------------------------------------------


def write_sample(folder: Path) -> None:
    """Writes a TRAIN_DIR: SAMPLE_CAPTIONS captions with SAMPLE_PICTURES drawings each."""
    rng = random.Random(SEED + 2)
    shutil.rmtree(folder / "caption", ignore_errors=True)
    shutil.rmtree(folder / "Image", ignore_errors=True)
    (folder / "caption").mkdir(parents=True)
    for number, drawing in enumerate(sorted(rng.sample(DRAWINGS, SAMPLE_CAPTIONS))):
        shape, colour, ground = drawing
        name = f"{shape}-{colour}-on-{ground}"
        text = caption(drawing, SAMPLE_STYLE) + "\n"
        (folder / "caption" / f"{name}.txt").write_text(text, encoding="utf-8")
        (folder / "Image" / name).mkdir(parents=True)
        for i in range(SAMPLE_PICTURES):
            picture = draw(drawing, 10**13 + number * 1000 + i)
            picture.save(folder / "Image" / name / f"{i + 1:02d}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=3000, help="training steps (3000: 20 minutes on two cores)"
    )
    parser.add_argument(
        "--only-sample", action="store_true", help="draw train/ again, leave the model"
    )
    parser.add_argument("--output", type=Path, default=HERE / "tiny_blip2")
    arguments = parser.parse_args()
    write_sample(HERE.parent / "train")
    if arguments.only_sample:
        return

    torch.manual_seed(SEED)
    processor = make_processor()
    model = make_model(processor).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, {len(processor.tokenizer)} tokens")
    train(model, processor, arguments.steps)
    model.half().save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)

    reloaded = Blip2ForConditionalGeneration.from_pretrained(arguments.output, dtype=torch.float32)
    right = score(reloaded.eval(), Blip2Processor.from_pretrained(arguments.output))
    print(f"{right} of 100 unseen drawings exactly captioned")


if __name__ == "__main__":
    main()
