"""--caption: a line for each picture on stdout, everything else on stderr."""

import re
import shutil
from pathlib import Path

import pytest
from helpers import (
    LFS_POINTER,
    ODD_NAMES,
    assert_no_control_characters,
    assert_reasons,
    assert_words,
    read_captions,
    snapshot,
    write_file,
    write_files,
    write_picture,
)

import finetune


@pytest.fixture(scope="module")
def finished(sample, opt_base, tmp_path_factory) -> Path:
    """An OUTPUT_DIR whose base was given by a path relative to another folder."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "base").symlink_to(opt_base)
    shutil.copytree(sample, folder / "train", ignore=shutil.ignore_patterns(".features", "0*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert finetune.main(["--model-id=base", "--epochs=1", "--output-dir=out"]) == 0
    return folder / "out"


@pytest.fixture
def caption(command, finished, monkeypatch, tmp_path):
    """caption("a.png", ...) in a new folder -> code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *paths: command("--caption", *paths, OUTPUT_DIR=finished, NUM_WORKERS=1)


def test_each_picture_is_a_line_with_its_caption_and_confidence(caption, small_data):
    pictures = sorted(str(path) for path in Path("data/Image").rglob("*.png"))
    shutil.move(pictures.pop(), "single")  # content decides, not the extension
    before = snapshot(Path())

    code, out, _ = caption("single", "data/Image")

    assert code == 0
    assert snapshot(Path()) == before
    captions = read_captions(out)
    assert sorted(captions) == sorted(["single", *pictures])
    for text, confidence in captions.values():
        assert re.search(r"\w+ \w+", text)
        assert 0 < confidence <= 1
    for line in out.splitlines():
        assert re.search(r"\t[01]\.\d{4}$", line)


def test_odd_names_are_one_line_each(caption, small_data):
    for name in ODD_NAMES:
        write_files(Path("odd"), {name: None})
    write_file(Path("odd/notes\n.jpg"), b"text")

    code, out, err = caption("odd")

    assert code == 1
    pictures = [shown for shown in ODD_NAMES.values() if not shown.endswith(".exe")]
    assert sorted(read_captions(out)) == sorted(f"odd/{shown}" for shown in pictures)
    assert r"odd/notes\n.jpg" in err
    assert_no_control_characters(out.replace("\t", "") + err)


def test_what_can_not_be_read_is_named_and_does_not_stop_the_others(caption, small_data):
    bad = {"a.png": b"x", "z.jpg": b"no picture"}
    for name, content in bad.items():
        write_file(small_data / "Image" / name, content)
    write_file(small_data / "Image/a.txt", b"a caption next to a picture: it is not named")
    write_file(small_data / "Image/LICENSE", b"nor is this")

    code, out, err = caption("missing.png", "data/Image")

    assert code == 1
    assert len(read_captions(out)) == 12
    reasons = dict(re.findall(r"^  (\S+): (.+)$", err, re.M))
    expected = {f"data/Image/{name}": "is text, not a picture" for name in bad}
    assert_reasons(reasons, expected | {"missing.png": "no such file"})
    assert "2 files are not pictures, judging by their extension or content" in err


def test_a_folder_without_a_file_is_an_error(caption, tmp_path):
    (tmp_path / "nothing").mkdir()
    code, _, err = caption("nothing")
    assert code == 1
    assert "nothing to caption: there is no picture in ['nothing']" in err


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"settings.json": b"[]"},
        {"adapter_config.json": None, "adapter_model.safetensors": None},
        {"adapter_config.json": None, "settings.json": None},
    ],
    ids=["empty", "no run", "no settings", "no weights"],
)
def test_without_a_finished_run_the_error_says_to_train_first(
    refused, small_data, finished, tmp_path, files
):
    """The files are those of a finished run (None), or others."""
    for name, content in files.items():
        if content is None:
            content = (finished / name).read_bytes()
        write_file(tmp_path / "run" / name, content)

    error = refused("--caption", str(small_data / "Image"), OUTPUT_DIR=tmp_path / "run")

    assert_words(error, (repr(str(tmp_path / "run")), "give it again"))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("settings.json", b"{}", "settings.json lacks 'settings'"),
        ("adapter_config.json", b"{", "it does not fit the base"),
        ("adapter_model.safetensors", b"x" * 50, "is damaged, or only partly downloaded"),
        ("adapter_model.safetensors", b"", "is empty; download or copy it again"),
        ("adapter_model.safetensors", LFS_POINTER.encode(), "git lfs pull"),
    ],
    ids=["no settings", "broken config", "broken weights", "empty weights", "a pointer"],
)
def test_a_damaged_adapter_is_named_as_what_it_is(
    refused, small_data, finished, tmp_path, name, content, words
):
    """It is there: to train one first would not help."""
    shutil.copytree(finished, tmp_path / "run")
    write_file(tmp_path / "run" / name, content)

    error = refused("--caption", str(small_data / "Image"), OUTPUT_DIR=tmp_path / "run")

    assert_words(error, (repr(str(tmp_path / "run")), words))
    assert "give it again" not in error


# ---- New: files that are no pictures ------------------------------------------------------------


def test_files_of_a_folder_that_are_no_pictures_are_counted_and_not_tried(caption):
    write_files(
        Path("new"),
        {
            "a.png": None,
            "b": None,
            "a.mov": "x",
            "a.json": "{}",
            "a.npz": b"PK\x03\x04",
            "a.AAE": "x",
            "notes.doc": "x",
            "README.md": "x",
        },
    )

    code, out, err = caption("new")

    assert code == 0
    assert sorted(read_captions(out)) == ["new/a.png", "new/b"]
    [line] = [line for line in err.splitlines() if "6 files" in line]
    assert ".mov" not in err


def test_a_table_of_captions_of_an_earlier_call_is_not_tried(caption):
    write_files(
        Path("new"), {"a.png": None, "captions.tsv": "new/a.png\ta cat\t0.9876\n", "a.txt": "a cat"}
    )
    code, out, _ = caption("new")
    assert code == 0
    assert list(read_captions(out)) == ["new/a.png"]


def test_a_file_that_is_no_picture_is_only_counted_also_where_a_shell_names_it(caption):
    """As it does for `--caption new/*`."""
    write_files(Path("new"), {"a.png": None, "a.txt": "a cat", "clip.mov": "x", "a.AAE": "<?xml "})
    code, out, err = caption(*sorted(map(str, Path("new").iterdir())))
    assert code == 0
    assert list(read_captions(out)) == ["new/a.png"]
    assert "3 files are not pictures" in err


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "empty"),
        ("<!DOCTYPE html><title>404</title>", "web page"),
        (LFS_POINTER, "git lfs pull"),
    ],
    ids=["nothing", "web page", "Git LFS"],
)
def test_a_file_that_is_something_else_is_told_as_what_it_is(caption, content, words):
    write_files(Path(), {"a.png": None, "bad.jpg": content})
    code, _, err = caption("a.png", "bad.jpg")
    assert code == 1
    [line] = [line for line in err.splitlines() if "bad.jpg" in line]
    assert words in line


# ---- New: paths as people write them ------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> Path:
    """a.png, b.png, c.jpg, and d.png in a folder."""
    write_files(tmp_path, {"a.png": None, "b.png": None, "c.jpg": None, "deep/d.png": None})
    return tmp_path


@pytest.mark.parametrize(
    "patterns, names",
    [
        (["*.png"], ["a.png", "b.png"]),
        (["?.*"], ["a.png", "b.png", "c.jpg"]),
        (["[bc].*"], ["b.png", "c.jpg"]),
        (["*/*.png", "a.png"], ["deep/d.png", "a.png"]),
        (["*.png", "a.png", "./a.png"], ["a.png", "b.png"]),
        (["dee*"], ["deep/d.png"]),
    ],
)
def test_patterns_are_expanded_as_a_shell_does_it(caption, pictures, patterns, names):
    """Windows' shells leave that to the program."""
    code, out, _ = caption(*patterns)
    assert code == 0
    found = [name.removeprefix("./") for name in read_captions(out)]
    assert sorted(found) == sorted(names)


@pytest.mark.parametrize("name", ["a*.png", "IMG [edited].png", "what?.png"])
def test_a_name_with_the_letters_of_a_pattern_is_itself(caption, pictures, name):
    write_files(Path(), {name: None})
    code, out, _ = caption(name)
    assert code == 0
    assert list(read_captions(out)) == [name]


def test_a_pattern_in_a_folder_with_brackets_is_expanded(caption):
    write_files(Path("2024 [best]"), {"a.png": None, "b.png": None})
    code, out, _ = caption("2024 [best]/*.png")
    assert code == 0
    assert sorted(read_captions(out)) == ["2024 [best]/a.png", "2024 [best]/b.png"]


def test_a_tilde_is_the_home_folder(caption, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    write_files(tmp_path / "home/new", {"a.png": None, "b.jpg": None})

    code, out, _ = caption("~/new/*.png", "~/new/b.jpg")

    assert code == 0
    names = [Path(path).name for path in read_captions(out)]
    assert sorted(names) == ["a.png", "b.jpg"]


@pytest.mark.parametrize(
    "path, words",
    [
        ("missing.png", ("missing.png", "there is no")),
        ("missing/*.png", ("missing/*.png", "there is no")),
        ("new/", ("new/", "there is no")),
        ("https://example.com/a.png", ("https://example.com/a.png", "URL")),
        ("http://example.com/*.jpg", ("http://example.com/*.jpg", "URL")),
        ("s3://bucket/a.png", ("s3://bucket/a.png", "URL")),
        ("HTTPS://example.com/a.png", ("HTTPS://example.com/a.png", "URL")),
        ("A.PNG", ("A.PNG", "there is 'a.png'")),
    ],
)
def test_a_path_that_is_nothing_is_told_before_the_model_is_loaded(caption, pictures, path, words):
    code, out, err = caption(path)
    assert code == 1
    assert out == ""
    assert_words(err, words)
    assert "memory:" not in err


def test_a_base_that_has_moved_is_named(command, refused, finished, opt_base, small_data, tmp_path):
    """Without a word about the network."""
    base = shutil.copytree(opt_base, tmp_path / "base")
    code, _, _ = command(TRAIN_DIR=small_data, MODEL_ID=base, EPOCHS=1)
    assert code == 0
    shutil.rmtree(base)

    error = refused("--caption", str(small_data), OUTPUT_DIR=tmp_path / "out")

    assert_words(error, (str(base), "is not on this machine", "settings.json"))
    assert "network" not in error


# ---- --write-txt and --page ---------------------------------------------------------------------


def test_write_txt_writes_next_to_pictures_and_never_over_a_file(caption):
    write_files(Path("new"), {"a.png": None, "b.png": None, "c/d.jpg": None, "b.txt": "my own"})

    code, out, err = caption("new", "--write-txt", "--page", "new.html")

    assert code == 0
    captions = read_captions(out)
    assert Path("new/a.txt").read_text(encoding="utf-8") == captions["new/a.png"][0] + "\n"
    assert Path("new/c/d.txt").read_text(encoding="utf-8") == captions["new/c/d.jpg"][0] + "\n"
    assert Path("new/b.txt").read_text() == "my own"
    assert "written next to pictures, as .txt: 2;" in err
    assert "there is one already: 1\n" in err
    page = Path("new.html").read_text(encoding="utf-8")
    assert page.count("not written: there is a .txt already") == 1


def test_write_txt_knows_a_file_in_other_letters_and_two_pictures_of_one_name(caption):
    """On Windows and macOS b.TXT is b.txt; a.txt is for one of the two pictures alone."""
    write_files(Path("new"), {"a.jpg": None, "a.png": None, "b.png": None, "b.TXT": "my own"})

    code, out, err = caption("new", "--write-txt")

    assert code == 0
    captions = read_captions(out)
    assert Path("new/a.txt").read_text(encoding="utf-8") == captions["new/a.jpg"][0] + "\n"
    assert sorted(path.name for path in Path("new").glob("*.[tT]*")) == ["a.txt", "b.TXT"]
    assert "there is one already: 2\n" in err
    assert "new/a.png: no .txt is written, because a.txt belongs to another picture" in err


def test_two_pictures_whose_names_differ_in_letters_alone_do_not_share_a_txt(caption):
    """On Windows and macOS, A.txt is a.txt."""
    write_files(Path("new"), {"A.png": None, "a.jpg": None})

    _, _, err = caption("new", "--write-txt")

    assert [path.name for path in Path("new").glob("*.txt")] == ["A.txt"]
    assert "new/a.jpg: no .txt is written, because a.txt belongs to another picture" in err


@pytest.mark.parametrize(
    "page, words",
    [
        ("data/caption/notes.txt", "does not end in .html"),
        ("missing/new.html", "there is no folder 'missing'"),
        ("new\npage.html", "control character"),
    ],
)
def test_a_page_that_can_not_be_written_is_told_before_the_model_is_loaded(
    caption, small_data, page, words
):
    """Above all, it is not written over a file that is no page."""
    write_files(Path(), {"data/caption/notes.txt": "my own"})

    code, out, err = caption("data/Image", "--page", page)

    assert (code, out) == (1, "")
    assert words in err
    assert "memory:" not in err
    assert Path("data/caption/notes.txt").read_text() == "my own"


def test_written_captions_are_a_folder_to_train_on(caption, check):
    write_files(Path("new"), {"a.png": None, "b.png": None})
    _, out, _ = caption("new", "--write-txt")

    pairs = check(Path("new")).pairs

    captions = read_captions(out)
    assert pairs == [(name, captions[f"new/{name}"][0]) for name in ("a.png", "b.png")]


def test_a_page_shows_new_pictures_the_least_sure_first(caption, small_data):
    code, out, err = caption("data/Image", "--page", "new.html")

    assert code == 0
    page = Path("new.html").read_text(encoding="utf-8")
    assert page.count("<img") == 12
    shown = [float(number) for number in re.findall(r">([01]\.\d\d)</span>", page)]
    assert len(shown) == 12
    assert shown == sorted(shown)
    for text, _ in read_captions(out).values():
        assert text in page
    assert "page: new.html" in err


@pytest.mark.parametrize("flags", [["--page", "new.html"], ["--write-txt"]])
def test_page_and_write_txt_are_for_caption_alone(capsys, flags):
    with pytest.raises(SystemExit, match=r"^2$"):
        finetune.main(flags)
    assert "--caption" in capsys.readouterr().err


def test_a_page_in_a_folder_that_is_not_there_is_told_before_the_model_is_loaded(caption):
    write_files(Path("new"), {"a.png": None})

    code, out, err = caption("new", "--page", "nowhere/new.html")

    assert code == 1
    assert out == ""
    assert "nowhere" in err
    assert "memory:" not in err


def test_no_captions_are_written_next_to_a_table(refused, tmp_path):
    """The folder could not be used for training after that. The model is not loaded before."""
    write_picture(tmp_path / "data/a.png")
    (tmp_path / "data/metadata.csv").write_text("file_name,text\na.png,a rose\n")

    sentence = refused("--caption", str(tmp_path / "data"), "--write-txt")

    assert "metadata.csv" in sentence
    assert "Leave out --write-txt" in sentence


def test_an_empty_caption_is_not_written(tmp_path, capsys):
    """Training would refuse it, and a later --write-txt would not replace it."""
    write_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.png")
    captions = {
        str(tmp_path / "a.png"): finetune.Caption(" ", 0.5),
        str(tmp_path / "b.png"): finetune.Caption("a rose", 0.5),
    }

    finetune.write_caption_files(captions)

    assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "b.txt").read_text() == "a rose\n"
    out = capsys.readouterr().out
    assert "a.png: no .txt is written, because its caption is empty" in out
    assert "as .txt: 1;" in out
