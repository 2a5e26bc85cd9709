"""What users bring and what they get wrong - settings, folders, captions, tables, models - and
that each of it is told in a sentence, with nothing touched."""

import json
import math
import os
import re
import runpy
import shutil
import stat
import subprocess
import tracemalloc
import unicodedata
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flags_of
from PIL import Image
from safetensors.torch import load, load_file, save

import finetune

SCRIPT = Path(finetune.__file__).resolve()
CONTROL = r"[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
ODD = {  # name -> how it is printed
    "new\nline": r"new\nline", "x\tforged\ta cat": r"x\tforged\ta cat", "return\r": r"return\r",
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07", "\x7f\x9b31m": r"\x7f\x9b31m",
    "next\x85line\u2028\u2029": r"next\x85line\u2028\u2029", "\u202egnp.exe": r"\u202egnp.exe",
    os.fsdecode(b"caf\xe9 \xff"): r"caf\udce9 \udcff",
} | {name: name for name in (
    'double "quotes\'s"', "a,comma", "=1+1", "--restart", " space ", "%s {0}", "$(touch x)", "*?",
    "back\\nslash", "日本語", "می\u200cخواهم", "👩\u200d👩\u200d👧",  # these joiners are needed
)}  # fmt: skip


def tree(folder: Path) -> dict[Path, tuple]:
    """Everything below a folder, with time and content."""
    return {path: (path.lstat().st_mtime_ns, stat.S_ISREG(path.lstat().st_mode)
                   and path.read_bytes()) for path in folder.rglob("*")}


def write(path: Path, content: bytes | None = None) -> None:
    """A file of this content, or a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        Image.new("RGB", (16, 16)).save(path, format="PNG")
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


def assert_reasons(skipped: dict[str, str], expected: dict[str, str]) -> None:
    """Exactly these are not used, each for a reason with these words."""
    assert skipped.keys() == expected.keys()
    assert not {path: why for path, why in skipped.items() if expected[path] not in why}


@pytest.fixture
def check(command, tmp_path):
    """check(folder) -> code, pairs, skipped, out, err of --check, which must write nothing."""

    def call(folder: Path, *flags: str, **settings) -> SimpleNamespace:
        before = tree(tmp_path)
        code, out, err = command("--check", *flags, TRAIN_DIR=folder, MODEL_ID="no-such/model",
                                 **settings)
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
        assert all(path.suffix == ".lock" or ".features" in str(path)
                   for path in after.keys() - before.keys())
        sentence = err[err.index("error: ") :]
        assert code == 1 and sentence.count("\n") == 1 + sentence.count("\n  "), sentence
        return sentence

    return call


# ---- Settings -----------------------------------------------------------------------------------


def test_every_setting_is_a_flag_with_its_comment_as_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    block = SCRIPT.read_text(encoding="utf-8").split("# ==== ")[1]
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*): \w+ = .+?  # (.+)$", block, re.M))
    assert finetune.SETTINGS.keys() == comments.keys()
    for name, kind in finetune.SETTINGS.items():
        given = {name: False if kind is bool else kind(3)}
        assert flags_of(given)[0] in text and comments[name] in text
        assert vars(finetune.parse_arguments(flags_of(given))).items() >= given.items()


FOR_CAPTION = ("OUTPUT_DIR", "DEVICE", "NUM_WORKERS", "NUM_BEAMS")
IGNORED = [["--check"], ["--restart"], *(flags_of({name: getattr(finetune, name)})
                                         for name in finetune.SETTINGS if name not in FOR_CAPTION)]


@pytest.mark.parametrize("words", [
    ["--epoch", "3"], ["--epochs", "1.5"], ["picture.png"], ["--caption"],
    *(["--caption", "x", *words] for words in IGNORED)])
def test_wrong_usage_exits_2_also_flags_that_caption_would_ignore(capsys, words):
    with pytest.raises(SystemExit, match="^2$"):
        finetune.main(words)
    said = capsys.readouterr().err
    assert len(words) < 3 or "leave out" in said and all(name in said for name in FOR_CAPTION)


def test_all_wrong_settings_are_reported_at_once(refused, monkeypatch):
    wrong = {name: "-1" for name, kind in finetune.SETTINGS.items() if kind in (int, float)}
    wrong |= {"DEVICE": "tpu", "DTYPE": "int8", "LORA_TARGETS": "(q_proj", "LOG_WITH": "no such",
              "MODEL_ID": "", "TRAIN_DIR": "", "OUTPUT_DIR": "", "SEED": str(2**40)}
    lines = refused(**wrong).splitlines()[1:]
    assert len(lines) == len(wrong)
    for name, value in wrong.items():
        [line] = [line for line in lines if line.startswith(f"  {name} is ")]
        assert value in line and "must be" in line
    edited = {"EPOCHS": True, "LEARNING_RATE": math.nan, "LORA_TARGETS": ["q_proj", "v_proj"],
              "LOAD_IN_4BIT": "no"}
    for name, value in edited.items():
        monkeypatch.setattr(finetune, name, value)
    said = refused("--check")
    assert all(f"  {name} is {value!r}; it must be" in said for name, value in edited.items())


@pytest.mark.parametrize("old, new, named", [
    ("EPOCHS: int = ", "EPOCH: int = ", ["EPOCH", "EPOCHS"]),
    ("EPOCHS: int = ", "EPOCHS = ", ["EPOCHS"]),
    ("LORA_RANK: int", "LORA_RNAK: float = 1.0\nLORA_RANK: int", ["LORA_RNAK"])])
def test_a_misspelled_setting_is_named(old, new, named, tmp_path, capsys):
    path = tmp_path / "edited.py"
    path.write_text(SCRIPT.read_text(encoding="utf-8").replace(f"\n{old}", f"\n{new}"))
    assert runpy.run_path(str(path))["main"](["--check"]) == 1
    assert re.findall(r"^  (\w+) is missing, misspelled", capsys.readouterr().err, re.M) == named


@pytest.mark.parametrize("settings, words", [
    ({"OUTPUT_DIR": ".."}, "current folder"), ({"OUTPUT_DIR": "/proc"}, "mount point"),
    ({"OUTPUT_DIR": "data"}, "TRAIN_DIR"), ({"OUTPUT_DIR": "link/out"}, "TRAIN_DIR"),
    ({"OUTPUT_DIR": "all", "TRAIN_DIR": "to all"}, "TRAIN_DIR"),
    ({"OUTPUT_DIR": "new", "TRAIN_DIR": "new.unfinished"}, "TRAIN_DIR"),
    ({"OUTPUT_DIR": "new", "TRAIN_DIR": "new.unfinished/data"}, "TRAIN_DIR"),
    ({"OUTPUT_DIR": "all", "VALIDATION_DIR": "all/data"}, "VALIDATION_DIR"),
    ({"OUTPUT_DIR": "all", "MODEL_ID": "all/model"}, "MODEL_ID")])
def test_an_output_folder_of_others(refused, small_data, opt_base, monkeypatch, settings, words):
    monkeypatch.chdir(small_data.parent)
    shutil.copytree("data", "all/data")
    shutil.copytree("data", "new.unfinished/data")
    shutil.copytree(opt_base, "all/model")
    Path("link").symlink_to("data/Image")
    Path("to all").symlink_to("all/data")
    sentence = refused(**{"TRAIN_DIR": "data", "MODEL_ID": opt_base, "EPOCHS": 1} | settings)
    [line] = [line for line in sentence.splitlines() if words in line]
    assert repr(settings["OUTPUT_DIR"]) in line and "name a folder of its own" in line
    assert not list(small_data.parent.rglob("*.lock"))


# ---- Captions and names -------------------------------------------------------------------------


def test_check_lists_everything_and_writes_nothing(check, tmp_path):
    data, text, nfd = tmp_path / "data", "a “café” – 5 €", unicodedata.normalize("NFD", "café")
    captions = {
        "bom": b"\xef\xbb\xbf" + text.encode(), "little": b"\xff\xfe" + text.encode("utf-16-le"),
        "big": b"\xfe\xff" + text.encode("utf-16-be"), f"{nfd}s": text.encode(),
        "lines": "\n a\r\n\t\t“café” \u2028\xa0\x0b– 5 €\n".encode(), "café": text.encode(),
        "v1.5": text.encode(), "most": b"x" * 1_000_000}
    used = [f"{name}/1.png" for name in captions if "café" not in name] + [
        f"{nfd}/1.png", "cafés.png", "v1.5.webp", "v1.5/deep/er/2.png", "bom.jpg"]
    bad = {  # with a picture, and the reason for both
        "rose": (text.encode("cp1252"), "UTF-8; save it so, README"), "empty": (b"", "empty"),
        "blank": (b" \r\n\xe3\x80\x80", "empty"), "zeros": (bytes(99), "no text in UTF-8"),
        "half": (b"\xff\xfea", "UTF-8"), "no bom": (text.encode("utf-16-le"), "UTF-8"),
        "large": (b"x" * 1_000_001, "1 MB"), "two": (b"a cat", "2 captions")}
    reasons = {"caption/alone.txt": "no picture of this name", "caption/two.TXT": "2 captions",
               "caption/notes.md": "is not caption/<name>.txt", "Image/bom/text.jpg": "as JPEG",
               "caption/deeper/cat.txt": "is not caption/<name>.txt"}
    for path in reasons:
        write(data / path, b"a cat")
    for name, content in captions.items():
        write(data / f"caption/{name}.txt", content)
    for name, (content, why) in bad.items():
        write(data / f"caption/{name}.txt", content)
        write(data / f"Image/{name}.png")
        reasons |= {f"caption/{name}.txt": why, f"Image/{name}.png": why}
    for path in (*used, "bird/1.png", "pipe.png", "lost/1.png"):
        write(data / "Image" / path)
    for name in (".hidden.png", "Thumbs.db", "desktop.ini", "__MACOSX/1.png", ".git/1.png"):
        for folder in ("Image/v1.5", "caption"):
            write(data / folder / name, b"ignored")
    os.mkfifo(data / "caption/pipe.txt")
    (data / "caption/lost.txt").symlink_to("nowhere")
    (data / "Image/v1.5/away").symlink_to(tmp_path)
    reasons |= {"Image/v1.5/away": "link", "Image/bird/1.png": "no caption of this name",
                "caption/pipe.txt": "not a file", "Image/pipe.png": "not a file",
                "caption/lost.txt": "No such file", "Image/lost/1.png": "No such file"}
    done = check(data, "--restart", EPOCHS=3, PROMPT="x", LOAD_IN_4BIT=False, DEVICE="cuda:7")
    expected = [(f"Image/{path}", "x" * 1_000_000 if "most" in path else text) for path in used]
    assert done.code == 0 and done.pairs == sorted(expected)
    assert_reasons(done.skipped, reasons)
    assert "caption/ and Image/" in done.out and f"pairs: {len(used)}\n" in done.out
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    [remedy] = re.findall(r"`([^`]*1252[^`]* rose\.txt)`", readme)
    subprocess.run(["bash", "-c", remedy], cwd=data / "caption", check=True)
    assert check(data).pairs == sorted([*expected, ("Image/rose.png", text)])


@pytest.mark.parametrize("flags, near", [((), "Images"), (("--check",), "image")])
def test_no_pair_at_all(command, small_data, tmp_path, opt_base, flags, near):
    run, data = partial(command, *flags, MODEL_ID=opt_base), tmp_path / "none"
    code, _, err = run(TRAIN_DIR=data)
    assert code == 1 and repr(str(data)) in err
    for number in range(12):
        write(data / f"caption/alone {number:02}.txt", b"a cat")
    write(data / near / "alone 00.png", b"no picture")
    code, out, err = run(TRAIN_DIR=data)
    assert code == 1 and f"There is {near!r}: rename it to 'Image'" in err
    assert all(word in err for word in ("caption/<name>.txt", "metadata.csv", "<name>.jpg"))
    assert out.count("alone ") == (12 if flags else 10)
    (data / near).rename(data / "Image")
    for some, measured in ((data, ""), (data, small_data), (small_data, data)):
        assert run(TRAIN_DIR=some, VALIDATION_DIR=measured)[0] == 1


def test_odd_names_and_captions_are_one_line_each(check, command, opt_base, tmp_path):
    data, base, output = (tmp_path / f"odd \x1b[1m\n {name}" for name in ("data", "base", "out"))
    pairs, skipped = [], set()
    for name, shown in ODD.items():
        caption = f"a {name} cat </s>".encode(errors="replace")
        write(data / f"caption/{name}.txt", caption)
        write(data / f"caption/{name} alone.txt", caption)
        write(data / f"Image/{name}/{name}")
        write(data / f"Image/{name}/cut.png", b"\x89PNG\r\n\x1a\n")
        text = finetune.printable(" ".join(caption.decode().split()))
        pairs.append((f"Image/{shown}/{shown}", text))
        skipped |= {f"caption/{shown} alone.txt", f"Image/{shown}/cut.png"}
    done, before = check(data), tree(data)
    assert not re.search(CONTROL, done.out.replace("\t", "") + done.err)
    assert done.pairs == sorted(pairs) and done.skipped.keys() == skipped
    shutil.copytree(opt_base, base)
    for prompt, said in (("a photo of", "cut: 5 captions, at MAX_CAPTION_TOKENS = 20"),
                         (" a  photo\nof ", "this run is finished"), ("", "the earlier run is in")):
        code, out, err = command(TRAIN_DIR=data, MODEL_ID=base, OUTPUT_DIR=output, PROMPT=prompt,
                                 EPOCHS=1, SAMPLE_COUNT=99, VALIDATION_FRACTION=0.5,
                                 MAX_CAPTION_TOKENS=20)  # two have just as many
        assert (code, err) == (0, "") and said in out and not re.search(CONTROL, out)
    assert skipped == {finetune.printable(os.path.relpath(row["path"], data))
                       for row in finetune.read_csv(output / "skipped.csv")}
    shutil.rmtree(data / ".features")
    assert tree(data) == before


# ---- Layouts, and what is held out --------------------------------------------------------------


def write_table(path: Path, rows: list[dict], bom: bytes = b"") -> None:
    if path.suffix == ".csv":
        finetune.write_csv(path, [rows[0], *(row.values() for row in rows)])
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    path.write_bytes(bom + path.read_bytes())


@pytest.mark.parametrize("layout", ["metadata.csv", "metadata.jsonl", "<name>.txt beside"])
def test_the_sample_in_another_layout_is_the_same(sample, tmp_path, command, opt_base, layout):
    data, (pairs, skipped) = tmp_path / "data", finetune.find_pairs(str(sample))
    assert len(pairs) == 208 and not skipped
    both = finetune.split_pairs(pairs, 0.1, 42, str(sample))
    rows = [(split, os.path.relpath(picture, sample), text) for split, some
            in zip(("train", "held out"), both, strict=True) for picture, text in some]
    shutil.copytree(sample / "Image", data / "Image")
    if layout.startswith("metadata"):
        write_table(data / layout, [{"file_name": name, "text": text} for _, name, text in rows])
    else:
        for _, name, text in rows:
            write((data / name).with_suffix(".txt"), text.encode())
    code, out, err = command(TRAIN_DIR=data, MODEL_ID=opt_base, LEARNING_RATE=3e-3, EPOCHS=5)
    assert code == 0 and "0 before, 21 after, of 21" in out, err
    assert f"layout of {data}: {layout}" in out and "not used" not in out
    assert sorted(rows) == sorted(
        (row["split"], os.path.relpath(row["picture"], data), row["caption"])
        for row in finetune.read_csv(tmp_path / "out/pairs.csv"))


@pytest.mark.parametrize("name, bom", [
    ("metadata.csv", b""), ("metadata.csv", b"\xef\xbb\xbf"), ("metadata.jsonl", b"\xef\xbb\xbf")])
def test_a_table(check, tmp_path, name, bom):
    """With text alone, or beside a caption that is not used; with caption alone, after a BOM."""
    data, decomposed = tmp_path / "data", unicodedata.normalize("NFD", "café.png")
    for path in ("a/1.png", f"a/{decomposed}", "2.png", "lonely.png", "../outside.png"):
        write(data / path)
    used = [("a/1.png", "a cat", "a/1.png"), ("a\\1.png", "le café,\n \"noir\"", "a/1.png"),
            ("./a//1.png", "a third", "a/1.png"), (str(data / "a/1.png"), "a fourth", "a/1.png"),
            ("a/café.png", "a cat", f"a/{decomposed}"), ("2.png", "x" * 200_000, "2.png")]
    skipped = [("2.png", "", "is empty"), ("a/1.png", "a  cat", "earlier row is the same"),
               ("no.png", "x", "no such file"), ("../outside.png", "x", "out of the folder"),
               (str(tmp_path / "outside.png"), "x", "out of the folder"), ("", "x", "no such file")]
    column = "caption" if bom else "text"
    write_table(data / name, [{"caption": "not used", "file_name": path, column: text}
                              for path, text, _ in used + skipped], bom)
    done = check(data)
    assert done.code == 0
    assert done.pairs == sorted((file, " ".join(text.split())) for _, text, file in used)
    assert done.skipped.pop("lonely.png").endswith(name)
    reasons = dict(re.findall(rf"^  .*{name}, (row \d+): (.*)$", done.out, re.M))
    assert_reasons(reasons, {f"row {i}": why for i, (_, _, why) in enumerate(skipped, 7)})


def test_names_of_a_table_can_be_written_to_another(tmp_path):
    """Half a letter, too, which no file of Linux has in its name."""
    write(tmp_path / "metadata.jsonl", rb'{"file_name": "b\ud83d.jpg", "text": "a cat"}' b"\n"
          b'{"file_name": "1.png", "text": "a cat"}')
    write(tmp_path / "1.png")
    _, skipped = finetune.find_pairs(str(tmp_path))
    finetune.write_csv(tmp_path / "skipped.csv", skipped)
    assert 'b\\ud83d.jpg",there is no such file' in (tmp_path / "skipped.csv").read_text()


def test_letters_that_the_model_does_not_know_are_counted(command, t5_base, small_data, tmp_path):
    """As in Flan-T5, whose tokenizer has no bytes to fall back to."""
    base = shutil.copytree(t5_base, tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    tokenizer["model"]["unk_token"] = "<unk>"
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    for number, path in enumerate(sorted(small_data.glob("caption/*.txt"))):
        path.write_text("a \u6f22 cat" if number < 2 else f"cat {number}", encoding="utf-8")
    code, out, err = command(TRAIN_DIR=small_data, MODEL_ID=base, EPOCHS=1)
    assert (code, err) == (0, "") and "unknown: 2 captions" in out


@pytest.mark.parametrize("name, content, words", [
    ("metadata.csv", b"image,caption\n1.png,a red, star\n",
     "'image', 'caption'(?!, None).*file_name and text.*rename"),
    ("metadata.csv", b"file_name;text\n1.png;a cat\n", "commas"),
    ("metadata.csv", "file_name,text\n1.png,café".encode("cp1252"), "UTF-8"),
    ("metadata.csv", b'file_name,text\n1.png,"a cat\n', "can't be read"),
    ("metadata.csv", b"", "no picture in"), ("metadata.jsonl", b"{}", "file_name and text"),
    ("metadata.jsonl", b"file_name,text\n1.png,a cat\n", "can't be read"),
    ("metadata.jsonl", b'["1.png", "a cat"]', "can't be read"),
    ("metadata.jsonl", b'{"file_name": "1.png", "text": "a cat"}\n' * 2 + b'{"file', r"row 3\b"),
    ("deeper/metadata.csv", b"file_name,text\n1.png,a cat\n",
     "deeper/metadata.csv: a table is read in the folder itself alone(.|\n)*no picture in"),
    ("metadata.csv", b"file_name,text\n1.png,a red, star\n",  # which must not be cut
     "row 1: 1.png: .*put quotes around a caption with commas\n(.|\n)*no picture in"),
    ("metadata.jsonl", rb'{"file_name": "1.png", "text": "half a letter, \ud83d"}',
     "row 1: 1.png: the caption is not in UTF-8; .*\n(.|\n)*no picture in"),
    ("caption/1.txt", b"a cat", "metadata.csv and caption in .*Move the other out"),
    ("metadata.jsonl", b"{}", "metadata.csv and metadata.jsonl in .*Move the other out")])
def test_a_table_that_cannot_be_used(command, tmp_path, name, content, words):
    write(tmp_path / "data/1.png")
    if "Move the other out" in words:
        write(tmp_path / "data/metadata.csv", b"file_name,text\n1.png,a cat\n")
    write(tmp_path / "data" / name, content)
    code, out, err = command("--check", TRAIN_DIR=tmp_path / "data")
    assert code == 1 and re.search(words, out + err) and err.count("\n") == 1


def test_many_rows_need_little_memory(tmp_path):
    """Below 1 kB for each pair, so that a million fit anywhere."""
    for number in range(100):
        write(tmp_path / f"{number}.png", b"")
    rows = (f"{number % 100}.png,a caption of picture number {number}" for number in range(20_000))
    write(tmp_path / "metadata.csv", "\n".join(["file_name,text", *rows]).encode())
    tracemalloc.start()
    pairs, _ = finetune.find_pairs(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == 20_000 and peak < 1000 * len(pairs)


def test_captions_beside_pictures(check, tmp_path):
    data, decomposed = tmp_path / "data", unicodedata.normalize("NFD", "é")
    used = {"1.png": "1.txt", "1.jpg": "1.txt", "a/b/1.png": "a/b/1.TXT",
            "a/é.webp": f"a/{decomposed}.txt", "a/1.5.png": "a/1.5.txt"}
    for name in (*used, "a/1.png"):
        write(data / name)
    for name in (*used.values(), "a/alone.txt"):
        write(data / name, f"in {name}".encode())
    done = check(data)
    assert done.code == 0 and done.pairs == sorted((k, f"in {v}") for k, v in used.items())
    assert_reasons(done.skipped, {"a/alone.txt": "there is no picture of this name",
                                  "a/1.png": "there is no caption of this name"})


def test_the_same_file_to_train_and_to_measure_on_is_told(check, command, small_data, tmp_path):
    """--check names all, a training the first ten."""
    folder = shutil.copytree(small_data, tmp_path / "measured")
    trained, measured = (sorted(some.rglob("*.png")) for some in (small_data, folder))
    for path in measured:  # of the same size, and another file
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    measured[0].unlink()
    measured[0].symlink_to(trained[0])
    copies = [measured[0], *(measured[1].with_stem(f"copy{number}") for number in range(10, 21))]
    for path in copies[1:]:
        shutil.copy(trained[7], path)
    for out, count in ((check(small_data, VALIDATION_DIR=folder).out, 12), (command(
            TRAIN_DIR=small_data, VALIDATION_DIR=folder, MODEL_ID="no-such/model")[1], 10)):
        said = re.sub(".*\t.*", "", out.partition("warning: 12 pictures ")[2])  # without the list
        assert [path for path in copies if str(path) in said] == copies[:count]


def test_pictures_are_held_out_with_all_their_pairs():
    pairs = [finetune.Pair(f"/x/{number:03}.png", f"caption {i}") for number in range(200)
             for i in range(1 + 40 * (number % 50 == 0))]

    def held_out(some: list, fraction: float = 0.1, seed: int = 42, root: str = "/x") -> set[str]:
        sides = finetune.split_pairs(some, fraction, seed, root)
        assert sorted(sum(sides, [])) == sorted(some)
        training, held = ({os.path.relpath(pair.picture, root) for pair in side} for side in sides)
        assert not training & held
        return held

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


# ---- Models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, words", [
    pytest.param({"DEVICE": "cuda"}, "DEVICE is 'cuda', .*--device cpu",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")),
    ({"DEVICE": "cuda:63"}, "DEVICE is 'cuda:63', .*--device cpu"),
    ({"MODEL_ID": "no-such/model"}, "can't load MODEL_ID 'no-such/model'.*network"),
    ({"MAX_CAPTION_TOKENS": 999}, "999.*256 positions.*Lower"),
    *(({"LORA_TARGETS": targets}, re.escape(f"LORA_TARGETS {targets!r} must be attention, all-")
       + r"linear, or match(.|\n)*^  language_model.*\\d\+.*q_proj$")
      for targets in ("query", r"vision_model\..*\.qkv", ".*"))])
def test_what_machine_or_model_do_not_have(refused, small_data, opt_base, settings, words):
    sentence = refused(**{"TRAIN_DIR": small_data, "MODEL_ID": opt_base} | settings)
    assert re.search(words, sentence, re.M)


PROJECTION = "language_projection.weight"


@pytest.mark.parametrize("name, change, words", [
    ("config.json", None, ""), ("config.json", lambda _: b'{"model_type": "opt"}', "not a BLIP-2"),
    ("config.json", lambda raw: raw.replace(b"ForConditionalGeneration", b"ForImageTextRetrieval"),
     "Blip2ForImageTextRetrieval"),
    ("config.json", lambda _: b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}',
     "code"),
    ("tokenizer.json", None, "tokenizer"), ("model.safetensors", None, "safetensors"),
    ("model.safetensors", lambda raw: raw[:-1000], ""),
    ("model.safetensors", lambda raw: save({name: tensor for name, tensor in load(raw).items()
                                            if name != PROJECTION}), PROJECTION),
    ("model.safetensors", lambda raw: save(load(raw) | {PROJECTION: torch.zeros(3, 3)}),
     PROJECTION)])
def test_a_bad_model(refused, small_data, opt_base, monkeypatch, name, change, words):
    """Its own code is not run, and pickled weights are not loaded."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked to run code"))
    monkeypatch.chdir(small_data.parent)
    model = shutil.copytree(opt_base, small_data.with_name("model"))
    torch.save(load_file("model/model.safetensors"), "model/pytorch_model.bin")
    write(model / "own.py", b"raise SystemExit('code of a model was run')")
    if change:
        write(model / name, change((model / name).read_bytes()))
    else:
        (model / name).unlink()
    sentence = refused(TRAIN_DIR=small_data, MODEL_ID="model")
    assert f"can't load MODEL_ID {str(model)!r}" in sentence and words in sentence


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


def test_caption_prints_a_line_a_picture(command, refused, small_data, finished, monkeypatch):
    monkeypatch.chdir(small_data.parent)
    shutil.copytree(finished, "mov\x1bed")
    *good, other = sorted(str(path) for path in Path("data/Image").rglob("*.png"))
    shutil.move(other, "single")
    for name in ODD:
        shutil.copy(good[0], f"data/Image/{name}")
    bad = {"a.png": b"", "z.jpg": b"no picture", "notes\n.doc": b"text"}
    for name, content in (bad | {"single.txt": b"beside a picture: it is not named"}).items():
        write(Path("data/Image", name), content)
    before = tree(Path())
    code, out, err = command("--caption", "missing.png", "single", "data/Image",
                             OUTPUT_DIR="mov\x1bed", NUM_WORKERS=1)
    assert code == 1 and tree(Path()) == before
    rows = [line.split("\t") for line in out.split("\n")[:-1]]
    assert sorted(path for path, _, _ in rows) == sorted(
        ["single", *good, *(f"data/Image/{shown}" for shown in ODD.values())])
    assert all(re.search(r"\w+ \w+", caption) and re.fullmatch(r"[01]\.\d{4}", confidence)
               and 0 < float(confidence) <= 1 for _, caption, confidence in rows)
    assert not re.search(CONTROL, out.replace("\t", "") + err)
    assert_reasons(dict(re.findall(r"^  (\S+): (.+)$", err, re.M)), {
        "missing.png": "No such file",
        **{f"data/Image/{finetune.printable(name)}": "none of JPEG" for name in bad}})
    Path("nothing").mkdir()
    assert "there is no file in ['nothing']" in refused("--caption", "nothing")


@pytest.mark.parametrize("files", [
    {}, {"settings.json": b"[]"}, {"adapter_model.safetensors": None, "settings.json": b"{}"},
    {"adapter_config.json": b"{", "settings.json": None, "adapter_model.safetensors": None},
    {"adapter_config.json": None, "settings.json": None, "adapter_model.safetensors": b"x"}])
def test_caption_without_a_finished_run(refused, small_data, finished, tmp_path, files):
    for name, content in files.items():
        write(tmp_path / "run" / name, content or (finished / name).read_bytes())
    sentence = refused("--caption", str(small_data / "Image"), OUTPUT_DIR=tmp_path / "run")
    assert repr(str(tmp_path / "run")) in sentence and "Train one first" in sentence
