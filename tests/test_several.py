"""Several processes do what one does: the same losses, the same adapter, one voice."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import flags_of
from runner import LIMIT, Ended, fail_with, fork_several, on, send, step_of, table
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


@pytest.fixture(scope="module")
def data(sample, tmp_path_factory) -> Path:
    """A folder with data/: 14 pairs of the sample's pictures, with captions of 3 to 15 words."""
    folder, rng = tmp_path_factory.mktemp("several"), random.Random(0)
    shutil.copytree(sample, folder / "data", ignore=shutil.ignore_patterns(
        "[!s]*-on-*", "square-green-*", "0[4-9].png", "1?.png"))  # five of three pictures
    for number, text in enumerate(sorted(folder.glob("data/caption/*.txt"))):
        text.write_text(" ".join(rng.choices(WORDS, k=3 * number + 3)))
    sorted(folder.glob("data/Image/*/*.png"))[-1].unlink()
    return folder


class Together:
    """A copy of a folder, where several processes run the command together."""

    def __init__(self, folder: Path, source: Path, base: str) -> None:
        self.folder, self.out, self.base = folder, folder / "out", base
        shutil.copytree(source, folder)

    def __call__(self, count: int, prepare=lambda rank, settings: None, **settings) -> list[Ended]:
        settings = SETTINGS | {"MODEL_ID": self.base} | settings
        return fork_several(count, settings, self.folder, prepare)

    def equals(self, expected: Path) -> None:
        """But for rounding; and every picture was encoded once."""
        assert measured(self.out) == pytest.approx(measured(expected), abs=2e-4)
        assert len(measured(self.out)) == 9 + 1 + 3 + 14  # steps, epochs' ends, pairs
        one, other = adapter(self.out), adapter(expected)
        assert (one - other).norm() <= 1e-4 * other.norm()
        assert not Path(f"{self.out}.unfinished").exists()
        encoded = []
        for path in self.folder.glob("data/.features/*/*.safetensors"):
            with safe_open(path, "pt") as batch:
                encoded += [key.split(" ")[0] for key in json.loads(batch.metadata()["pictures"])]
        pictures = self.folder.glob("data/Image/*/*.png")
        assert sorted(encoded) == sorted(
            path.relative_to(self.folder / "data").as_posix() for path in pictures)


def adapter(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def measured(folder: Path) -> dict[tuple[str, str], float]:
    """Every loss: of steps, of epochs' ends, of pairs."""
    return {(row["step"], name): float(row[name]) for row in table(folder / "metrics.csv")
            for name in ("train_loss", "held_out_loss") if row[name]} | {
        (row["split"], row["picture"]): float(row["loss"]) for row in table(folder / "pairs.csv")}


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


def assert_one_voice(output: str) -> None:
    for start_of_line in ("layout", "model:", "device:", "memory:", "pictures:", "pairs:", "row:",
                          "LoRA:", "steps: 9,", "epoch 1/3", "epoch 3/3", "highest losses",
                          "training_pairs:", "adapter:"):
        assert len(re.findall(f"^{start_of_line}", output, re.M)) == 1, start_of_line
    assert "\r" not in output


def codes(ended: list[Ended]) -> list[int]:
    """The exit codes of processes that end without a traceback."""
    assert not any("Traceback" in one.err for one in ended), ended
    return [one.code for one in ended]


# ---- The same result ----------------------------------------------------------------------------


def test_two_processes_of_torchrun_do_what_one_does(together, alone, opt_base):
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         Path(finetune.__file__).resolve(), *flags_of(SETTINGS | {"MODEL_ID": opt_base})],
        cwd=together.folder, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, encoding="utf-8", timeout=LIMIT)
    assert ended.returncode == 0 and "\r" not in ended.stderr, ended
    assert_one_voice(ended.stdout)
    assert json.loads((together.out / "settings.json").read_text())["processes"] == 2
    together.equals(alone[opt_base])


@pytest.mark.parametrize("kind, count", [("opt", 2), ("t5", 3)])
def test_forked_processes_do_what_one_does(kind, count, alone, data, tmp_path, request):
    """As the launched ones; what processes share in tests below is this."""
    base = request.getfixturevalue(f"{kind}_base")
    together = Together(tmp_path / "run", data, base)
    first, *others = together(count)
    assert first.code == 0 and first.err == "", first
    assert_one_voice(first.out)
    assert others == [Ended(0, "", "")] * (count - 1)
    together.equals(alone[base])
    first, *others = together(count)
    assert first.code == 0 and first.out.count("this run is finished") == 1
    assert others == [Ended(0, "", "")] * (count - 1)


def test_nothing_held_out(together):
    assert codes(together(2, VALIDATION_FRACTION=0, EPOCHS=1)) == [0, 0]


def test_out_of_memory_on_one_process_halves_in_all(together, alone, opt_base):
    """Process 1 is short in its second step; each prints how many rows it is given, to stderr."""

    def prepare(rank: int, settings: dict) -> None:
        real, sizes, stderr = finetune.Captioner.losses, [], sys.stderr

        def watched(captioner, rows):
            if torch.is_grad_enabled():
                sizes.append(len(rows))
                print(len(rows), file=stderr)
                if rank == 1 and len(sizes) == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(captioner, rows)

        finetune.Captioner.losses = watched

    first, second = together(2, prepare)
    assert codes([first, second]) == [0, 0]
    assert first.out.count("out of memory: 2 pairs at a time") == 1
    sizes, others = ([int(size) for size in one.err.split()] for one in (first, second))
    assert sizes[:4] == [3, 3, 2, 1] and others[:3] == [2, 2, 2]  # of five rows in all
    assert max(sizes[2:] + others[2:]) == 2
    together.equals(alone[opt_base])


# ---- Stopped ------------------------------------------------------------------------------------


def in_process(*ranks: int, action, event: str = "before step 5"):
    """A patch: it happens there to some processes."""

    def prepare(rank: int, settings: dict) -> None:
        if rank in ranks:
            on(event, action)

    return prepare


@pytest.fixture(scope="module")
def stopped(data, opt_base, tmp_path_factory) -> Together:
    """A run of two processes, one of which had SIGTERM."""
    together = Together(tmp_path_factory.mktemp("stopped") / "run", data, opt_base)
    ended = together(2, in_process(1, action=send(signal.SIGTERM)))
    assert codes(ended) == [130, 143]  # the first had no signal of its own
    assert ended[0].err.startswith("stopped; a training continues by the same command")
    assert step_of(together.folder) in (5, 6) and not together.out.exists()
    return together


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_stopped_run_is_continued_by_any_number(count, stopped, alone, opt_base, tmp_path):
    together = Together(tmp_path / "run", stopped.folder, opt_base)
    ended = together(count)
    assert codes(ended) == [0] * count
    assert f"\nsteps: 9, 3 an epoch, {step_of(stopped.folder)} done\n" in ended[0].out
    together.equals(alone[opt_base])


@pytest.mark.parametrize("number, ranks, expected, steps", [
    (signal.SIGTERM, (0, 1), [143, 143], (5, 6)),  # as a launcher sends it
    (signal.SIGKILL, (1,), [1, -signal.SIGKILL], (3,)),
])  # fmt: skip
def test_all_end_with_a_checkpoint(number, ranks, expected, steps, together, alone, opt_base):
    ended = together(2, in_process(*ranks, action=send(number)))
    assert codes(ended) == expected
    assert "Another process has ended" in ended[0].err or number == signal.SIGTERM
    assert step_of(together.folder) in steps
    assert codes(together(2)) == [0, 0]
    together.equals(alone[opt_base])


def test_a_signal_in_the_last_step_comes_too_late(together, alone, opt_base):
    late = in_process(1, action=send(signal.SIGTERM), event="before step 9")
    assert codes(together(2, late)) == [0, 0]
    together.equals(alone[opt_base])


# ---- Processes that don't get on ----------------------------------------------------------------


def elsewhere(change, *, output: bool = False):
    """A patch: process 1 has a changed copy of TRAIN_DIR, or OUTPUT_DIR, under the same path."""

    def prepare(rank: int, settings: dict) -> None:
        if rank == 1:
            here, own = Path.cwd(), Path("other machine").absolute()
            shutil.copytree(here, own, ignore=shutil.ignore_patterns("other*", "logs*"))
            change(own)
            settings["OUTPUT_DIR"] = str((own if output else here) / "out")
            os.chdir(here if output else own)

    return prepare


def another_caption(own: Path) -> None:
    sorted(own.glob("data/caption/*.txt"))[0].write_text("a yellow star")


def another_seed(rank: int, settings: dict) -> None:
    settings["SEED"] = 7 + rank


def another_step(own: Path) -> None:
    path = own / "out.unfinished/checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["progress"]["step"] -= 1
    torch.save(checkpoint, path)


@pytest.mark.parametrize("begun, prepare", [
    pytest.param(False, elsewhere(lambda own: next(own.glob("data/Image/*/*.png")).unlink()),
                 id="a picture is missing"),
    pytest.param(False, elsewhere(another_caption), id="another caption"),
    pytest.param(False, elsewhere(lambda own: None), id="features that are not shared"),
    pytest.param(False, another_seed, id="another setting"),
    pytest.param(True, elsewhere(lambda own: shutil.rmtree(own / "out.unfinished"), output=True),
                 id="no checkpoint"),
    pytest.param(True, elsewhere(another_step, output=True), id="another checkpoint"),
])  # fmt: skip
def test_who_sees_something_else_says_so(begun, prepare, data, stopped, opt_base, tmp_path):
    together = Together(tmp_path / "run", stopped.folder if begun else data, opt_base)
    step = step_of(together.folder)
    ended = together(2, prepare)
    assert codes(ended) == [1, 1]
    said = "error: the processes see other files, or have other settings"
    assert ended[0].err.startswith(said) and ended[1].err.startswith(f"process 1: {said}"), ended
    assert step_of(together.folder) == step and not together.out.exists()


@pytest.mark.parametrize("prepare, said", [
    (elsewhere(lambda own: shutil.rmtree(own / "data")), "'data'"),
    (in_process(1, event="before caption 1",
                action=fail_with(torch.OutOfMemoryError("CUDA out of memory."))),
     "process 1: error: CUDA out of memory. "),
    (in_process(1, action=lambda: 1 / 0), "ZeroDivisionError: "),
], ids=["no data", "out of memory where nothing can be halved", "a bug"])  # fmt: skip
def test_an_error_of_one_process_is_seen_and_ends_all(prepare, said, together):
    first, second = together(2, prepare)
    assert first.code and "Another process has ended" in first.err, first
    assert second.code and said in second.err, second
    assert ("Traceback" in second.err) == said.startswith("Zero")
