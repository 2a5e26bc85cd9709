"""hard_words in the results: the words of the held-out captions that cost the highest loss."""

import json
import shutil

import pytest

import finetune


@pytest.fixture(scope="module", params=["opt", "t5"])
def results(request, sample, tmp_path_factory) -> dict:
    """Of a run in which chance decides one word of each caption: no picture tells it."""
    folder = tmp_path_factory.mktemp("words")
    rows = []
    (folder / "data").mkdir()
    for number, picture in enumerate(sorted(sample.glob("Image/*/*.png"))):
        word = "star" if hash_number(number) else "moon"
        shutil.copy(picture, folder / "data" / f"{number:03}.png")
        rows.append((f"{number:03}.png", f"a red {word} on white"))
    finetune.write_csv(folder / "data/metadata.csv", [("file_name", "text"), *rows])
    flags = ["--train-dir", folder / "data", "--output-dir", folder / "out"]
    flags += ["--model-id", request.getfixturevalue(f"{request.param}_base")]
    flags += ["--learning-rate", "3e-3", "--epochs", "6", "--validation-fraction", "0.3"]
    flags += ["--max-caption-tokens", "8"]  # an untrained T5 never ends a caption
    assert finetune.main([str(flag) for flag in flags]) == 0
    return json.loads((folder / "out/settings.json").read_text())["results"]


def hash_number(number: int) -> int:
    """0 or 1, without a pattern."""
    return (number * 2654435761 >> 16) % 2


def test_what_the_picture_does_not_tell_costs_most(results):
    words = results["hard_words"]

    assert set(list(words)[:2]) == {"star", "moon"}
    assert words["red"] < results["mean_word_loss"] < words["star"]
    losses = list(words.values())
    assert losses == sorted(losses, reverse=True)
    assert len(losses) <= 10
