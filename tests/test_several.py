"""Several processes do what one does: the same losses, the same adapter, one voice."""

import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from tqdm import tqdm

import finetune

REPOSITORY = Path(finetune.__file__).parent
SECONDS = 100  # the deadline of everything that is waited for
WORDS = "red circle green background on a yellow star".split()  # a token each
# 14 pairs, of which 3 are held out: steps of 5, 5 and 1, and the last is too few for two processes
FLAGS = {
    "VALIDATION_FRACTION": 0.2, "BATCH_SIZE": 5, "EPOCHS": 3, "LEARNING_RATE": 3e-3,
    "LORA_DROPOUT": 0, "DEVICE": "cpu", "NUM_WORKERS": 0, "SAMPLE_COUNT": 1,
}  # fmt: skip
STEPS = 9


SECOND = "process 1: started; the first one says how it goes\n"  # all that it says


def wait_until(done, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def flags_of(settings: dict) -> list[str]:
    words = [part for name, value in settings.items()
             for part in ("--" + name.lower().replace("_", "-"), str(value))]
    return [*words, "--no-load-in-4bit"]


def kill_all(pid: int) -> None:
    """A process with all that it has started; launchers put theirs into sessions of their own."""
    try:
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            one.kill()
    except psutil.NoSuchProcess:
        pass


# ---- Launched: as a user does it, the seconds of the imports included ---------------------------


class Launched:
    """`python -m torch.distributed.run <words>`, its output in files."""

    def __init__(self, folder: Path, *words: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / "stdout", folder / "stderr"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with open(self.outputs[0], "w") as out, open(self.outputs[1], "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words], stdout=out, stderr=err,
                cwd=REPOSITORY, env=environment)  # fmt: skip

    def end(self) -> tuple[int, str, str]:
        try:
            self.process.wait(SECONDS)
        finally:
            kill_all(self.process.pid)
        return self.process.returncode, *(path.read_text() for path in self.outputs)


# ---- Forked: several processes in a fraction of a second ----------------------------------------


def fork(rank: int, count: int, port: int, settings: dict, folder: Path, patch=None) -> int:
    """A child of this process with finetune imported, as one of `count`; `patch` runs in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        return pid
    code = 99
    try:
        torch.set_num_threads(1)  # makes torch's pool anew; else threads do it at once, and fail
        for number, name in ((1, "stdout"), (2, "stderr")):
            with open(folder / f"{name}-{rank}", "w") as file:
                os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False) for number in (1, 2))
        if count > 1:
            local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            several = local | {"RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in several.items()}
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else a warning of the fork
        tqdm.set_lock(threading.RLock())  # not the one that a killed child may hold
        for state in (PartialState, AcceleratorState, GradientState):
            state._shared_state.clear()  # of tests before this one
        if patch:
            patch(rank, settings)
        code = finetune.main(flags_of(settings))
    except BaseException:
        traceback.print_exc()  # to sys.stderr, as the interpreter does
    finally:
        os._exit(code)


def forked(count: int, settings: dict, folder: Path, patch=None) -> SimpleNamespace:
    """Exit codes, stdout and stderr of `count` processes, by rank. None of them may hang."""
    port = free_port()
    pids = [fork(rank, count, port, dict(settings), folder, patch) for rank in range(count)]
    codes: dict[int, int] = {}

    def all_ended() -> bool:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        return len(codes) == count

    try:
        wait_until(all_ended, f"{count} processes")
    finally:
        for rank, pid in enumerate(pids):
            if rank not in codes:
                kill_all(pid)
                os.waitpid(pid, 0)
    outs, errors = ([(folder / f"{name}-{rank}").read_text() for rank in range(count)]
                    for name in ("stdout", "stderr"))
    return SimpleNamespace(codes=[codes[rank] for rank in range(count)], outs=outs, errors=errors)


# ---- What is compared ---------------------------------------------------------------------------


def adapter(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def losses(folder: Path) -> dict[tuple[str, str], float]:
    with open(folder / "metrics.csv", newline="") as file:
        return {(row["step"], name): float(row[name]) for row in csv.DictReader(file)
                for name in ("train_loss", "held_out_loss") if row[name]}


def assert_same(found: Path, expected: Path) -> None:
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    assert len(losses(found)) == STEPS + 1 + FLAGS["EPOCHS"]
    one, other = adapter(found), adapter(expected)
    assert (one - other).norm() <= 1e-4 * other.norm()
    with open(found / "pairs.csv") as one, open(expected / "pairs.csv") as other:
        rows, wanted = ({row["picture"].partition("Image/")[2]: float(row["loss"])
                         for row in csv.DictReader(file)} for file in (one, other))
    assert rows == pytest.approx(wanted, abs=2e-4) and len(rows) == 14
    assert not (found / "checkpoint").exists()


def assert_encoded_once(data: Path, files: int) -> None:
    indices = list(data.glob(".features/*/*.jsonl"))
    pictures = [json.loads(line)[0] for path in indices for line in path.read_text().splitlines()]
    assert len(indices) == files
    assert sorted(pictures) == sorted(str(p.relative_to(data)) for p in data.glob("Image/*/*.png"))


def assert_one_voice(output: str) -> None:
    for start in ("model:", "device:", "memory:", "pictures:", "pairs:", "row:", "LoRA:",
                  "steps: 9,", "epoch 1/3", "epoch 3/3", "highest losses", "training_pairs:",
                  "adapter:"):  # fmt: skip
        assert len(re.findall(f"^{start}", output, re.M)) == 1, start
    assert "processes: 2, 5 pairs a step in all\n" in output


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def data(root, sample) -> Path:
    """14 pairs of the sample's pictures, with captions of 3 to 15 words."""
    folder, rng = root / "data", random.Random(0)
    (folder / "caption").mkdir(parents=True)
    for number, name in enumerate(sorted(p.name for p in (sample / "Image").iterdir())[:5]):
        words = rng.choices(WORDS, k=3 * number + 3)
        (folder / "caption" / f"{name}.txt").write_text(" ".join(words))
        (folder / "Image" / name).mkdir(parents=True)
        for picture in sorted((sample / "Image" / name).iterdir())[: 3 - (number == 4)]:
            shutil.copy(picture, folder / "Image" / name)
    return folder


@pytest.fixture(scope="module")
def settings_in(root, data):
    """settings_in(name, **more): settings of a run with a folder and data of its own."""

    def make(name: str, **more) -> dict:
        shutil.copytree(data, root / name / "data", ignore=shutil.ignore_patterns(".*"))
        return FLAGS | {"TRAIN_DIR": root / name / "data", "OUTPUT_DIR": root / name / "out"} | more

    return make


@pytest.fixture(scope="module", params=["opt", "t5"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def one(root, settings_in, opt_base, t5_base):
    """one(kind): the OUTPUT_DIR of one process's run."""

    def make(kind: str) -> Path:
        folder = root / f"one-{kind}"
        if not folder.exists():
            base = {"opt": opt_base, "t5": t5_base}[kind]
            done = forked(1, settings_in(folder.name, MODEL_ID=base), folder)
            assert done.codes == [0], done.errors
        return folder / "out"

    return make


# ---- The same result ----------------------------------------------------------------------------


def test_two_launched_processes_do_what_one_does(one, root, settings_in, opt_base):
    settings = settings_in("two", MODEL_ID=opt_base)
    launched = Launched(root / "two", "--standalone", "--nproc_per_node", "2", "finetune.py",
                        *flags_of(settings))  # fmt: skip
    code, output, error = launched.end()
    assert code == 0, error
    assert json.loads((root / "two/out/settings.json").read_text())["processes"] == 2
    assert_one_voice(output)
    assert "\r" not in output + error
    assert_encoded_once(root / "two/data", files=2)
    assert_same(root / "two/out", one("opt"))
    assert_encoded_once(root / "one-opt/data", files=1)


def test_two_launched_machines_do_what_one_process_does(one, root, settings_in, opt_base):
    settings, port = settings_in("nodes", MODEL_ID=opt_base), str(free_port())
    both = [Launched(root / f"nodes/{rank}", "--nnodes", "2", "--node_rank", str(rank),
                     "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port,
                     "finetune.py", *flags_of(settings)) for rank in (0, 1)]  # fmt: skip
    try:
        (code, output, error), (other_code, silence, other_error) = [node.end() for node in both]
    finally:
        for node in both:
            kill_all(node.process.pid)
    assert code == 0 and other_code == 0, error + other_error
    assert silence == SECOND
    assert_one_voice(output)
    assert_encoded_once(root / "nodes/data", files=2)
    assert_same(root / "nodes/out", one("opt"))


def test_two_forked_processes_do_what_one_does(kind, one, root, settings_in, opt_base, t5_base):
    """As the others, for both kinds of base; what processes share in tests below is this."""
    base = {"opt": opt_base, "t5": t5_base}[kind]
    done = forked(2, settings_in(f"forked-{kind}", MODEL_ID=base), root / f"forked-{kind}")
    assert done.codes == [0, 0], done.errors
    assert_one_voice(done.outs[0])
    assert done.outs[1] == SECOND and done.errors == ["", ""]
    assert_encoded_once(root / f"forked-{kind}/data", files=2)
    assert_same(root / f"forked-{kind}/out", one(kind))


def late(rank: int, settings: dict) -> None:
    """Process 1 looks for what is encoded when process 0 could have begun to encode."""
    real = finetune.open_features

    def open_features(*arguments):
        time.sleep(0.7 * rank)
        return real(*arguments)

    finetune.open_features = open_features


def test_a_late_process_leaves_no_picture_out(root, settings_in, opt_base):
    done = forked(2, settings_in("late", MODEL_ID=opt_base), root / "late", late)
    assert done.codes == [0, 0], done.errors
    assert_encoded_once(root / "late/data", files=2)


def often(rank: int, settings: dict) -> None:
    """A checkpoint after each step, a report after each epoch; each process notes what it makes."""
    settings["CHECKPOINT_MINUTES"] = 1e-9
    finetune.REPORT_SECONDS = 0
    note = Path(settings["OUTPUT_DIR"]).parent / f"calls-{rank}"

    def watch(name: str) -> None:
        real = getattr(finetune, name)

        def watched(*arguments):
            with open(note, "a") as file:
                file.write(f"{name}\n")
            return real(*arguments)

        setattr(finetune, name, watched)

    for name in ("save_checkpoint", "draw_report", "save_adapter"):
        watch(name)


def test_checkpoints_and_reports_on_the_way_change_nothing(one, root, settings_in, opt_base):
    done = forked(2, settings_in("often", MODEL_ID=opt_base), root / "often", often)
    assert done.codes == [0, 0], done.errors
    calls = (root / "often/calls-0").read_text().split()
    assert calls.count("save_checkpoint") == STEPS and calls.count("draw_report") == 4
    assert not (root / "often/calls-1").exists()
    assert_same(root / "often/out", one("opt"))


def test_more_processes_than_pairs(root, settings_in, opt_base):
    """Three processes for one caption with two pictures, and nothing held out."""
    settings = settings_in("few", MODEL_ID=opt_base, VALIDATION_FRACTION=0, EPOCHS=2)
    shutil.rmtree(settings["TRAIN_DIR"])
    for folder in ("caption", "Image/red"):
        (settings["TRAIN_DIR"] / folder).mkdir(parents=True)
    (settings["TRAIN_DIR"] / "caption/red.txt").write_text("a red circle")
    for number, picture in enumerate(sorted((root / "data").glob("Image/*/*.png"))[:2]):
        shutil.copy(picture, settings["TRAIN_DIR"] / f"Image/red/{number}.png")
    results = []
    for count in (3, 1):
        done = forked(count, settings, root / "few")
        assert done.codes == [0] * count, done.errors
        results.append(adapter(root / "few/out"))
        shutil.rmtree(root / "few/out")
    assert (results[0] - results[1]).norm() <= 1e-4 * results[1].norm()


# ---- Out of memory ------------------------------------------------------------------------------


def short_of_memory(rank: int, settings: dict) -> None:
    """Process 1 is out of memory in its second step; each notes how many rows it is given."""
    real, sizes = finetune.pair_losses, []

    def losses_of(model, rows, base):
        if not torch.is_grad_enabled():
            return real(model, rows, base)
        sizes.append(len(rows))
        note = Path(settings["OUTPUT_DIR"]).parent / f"sizes-{rank}"
        note.write_text(json.dumps(sizes))
        if rank == 1 and len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, rows, base)

    finetune.pair_losses = losses_of


def test_out_of_memory_on_one_process_halves_in_all(one, root, settings_in, opt_base):
    done = forked(2, settings_in("short", MODEL_ID=opt_base), root / "short", short_of_memory)
    assert done.codes == [0, 0], done.errors
    assert done.outs[0].count("out of memory: 2 pairs at a time") == 1
    sizes = [json.loads((root / f"short/sizes-{rank}").read_text()) for rank in (0, 1)]
    assert sizes[0][:2] == [3, 3] and sizes[1][:2] == [2, 2]  # of five rows in all
    assert max(sizes[0][2:] + sizes[1][2:]) == 2 and sizes[0][2:4] == [2, 1]
    assert_same(root / "short/out", one("opt"))


def short_of_memory_in_measuring(rank: int, settings: dict) -> None:
    real = finetune.measure_losses

    def measure_losses(*arguments):
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments)

    finetune.measure_losses = measure_losses


def test_out_of_memory_where_nothing_can_be_halved_is_a_sentence(root, settings_in, opt_base):
    settings = settings_in("full", MODEL_ID=opt_base)
    done = forked(2, settings, root / "full", short_of_memory_in_measuring)
    assert done.codes == [1, 1]
    assert done.errors[0].startswith("error: another process has ended")
    assert done.errors[1].startswith("process 1: error: out of memory. ")


# ---- Stopped ------------------------------------------------------------------------------------


def signal_in_step_5(number: int):
    """A patch: the signal comes to process 1 only, in its fifth step."""

    def patch(rank: int, settings: dict) -> None:
        real = finetune.rows_of_step

        def rows_of_step(dataset, step, *more):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), number)
            return real(dataset, step, *more)

        finetune.rows_of_step = rows_of_step

    return patch


@pytest.fixture(scope="module")
def stopped(root, settings_in, opt_base):
    """A run of two processes, one of which had SIGTERM."""
    settings = settings_in("stopped", MODEL_ID=opt_base)
    done = forked(2, settings, root / "stopped", signal_in_step_5(signal.SIGTERM))
    return SimpleNamespace(settings=settings, **vars(done))


def test_sigterm_to_one_process_stops_all_with_a_checkpoint(stopped, root):
    assert stopped.codes == [130, 143]  # the first had no signal of its own
    assert "Traceback" not in "".join(stopped.errors)
    assert stopped.errors[0] == "stopped; the same command continues\n"
    newest = sorted((root / "stopped/out/checkpoint").iterdir())[-1]
    assert newest.stem.lstrip("0") in ("5", "6")
    assert not json.loads((root / "stopped/out/settings.json").read_text())["finished"]


@pytest.mark.parametrize("count", [2, 1], ids=["by two", "by one"])
def test_a_stopped_run_is_continued(stopped, one, root, count):
    out, kept = root / "stopped/out", root / "stopped/kept"
    if not kept.exists():
        shutil.copytree(out, kept)
    shutil.rmtree(out)
    shutil.copytree(kept, out)
    done = forked(count, stopped.settings, root / "stopped")
    assert done.codes == [0] * count, done.errors
    assert len(re.findall(r"continuing after step [56]$", "".join(done.outs), re.M)) == 1
    assert_same(out, one("opt"))
    assert_encoded_once(root / "stopped/data", files=2)  # not encoded again


PAUSED = """
import os, sys, time
from pathlib import Path
import finetune

folder, real = Path(sys.argv.pop(1)), finetune.rows_of_step


def rows_of_step(dataset, step, *more):
    if step == 5 and os.environ["RANK"] == "0":
        (folder / "paused").touch()
        deadline = time.monotonic() + 60
        while not (folder / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    return real(dataset, step, *more)


finetune.rows_of_step = rows_of_step
sys.exit(finetune.main())
"""


def test_sigterm_to_the_launcher_stops_with_a_checkpoint(one, root, settings_in, opt_base):
    settings, folder = settings_in("launcher", MODEL_ID=opt_base), root / "launcher"
    (folder / "paused.py").write_text(PAUSED)
    environment = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    try:
        launched = Launched(folder, "--standalone", "--nproc_per_node", "2",
                            str(folder / "paused.py"), str(folder), *flags_of(settings))
        said = launched.outputs[1]
        wait_until(lambda: (folder / "paused").exists() or launched.process.poll() is not None,
                   "step 5")  # fmt: skip
        launched.process.send_signal(signal.SIGTERM)
        # Only process 0 can say so: the other one waits for it, outside of Python.
        wait_until(lambda: "stopping after this step" in said.read_text()
                   or launched.process.poll() is not None, "the signal")  # fmt: skip
        (folder / "go").touch()
        code, _, error = launched.end()
    finally:
        kill_all(launched.process.pid)
        os.environ.pop("PYTHONPATH")
        os.environ |= {"PYTHONPATH": environment} if environment else {}
    assert code == 1 and "stopped; the same command continues" in error
    assert any((folder / "out/checkpoint").iterdir())
    done = forked(2, settings, folder)
    assert done.codes == [0, 0], done.errors
    assert re.search(r"^continuing after step [56]$", done.outs[0], re.M)
    assert_same(folder / "out", one("opt"))


# ---- Processes that don't get on ----------------------------------------------------------------


def other_files(name: str, change):
    """A patch: process 1 has its own copy of a folder, changed."""

    def patch(rank: int, settings: dict) -> None:
        if rank == 1:
            folder = Path(f"{settings[name]}-of-another-machine")
            if Path(settings[name]).exists():
                shutil.copytree(settings[name], folder)
            change(folder)
            settings[name] = folder

    return patch


def without_a_picture(folder: Path) -> None:
    sorted(folder.glob("Image/*/*.png"))[0].unlink()


def another_caption(folder: Path) -> None:
    sorted(folder.glob("caption/*.txt"))[0].write_text("a yellow star")


@pytest.mark.parametrize("patch", [
    pytest.param(other_files("TRAIN_DIR", without_a_picture), id="a picture is missing"),
    pytest.param(other_files("TRAIN_DIR", another_caption), id="another caption"),
    pytest.param(other_files("TRAIN_DIR", shutil.rmtree), id="no TRAIN_DIR"),
    pytest.param(other_files("OUTPUT_DIR", lambda folder: None), id="no OUTPUT_DIR"),
    pytest.param(other_files("OUTPUT_DIR", Path.mkdir), id="another OUTPUT_DIR"),
])  # fmt: skip
def test_processes_that_see_other_files_say_so(patch, tmp_path, data, opt_base):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    settings = FLAGS | {"MODEL_ID": opt_base, "TRAIN_DIR": tmp_path / "data",
                        "OUTPUT_DIR": tmp_path / "out"}  # fmt: skip
    started = time.monotonic()
    done = forked(2, settings, tmp_path, patch)
    assert time.monotonic() - started < 60
    assert done.codes == [1, 1], done.errors
    assert "Traceback" not in "".join(done.errors), done.errors
    same = "the processes don't see the same files. Put "
    other = "another process has ended"
    assert re.match(f"error: ({same}|{other})", done.errors[0])
    assert re.match(f"process 1: error: ({same}|there is no folder)", done.errors[1])
    assert (same in done.errors[0]) == (same in done.errors[1])
    assert not list((tmp_path / "data").glob(".features/*/*")), "encoded before the check"




def test_a_second_run_of_two_is_refused(tmp_path, data, opt_base):
    """The lock is process 0's; process 1 must not wait for it."""
    settings = FLAGS | {"MODEL_ID": opt_base, "TRAIN_DIR": data, "OUTPUT_DIR": tmp_path / "out"}
    with finetune.lock_output(tmp_path / "out"):
        done = forked(2, settings, tmp_path)
    assert done.codes == [1, 1], done.errors
    assert "another run writes into OUTPUT_DIR" in done.errors[0]
    assert "another process has ended" in done.errors[1]
    assert "Traceback" not in "".join(done.errors), done.errors


def bug_in_process_1(rank: int, settings: dict) -> None:
    real = finetune.add_lora

    def add_lora(*arguments):
        if rank == 1:
            raise ZeroDivisionError("of process 1")
        return real(*arguments)

    finetune.add_lora = add_lora


def another_seed(rank: int, settings: dict) -> None:
    settings["SEED"] = 7 + rank


def test_processes_with_other_settings_say_so(tmp_path, data, opt_base):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    settings = FLAGS | {"MODEL_ID": opt_base, "TRAIN_DIR": tmp_path / "data",
                        "OUTPUT_DIR": tmp_path / "out"}  # fmt: skip
    done = forked(2, settings, tmp_path, another_seed)
    assert done.codes == [1, 1]
    assert all("different values of SEED. Give" in error for error in done.errors), done.errors


def test_an_unexpected_error_of_another_process_is_seen(tmp_path, data, opt_base):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    settings = FLAGS | {"MODEL_ID": opt_base, "TRAIN_DIR": tmp_path / "data",
                        "OUTPUT_DIR": tmp_path / "out"}  # fmt: skip
    done = forked(2, settings, tmp_path, bug_in_process_1)
    assert 0 not in done.codes
    assert "ZeroDivisionError: of process 1" in done.errors[1]


def test_a_killed_process_ends_the_others_and_the_run_continues(one, root, settings_in, opt_base):
    settings, folder = settings_in("killed", MODEL_ID=opt_base), root / "killed"
    done = forked(2, settings, folder, signal_in_step_5(signal.SIGKILL))
    assert done.codes == [1, -signal.SIGKILL]
    assert done.errors[0].startswith("error: another process has ended")
    done = forked(2, settings, folder)
    assert done.codes == [0, 0] and "continuing after step 3\n" in done.outs[0], done.errors
    assert_same(folder / "out", one("opt"))


def test_a_finished_run_says_so_once(one, root, opt_base):
    out = one("opt")
    settings = FLAGS | {"MODEL_ID": opt_base, "TRAIN_DIR": root / "one-opt/data", "OUTPUT_DIR": out}
    before = adapter(out)
    done = forked(2, settings, root / "again")
    assert done.codes == [0, 0], done.errors
    assert done.outs[0].count("this run is finished") == 1 and done.outs[1] == SECOND
    assert torch.equal(adapter(out), before)
