"""Whatever happens to a run, the same command ends with the same adapter, and nothing is lost."""

import ctypes
import errno
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers import LIMIT, Child, Ended, fail_with, flags_of, on, read_table, send, step_of
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import finetune

STEPS = 9
PICTURES = 24
SETTINGS = {  # three epochs of three steps; the second epoch is the best, not the last
    "TRAIN_DIR": "data",
    "OUTPUT_DIR": "out",
    "BATCH_SIZE": 6,
    "EPOCHS": 3,
    "LORA_RANK": 4,
    "LEARNING_RATE": 1e-2,
    "WARMUP_FRACTION": 0.9,
    "VALIDATION_FRACTION": 0.25,
    "SAMPLE_COUNT": 0,
    "CHECKPOINT_MINUTES": 1e-6,  # after every step
    "NUM_WORKERS": 1,
}
DIFFERENT_BYTES = {  # of these, two runs that are alike may have other bytes
    "settings.json",
    "adapter_config.json",
    "metrics.csv",
    "losses.png",
    "report.html",
    "README.md",
}
FINISHED = "this run is finished"
NO_SPACE = "No space left on device"


# ---- A folder in which the command is given -----------------------------------------------------


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, at any depth, with its bytes, except locks, which may stay."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def read_losses(folder: Path) -> list[tuple[str, str, str]]:
    """Of metrics.csv: step, training loss, held-out loss; the first row is before training."""
    rows = read_table(folder / "metrics.csv")
    return [(row["step"], row["train_loss"], row["held_out_loss"]) for row in rows]


def read_results(folder: Path) -> dict:
    """All that a finished run has measured, except the time it took."""
    record = json.loads((folder / "settings.json").read_text())
    results = record["results"]
    del results["seconds"]
    return results | {"losses": read_losses(folder)}


def assert_one_sentence(error: str, *needed: str) -> None:
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    for words in needed:
        assert words in error


class Workspace:
    """A folder with TRAIN_DIR data/ and OUTPUT_DIR out/, and the command that is given there."""

    def __init__(self, folder: Path, base: str, reference: Path | None = None) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.out = folder / "out"
        self.unfinished = folder / "out.unfinished"
        self.settings = SETTINGS | {"MODEL_ID": base}
        self.reference = reference or self.out  # what an uninterrupted run leaves
        self.earlier_run: dict[str, bytes] = {}  # what was in out/ before

    def copy(self, folder: Path, *without: str) -> "Workspace":
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(*without))
        return Workspace(folder, self.settings["MODEL_ID"], self.reference)

    def add_earlier_run(self) -> None:
        """Puts a finished run into out/, with another setting and a file of its own."""
        shutil.copytree(self.reference, self.out)
        settings = self.out / "settings.json"
        settings.write_text(settings.read_text().replace('"SEED": 42', '"SEED": 41'))
        (self.out / "held_out.csv").write_text("of the earlier run")
        self.earlier_run = read_files(self.out)

    def pictures(self) -> list[Path]:
        return sorted(self.data.glob("Image/*/*.png"))

    def run(self, *flags: str, prepare: Callable = lambda: None, **changed) -> Ended:
        """The command, to its end."""
        settings = self.settings | changed
        return Child(settings, *flags, folder=self.folder, prepare=prepare).wait()

    def run_with(self, action: Callable, event: str, *flags: str, **changed) -> Ended:
        """The command; at the event comes the action. It must come, and costs no checkpoint."""
        step = multiprocessing.RawValue("i", -1)  # shared with the child

        def note_and_act() -> None:
            step.value = step_of(self.folder)
            action()

        ended = self.run(*flags, prepare=lambda: on(event, note_and_act), **changed)
        assert step.value >= 0, f"{event} never came: {ended}"
        if ended.code != 0:
            assert step_of(self.folder) >= step.value, ended
        self.assert_keeps_earlier_run()
        return ended

    def kill(self, event: str, *flags: str) -> None:
        """The command, killed at the event."""
        ended = self.run_with(send(signal.SIGKILL), event, *flags)
        assert ended.code == -signal.SIGKILL, ended

    def finish(self, *flags: str, **changed) -> Ended:
        """The command, which must end as the uninterrupted run did."""
        ended = self.run(*flags, **changed)
        assert ended.code == 0, ended
        self.assert_is_whole()
        return ended

    def refuse(self, *flags: str, loads_model: bool = False, **changed) -> str:
        """The command, which must change nothing. Returns why."""
        before = read_files(self.folder)

        ended = self.run(*flags, **changed)

        assert ended.code == 1, ended
        assert "Traceback" not in ended.err, ended
        assert ("model: " in ended.out) == loads_model, ended
        assert read_files(self.folder) == before
        return ended.err

    def assert_is_whole(self) -> None:
        """out/ has all that the uninterrupted run left, bit for bit, and nothing else."""
        names = {path.name for path in self.reference.iterdir()}
        assert {path.name for path in self.out.iterdir()} == names
        for name in names - DIFFERENT_BYTES:
            assert (self.out / name).read_bytes() == (self.reference / name).read_bytes(), name
        assert read_results(self.out) == read_results(self.reference)
        with Image.open(self.out / "losses.png") as losses:
            losses.load()
        assert (self.out / "report.html").read_text().endswith("</html>\n")
        assert "# BLIP-2 captions: out" in (self.out / "README.md").read_text()
        assert not self.unfinished.exists()

        self.assert_keeps_earlier_run()
        renamed = list(self.folder.glob("out-????-??-??"))
        assert len(renamed) == (1 if self.earlier_run else 0)

    def assert_is_short(self) -> None:
        """out/ has what a run of one epoch leaves."""
        assert len(read_losses(self.out)) == 1 + STEPS // 3
        assert read_results(self.out)["steps"] == STEPS // 3
        assert not self.unfinished.exists()

    def assert_keeps_earlier_run(self) -> None:
        """In its place, or renamed by the date."""
        if self.earlier_run:
            assert self.earlier_run in [read_files(path) for path in self.folder.glob("out*")]


@pytest.fixture(scope="module", autouse=True)
def each_picture_is_encoded_alone():
    """A picture's features do not depend on the pictures that are encoded with it.

    On some processors the last digit depends on how many there are, and a run that is killed
    between two pictures of a batch encodes fewer at a time afterwards.
    """
    real = finetune.Captioner.encode

    def encode(captioner, pixel_values):
        return torch.cat([real(captioner, [values]) for values in pixel_values])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.Captioner, "encode", encode)
        yield


@pytest.fixture(scope="module")
def reference(opt_base, sample, tmp_path_factory, each_picture_is_encoded_alone) -> Workspace:
    """An uninterrupted run on six captions with four pictures each: two batches to encode.

    It is in this process: child processes, which are forked from it, are faster after that.
    """
    work = Workspace(tmp_path_factory.mktemp("reference") / "run", opt_base)
    others = ["circle-*", "moon-*", "square-*", "triangle-*", "0[5-9].png", "1?.png"]
    shutil.copytree(sample, work.data, ignore=shutil.ignore_patterns(*others))

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.chdir(work.folder)
        code = finetune.main(flags_of(work.settings))

    assert code == 0
    assert f"{PICTURES} to encode, 0 known" in output.getvalue()
    assert len(list(work.data.glob(".features/*/*.safetensors"))) == PICTURES
    assert len(read_losses(work.out)) == 1 + STEPS
    assert read_results(work.out)["best_step"] == 6
    return work


@pytest.fixture(scope="module")
def killed_once(reference, tmp_path_factory) -> Workspace:
    work = reference.copy(tmp_path_factory.mktemp("killed") / "run", "out*")
    work.kill("before step 5")
    assert step_of(work.folder) == 4
    assert not work.out.exists()
    return work


@pytest.fixture(scope="module")
def killed_at_the_end(reference, tmp_path_factory) -> Workspace:
    """With an earlier run in OUTPUT_DIR."""
    work = reference.copy(tmp_path_factory.mktemp("killed") / "run", "out*")
    work.add_earlier_run()
    work.kill("before caption 2")
    assert step_of(work.folder) == STEPS
    return work


@pytest.fixture
def new(reference, tmp_path) -> Workspace:
    """Nothing has run here."""
    return reference.copy(tmp_path / "run", "out*", ".features")


@pytest.fixture
def encoded(reference, tmp_path) -> Workspace:
    """All pictures are encoded, and nothing else is there."""
    return reference.copy(tmp_path / "run", "out*")


@pytest.fixture
def unfinished(killed_once, tmp_path) -> Workspace:
    """A run was killed after four steps."""
    return killed_once.copy(tmp_path / "run")


@pytest.fixture
def trained(killed_at_the_end, tmp_path) -> Workspace:
    """A run was killed after its last step; OUTPUT_DIR holds an earlier one."""
    work = killed_at_the_end.copy(tmp_path / "run")
    work.earlier_run = killed_at_the_end.earlier_run
    return work


@pytest.fixture
def finished(reference, tmp_path) -> Workspace:
    """A run has finished."""
    return reference.copy(tmp_path / "run")


# ---- Killed, and stopped ------------------------------------------------------------------------

# Events at which one process after another is killed: each continues what the one before left.
# The number counts the calls in that process.
WHILE_IT_ENCODES = [
    ["before load 1", "after load 1", "before encode 1", "before encode 2", "before encode 1"],
    [
        "before replace *.safetensors 1",
        "after replace *.safetensors 16",
        "after replace *.safetensors 1",
    ],
]
WHILE_IT_TRAINS = [
    ["before caption 1", "after caption 1", "before step 1", "after step 2"],
    ["before step 3", "before step 1", "after step 4"],
    # at the end of an epoch
    ["before measure 2", "after measure 2"],
    # as it saves the adapter
    ["before adapter 1", "before processor 1", "before replace *settings.json 2"],
    ["after adapter 2"],
    # as it writes a checkpoint
    ["before serialize 1", "after open *metrics.csv 4", "after open *checkpoint.pt.part 4"],
    ["before replace *checkpoint.pt 1", "after replace *checkpoint.pt 3"],
    ["before replace *checkpoint.pt 6", "after replace *checkpoint.pt 3"],
    # as it puts its folder in place
    ["before rename *.unfinished 1", "after rename *.unfinished 1"],
]
WHILE_IT_FINISHES = [  # in this order
    "before caption 1",
    "before adapter 1",
    "after open *pairs.csv 1",
    "after open *held_out.csv 1",
    "before draw 1",
    "before replace *losses.png 1",
    "before replace *report.html 1",
    "after replace *report.html 1",
    "after replace *README.md 1",
    "before replace *settings.json 1",
    "before unlink *checkpoint.pt 1",
    "after unlink *checkpoint.pt 1",
    "before rename *out 1",
    "after rename *out 1",
    "before rename *.unfinished 1",
    "after rename *.unfinished 1",
]


def join_events(events: list[str]) -> str:
    return ", ".join(events)


@pytest.mark.parametrize("events", WHILE_IT_ENCODES, ids=join_events)
def test_killed_while_it_encodes_it_ends_with_the_same_adapter(events, new):
    for event in events:
        new.kill(event)

    ended = new.finish()

    assert " done" not in ended.out  # no step was done


@pytest.mark.parametrize("events", WHILE_IT_TRAINS, ids=join_events)
def test_killed_while_it_trains_it_ends_with_the_same_adapter(events, encoded):
    for event in events:
        encoded.kill(event)
    step = step_of(encoded.folder)

    ended = encoded.finish()

    if step:
        assert f", {step} done" in ended.out
    else:
        assert " done" not in ended.out


def test_killed_again_and_again_while_it_finishes_it_ends_with_the_same_adapter(trained):
    """At one event after the other. The earlier run is usable until it is renamed by the date."""
    for event in WHILE_IT_FINISHES:
        trained.kill(event)

        if "rename" not in event:
            assert read_files(trained.out) == trained.earlier_run, event

    assert FINISHED in trained.finish().out


def test_killed_once_while_it_finishes_it_does_the_rest(trained):
    trained.kill("after open *held_out.csv 1")

    ended = trained.finish()

    assert f", {STEPS} done" in ended.out, ended


def test_stopped_again_and_again_while_it_finishes_it_ends_with_the_same_adapter(trained):
    """By Ctrl-C, at one event after the other: each third of them."""
    for event in WHILE_IT_FINISHES[::3]:
        stopped = trained.run_with(send(signal.SIGINT), event)

        assert stopped.code == 130, (event, stopped)
        assert "Traceback" not in stopped.err, (event, stopped)
        if "rename" not in event:
            assert read_files(trained.out) == trained.earlier_run, event

    trained.finish()


STOPPED = "stopped; to continue, run the same command again\n"


def test_a_signal_while_it_encodes_keeps_what_is_encoded(new):
    """Also what is not saved yet at that moment: a batch of 16."""
    stopped = new.run_with(send(signal.SIGTERM), "after encode 2", CHECKPOINT_MINUTES=0)

    assert stopped.code == 128 + signal.SIGTERM, stopped
    assert stopped.err.endswith(STOPPED)
    assert "Traceback" not in stopped.err
    assert step_of(new.folder) == 0
    assert not new.out.exists()
    assert "8 to encode, 16 known" in new.finish(CHECKPOINT_MINUTES=0).out


@pytest.mark.parametrize(
    "event, number, step",
    [
        ("before step 1", signal.SIGINT, 1),  # not at the end of an epoch
        ("after step 5", signal.SIGINT, 5),
        ("before step 4", signal.SIGTERM, 4),
        ("before measure 2", signal.SIGINT, 3),
        ("before step 9", signal.SIGINT, 9),
    ],
)
def test_a_signal_keeps_all_steps_that_are_done(event, number, step, encoded):
    stopped = encoded.run_with(send(number), event, CHECKPOINT_MINUTES=0)

    assert stopped.code == 128 + number, stopped
    assert stopped.err.endswith(STOPPED)
    assert "Traceback" not in stopped.err
    assert step_of(encoded.folder) == step
    assert not encoded.out.exists()
    assert "0 to encode" in encoded.finish(CHECKPOINT_MINUTES=0).out


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills_at_once(second, encoded):
    """What was done since the last checkpoint is done again."""

    def send_both() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), second)

    stopped = encoded.run_with(send_both, "before step 5", CHECKPOINT_MINUTES=0)

    assert stopped.code == -second, stopped
    assert STOPPED not in stopped.err
    assert "Traceback" not in stopped.err
    assert step_of(encoded.folder) == 3
    assert not encoded.out.exists()
    assert "0 to encode" in encoded.finish(CHECKPOINT_MINUTES=0).out


def test_a_stopped_restart_is_continued_without_restart(unfinished):
    """The same command would train from scratch again."""
    stopped = unfinished.run_with(send(signal.SIGINT), "before step 5", "--restart")

    assert stopped.code == 130
    assert stopped.err.endswith(
        "stopped; to continue, run the same command without --restart "
        "(if no training step was shown yet, keep it)\n"
    )
    assert ", 5 done" in unfinished.finish().out


def test_a_restart_keeps_the_old_run_until_it_trains(encoded):
    encoded.kill("before unlink *checkpoint.pt 2")  # with all its results
    before = read_files(encoded.unfinished)

    encoded.kill("before caption 1", "--restart")

    assert read_files(encoded.unfinished) == before


def test_a_restart_that_was_killed_does_not_continue_the_old_run(encoded):
    """Also if that had all its results, and the restart no checkpoint yet."""
    encoded.kill("before unlink *checkpoint.pt 2")

    encoded.kill("before step 1", "--restart")

    assert step_of(encoded.folder) == 0
    ended = encoded.finish()
    assert " done" not in ended.out
    assert FINISHED not in ended.out


def test_an_unfinished_run_captions_and_so_does_the_earlier_one(unfinished, command):
    unfinished.add_earlier_run()
    before = read_files(unfinished.folder)
    picture = str(unfinished.pictures()[0])

    for folder in (unfinished.out, unfinished.unfinished):
        code, captions, error = command("--caption", picture, OUTPUT_DIR=folder)

        assert code == 0, error
        assert captions.startswith(f"{picture}\t")
    assert read_files(unfinished.folder) == before


# ---- Disk full, and other faults of the machine -------------------------------------------------


FAILING_WRITES = [  # in this order, as safetensors, tokenizers and the system say it
    ("before replace *.safetensors 2", OSError(errno.EROFS, "Read-only file system")),
    ("before processor 1", Exception(f"{NO_SPACE} (os error 28)")),
    ("before adapter 2", SafetensorError(f"I/O error: {NO_SPACE} (os error 28)")),
    ("before replace *checkpoint.pt 2", OSError(errno.EIO, "Input/output error")),
    ("before draw 1", OSError(errno.ENOSPC, NO_SPACE)),
    # Windows renames no folder with open files
    ("before rename *out 1", PermissionError(errno.EACCES, "Permission denied")),
    ("before rename *.unfinished 1", PermissionError(errno.EACCES, "Permission denied")),
]


def test_a_failing_write_is_a_sentence_and_loses_nothing(new):
    """One process after the other, each of which fails at another place."""
    new.add_earlier_run()

    for event, error in FAILING_WRITES:
        failed = new.run_with(fail_with(error), event)

        assert failed.code == 1, event
        assert_one_sentence(failed.err, str(error), "run the same command again")

    new.finish()


def mount_in_memory(target: Path) -> None:
    """For this process alone: another file system there, of 16 MB, with what was in it."""
    content = target.with_name("content")
    shutil.copytree(target, content, dirs_exist_ok=True)

    user = os.getuid()
    group = os.getgid()
    new_user_and_mount_namespace = 0x10020000  # CLONE_NEWUSER | CLONE_NEWNS
    assert ctypes.CDLL(None).unshare(new_user_and_mount_namespace) == 0
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", target], check=True)

    shutil.copytree(content, target, dirs_exist_ok=True)


needs_own_mounts = pytest.mark.skipif(
    os.system("unshare -rm true") != 0, reason="no process can have mounts of its own here"
)


@needs_own_mounts
@pytest.mark.parametrize(
    "event, free_kib",
    [
        ("after load 1", 0),
        ("after load 1", 90),
        ("before serialize 1", 0),
        ("before step 5", 50),
        ("after adapter 2", 0),
        ("before open *held_out.csv 1", 0),
        ("before draw 1", 0),
        ("after replace *README.md 1", 0),
    ],
)
def test_when_a_disk_is_full_the_run_continues_when_there_is_room(event, free_kib, new):
    """A real disk, full from the event on but for `free_kib`, until a large file is deleted.

    Both runs are in one child, because the file system ends with it.
    """
    large = new.folder / "large"

    def fill_disk() -> None:
        free = shutil.disk_usage(new.folder).free
        large.write_bytes(bytes(free - free_kib * 1024))

    def fail_first() -> None:
        mount_in_memory(new.folder)
        os.chdir(new.folder)
        on(event, fill_disk)
        assert finetune.main(flags_of(new.settings)) == 1
        assert not new.out.exists()
        large.unlink()
        on("after rename *.unfinished 1", new.assert_is_whole)

    ended = new.run(prepare=fail_first)

    assert ended.code == 0, ended
    reason = "Make room" if event == "after load 1" else NO_SPACE
    assert_one_sentence(ended.err, reason, "run the same command again")


@needs_own_mounts
def test_where_train_dir_can_not_be_written_features_are_next_to_output_dir(new):
    def make_read_only() -> None:
        mount_in_memory(new.data)
        subprocess.run(["mount", "-o", "remount,ro", new.data], check=True)

    first = new.finish(prepare=make_read_only)
    shutil.rmtree(new.out)
    second = new.finish(prepare=make_read_only)

    assert f"pictures: {PICTURES} to encode" in first.out
    assert "pictures: 0 to encode" in second.out
    assert len(list(new.folder.glob("out.features/*/*.safetensors"))) == PICTURES


# ---- What there is, and what is asked for: the table in the README ------------------------------

SAME: list[str] = []
DIFFERENT = ["--epochs", "1"]
RESTART = ["--restart"]


def assert_trains(work: Workspace, flags: list[str]) -> Ended:
    """The command trains from the start, to the end."""
    ended = work.run(*flags)
    assert ended.code == 0, ended
    assert " done" not in ended.out
    assert FINISHED not in ended.out
    if flags == DIFFERENT:
        work.assert_is_short()
    else:
        work.assert_is_whole()
    return ended


@pytest.mark.parametrize("flags", [SAME, DIFFERENT, RESTART], ids=join_events)
def test_where_there_is_nothing_every_command_trains(flags, encoded):
    ended = assert_trains(encoded, flags)

    assert "the earlier run is in " not in ended.out


def test_an_unfinished_run_is_continued_by_the_same_command(unfinished):
    ended = unfinished.finish()

    assert ", 4 done" in ended.out
    assert FINISHED not in ended.out
    assert "the earlier run is in " not in ended.out


def test_an_unfinished_run_refuses_a_different_command(unfinished):
    assert "--restart" in unfinished.refuse(*DIFFERENT)


def test_an_unfinished_run_is_given_up_by_a_restart(unfinished):
    ended = assert_trains(unfinished, RESTART)

    assert "the earlier run is in " not in ended.out


def test_a_finished_run_says_so_to_the_same_command(finished):
    before = read_files(finished.folder)

    ended = finished.run()

    assert ended.code == 0, ended
    assert FINISHED in ended.out
    assert "the earlier run is in " not in ended.out
    assert read_files(finished.folder) == before


@pytest.mark.parametrize("flags", [DIFFERENT, RESTART], ids=join_events)
def test_a_finished_run_is_moved_aside_by_other_commands(flags, finished):
    """Its name is the date; where that is taken, with a number."""
    today = finished.folder / time.strftime("out-%Y-%m-%d")
    today.write_text("stays")
    finished.earlier_run = read_files(finished.out)

    ended = assert_trains(finished, flags)

    assert "the earlier run is in " in ended.out
    finished.assert_keeps_earlier_run()
    assert today.read_text() == "stays"


@pytest.mark.parametrize("flags", [SAME, DIFFERENT, RESTART], ids=join_events)
def test_files_of_others_are_left_alone(flags, encoded):
    encoded.out.mkdir()
    (encoded.out / "adapter_model.safetensors").write_bytes(b"of another program")

    assert "--restart" not in encoded.refuse(*flags)


def test_a_link_stays_and_what_it_points_to_is_used(encoded):
    encoded.add_earlier_run()
    real = encoded.out.rename(encoded.folder / "real")
    encoded.out.symlink_to(real)

    ended = encoded.run()

    assert ended.code == 0, ended
    assert encoded.out.is_symlink()
    (moved_aside,) = encoded.folder.glob("real-*")
    assert read_files(moved_aside) == encoded.earlier_run
    captions = (encoded.reference / "held_out.csv").read_bytes()
    assert (real / "held_out.csv").read_bytes() == captions


# ---- What may change while a run is unfinished, and what may not --------------------------------


def change_a_caption(work: Workspace) -> None:
    sorted(work.data.glob("caption/*.txt"))[3].write_text("another style")


def add_a_picture(work: Workspace) -> None:
    picture = work.pictures()[7]
    shutil.copy(picture, picture.with_name("another.png"))


def rename_a_picture(work: Workspace) -> None:
    picture = work.pictures()[7]
    picture.rename(picture.with_stem(f"{picture.stem}b"))  # it stays the last of its caption


def lengthen_a_picture(work: Workspace) -> None:
    picture = work.pictures()[7]
    picture.write_bytes(picture.read_bytes() + b"x")


@pytest.mark.parametrize(
    "change, said",
    [
        (change_a_caption, "pictures or captions: '24 pairs, "),
        (add_a_picture, " then, '25 pairs, "),
        (rename_a_picture, "pictures or captions: '24 pairs, "),
        (lengthen_a_picture, "pictures or captions: '24 pairs, "),
    ],
)
def test_an_unfinished_run_refuses_other_data(change, said, unfinished):
    change(unfinished)

    error = unfinished.refuse()

    assert said in error
    assert "--restart" in error
    assert error.count(" then, ") == 1


def test_an_unfinished_run_refuses_another_setting(unfinished):
    error = unfinished.refuse(LEARNING_RATE=1e-3)

    assert "LEARNING_RATE: 0.01 then, 0.001 now" in error
    assert "--restart" in error
    assert error.count(" then, ") == 1


def test_an_unfinished_run_refuses_a_changed_caption_of_validation_dir(unfinished):
    measured = shutil.copytree(unfinished.data, unfinished.folder / "measured")
    unfinished.kill("before step 2", "--restart", "--validation-dir", "measured")
    sorted(measured.glob("caption/*.txt"))[3].write_text("another style")

    error = unfinished.refuse(VALIDATION_DIR="measured")

    assert "captions: '48 pairs, " in error
    assert "--restart" in error
    assert error.count(" then, ") == 1


def test_an_unfinished_run_refuses_a_picture_that_has_become_unreadable(unfinished):
    """It has as many bytes as before, so that only the decoder sees it."""
    picture = unfinished.pictures()[7]
    picture.write_bytes(bytes(picture.stat().st_size))

    error = unfinished.refuse(loads_model=True)

    assert "pictures that can't be read: 1 have changed, such as" in error
    assert picture.name in error
    assert "--restart" in error
    assert " then, " not in error


def test_an_unfinished_run_refuses_another_base_under_the_same_path(encoded, opt_base):
    base = shutil.copytree(opt_base, encoded.folder / "base")
    encoded.settings["MODEL_ID"] = str(base)
    encoded.kill("before step 5")
    weights = load_file(base / "model.safetensors")
    weights["vision_model.post_layernorm.weight"] += 0.01
    save_file(weights, base / "model.safetensors", {"format": "pt"})

    assert "the vision side of MODEL_ID: " in encoded.refuse(loads_model=True)

    shutil.copytree(opt_base, base, dirs_exist_ok=True)
    assert ", 4 done" in encoded.finish().out


CHANGES_NOTHING = {
    "NUM_WORKERS": 3,
    "CHECKPOINT_MINUTES": 0,
    "SAMPLE_COUNT": 2,
    "TRAIN_DIR": "data/",
    "OUTPUT_DIR": "out/",
}


def test_settings_times_and_locks_that_change_nothing_may_change(unfinished):
    """All times change in a data set that was unpacked elsewhere."""
    for path in unfinished.data.rglob("*"):
        os.utime(path, (4e9, 4e9))
    lock = unfinished.folder / "out.lock"
    lock.write_text("of a run that was killed on another machine")

    ended = unfinished.finish(**CHANGES_NOTHING)

    assert f"{PICTURES} to encode" in ended.out
    assert ", 4 done" in ended.out


@pytest.mark.parametrize("page", ["losses.png", "report.html", "README.md"])
def test_a_page_that_is_missing_in_a_finished_run_is_made_again(page, finished):
    """losses.png need not have the same bytes; assert_is_whole has looked at it."""
    before = read_files(finished.out)
    (finished.out / page).unlink()

    ended = finished.finish(**CHANGES_NOTHING)

    assert FINISHED in ended.out
    after = read_files(finished.out)
    assert after.keys() == before.keys()
    for name in before.keys() - {"losses.png", "report.html"}:
        assert after[name] == before[name], name


# ---- Damaged files, and those of earlier versions -----------------------------------------------


def truncate(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def empty(content: bytes) -> bytes:
    return b""


def fill_with_zeros(content: bytes) -> bytes:
    return bytes(len(content))


def put_in_code(content: bytes) -> bytes:
    """A pickle that would call open("called", "w")."""
    return b"cbuiltins\nopen\n(Vcalled\nVw\ntR."


damages = pytest.mark.parametrize("damage", [truncate, empty, fill_with_zeros, put_in_code])


@damages
def test_a_damaged_checkpoint_is_refused(damage, unfinished):
    """As a power failure leaves it, or as others make it, whose code must not run."""
    checkpoint = unfinished.unfinished / "checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))

    error = unfinished.refuse()

    assert_one_sentence(error, "checkpoint.pt' is damaged", "--restart")


@damages
def test_damaged_features_are_made_again(damage, unfinished):
    features = max(unfinished.data.glob(".features/*/*"), key=lambda path: path.stat().st_size)
    features.write_bytes(damage(features.read_bytes()))

    ended = unfinished.finish()

    assert f"1 to encode, {PICTURES - 1} known" in ended.out
    assert not (unfinished.folder / "called").exists()


def test_a_run_of_an_earlier_version_without_a_setting_is_continued(unfinished):
    """The setting then had the value that is its default now."""
    path = unfinished.unfinished / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["record"]["settings"]["NUM_BEAMS"]
    torch.save(checkpoint, path)

    assert ", 4 done" in unfinished.finish().out


def test_a_setting_of_an_earlier_version_is_what_was_in_effect_then(unfinished):
    """Not what the user has set meanwhile."""
    path = unfinished.unfinished / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["record"]["settings"]["NUM_BEAMS"]
    torch.save(checkpoint, path)

    def edit_script() -> None:
        finetune.NUM_BEAMS = 3

    ended = unfinished.run(prepare=edit_script)

    assert ended.code == 1
    assert "NUM_BEAMS: 1 then, 3 now" in ended.err


def test_an_adapter_of_an_earlier_version_without_a_setting_captions(finished, command):
    path = finished.out / "settings.json"
    record = json.loads(path.read_text())
    del record["settings"]["PROMPT"]
    path.write_text(json.dumps(record))

    code, _, error = command("--caption", str(finished.pictures()[0]), OUTPUT_DIR=finished.out)

    assert code == 0, error


@pytest.mark.parametrize("text", ["", "null", "{}", '{"settings": []}'])
def test_damaged_settings_are_refused(text, finished):
    (finished.out / "settings.json").write_text(text)

    assert "settings.json" in finished.refuse()


# ---- Other runs, other hands --------------------------------------------------------------------


@pytest.mark.parametrize("event", ["before step 5", "before rename *.unfinished 1"])
def test_a_second_run_at_once_is_refused(event, encoded, command, monkeypatch):
    """While the first one trains, and just before it puts its folder in place."""
    barrier = multiprocessing.Barrier(2, timeout=LIMIT)

    def let_others_try() -> None:
        barrier.wait()
        barrier.wait()

    first = Child(
        encoded.settings, folder=encoded.folder, prepare=lambda: on(event, let_others_try)
    )
    barrier.wait()
    before = read_files(encoded.folder)
    monkeypatch.chdir(encoded.folder)
    for flags in ([], ["--restart"]):
        code, _, error = command(*flags, **encoded.settings)

        assert code == 1
        lock = f"{encoded.folder}/out.lock"
        assert_one_sentence(error, "Another run is using this OUTPUT_DIR", lock, "delete that file")
    assert read_files(encoded.folder) == before

    barrier.wait()
    ended = first.wait()
    assert ended.code == 0, ended
    encoded.assert_is_whole()


def test_a_picture_that_vanishes_before_it_is_read_is_named(new):
    picture = new.pictures()[20]

    ended = new.run_with(picture.unlink, "after load 1")

    assert ended.code == 0, ended
    assert ended.err == ""
    assert "not used: 1\n" in ended.out
    assert "No such file" in ended.out
    assert picture.name in (new.out / "skipped.csv").read_text()


def test_pictures_deleted_in_the_middle_of_training_have_no_effect(encoded):
    def delete_pictures() -> None:
        shutil.rmtree(encoded.data / "Image")

    ended = encoded.run_with(delete_pictures, "before step 5")

    assert ended.code == 0, ended
    encoded.assert_is_whole()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_keeps_the_checkpoint(dtype, encoded):
    real = finetune.Captioner.losses

    def lose_the_loss() -> None:
        finetune.Captioner.losses = lambda *arguments: real(*arguments) * math.nan

    ended = encoded.run_with(lose_the_loss, "before step 5", DTYPE=dtype)

    assert ended.code == 1, ended
    assert_one_sentence(
        ended.err,
        "at step 6 the loss is not finite",
        "data/Image/",
        "Lower LEARNING_RATE",
        ".features",
    )
    assert ("float32" in ended.err) == (dtype == "bfloat16")
    assert step_of(encoded.folder) == 5
    assert not encoded.out.exists()
