"""Captions in files of their own are read as an editor shows them, and what is none is named."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import LFS_POINTER, Case, for_each_case, write_files

import finetune

TEXT = "a “café” – 5 €"
GOOD = {"good.jpg": None, "good.txt": "a cat"}


def caption_is(name: str, content: str | bytes, caption: str) -> Case:
    """A caption file, and the caption that is read from it."""
    return Case(name, {"a.jpg": None, "a.txt": content}, pairs=[("a.jpg", caption)])


def caption_is_not_used(name: str, content: str | bytes, *words: str) -> Case:
    """A caption file that can't be used, with words of the reason, next to one that can."""
    return Case(
        name,
        {"a.jpg": None, "a.txt": content, **GOOD},
        pairs=[("good.jpg", "a cat")],
        reasons={"a.jpg": words, "a.txt": words},
    )


CAPTIONS = [
    caption_is("UTF-8", TEXT, TEXT),
    caption_is("UTF-8 with a byte order mark", b"\xef\xbb\xbf" + TEXT.encode(), TEXT),
    caption_is("UTF-16 little-endian", b"\xff\xfe" + TEXT.encode("utf-16-le"), TEXT),
    caption_is("UTF-16 big-endian", b"\xfe\xff" + TEXT.encode("utf-16-be"), TEXT),
    caption_is("white space", "\n a\r\n\t\t“café” \u2028\xa0\x0b– 5 €\n", TEXT),
    caption_is("as long as it may be", "x" * 1_000_000, "x" * 1_000_000),
    caption_is_not_used("Windows-1252", TEXT.encode("cp1252"), "UTF-8; save it in UTF-8"),
    caption_is_not_used("ISO-2022-JP", "赤いバラ".encode("iso2022_jp"), "ISO-2022-JP", "UTF-8"),
    caption_is_not_used("UTF-16 without a mark", TEXT.encode("utf-16-le"), "UTF-8"),
    caption_is_not_used("half a letter of UTF-16", b"\xff\xfea", "UTF-8"),
    caption_is_not_used("zeros", bytes(99), "not text", "UTF-8"),
    caption_is_not_used("nothing", b"", "empty"),
    caption_is_not_used("only white space", " \r\n\u3000", "empty"),
    caption_is_not_used("too long", "x" * 1_000_001, "1 MB"),
    caption_is_not_used("git-annex", "/annex/objects/SHA256E-s61--0123.txt\n", "git annex get"),
    caption_is_not_used("SVG", "<svg xmlns='http://www.w3.org/2000/svg'></svg>", "is XML"),
    caption_is_not_used("a picture", b"\x89PNG\r\n\x1a\n" + bytes(50), "is a picture, not text"),
    caption_is("a name of a format", "RIFF, see WEBP or AVI", "RIFF, see WEBP or AVI"),
    caption_is("a name of another format", "P5 7 8 nuts on a table", "P5 7 8 nuts on a table"),
]


@for_each_case(CAPTIONS)
def test_a_caption_is_one_line_of_text_or_is_named(check_case, case):
    check_case(case)


def test_the_readmes_command_converts_a_caption_to_utf_8(check, tmp_path):
    readme = (Path(finetune.__file__).parent / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(r"`([^`]*1252[^`]* rose\.txt)`", readme)
    write_files(tmp_path / "data", {"rose.jpg": None, "rose.txt": TEXT.encode("cp1252")})

    subprocess.run(["bash", "-c", command], cwd=tmp_path / "data", check=True)

    assert check(tmp_path / "data").pairs == [("rose.jpg", TEXT)]


def test_letters_that_the_model_does_not_know_are_counted(command, t5_base, small_data, tmp_path):
    """As in Flan-T5, whose tokenizer has no bytes to fall back to."""
    base = shutil.copytree(t5_base, tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    tokenizer["model"]["unk_token"] = "<unk>"
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    first, second, third = sorted(small_data.glob("caption/*.txt"))
    first.write_text("a \u6f22 cat", encoding="utf-8")
    second.write_text("a \u6f22 cat", encoding="utf-8")
    third.write_text("cat 2", encoding="utf-8")

    code, out, err = command(TRAIN_DIR=small_data, MODEL_ID=base, EPOCHS=1)

    assert (code, err) == (0, "")
    assert "unknown: 1 caption has" in out


# ---- New: captions as an editor shows them ------------------------------------------------------

LETTERS_WITHOUT_WIDTH = [
    caption_is_not_used("only a zero-width space", "\u200b\n", "empty"),
    caption_is_not_used("only direction marks", "\u200e\u200f", "empty"),
    caption_is_not_used("only a soft hyphen and a word joiner", "\u00ad \u2060", "empty"),
    caption_is_not_used("only byte order marks", "\ufeff\ufeff\ufeff", "empty"),
    caption_is("two byte order marks", "\ufeff\ufeffa rose", "a rose"),
    caption_is("two marks in UTF-16", b"\xff\xfe" + "\ufeffa rose".encode("utf-16-le"), "a rose"),
    caption_is("zero-width spaces at both ends", "\u200b a rose \u200b\n", "a rose"),
    caption_is("direction marks at both ends", "\u200e\u202aa rose\u202c\u200e", "a rose"),
]

LETTERS_THAT_STAY = [
    caption_is(name, caption, caption)
    for name, caption in {
        "a family, which is joined": "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
        "a family at the end": "family \U0001f468\u200d\U0001f469\u200d\U0001f467",
        "a red heart, which has a selector": "I \u2764\ufe0f",
        "England's flag, which ends in a tag": "a flag: \U0001f3f4\U000e0067\U000e0062\U000e0065"
        "\U000e006e\U000e0067\U000e007f",
        "Chinese": "\u7ea2\u73ab\u7470",
        "Persian, with a non-joiner inside": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "an accent of its own at the end": "a cafe\u0301",
        "a digit": "5",
        "an emoji": "\U0001f339",
        "a currency": "\u20ac",
        "a plus sign": "+",
    }.items()
]

NO_LETTERS = [
    caption_is_not_used("only dots", "...", "letter"),
    caption_is_not_used("only a dash", "-\n", "letter"),
    caption_is_not_used("only a question", "?!", "letter"),
    caption_is_not_used("only what stands for an object", "\ufffc", "letter"),
    caption_is_not_used("only what stands for lost letters", "\ufffd\ufffd\ufffd", "letter"),
]

NOT_CAPTIONS = [
    caption_is_not_used("a Git LFS pointer", LFS_POINTER, "git lfs pull"),
    caption_is_not_used(
        "a Git LFS pointer from Windows", LFS_POINTER.replace("\n", "\r\n"), "git lfs pull"
    ),
    caption_is_not_used(
        "a web page", "<!DOCTYPE html><html><body>429</body></html>", "web page", "download"
    ),
    caption_is_not_used("a web page in small letters", "<!doctype html>\n<p>429", "web page"),
    caption_is_not_used("a web page in capitals", "<HTML><BODY>429</BODY></HTML>", "web page"),
    caption_is_not_used("a web page after empty lines", "\n\r\n  <html lang='en'>", "web page"),
    caption_is_not_used("a web page after a mark", "\ufeff<!DOCTYPE html><html>", "web page"),
    caption_is_not_used(
        "the answer of a file store",
        "<?xml version='1.0' encoding='UTF-8'?><Error><Code>AccessDenied</Code></Error>",
        "download",
    ),
    caption_is_not_used("RTF", "{\\rtf1\\ansi a red rose}", "RTF", "plain text"),
    caption_is_not_used("RTF after a mark", "\ufeff{\\rtf1\\ansi a red rose}", "RTF"),
    caption_is_not_used("PDF", "%PDF-1.4\n1 0 obj << >> endobj", "PDF"),
    caption_is_not_used(
        "a document of a word processor", b"PK\x03\x04" + bytes(range(200)), "plain text"
    ),
    caption_is_not_used(
        "an old document of a word processor",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(90),
        "plain text",
    ),
    caption_is_not_used("a PNG", b"\x89PNG\r\n\x1a\n" + bytes(90), "picture"),
    caption_is_not_used("a JPEG", b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(range(90)), "picture"),
]

CAPTIONS_THAT_ONLY_LOOK_ALIKE = [
    caption_is(caption, caption, caption)
    for caption in (
        "<a rose>",
        "<b>a rose</b>",
        "html on a screen",
        "{a rose}",
        "version https of a page",
        "PK on a sign",
        "BMW parked at a kerb",
        "GIF89a is written on it",
        "RIFF on a guitar",
        "%PDF is not the first word of this file",
    )
]


def several_lines(name: str, *contents: str, count: int) -> Case:
    """Caption files, of which `count` have several lines."""
    files = {}
    pairs = []
    for number, content in enumerate(contents):
        files[f"{number}.jpg"] = None
        files[f"{number}.txt"] = content
        pairs.append((f"{number}.jpg", " ".join(content.split())))
    return Case(name, files, pairs, says=(f"{count} caption", "several lines", "table"))


SEVERAL_LINES = [
    several_lines(
        "one file", "a red bird\nthe beak is red\nsmall bird\n", "a blue bird\n", count=1
    ),
    several_lines("two files", "one\r\ntwo", "one\n\n\ntwo\n\n", "one", count=2),
    several_lines("line ends of old Macs", "one\rtwo\r", count=1),
    Case(
        "in caption/, counted once for all its pictures",
        {"caption/rose.txt": "one\ntwo", "Image/rose/1.png": None, "Image/rose/2.png": None},
        pairs=[("Image/rose/1.png", "one two"), ("Image/rose/2.png", "one two")],
        says=("1 caption", "several lines", "table"),
    ),
]


@for_each_case(
    LETTERS_WITHOUT_WIDTH,
    LETTERS_THAT_STAY,
    NO_LETTERS,
    NOT_CAPTIONS,
    CAPTIONS_THAT_ONLY_LOOK_ALIKE,
    SEVERAL_LINES,
)
def test_a_caption_is_what_an_editor_shows(check_case, case):
    check_case(case)


@pytest.mark.parametrize("content", ["a rose\n", "\n\n a rose \r\n\n", "\ufeffa rose\n\u200b\n"])
def test_one_line_and_empty_ones_are_not_several(check, tmp_path, content):
    write_files(tmp_path / "data", {"a.jpg": None, "a.txt": content})
    result = check(tmp_path / "data")
    assert result.pairs == [("a.jpg", "a rose")]
    assert "several lines" not in result.out
