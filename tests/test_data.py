"""What users bring and what they get wrong - settings, folders, captions, tables, models - and
that each of it is told in a sentence, with nothing touched."""

import ast
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import flags_of
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune

SCRIPT = Path(finetune.__file__).resolve()
HEIC = b"\0\0\0\x18ftypheic" + bytes(100)
QUADRANTS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]  # in reading order
CONTROL = r"[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def quadrants(width: int = 64, height: int = 48) -> Image.Image:
    picture = Image.fromarray(np.array(QUADRANTS, np.uint8).reshape(2, 2, 3))
    return picture.resize((width, height), Image.Resampling.NEAREST)


def tree(folder: Path) -> dict[Path, tuple]:
    """Everything below a folder, with time and content."""
    return {path: (path.lstat().st_mtime_ns, stat.S_ISREG(path.lstat().st_mode)
                   and path.read_bytes()) for path in folder.rglob("*")}


def write(path: Path, content: bytes | None = None) -> None:
    """A file of this content, or a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        quadrants(16, 16).save(path, format="PNG")
    else:
        path.write_bytes(content)


def read_listing(out: str, folder: Path) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """What --check lists: pairs, and what is not used with the reason; paths below `folder`."""
    pairs = [line.split("\t") for line in out.splitlines() if "\t" in line]
    skipped = re.findall(r"^  (.+?): (.+)$", out.partition("not used: ")[2], re.M)
    assert len(skipped) == int((re.findall(r"^not used: (\d+)$", out, re.M) or [0])[0])
    root = f"{finetune.printable(str(folder))}/"
    return (sorted((path.removeprefix(root), caption) for path, caption in pairs),
            {path.removeprefix(root): why for path, why in skipped})


@pytest.fixture
def check(command, tmp_path):
    """check(folder) -> code, pairs, skipped, out, err of --check, which must write nothing."""

    def call(folder: Path, *flags: str, **settings) -> SimpleNamespace:
        before = tree(tmp_path)
        settings = {"TRAIN_DIR": folder, "MODEL_ID": "no-such/model"} | settings
        code, out, err = command("--check", *flags, **settings)
        assert tree(tmp_path) == before
        pairs, skipped = read_listing(out, folder)
        return SimpleNamespace(code=code, out=out, err=err, pairs=pairs, skipped=skipped)

    return call


@pytest.fixture
def refused(command, tmp_path):
    """Calls `command`, which has to end in a sentence and to leave alone whatever is there."""

    def call(*flags: str, **settings) -> str:
        before = tree(tmp_path)
        code, _, err = command(*flags, **settings)
        after = tree(tmp_path)
        assert all(after[path] == old for path, old in before.items() if not path.is_dir())
        assert not [path for path in after.keys() - before.keys()
                    if path.suffix != ".lock" and ".features" not in str(path)]
        sentence = err[err.index("error: ") :]
        assert code == 1 and sentence.count("\n") == 1 + sentence.count("\n  "), sentence
        return sentence

    return call


# ---- Settings and flags -------------------------------------------------------------------------

BLOCK = SCRIPT.read_text(encoding="utf-8").split("# ==== ")[1]
SETTINGS = [(name, ast.literal_eval(value), comment) for name, value, comment
            in re.findall(r"^([A-Z][A-Z0-9_]*): \w+ = (.+?)  # (.+)$", BLOCK, re.M)]
FOR_CAPTION = ("OUTPUT_DIR", "DEVICE", "NUM_WORKERS", "NUM_BEAMS")


def flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def test_every_setting_is_a_flag_of_its_type_with_its_comment_as_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stopped:
        finetune.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and len(SETTINGS) == BLOCK.count(" = ") > 20
    for name, value, comment in SETTINGS:
        on, off, kind = flag(name), flag(f"NO_{name}"), type(value)
        shown = f"{on}, {off}" if kind is bool else f"{on} {kind.__name__.upper()}"
        assert text.count(f" {shown} {comment}") == 1
        cases = {int: [([on, "3"], 3)], float: [([on, "1"], 1.0), ([on, "2e-3"], 0.002)],
                 str: [([on, "x y"], "x y")], bool: [([off], False), ([on], True)]}
        for words, expected in cases[kind]:
            parsed = vars(finetune.parse_arguments(words))
            assert parsed[name] == expected and type(parsed[name]) is kind
            assert all(parsed[other] == old for other, old, _ in SETTINGS if other != name)


@pytest.mark.parametrize("words", [
    "--learning-rates 1", "--epoch 3", "--load-in-4bit no", "--seed x", "--epochs 1.5", "--caption",
    "picture.png", "--caption x --check", "--caption x --restart"])
def test_wrong_usage_exits_2(command, words):
    with pytest.raises(SystemExit) as stopped:
        command(*words.split())
    assert stopped.value.code == 2


def test_caption_refuses_flags_that_it_would_ignore(refused, capsys, tmp_path):
    for name, value, _ in SETTINGS:
        if name not in FOR_CAPTION:
            with pytest.raises(SystemExit) as stopped:
                finetune.main(["--caption", "x", *flags_of({name: value})])
            said = capsys.readouterr().err
            assert stopped.value.code == 2 and name in said and all(n in said for n in FOR_CAPTION)
    sentence = refused("--caption", "x", DEVICE="cpu", NUM_WORKERS=2, NUM_BEAMS=3)
    assert repr(str(tmp_path / "out")) in sentence  # where no run is: a later problem


def test_all_wrong_settings_are_reported_at_once(refused):
    wrong = {name: "-1" for name, old, _ in SETTINGS if type(old) in (int, float)}
    wrong |= {"DEVICE": "tpu", "DTYPE": "int8", "LORA_TARGETS": "(q_proj", "LOG_WITH": "no such",
              "MODEL_ID": "", "TRAIN_DIR": "", "OUTPUT_DIR": "", "SEED": str(2**40)}
    lines = refused(**wrong).splitlines()[1:]
    assert len(lines) == len(wrong)
    for name, value in wrong.items():
        [line] = [line for line in lines if line.startswith(f"  {name} is ")]
        assert value in line and "must be" in line


@pytest.mark.parametrize("name, value", [
    ("EPOCHS", 1.5), ("EPOCHS", True), ("LEARNING_RATE", float("nan")), ("PROMPT", None),
    ("LORA_TARGETS", ["q_proj", "v_proj"]), ("LOAD_IN_4BIT", "no"), ("EPOCHS", "ten"),
    ("DEVICE", 0), ("VALIDATION_FRACTION", (0.1,)),
])
def test_a_setting_edited_to_another_type_is_reported(check, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(finetune, name, value)
    done = check(tmp_path)
    assert done.code == 1 and f"{name} is {value!r}; it must be" in done.err


@pytest.mark.parametrize("old, new, named", [
    ("EPOCHS: int = ", "EPOCH: int = ", "EPOCH EPOCHS"), ("EPOCHS: int = ", "EPOCHS = ", "EPOCHS"),
    ("EPOCHS: int = ", "# EPOCHS: int = ", "EPOCHS"), ("DEVICE: str", "DEVISE: str", "DEVICE"),
    ("LORA_RANK: int", "LORA_RNAK: float = 1.0\nLORA_RANK: int", "LORA_RNAK")])
def test_a_misspelled_setting_is_named(old, new, named, tmp_path, monkeypatch, capsys):
    path = tmp_path / "edited.py"
    path.write_text(SCRIPT.read_text(encoding="utf-8").replace(f"\n{old}", f"\n{new}"))
    specification = importlib.util.spec_from_file_location("edited", path)
    edited = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "edited", edited)
    specification.loader.exec_module(edited)
    assert edited.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert [re.search(rf"^  {name} is missing, misspelled", said, re.M) for name in named.split()]
    assert said.count("misspelled") >= len(named.split()) and "EPOCHS: int = 10" in said


def test_importing_says_and_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import finetune"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())


# ---- OUTPUT_DIR ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, words", [
    ({"OUTPUT_DIR": "."}, "current folder"), ({"OUTPUT_DIR": ".."}, "current folder"),
    ({"OUTPUT_DIR": "/dev/shm", "MODEL_ID": "no-such/model"}, "mount point"),
    ({"OUTPUT_DIR": "data"}, "TRAIN_DIR"),
    ({"OUTPUT_DIR": "data/Image/out"}, "TRAIN_DIR"), ({"OUTPUT_DIR": "link/out"}, "TRAIN_DIR"),
    ({"OUTPUT_DIR": "all", "TRAIN_DIR": "all/data"}, "TRAIN_DIR"),
    ({"OUTPUT_DIR": "all", "TRAIN_DIR": "to all"}, "TRAIN_DIR"),
    ({"OUTPUT_DIR": "all", "VALIDATION_DIR": "all/data"}, "VALIDATION_DIR"),
    ({"OUTPUT_DIR": "all/data/x", "VALIDATION_DIR": "all/data"}, "VALIDATION_DIR"),
    ({"OUTPUT_DIR": "all", "MODEL_ID": "all/model"}, "MODEL_ID"),
])
def test_an_output_folder_that_would_take_other_files_with_it(
    refused, small_data, tmp_path, opt_base, monkeypatch, settings, words
):
    (tmp_path / "here").mkdir()
    shutil.copytree(small_data, tmp_path / "here/all/data")
    shutil.copytree(opt_base, tmp_path / "here/all/model")
    small_data.rename(tmp_path / "here/data")
    monkeypatch.chdir(tmp_path / "here")
    Path("link").symlink_to("data/Image")
    Path("to all").symlink_to("all/data")
    if settings["OUTPUT_DIR"] == "/dev/shm" and not os.path.ismount("/dev/shm"):
        pytest.skip("it is no mount point here")
    sentence = refused(**{"TRAIN_DIR": "data", "MODEL_ID": opt_base, "EPOCHS": 1} | settings)
    [line] = [line for line in sentence.splitlines() if words in line]
    assert repr(settings["OUTPUT_DIR"]) in line and "name a folder of its own" in line
    assert not list(tmp_path.rglob("*.lock"))


def test_an_output_folder_that_is_a_link_stays_one(command, small_data, opt_base, tmp_path):
    link, disk = tmp_path / "link", tmp_path / "disk"
    disk.mkdir()
    link.symlink_to(disk / "run")
    (disk / "run").mkdir()
    for seed in (1, 2):
        code, _, err = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, OUTPUT_DIR=link, EPOCHS=1,
                               SEED=seed, SAMPLE_COUNT=0)
        assert code == 0 and link.is_symlink() and link.resolve() == disk / "run", err
        assert json.loads((link / "settings.json").read_text())["settings"]["SEED"] == seed
    [earlier] = disk.glob("run-*-*-*")
    assert json.loads((earlier / "settings.json").read_text())["settings"]["SEED"] == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"link", "disk", "data"}


# ---- Captions and names -------------------------------------------------------------------------


def test_check_lists_everything_and_writes_nothing(check, tmp_path):
    data, text, nfd = tmp_path / "data", "a café", unicodedata.normalize("NFD", "café")
    captions = {
        "bom": b"\xef\xbb\xbf" + text.encode(), "little": b"\xff\xfe" + text.encode("utf-16-le"),
        "big": b"\xfe\xff" + text.encode("utf-16-be"), f"{nfd}s": text.encode(),
        "lines": "\n a\r\n\t\tcafé \u2028\xa0\x0b\n".encode(), "café": text.encode(),
        "v1.5": text.encode(), "most": b"x" * 1_000_000}
    used = [f"{name}/1.png" for name in captions if "café" not in name] + [
        f"{nfd}/1.png", "cafés.png", "v1.5.webp", "v1.5/a.b/1", "v1.5/deep/er/2.png", "bom.jpg"]
    bad = {  # with a picture, and the reason for both
        "windows": (text.encode("cp1252"), "UTF-8; save it so, README"), "empty": (b"", "empty"),
        "blank": (b" \r\n\xe3\x80\x80", "empty"), "only bom": (b"\xef\xbb\xbf", "empty"),
        "half": (b"\xff\xfea", "UTF-8"), "zeros": (bytes(99), "no text in UTF-8"),
        "no bom": (text.encode("utf-16-le"), "UTF-8"), "large": (b"x" * 1_000_001, "1 MB"),
        "two": (b"a cat", "2 captions")}
    for name, content in (captions | {name: content for name, (content, _) in bad.items()}).items():
        write(data / f"caption/{name}.txt", content)
    for path in (*used, *(f"{name}.png" for name in bad), "bird/1.png", "pipe.png", "lost/1.png"):
        write(data / "Image" / path)
    others = {f"caption/alone {number:02}.txt": "no picture of this name" for number in range(12)}
    others |= {"caption/two.TXT": "2 captions", "caption/notes.md": "is not caption/<name>.txt",
               "caption/deeper/cat.txt": "is not caption/<name>.txt",
               "Image/bom/text.jpg": "save it as JPEG"}
    for path in others:
        write(data / path, b"a cat")
    for name in (".hidden.png", "Thumbs.db", "desktop.ini", "__MACOSX/1.png", ".git/1.png"):
        for folder in ("Image", "Image/v1.5", "caption"):
            write(data / folder / name, b"ignored")
    os.mkfifo(data / "caption/pipe.txt")
    (data / "caption/lost.txt").symlink_to("nowhere")
    (data / "Image/v1.5/away").symlink_to(tmp_path)
    reasons = others | {"Image/v1.5/away": "link", "Image/bird/1.png": "no caption of this name",
                        "caption/pipe.txt": "not a file", "Image/pipe.png": "not a file",
                        "caption/lost.txt": "No such file", "Image/lost/1.png": "No such file"}
    for name, (_, why) in bad.items():
        reasons |= {f"caption/{name}.txt": why, f"Image/{name}.png": why}
    done = check(data, "--restart", EPOCHS=3, PROMPT="x", LOAD_IN_4BIT=False, DEVICE="cuda:7")
    expected = [(f"Image/{path}", "x" * 1_000_000 if "most" in path else text) for path in used]
    assert done.code == 0 and done.pairs == sorted(expected)
    assert done.skipped.keys() == reasons.keys()
    assert not {path for path, why in reasons.items() if why not in done.skipped[path]}
    assert "caption/ and Image/" in done.out and f"pairs: {len(used)}\n" in done.out

    for path in used:
        write(data / "Image" / path, b"")
    done = check(data)
    assert done.code == 1 and not done.pairs
    assert done.skipped.keys() == {*reasons, *(f"Image/{path}" for path in used)}


def test_the_conversion_from_windows_1252_in_the_readme(check, tmp_path, monkeypatch):
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(r"[^`\n]*1252[^`\n]*", readme)
    name, text = re.findall(r"(\w+)\.txt", command)[0], "un café très “chaud” – 5 €"
    write(tmp_path / f"train/caption/{name}.txt", text.encode("cp1252"))
    write(tmp_path / f"train/Image/{name}.png")
    monkeypatch.chdir(tmp_path / "train/caption")
    subprocess.run(["bash", "-c", command], check=True)
    done = check(tmp_path / "train")
    assert done.pairs == [(f"Image/{name}.png", text)] and not done.skipped


def test_check_fails_where_training_would(check, small_data, tmp_path):
    """Pictures to measure on do not help when there is none to train on."""
    shutil.copytree(small_data, tmp_path / "validation")
    for path in small_data.rglob("*.png"):
        path.write_bytes(b"")
    assert check(small_data, VALIDATION_DIR=tmp_path / "validation").code == 1
    assert check(tmp_path / "validation", VALIDATION_DIR=small_data).code == 1


@pytest.mark.parametrize("missing, there", [("caption", "Captions"), ("Image", "image")])
def test_a_folder_of_another_name_is_told(refused, small_data, missing, there):
    (small_data / missing).rename(small_data / there)
    sentence = refused(TRAIN_DIR=small_data)
    assert f"There is {there!r}: rename it to {missing!r}" in sentence


@pytest.mark.parametrize("flags", [(), ("--check",)], ids=["train", "check"])
def test_no_pair_at_all(command, tmp_path, opt_base, flags):
    data = tmp_path / "data"
    code, out, err = command(*flags, TRAIN_DIR=data)
    assert code == 1 and repr(str(data)) in err
    (data / "Image").mkdir(parents=True)
    for number in range(12):
        write(data / f"caption/alone {number:02}.txt", b"a cat")
    code, out, err = command(*flags, TRAIN_DIR=data)
    assert code == 1 and repr(str(data)) in err and not {
        word for word in ("caption/<name>.txt", "metadata.csv", "<name>.jpg") if word not in err}
    assert 10 + 2 * len(flags) <= out.count("alone ") <= 12  # --check lists all
    write(data / "Image/alone 00.png", b"no picture")
    code, out, err = command(*flags, TRAIN_DIR=data, MODEL_ID=opt_base)
    assert code == 1 and (flags or repr(str(data)) in err)


ODD = {  # name -> how it is printed
    "new\nline": r"new\nline", "x\tforged\ta cat": r"x\tforged\ta cat", "return\r": r"return\r",
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07", "\x7f\x9b31m": r"\x7f\x9b31m",
    "next\x85line\u2028\u2029": r"next\x85line\u2028\u2029", "\u202egnp.exe": r"\u202egnp.exe",
    os.fsdecode(b"caf\xe9 \xff"): r"caf\udce9 \udcff",
} | {name: name for name in (
    'double "quotes\'s"', "a,comma", "=1+1", "--restart", " space ", "%s {0}", "$(touch x)", "*?",
    "back\\nslash", "日本語", "می\u200cخواهم", "👩\u200d👩\u200d👧", "a" * 200,
)}  # fmt: skip


def test_odd_names_and_captions_are_one_line_each(check, tmp_path):
    data, pairs, skipped = tmp_path / "odd \x1b[1m\n folder", [], set()
    for name, shown in ODD.items():
        caption = f"a {name} cat".encode(errors="replace")
        for path in (f"caption/{name}.txt", f"caption/{name} alone.txt"):
            write(data / path, caption)
        write(data / f"Image/{name}/{name}")
        write(data / f"Image/{name}/cut.png", b"\x89PNG\r\n\x1a\n")
        text = finetune.printable(" ".join(caption.decode().split()))
        pairs.append((f"Image/{shown}/{shown}", text))
        skipped |= {f"caption/{shown} alone.txt", f"Image/{shown}/cut.png"}
    done = check(data)
    assert not re.search(CONTROL, done.out.replace("\t", "") + done.err)
    assert done.pairs == sorted(pairs) and done.skipped.keys() == skipped
    name = "می\u200cخواهم"  # Persian needs it
    assert (f"Image/{name}/{name}", f"a {name} cat") in done.pairs


def test_training_uses_the_rest_and_names_what_it_skips(command, small_data, opt_base, tmp_path):
    star = sorted((small_data / "Image").iterdir())[-1]
    whole, odd = (star / "01.png").read_bytes(), os.fsdecode(b"caf\xe9\n.png")  # is not UTF-8
    for path, content in {"caption/windows.txt": "a café".encode("cp1252"),
                          "caption/escape.txt": b"</s> \x1b[31mred\x07 <pad>",
                          "Image/escape/1.png": whole, "Image/escape/\n\t2.png": whole,
                          f"{star}/good {odd}": whole}.items():
        write(small_data / path, content)
    expected = {"Image/windows.png": "UTF-8", "Image/escape\x1b[1m.png": "no caption",
                f"Image/{star.name}/cut.png": "truncated", f"Image/{star.name}/{odd}": "truncated"}
    for path in expected:
        write(small_data / path, whole[: len(whole) // 2])
    expected["caption/windows.txt"], before = "UTF-8", tree(small_data)
    code, out, err = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=1, SAMPLE_COUNT=99,
                             VALIDATION_FRACTION=0.5)
    assert (code, err) == (0, "") and not re.search(CONTROL, out)
    rows = {row["path"].removeprefix(f"{small_data}/"): row["reason"]
            for row in finetune.read_csv(tmp_path / "out/skipped.csv")}
    assert rows.keys() == expected.keys()
    assert not {path for path, why in expected.items() if why not in rows[path]}
    assert "not used: 5\n" in out and re.search(r"^pairs: [78] to train on, [78] held", out, re.M)
    after = tree(small_data)
    assert all(after[path] == old for path, old in before.items())
    assert {path.relative_to(small_data).parts[0] for path in after.keys() - before.keys()} == {
        ".features"}


# ---- Layouts, and what is held out --------------------------------------------------------------


def to_layout(source: Path, target: Path, layout: str) -> None:
    """The caption folders in `source` turned into another layout."""
    shutil.copytree(source / "Image", target / "Image")
    rows = [(path.relative_to(target).as_posix(),
             (source / f"caption/{path.parent.name}.txt").read_text(encoding="utf-8").strip())
            for path in target.rglob("*.png")]
    write_table(target, layout, [dict(zip(("file_name", "text"), row, strict=True))
                                 for row in rows])
    for name, text in rows if "metadata" not in layout else []:
        (target / name).with_suffix(".txt").write_text(text, encoding="utf-8")


def write_table(data: Path, name: str, rows: list[dict], bom: bytes = b"") -> None:
    if name.endswith(".csv"):
        finetune.write_csv(data / name, [rows[0], *(row.values() for row in rows)])
    elif name.endswith(".jsonl"):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (data / name).write_text(lines, encoding="utf-8")
    if bom:
        write(data / name, bom + (data / name).read_bytes())


def relative_pairs(folder: Path) -> tuple[list[tuple], set[str]]:
    """The pairs of a folder, and its held-out pictures, by relative path."""
    pairs, skipped = finetune.find_pairs(str(folder))
    _, held_out = finetune.split_pairs(pairs, 0.1, 42, str(folder))
    assert not skipped
    return ([(os.path.relpath(picture, folder), caption) for picture, caption in pairs],
            {os.path.relpath(pair.picture, folder) for pair in held_out})


@pytest.mark.parametrize("layout", ["metadata.csv", "metadata.jsonl", "<name>.txt beside"])
def test_the_sample_in_another_layout_is_the_same(sample, tmp_path, capsys, layout):
    to_layout(sample, tmp_path / "other", layout)
    pairs, held_out = relative_pairs(tmp_path / "other")
    assert f"layout of {tmp_path / 'other'}: {layout}" in capsys.readouterr().out
    assert (pairs, held_out) == relative_pairs(sample)
    assert (len(pairs), len(held_out)) == (208, 21)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table(check, tmp_path, name, bom):
    data = tmp_path / "data"
    decomposed = unicodedata.normalize("NFD", "café.png")
    for path in ("a/1.png", f"a/{decomposed}", "2.png", "lonely.png", "../outside.png"):
        write(data / path)
    used = [("a/1.png", "a cat", "a cat"), ("a\\1.png", "le café,\n \"noir\"", "le café, \"noir\""),
            ("./a//1.png", "a third", "a third"), ("a/café.png", "a cat", "a cat"),
            (f"a/{decomposed}", "a dog", "a dog"), ("2.png", "x" * 9999, "x" * 9999)]
    skipped = {"2.png": ("", "is empty"), "a/1.png": ("a  cat", "earlier row is the same"),
               "no.png": ("a dog", "no such file"), "../outside.png": ("x", "out of the folder"),
               str(data / "2.png"): ("x", "out of the folder"), "": ("x", "no such file")}
    rows = [(path, text) for path, text, _ in used]
    rows += [(path, text) for path, (text, _) in skipped.items()]
    write_table(data, name, [{"id": i, "file_name": path, "caption" if bom else "text": text}
                             for i, (path, text) in enumerate(rows)], bom)
    done = check(data)
    files = ["a/1.png", "a/1.png", "a/1.png", *[f"a/{decomposed}"] * 2, "2.png"]
    assert done.pairs == sorted(zip(files, [text for _, _, text in used], strict=True))
    for number, (path, (_, why)) in enumerate(skipped.items(), len(used) + 1):
        [reason] = [text for key, text in re.findall(r"^  (.*, row \d+): (.*)$", done.out, re.M)
                    if key.endswith(f"{name}, row {number}")]
        assert path in reason and why in reason
    assert done.skipped.pop("lonely.png").endswith(name)
    assert done.out.count(", row ") == len(skipped) and done.code == 0


@pytest.mark.parametrize("name, content, words", [
    ("metadata.csv", b"image,caption\n1.png,a cat\n", 
     "'image', 'caption'.*file_name and text.*rename"),
    ("metadata.csv", b"file_name;text\n1.png;a cat\n", "commas"),
    ("metadata.csv", b"file_name,label\n1.png,a cat\n", "rename"),
    ("metadata.csv", "file_name,text\n1.png,café".encode("cp1252"), "UTF-8"),
    ("metadata.csv", b'file_name,text\n1.png,"a cat\n', "can't be read"),
    ("metadata.csv", b"", "no picture in"), ("metadata.csv", b"file_name,text\n", "no picture in"),
    ("metadata.jsonl", b'{"image": "1.png", "text": "a cat"}', "'image', 'text'"),
    ("metadata.jsonl", b"file_name,text\n1.png,a cat\n", "can't be read"),
    ("metadata.jsonl", b'["1.png", "a cat"]', "can't be read"),
    ("metadata.jsonl", b"\x89PNG\r\n\x1a\n", "can't be read"),
    ("deeper/metadata.csv", b"file_name,text\n1.png,a cat\n", "no picture in"),
])
def test_a_table_that_cannot_be_used(command, tmp_path, name, content, words):
    write(tmp_path / "data/1.png")
    write(tmp_path / "data" / name, content)
    code, out, err = command("--check", TRAIN_DIR=tmp_path / "data")
    assert code == 1 and re.search(words, err) and err.count("\n") == 1
    assert "deeper" not in name or f"{name}: a table is read in the folder itself alone" in out


def test_two_layouts_at_once(refused, small_data):
    write(small_data / "metadata.csv", b"file_name,text\n")
    sentence = refused(TRAIN_DIR=small_data)
    assert "metadata.csv" in sentence and "caption" in sentence and "Move" in sentence
    shutil.rmtree(small_data / "caption")
    write(small_data / "metadata.jsonl", b"")
    assert "metadata.csv and metadata.jsonl" in refused(TRAIN_DIR=small_data)


def test_captions_beside_pictures(check, tmp_path):
    data, decomposed = tmp_path / "data", unicodedata.normalize("NFD", "é")
    texts = ["1.txt", "a/b/1.TXT", f"a/{decomposed}.txt", "a/alone.txt", "a/1.5.txt"]
    used = {"1.png": "1.txt", "1.jpg": "1.txt", "a/b/1.png": "a/b/1.TXT", "a/é.webp": texts[2],
            "a/1.5.png": "a/1.5.txt"}
    for name in (*used, "a/1.png"):
        write(data / name)
    for name in texts:
        write(data / name, f"in {name}".encode())
    done = check(data)
    assert done.code == 0 and done.pairs == sorted((k, f"in {v}") for k, v in used.items())
    assert done.skipped == {"a/alone.txt": "there is no picture of this name",
                            "a/1.png": "there is no caption of this name"}


def test_the_same_file_to_train_and_to_measure_on_is_told(check, small_data, tmp_path):
    to_layout(small_data, tmp_path / "measured", "<name>.txt beside")
    trained, measured = (sorted(folder.rglob("*.png")) for folder in (small_data,
                                                                      tmp_path / "measured"))
    for path in trained + measured:  # of the same sizes, and other files
        path.write_bytes(path.read_bytes() + path.relative_to(tmp_path).parts[0][:1].encode())
    done = check(small_data, VALIDATION_DIR=tmp_path / "measured")
    assert len(done.pairs) == 24 and "warning: " not in done.out + done.err
    measured[0].unlink()
    measured[0].symlink_to(trained[0])
    shutil.copy(trained[7], measured[1])  # under another name
    done = check(small_data, VALIDATION_DIR=tmp_path / "measured")
    said = (done.out + done.err).partition("warning: ")[2]
    assert "VALIDATION_DIR" in said.splitlines()[0]
    assert not [path for path in measured[:2] if str(path) not in said]


def test_pictures_are_held_out_with_all_their_pairs():
    pairs = [finetune.Pair(f"/x/{number:03}.png", f"caption {i}") for number in range(200)
             for i in range(1 + 40 * (number % 50 == 0))]

    def held_out(some: list, fraction: float = 0.1, seed: int = 42, root: str = "/x") -> set[str]:
        training, held = finetune.split_pairs(some, fraction, seed, root)
        assert sorted(training + held) == sorted(some)
        assert not {pair.picture for pair in training} & {pair.picture for pair in held}
        return {os.path.relpath(pair.picture, root) for pair in held}

    first = held_out(pairs)
    assert len(first) == 20 and first == held_out(pairs[::-1]) != held_out(pairs, seed=1)
    assert len(held_out(pairs, 0.25)) == 50 and first < held_out(pairs, 0.25)
    assert held_out(pairs, 0) == set() and len(held_out(pairs, 0.999)) == 199
    assert len(held_out(pairs[41:50], 0.01)) == 1 and held_out(pairs[:1], 0.5) == set()
    moved = [pair._replace(picture=f"/elsewhere{pair.picture}") for pair in pairs]
    assert held_out(moved, root="/elsewhere/x") == first
    for number in range(20):  # one new picture changes places with one other at most
        more = held_out([*pairs, finetune.Pair(f"/x/new {number}.png", "a cat")])
        assert len(more) == 20 and len(first - more) <= 1
    fewer = held_out([pair for pair in pairs if pair.picture != f"/x/{min(first)}"])
    assert first - fewer == {min(first)} and len(fewer - first) == 1


def test_nothing_is_held_out(command, small_data, opt_base, tmp_path):
    code, out, err = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=1,
                             VALIDATION_FRACTION=0)
    assert (code, err) == (0, "") and "pairs: 12 to train on, 0 held out" in out
    results = json.loads((tmp_path / "out/settings.json").read_text())["results"]
    assert results["held_out_loss"] == {"before": None, "after": None} and results["remarks"]
    assert len(finetune.read_csv(tmp_path / "out/pairs.csv")) == 12


def test_many_pictures_and_rows_need_little_memory(tmp_path, capsys):
    count, data = 10_000, tmp_path / "data"
    data.mkdir()
    write(tmp_path / "1.png")
    for number in range(count):
        os.symlink(tmp_path / "1.png", data / f"{number:06}.png")
    text = "a sentence that is as long as one of the captions in COCO, number"
    finetune.write_csv(data / "metadata.csv", [("file_name", "text"), *(
        (f"{number % count:06}.png", f"{text} {number}") for number in range(5 * count))])
    started = time.perf_counter()
    pairs, skipped = finetune.find_pairs(str(data))
    seconds = time.perf_counter() - started
    tracemalloc.start()
    finetune.find_pairs(str(data))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    shutil.rmtree(data)
    with capsys.disabled():
        print(f"\n{len(pairs)} rows, {count} links: {seconds:.2f} s, "
              f"{most / len(pairs):.0f} bytes a pair")
    assert len(pairs) == 5 * count and not skipped and most < 1000 * len(pairs)


# ---- Models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cuda:63"])
def test_a_gpu_that_is_not_there(refused, small_data, opt_base, device):
    if torch.cuda.device_count() > int(device.partition(":")[2] or 0):
        pytest.skip("it is there")
    sentence = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base, DEVICE=device)
    assert f"DEVICE is {device!r}" in sentence and "--device cpu" in sentence


@pytest.mark.parametrize("name, config, words", [
    ("no-such/model", None, "network"), ("no/such/folder", None, "network"), ("a b", None, ""),
    ("model", None, ""), ("model", {}, ""), ("model", {"model_type": "bert"}, "bert"),
    ("model", {"model_type": "opt"}, "not a BLIP-2"),
    ("model", {"model_type": "instructblip",
               "architectures": ["InstructBlipForConditionalGeneration"]}, "InstructBlip"),
    ("model", {"model_type": "blip-2", "architectures": ["Blip2ForImageTextRetrieval"]},
     "Blip2ForImageTextRetrieval"),
    ("model", {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "code"),
])  # fmt: skip
def test_what_is_no_captioning_blip2(
    refused, small_data, tmp_path, monkeypatch, name, config, words
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked to run code"))
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/own.py").write_text("raise SystemExit('code of a model was run')")
    if config is not None:
        Path("model/config.json").write_text(json.dumps(config))
    sentence = refused(TRAIN_DIR=small_data, MODEL_ID=name)
    shown = os.path.abspath(name) if name == "model" else name
    assert f"can't load MODEL_ID {shown!r}" in sentence and words in sentence
    assert "is a Blip2ForConditionalGeneration" not in sentence


@pytest.mark.parametrize("damage, words", [
    ("cut", ""), ("pointer", ""), ("lacks a tensor", "language_projection.weight"),
    ("another shape", "language_projection.weight"), ("pickled", "safetensors"),
    ("no tokenizer", "tokenizer")])
def test_a_damaged_model(refused, small_data, opt_base, tmp_path, damage, words):
    model = shutil.copytree(opt_base, tmp_path / "model")
    weights, tensors = model / "model.safetensors", load_file(model / "model.safetensors")
    [name] = [name for name in tensors if name.endswith("language_projection.weight")]
    weight = tensors.pop(name)
    if damage in ("cut", "pointer"):  # which git leaves without its LFS
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1000] if damage == "cut" else b"version https://git-lfs\n")
    elif damage in ("lacks a tensor", "another shape"):
        save_file(tensors | ({name: weight[1:].clone()} if "shape" in damage else {}), weights)
    elif damage == "pickled":
        torch.save(tensors | {name: weight}, model / "pytorch_model.bin")
    for path in model.glob({"pickled": "*.safetensors", "no tokenizer": "tok*"}.get(damage, "-")):
        path.unlink()
    sentence = refused(TRAIN_DIR=small_data, MODEL_ID=model)
    assert repr(str(model)) in sentence and words in sentence


@pytest.mark.parametrize("targets", ["query", r"vision_model\..*\.qkv", ".*", ""])
def test_lora_targets_that_cannot_be_used(refused, small_data, opt_base, targets):
    sentence = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base, LORA_TARGETS=targets)
    assert f"LORA_TARGETS {targets!r} must match some of these" in sentence
    assert re.search(r"^  language_model.*\\d\+.*q_proj$", sentence, re.M)


def test_captions_longer_than_the_model_has_positions(refused, small_data, opt_base):
    sentence = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base, MAX_CAPTION_TOKENS=999)
    assert "999" in sentence and "256 positions" in sentence and "Lower" in sentence


# ---- --caption ----------------------------------------------------------------------------------


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


def test_caption_prints_a_line_a_picture_and_names_the_rest(
    command, small_data, finished, tmp_path, monkeypatch
):
    moved = shutil.copytree(finished, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    *good, other = sorted(str(path) for path in (small_data / "Image").rglob("*.png"))
    single, odd = shutil.move(other, tmp_path / "single"), [name for name in ODD if len(name) < 99]
    for name in odd:
        shutil.copy(good[0], small_data / "Image" / name)
    broken = {"a.png": (b"", "none of JPEG"), "z.jpg": (HEIC, "save it as JPEG"),
              "notes\n.doc": (b"text", "none of JPEG")}
    write(small_data / "Image" / "single.txt", b"a caption beside a picture is not named")
    for name, (content, _) in broken.items():
        write(small_data / "Image" / name, content)
    before = tree(tmp_path)
    paths = [str(tmp_path / "missing.png"), str(single), "data/Image"]
    code, out, err = command("--caption", *paths, OUTPUT_DIR=moved, NUM_WORKERS=1)
    assert code == 1 and tree(tmp_path) == before
    rows = [line.split("\t") for line in out.split("\n")[:-1]]
    expected = {str(single), *(os.path.relpath(path, tmp_path) for path in good),
                *(f"data/Image/{ODD[name]}" for name in odd)}
    assert {path for path, _, _ in rows} == expected and len(rows) == len(expected)
    assert all(re.search(r"\w+ \w+", caption) and re.fullmatch(r"[01]\.\d{4}", confidence)
               and 0 < float(confidence) <= 1 for _, caption, confidence in rows)
    assert not re.search(CONTROL, out.replace("\t", "") + err)
    reasons = {f"data/Image/{finetune.printable(name)}": why for name, (_, why) in broken.items()}
    for path, why in {**reasons, str(tmp_path / "missing.png"): "No such file"}.items():
        [line] = [line for line in err.splitlines() if f"  {path}: " in line]
        assert why in line

    code, out, err = command("--caption", str(single), OUTPUT_DIR=moved, NUM_BEAMS=3)
    assert code == 0 and out.startswith(f"{single}\t") and out.count("\n") == 1
    (tmp_path / "nothing").mkdir()
    code, out, err = command("--caption", str(tmp_path / "nothing"), OUTPUT_DIR=moved)
    assert (code, out) == (1, "") and "nothing" in err  # an exit code alone says too little


@pytest.mark.parametrize("files", [
    {}, {"settings.json": b" "}, {"settings.json": b"{}"}, {"settings.json": b"[]"},
    {"adapter_model.safetensors": None, "settings.json": b"{}"},
    {"adapter_config.json": b"{", "settings.json": None, "adapter_model.safetensors": None},
    {"adapter_config.json": None, "settings.json": None, "adapter_model.safetensors": b"x"}])
def test_caption_without_a_finished_run(refused, small_data, finished, tmp_path, files):
    for name, content in files.items():
        write(tmp_path / "run" / name, content or (finished / name).read_bytes())
    sentence = refused("--caption", str(small_data / "Image"), OUTPUT_DIR=tmp_path / "run")
    assert repr(str(tmp_path / "run")) in sentence and "Train one first" in sentence
