"""Whatever happens to a run, the same command ends with the same adapter, and nothing is lost.

Nearly all runs are forked children of this process, which has imported everything already.
"""

import builtins
import csv
import errno
import fnmatch
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure  # noqa: F401 - for the children
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import finetune

LIMIT = 120  # seconds that anything may take
SETTINGS = {
    "BATCH_SIZE": 8, "EPOCHS": 3, "LORA_RANK": 4, "LORA_DROPOUT": 0.05, "LEARNING_RATE": 2e-3,
    "VALIDATION_FRACTION": 0.2, "SAMPLE_COUNT": 0, "CHECKPOINT_MINUTES": 1e-6, "NUM_WORKERS": 0,
}  # fmt: skip
PICTURES = 40
ENDS = 4, 8, 12  # of epochs
STEPS = 12  # 32 pairs to train on: 4 steps an epoch


# ---- Runs in forked children, and what happens to them ------------------------------------------


PLACES = {  # where something may happen: the function that is called there
    "find": (finetune, "find_pairs"),
    "features": (finetune.FeatureStore, "append"),
    "encode": (finetune, "encode"),
    "index": (json, "dumps"),
    "sight": (finetune, "check_sight"),
    "caption": (finetune, "caption_dataset"),
    "held out": (finetune, "held_out_loss"),
    "losses": (finetune, "pair_losses"),
    "rows": (finetune, "count_tokens"),
    "step": (torch.optim.AdamW, "step"),
    "metrics": (finetune, "open_metrics"),
    "settings": (finetune, "save_settings"),
    "adapter": (peft.PeftModel, "save_pretrained"),
    "processor": (transformers.Blip2Processor, "save_pretrained"),
    "checkpoint": (finetune, "save_checkpoint"),
    "serialize": (torch, "save"),
    "open": (builtins, "open"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "rename": (os, "rename"),
    "mkdir": (Path, "mkdir"),
    "unlink": (os, "unlink"),
    "rmtree": (shutil, "rmtree"),
}


def matches(call: tuple, pattern: str) -> bool:
    """Whether a path among the arguments matches, or that of an open file given by its number."""
    if isinstance(call[0], int):
        call = (os.readlink(f"/proc/self/fd/{call[0]}"),)
    return any(fnmatch.fnmatch(os.fspath(part), pattern) for part in call
               if isinstance(part, str | os.PathLike))  # fmt: skip


def on(event: str, action: Callable[[], None]) -> None:
    """Patches this process: action() before or after the n-th call of a place.

    "before encode 2"; "after replace *.pt 2", of those calls with such a path; with " > ", what
    follows is counted from the first event on.
    """
    event, _, following = event.partition(" > ")
    when, *words, number = event.split()
    pattern = words.pop() if "*" in words[-1] else ""
    owner, name = PLACES[" ".join(words)]
    real, count = getattr(owner, name), 0
    act = functools.partial(on, following, action) if following else action

    @functools.wraps(real)
    def watched(*arguments, **named):
        nonlocal count
        count += not pattern or matches(arguments, pattern)
        now = count == int(number) and (not pattern or matches(arguments, pattern))
        if now and when == "before":
            act()
        result = real(*arguments, **named)
        if now and when == "after":
            act()
        return result

    setattr(owner, name, watched)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> None:
    """Until the condition holds, and not for ever."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.002)


class Child:
    """A forked child that runs `prepare` and then finetune.main, in `folder`."""

    def __init__(
        self, words: list[str], folder: Path, logs: Path, prepare: Callable | None = None
    ) -> None:
        self.logs, self.status = logs, None
        logs.mkdir(parents=True, exist_ok=True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                os.setpgid(0, 0)
                for number, name in ((1, "out"), (2, "err")):
                    file = os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(file, number)
                sys.stdout = open(1, "w", buffering=1, closefd=False)
                sys.stderr = open(2, "w", buffering=1, closefd=False)
                os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else a warning of the fork
                tqdm.set_lock(threading.RLock())  # not the one that other children may hold
                torch.set_num_threads(1)  # a pool of threads does not survive the fork
                os.chdir(folder)
                if prepare:
                    prepare()
                code = finetune.main(words)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def wait(self) -> SimpleNamespace:
        """How it ended: code (negative: a signal), out, err."""
        try:
            wait_for(self.ended)
        finally:
            if self.status is None:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        out, err = ((self.logs / name).read_text() for name in ("out", "err"))
        return SimpleNamespace(code=os.waitstatus_to_exitcode(self.status), out=out, err=err)


def flags(settings: dict) -> list[str]:
    return [f"--{name.lower().replace('_', '-')}={value}" for name, value in settings.items()]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, with its bytes, but for the empty lock of a killed run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".finetune.lock"}  # fmt: skip


def losses(folder: Path) -> list[tuple[str, ...]]:
    """Of metrics.csv: step, train_loss, held_out_loss."""
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row["train_loss"], row["held_out_loss"])
                for row in csv.DictReader(file)]  # fmt: skip


class Runs:
    """A folder with TRAIN_DIR data/ and OUTPUT_DIR out/, and the runs there."""

    adapters: dict[int, bytes] = {}  # of all: as the uninterrupted run had them at its epochs' ends

    def __init__(self, folder: Path, base: str) -> None:
        self.folder, self.data, self.out = folder, folder / "data", folder / "out"
        self.logs, self.count = folder.with_name("logs"), 0
        self.settings = SETTINGS | {"TRAIN_DIR": "data", "OUTPUT_DIR": "out", "MODEL_ID": base}

    def start(self, *more: str, prepare: Callable | None = None, **settings) -> Child:
        self.count += 1
        words = [*flags(self.settings | settings), *more]
        return Child(words, self.folder, self.logs / str(self.count), prepare)

    def __call__(self, *more: str, prepare: Callable | None = None, **settings) -> SimpleNamespace:
        """Runs the command to its end."""
        return self.start(*more, prepare=prepare, **settings).wait()

    def at(self, event: str, action: Callable, *more: str, **settings) -> SimpleNamespace:
        """Runs the command; the action comes at the event, and must come."""
        happened = self.folder.with_name("happened")
        happened.unlink(missing_ok=True)

        def act() -> None:
            os.close(os.open(happened, os.O_CREAT))
            action()

        ended = self(*more, prepare=lambda: on(event, act), **settings)
        assert happened.exists(), f"{event} never came: {ended}"
        return ended

    def killed(self, event: str, *more: str, **settings) -> None:
        """Runs the command, killed at the event: then the adapter is whole or absent."""
        ended = self.at(event, kill, *more, **settings)
        assert ended.code == -signal.SIGKILL, ended
        self.adapter_is_whole_or_absent()

    def fails(self, prepare: Callable, *needed: str, **settings) -> SimpleNamespace:
        """Runs the command, which ends with one sentence. The adapter is whole or absent."""
        ended = self(prepare=prepare, **settings)
        assert ended.code == 1, ended
        assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
        assert all(words in ended.err for words in needed), ended.err
        self.adapter_is_whole_or_absent()
        return ended

    def finishes(self, reference: "Runs", *more: str, **settings) -> SimpleNamespace:
        """The same command ends as the uninterrupted run did."""
        ended = self(*more, **settings)
        assert ended.code == 0, ended
        self.equals(reference)
        return ended

    def equals(self, reference: "Runs") -> None:
        assert losses(self.out) == losses(reference.out)
        self.has_the_adapter_of(reference)

    def has_the_adapter_of(self, reference: "Runs") -> None:
        """Bit by bit, finished, and nothing else is left."""
        assert self.adapter() == reference.adapter()
        assert json.loads((self.out / "settings.json").read_text())["finished"] is True
        assert {p.name for p in self.out.iterdir()} == {p.name for p in reference.out.iterdir()}

    def adapter_is_whole_or_absent(self) -> None:
        if (self.out / "adapter_model.safetensors").exists():
            assert self.adapter() in self.adapters.values()
            weights = load_file(self.out / "adapter_model.safetensors")
            assert len(weights) == 24 and all(w.isfinite().all() for w in weights.values())
            assert json.loads((self.out / "adapter_config.json").read_text())["r"] == 4

    def adapter(self) -> bytes:
        return (self.out / "adapter_model.safetensors").read_bytes()

    def checkpoints(self) -> list[int]:
        """The steps of those that are whole."""
        whole = []
        for path in sorted(self.out.glob("checkpoint/*.pt")):
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                whole.append(int(path.stem))
        return whole

    def stands(self, steps: list[int]) -> None:
        """These checkpoints, and the adapter as of the last epoch before, or none."""
        assert self.checkpoints() == steps
        ended = max([step for step in self.adapters if steps and step <= steps[-1]], default=0)
        assert ended or not (self.out / "adapter_model.safetensors").exists()
        assert not ended or self.adapter() == self.adapters[ended]

    def aside(self) -> list[Path]:
        """What was moved aside."""
        return sorted(self.folder.glob("out-*"))


@pytest.fixture(scope="module")
def reference(opt_base, sample, tmp_path_factory) -> Runs:
    """The uninterrupted run on eight captions with five pictures each: three batches to encode."""
    runs = Runs(tmp_path_factory.mktemp("reference") / "run", opt_base)
    (runs.data / "caption").mkdir(parents=True)
    for text in sorted((sample / "caption").glob("*.txt"))[::2]:
        shutil.copy(text, runs.data / "caption")
        (runs.data / "Image" / text.stem).mkdir(parents=True)
        for picture in sorted((sample / "Image" / text.stem).iterdir())[:5]:
            shutil.copy(picture, runs.data / "Image" / text.stem)

    def keep(step: int) -> None:
        shutil.copy(runs.out / "adapter_model.safetensors", runs.folder.with_name(f"adapter{step}"))

    def prepare() -> None:
        for step in ENDS:
            on(f"after checkpoint {step}", functools.partial(keep, step))

    ended = runs(prepare=prepare)
    assert ended.code == 0, ended.err
    assert f"{PICTURES} to encode" in ended.out
    adapters = {step: runs.folder.with_name(f"adapter{step}").read_bytes() for step in ENDS}
    assert len(set(adapters.values())) == 3 and adapters[STEPS] == runs.adapter()
    Runs.adapters.update(adapters)
    assert [row[0] for row in losses(runs.out)] == [str(step) for step in range(STEPS + 1)]
    assert not [p for p in runs.out.iterdir() if p.is_dir() or p.name.endswith((".part", "lock"))]
    return runs


@pytest.fixture
def new(reference, opt_base, tmp_path) -> Runs:
    """Pictures and captions only."""
    runs = Runs(tmp_path / "run", opt_base)
    shutil.copytree(reference.data, runs.data, ignore=shutil.ignore_patterns(".features"))
    return runs


@pytest.fixture
def encoded(reference, opt_base, tmp_path) -> Runs:
    """The pictures are encoded."""
    runs = Runs(tmp_path / "run", opt_base)
    shutil.copytree(reference.data, runs.data)
    return runs


@pytest.fixture(scope="module")
def killed_once(reference, opt_base, tmp_path_factory) -> Runs:
    """A run that was killed in step 7."""
    runs = Runs(tmp_path_factory.mktemp("killed") / "run", opt_base)
    shutil.copytree(reference.data, runs.data)
    runs.killed("before step 7")
    assert runs.checkpoints() == [5, 6]
    return runs


@pytest.fixture
def unfinished(killed_once, tmp_path) -> Runs:
    """A copy of the run that was killed in step 7."""
    shutil.copytree(killed_once.folder, tmp_path / "run")
    return Runs(tmp_path / "run", killed_once.settings["MODEL_ID"])


@pytest.fixture
def finished(reference, tmp_path) -> Runs:
    """A copy of the uninterrupted run."""
    shutil.copytree(reference.folder, tmp_path / "run")
    return Runs(tmp_path / "run", reference.settings["MODEL_ID"])


# ---- Killed -------------------------------------------------------------------------------------

KILLS = [
    # encoding: these begin without features
    "before features 1",
    "after open *.jsonl 1",
    "after encode 2",
    "after encode 2 > before index 5",
    "after features 1",
    # before the training
    "after caption 1",
    "before fsync *settings.json.part 1",
    "after replace *settings.json 1",
    "after open *processor_config.json 1",
    "before replace *metrics.csv 1",
    "after metrics 1 > before held out 1",
    # training
    "after step 1",
    "after step 4",
    "before step 10",
    # checkpoints
    "before mkdir *checkpoint 1",
    "before fsync *.pt.part 1",
    "after replace *.pt 1",
    "before replace *.pt 7",
    "after unlink *.pt 4",
    "after checkpoint 12",
    # adapter
    "after replace *adapter_model.safetensors 1",
    "after open *adapter_model.safetensors.part 2",
    "before rmtree *adapter.part 2",
    "before checkpoint 8",
    "before replace *adapter_config.json 3",
    # the end
    "before caption 2",
    "before rmtree *checkpoint 1 > after unlink 0*.pt 1",
    "after rmtree *checkpoint 1 > before unlink *.finetune.lock 1",
    # several in a row
    "after encode 1 | after encode 1 | before checkpoint 2",
    "before step 3 | before replace *.pt 1 | after step 1",
    "after replace *adapter_model.safetensors 1 | after replace *adapter_model.safetensors 1",
    "before checkpoint 9 | before replace *settings.json 2 | before rmtree *checkpoint 1",
]
ENCODING = ("encode", "features", "*.bin", "*.jsonl")


@pytest.mark.parametrize("plan", KILLS)
def test_killed_anywhere_it_ends_with_the_same_adapter(plan, reference, new):
    if not any(word in plan for word in ENCODING):
        shutil.copytree(reference.data / ".features", new.data / ".features")
    for event in plan.split(" | "):
        new.killed(event)
    new.finishes(reference)
    assert not new.aside()


@pytest.mark.parametrize("plan", [
    "before rename *out 1",
    "after rename *out 1",
    "after rename *out 1 > after mkdir *out 1",
    "before rename *.finetune.lock 1",
    "after rename *.finetune.lock 1 > after replace *settings.json 1",
])  # fmt: skip
def test_killed_while_it_moves_an_earlier_run_aside(plan, reference, encoded):
    encoded.settings["LORA_RANK"] = 3
    assert encoded(EPOCHS=1).code == 0
    before = tree(encoded.out)
    encoded.settings["LORA_RANK"] = 4
    ended = encoded.at(plan, kill)
    assert ended.code == -signal.SIGKILL
    (place,) = (p for p in [encoded.out, *encoded.aside()] if before.items() <= tree(p).items())
    encoded.finishes(reference)
    (aside,) = encoded.aside()
    assert tree(aside) == before


HALT = """
import fnmatch, os, signal, sys
event, pattern, number = os.environ["HALT"].split()
count = 0
def halt(name, arguments):
    global count
    if name == event and fnmatch.fnmatch(str(arguments[0]), pattern):
        count += 1
        if count == int(number):
            os.close(os.open("halted", os.O_CREAT))
            signal.pause()
sys.addaudithook(halt)
"""


@pytest.mark.parametrize("halt", [
    "open *.jsonl 1", "os.rename *000000005.pt.part 1", "open *settings.json.part 2",
])  # fmt: skip
def test_a_real_process_killed_from_outside(halt, reference, new):
    """python finetune.py itself stands still where it opens or renames a file, and is killed."""
    (new.folder / "sitecustomize.py").write_text(HALT)
    script = str(Path(finetune.__file__).resolve())
    process = subprocess.Popen(
        [sys.executable, script, *flags(new.settings)], cwd=new.folder, stdout=subprocess.DEVNULL,
        env=os.environ | {"HALT": halt, "PYTHONPATH": str(new.folder)})  # fmt: skip
    try:
        wait_for(lambda: (new.folder / "halted").exists() or process.poll() is not None)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    new.adapter_is_whole_or_absent()
    new.finishes(reference)


# ---- Signals ------------------------------------------------------------------------------------

STOPS = {  # event: the step whose checkpoint is there then
    "after features 1": None,
    "after metrics 1 > before held out 1": 1,
    "before rows 5": 3,
    "before checkpoint 1 > before serialize 1": 5,
    "before caption 2": 12,
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("event", STOPS)
def test_a_signal_stops_with_a_checkpoint(event, number, reference, new):
    event_step = STOPS[event]
    ended = new.at(event, lambda: os.kill(os.getpid(), number), CHECKPOINT_MINUTES=0)
    assert ended.code == 128 + number, ended
    assert "Traceback" not in ended.err and ended.err.endswith(
        "stopped; the same command continues\n")  # fmt: skip
    assert new.checkpoints()[-1:] == ([event_step] if event_step else [])
    new.adapter_is_whole_or_absent()
    ended = new.finishes(reference)
    assert f"0 to encode, {PICTURES} known" in ended.out
    assert not event_step or f"continuing after step {event_step}" in ended.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_encoding_keeps_what_is_encoded(number, reference, new):
    """The second batch is encoded, and not kept yet."""
    ended = new.at("after encode 2", lambda: os.kill(os.getpid(), number))
    assert ended.code == 128 + number and "Traceback" not in ended.err, ended
    assert "24 to encode, 16 known" in new.finishes(reference).out


@pytest.mark.parametrize("then", ["before step 6", "before checkpoint 2 > before replace *.pt 1"])
def test_a_second_signal_stops_at_once(then, reference, encoded):
    """The first comes in step 6, or in the last one of the second epoch."""
    first = "before rows 8" if "step" in then else "before rows 10"

    def prepare():
        on(first, lambda: os.kill(os.getpid(), signal.SIGINT))
        on(then, lambda: os.kill(os.getpid(), signal.SIGTERM))

    ended = encoded(prepare=prepare, CHECKPOINT_MINUTES=0)
    assert ended.code == 128 + signal.SIGTERM and "Traceback" not in ended.err, ended
    assert encoded.checkpoints() == [4]
    assert "continuing after step 4" in encoded.finishes(reference).out


def test_ctrl_c_reaches_the_workers_too(reference, new):
    """A terminal sends it to every process of the group."""
    ended = new.at("after encode 1", lambda: os.killpg(0, signal.SIGINT), NUM_WORKERS=2)
    assert ended.code == 130
    assert ended.err == "stopped; the same command continues\n"
    new.finishes(reference)


# ---- Disk full, and other faults of the machine -------------------------------------------------


def full_disk(pattern: str, number: int) -> Callable[[], None]:
    """From the n-th such file that is opened to write, each write fails as on a full disk."""

    def prepare() -> None:
        real, count = open, 0

        def opened(path, mode="r", *arguments, **named):
            nonlocal count
            if mode[0] in "wa" and fnmatch.fnmatch(os.fspath(path), pattern):
                count += 1
                path = "/dev/full" if count >= number else path
            return real(path, mode, *arguments, **named)

        builtins.open = opened

    return prepare


@pytest.mark.parametrize("pattern, number, steps", [
    ("*.bin", 1, []),
    ("*.jsonl", 1, []),
    ("*settings.json.part", 1, []),
    ("*skipped.csv.part", 1, []),
    ("*processor_config.json", 1, []),
    ("*metrics.csv.part", 1, []),
    ("*metrics.csv", 1, []),
    ("*adapter_config.json.part", 1, [2, 3]),
    ("*adapter_model.safetensors.part", 1, [2, 3]),
    ("*adapter_model.safetensors.part", 2, [6, 7]),
    ("*.pt.part", 1, []),
    ("*.pt.part", 7, [5, 6]),
    ("*settings.json.part", 2, [11, 12]),
])  # fmt: skip
def test_a_full_disk(pattern, number, steps, reference, new):
    if pattern not in ("*.bin", "*.jsonl"):
        shutil.copytree(reference.data / ".features", new.data / ".features")
    new.fails(full_disk(pattern, number), "No space left on device", "run the same command again")
    new.stands(steps)
    new.finishes(reference)


def fail_with(error: Exception) -> Callable[[], None]:
    """An action."""

    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("event, error, steps", [
    ("before adapter 2", SafetensorError("I/O error: No space left (os error 28)"), [6, 7]),
    ("before processor 1", Exception("No space left on device (os error 28)"), []),
    ("before fsync *.pt.part 5", OSError(errno.EDQUOT, "Disk quota exceeded"), [3, 4]),
    ("before fsync *adapter_model* 3", OSError(errno.EIO, "Input/output error"), [10, 11]),
    ("before replace *adapter_model* 2", PermissionError(errno.EACCES, "Denied"), [6, 7]),
    ("before mkdir *checkpoint 3", OSError(errno.EROFS, "Read-only file system"), [1, 2]),
    ("before open *.jsonl 1", OSError(errno.EROFS, "Read-only file system"), []),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_failing_write_is_a_sentence(event, error, steps, reference, new):
    """As safetensors, tokenizers and the system say it; a folder may also become unwritable."""
    new.fails(lambda: on(event, fail_with(error)), str(error), "run the same command again")
    new.stands(steps)
    new.finishes(reference)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system in memory, of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("can't mount a file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("room", [0, 100, 300])
def test_a_full_file_system(room, reference, small_disk, opt_base):
    """With so many KiB free; then a large file is deleted."""
    runs = Runs(small_disk, opt_base)
    shutil.copytree(reference.data, runs.data, ignore=shutil.ignore_patterns(".features"))
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    with open(small_disk / "large", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - room * 1024)
    runs.fails(lambda: None, "No space left on device")
    (small_disk / "large").unlink()
    runs.finishes(reference)


def test_a_full_disk_never_costs_an_earlier_run(reference, finished):
    before = tree(finished.out)
    finished.fails(full_disk("*settings.json.part", 1), "No space left", LORA_RANK=3)
    (aside,) = finished.aside()
    assert tree(aside) == before
    assert finished(LORA_RANK=3).code == 0 and tree(aside) == before


# ---- What OUTPUT_DIR holds, and what is asked for -----------------------------------------------


@pytest.fixture
def earlier(request, tmp_path) -> Runs:
    """A folder whose OUTPUT_DIR holds nothing, an unfinished or a finished run, or other files."""
    if request.param != "others":
        return request.getfixturevalue(
            {"nothing": "encoded"}.get(request.param, request.param))  # fmt: skip
    runs = request.getfixturevalue("encoded")
    (runs.out / "thesis").mkdir(parents=True)
    (runs.out / "thesis" / "chapter 1.txt").write_text("Call me Ishmael.")
    (runs.out / "adapter_model.safetensors").write_bytes(b"of another program")
    (runs.out / ".hidden").write_bytes(b"too")
    return runs


def add_picture(runs: Runs) -> None:
    picture = sorted(runs.data.glob("Image/*/*.png"))[7]
    shutil.copy(picture, picture.with_name("another.png"))


def change_caption(runs: Runs) -> None:
    sorted(runs.data.glob("caption/*.txt"))[3].write_text("a caption of another style")


def nothing(runs: Runs) -> None:
    pass


OTHERS = {  # a change: what is done, settings, what is said of it
    "setting": (nothing, {"LEARNING_RATE": 1e-3}, "LEARNING_RATE: 0.002 then, 0.001 now"),
    "caption": (change_caption, {}, "pictures or captions: '40 pairs,"),
    "picture": (add_picture, {}, " then, '41 pairs,"),
}
SAME = {"nothing": {}, "device": {"DEVICE": "cpu"}, "workers": {"NUM_WORKERS": 1},
        "minutes": {"CHECKPOINT_MINUTES": 0}, "samples": {"SAMPLE_COUNT": 0}}  # fmt: skip
ALL = {"same": (nothing, {}, ""), **OTHERS}


@pytest.mark.parametrize("earlier, asked", [
    ("nothing", "nothing"), ("nothing", "restart"),
    *((kind, asked) for kind in ("unfinished", "finished") for asked in SAME),
], indirect=["earlier"])  # fmt: skip
def test_the_same_run_trains_or_continues_or_is_finished(earlier, asked, reference, request):
    state = request.node.callspec.params["earlier"]
    before = tree(earlier.out)
    more = ["--restart"] if asked == "restart" else []
    ended = earlier.finishes(reference, *more, **SAME.get(asked, {}))
    said = {"unfinished": "continuing after step 6", "finished": "this run is finished"}
    for kind, words in said.items():
        assert (words in ended.out) == (kind == state)
    assert state != "finished" or tree(earlier.out) == before
    assert not earlier.aside()


@pytest.mark.parametrize("asked", OTHERS)
def test_another_run_is_refused_where_one_is_unfinished(unfinished, asked, reference):
    change, settings, said = OTHERS[asked]
    change(unfinished)
    before = tree(unfinished.folder)
    ended = unfinished(**settings)
    assert ended.code == 1 and said in ended.err and "--restart" in ended.err
    assert ended.err.count(" then, ") == 1 and "Traceback" not in ended.err
    assert tree(unfinished.folder) == before


@pytest.mark.parametrize("earlier, asked, more", [
    *(("unfinished", asked, ["--restart"]) for asked in ("same", "caption")),
    *(("finished", asked, ["--restart"]) for asked in ("same", "picture")),
    *(("finished", asked, []) for asked in OTHERS),
], indirect=["earlier"])  # fmt: skip
def test_another_run_moves_the_earlier_one_aside(earlier, asked, more, reference):
    change, settings, _ = ALL[asked]
    before = tree(earlier.out)
    change(earlier)
    ended = earlier(*more, **settings)
    assert ended.code == 0, ended
    (aside,) = earlier.aside()
    assert tree(aside) == before
    assert f"the earlier run is in {aside.name} now" in ended.out
    if asked == "same":
        earlier.equals(reference)
    else:
        assert earlier.adapter() != reference.adapter()
        assert "this run is finished" in earlier(**settings).out  # it is a run of its own now


@pytest.mark.parametrize("more", [[], ["--restart"]])
@pytest.mark.parametrize("asked", ["same", "setting"])
@pytest.mark.parametrize("earlier", ["others"], indirect=True)
def test_files_of_others_are_not_touched(earlier, asked, more):
    before = tree(earlier.folder)
    ended = earlier(*more, **ALL[asked][1])
    assert ended.code == 1 and "not from a run of this script" in ended.err
    assert tree(earlier.folder) == before and not earlier.aside()


def test_the_next_one_of_a_day_is_numbered(finished):
    """Nothing that was moved aside is overwritten, nor a file of that name."""
    before = tree(finished.out)
    day = lambda: setattr(finetune.time, "strftime", lambda _: "2026-01-31")  # noqa: E731
    (finished.folder / "out-2026-01-31-2").write_text("a file")
    for name in ("", "-3"):
        assert finished("--restart", prepare=day, EPOCHS=1).code == 0
        assert (finished.folder / f"out-2026-01-31{name}" / "settings.json").exists()
    assert tree(finished.folder / "out-2026-01-31") == before
    assert (finished.folder / "out-2026-01-31-2").read_text() == "a file"


# ---- Damaged ------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(damage, unfinished, reference):
    damage(unfinished.out / "checkpoint" / "000000006.pt")
    ended = unfinished.finishes(reference)
    assert "000000006.pt is damaged" in ended.out and "continuing after step 5" in ended.out


def test_without_a_whole_checkpoint_it_starts_over(unfinished, reference):
    truncate(unfinished.out / "checkpoint" / "000000006.pt")
    flip(unfinished.out / "checkpoint" / "000000005.pt")
    ended = unfinished.finishes(reference)
    assert ended.out.count(".pt is damaged") == 2 and "continuing" not in ended.out


@pytest.mark.parametrize("text", [
    "", "{", "null", "[]", "{}", '{"settings": {}}', "\0" * 500, "not JSON",
    '{"settings": [], "data": "", "dtype": "float32", "finished": false}',
    '{"settings": {}, "data": "", "dtype": "float32", "finished": false}' + "\xff",
])  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--restart"]], ids=["", "restart"])
def test_damaged_settings_are_refused(text, more, unfinished, command, monkeypatch):
    monkeypatch.chdir(unfinished.folder)
    (unfinished.out / "settings.json").write_bytes(text.encode("latin-1"))
    before = tree(unfinished.folder)
    code, _, error = command(*more, **unfinished.settings)
    assert code == 1 and "settings.json is damaged" in error
    assert tree(unfinished.folder) == before


def test_without_metrics_no_step_is_written_twice(unfinished, reference):
    (unfinished.out / "metrics.csv").unlink()
    unfinished.killed("before checkpoint 3")  # the rows of step 9 and before are written
    assert unfinished(CHECKPOINT_MINUTES=0).code == 0
    unfinished.has_the_adapter_of(reference)
    assert losses(unfinished.out) == losses(reference.out)[7:]


@pytest.mark.parametrize("kept", ["the step after", "the step"])
def test_a_torn_row_is_left_out(kept, unfinished, reference):
    """Of a later step, which is done again; or, as after a power cut, of the checkpoint's own."""
    path = unfinished.out / "metrics.csv"
    rows = path.read_text().splitlines()[:8]
    assert rows[-1].startswith("6,")
    if kept == "the step":
        path.write_text("\n".join([*rows[:-1], "1"]))
    else:
        path.write_text("\n".join([*rows, "7,2,0.0"]))
    assert unfinished().code == 0
    unfinished.has_the_adapter_of(reference)
    expected = losses(reference.out)
    assert losses(unfinished.out) == [row for row in expected if row[0] != "6"
                                      or kept != "the step"]  # fmt: skip


@pytest.mark.parametrize("damage", ["rows", "no rows", "line", "no line"])
def test_features_lost_in_a_power_cut_are_made_anew(damage, encoded, reference):
    (data,) = encoded.data.glob(".features/*/*.bin")
    index = data.with_suffix(".jsonl")
    lines = index.read_text().splitlines(keepends=True)
    if damage == "rows":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2 + 7])
    elif damage == "no rows":
        data.unlink()
    elif damage == "line":
        index.write_text("".join([*lines[:16], lines[16][:20] + "\0" * 50 + "\n", *lines[17:32]]))
    else:
        index.write_text("\0" * 500)
    count = {"rows": 20, "no rows": 40, "line": 9, "no line": 40}[damage]
    ended = encoded()
    assert ended.code == 0, ended
    assert f"{count} to encode" in ended.out
    found, expected = (load_file(runs.out / "adapter_model.safetensors")
                       for runs in (encoded, reference))  # fmt: skip
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


# ---- Other runs, other hands, other clocks ------------------------------------------------------


def test_a_second_run_at_once_is_refused(encoded, reference, command, monkeypatch):
    ready, go = encoded.folder.with_name("ready"), encoded.folder.with_name("go")

    def pause() -> None:
        ready.touch()
        wait_for(go.exists)

    child = encoded.start(prepare=lambda: on("before step 6", pause))
    try:
        wait_for(lambda: ready.exists() or child.ended())
        before = tree(encoded.out)
        monkeypatch.chdir(encoded.folder)
        for more in ([], ["--restart"]):
            code, _, error = command(*more, **encoded.settings)
            assert code == 1 and error.startswith("error: another run writes into OUTPUT_DIR")
        assert tree(encoded.out) == before and (encoded.out / ".finetune.lock").exists()
    finally:
        go.touch()
        ended = child.wait()
    assert ended.code == 0, ended
    encoded.equals(reference)


def test_a_lock_that_is_removed_meanwhile_is_none(encoded, reference):
    """A run has opened it, and the other one ends before the lock is tried."""
    ready, go = encoded.folder.with_name("ready"), encoded.folder.with_name("go")

    def pause() -> None:
        ready.touch()
        wait_for(go.exists)

    child = encoded.start(prepare=lambda: on("after open *.finetune.lock 1", pause))
    try:
        wait_for(lambda: ready.exists() or child.ended())
        encoded.finishes(reference)
    finally:
        go.touch()
        late = child.wait()
    assert late.code == 1 and "another run writes into OUTPUT_DIR" in late.err
    encoded.equals(reference)


@pytest.mark.parametrize("event", ["before features 1", "after find 1"])
def test_a_picture_that_vanishes_before_it_is_read_is_named(event, new):
    picture = sorted(new.data.glob("Image/*/*.png"))[20]
    ended = new.at(event, picture.unlink)
    assert ended.code == 0 and ended.err == "", ended
    assert "not used: 1 picture" in ended.out and "No such file" in ended.out
    assert picture.name in (new.out / "skipped.csv").read_text()
    assert json.loads((new.out / "settings.json").read_text())["results"]["not_used"] == 1


def test_a_picture_may_vanish_while_it_is_looked_at(new):
    picture, real = sorted(new.data.glob("Image/*/*.png"))[20], os.access

    def looked_at(path, mode):
        answer = real(path, mode)
        if os.path.abspath(path) == str(picture):
            picture.unlink(missing_ok=True)
        return answer

    ended = new(prepare=lambda: setattr(os, "access", looked_at))
    assert ended.code == 0 and not picture.exists(), ended
    assert "not used: 1 picture" in ended.out


def test_pictures_that_can_be_read_again_do_not_change_a_run(new, reference, opt_base, tmp_path):
    """Input errors in the first part of a run: it goes on without these, to the same end."""
    names = [str(path.relative_to(new.folder)) for path in new.data.glob("Image/*/*.png")]
    real, bad = Image.open, sorted(names)[3::8]

    def opened(path, *arguments, **named):
        if path in bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **named)

    def prepare() -> None:
        Image.open = opened

    whole = Runs(tmp_path / "whole" / "run", opt_base)
    shutil.copytree(new.data, whole.data)
    ended = whole(prepare=prepare)
    assert ended.code == 0 and "not used: 5 pictures" in ended.out, ended

    def killed() -> None:
        prepare()
        on("before step 6", kill)

    assert new(prepare=killed).code == -signal.SIGKILL
    ended = new.finishes(whole)
    assert "0 to encode, 35 known" in ended.out and "not used: 5 pictures" in ended.out
    assert new("--restart").code == 0 and new.adapter() == reference.adapter()


def test_pictures_deleted_in_the_middle_of_training_have_no_effect(encoded, reference):
    ended = encoded.at("before step 5", lambda: shutil.rmtree(encoded.data / "Image"))
    assert ended.code == 0, ended
    encoded.equals(reference)


def test_a_worker_that_is_killed_is_a_sentence(new, reference):
    """In the second batch, when the first is kept."""
    second, real = str(sorted(new.data.glob("Image/*/*.png"))[20].relative_to(new.folder)), None

    def decode(paths, processor):
        if second in paths:
            wait_for(lambda: any(p.stat().st_size for p in new.data.glob(".features/*/*.jsonl")))
            kill()
        return real(paths, processor)

    real = finetune.decode_batch
    new.fails(lambda: setattr(finetune, "decode_batch", decode), "DataLoader worker",
              "run the same command again", NUM_WORKERS=2)  # fmt: skip
    assert "24 to encode, 16 known" in new.finishes(reference, NUM_WORKERS=2).out


@pytest.mark.parametrize("clock", ["back", "files of the future"])
def test_the_clock_matters_nowhere(clock, new, reference):
    if clock == "back":
        prepare = lambda: (  # noqa: E731
            setattr(time, "time", lambda: 0.0),
            setattr(time, "time_ns", lambda: 0),
            setattr(time, "strftime", lambda *_: "1970-01-01"),
        )
    else:
        prepare = None
        for path in new.data.rglob("*"):
            os.utime(path, (4e9, 4e9))

    def killed() -> None:
        if prepare:
            prepare()
        on("before step 7", kill)

    assert new(prepare=killed).code == -signal.SIGKILL
    ended = new.finishes(reference, **({"prepare": prepare} if prepare else {}))
    assert "0 to encode, 40 known" in ended.out and "continuing after step 6" in ended.out


def test_a_loss_that_is_not_finite_keeps_adapter_and_checkpoint(encoded, reference):
    real, copy = finetune.pair_losses, encoded.folder.with_name("copy")

    def bad(*arguments):
        return real(*arguments) * math.nan

    def prepare() -> None:
        on("after checkpoint 5", lambda: shutil.copytree(encoded.out, copy))
        on("after checkpoint 5", lambda: setattr(finetune, "pair_losses", bad))

    encoded.fails(prepare, "at step 6 the loss is nan", "Lower LEARNING_RATE")
    for name in ("adapter_model.safetensors", "checkpoint/000000005.pt"):
        assert (encoded.out / name).read_bytes() == (copy / name).read_bytes()
    assert encoded.checkpoints() == [4, 5]
    encoded.finishes(reference)

