"""Several processes do what one does: the same losses, the same adapter, one voice."""

import csv
import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from conftest import flags_of
from filelock import FileLock
from runner import Ended, fail_with, fork_several, on, send, start
from safetensors import safe_open
from safetensors.torch import load_file

import finetune

WORDS = "red circle green background on a yellow star".split()  # a token each
# 14 pairs, of which 3 are held out: steps of 5, 5 and 1, and the last is too few for all processes
SETTINGS = {
    "VALIDATION_FRACTION": 0.2, "BATCH_SIZE": 5, "EPOCHS": 3, "LEARNING_RATE": 3e-3,
    "LORA_DROPOUT": 0.0, "DEVICE": "cpu", "NUM_WORKERS": 1, "SAMPLE_COUNT": 1,
    "LOAD_IN_4BIT": False, "TRAIN_DIR": "data", "OUTPUT_DIR": "out",
}  # fmt: skip
STEPS = 9


@pytest.fixture(scope="module")
def data(sample, tmp_path_factory) -> Path:
    """14 pairs of the sample's pictures, with captions of 3 to 15 words."""
    folder, rng = tmp_path_factory.mktemp("several") / "data", random.Random(0)
    (folder / "caption").mkdir(parents=True)
    for number, name in enumerate(sorted(p.name for p in (sample / "Image").iterdir())[:5]):
        words = rng.choices(WORDS, k=3 * number + 3)
        (folder / "caption" / f"{name}.txt").write_text(" ".join(words))
        (folder / "Image" / name).mkdir(parents=True)
        for picture in sorted((sample / "Image" / name).iterdir())[: 3 - (number == 4)]:
            shutil.copy(picture, folder / "Image" / name)
    return folder


class Together:
    """A folder with data/ and out/, where several processes run the command together."""

    def __init__(self, folder: Path, data: Path, base: str) -> None:
        self.folder, self.out, self.base = folder, folder / "out", base
        self.checkpoint = folder / "out.unfinished/checkpoint.pt"
        shutil.copytree(data, folder / "data", ignore=shutil.ignore_patterns(".*"))

    def __call__(self, count: int, prepare=None, **settings) -> list[Ended]:
        settings = SETTINGS | {"MODEL_ID": self.base} | settings
        return fork_several(count, settings, self.folder, prepare)

    def step(self) -> int:
        return torch.load(self.checkpoint, weights_only=True)["progress"]["step"]


@pytest.fixture
def together(tmp_path, data, opt_base) -> Together:
    return Together(tmp_path / "run", data, opt_base)


@pytest.fixture(scope="module")
def alone(data, opt_base, t5_base, tmp_path_factory) -> dict[str, Path]:
    """The OUTPUT_DIR of one process's run, by base."""
    outs = {}
    for base in (opt_base, t5_base):
        runs = Together(tmp_path_factory.mktemp("alone") / "run", data, base)
        (ended,) = runs(1)
        assert ended.code == 0, ended
        outs[base] = runs.out
    return outs


# ---- What is compared ---------------------------------------------------------------------------


def adapter(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def losses(folder: Path) -> dict[tuple[str, str], float]:
    with open(folder / "metrics.csv", newline="") as file:
        return {(row["step"], name): float(row[name]) for row in csv.DictReader(file)
                for name in ("train_loss", "held_out_loss") if row[name]}


def pair_losses(folder: Path) -> dict[tuple[str, str], float]:
    with open(folder / "pairs.csv", newline="") as file:
        return {(row["split"], row["picture"]): float(row["loss"]) for row in csv.DictReader(file)}


def assert_same(found: Path, expected: Path) -> None:
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    assert len(losses(found)) == STEPS + 1 + SETTINGS["EPOCHS"]
    one, other = adapter(found), adapter(expected)
    assert (one - other).norm() <= 1e-4 * other.norm()
    assert pair_losses(found) == pytest.approx(pair_losses(expected), abs=2e-4)
    assert len(pair_losses(found)) == 14
    assert not Path(f"{found}.unfinished").exists()


def assert_encoded_once(data: Path, files: int) -> None:
    pictures, batches = [], list(data.glob(".features/*/*.safetensors"))
    for path in batches:
        with safe_open(path, "pt") as batch:
            pictures += [key.split(" ")[0] for key in json.loads(batch.metadata()["pictures"])]
    assert len(batches) == files
    assert sorted(pictures) == sorted(p.relative_to(data).as_posix()
                                      for p in data.glob("Image/*/*.png"))


def assert_one_voice(output: str) -> None:
    for start_of_line in ("layout", "model:", "device:", "memory:", "pictures:", "pairs:", "row:",
                          "LoRA:", "steps: 9,", "epoch 1/3", "epoch 3/3", "highest losses",
                          "training_pairs:", "adapter:"):
        assert len(re.findall(f"^{start_of_line}", output, re.M)) == 1, start_of_line
    assert "\r" not in output


def without_traceback(ended: list[Ended]) -> list[str]:
    errors = [one.err for one in ended]
    assert "Traceback" not in "".join(errors), ended
    return errors


# ---- The same result ----------------------------------------------------------------------------


def test_two_processes_of_torchrun_do_what_one_does(together, alone, opt_base):
    settings = SETTINGS | {"MODEL_ID": opt_base}
    ended = start([sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node", 2, Path(finetune.__file__).resolve(), *flags_of(settings)],
                  together.folder / "logs", together.folder).wait()
    assert ended.code == 0, ended
    assert json.loads((together.out / "settings.json").read_text())["processes"] == 2
    assert_one_voice(ended.out)
    assert "\r" not in ended.err
    assert_encoded_once(together.folder / "data", files=2)
    assert_same(together.out, alone[opt_base])


@pytest.mark.parametrize("kind, count", [("opt", 2), ("t5", 3)])
def test_forked_processes_do_what_one_does(kind, count, alone, data, tmp_path, request):
    """As the launched ones; what processes share in tests below is this."""
    base = request.getfixturevalue(f"{kind}_base")
    together = Together(tmp_path / "run", data, base)
    first, *others = together(count)
    assert first.code == 0 and first.err == "", first
    assert_one_voice(first.out)
    assert others == [Ended(0, "", "")] * (count - 1)
    assert_encoded_once(together.folder / "data", files=count)
    assert_same(together.out, alone[base])
    first, *others = together(count)
    assert first.code == 0 and first.out.count("this run is finished") == 1
    assert others == [Ended(0, "", "")] * (count - 1)


# ---- Out of memory ------------------------------------------------------------------------------


def test_out_of_memory_on_one_process_halves_in_all(together, alone, opt_base):
    """Process 1 is short in its second step; each notes how many rows it is given."""

    def prepare(rank: int, settings: dict) -> None:
        real, sizes, note = finetune.Captioner.losses, [], Path(f"sizes-{rank}").absolute()

        def watched(captioner, rows):
            if torch.is_grad_enabled():
                sizes.append(len(rows))
                note.write_text(json.dumps(sizes))
                if rank == 1 and len(sizes) == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(captioner, rows)

        finetune.Captioner.losses = watched

    ended = together(2, prepare)
    assert [one.code for one in ended] == [0, 0], ended
    assert ended[0].out.count("out of memory: 2 pairs at a time") == 1
    sizes = [json.loads((together.folder / f"sizes-{rank}").read_text()) for rank in (0, 1)]
    assert sizes[0][:4] == [3, 3, 2, 1] and sizes[1][:3] == [2, 2, 2]  # of five rows in all
    assert max(sizes[0][2:] + sizes[1][2:]) == 2
    assert_same(together.out, alone[opt_base])


# ---- Stopped ------------------------------------------------------------------------------------


def in_step_5(action, *ranks: int):
    """A patch: it happens there to some processes."""

    def prepare(rank: int, settings: dict) -> None:
        if rank in ranks:
            on("before step 5", action)

    return prepare


@pytest.fixture(scope="module")
def stopped(data, opt_base, tmp_path_factory) -> SimpleNamespace:
    """A run of two processes, one of which had SIGTERM."""
    runs = Together(tmp_path_factory.mktemp("stopped") / "run", data, opt_base)
    return SimpleNamespace(runs=runs, ended=runs(2, in_step_5(lambda: send(signal.SIGTERM), 1)))


def test_sigterm_to_one_process_stops_all_with_a_checkpoint(stopped):
    assert [one.code for one in stopped.ended] == [130, 143]  # the first had no signal of its own
    errors = without_traceback(stopped.ended)
    assert errors[0] == "stopped; the same command continues, without --restart\n"
    assert stopped.runs.step() in (5, 6) and not stopped.runs.out.exists()


def test_sigterm_to_all_as_from_a_launcher(together, alone, opt_base):
    ended = together(2, in_step_5(lambda: send(signal.SIGTERM), 0, 1))
    assert [one.code for one in ended] == [143, 143]
    without_traceback(ended)
    assert together.step() in (5, 6)
    assert [one.code for one in together(2)] == [0, 0]
    assert_same(together.out, alone[opt_base])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_stopped_run_is_continued_by_any_number(count, stopped, alone, opt_base, tmp_path):
    together = Together(tmp_path / "run", stopped.runs.folder / "data", opt_base)
    shutil.copytree(stopped.runs.folder, together.folder, dirs_exist_ok=True)
    ended = together(count)
    assert [one.code for one in ended] == [0] * count, ended
    assert re.search(r"^steps: 9, 3 an epoch, [56] done$", ended[0].out, re.M)
    assert_same(together.out, alone[opt_base])
    assert_encoded_once(together.folder / "data", files=2)  # not encoded again


def test_a_killed_process_ends_the_others_and_the_run_continues(together, alone, opt_base):
    ended = together(2, in_step_5(lambda: send(signal.SIGKILL), 1))
    assert [one.code for one in ended] == [1, -signal.SIGKILL]
    (error, _) = without_traceback(ended)
    assert error.startswith("error: ") and "Another process has ended" in error
    assert together.step() == 3
    ended = together(2)
    assert [one.code for one in ended] == [0, 0] and ", 3 done" in ended[0].out, ended
    assert_same(together.out, alone[opt_base])


# ---- Processes that don't get on ----------------------------------------------------------------


def other_folder(name: str, change):
    """A patch: process 1 has its own, changed copy of TRAIN_DIR or OUTPUT_DIR under that path."""

    def prepare(rank: int, settings: dict) -> None:
        if rank == 1:
            own = Path("other machine").absolute()
            shutil.copytree(".", own, ignore=shutil.ignore_patterns("other*", "logs*"))
            change(own)
            if name == "OUTPUT_DIR":
                settings[name] = str(own / "out")
            else:
                settings["OUTPUT_DIR"] = os.path.abspath("out")
                os.chdir(own)

    return prepare


def without_a_picture(own: Path) -> None:
    sorted(own.glob("data/Image/*/*.png"))[0].unlink()


def another_caption(own: Path) -> None:
    sorted(own.glob("data/caption/*.txt"))[0].write_text("a yellow star")


def another_seed(rank: int, settings: dict) -> None:
    settings["SEED"] = 7 + rank


@pytest.mark.parametrize("prepare", [
    pytest.param(other_folder("TRAIN_DIR", without_a_picture), id="a picture is missing"),
    pytest.param(other_folder("TRAIN_DIR", another_caption), id="another caption"),
    pytest.param(other_folder("TRAIN_DIR", lambda own: None), id="features that are not shared"),
    pytest.param(another_seed, id="another setting"),
])  # fmt: skip
def test_processes_with_other_files_or_settings_say_so(prepare, together):
    ended = together(2, prepare)
    assert [one.code for one in ended] == [1, 1], ended
    errors, same = without_traceback(ended), "the processes see other files, or have other settings"
    assert errors[0].startswith(f"error: {same}"), errors
    assert errors[1].startswith(f"process 1: error: {same}"), errors
    assert not together.out.exists()


def fails_in_process_1(event: str, error: Exception):
    def prepare(rank: int, settings: dict) -> None:
        if rank == 1:
            on(event, lambda: fail_with(error))

    return prepare


@pytest.mark.parametrize("prepare, said", [
    (other_folder("TRAIN_DIR", lambda own: shutil.rmtree(own / "data")), "'data'"),
    (fails_in_process_1("before caption 1", torch.OutOfMemoryError("CUDA out of memory.")),
     "process 1: error: CUDA out of memory. "),
    (fails_in_process_1("before step 2", ZeroDivisionError("of process 1")),
     "ZeroDivisionError: of process 1"),
], ids=["no data", "out of memory where nothing can be halved", "a bug"])  # fmt: skip
def test_an_error_of_one_process_is_seen_and_ends_all(prepare, said, together):
    first, second = together(2, prepare)
    assert first.code and "Another process has ended" in first.err, first
    assert second.code and said in second.err, second
    assert ("Traceback" in second.err) == said.startswith("Zero")


@pytest.mark.parametrize("change", [
    pytest.param(lambda own: shutil.rmtree(own / "out.unfinished"), id="none"),
    pytest.param(lambda own: rewind(own / "out.unfinished/checkpoint.pt"), id="another"),
])  # fmt: skip
def test_processes_that_continue_from_another_step_say_so(change, stopped, together):
    shutil.copytree(stopped.runs.folder, together.folder, dirs_exist_ok=True)
    ended = together(2, other_folder("OUTPUT_DIR", change))
    assert [one.code for one in ended] == [1, 1], ended
    assert all("the processes see other files" in error for error in without_traceback(ended))
    assert together.step() == stopped.runs.step() and not together.out.exists()


def rewind(path: Path) -> None:
    """As an earlier state of this file, on a machine of its own."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["progress"]["step"] -= 1
    torch.save(checkpoint, path)


def test_a_second_run_of_two_is_refused(together):
    """The lock is process 0's; process 1 must not wait for it."""
    with FileLock(f"{together.out}.lock"):
        ended = together(2)
    assert [one.code for one in ended] == [1, 1], ended
    errors = without_traceback(ended)
    assert "Another run works on this OUTPUT_DIR" in errors[0] and "out.lock" in errors[0]
    assert "Another process has ended" in errors[1]


def test_one_gpu_for_several_processes_is_refused(together):
    """Even where there are GPUs: here they have met before the GPUs are looked for."""
    ended = together(2, lambda rank, settings: PartialState(cpu=True), DEVICE="cuda:1")
    assert [one.code for one in ended] == [1, 1], ended
    assert all("DEVICE is 'cuda:1', but each process takes a GPU of its own" in error
               for error in without_traceback(ended))
