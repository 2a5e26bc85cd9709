"""CIDEr-D against the figures of coco-caption, and confidence against probabilities by hand.

Their figures come from `pip install pycocoevalcap==1.2` and, with PYTHONPATH=.:tests,

    import re
    from pycocoevalcap.cider.cider import Cider
    from test_measures import CIDER_CASES

    def tokens(texts):
        return [" ".join(re.findall(r"\\w+(?:'\\w+)?", text.lower())) for text in texts]

    for case in CIDER_CASES:
        captions = {}
        references = {}
        for number, (caption, texts) in enumerate(case.pictures):
            captions[number] = tokens([caption])
            references[number] = tokens(texts)
        print(case.name, float(Cider().compute_score(references, captions)[0]))
"""

from typing import NamedTuple

import pytest
from helpers import PlainModel, read_captions, read_table, write_several

import finetune

# ---- CIDEr-D ------------------------------------------------------------------------------------


class CiderCase(NamedTuple):
    name: str
    score: float  # CIDEr-D as coco-caption computes it
    pictures: list[tuple[str, list[str]]]  # the caption and the references of each


CIDER_CASES = [
    CiderCase(
        "one to five references",
        3.5461716,
        [
            ("a dog runs on the grass", ["a dog runs over the grass"]),
            ("two men play chess", ["two men play chess in a park", "men at a chess board"]),
            (
                "a red bus in the street",
                [
                    "a red bus",
                    "a bus drives down the street",
                    "the red bus in a street of the town",
                ],
            ),
            (
                "a cat sleeps on a red sofa",
                [
                    "a cat on a sofa",
                    "a cat sleeps",
                    "the cat sleeps on the red sofa",
                    "a sleeping cat",
                ],
            ),
            (
                "a child eats an apple",
                [
                    "a child eats",
                    "a girl eats an apple",
                    "a bite",
                    "an apple",
                    "a child eats an apple",
                ],
            ),
        ],
    ),
    CiderCase(
        "identical references",
        5.3041062,
        [
            ("a dog on the grass", ["a dog on grass", "a dog on grass", "a dog on grass"]),
            ("a cat in a box", ["a cat in a box", "a cat in a box"]),
            ("a bird", ["the bird sings"]),
        ],
    ),
    CiderCase("one picture", 0.0, [("a red circle", ["a red circle", "a disc"])]),
    CiderCase(
        "empty captions",
        1.5217373,
        [("", ["a cat"]), ("a dog on the grass", ["a dog on grass"]), ("", ["a bird"])],
    ),
    CiderCase(
        "words that are repeated",
        1.1973086,
        [
            ("dog dog dog dog dog dog", ["a dog and a dog"]),
            ("a cat a cat a cat", ["a cat", "a cat and a cat a"]),
            ("the the the the", ["the bird"]),
        ],
    ),
    CiderCase(
        "spelling",
        4.7381259,
        [
            ("it's the children's 'best' toy", ["it's the childrens' best toy"]),
            ("A Dog, running; FAST!", ["a dog running fast.", "Dog: fast"]),
            ("(a cat) -- on_the_mat", ["A cat on the mat", "a cat, on_the_mat"]),
            ("一只 红色 的 猫", ["一只 红色 的 狗", "..."]),
            ("кошка НА столе", ["Кошка на столе"]),
        ],
    ),
    CiderCase(
        "no word in common",
        1.8932391,
        [
            ("two zebras", ["a dog", "the dog runs"]),
            ("a cat on a mat", ["a cat on the mat", "cats"]),
            ("the bus stops here", ["the bus stops", "a red bus"]),
        ],
    ),
]


@pytest.mark.parametrize("case", CIDER_CASES, ids=[case.name for case in CIDER_CASES])
def test_cider_d_is_that_of_coco_caption(case):
    captions = [caption for caption, _ in case.pictures]
    references = [texts for _, texts in case.pictures]

    score = finetune.cider_d(captions, references)

    assert score == pytest.approx(case.score, rel=0, abs=1e-6)


def test_cider_d_is_none_where_all_references_are_the_same():
    """No word is rarer than another. One of the two captions is exact."""
    references = ["a dog", "a dog"]

    measures = finetune.measure_captions(["", "a dog"], [references, references])

    assert measures == {"exact": 1 / 2, "cider_d": None}


def test_cider_d_is_none_for_one_picture():
    """A caption is exact where it equals any of the references."""
    measures = finetune.measure_captions(["a dog"], [["a cat", "a dog"]])

    assert measures == {"exact": 1, "cider_d": None}


# ---- Confidence ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, beams, max_tokens, prompt, epochs, rate",
    [
        ("opt", 1, 64, "a photo of", 6, 3e-3),
        ("opt", 1, 2, "", 1, 3e-3),  # which cuts all captions before they end
        ("opt", 3, 16, "", 14, 3e-3),
        ("t5", 1, 12, "say it", 10, 1e-2),
        ("t5", 3, 16, "", 10, 1e-2),
    ],
)
def test_confidence_is_the_mean_probability_of_the_tokens(
    kind, beams, max_tokens, prompt, epochs, rate, request, sample, command, tmp_path
):
    """In held_out.csv and from --caption, as plain transformers and PEFT compute it.

    The 18 pictures are captioned in two batches.
    """
    base = request.getfixturevalue(f"{kind}_base")
    data = write_several(tmp_path / "data", sample, 18)
    code, _, error = command(
        MODEL_ID=base,
        TRAIN_DIR=data,
        LOAD_IN_4BIT=False,
        PROMPT=prompt,
        MAX_CAPTION_TOKENS=max_tokens,
        NUM_BEAMS=beams,
        EPOCHS=epochs,
        LEARNING_RATE=rate,
        VALIDATION_FRACTION=0.67,
    )
    assert code == 0, error
    code, output, error = command("--caption", f"{data}/pictures", NUM_BEAMS=beams)
    assert code == 0, error
    captions = read_captions(output)
    assert len(captions) == 18

    rows = {row["picture"]: row for row in read_table(tmp_path / "out/held_out.csv")}
    assert f"{data}/pictures/17.png" in rows  # from the second batch
    assert len({row["confidence"] for row in rows.values()}) > 3
    plain = PlainModel(base, tmp_path / "out", prompt)
    some_end = False
    for picture, row in rows.items():
        # The stop token is one more than MAX_CAPTION_TOKENS.
        caption, confidence, ends = plain.caption(picture, max_tokens + 1, beams)
        some_end = some_end or ends
        assert 0 < confidence < 1
        assert row["after"] == caption
        assert float(row["confidence"]) == pytest.approx(confidence, rel=1e-4)
        assert captions[picture] == (caption, pytest.approx(confidence, abs=2e-4))
    assert some_end == (max_tokens > 2)

    _, output, _ = command("--caption", f"{data}/pictures")  # with one beam, whatever was trained
    if beams == 1:
        assert read_captions(output) == captions
    else:
        assert read_captions(output) != captions
