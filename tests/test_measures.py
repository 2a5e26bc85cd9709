"""CIDEr-D against the figures of coco-caption, and confidence against probabilities by hand.

Their figures come from `pip install pycocoevalcap==1.2` and, with PYTHONPATH=.:tests,

    import re
    from pycocoevalcap.cider.cider import Cider
    from test_measures import CASES

    def tokens(texts):
        return [" ".join(re.findall(r"\\w+(?:'\\w+)?", text.lower())) for text in texts]

    for name, (captions, references, _) in CASES.items():
        theirs = {i: tokens([text]) for i, text in enumerate(captions)}
        texts = {i: tokens(some) for i, some in enumerate(references)}
        print(name, float(Cider().compute_score(texts, theirs)[0]))
"""

import pytest
from helpers import PlainModel, read_captions, read_table, write_several

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
    "one picture": (["a red circle"], [["a red circle", "a disc"]], 0.0),
    "empty captions": (
        ["", "a dog on the grass", ""], [["a cat"], ["a dog on grass"], ["a bird"]], 1.5217373),
    "words again and again": (
        ["dog dog dog dog dog dog", "a cat a cat a cat", "the the the the"],
        [["a dog and a dog"], ["a cat", "a cat and a cat a"], ["the bird"]], 1.1973086),
    "spelling": (
        ["it's the children's 'best' toy", "A Dog, running; FAST!", "(a cat) -- on_the_mat",
         "一只 红色 的 猫", "кошка НА столе"],
        [["it's the childrens' best toy"], ["a dog running fast.", "Dog: fast"],
         ["A cat on the mat", "a cat, on_the_mat"], ["一只 红色 的 狗", "..."], ["Кошка на столе"]],
        4.7381259),
    "no word in common": (
        ["two zebras", "a cat on a mat", "the bus stops here"],
        [["a dog", "the dog runs"], ["a cat on the mat", "cats"], ["the bus stops", "a red bus"]],
        1.8932391),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cider_d_is_that_of_coco_caption(name):
    captions, references, theirs = CASES[name]
    assert finetune.cider_d(captions, references) == pytest.approx(theirs, rel=0, abs=1e-6)


@pytest.mark.parametrize("references, captions", [
    (["a dog", "a dog"], ["", "a dog"]), (["a cat", "a dog"], ["a dog"])])  # fmt: skip
def test_cider_d_is_none_where_all_captions_are_the_same_or_of_one_picture(references, captions):
    """Exact is what equals any of the references."""
    measures = finetune.measure_captions(captions, [references] * len(captions))
    assert measures == {"exact": 1 / len(captions), "cider_d": None}


@pytest.mark.parametrize("kind, beams, most, prompt, epochs", [
    ("opt", 1, 64, "a photo of", 6), ("opt", 1, 2, "", 1), ("t5", 1, 12, "say it", 30),
    ("opt", 3, 16, "", 20), ("t5", 3, 16, "", 30),
])  # fmt: skip
def test_confidence(kind, beams, most, prompt, epochs, request, sample, command, tmp_path):
    """Of pictures from two encoded batches; with a stop token, or cut before they have one."""
    base = request.getfixturevalue(f"{kind}_base")
    data = write_several(tmp_path / "data", sample, 18)
    code, _, error = command(
        MODEL_ID=base,
        TRAIN_DIR=data,
        LOAD_IN_4BIT=False,
        EPOCHS=epochs,
        LEARNING_RATE=3e-3,
        VALIDATION_FRACTION=0.67,
        MAX_CAPTION_TOKENS=most,
        PROMPT=prompt,
        NUM_BEAMS=beams,
    )
    assert code == 0, error
    code, output, error = command("--caption", f"{data}/pictures", NUM_BEAMS=beams)
    assert code == 0, error
    captions, plain = read_captions(output), PlainModel(base, tmp_path / "out", prompt)
    rows, ended = {row["picture"]: row for row in read_table(tmp_path / "out/held_out.csv")}, []
    for picture, row in rows.items():
        caption, confidence, stopped = plain.caption(picture, most + 1, beams)
        ended.append(stopped)
        assert row["after"] == caption and 0 < confidence < 1
        assert float(row["confidence"]) == pytest.approx(confidence, rel=1e-4)
        assert captions[picture] == (caption, pytest.approx(confidence, abs=2e-4))
    assert len(captions) == 18 and len({row["confidence"] for row in rows.values()}) > 3
    assert any(ended) == (most > 2) and f"{data}/pictures/17.png" in rows
    greedy = read_captions(command("--caption", f"{data}/pictures")[1])  # as NUM_BEAMS is here
    assert (greedy == captions) == (beams == 1)
