"""CIDEr-D against the figures of coco-caption, and confidence against probabilities by hand.

Their figures come from `pip install pycocoevalcap==1.2 numpy` and, in the repository:

    import ast, re
    from pycocoevalcap.cider.cider import Cider

    def tokens(some):
        return [" ".join(re.findall(r"\\w+(?:'\\w+)?", text.lower())) for text in some]

    for node in ast.parse(open("tests/test_measures.py", encoding="utf-8").read()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CASES":
            for name, (captions, references, _) in ast.literal_eval(node.value).items():
                theirs = {i: tokens([text]) for i, text in enumerate(captions)}
                texts = {i: tokens(some) for i, some in enumerate(references)}
                print(name, float(Cider().compute_score(texts, theirs)[0]))
"""

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

import finetune

CASES = {  # captions, the references of each picture, coco-caption's CIDEr-D
    "one to five references": (
        ["a dog runs on the grass", "two men play chess", "a red bus in the street",
         "a cat sleeps on a red sofa", "a child eats an apple"],
        [["a dog runs over the grass"], ["two men play chess in a park", "men at a chess board"],
         ["a red bus", "a bus drives down the street", "the red bus in a street of the town"],
         ["a cat on a sofa", "a cat sleeps", "the cat sleeps on the red sofa", "a sleeping cat"],
         ["a child eats", "a girl eats an apple", "a bite", "an apple", "a child eats an apple"]],
        3.5461716),
    "identical references": (
        ["a dog on the grass", "a cat in a box", "a bird"],
        [["a dog on grass", "a dog on grass", "a dog on grass"],
         ["a cat in a box", "a cat in a box"], ["the bird sings"]], 5.3041062),
    "equal to the references": (
        ["a dog on the grass", "a cat in a box"], [["a dog on the grass"], ["a cat in a box"]], 10),
    "the same for all": (["a circle", "a star"], [["a red circle"], ["a red circle"]], 0.0),
    "one picture": (["a red circle"], [["a red circle", "a disc"]], 0.0),
    "two pictures": (
        ["a red circle over there", "a green star"],
        [["a red circle over there", "a disc"], ["a star of green", "a green star"]], 4.8782717),
    "empty captions": (
        ["", "a dog on the grass", ""], [["a cat"], ["a dog on grass"], ["a bird"]], 1.5217373),
    "empty references": (["a dog", "a cat"], [["...", "a dog"], ["a cat", "?!"]], 2.5),
    "no word in common": (
        ["one two three four", "five six"], [["a b c d e"], ["f g h", "i j k"]], 0.0),
    "words again and again": (
        ["dog dog dog dog dog dog", "a cat a cat a cat", "the the the the"],
        [["a dog and a dog"], ["a cat", "a cat and a cat a"], ["the bird"]], 1.1973086),
    "apostrophes": (
        ["the dog's ball isn't red", "it's the children's 'best' toy", "rock 'n' roll"],
        [["the dog's ball is not red", "the dogs' ball isn't red"],
         ["it's the childrens' best toy"], ["rock'n'roll", "rock n roll"]], 3.7114299),
    "capitals and punctuation": (
        ["A Dog, running; FAST!", "(a cat) -- on_the_mat", "No. 5: a well-known 3.5-inch disk"],
        [["a dog running fast.", "Dog: fast"], ["A cat on the mat", "a cat, on_the_mat"],
         ["no 5, a well known 3 5 inch disk"]], 6.8505279),
    "other scripts": (
        ["Ein schöner Hund läuft", "一只 红色 的 猫", "кошка НА столе"],
        [["ein SCHÖNER Hund"], ["一只 红色 的 狗", "红色 的 猫"], ["Кошка на столе"]], 6.2444472),
    "long ones": (
        ["a man in a blue shirt stands on a ladder and cleans the window of a house in the street",
         "a long table with plates of food and glasses of water in the garden of the old hotel by "
         "the sea in the evening with many guests and a band that plays music", "a street"],
        [["a man on a ladder", "a man in blue on a ladder cleaning the window of a house"],
         ["a long table with plates and glasses in a garden"],
         ["a street in the town with a long row of old houses and a man on a bus"]], 0.3731806),
    "one word and two": (
        ["pin", "enamel pin", "a star", "star"],
        [["pin"], ["enamel pin", "pin"], ["star"], ["a star", "two stars"]], 1.8013065),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cider_d_is_that_of_coco_caption(name):
    captions, references, theirs = CASES[name]
    assert finetune.cider_d(captions, references) == pytest.approx(theirs, rel=0, abs=1e-6)


def test_a_measure_that_says_nothing_is_none():
    def measure(captions: list[str], references: list[list[str]]) -> dict[str, float | None]:
        return finetune.measure([SimpleNamespace(references=texts, before="-", after=caption)
                                 for caption, texts in zip(captions, references, strict=True)],
                                "after")  # fmt: skip

    captions, references = ["a dog", "a bird"], [["a cat", "a dog"], ["a cow"]]
    assert measure(captions, references) == {
        "exact": 0.5, "cider_d": pytest.approx(finetune.cider_d(captions, references))}
    assert measure([], []) == {"exact": None, "cider_d": None}
    assert measure(captions[:1], references[:1]) == {"exact": 1, "cider_d": None}
    alike = [["a dog"], ["a dog", "a dog"], ["a dog"]]
    assert measure(["a dog", "a cat", ""], alike) == {
        "exact": pytest.approx(1 / 3), "cider_d": None}


# ---- Confidence ---------------------------------------------------------------------------------


class Plain:
    """The base with the adapter, by plain transformers and PEFT: whole pictures, whole passes."""

    def __init__(self, base: str, folder: Path, prompt: str) -> None:
        self.processor, self.prompt = Blip2Processor.from_pretrained(folder), prompt
        model = Blip2ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, folder).eval()
        self.text = model.config.text_config

    @torch.no_grad()
    def predict(self, inputs: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
        """The probabilities of all words before each of the ids, and after the last."""
        if self.text.model_type == "t5":
            decoder_ids = torch.tensor([[self.text.decoder_start_token_id, *ids]])
            return self.model(**inputs, decoder_input_ids=decoder_ids).logits[0].softmax(-1)
        more = torch.tensor([ids], dtype=torch.long)
        text = torch.cat([inputs["input_ids"], more], dim=1)
        logits = self.model(pixel_values=inputs["pixel_values"], input_ids=text,
                            attention_mask=torch.ones_like(text)).logits[0]
        return logits[-len(ids) - 1 :].softmax(-1)

    def caption(self, picture: str, most: int, beams: int = 1) -> tuple[str, float, bool]:
        """Caption, confidence, whether it ends with the stop token; greedily, token by token."""
        image, stop = Image.open(picture).convert("RGB"), self.text.eos_token_id
        inputs = dict(self.processor(images=image, text=self.prompt, return_tensors="pt"))
        ids, probabilities = [], []
        if beams > 1:
            first = 1 if self.text.model_type == "t5" else inputs["input_ids"].shape[1]
            ids = self.model.generate(**inputs, num_beams=beams, do_sample=False,
                                      max_new_tokens=most)[0, first:].tolist()  # fmt: skip
            ids = ids[: ids.index(stop) + 1] if stop in ids else ids
            probabilities = self.predict(inputs, ids)[range(len(ids)), ids].tolist()
        while beams == 1 and len(ids) < most and stop not in ids:
            probability, best = self.predict(inputs, ids)[-1].max(-1)
            ids.append(best.item())
            probabilities.append(probability.item())
        text = " ".join(self.processor.decode(ids, skip_special_tokens=True).split())
        return text, math.prod(probabilities) ** (1 / len(ids)), stop in ids


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_several(folder: Path, sample: Path, count: int) -> Path:
    """A TRAIN_DIR with a table: `count` pictures, each with three, four or five captions."""
    (folder / "pictures").mkdir(parents=True)
    rows, pictures = [], sorted(sample.glob("Image/*/*.png"))
    for number in range(count):
        picture = pictures[number * len(pictures) // count]
        shape, colour, _, ground = picture.parent.name.split("-")
        texts = [f"{colour} {shape}", f"{colour} disc over {ground}", f"a {shape}, {colour}",
                 f"a {ground} background with a {colour} {shape}", f"ein «{shape}»"]
        name = f"pictures/{number:02}.png"
        shutil.copy(picture, folder / name)
        rows += [{"file_name": name, "text": text} for text in texts[: 3 + number % 3]]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def read_captions(output: str) -> dict[str, tuple[str, float]]:
    """What --caption prints: picture, caption, confidence."""
    lines = [line.split("\t") for line in output.splitlines()]
    return {picture: (caption, float(confidence)) for picture, caption, confidence in lines}


@pytest.mark.parametrize("kind, most, prompt, epochs", [
    ("opt", 64, "a photo of", 6), ("opt", 2, "", 1), ("t5", 12, "say it", 30),
])  # fmt: skip
def test_confidence_is_the_mean_of_greedy_probabilities(
    kind, most, prompt, epochs, request, small_data, command, tmp_path
):
    """With a stop token, and with captions that are cut before they have one."""
    base = request.getfixturevalue(f"{kind}_base")
    code, _, error = command(
        MODEL_ID=base, TRAIN_DIR=small_data, LOAD_IN_4BIT=False, EPOCHS=epochs,
        LEARNING_RATE=3e-3, VALIDATION_FRACTION=0.5, MAX_CAPTION_TOKENS=most, PROMPT=prompt)
    assert code == 0, error
    plain, ended = Plain(base, tmp_path / "out", prompt), []
    rows = read_table(tmp_path / "out/held_out.csv")
    code, output, error = command("--caption", str(small_data / "Image"))
    assert (code, len(output.splitlines())) == (0, 12), error
    captions = read_captions(output)
    for row in rows:
        caption, confidence, stopped = plain.caption(row["picture"], most + 1)
        ended.append(stopped)
        assert row["after"] == caption and 0 < confidence < 1
        assert float(row["confidence"]) == pytest.approx(confidence, rel=1e-4)
        assert captions[row["picture"]] == (caption, pytest.approx(confidence, abs=2e-4))
    assert len(rows) == 6 and len({row["confidence"] for row in rows}) > 3
    assert any(ended) == (most > 2)


def test_three_beams(any_base, sample, command, monkeypatch, tmp_path):
    """By flag and by the constant, whatever the training had; more probable than greedy."""
    data = write_several(tmp_path / "data", sample, 12)
    code, _, error = command(
        MODEL_ID=any_base, TRAIN_DIR=data, LOAD_IN_4BIT=False, EPOCHS=20, LEARNING_RATE=3e-3,
        VALIDATION_FRACTION=0.5, MAX_CAPTION_TOKENS=16, NUM_BEAMS=3)
    assert code == 0, error
    pictures = str(data / "pictures")
    code, output, error = command("--caption", pictures, "--num-beams", "3")
    assert code == 0, error
    beams, plain = read_captions(output), Plain(any_base, tmp_path / "out", "")
    for row in read_table(tmp_path / "out/held_out.csv"):
        caption, confidence, _ = plain.caption(row["picture"], 17, beams=3)
        assert row["after"] == caption and 0 < confidence < 1
        assert float(row["confidence"]) == pytest.approx(confidence, rel=1e-4)
        assert beams[row["picture"]] == (caption, pytest.approx(confidence, abs=2e-4))
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "NUM_BEAMS", 3)
        assert command("--caption", pictures)[1] == output
    greedy = read_captions(command("--caption", pictures)[1])  # whatever the training had
    assert greedy.keys() == beams.keys() and greedy != beams
    found, usual = (sum(math.log(one) for _, one in some.values()) for some in (beams, greedy))
    assert found > usual
