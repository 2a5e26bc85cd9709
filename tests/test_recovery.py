"""Whatever happens to a run, the same command ends with the same adapter, and nothing is lost."""

import ctypes
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import flags_of
from PIL import Image
from runner import LIMIT, Child, Ended, fail_with, on, send, step_of, table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import finetune

SETTINGS = {  # three epochs of three steps, of which the second is the best, not the last
    "TRAIN_DIR": "data", "OUTPUT_DIR": "out", "DEVICE": "cpu", "BATCH_SIZE": 6, "EPOCHS": 3,
    "LORA_RANK": 4, "LEARNING_RATE": 1e-2, "WARMUP_FRACTION": 0.9, "VALIDATION_FRACTION": 0.25,
    "SAMPLE_COUNT": 0, "CHECKPOINT_MINUTES": 1e-6, "NUM_WORKERS": 1,
}  # fmt: skip
STEPS, PICTURES = 9, 24


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, with its bytes, but for locks, which may stay."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".lock"}


def results(folder: Path) -> dict:
    """All that a finished run has measured, but for the time it took."""
    losses = [(row["step"], row["train_loss"], row["held_out_loss"])
              for row in table(folder / "metrics.csv")]
    record = json.loads((folder / "settings.json").read_text())
    return record["results"] | {"seconds": 0, "losses": losses}


def assert_one_sentence(error: str, *needed: str) -> None:
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(words in error for words in needed), error


class Runs:
    """A folder with TRAIN_DIR data/ and OUTPUT_DIR out/, and the command that is given there."""

    def __init__(self, folder: Path, base: str, reference: Path | None = None) -> None:
        self.folder, self.data, self.out = folder, folder / "data", folder / "out"
        self.unfinished = folder / "out.unfinished"
        self.settings = SETTINGS | {"MODEL_ID": base}
        self.reference = reference or self.out  # what an uninterrupted run leaves
        self.earlier: dict[str, bytes] = {}  # the finished run of which OUTPUT_DIR is full

    def copy(self, folder: Path, *without: str) -> "Runs":
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(*without))
        return Runs(folder, self.settings["MODEL_ID"], self.reference)

    def has_earlier(self) -> None:
        """A finished run with another setting, and with a file of its own."""
        shutil.copytree(self.reference, self.out)
        record = (self.out / "settings.json").read_text()
        (self.out / "settings.json").write_text(record.replace('"SEED": 42', '"SEED": 41'))
        (self.out / "held_out.csv").write_text("of the earlier run")
        self.earlier = tree(self.out)

    def __call__(self, *flags: str, prepare: Callable = lambda: None, **changed) -> Ended:
        """The command, to its end."""
        settings = self.settings | changed
        return Child(settings, *flags, folder=self.folder, prepare=prepare).wait()

    def at(self, event: str, action: Callable, *flags: str, **settings) -> Ended:
        """The command; the action comes at the event, must come, and costs no checkpoint."""
        step = multiprocessing.RawValue("i", -1)  # shared with the child

        def act() -> None:
            step.value = step_of(self.folder)
            action()

        ended = self(*flags, prepare=lambda: on(event, act), **settings)
        assert step.value >= 0, f"{event} never came: {ended}"
        assert ended.code == 0 or step_of(self.folder) >= step.value, ended
        self.keeps_the_earlier()
        return ended

    def killed(self, event: str, *flags: str) -> None:
        assert self.at(event, send(signal.SIGKILL), *flags).code == -signal.SIGKILL

    def finishes(self, *flags: str, **settings) -> Ended:
        """The command ends as the uninterrupted run did."""
        ended = self(*flags, **settings)
        assert ended.code == 0, ended
        self.is_whole()
        return ended

    def refuses(self, *flags: str, **settings) -> str:
        """The command says why it does nothing, and does nothing."""
        before, ended = tree(self.folder), self(*flags, **settings)
        assert ended.code == 1 and "Traceback" not in ended.err, ended
        looked_at = "the vision side" in ended.err or "that can't be read: [" in ended.err
        assert ("model: " in ended.out) == looked_at, "no weights are loaded to refuse a run"
        assert tree(self.folder) == before
        return ended.err

    def is_whole(self) -> None:
        """Bit by bit, with all that a run leaves, and nothing else."""
        names = {path.name for path in self.reference.iterdir()}
        assert {path.name for path in self.out.iterdir()} == names
        for name in names - {"settings.json", "adapter_config.json", "metrics.csv", "report.png",
                             "README.md"}:
            assert (self.out / name).read_bytes() == (self.reference / name).read_bytes(), name
        assert results(self.out) == results(self.reference)
        with Image.open(self.out / "report.png") as report:
            report.load()
        assert "# BLIP-2 captions: out" in (self.out / "README.md").read_text()
        assert not self.unfinished.exists()
        self.keeps_the_earlier()
        assert len(list(self.folder.glob("out-????-??-??"))) == bool(self.earlier)

    def keeps_the_earlier(self) -> None:
        """In its place, or renamed by the date."""
        assert not self.earlier or self.earlier in map(tree, self.folder.glob("out*"))


@pytest.fixture(scope="module")
def reference(opt_base, sample, tmp_path_factory) -> Runs:
    """The uninterrupted run on six captions with four pictures each: two batches to encode."""
    runs = Runs(tmp_path_factory.mktemp("reference") / "run", opt_base)
    shutil.copytree(sample, runs.data, ignore=shutil.ignore_patterns(
        "circle-*", "moon-*", "square-*", "triangle-*", "0[5-9].png", "1?.png"))
    ended = runs()
    assert ended.code == 0 and f"{PICTURES} to encode, 0 known" in ended.out, ended
    left = results(runs.out)
    assert len(left["losses"]) == 1 + STEPS and left["best_step"] == 6
    assert len(list(runs.data.glob(".features/*/*.safetensors"))) == 2
    return runs


@pytest.fixture(scope="module")
def killed_once(reference, tmp_path_factory) -> Runs:
    runs = reference.copy(tmp_path_factory.mktemp("killed") / "run", "out*")
    runs.killed("before step 5")
    assert step_of(runs.folder) == 4 and not runs.out.exists()
    return runs


def copy_of(run: str, *without: str):
    """A fixture: a folder of its own, with what that run has left."""
    return pytest.fixture(lambda request, tmp_path: request.getfixturevalue(run).copy(
        tmp_path / "run", *without))


new = copy_of("reference", "out*", ".features")
encoded = copy_of("reference", "out*")
finished = copy_of("reference")
unfinished = copy_of("killed_once")

# ---- Killed, and stopped ------------------------------------------------------------------------

KILLS = {  # fixture: events while it loads and encodes
    "new": [
        "before load 1", "after load 1", "before encode 1", "before encode 2 | before encode 1",
        "after open *.safetensors.part 1", "before replace *.safetensors 1",
        "after replace *.safetensors 1"],
    "encoded": [  # as it trains, at epochs' ends, as it saves, and in place
        "before caption 1", "after caption 1", "before step 1", "after step 2", "before measure 2",
        "after measure 3", "before step 3 | before step 1 | after step 4", "before adapter 1",
        "before processor 1", "after adapter 2", "before replace *settings.json 2",
        "before serialize 1", "after open *metrics.csv 4", "after open *checkpoint.pt.part 4",
        "before replace *checkpoint.pt 1", "before replace *checkpoint.pt 6",
        "after replace *checkpoint.pt 3", "after replace *checkpoint.pt 9",
        "before rename *.unfinished 1", "after rename *.unfinished 1"],
}  # fmt: skip
FINISH = [  # in its order, when the second captions and the third adapter are made
    "before caption 2", "before adapter 3", "after open *pairs.csv 1", "after open *held_out.csv 1",
    "before draw 1", "before replace *report.png 1", "after replace *README.md 1",
    "before replace *settings.json 4", "before unlink *checkpoint.pt 2",
    "after unlink *checkpoint.pt 2", "before rename *out 1", "after rename *out 1",
    "before rename *.unfinished 1", "after rename *.unfinished 1",
]  # fmt: skip


@pytest.mark.parametrize("there, plan", [(there, plan) for there in KILLS for plan in KILLS[there]])
def test_killed_anywhere_it_ends_with_the_same_adapter(there, plan, request):
    runs = request.getfixturevalue(there)
    for event in plan.split(" | "):
        runs.killed(event)
    done = step_of(runs.folder)
    assert (f", {done} done" in runs.finishes().out) == bool(done)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("event", FINISH)
def test_stopped_while_it_finishes(event, number, encoded):
    """With an earlier run in OUTPUT_DIR, which is usable until it is renamed by the date."""
    encoded.has_earlier()
    ended = encoded.at(event, send(number))
    assert ended.code == (130 if number == signal.SIGINT else -number), ended
    assert "Traceback" not in ended.err
    assert "rename" in event or tree(encoded.out) == encoded.earlier
    ended = encoded.finishes()
    assert f", {STEPS} done" in ended.out or "this run is finished" in ended.out, ended


@pytest.mark.parametrize("there, event, signals, code, step", [
    ("new", "after encode 2", (signal.SIGTERM,), 143, 0),  # encoded, and not kept yet
    ("encoded", "before step 1", (signal.SIGINT,), 130, 2),  # not at the end of an epoch
    ("encoded", "after step 5", (signal.SIGINT,), 130, 6),
    ("encoded", "before step 4", (signal.SIGTERM,), 143, 5),
    ("encoded", "before measure 2", (signal.SIGINT,), 130, 4),
    ("encoded", "before step 9", (signal.SIGINT,), 130, 9),
    ("encoded", "before step 5", (signal.SIGINT, signal.SIGINT), -signal.SIGINT, 3),
    ("encoded", "before step 5", (signal.SIGINT, signal.SIGTERM), -signal.SIGTERM, 3),
])  # fmt: skip
def test_a_signal_keeps_what_is_done(there, event, signals, code, step, request):
    """A second one kills at once: what is done since the last checkpoint is done again."""
    runs = request.getfixturevalue(there)
    ended = runs.at(event, lambda: [send(number)() for number in signals], CHECKPOINT_MINUTES=0)
    assert ended.code == code and "Traceback" not in ended.err, ended
    assert ended.err.endswith("stopped; a training continues by the same command, without "
                              "--restart if its steps had begun\n") == (code > 0)
    assert step_of(runs.folder) == step and not runs.out.exists()
    ended = runs.finishes(CHECKPOINT_MINUTES=0)
    assert ("8 to encode, 16 known" if there == "new" else "0 to encode") in ended.out


def test_a_restart_gives_up_the_old_run_when_it_trains_and_for_good(encoded):
    """That one was killed when it had its results, this one before its first checkpoint."""
    encoded.killed("before unlink *checkpoint.pt 2")
    before = tree(encoded.unfinished)
    encoded.killed("before caption 1", "--restart")
    assert tree(encoded.unfinished) == before
    encoded.killed("before step 1", "--restart")
    assert step_of(encoded.folder) == 0
    ended = encoded.finishes()
    assert " done" not in ended.out and "is finished" not in ended.out


def test_an_unfinished_run_captions_and_so_does_the_earlier_one(unfinished, command):
    unfinished.has_earlier()
    before, picture = tree(unfinished.folder), next(unfinished.data.glob("Image/*/*.png"))
    for folder in (unfinished.out, unfinished.unfinished):
        code, captions, _ = command("--caption", str(picture), OUTPUT_DIR=folder, DEVICE="cpu")
        assert code == 0 and captions.startswith(f"{picture}\t")
    assert tree(unfinished.folder) == before


# ---- Disk full, and other faults of the machine -------------------------------------------------


@pytest.mark.parametrize("event, error", [
    ("before adapter 2", SafetensorError("I/O error: No space left on device (os error 28)")),
    ("before processor 1", Exception("No space left on device (os error 28)")),
    ("before replace *checkpoint.pt 5", OSError(errno.EIO, "Input/output error")),
    ("before replace *.safetensors 2", OSError(errno.EROFS, "Read-only file system")),
    ("before draw 1", OSError(errno.ENOSPC, "No space left on device")),
    ("before rename *out 1", PermissionError(errno.EACCES, "Permission denied")),
    ("before rename *.unfinished 1", PermissionError(errno.EACCES, "Permission denied")),
], ids=str)  # fmt: skip
def test_a_failing_write_is_a_sentence_and_loses_nothing(event, error, new):
    """As safetensors, tokenizers and the system say it; Windows holds folders with open files."""
    new.has_earlier()
    ended = new.at(event, fail_with(error))
    assert ended.code == 1
    assert_one_sentence(ended.err, str(error), "run the same command again")
    new.finishes()


def mount(target: Path) -> None:
    """For this process alone: another file system there, in memory, with what was in it."""
    maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    content = shutil.copytree(target, target.with_name("content"), dirs_exist_ok=True)
    assert not ctypes.CDLL(None).unshare(0x10020000)  # CLONE_NEWUSER, CLONE_NEWNS
    for name, text in maps.items():
        Path(f"/proc/self/{name}").write_text(text)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", target], check=True)
    shutil.copytree(content, target, dirs_exist_ok=True)


own_mounts = pytest.mark.skipif(os.system("unshare -rm true") != 0,
                                reason="no process can have mounts of its own here")


@own_mounts
@pytest.mark.parametrize("event, room", [
    ("after load 1", 0), ("after load 1", 90), ("before serialize 1", 0), ("before step 5", 50),
    ("after adapter 2", 0), ("before open *held_out.csv 1", 0), ("before draw 1", 0),
    ("after replace *README.md 1", 0),
])  # fmt: skip
def test_a_full_disk(event, room, new):
    """A real one, with so many KiB free from the event on; then a large file is deleted."""
    large = new.folder / "large"

    def fill() -> None:
        large.write_bytes(bytes(shutil.disk_usage(new.folder).free - room * 1024))

    def prepare() -> None:
        mount(new.folder)
        os.chdir(new.folder)
        on(event, fill)
        assert finetune.main(flags_of(new.settings)) == 1 and not new.out.exists()
        large.unlink()
        on("after rename *.unfinished 1", new.is_whole)

    ended = new(prepare=prepare)
    assert ended.code == 0, ended
    assert_one_sentence(ended.err, "No space left on device", "run the same command again")


@own_mounts
def test_where_train_dir_can_not_be_written_features_are_beside_output_dir(new):
    def prepare() -> None:
        mount(new.data)
        subprocess.run(["mount", "-o", "remount,ro", new.data], check=True)

    for count in (PICTURES, 0):
        assert f"pictures: {count} to encode" in new.finishes(prepare=prepare).out
        shutil.rmtree(new.out)
    assert len(list(new.folder.glob("out.features/*/*.safetensors"))) == 2


# ---- What there is, and what is asked for -------------------------------------------------------

ASKED = {"same": [], "different": ["--epochs", "1"], "restart": ["--restart"]}
TABLE = {  # what is there: what a command does then that asks for that
    "nothing": {"same": "trains", "different": "trains", "restart": "trains"},
    "unfinished": {"same": "continues", "different": "refuses", "restart": "trains"},
    "finished": {"same": "says so", "different": "moves aside", "restart": "moves aside"},
    "files": {"same": "refuses", "different": "refuses", "restart": "refuses"},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("there", TABLE)
def test_the_table_of_what_a_command_does(there, asked, request):
    does, flags = TABLE[there][asked], ASKED[asked]
    runs = request.getfixturevalue("encoded" if there in ("nothing", "files") else there)
    if there == "files":
        runs.out.mkdir()
        (runs.out / "adapter_model.safetensors").write_bytes(b"of another program")
    if does == "refuses":
        assert ("--restart" in runs.refuses(*flags)) == (there == "unfinished")
        return
    if does == "moves aside":
        runs.earlier = tree(runs.out)
        (runs.folder / time.strftime("out-%Y-%m-%d")).write_text("stays, and a number is added")
    before, ended = tree(runs.folder), runs(*flags)
    assert ended.code == 0, ended
    assert ("this run is finished" in ended.out) == (does == "says so")
    assert (", 4 done" in ended.out) == (does == "continues")
    assert ("the earlier run is in " in ended.out) == bool(runs.earlier)
    if does == "says so":
        assert tree(runs.folder) == before
    elif asked == "different":
        assert len(results(runs.out)["losses"]) == 1 + STEPS // 3 and not runs.unfinished.exists()
        runs.keeps_the_earlier()
    else:
        runs.is_whole()


def test_a_link_stays_and_what_it_points_to_is_used(encoded):
    encoded.has_earlier()
    real = encoded.out.rename(encoded.folder / "real")
    encoded.out.symlink_to(real)
    assert encoded().code == 0 and encoded.out.is_symlink()
    (aside,) = encoded.folder.glob("real-*")
    assert tree(aside) == encoded.earlier
    assert tree(real)["held_out.csv"] == tree(encoded.reference)["held_out.csv"]


@pytest.mark.parametrize("change, settings, said", [
    ("nothing", {"LEARNING_RATE": 1e-3}, "LEARNING_RATE: 0.01 then, 0.001 now"),
    ("a caption", {}, "pictures or captions: '24 pairs, "),
    ("a caption of VALIDATION_DIR", {"VALIDATION_DIR": "measured"}, "captions: '48 pairs, "),
    ("one picture more", {}, " then, '25 pairs, "),
    ("a picture renamed", {}, "pictures or captions: '24 pairs, "),
    ("a picture one byte longer", {}, "pictures or captions: '24 pairs, "),
    ("a picture spoiled", {}, "pictures that can't be read: [] then, ["),
])  # fmt: skip
def test_another_run_is_refused_where_one_is_unfinished(change, settings, said, unfinished):
    """A picture is spoiled by as many bytes that are none, which only the decoder sees."""
    picture, data = sorted(unfinished.data.glob("Image/*/*.png"))[7], unfinished.data
    if change == "a caption of VALIDATION_DIR":
        data = shutil.copytree(data, unfinished.folder / "measured")
        unfinished.killed("before step 2", "--restart", "--validation-dir", "measured")
    if "a caption" in change:
        sorted(data.glob("caption/*.txt"))[3].write_text("another style")
    elif change == "one picture more":
        shutil.copy(picture, picture.with_name("another.png"))
    elif change == "a picture renamed":  # it stays the last of its name
        picture.rename(picture.with_stem(f"{picture.stem}b"))
    elif change == "a picture one byte longer":
        picture.write_bytes(picture.read_bytes() + b"x")
    elif change == "a picture spoiled":
        picture.write_bytes(bytes(picture.stat().st_size))
    error = unfinished.refuses(**settings)
    assert said in error and "--restart" in error and error.count(" then, ") == 1


def test_another_base_under_the_same_path_is_refused(encoded, opt_base):
    base = encoded.folder / "base"
    shutil.copytree(opt_base, base)
    encoded.settings["MODEL_ID"] = str(base)
    encoded.killed("before step 5")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "vision_model" in name)
    save_file(weights | {name: weights[name] + 0.01}, base / "model.safetensors", {"format": "pt"})
    assert "the vision side of MODEL_ID: " in encoded.refuses()
    shutil.copytree(opt_base, base, dirs_exist_ok=True)
    assert ", 4 done" in encoded.finishes().out


def test_what_changes_nothing_may_change(unfinished):
    """Settings, and all times, as of a data set that was unpacked elsewhere; an old lock, too.

    When all is done, a page that is missing is made again.
    """
    for path in unfinished.data.rglob("*"):
        os.utime(path, (4e9, 4e9))
    (unfinished.folder / "out.lock").write_text("of a run that was killed on another machine")
    settings = {"NUM_WORKERS": 3, "CHECKPOINT_MINUTES": 0, "SAMPLE_COUNT": 2, "TRAIN_DIR": "data/",
                "OUTPUT_DIR": "out/"}
    ended = unfinished.finishes(**settings)
    assert f"{PICTURES} to encode" in ended.out and ", 4 done" in ended.out
    before = tree(unfinished.out)
    for page in ("report.png", "README.md"):
        (unfinished.out / page).unlink()
        assert "this run is finished" in unfinished.finishes(**settings).out
        assert tree(unfinished.out) | {"report.png": before["report.png"]} == before


@pytest.mark.parametrize("damage", [
    lambda whole: whole[: len(whole) * 2 // 3], lambda whole: b"", lambda whole: bytes(len(whole)),
    lambda whole: b"cbuiltins\nopen\n(Vcalled\nVw\ntR.",  # a pickle of open("called", "w")
], ids=["truncated", "empty", "zeros", "calls"])  # fmt: skip
def test_files_torn_by_a_power_cut_or_made_by_others(damage, unfinished):
    checkpoint = unfinished.unfinished / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(damage(whole))
    assert_one_sentence(unfinished.refuses(), "checkpoint.pt' is damaged", "--restart")
    checkpoint.write_bytes(whole)
    features = max(unfinished.data.glob(".features/*/*"), key=lambda path: path.stat().st_size)
    features.write_bytes(damage(features.read_bytes()))
    assert "16 to encode, 8 known" in unfinished.finishes().out


@pytest.mark.parametrize("text", ["", "null", "{}", '{"settings": []}'])
def test_damaged_settings_are_refused(text, finished):
    (finished.out / "settings.json").write_text(text)
    assert "not from a run of this script" in finished.refuses()


# ---- Other runs, other hands --------------------------------------------------------------------


@pytest.mark.parametrize("event", ["before step 5", "before rename *.unfinished 1"])
def test_a_second_run_at_once_is_refused(event, encoded, command, monkeypatch):
    """Before it moves the first one's folder, too."""
    meet = multiprocessing.Barrier(2, timeout=LIMIT)  # at the event, and when that is tried
    child = Child(encoded.settings, folder=encoded.folder,
                  prepare=lambda: on(event, lambda: [meet.wait(), meet.wait()]))
    meet.wait()
    before = tree(encoded.folder)
    monkeypatch.chdir(encoded.folder)
    for flags in ([], ["--restart"]):
        code, _, error = command(*flags, **encoded.settings)
        assert code == 1
        assert_one_sentence(error, "Another run works on this OUTPUT_DIR",
                            f"{encoded.folder}/out.lock", "delete that file")
    assert tree(encoded.folder) == before
    meet.wait()
    assert child.wait().code == 0
    encoded.is_whole()


def test_a_picture_that_vanishes_before_it_is_read_is_named(new):
    picture = sorted(new.data.glob("Image/*/*.png"))[20]
    ended = new.at("after load 1", picture.unlink)
    assert ended.code == 0 and ended.err == "", ended
    assert "not used: 1\n" in ended.out and "No such file" in ended.out
    assert picture.name in (new.out / "skipped.csv").read_text()


def test_pictures_deleted_in_the_middle_of_training_have_no_effect(encoded):
    ended = encoded.at("before step 5", lambda: shutil.rmtree(encoded.data / "Image"))
    assert ended.code == 0, ended
    encoded.is_whole()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_keeps_the_checkpoint(dtype, encoded):
    real = finetune.Captioner.losses

    def spoil() -> None:
        finetune.Captioner.losses = lambda *arguments: real(*arguments) * math.nan

    ended = encoded.at("before step 5", spoil, DTYPE=dtype)
    assert_one_sentence(ended.err, "at step 6 the loss is nan", "data/Image/",
                        "Lower LEARNING_RATE", ".features")
    assert ended.code == 1 and ("float32" in ended.err) == (dtype == "bfloat16"), ended.err
    assert step_of(encoded.folder) == 5 and not encoded.out.exists()
