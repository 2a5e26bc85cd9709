"""Whatever happens to a run, the same command ends with the same adapter, and nothing is lost."""

import builtins
import csv
import ctypes
import errno
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import flags_of
from PIL import Image
from runner import Child, Ended, fail_with, fork, on, send, start, wait_for
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


def losses(folder: Path) -> list[tuple[str, ...]]:
    """Of metrics.csv: step, train_loss, held_out_loss."""
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row["train_loss"], row["held_out_loss"])
                for row in csv.DictReader(file)]


def results(folder: Path) -> dict:
    """Those of a finished run, but for the time it took."""
    return json.loads((folder / "settings.json").read_text())["results"] | {"seconds": 0}


class Runs:
    """A folder with TRAIN_DIR data/ and OUTPUT_DIR out/, and the command that is given there."""

    def __init__(self, folder: Path, base: str) -> None:
        self.folder, self.data, self.out = folder, folder / "data", folder / "out"
        self.unfinished, self.logs = folder / "out.unfinished", folder.with_name("logs")
        self.settings = SETTINGS | {"MODEL_ID": base}
        self.earlier: dict[str, bytes] = {}  # the finished run of which OUTPUT_DIR is full
        self.before = 0  # the step of the checkpoint when something happened

    def start(self, *flags: str, prepare: Callable | None = None, **settings) -> Child:
        return fork(self.settings | settings, *flags, prepare=prepare, folder=self.folder,
                    logs=self.logs)

    def __call__(self, *flags: str, prepare: Callable | None = None, **settings) -> Ended:
        """The command, to its end."""
        return self.start(*flags, prepare=prepare, **settings).wait()

    def at(self, event: str, action: Callable, *flags: str, **settings) -> Ended:
        """The command; the action comes at the event, and must come."""
        happened = self.folder.with_name("happened")
        happened.unlink(missing_ok=True)

        def act() -> None:
            happened.write_text(str(self.step()))
            action()

        ended = self(*flags, prepare=lambda: on(event, act), **settings)
        assert happened.exists(), f"{event} never came: {ended}"
        self.before = int(happened.read_text())
        self.keeps_the_earlier()
        return ended

    def killed(self, event: str, *flags: str, **settings) -> None:
        ended = self.at(event, lambda: send(signal.SIGKILL), *flags, **settings)
        assert ended.code == -signal.SIGKILL, ended

    def fails(self, event: str, action: Callable, *needed: str, **settings) -> Ended:
        """The command ends with one sentence, and loses nothing."""
        ended = self.at(event, action, **settings)
        assert ended.code == 1 and ended.err.startswith("error: "), ended
        assert ended.err.count("\n") == 1, ended.err
        assert all(words in ended.err for words in needed), ended.err
        assert self.step() >= self.before
        return ended

    def finishes_as(self, reference: "Runs", *flags: str, **settings) -> Ended:
        """The same command ends as the uninterrupted run did."""
        ended = self(*flags, **settings)
        assert ended.code == 0, ended
        self.equals(reference)
        return ended

    def equals(self, reference: "Runs") -> None:
        """Bit by bit, with all that a run leaves, and nothing else."""
        assert self.adapter() == reference.adapter()
        assert losses(self.out) == losses(reference.out)
        assert results(self.out) == results(reference.out)
        assert {p.name for p in self.out.iterdir()} == {p.name for p in reference.out.iterdir()}
        for name in ("pairs.csv", "held_out.csv", "skipped.csv", "tokenizer.json"):
            assert (self.out / name).read_bytes() == (reference.out / name).read_bytes(), name
        with Image.open(self.out / "report.png") as report:
            report.load()
        assert "# BLIP-2 captions: out" in (self.out / "README.md").read_text()
        assert not self.unfinished.exists()
        self.keeps_the_earlier()
        assert len(self.aside()) == bool(self.earlier)

    def keeps_the_earlier(self) -> None:
        places = [self.out, *self.aside()]
        assert not self.earlier or self.earlier in [tree(p) for p in places if p.exists()]

    def has_earlier(self, another: "Runs") -> None:
        shutil.copytree(another.out, self.out)
        self.earlier = tree(self.out)

    def adapter(self) -> bytes:
        return (self.out / "adapter_model.safetensors").read_bytes()

    def step(self) -> int:
        """That of the checkpoint, which must be whole; 0: there is none."""
        path = self.unfinished / "checkpoint.pt"
        return torch.load(path, weights_only=True)["progress"]["step"] if path.exists() else 0

    def aside(self) -> list[Path]:
        return sorted(self.folder.glob("out-*"))

    def copy(self, folder: Path, *without: str) -> "Runs":
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(*without))
        return Runs(folder, self.settings["MODEL_ID"])


@pytest.fixture(scope="module")
def reference(opt_base, sample, tmp_path_factory) -> Runs:
    """The uninterrupted run on six captions with four pictures each: two batches to encode."""
    runs = Runs(tmp_path_factory.mktemp("reference") / "run", opt_base)
    (runs.data / "caption").mkdir(parents=True)
    for text in sorted((sample / "caption").glob("*.txt"))[::3]:
        shutil.copy(text, runs.data / "caption")
        (runs.data / "Image" / text.stem).mkdir(parents=True)
        for picture in sorted((sample / "Image" / text.stem).iterdir())[:4]:
            shutil.copy(picture, runs.data / "Image" / text.stem)
    ended = runs()
    assert ended.code == 0 and f"{PICTURES} to encode, 0 known" in ended.out, ended
    assert len(losses(runs.out)) == 1 + STEPS and results(runs.out)["best_step"] == 6
    assert len(list(runs.data.glob(".features/*/*.safetensors"))) == 2
    return runs


@pytest.fixture(scope="module")
def another(reference, tmp_path_factory) -> Runs:
    """A finished run with other settings."""
    runs = reference.copy(tmp_path_factory.mktemp("another") / "run", "out*")
    assert runs(EPOCHS=1, LORA_RANK=3).code == 0
    return runs


@pytest.fixture(scope="module")
def killed_once(reference, tmp_path_factory) -> Runs:
    runs = reference.copy(tmp_path_factory.mktemp("killed") / "run", "out*")
    runs.killed("before step 5")
    assert runs.step() == 4 and not runs.out.exists()
    return runs


@pytest.fixture
def new(reference, tmp_path) -> Runs:
    return reference.copy(tmp_path / "run", "out*", ".features")


@pytest.fixture
def encoded(reference, tmp_path) -> Runs:
    return reference.copy(tmp_path / "run", "out*")


@pytest.fixture
def unfinished(killed_once, tmp_path) -> Runs:
    return killed_once.copy(tmp_path / "run")


@pytest.fixture
def finished(reference, tmp_path) -> Runs:
    return reference.copy(tmp_path / "run")


# ---- Killed, and interrupted --------------------------------------------------------------------

KILLS = [  # loading, encoding, before the training
    "before load 1", "after load 1", "before encode 1", "after open *.part 1",
    "before fsync *.part 2", "after replace *.safetensors 1", "before encode 2 | before encode 1",
    "after caption 1",
    # training, and the ends of epochs
    "before step 1", "after step 2", "after step 3 > before losses 1",
    "after step 6 > after losses 1", "before step 3 | before step 1 | after step 4",
    # the adapter, the checkpoint
    "before adapter 1", "before processor 1", "after adapter 2", "before replace *settings.json 2",
    "before serialize 1", "after open *metrics.csv 4", "after serialize 4 > after open *.part 1",
    "after serialize 6 > before fsync *.part 1", "before replace *checkpoint.pt 1",
    "before replace *checkpoint.pt 6", "after replace *checkpoint.pt 3",
    "after replace *checkpoint.pt 9",
]  # fmt: skip
FINISH = [  # in its order, when the second captions and the third adapter are made
    "before caption 2", "before adapter 3", "after open *pairs.csv 1", "after open *held_out.csv 1",
    "before draw 1", "before replace *report.png 1", "after replace *README.md 1",
    "after replace *README.md 1 > before replace *settings.json 1",
    "before unlink *checkpoint.pt 1", "after unlink *checkpoint.pt 1",
    "before rename *.unfinished 1", "after rename *.unfinished 1",
]  # fmt: skip
WITH_EARLIER = [*FINISH, "before rename *out 1", "after rename *out 1"]


@pytest.mark.parametrize("plan", KILLS)
def test_killed_anywhere_it_ends_with_the_same_adapter(plan, reference, new):
    if not any(word in plan for word in ("load", "encode", "*.part", "*.safetensors")):
        shutil.copytree(reference.data / ".features", new.data / ".features")
    for event in plan.split(" | "):
        new.killed(event)
        assert not new.out.exists()
    done = new.step()
    ended = new.finishes_as(reference)
    assert f", {done} done" in ended.out or not done


def assert_not_trained_again(ended: Ended) -> None:
    assert f", {STEPS} done" in ended.out or "this run is finished" in ended.out, ended


@pytest.mark.parametrize("plan", WITH_EARLIER)
def test_killed_while_it_finishes(plan, reference, another, encoded):
    """With an earlier run in OUTPUT_DIR, which is usable until it is renamed by the date."""
    encoded.has_earlier(another)
    encoded.killed(plan)
    assert ("rename" in plan) or tree(encoded.out) == encoded.earlier
    assert_not_trained_again(encoded.finishes_as(reference))
    assert encoded.aside()[0].name.startswith(time.strftime("out-%Y-"))


@pytest.mark.parametrize("plan", FINISH)
def test_interrupted_while_it_finishes(plan, reference, encoded):
    ended = encoded.at(plan, lambda: send(signal.SIGINT))
    assert ended.code == 130 and "Traceback" not in ended.err, ended
    assert encoded.out.exists() == (plan == FINISH[-1])
    assert_not_trained_again(encoded.finishes_as(reference))


def test_until_a_run_is_finished_it_captions_and_so_does_the_earlier_one(
    unfinished, another, command
):
    unfinished.has_earlier(another)
    picture = sorted(unfinished.data.glob("Image/*/*.png"))[0]
    before = tree(unfinished.folder)
    for folder in (unfinished.out, unfinished.unfinished):
        code, captions, _ = command("--caption", str(picture), OUTPUT_DIR=folder, DEVICE="cpu")
        assert code == 0 and captions.startswith(f"{picture}\t")
    assert tree(unfinished.folder) == before


def test_the_command_itself_killed_from_outside(reference, new):
    """python finetune.py, as a user starts it, and whenever it happens to be hit."""
    script = Path(finetune.__file__).resolve()
    words = flags_of(new.settings)
    process = start([sys.executable, script, *words], new.logs, new.folder)
    try:
        wait_for(lambda: new.step() or process.ended(), "a checkpoint")
    finally:
        process.kill()
    assert process.wait().code == -signal.SIGKILL
    new.finishes_as(reference)


# ---- Signals ------------------------------------------------------------------------------------

STOPS = {  # event: the steps of which one must be in the checkpoint then
    "before step 2": (2, 3),
    "after step 5": (5, 6),
    "after step 3 > before losses 1": (3, 4),
    "before step 9": (9,),
}


@pytest.mark.parametrize("event, number", [*((event, signal.SIGINT) for event in STOPS),
                                           ("after step 5", signal.SIGTERM)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(event, number, reference, encoded):
    ended = encoded.at(event, lambda: send(number), CHECKPOINT_MINUTES=0)
    assert ended.code == 128 + number and "Traceback" not in ended.err, ended
    assert ended.err.endswith("\nstopped; the same command continues, without --restart\n")
    assert encoded.step() in STOPS[event] and not encoded.out.exists()
    ended = encoded.finishes_as(reference, CHECKPOINT_MINUTES=0)
    assert f"0 to encode, {PICTURES} known" in ended.out


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills_at_once(second, reference, encoded):
    def both() -> None:
        send(signal.SIGINT)
        send(second)

    ended = encoded.at("before step 5", both, CHECKPOINT_MINUTES=0)
    assert ended.code == -second or ended.code == 128 + second, ended
    assert encoded.step() == 3, "it went on after the second signal"
    encoded.finishes_as(reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_encoding_keeps_what_is_encoded(number, reference, new):
    """The second batch is encoded, and not kept yet."""
    ended = new.at("after encode 2", lambda: send(number))
    assert ended.code == 128 + number and "Traceback" not in ended.err, ended
    assert "8 to encode, 16 known" in new.finishes_as(reference).out


# ---- Disk full, and other faults of the machine -------------------------------------------------


def fill_the_disk() -> None:
    """From now on each file that is opened to write is one on a full disk."""
    real = open

    def opened(path, mode="r", *arguments, **named):
        path = path if isinstance(path, int) or mode[0] == "r" else "/dev/full"
        return real(path, mode, *arguments, **named)

    builtins.open = opened


@pytest.mark.parametrize("event", [
    "after load 1", "after encode 1", "after caption 1", "before serialize 1", "before step 5",
    "after adapter 2", "before caption 2", "before open *held_out.csv 1", "before draw 1",
    "after replace *report.png 1", "after replace *README.md 1",
])  # fmt: skip
def test_a_full_disk(event, reference, another, new):
    if event not in ("after load 1", "after encode 1"):
        shutil.copytree(reference.data / ".features", new.data / ".features")
    new.has_earlier(another)
    new.fails(event, fill_the_disk, "No space left on device", "run the same command again")
    assert tree(new.out) == new.earlier
    ended = new.finishes_as(reference)
    assert event != "after encode 1" or "24 to encode" in ended.out


@pytest.mark.parametrize("event, error", [
    ("before adapter 2", SafetensorError("I/O error: No space left on device (os error 28)")),
    ("before processor 1", Exception("No space left on device (os error 28)")),
    ("after serialize 5 > before fsync *.part 1", OSError(errno.EDQUOT, "Disk quota exceeded")),
    ("before replace *checkpoint.pt 5", OSError(errno.EIO, "Input/output error")),
    ("before replace *.safetensors 2", OSError(errno.EROFS, "Read-only file system")),
    ("before draw 1", OSError(errno.ENOSPC, "No space left on device")),
    ("before rename *out 1", PermissionError(errno.EACCES, "Permission denied")),
    ("before rename *.unfinished 1", PermissionError(errno.EACCES, "Permission denied")),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_failing_write_is_a_sentence(event, error, reference, another, new):
    """As safetensors, tokenizers and the system say it; Windows holds folders with open files."""
    new.has_earlier(another)
    new.fails(event, functools.partial(fail_with, error), str(error), "the same command again")
    new.finishes_as(reference)


def own_mounts(target: Path, *options: str) -> Callable[[], None]:
    """An action: puts an empty file system in memory at `target`, for this process alone."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no process can have mounts of its own here")

    def mount() -> None:
        user, group = os.getuid(), os.getgid()
        assert not ctypes.CDLL(None).unshare(0x10020000)  # CLONE_NEWUSER, CLONE_NEWNS
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"),
                           ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", target], check=True)

    return mount


@pytest.mark.parametrize("room", [0, 90, 250, 500])
def test_a_full_file_system(room, reference, new):
    """A real one with so many KiB free; then a large file is deleted."""
    disk, kept, words = new.folder / "disk", new.folder / "kept", flags_of(new.settings)
    mount = own_mounts(disk, "-o", "size=8m")
    disk.mkdir()

    def prepare() -> None:
        mount()
        shutil.copytree(new.data, disk / "data")
        os.chdir(disk)
        status = os.statvfs(disk)
        with open("large", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - room * 1024)
        assert finetune.main(words) == 1 and not Path("out").exists()
        os.unlink("large")
        on("after rename *.unfinished 1", lambda: shutil.copytree("out", kept))

    ended = new(prepare=prepare)
    assert ended.code == 0 and ended.err.count("\n") == 1, ended
    assert ended.err.startswith("error: ") and "No space left on device" in ended.err
    shutil.copytree(kept, new.out)
    new.equals(reference)


def test_where_train_dir_can_not_be_written_features_are_beside_output_dir(reference, new):
    source = new.folder / "source"
    shutil.copytree(new.data, source)
    mount = own_mounts(new.data)

    def prepare() -> None:
        mount()
        shutil.copytree(source, new.data, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", new.data], check=True)

    for count, flags in ((PICTURES, []), (0, ["--restart"])):
        shutil.rmtree(new.out, ignore_errors=True)
        ended = new(*flags, prepare=prepare)
        assert ended.code == 0 and f"pictures: {count} to encode" in ended.out, ended
        new.equals(reference)
    assert len(list(new.folder.glob("out.features/*/*.safetensors"))) == 2


# ---- What there is, and what is asked for -------------------------------------------------------

TABLE = {  # what is there: with the same settings, with others, with --restart
    "nothing": ("trained", "trained", "trained"),
    "unfinished": ("continued", "refused", "trained"),
    "finished": ("said so", "moved aside", "moved aside"),
    "files": ("refused", "refused", "refused"),
}


@pytest.mark.parametrize("column", range(3), ids=["same", "different", "restart"])
@pytest.mark.parametrize("there", TABLE)
def test_the_table_of_what_a_command_does(there, column, request, reference):
    runs = request.getfixturevalue({"nothing": "encoded", "files": "encoded"}.get(there, there))
    if there == "files":
        (runs.out / "thesis").mkdir(parents=True)
        (runs.out / "thesis/chapter 1.txt").write_text("Call me Ishmael.")
        (runs.out / "adapter_model.safetensors").write_bytes(b"of another program")
    if there == "finished" and column:
        runs.earlier = tree(runs.out)
    before, expected = tree(runs.folder), TABLE[there][column]
    ended = runs(*["--restart"] * (column == 2), **({"EPOCHS": 1} if column == 1 else {}))
    assert ended.code == (expected == "refused"), ended
    assert ("this run is finished" in ended.out) == (expected == "said so")
    assert (", 4 done" in ended.out) == (expected == "continued")
    if expected in ("refused", "said so"):
        assert tree(runs.folder) == before
        assert expected != "refused" or ("--restart" in ended.err) == (there == "unfinished")
    elif column == 1:
        assert len(losses(runs.out)) == 1 + STEPS // 3 and not runs.unfinished.exists()
        runs.keeps_the_earlier()
        assert f"the earlier run is in {runs.folder}/out-" in ended.out or not runs.earlier
    else:
        runs.equals(reference)


@pytest.mark.parametrize("name", ["report.png", "README.md"])
def test_a_finished_run_gets_a_missing_page_again(name, finished, reference):
    before = tree(finished.out)
    (finished.out / name).unlink()
    ended = finished.finishes_as(reference)
    assert "this run is finished" in ended.out and not finished.aside()
    assert tree(finished.out).keys() == before.keys()
    assert name == "report.png" or tree(finished.out) == before


def test_the_next_one_of_a_day_is_numbered(finished):
    """Nothing that was moved aside is overwritten, nor a file of that name."""
    finished.earlier = tree(finished.out)
    (finished.folder / "out-2026-01-31").write_text("a file")
    ended = finished("--restart", EPOCHS=1,
                     prepare=lambda: setattr(time, "strftime", lambda _: "2026-01-31"))
    assert ended.code == 0, ended
    assert tree(finished.folder / "out-2026-01-31-2") == finished.earlier
    assert (finished.folder / "out-2026-01-31").read_text() == "a file"


def test_a_link_stays_and_what_it_points_to_is_used(encoded, another, reference):
    real = encoded.folder / "large disk" / "runs"
    real.mkdir(parents=True)
    encoded.out.symlink_to(real)
    shutil.copytree(another.out, real, dirs_exist_ok=True)
    ended = encoded()
    assert ended.code == 0 and encoded.out.is_symlink(), ended
    assert encoded.adapter() == reference.adapter()
    (aside,) = real.parent.glob("runs-*")
    assert tree(aside) == tree(another.out)


# ---- The same run -------------------------------------------------------------------------------


@pytest.mark.parametrize("change, settings, said", [
    ("nothing", {"LEARNING_RATE": 1e-3}, "LEARNING_RATE: 0.01 then, 0.001 now"),
    ("nothing", {"PROMPT": "a photo of"}, "PROMPT: '' then, 'a photo of' now"),
    ("a caption", {}, "pictures or captions: '24 pairs, "),
    ("one picture more", {}, " then, '25 pairs, "),
    ("a picture spoiled", {}, "pictures that can't be read: [] then, ["),
])  # fmt: skip
def test_another_run_is_refused_where_one_is_unfinished(change, settings, said, unfinished):
    """A picture is spoiled by as many bytes that are none, which only the decoder sees."""
    picture = sorted(unfinished.data.glob("Image/*/*.png"))[7]
    if change == "a caption":
        sorted(unfinished.data.glob("caption/*.txt"))[3].write_text("another style")
    elif change == "one picture more":
        shutil.copy(picture, picture.with_name("another.png"))
    elif change == "a picture spoiled":
        picture.write_bytes(bytes(picture.stat().st_size))
    before = tree(unfinished.folder)
    ended = unfinished(**settings)
    assert ended.code == 1 and said in ended.err and "--restart" in ended.err, ended
    assert ended.err.count(" then, ") == 1 and "Traceback" not in ended.err
    assert tree(unfinished.folder) == before


def test_a_copied_data_set_is_the_same(unfinished, reference):
    """Unpacked elsewhere: all times are other ones, which only features are known by."""
    for path in unfinished.data.rglob("*"):
        os.utime(path, (4e9, 4e9))
    ended = unfinished.finishes_as(reference)
    assert f"{PICTURES} to encode" in ended.out and ", 4 done" in ended.out


@pytest.mark.parametrize("settings", [
    {"NUM_WORKERS": 3, "CHECKPOINT_MINUTES": 0, "SAMPLE_COUNT": 2},
    {"TRAIN_DIR": "data/", "OUTPUT_DIR": "out/"},
], ids=["harmless", "slashes"])  # fmt: skip
def test_settings_that_change_nothing_may_change(settings, unfinished, reference):
    assert ", 4 done" in unfinished.finishes_as(reference, **settings).out
    assert "this run is finished" in unfinished(**settings).out


def test_another_base_under_the_same_path_is_refused(encoded, opt_base, reference):
    base = encoded.folder / "base"
    shutil.copytree(opt_base, base)
    encoded.settings["MODEL_ID"] = str(base)
    encoded.killed("before step 5")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "vision_model" in name)
    save_file(weights | {name: weights[name] + 0.01}, base / "model.safetensors", {"format": "pt"})
    ended = encoded()
    assert ended.code == 1 and "the vision side of MODEL_ID: " in ended.err, ended
    assert encoded.step() == 4
    shutil.copytree(opt_base, base, dirs_exist_ok=True)
    assert encoded().code == 0 and encoded.adapter() == reference.adapter()


# ---- Damaged files ------------------------------------------------------------------------------

DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_a_sentence(damage, unfinished, reference):
    DAMAGE[damage](unfinished.unfinished / "checkpoint.pt")
    before = tree(unfinished.folder)
    ended = unfinished()
    assert ended.code == 1 and "Traceback" not in ended.err, ended
    assert "checkpoint.pt' is damaged: " in ended.err and "--restart" in ended.err
    assert tree(unfinished.folder) == before
    unfinished.finishes_as(reference, "--restart")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"settings": []}', "\0" * 500])
@pytest.mark.parametrize("flags", [[], ["--restart"]], ids=["", "restart"])
def test_damaged_settings_are_refused(text, flags, finished, command, monkeypatch):
    monkeypatch.chdir(finished.folder)
    (finished.out / "settings.json").write_text(text)
    before = tree(finished.folder)
    code, _, error = command(*flags, **finished.settings)
    assert code == 1 and "not from a run of this script" in error
    assert tree(finished.folder) == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_torn_features_are_made_anew(damage, encoded, reference):
    """As after a power cut, where they were not written whole."""
    largest = max(encoded.data.glob(".features/*/*.safetensors"), key=lambda p: p.stat().st_size)
    DAMAGE[damage](largest)
    assert "16 to encode, 8 known" in encoded.finishes_as(reference).out


# ---- Other runs, other hands --------------------------------------------------------------------


def test_a_second_run_at_once_is_refused(encoded, reference, command, monkeypatch):
    ready, go = encoded.folder.with_name("ready"), encoded.folder.with_name("go")

    def pause() -> None:
        ready.touch()
        wait_for(go.exists)

    child = encoded.start(prepare=lambda: on("before step 5", pause))
    try:
        wait_for(lambda: ready.exists() or child.ended())
        before = tree(encoded.folder)
        monkeypatch.chdir(encoded.folder)
        for flags in ([], ["--restart"]):
            code, _, error = command(*flags, **encoded.settings)
            assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
            assert "Another run works on this OUTPUT_DIR" in error
            assert f"{encoded.folder}/out.lock" in error and "delete that file" in error
        assert tree(encoded.folder) == before
    finally:
        go.touch()
        ended = child.wait()
    assert ended.code == 0, ended
    encoded.equals(reference)


def test_a_lock_that_was_left_behind_does_not_block(unfinished, reference):
    (unfinished.folder / "out.lock").write_text("of a run that was killed on another machine")
    unfinished.finishes_as(reference)


def test_a_picture_that_vanishes_before_it_is_read_is_named(new):
    picture = sorted(new.data.glob("Image/*/*.png"))[20]
    ended = new.at("after load 1", picture.unlink)
    assert ended.code == 0 and ended.err == "", ended
    assert "not used: 1\n" in ended.out and "No such file" in ended.out
    assert picture.name in (new.out / "skipped.csv").read_text()


def test_pictures_deleted_in_the_middle_of_training_have_no_effect(encoded, reference):
    ended = encoded.at("before step 5", lambda: shutil.rmtree(encoded.data / "Image"))
    assert ended.code == 0, ended
    encoded.equals(reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_keeps_the_checkpoint(dtype, encoded, reference):
    real = finetune.Captioner.losses

    def spoil() -> None:
        finetune.Captioner.losses = lambda *arguments: real(*arguments) * math.nan

    ended = encoded.fails("before step 5", spoil, "at step 6 the loss is nan", "data/Image/",
                          "Lower LEARNING_RATE", ".features", DTYPE=dtype)
    assert ("float32" in ended.err) == (dtype == "bfloat16"), ended.err
    assert encoded.step() == 5 and not encoded.out.exists()
    if dtype == "float32":
        encoded.finishes_as(reference, DTYPE=dtype)
