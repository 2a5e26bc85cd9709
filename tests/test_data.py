"""Folders of captions and pictures: what --check lists, and what it says of all that is not used.

Most tests are cases: files, and the pairs and reasons that a person who looks at them expects.
Tables are in test_tables.py, the pictures themselves in test_pictures.py.
"""

import json
import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import (
    ODD_NAMES,
    Case,
    assert_no_control_characters,
    assert_reasons,
    encode_picture,
    flags_of,
    for_each_case,
    snapshot,
    write_file,
    write_files,
    write_picture,
)
from PIL import Image

import finetune

CAFE = unicodedata.normalize("NFC", "café")  # the accent is in the letter, as Windows stores it
CAFE_APART = unicodedata.normalize("NFD", "café")  # an accent of its own, as macOS stores it

GOOD = {"good.jpg": None, "good.txt": "a cat"}

# ---- Layouts ------------------------------------------------------------------------------------

FOLDERS = [
    Case(
        "one caption for a folder of pictures, at any depth",
        {
            "caption/rose.txt": "a rose",
            "Image/rose/1.png": None,
            "Image/rose/deep/er/2.png": None,
            "Image/rose.webp": None,
        },
        pairs=[
            ("Image/rose/1.png", "a rose"),
            ("Image/rose/deep/er/2.png", "a rose"),
            ("Image/rose.webp", "a rose"),
        ],
    ),
    Case(
        "a name with a dot",
        {"caption/v1.5.txt": "a rose", "Image/v1.5/1.png": None, "Image/v1.5.webp": None},
        pairs=[("Image/v1.5/1.png", "a rose"), ("Image/v1.5.webp", "a rose")],
    ),
    Case(
        "accents stored in another way",
        {
            f"caption/{CAFE}.txt": "a café",
            f"Image/{CAFE_APART}/1.png": None,
            f"caption/{CAFE_APART}s.txt": "cafés",
            f"Image/{CAFE}s.png": None,
        },
        pairs=[(f"Image/{CAFE_APART}/1.png", "a café"), (f"Image/{CAFE}s.png", "cafés")],
    ),
    Case(
        "names without a partner",
        {
            "caption/rose.txt": "a rose",
            "Image/rose/1.png": None,
            "caption/alone.txt": "a cat",
            "Image/bird/1.png": None,
        },
        pairs=[("Image/rose/1.png", "a rose")],
        reasons={
            "caption/alone.txt": "no picture with this name",
            "Image/bird/1.png": "no caption with this name",
        },
    ),
    Case(
        "two captions of one name",
        {
            "caption/rose.txt": "a rose",
            "Image/rose/1.png": None,
            "caption/two.txt": "a cat",
            "caption/two.TXT": "a dog",
            "Image/two.png": None,
        },
        pairs=[("Image/rose/1.png", "a rose")],
        reasons={
            "caption/two.txt": "2 captions",
            "caption/two.TXT": "2 captions",
            "Image/two.png": "2 captions",
        },
    ),
    Case(
        "a caption that can't be used is told of its pictures too",
        {
            "caption/rose.txt": "a rose",
            "Image/rose/1.png": None,
            "caption/empty.txt": "",
            "Image/empty/1.png": None,
        },
        pairs=[("Image/rose/1.png", "a rose")],
        reasons={"caption/empty.txt": "empty", "Image/empty/1.png": "empty"},
    ),
    Case(
        "files in caption/ that are no captions",
        {
            "caption/rose.txt": "a rose",
            "Image/rose/1.png": None,
            "caption/notes.md": "a cat",
            "caption/deeper/cat.txt": "a cat",
        },
        pairs=[("Image/rose/1.png", "a rose")],
        reasons={
            "caption/notes.md": "only .txt files in caption/ itself are read",
            "caption/deeper/cat.txt": "only .txt files in caption/ itself are read",
        },
    ),
    Case(
        "text that is named as a picture",
        {"caption/rose.txt": "a rose", "Image/rose/1.png": None, "Image/rose/2.jpg": "a cat"},
        pairs=[("Image/rose/1.png", "a rose")],
        reasons={"Image/rose/2.jpg": "is text, not a picture"},
    ),
    Case(
        "hidden files, and those that desktops leave, are not mentioned",
        {
            "caption/rose.txt": "a rose",
            "caption/.hidden.txt": "ignored",
            "caption/Thumbs.db": "ignored",
            "caption/desktop.ini": "ignored",
            "caption/__MACOSX/rose.txt": "ignored",
            "caption/.git/rose.txt": "ignored",
            "Image/rose/1.png": None,
            "Image/rose/.hidden.png": "ignored",
            "Image/rose/Thumbs.db": "ignored",
            "Image/rose/desktop.ini": "ignored",
            "Image/rose/__MACOSX/1.png": "ignored",
            "Image/rose/.git/1.png": "ignored",
        },
        pairs=[("Image/rose/1.png", "a rose")],
    ),
]

NEXT_TO_EACH_OTHER = [
    Case(
        "a caption next to each picture, at any depth",
        {
            "1.png": None,
            "1.jpg": None,
            "1.txt": "one",
            "a/b/1.png": None,
            "a/b/1.TXT": "deep",
            "a/1.5.png": None,
            "a/1.5.txt": "a dot",
        },
        pairs=[("1.png", "one"), ("1.jpg", "one"), ("a/b/1.png", "deep"), ("a/1.5.png", "a dot")],
        says=("2 pictures share their .txt", "rename one of the two"),
    ),
    Case(
        "accents stored in another way, next to each other",
        {f"a/{CAFE}.webp": None, f"a/{CAFE_APART}.txt": "a café"},
        pairs=[(f"a/{CAFE}.webp", "a café")],
    ),
    Case(
        "names without a partner, next to each other",
        {**GOOD, "a/good.png": None, "a/alone.txt": "a dog"},
        pairs=[("good.jpg", "a cat")],
        reasons={
            "a/good.png": "there is no caption with this name",
            "a/alone.txt": "there is no picture with this name",
        },
    ),
]


@for_each_case(FOLDERS, NEXT_TO_EACH_OTHER)
def test_check_lists_each_pair_and_names_what_is_not_used(check_case, case):
    check_case(case)


@pytest.mark.parametrize(
    "files, layout",
    [
        ({"caption/rose.txt": "a rose", "Image/rose.png": None}, "caption/ and Image/"),
        ({"rose.txt": "a rose", "rose.png": None}, "<name>.txt next to each picture"),
    ],
)
def test_check_says_which_layout_it_has_found(check, tmp_path, files, layout):
    data = tmp_path / "data"
    write_files(data, files)
    assert f"layout of {data}: {layout}\n" in check(data).out


def test_links_and_pipes_are_named_and_not_followed(check, tmp_path):
    data = tmp_path / "data"
    write_files(
        data,
        {
            "caption/rose.txt": "a rose",
            "Image/rose/1.png": None,
            "Image/pipe.png": None,
            "Image/lost/1.png": None,
        },
    )
    os.mkfifo(data / "caption/pipe.txt")
    (data / "caption/lost.txt").symlink_to("nowhere")
    (data / "Image/rose/away").symlink_to(tmp_path)

    result = check(data)

    assert result.pairs == [("Image/rose/1.png", "a rose")]
    assert_reasons(
        result.skipped,
        {
            "caption/pipe.txt": "not a file",
            "Image/pipe.png": "not a file",
            "caption/lost.txt": "No such file",
            "Image/lost/1.png": "No such file",
            "Image/rose/away": "link",
        },
    )


def test_check_takes_all_flags_of_a_training(check, small_data):
    flags = {"EPOCHS": 3, "PROMPT": "x", "LOAD_IN_4BIT": False, "DEVICE": "cuda:7"}
    result = check(small_data, "--restart", **flags)
    assert result.code == 0
    assert len(result.pairs) == 12


def train_on(folder: Path, base: str, output: Path) -> bytes:
    """The adapter that is learned from this folder in one epoch."""
    settings = {"TRAIN_DIR": folder, "MODEL_ID": base, "OUTPUT_DIR": output, "EPOCHS": 1}
    assert finetune.main(flags_of(settings)) == 0
    return (output / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def drawings(sample, tmp_path_factory) -> Path:
    """Three drawings for each caption of the sample, in caption/ and Image/."""
    folder = tmp_path_factory.mktemp("drawings") / "data"
    shutil.copytree(sample, folder, ignore=shutil.ignore_patterns(".features", "0[4-9]*", "1*"))
    return folder


@pytest.fixture(scope="module")
def adapter_of_the_drawings(drawings, opt_base) -> bytes:
    return train_on(drawings, opt_base, drawings.with_name("out"))


@pytest.mark.parametrize(
    "layout", ["metadata.csv", "metadata.jsonl", "<name>.txt next to each picture"]
)
def test_the_same_pairs_in_another_layout_give_the_same_adapter(
    drawings, adapter_of_the_drawings, opt_base, tmp_path, capsys, layout
):
    captions = {}
    for path in sorted((drawings / "caption").glob("*.txt")):
        for picture in sorted((drawings / "Image" / path.stem).rglob("*.png")):
            name = os.path.relpath(picture, drawings)
            captions[name] = path.read_text(encoding="utf-8").strip()
    assert len(captions) == 48

    data = tmp_path / "data"
    shutil.copytree(drawings / "Image", data / "Image")
    if layout == "metadata.csv":
        lines = [f'{name},"{caption}"\n' for name, caption in captions.items()]
        write_file(data / layout, "".join(["file_name,text\n", *lines]).encode())
    elif layout == "metadata.jsonl":
        rows = [{"file_name": name, "text": caption} for name, caption in captions.items()]
        write_file(data / layout, "\n".join(json.dumps(row) for row in rows).encode())
    else:
        for name, caption in captions.items():
            write_file((data / name).with_suffix(".txt"), caption.encode())

    adapter = train_on(data, opt_base, tmp_path / "out")

    assert adapter == adapter_of_the_drawings
    output = capsys.readouterr().out
    assert f"layout of {data}: {layout}\n" in output
    assert "not used" not in output


# ---- No pair at all -----------------------------------------------------------------------------

COMMANDS = pytest.mark.parametrize("flags", [(), ("--check",)], ids=["training", "check"])


@COMMANDS
def test_a_folder_that_is_not_there_is_named(refused, tmp_path, flags):
    error = refused(*flags, TRAIN_DIR=tmp_path / "none")
    assert repr(str(tmp_path / "none")) in error

    (tmp_path / "products").mkdir()
    error = refused(*flags, TRAIN_DIR=tmp_path / "Product")
    assert "Did you mean 'products'?" in error


@COMMANDS
@pytest.mark.parametrize("near", ["Images", "image", "photos"])
def test_without_a_pair_the_error_says_what_is_there_and_what_is_wanted(
    command, tmp_path, flags, near
):
    data = tmp_path / "data"
    for number in range(12):
        write_file(data / f"caption/alone {number:02}.txt", b"a cat")
    write_picture(data / near / "alone 00.png")

    code, out, err = command(*flags, TRAIN_DIR=data, MODEL_ID="no-such/model")

    assert code == 1
    assert "The folder contains " in err
    for words in (repr(near), "caption/<name>.txt", "metadata.csv", "<name>.jpg"):
        assert words in err
    assert ("Images" in err) == (near == "Images")
    named = re.findall(r"^  \S+(?: \d\d\.txt)?: ", out, re.M)
    assert len(named) == (13 if flags else 10)  # captions and the folder; a training names ten


@pytest.mark.parametrize(
    "files, says_rename",
    [
        ({"Images/a.jpg": None, "captions/a.txt": "a cat"}, True),
        ({"images/a.jpg": None, "labels/a.txt": "0 0.5 0.5"}, False),
    ],
    ids=["both under another name", "pictures alone"],
)
def test_a_folder_is_to_be_renamed_only_where_that_helps(refused, tmp_path, files, says_rename):
    write_files(tmp_path / "data", files)

    error = refused(TRAIN_DIR=tmp_path / "data")

    assert ("rename it to 'Image'" in error) == says_rename
    assert ("rename it to 'caption'" in error) == says_rename


@COMMANDS
@pytest.mark.parametrize(
    "training, measured", [("unreadable", ""), ("unreadable", "data"), ("data", "unreadable")]
)
def test_a_picture_that_can_not_be_read_is_no_pair(
    command, small_data, opt_base, monkeypatch, flags, training, measured
):
    """Not to train on, and not to measure on."""
    monkeypatch.chdir(small_data.parent)
    write_files(Path("unreadable"), {"a.jpg": "no picture", "a.txt": "a cat"})

    code, _, _ = command(
        *flags, TRAIN_DIR=training, VALIDATION_DIR=measured, MODEL_ID=opt_base, EPOCHS=1
    )

    assert code == 1


# ---- Odd names ----------------------------------------------------------------------------------


class OddFiles(NamedTuple):
    """A TRAIN_DIR with a caption, a picture and two faults for each odd name, as it is printed."""

    folder: Path
    pairs: list[tuple[str, str]]
    skipped: set[str]


@pytest.fixture
def odd_files(tmp_path) -> OddFiles:
    data = tmp_path / "odd 'data' %s {0}"
    pairs = []
    skipped = set()
    for name, shown in ODD_NAMES.items():
        caption = f"a {name} cat </s>".encode(errors="replace")
        write_file(data / f"caption/{name}.txt", caption)
        write_file(data / f"caption/{name} alone.txt", caption)
        write_picture(data / f"Image/{name}/{name}")
        write_file(data / f"Image/{name}/cut.png", b"\x89PNG\r\n\x1a\n")

        caption_shown = finetune.printable(" ".join(caption.decode().split()))
        if not name.endswith(".exe"):  # by its extension, it is not a picture
            pairs.append((f"Image/{shown}/{shown}", caption_shown))
        skipped.add(f"caption/{shown} alone.txt")
        skipped.add(f"Image/{shown}/cut.png")
    return OddFiles(data, sorted(pairs), skipped)


def test_odd_names_and_captions_are_one_line_each(check, odd_files):
    result = check(odd_files.folder)
    assert_no_control_characters(result.out.replace("\t", "") + result.err)
    assert result.pairs == odd_files.pairs
    assert result.skipped.keys() == odd_files.skipped


def test_odd_names_and_captions_can_be_trained_on(command, odd_files, opt_base, tmp_path):
    base = shutil.copytree(opt_base, tmp_path / "odd 'base' %s {0}")
    output = tmp_path / "odd 'output' %s {0}"
    before = snapshot(odd_files.folder)

    def train(prompt: str) -> str:
        code, out, err = command(
            TRAIN_DIR=odd_files.folder,
            MODEL_ID=base,
            OUTPUT_DIR=output,
            PROMPT=prompt,
            EPOCHS=1,
            SAMPLE_COUNT=99,
            VALIDATION_FRACTION=0.5,
            MAX_CAPTION_TOKENS=20,  # two captions have just as many
        )
        assert (code, err) == (0, "")
        assert_no_control_characters(out)
        return out

    assert "cut: 5 captions are longer than MAX_CAPTION_TOKENS = 20" in train("a photo of")
    assert "this run is finished" in train(" a  photo\nof ")
    assert "the earlier run is in" in train("")

    skipped = set()
    for row in finetune.read_csv(output / "skipped.csv"):
        skipped.add(finetune.printable(os.path.relpath(row["path"], odd_files.folder)))
    assert skipped == odd_files.skipped
    shutil.rmtree(odd_files.folder / ".features")
    assert snapshot(odd_files.folder) == before


def test_the_name_of_a_folder_is_printed_on_one_line(command, small_data):
    folder = small_data.rename(small_data.with_name("odd \x1b[1m\n data"))
    _, out, err = command("--check", TRAIN_DIR=folder)
    assert_no_control_characters(out.replace("\t", "") + err)


# ---- New: names that differ only a little -------------------------------------------------------

NEAR_NAMES = [
    Case(
        "small and capital letters",
        {
            **GOOD,
            "IMG_001.JPG": None,
            "img_001.txt": "a rose",
            "b/Rose.png": None,
            "b/rose.txt": "x",
        },
        pairs=[("good.jpg", "a cat")],
        reasons={
            "IMG_001.JPG": ("there is", "img_001.txt"),
            "img_001.txt": ("there is", "IMG_001.JPG"),
            "b/Rose.png": ("there is", "rose.txt"),
            "b/rose.txt": ("there is", "Rose.png"),
        },
    ),
    Case(
        "small and capital letters of extensions are the same",
        {"IMG_002.JPG": None, "IMG_002.TXT": "a tulip"},
        pairs=[("IMG_002.JPG", "a tulip")],
    ),
    Case(
        "small and capital letters in caption/ and Image/",
        {
            "caption/good.txt": "a cat",
            "Image/good/1.png": None,
            "caption/Rose.txt": "a rose",
            "Image/rose/1.png": None,
            "caption/tulip.txt": "a tulip",
            "Image/TULIP.png": None,
        },
        pairs=[("Image/good/1.png", "a cat")],
        reasons={
            "caption/Rose.txt": ("there is", "Image/rose"),
            "Image/rose/1.png": ("there is", "Rose.txt"),
            "caption/tulip.txt": ("there is", "TULIP.png"),
            "Image/TULIP.png": ("there is", "tulip.txt"),
        },
    ),
    Case(
        "a caption with the picture's extension in its name",
        {**GOOD, "a.jpg": None, "a.jpg.txt": "a rose"},
        pairs=[("good.jpg", "a cat")],
        reasons={"a.jpg": "there is 'a.jpg.txt'", "a.jpg.txt": "there is 'a.jpg'"},
    ),
    Case(
        "a caption with the picture's extension in its name, in caption/",
        {
            "caption/good.txt": "a cat",
            "Image/good/1.png": None,
            "caption/rose.png.txt": "a rose",
            "Image/rose.png": None,
        },
        pairs=[("Image/good/1.png", "a cat")],
        reasons={
            "caption/rose.png.txt": ("there is", "rose.png'"),
            "Image/rose.png": ("there is", "rose.png.txt"),
        },
    ),
    Case(
        "a caption with another extension",
        {**GOOD, "a.jpg": None, "a.md": "a rose"},
        pairs=[("good.jpg", "a cat")],
        reasons={"a.jpg": "there is 'a.md'"},
    ),
    Case(
        "other pictures of this name are no captions",
        {**GOOD, "a.jpg": None, "a.png": None, "A.webp": None},
        pairs=[("good.jpg", "a cat")],
        reasons={
            "a.jpg": "there is no caption with this name",
            "a.png": "there is no caption with this name",
            "A.webp": "there is no caption with this name",
        },
    ),
]


@for_each_case(NEAR_NAMES)
def test_the_reason_names_the_file_whose_name_is_nearly_the_same(check_case, case):
    check_case(case)


# ---- New: files that are no pictures by their extension -----------------------------------------

NO_PICTURES = [
    Case(
        "text without a picture's extension",
        {**GOOD, "good.tags": "1girl", "good.txt~": "a dog", "LICENSE": "MIT", "Picasa.ini": "[x]"},
        pairs=[("good.jpg", "a cat")],
        reasons={"LICENSE": "no caption", "Picasa.ini": "no caption"},
        says=("2 files",),
    ),
    Case(
        "cameras' raw files, of which a TIFF reader would see the thumbnail",
        {
            "a.jpg": None,
            "a.txt": "a rose",
            "a.CR3": b"\0\0\0\x18ftypcrx " + bytes(90),
            "b.NEF": encode_picture(Image.new("RGB", (16, 12), "red"), "TIFF"),
            "b.txt": "a tulip",
            "c.heic": b"\0\0\0\x18ftypmsf1" + bytes(90),
            "c.txt": "a lily",
        },
        pairs=[("a.jpg", "a rose")],
        reasons={
            "a.CR3": "is a camera's raw file, which is not read; save it as JPEG",
            "b.NEF": "is a camera's raw file, which is not read; save it as JPEG",
            "c.heic": "is HEIC",
        },
    ),
    Case(
        "what phones and cameras leave next to a picture",
        {
            "a.jpg": None,
            "a.txt": "a rose",
            "a.cr2": b"II*\0\x10\0\0\0CR" + bytes(90),
            "a.mov": b"\0\0\0\x14ftypqt  ",
            "a.json": "{}",
            "a.npz": b"PK\x03\x04",
            "a.AAE": "<?xml version='1.0'?>",
        },
        pairs=[("a.jpg", "a rose")],
        reasons={"a.cr2": ""},
        says=("4 files",),
    ),
    Case(
        "video, sound, text and archives",
        {
            **GOOD,
            "good.mp4": "x",
            "b.zip": "x",
            "README.md": "x",
            "page.html": "x",
            "x.pdf": "x",
            "x.MP3": "x",
            "x.py": "x",
        },
        pairs=[("good.jpg", "a cat")],
        says=("7 files",),
    ),
    Case(
        "one file",
        {**GOOD, "a/b/clip.MOV": "x"},
        pairs=[("good.jpg", "a cat")],
        says=("1 file ",),
    ),
    Case(
        "beside the two folders of this layout",
        {
            "caption/rose.txt": "a rose",
            "Image/rose/1.png": None,
            "2.png": None,
            "notes.txt": "x",
            "clip.mov": "x",
            "Image2/rose/3.png": None,
        },
        pairs=[("Image/rose/1.png", "a rose")],
        reasons={
            "Image2": "is a folder other than caption/ and Image/",
            "2.png": "is neither in caption/ nor in Image/",
            "notes.txt": "is neither in caption/ nor in Image/",
        },
        says=("1 file ",),
    ),
    Case(
        "in Image/",
        {
            "caption/rose.txt": "a rose",
            "Image/rose/1.png": None,
            "Image/rose/1.mov": "x",
            "Image/rose/notes.json": "{}",
            "Image/list.csv": "a,b\n",
        },
        pairs=[("Image/rose/1.png", "a rose")],
        says=("3 files",),
    ),
    Case(
        "what --caption has printed into a file",
        {**GOOD, "captions.tsv": "good.jpg\ta cat\t0.9876\nother.jpg\ta dog\t0.5000\n"},
        pairs=[("good.jpg", "a cat")],
    ),
    Case(
        "a caption whose picture is a video",
        {**GOOD, "a.mov": "x", "a.txt": "a rose"},
        pairs=[("good.jpg", "a cat")],
        reasons={"a.txt": "no picture with this name"},
    ),
    Case(
        "pictures that are not read are named",
        {
            **GOOD,
            "good.heic": b"\0\0\0\x18ftypheic" + bytes(90),
            "good.psd": b"8BPS\0\1" + bytes(90),
            "good.NEF": b"MM\0*\0\0\0\x08" + bytes(90),
            "good.svg": "<svg xmlns='http://www.w3.org/2000/svg'></svg>",
            "b.svg": "<?xml version='1.0'?><svg></svg>",
            "b.txt": "a rose",
        },
        pairs=[("good.jpg", "a cat")],
        reasons={
            "good.heic": "JPEG",
            "good.svg": "JPEG",
            "good.psd": "JPEG",
            "good.NEF": "",
            "b.svg": "JPEG",
        },
    ),
    Case(
        "pictures without an extension, or with an unknown one, are read",
        {
            "a": None,
            "a.txt": "one",
            "b.picture": None,
            "b.txt": "two",
            "c.jpg_large": None,
            "c.txt": "3",
        },
        pairs=[("a", "one"), ("b.picture", "two"), ("c.jpg_large", "3")],
    ),
]


@for_each_case(NO_PICTURES)
def test_files_that_are_no_pictures_are_counted_and_not_named(check_case, case):
    check_case(case)
