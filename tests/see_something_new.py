"""Can LoRA teach what the model's own captions never tell apart? An experiment on the tiny base.

    python tests/see_something_new.py [--what side] [--targets attention qformer ...]

Draws pictures whose captions name something that the tiny base was never taught to keep, such as
the side on which the shape stands. The vision tower's output tells it, the Q-Former's hardly does.
The tiny base knows few words, so those for the background stand for what is new: "scarlet disc over
ivory" says that the disc is on the left, "scarlet disc over jet" that it is on the right.

Each of the LORA_TARGETS is trained through the command line of finetune.py, and then captions new
pictures. The table counts those that are captioned exactly, those with the right word for what is
new, and those whose other words are right. By chance, half of the new words are right.

About five minutes for each of the targets on two cores.
"""

import argparse
import csv
import io
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from make_tiny_blip2 import DRAWINGS, HERE, SAMPLE_STYLE, caption, draw
from PIL import Image

SCRIPT = HERE.parent / "finetune.py"
TARGETS = ("attention", "qformer", "qformer+attention")
KINDS = ("side", "height")  # of what is new
LOW, HIGH = "white", "black"  # what stands for left or up, and for right or down
NEAREST = 0.05  # how far from the middle, of the width of a picture, the shape stands at least
FARTHEST = 0.12  # and at most: at the edge, the Q-Former's output tells it too


class Labeled(NamedTuple):
    """A drawing and its caption."""

    picture: Image.Image
    caption: str  # its last word is the one for what is new


def measure(picture: Image.Image, what: str) -> float:
    """Where the shape stands, from 0 (left, up) to 1. 0.5 is the middle."""
    pixels = np.asarray(picture).astype(int)
    background = pixels[0, 0]
    is_shape = np.abs(pixels - background).sum(axis=2) > 40
    rows, columns = np.nonzero(is_shape)
    if what == "side":
        return columns.mean() / picture.width
    return rows.mean() / picture.height


def draw_labeled(count: int, what: str, seed: int) -> list[Labeled]:
    """Drawings that show what is named: neither hardly, nor at the very edge."""
    chooser = random.Random(seed)
    found = []
    while len(found) < count:
        shape, colour, ground = chooser.choice(DRAWINGS)
        picture = draw((shape, colour, ground), chooser.randrange(2**40))
        value = measure(picture, what)
        if NEAREST < abs(value - 0.5) < FARTHEST:
            word = LOW if value < 0.5 else HIGH
            found.append(Labeled(picture, caption((shape, colour, word), SAMPLE_STYLE)))
    return found


def write_folder(folder: Path, drawings: list[Labeled]) -> None:
    """A TRAIN_DIR with a table."""
    folder.mkdir()
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for number, labeled in enumerate(drawings):
            labeled.picture.save(folder / f"{number:05}.png")
            writer.writerow([f"{number:05}.png", labeled.caption])


def run_script(*flags: str) -> str:
    """What finetune.py writes to stdout."""
    command = [sys.executable, str(SCRIPT), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def caption_new(output: Path, folder: Path, count: int) -> list[str]:
    """What the adapter says of the pictures in a folder, in their order."""
    lines = run_script("--caption", str(folder), "--output-dir", str(output), "--device", "cpu")
    rows = list(csv.reader(io.StringIO(lines), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == count
    return [said for _, said, _ in sorted(rows)]


def score(said: list[str], new: list[Labeled]) -> tuple[float, float, float]:
    """Exact, the new word right, the other words right: of 100."""
    exact = 0
    word_right = 0
    wording_right = 0
    for text, labeled in zip(said, new, strict=True):
        said_wording, _, said_word = text.rpartition(" ")
        wording, _, word = labeled.caption.rpartition(" ")
        exact += int(text == labeled.caption)
        word_right += int(said_word == word)
        wording_right += int(said_wording == wording)
    return tuple(100 * count / len(new) for count in (exact, word_right, wording_right))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=KINDS, default="side")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--pictures", type=int, default=2500, help="to train on")
    parser.add_argument("--new", type=int, default=300, help="pictures to caption")
    parser.add_argument("--epochs", type=int, default=14)
    arguments = parser.parse_args()

    new = draw_labeled(arguments.new, arguments.what, seed=2)
    print("| LORA_TARGETS | exact, % | new word right, % | other words right, % |")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        train_dir = Path(temporary, "train")
        new_dir = Path(temporary, "new")
        write_folder(train_dir, draw_labeled(arguments.pictures, arguments.what, seed=1))
        write_folder(new_dir, new)
        for targets in arguments.targets:
            output = Path(temporary, f"out-{targets}")
            run_script(
                *("--model-id", str(HERE / "tiny_blip2"), "--device", "cpu"),
                *("--train-dir", str(train_dir), "--output-dir", str(output)),
                *("--lora-targets", targets, "--epochs", str(arguments.epochs)),
                *("--learning-rate", "3e-3", "--validation-fraction", "0"),
            )
            said = caption_new(output, new_dir, len(new))
            exact, word, wording = score(said, new)
            print(f"| {targets} | {exact:.0f} | {word:.0f} | {wording:.0f} |", flush=True)


if __name__ == "__main__":
    main()
