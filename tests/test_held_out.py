"""What is held out to measure on: a part of TRAIN_DIR, or another folder."""

import os
import shutil
from collections import defaultdict

import pytest
from helpers import read_table, write_file, write_picture
from PIL import Image

import finetune

# ---- Another folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, named", [(("--check",), 12), ((), 10)], ids=["check", "training"])
def test_a_picture_to_train_and_to_measure_on_is_told(command, small_data, tmp_path, flags, named):
    """--check names all of them, a training the first ten."""
    trained = sorted(small_data.rglob("*.png"))
    folder = shutil.copytree(small_data, tmp_path / "measured")
    measured = sorted(folder.rglob("*.png"))
    for path in measured:  # of the same size, and yet another file
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    measured[0].unlink()
    measured[0].symlink_to(trained[0])
    copies = [measured[0]]
    for number in range(10, 21):
        copy = measured[1].with_stem(f"copy{number}")
        shutil.copy(trained[7], copy)
        copies.append(copy)

    _, out, _ = command(
        *flags, TRAIN_DIR=small_data, VALIDATION_DIR=folder, MODEL_ID="no-such/model"
    )

    [warning] = [line for line in out.splitlines() if "warning: 12 pictures " in line]
    assert [copy for copy in copies if str(copy) in warning] == copies[:named]
    for path in measured[1:]:
        assert str(path) not in warning


def hold_out(
    pairs: list[finetune.Pair], fraction: float = 0.1, seed: int = 42, root: str = "/x"
) -> set[str]:
    """The pictures that are held out, by their paths in `root`."""
    training, held_out = finetune.split_pairs(pairs, fraction, seed, root, {})
    assert sorted(training + held_out) == sorted(pairs)
    training_pictures = {os.path.relpath(pair.picture, root) for pair in training}
    held_out_pictures = {os.path.relpath(pair.picture, root) for pair in held_out}
    assert not training_pictures & held_out_pictures
    return held_out_pictures


@pytest.fixture
def pairs() -> list[finetune.Pair]:
    """Those of 200 pictures, four of which have 41 captions each."""
    made = []
    for number in range(200):
        for caption in range(41 if number % 50 == 0 else 1):
            made.append(finetune.Pair(f"/x/{number:03}.png", f"caption {caption}"))
    return made


@pytest.mark.parametrize("fraction, count", [(0, 0), (0.1, 20), (0.25, 50), (0.999, 199)])
def test_a_fraction_of_the_pictures_is_held_out(pairs, fraction, count):
    assert len(hold_out(pairs, fraction)) == count


def test_at_least_one_picture_is_held_out_and_never_all(pairs):
    nine_pictures = pairs[41:50]
    assert len(hold_out(nine_pictures, 0.01)) == 1
    one_picture = pairs[:1]
    assert hold_out(one_picture, 0.5) == set()


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_order(pairs):
    first = hold_out(pairs)
    assert hold_out(pairs[::-1]) == first
    assert hold_out(pairs, seed=1) != first


def test_a_larger_fraction_holds_out_the_same_pictures_and_more(pairs):
    assert hold_out(pairs, 0.1) < hold_out(pairs, 0.25)


def test_the_same_is_held_out_when_the_folder_has_moved(pairs):
    moved = [pair._replace(picture=f"/elsewhere{pair.picture}") for pair in pairs]
    assert hold_out(moved, root="/elsewhere/x") == hold_out(pairs)


def test_a_new_picture_changes_places_with_one_at_most(pairs):
    first = hold_out(pairs)
    for number in range(20):
        more = hold_out([*pairs, finetune.Pair(f"/x/new {number}.png", "a cat")])
        assert len(more) == 20
        assert len(first - more) <= 1


def test_pictures_of_the_same_size_in_bytes_are_no_copies(command, tmp_path, opt_base):
    data = tmp_path / "data"
    for number in range(8):
        picture = Image.new("RGB", (24, 24), "white")
        picture.paste((30 * number, 0, 160), (4, 4, 20, 20))
        write_file(data / f"{number}.txt", b"a cat")
        picture.save(data / f"{number}.bmp")
    assert len({path.stat().st_size for path in data.glob("*.bmp")}) == 1

    code, out, _ = command(TRAIN_DIR=data, MODEL_ID=opt_base, EPOCHS=1, VALIDATION_FRACTION=0.5)

    assert code == 0
    assert "pairs: 4 to train on, 4 held out" in out
    assert "copies" not in out


# ---- New: copies --------------------------------------------------------------------------------


def test_copies_of_a_picture_are_on_the_same_side(command, tmp_path, opt_base):
    data = tmp_path / "data"
    for number in range(20):
        for name in (f"IMG_{number}", f"IMG_{number} (1)", f"old/{number}"):
            write_picture(data / f"{name}.png", number)
            write_file(data / f"{name}.txt", f"drawing {number}".encode())

    code, out, err = command(
        TRAIN_DIR=data, MODEL_ID=opt_base, EPOCHS=1, VALIDATION_FRACTION=0.5, SAMPLE_COUNT=0
    )

    assert (code, err) == (0, "")
    sides = defaultdict(set)
    for row in read_table(tmp_path / "out/pairs.csv"):
        sides[row["caption"]].add(row["split"])
    assert len(sides) == 20
    for caption, splits in sides.items():
        assert len(splits) == 1, caption
    assert {"train"} in sides.values()
    assert {"held out"} in sides.values()
    [line] = [line for line in out.splitlines() if "copies of others" in line]
    assert "all trained on, or all held out" in line
