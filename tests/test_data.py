"""What a user can get wrong - settings, folders, captions, pictures, models - and what is said."""

import ast
import codecs
import csv
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune
from finetune import NAMED, PictureError, read_picture

SCRIPT = Path(finetune.__file__).resolve()
VERBS = "Check|Copy|Download|Get|Give|Install|Lower|Mend|Name|Put|Rename|Replace|Set|Train|Try|Use"
REMEDY = re.compile(rf"must be|belong|counted from 0|[.:;] ((Or )?({VERBS})|Or use) ")
HEIC = b"\0\0\0\x18ftypheic" + bytes(100)
QUADRANTS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]  # in reading order


def quadrants(width: int = 64, height: int = 48) -> Image.Image:
    picture = Image.fromarray(np.array(QUADRANTS, np.uint8).reshape(2, 2, 3))
    return picture.resize((width, height), Image.Resampling.NEAREST)


def colors(picture: Image.Image) -> list[tuple]:
    """The four quadrants' colours, each to the nearest primary: what lossy formats keep."""
    width, height = picture.size
    places = [(x, y) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [tuple(255 * round(part / 255) for part in picture.getpixel(xy)) for xy in places]


def tree(folder: Path) -> dict[Path, tuple]:
    """Everything below a folder, with kind, time and content."""
    states = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (state.st_mode, state.st_mtime_ns, stat.S_ISREG(state.st_mode)
                   and path.read_bytes()) for path, state in states.items()}


def listed(out: str, kind: str) -> set[tuple[str, ...]]:
    """The rows of --check that begin with "pair" or "not used"."""
    rows = [line.split("\t") for line in out.splitlines() if line.startswith(f"{kind}\t")]
    assert len(rows) == len({tuple(row) for row in rows})
    return {tuple(row[1:]) for row in rows}


@pytest.fixture
def refused(command, tmp_path):
    """Calls `command`, which has to end in a sentence and to leave alone whatever is there.

    Gives stdout and the sentence.
    """

    def call(*flags, **settings) -> tuple[str, str]:
        before = tree(tmp_path)
        code, out, err = command(*flags, **settings)
        assert code == 1 and "Traceback" not in err, err
        sentence = err[err.index("error: ") :]
        lines = 1 + sentence.count("; it must be ")  # a line for each wrong setting
        assert sentence.count("\n") == lines and REMEDY.search(sentence), sentence
        after = tree(tmp_path)
        assert all(after[path] == old for path, old in before.items() if not path.is_dir())
        new = {path.relative_to(tmp_path).parts for path in after.keys() - before.keys()}
        assert not [parts for parts in new - {("out",)} if ".features" not in parts]
        return out, sentence

    return call


@pytest.fixture
def data(tmp_path) -> Path:
    """A TRAIN_DIR with no pair yet."""
    for name in ("caption", "Image"):
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


def add(data: Path, name: str, caption: bytes | None = b"a cat", *pictures: str) -> list[str]:
    """Writes a caption, and pictures below Image/, whose paths it gives."""
    if caption is not None:
        (data / "caption" / f"{name}.txt").write_bytes(caption)
    paths = [data / "Image" / picture for picture in pictures]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        quadrants().save(path, format="PNG")
    return [str(path) for path in paths]


# ---- Settings and flags -------------------------------------------------------------------------


BLOCK = SCRIPT.read_text(encoding="utf-8").split("# ==== ")[1]
SETTINGS = [(name, ast.literal_eval(value), comment) for name, value, comment
            in re.findall(r"^([A-Z][A-Z0-9_]*) = (.+?)  # (.+)$", BLOCK, re.M)]


def flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def test_every_setting_is_a_flag_of_its_type_with_its_comment_as_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stopped:
        finetune.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and len(SETTINGS) == BLOCK.count(" = ") > 20
    options = re.findall(r"^  (--[a-z0-9-]+)", text, re.M)
    for name, value, comment in SETTINGS:
        on, off, kind = flag(name), flag(f"NO_{name}"), type(value)
        shown = f"{on}, {off}" if kind is bool else f"{on} {kind.__name__.upper()}"
        assert options.count(on) == 1 and f"{shown} {comment}" in " ".join(text.split())
        cases = {int: [([on, "3"], 3)], float: [([on, "1"], 1.0), ([on, "2e-3"], 0.002)],
                 str: [([on, "x y"], "x y")], bool: [([off], False), ([on], True)]}
        for words, expected in cases[kind]:
            parsed = vars(finetune.parse_arguments(words))
            assert parsed[name] == expected and type(parsed[name]) is kind
            assert all(parsed[other] == old for other, old, _ in SETTINGS if other != name)
        if kind is int:
            with pytest.raises(SystemExit) as stopped:
                finetune.main([on, "1.5"])
            assert stopped.value.code == 2 and on in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--learning-rates 1", "--epoch 3", "--load-in-4bit no",
                                   "--seed x", "--caption", "picture.png"])
def test_wrong_usage_exits_2(command, words):
    with pytest.raises(SystemExit) as stopped:
        command(*words.split())
    assert stopped.value.code == 2


@pytest.mark.parametrize("value", ["-1", str(2**40)])
def test_all_wrong_settings_are_reported_at_once(refused, data, value):
    add(data, "cat", b"a cat", "cat.png")
    wrong = {name: value for name, old, _ in SETTINGS if type(old) in (int, float)}
    wrong |= {"DEVICE": "tpu", "DTYPE": "int8", "LORA_TARGETS": "(q_proj"}
    _, sentence = refused(TRAIN_DIR=data, **wrong)
    for name, given in wrong.items():
        [line] = re.findall(rf"^  {name} is .*", sentence, re.M)
        assert given in line and "must be" in line


@pytest.mark.parametrize("name, value", [
    ("EPOCHS", 1.5), ("EPOCHS", True), ("LEARNING_RATE", float("nan")), ("PROMPT", None),
    ("LORA_TARGETS", ["q_proj", "v_proj"]), ("LOAD_IN_4BIT", "no"), ("EPOCHS", "ten"),
    ("MODEL_ID", ""), ("OUTPUT_DIR", ""), ("LOG_WITH", "no tracker"),
])
def test_a_setting_edited_to_another_type_is_reported(data, monkeypatch, capsys, name, value):
    add(data, "cat", b"a cat", "cat.png")
    monkeypatch.setattr(finetune, name, value)
    code = finetune.main(["--check", f"--train-dir={data}"])
    assert code == 1 and f"{name} is {value!r}; it must be" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["EPOCH = 10", "EPOCHS: int = 10", "# EPOCHS = 10"])
def test_a_misspelled_setting_is_named(line, tmp_path, monkeypatch, capsys):
    text = SCRIPT.read_text(encoding="utf-8")
    (tmp_path / "finetune.py").write_text(re.sub(r"^EPOCHS = .*$", line, text, flags=re.M))
    monkeypatch.setattr(finetune, "__file__", str(tmp_path / "finetune.py"))
    assert finetune.main(["--check"]) == 1
    assert "EPOCHS are missing or misspelled. Put" in capsys.readouterr().err


def test_importing_says_and_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import finetune"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())


# ---- Pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["", "caption", "Image"])
def test_a_missing_folder_is_named(refused, data, missing):
    shutil.rmtree(data / missing)
    _, sentence = refused(TRAIN_DIR=data)
    assert f"no folder {str(data / missing)!r}" in sentence and "<name>" in sentence


@pytest.mark.parametrize("flags", [(), ("--check",)], ids=["train", "check"])
def test_no_pair_at_all(refused, data, flags):
    near = {add(data, "a sunflower", b"a flower", "a sunflowers/1.png")[0]: "a sunflower",
            str(data / "caption/a sunflower.txt"): "a sunflowers"}
    alone = [data / f"caption/{number:02}.txt" for number in range(NAMED + 2 if flags else 1)]
    for path in alone:
        path.write_text("a cat")
    out, sentence = refused(*flags, TRAIN_DIR=data, MODEL_ID="no-such/model")
    assert str(data / "Image") in sentence and str(data / "caption") in sentence
    for path, name in near.items():
        [line] = [line for line in out.splitlines() if path in line]
        assert f"did you mean {name!r}" in line
    assert [path for path in alone if str(path) not in out] == []


def test_check_lists_everything_and_writes_nothing(command, data, tmp_path):
    used = add(data, "cat", b"a cat", "cat/1.png", "cat/deep/er/2.png", "cat.png")
    add(data, "dog", b" \n", "dog/1.png")
    add(data, "bird", None, "bird/1.png")
    (data / "Image/cat/text.jpg").write_text("no picture")
    for number in range(NAMED + 2):
        add(data, f"alone {number:02}")
    before = tree(tmp_path)
    code, out, _ = command("--check", TRAIN_DIR=data, MODEL_ID="no-such/model")
    assert code == 0 and listed(out, "pair") == {(path, "a cat") for path in used}
    reasons = {path.removeprefix(f"{data}/"): why for path, why in listed(out, "not used")}
    assert "empty" in reasons.pop("caption/dog.txt") and "empty" in reasons.pop("Image/dog/1.png")
    assert "no " in reasons.pop("Image/bird/1.png") and "JPEG" in reasons.pop("Image/cat/text.jpg")
    assert reasons.keys() == {f"caption/alone {number:02}.txt" for number in range(NAMED + 2)}
    assert tree(tmp_path) == before

    for path in used:
        Path(path).write_bytes(b"")
    code, out, _ = command("--check", TRAIN_DIR=data, MODEL_ID="no-such/model")
    assert code == 1 and not listed(out, "pair")
    assert listed(out, "not used") >= {(path, "is empty") for path in used}


def test_encodings_of_captions(command, data):
    texts = {"bom": codecs.BOM_UTF8 + "a café".encode(), "plain": "a café".encode(),
             "little": codecs.BOM_UTF16_LE + "a café".encode("utf-16-le"),
             "big": codecs.BOM_UTF16_BE + "a café".encode("utf-16-be"),
             "windows": "a café".encode("cp1252"), "lines": "\n a\r\n\t\tcafé \n\n".encode()}
    used = [path for name, raw in texts.items() for path in add(data, name, raw, f"{name}.png")]
    code, out, _ = command("--check", TRAIN_DIR=data)
    assert code == 0 and listed(out, "pair") == {(path, "a café") for path in used}
    [remark] = [line for line in out.splitlines() if "Windows-1252" in line]
    assert str(data / "caption/windows.txt") in remark


def test_names(command, data, tmp_path):
    decomposed = unicodedata.normalize("NFD", "café")
    used = add(data, "café", b"a cat", f"{decomposed}/1.png")
    used += add(data, f"{decomposed}s", b"a cat", "cafés.png")
    used += add(data, "v1.5", b"a cat", "v1.5.webp", "v1.5/a.b/1")
    for name in (".hidden.png", "Thumbs.db", "desktop.ini", "__MACOSX/1.png", ".git/1.png"):
        for folder in ("Image", "Image/v1.5", "caption"):
            (data / folder / name).parent.mkdir(exist_ok=True)
            (data / folder / name).write_bytes(b"x")
    [outside] = add(data, "outside", None, "../../outside/1.png")
    (data / "Image/v1.5/linked.png").symlink_to(outside)
    for link, target in {"loop": data, "away": tmp_path / "outside"}.items():
        (data / "Image/v1.5" / link).symlink_to(target)
    code, out, _ = command("--check", TRAIN_DIR=data)
    used.append(str(data / "Image/v1.5/linked.png"))
    assert code == 0 and listed(out, "pair") == {(path, "a cat") for path in used}
    named = dict(listed(out, "not used"))
    assert named.keys() == {str(data / "Image/v1.5" / link) for link in ("loop", "away")}
    assert all("link" in reason for reason in named.values())


def test_training_uses_the_rest_and_names_what_it_skips(command, small_data, opt_base, tmp_path):
    moon, star = sorted((small_data / "Image").iterdir())[1:]
    add(small_data, "windows", "a café".encode("cp1252"), "windows.png")
    add(small_data, "blank", b"\xef\xbb\xbf\r\n", "blank/1.png", "blank/2.png")
    add(small_data, "half", b"\xff\xfea", "half.png")
    add(small_data, "sunflower", b"a flower")
    add(small_data, "sunflowers", None, "sunflowers/1.png", "lost.png")
    (small_data / "caption/notes.md").write_text("notes")
    (small_data / "caption/lost.txt").symlink_to("nowhere")
    whole = (star / "01.png").read_bytes()
    odd = os.fsdecode(b"caf\xe9.png")  # is not UTF-8
    for name, content in {"cut.png": whole[: len(whole) // 2], "zero.png": b"", "phone.jpg": HEIC,
                          "text.jpg": b"no picture", odd: b"", f"good {odd}": whole}.items():
        (star / name).write_bytes(content)
    (moon / "lost.png").symlink_to("nowhere")
    (moon / "away").symlink_to(tmp_path)
    expected = sorted((kind, f"{small_data}/{path}", why) for kind, path, why in [
        ("caption", "caption/blank.txt", "empty"), ("picture", "Image/blank/1.png", "empty"),
        ("picture", "Image/blank/2.png", "empty"), ("caption", "caption/half.txt", "utf-16"),
        ("picture", "Image/half.png", "utf-16"), ("caption", "caption/lost.txt", "No such file"),
        ("picture", "Image/lost.png", "No such file"), ("caption", "caption/notes.md", ".txt"),
        ("caption", "caption/sunflower.txt", "'sunflowers'"),
        ("picture", "Image/sunflowers/1.png", "'sunflower'"),
        ("picture", f"Image/{star.name}/cut.png", "truncated"),
        ("picture", f"Image/{star.name}/zero.png", "empty"),
        ("picture", f"Image/{star.name}/{odd}", "empty"),
        ("picture", f"Image/{star.name}/text.jpg", "none of JPEG"),
        ("picture", f"Image/{star.name}/phone.jpg", "HEIC; save it as JPEG"),
        ("picture", f"Image/{moon.name}/lost.png", "No such file"),
        ("folder", f"Image/{moon.name}/away", "link"),
    ])
    before = tree(small_data)
    code, out, err = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=1, SAMPLE_COUNT=99,
                             VALIDATION_FRACTION=0.9)  # so that all names are printed
    assert (code, err) == (0, "")
    path = tmp_path / "out/skipped.csv"
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["kind", "path", "reason"]
    assert sorted(row[:2] for row in rows) == [[kind, path] for kind, path, _ in expected]
    for (_, path, reason), (*_, why) in zip(sorted(rows), expected, strict=True):
        assert why in reason and "\n" not in reason, path
    for kind, count in Counter(kind for kind, *_ in expected).items():
        assert re.search(rf"^not used: .*\b{count} {kind}s?\b", out, re.M)
    assert out.count(f"\n  {small_data}") == NAMED and f"and {len(rows) - NAMED} more" in out
    assert "windows.txt: read as Windows-1252" in out and f"not_used:{len(rows):>16}" in out
    parts = re.search(r"^pairs: (\d+) to train on, (\d+) held out", out, re.M).groups()
    assert sum(map(int, parts)) == 3 * 4 + 2
    after = tree(small_data)
    assert all(after[path] == old for path, old in before.items())
    new = after.keys() - before.keys()
    assert {path.relative_to(small_data).parts[0] for path in new} == {".features"}


def test_training_without_a_readable_picture(refused, data, opt_base):
    add(data, "cat", b"a cat", "cat.png")
    (data / "Image/cat.png").write_text("no picture")
    out, sentence = refused(TRAIN_DIR=data, MODEL_ID=opt_base)
    assert str(data) in sentence and f"{data}/Image/cat.png: is none of" in out


# ---- Output folder, device, model ---------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/below", "foreign"])
def test_an_output_folder_that_cannot_be_used(refused, small_data, opt_base, tmp_path, place):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/adapter_model.safetensors").write_bytes(b"mine")
    _, sentence = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base, OUTPUT_DIR=tmp_path / place)
    assert f"OUTPUT_DIR {str(tmp_path / place)!r}" in sentence


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cuda:63", "cuda:999", "cuda:01"])
def test_a_gpu_that_is_not_there(refused, small_data, opt_base, device):
    if torch.cuda.device_count() > int(device.partition(":")[2] or 0):
        pytest.skip("it is there")
    _, sentence = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base, DEVICE=device)
    assert f"DEVICE is {device!r}" in sentence


@pytest.mark.parametrize("name", ["no-such/model", "no/such/folder", "a b"])
def test_an_unknown_model(refused, small_data, name):
    _, sentence = refused(TRAIN_DIR=small_data, MODEL_ID=name)
    assert repr(name) in sentence and "no such" in sentence


@pytest.mark.parametrize("config, words", [
    (None, "no model"), ({}, "no model"), ({"model_type": "bert"}, "bert"),
    ({"model_type": "opt"}, "opt"), ({"model_type": "instructblip"}, "instructblip"),
    ({"model_type": "instructblip", "architectures": ["InstructBlipForConditionalGeneration"]},
     "instructblip"),
    ({"model_type": "blip-2", "architectures": ["Blip2ForImageTextRetrieval"]}, "retrieval"),
], ids=["no config", "empty config", "bert", "opt", "instructblip", "InstructBlip", "retrieval"])
def test_a_folder_without_a_captioning_blip2(refused, small_data, tmp_path, config, words):
    model = tmp_path / "model"
    model.mkdir()
    if config is not None:
        (model / "config.json").write_text(json.dumps(config))
    _, sentence = refused(TRAIN_DIR=small_data, MODEL_ID=model)
    assert repr(str(model)) in sentence and words in sentence.lower().replace(str(model), "")
    assert "is a Blip2ForConditionalGeneration" not in sentence


def test_code_that_comes_with_a_model_is_not_run(refused, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked to run it"))
    (tmp_path / "model").mkdir()
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/own.py").write_text("raise SystemExit('run')")
    refused(TRAIN_DIR=small_data, MODEL_ID=tmp_path / "model")


@pytest.mark.parametrize("damage, words", [
    ("cut", ""), ("text", ""), ("lacks a tensor", "language_projection.weight"),
    ("another shape", "language_projection.weight"), ("pickled", "safetensors"),
    ("no tokenizer", "tokenizer")])
def test_a_damaged_model(refused, small_data, opt_base, tmp_path, damage, words):
    model = shutil.copytree(opt_base, tmp_path / "model")
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    [name] = [name for name in tensors if name.endswith("language_projection.weight")]
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "text":  # what git leaves without its LFS
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "lacks a tensor":
        save_file({key: value for key, value in tensors.items() if key != name}, weights)
    elif damage == "another shape":
        save_file(tensors | {name: tensors[name][1:].clone()}, weights)
    elif damage == "pickled":
        torch.save(tensors, model / "pytorch_model.bin")
        weights.unlink()
    else:
        for path in model.glob("tokenizer*"):
            path.unlink()
    _, sentence = refused(TRAIN_DIR=small_data, MODEL_ID=model)
    assert repr(str(model)) in sentence and words in sentence


# ---- Pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(tmp_path, kind):
    turn = Image.Transpose
    stored = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
              5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    for orientation in range(1, 9):
        picture, exif = quadrants(), Image.Exif()
        exif[0x0112] = orientation
        picture = picture.transpose(stored[orientation]) if orientation > 1 else picture
        picture.save(tmp_path / "x", format=kind, exif=exif)
        upright = read_picture(str(tmp_path / "x"), 32)
        assert (upright.size, colors(upright)) == ((64, 48), QUADRANTS), orientation


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_formats_are_known_by_content_and_truncations_raise(tmp_path, kind, recwarn):
    path = tmp_path / "picture.txt"
    quadrants().save(path, format=kind)
    picture = read_picture(str(path), 32)
    assert (picture.mode, picture.size, colors(picture)) == ("RGB", (64, 48), QUADRANTS)
    whole, failed = path.read_bytes(), 0
    for length in {*range(0, len(whole), max(1, len(whole) // 80)), *range(len(whole))[-12:]}:
        path.write_bytes(whole[:length])
        try:
            assert read_picture(str(path), 32).size == (64, 48)
        except PictureError as error:
            assert str(error)
            failed += length <= len(whole) // 2
    assert failed > 20 and not recwarn.list, [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "PDF", "TGA"])
def test_no_other_format_is_opened(tmp_path, kind):
    quadrants().save(tmp_path / "x.png", format=kind)
    with pytest.raises(PictureError, match="is none of JPEG"):
        read_picture(str(tmp_path / "x.png"), 32)


@pytest.mark.parametrize("mode, fill, saved, expected", [
    ("RGBA", (255, 0, 0, 0), {}, (255, 255, 255)), ("RGBA", (255, 0, 0, 51), {}, (255, 204, 204)),
    ("LA", (0, 0), {}, (255, 255, 255)), ("LA", (0, 255), {}, (0, 0, 0)),
    ("RGB", (255, 0, 0), {"transparency": (255, 0, 0)}, (255, 255, 255)),
    ("L", 7, {"transparency": 7}, (255, 255, 255)), ("P", 1, {"transparency": 1}, (255, 255, 255)),
    ("P", 1, {"transparency": 0}, (200, 10, 10)), ("P", 1, {}, (200, 10, 10)),
    ("P", 1, {"format": "GIF", "transparency": 1}, (255, 255, 255)),
    ("RGBA", (255, 0, 0, 0), {"format": "WEBP"}, (255, 255, 255)),
    ("CMYK", (0, 255, 255, 0), {"format": "JPEG"}, (255, 0, 0)), ("1", 1, {}, (255, 255, 255)),
    ("I;16", 65535, {}, (255, 255, 255)), ("I;16", 32896, {}, (128, 128, 128)),
    ("I;16", 257, {"format": "TIFF"}, (1, 1, 1)), ("I;16B", 32896, {"format": "TIFF"}, (128,) * 3),
])
def test_modes(tmp_path, mode, fill, saved, expected):
    picture = Image.new(mode, (16, 16), fill)
    if mode == "P":
        picture.putpalette([0, 0, 0, 200, 10, 10])
    picture.save(tmp_path / "x", **{"format": "PNG"} | saved)
    read = read_picture(str(tmp_path / "x"), 32)
    error = np.abs(np.asarray(read) - np.float32(expected)).max()
    assert read.mode == "RGB" and error <= (saved.get("format") == "JPEG")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (64, 48), color) for color in ("black", "red")]
    quadrants().save(tmp_path / "x", format=kind, save_all=True, append_images=frames)
    assert colors(read_picture(str(tmp_path / "x"), 32)) == QUADRANTS


@pytest.mark.parametrize("size, most", [((1600, 1200), 200), ((2000, 130), 130), ((127, 900), 127),
                                        ((48, 4000), 48)])
def test_large_jpegs_are_decoded_smaller_but_not_too_small(tmp_path, size, most):
    quadrants(*size).save(tmp_path / "x.jpg")
    read = read_picture(str(tmp_path / "x.jpg"), 32)
    assert min(64, *size) <= min(read.size) <= most and colors(read) == QUADRANTS
    assert read.width / read.height == pytest.approx(size[0] / size[1], rel=0.02)


def bmp_header(side: int) -> bytes:
    return struct.pack("<2sIIIIiiHH24x", b"BM", 54, 0, 54, 40, side, side, 1, 24)


@pytest.mark.parametrize("content, why", [
    (b"", "is empty"), (b"no picture", "none of JPEG"), (HEIC, "HEIC; save it as JPEG"),
    (HEIC.replace(b"heic", b"heix"), "HEIC"), (HEIC.replace(b"heic", b"mif1"), "HEIC"),
    (bmp_header(60000), "pixels"), (bmp_header(9500), "can't be read"),
    (Path.mkdir, "not a file"), (os.mkfifo, "not a file"),
    (lambda path: path.symlink_to("nowhere"), "No such file"),
], ids=["empty", "text", "heic", "heix", "mif1", "bomb", "large", "folder", "pipe", "broken link"])
def test_what_is_no_picture(tmp_path, recwarn, content, why):
    def too_long(*_):
        raise TimeoutError  # instead of waiting for a pipe for ever

    path = tmp_path / "x.jpg"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    try:
        with pytest.raises(PictureError, match=why):
            read_picture(str(path), 32)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert not recwarn.list, [str(warning.message) for warning in recwarn]


# ---- Captions as tokens, and --caption ----------------------------------------------------------


def test_special_tokens_in_captions_are_text(any_base):
    base = finetune.load_base(any_base, "see <image>", "cpu", "float32", False)
    tokenizer, image = base.processor.tokenizer, base.model.config.image_token_index
    assert base.prefix.count(image) == base.num_query_tokens
    captions = ["a red <image> circle", "<pad>a</s> b<s> <unk>", "a cat"]
    tokenized, cut = finetune.tokenize_captions(captions, base, "", 100)
    assert cut == 0 and list(tokenized) == captions
    for caption, ids in tokenized.items():
        assert ids[-1] == base.stop and not {base.stop, *tokenizer.all_special_ids} & {*ids[:-1]}
        assert tokenizer.decode(ids[:-1]).strip() == caption


def test_caption_names_what_it_cannot_read(command, refused, small_data, opt_base, tmp_path):
    assert command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=1)[0] == 0
    *good, other = sorted(str(path) for path in (small_data / "Image").rglob("*.png"))
    single = shutil.move(other, tmp_path / "single")
    broken = {str(small_data / "Image/a.png"): (b"", "empty"),
              str(small_data / "Image/z.jpg"): (HEIC, "HEIC")}
    for path, (content, _) in broken.items():
        Path(path).write_bytes(content)
    before = tree(tmp_path)
    code, out, err = command("--caption", str(single), str(small_data / "Image"))
    assert code == 1 and tree(tmp_path) == before
    rows = [line.split("\t") for line in out.splitlines()]
    assert [path for path, _ in rows] == [str(single), *good]
    assert all(re.fullmatch(r"an? .*(circle|moon|star).*", caption) for _, caption in rows)
    for path, (_, why) in broken.items():
        [line] = [line for line in err.splitlines() if path in line]
        assert why in line
    code, out, err = command("--caption", str(tmp_path / "missing.png"))
    assert (code, out) == (1, "") and str(tmp_path / "missing.png") in err

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(whole[: len(whole) // 2])
        out, sentence = refused("--caption", str(single))
        assert out == "" and repr(str(tmp_path / "out")) in sentence
        (tmp_path / "out" / name).write_bytes(whole)


@pytest.mark.parametrize("record", [None, "", "{}", "[]"])
@pytest.mark.parametrize("adapter", [False, True])
def test_caption_without_a_finished_run(refused, small_data, tmp_path, record, adapter):
    run = tmp_path / "run"
    run.mkdir()
    if adapter:
        save_file({"x": torch.zeros(1)}, run / "adapter_model.safetensors")
    if record is not None:
        (run / "settings.json").write_text(record)
    out, sentence = refused("--caption", str(small_data / "Image"), OUTPUT_DIR=run)
    assert out == "" and repr(str(run)) in sentence
