"""Settings: each is a constant and a flag, and what can't be used is told in a sentence."""

import math
import re
import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import assert_words, flags_of

import finetune

SCRIPT = Path(finetune.__file__).resolve()

# ---- Flags --------------------------------------------------------------------------------------


@pytest.fixture
def help_text(monkeypatch, capsys) -> str:
    """What --help prints, on one line."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    return " ".join(capsys.readouterr().out.split())


def test_every_setting_is_a_flag_whose_help_is_its_comment(help_text):
    block = SCRIPT.read_text(encoding="utf-8").split("# ==== ")[1]
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*): \w+ = .+?  # (.+)$", block, re.M))
    assert comments.keys() == finetune.SETTINGS.keys()
    for name, comment in comments.items():
        assert comment in help_text, name


@pytest.mark.parametrize("name", finetune.SETTINGS)
def test_a_flag_sets_its_setting(name, help_text):
    kind = finetune.SETTINGS[name]
    value = False if kind is bool else kind(3)
    flags = flags_of({name: value})

    assert flags[0] in help_text
    assert getattr(finetune.parse_arguments(flags), name) == value


@pytest.mark.parametrize(
    "words", [["--epoch", "3"], ["--epochs", "1.5"], ["picture.png"], ["--caption"]]
)
def test_wrong_usage_exits_with_2(words):
    with pytest.raises(SystemExit, match="^2$"):
        finetune.main(words)


@pytest.mark.parametrize(
    "word, flag",
    [
        ("--train_dir", "--train-dir"),
        ("--TRAIN_DIR=flowers", "--train-dir"),
        ("--epoch", "--epochs"),
        ("-check", "--check"),
        ("--write_txt", "--write-txt"),
    ],
)
def test_a_flag_that_does_not_exist_is_told_with_the_nearest(word, flag, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        finetune.main([word])
    assert f"unrecognized arguments: {word}. Did you mean {flag!r}?" in capsys.readouterr().err


FOR_CAPTION = ("OUTPUT_DIR", "DEVICE", "NUM_WORKERS", "NUM_BEAMS")
IGNORED_BY_CAPTION = [["--check"], ["--restart"]]
for name in finetune.SETTINGS:
    if name not in FOR_CAPTION:
        IGNORED_BY_CAPTION.append(flags_of({name: getattr(finetune, name)}))


@pytest.mark.parametrize("words", IGNORED_BY_CAPTION, ids=lambda words: words[0])
def test_a_flag_that_caption_would_ignore_is_refused(words, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        finetune.main(["--caption", "x", *words])
    assert_words(capsys.readouterr().err, ("leave out", *FOR_CAPTION))


# ---- Values -------------------------------------------------------------------------------------


def test_all_wrong_flags_are_reported_at_once(refused):
    wrong = {
        "DEVICE": "tpu",
        "DTYPE": "int8",
        "LORA_TARGETS": "(q_proj",
        "LOG_WITH": "all",
        "MODEL_ID": "",
        "TRAIN_DIR": "",
        "OUTPUT_DIR": "",
    }
    for name, kind in finetune.SETTINGS.items():
        if kind in (int, float):
            wrong[name] = "-1"
    wrong["SEED"] = str(2**40)

    _, *lines = refused(**wrong).splitlines()

    assert len(lines) == len(wrong)
    for name, value in wrong.items():
        [line] = [line for line in lines if line.startswith(f"  {name} is ")]
        assert_words(line, (value, "must be"))


@pytest.mark.parametrize(
    "name, value",
    [
        ("EPOCHS", True),
        ("LEARNING_RATE", math.nan),
        ("LORA_TARGETS", ["q_proj", "v_proj"]),
        ("LOAD_IN_4BIT", "no"),
    ],
)
def test_a_constant_of_another_type_is_refused(refused, monkeypatch, name, value):
    monkeypatch.setattr(finetune, name, value)
    assert f"  {name} is {value!r}; it must be" in refused("--check")


@pytest.mark.parametrize(
    "line, edited, named",
    [
        ("EPOCHS: int = ", "EPOCH: int = ", ["EPOCH", "EPOCHS"]),
        ("EPOCHS: int = ", "EPOCHS = ", ["EPOCHS"]),
        ("LORA_RANK: int", "LORA_RNAK: float = 1.0\nLORA_RANK: int", ["LORA_RNAK"]),
        *(
            (f"{name}: str = ", f"{name} = ", [name])
            for name in ("TRAIN_DIR", "MODEL_ID", "PROMPT", "DEVICE")
        ),
    ],
    ids=["another name", "no type", "one more", "path", "model", "prompt", "device"],
)
def test_a_misspelled_constant_is_named(tmp_path, capsys, line, edited, named):
    source = SCRIPT.read_text(encoding="utf-8").replace(f"\n{line}", f"\n{edited}")
    path = tmp_path / "edited.py"
    path.write_text(source, encoding="utf-8")

    assert runpy.run_path(str(path))["main"](["--check"]) == 1
    error = capsys.readouterr().err
    assert re.findall(r"^  (\w+) is missing, misspelled", error, re.M) == named


# ---- Folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"OUTPUT_DIR": ".."}, "current folder"),
        ({"OUTPUT_DIR": "/proc"}, "mount point"),
        ({"OUTPUT_DIR": "data"}, "TRAIN_DIR"),
        ({"OUTPUT_DIR": "link/out"}, "TRAIN_DIR"),
        ({"OUTPUT_DIR": "all", "TRAIN_DIR": "to all"}, "TRAIN_DIR"),
        ({"OUTPUT_DIR": "new", "TRAIN_DIR": "new.unfinished"}, "TRAIN_DIR"),
        ({"OUTPUT_DIR": "new", "TRAIN_DIR": "new.unfinished/data"}, "TRAIN_DIR"),
        ({"OUTPUT_DIR": "all", "VALIDATION_DIR": "all/data"}, "VALIDATION_DIR"),
        ({"OUTPUT_DIR": "all", "MODEL_ID": "all/model"}, "MODEL_ID"),
    ],
)
def test_an_output_folder_that_would_take_other_files_along_is_refused(
    refused, small_data, opt_base, monkeypatch, settings, words
):
    monkeypatch.chdir(small_data.parent)
    shutil.copytree("data", "all/data")
    shutil.copytree("data", "new.unfinished/data")
    shutil.copytree(opt_base, "all/model")
    Path("link").symlink_to("data/Image")
    Path("to all").symlink_to("all/data")

    error = refused(**{"TRAIN_DIR": "data", "MODEL_ID": opt_base, "EPOCHS": 1} | settings)

    [line] = [line for line in error.splitlines() if words in line]
    assert_words(line, (repr(settings["OUTPUT_DIR"]), "choose a separate folder"))
    assert not list(small_data.parent.rglob("*.lock"))


# ---- New: paths as people write them, and what the environment lacks ----------------------------


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    """The folder that ~ stands for; the current folder is another one."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


def test_a_tilde_is_the_home_folder_in_every_path(command, home, small_data, opt_base):
    shutil.move(small_data, home / "data")
    shutil.copytree(home / "data", home / "measured")
    shutil.copytree(opt_base, home / "model")

    code, out, err = command(
        TRAIN_DIR="~/data",
        VALIDATION_DIR="~/measured",
        MODEL_ID="~/model",
        OUTPUT_DIR="~/adapter",
        EPOCHS=1,
    )

    assert (code, err) == (0, "")
    assert (home / "adapter/adapter_model.safetensors").exists()
    assert f"layout of {home / 'data'}: " in out
    assert list(Path().iterdir()) == []  # no folder named ~


def test_a_tilde_that_is_not_at_the_start_is_a_letter(check, home, small_data):
    shutil.move(small_data, "data~1")
    assert len(check("data~1").pairs) == 12


@pytest.mark.parametrize("name", ["TRAIN_DIR", "VALIDATION_DIR", "OUTPUT_DIR", "MODEL_ID"])
@pytest.mark.parametrize(
    "path", ["D:\new\train", "C:\temp\blip2", "D:/data\x07\f", "E:\rose\001"], ids=repr
)
def test_a_path_with_a_control_character_is_told_how_to_write_it(
    refused, small_data, monkeypatch, name, path
):
    """'D:\\new' in Python text holds a line break: the backslash needs another one."""
    monkeypatch.chdir(small_data.parent)
    settings = {"TRAIN_DIR": small_data, "MODEL_ID": "no-such/model"} | {name: path}
    error = refused(**settings)
    assert_words(error, (name, repr(path)[1:-1], "backslash", "/"))
    assert "network" not in error
    assert not list(Path().glob("*.lock"))


@pytest.mark.parametrize("path", ["D:\new\train", "\x07.png"], ids=repr)
def test_a_path_to_caption_with_a_control_character_is_told(refused, tmp_path, path):
    error = refused("--caption", path, OUTPUT_DIR=tmp_path)
    assert_words(error, "backslash")


@pytest.mark.parametrize(
    "tracker, package",
    [("wandb", "wandb"), ("mlflow", "mlflow"), ("comet_ml", "comet-ml"), ("clearml", "clearml")],
)
def test_the_missing_package_of_a_tracker_is_named(refused, small_data, tracker, package):
    if find_spec(tracker):
        pytest.skip("it is installed here")
    error = refused(TRAIN_DIR=small_data, LOG_WITH=tracker)
    assert_words(error, ("LOG_WITH", f"pip install {package}"))


def test_a_misspelled_tracker_is_not_a_package_to_install(refused, small_data):
    error = refused(TRAIN_DIR=small_data, LOG_WITH="wandbb")
    assert_words(error, ("LOG_WITH", "'wandbb'", "wandb"))
    assert "pip install wandbb" not in error


@pytest.mark.parametrize(
    "variable",
    ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"],
)
def test_another_engine_of_accelerate_is_refused(
    refused, small_data, opt_base, monkeypatch, variable
):
    """`accelerate launch` sets it, as `accelerate config` was answered."""
    monkeypatch.setenv(variable, "true")
    error = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=1)
    assert_words(error, variable)


def test_an_engine_that_is_switched_off_is_not_refused(check, small_data, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert check(small_data).code == 0
