"""Several processes do what one does: the same losses, the same adapter, one voice."""

import functools
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
from runner import LIMIT, Child, Ended, fail_with, on, send, step_of, table
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.elastic.utils.distributed import get_free_port

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

    def __call__(self, count: int, prepare=lambda rank, settings: None, **changed) -> list[Ended]:
        """As torchrun starts them; prepare(rank, settings) runs in each. None of them may hang."""
        settings = SETTINGS | {"MODEL_ID": self.base} | changed
        port = get_free_port()

        def join_the_others(rank: int) -> None:
            if count > 1:
                os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{count}",
                               "LOCAL_WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": f"{port}", "GLOO_SOCKET_IFNAME": "lo"}
            prepare(rank, settings)

        children = [Child(settings, folder=self.folder, rank=rank,
                          prepare=functools.partial(join_the_others, rank))
                    for rank in range(count)]
        try:
            return [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()

    def ends_as(self, alone: dict[str, Path], count: int) -> str:
        """Together, with the first as the only voice; returns what it says."""
        first, *others = self(count)
        assert first.code == 0 and not first.err, first
        assert others == [Ended(0, "", "")] * (count - 1)
        self.equals(alone)
        return first.out

    def equals(self, alone: dict[str, Path]) -> None:
        """But for rounding; and every picture was encoded once."""
        expected = alone[self.base]
        assert measured(self.out) == pytest.approx(measured(expected), abs=2e-4)
        assert len(measured(self.out)) == 9 + 1 + 3 + 14  # steps, epochs' ends, pairs
        one, other = adapter(self.out), adapter(expected)
        assert (one - other).norm() <= 1e-4 * other.norm()
        assert not Path(f"{self.out}.unfinished").exists()
        encoded, data = [], self.folder / "data"
        for path in data.glob(".features/*/*.safetensors"):
            with safe_open(path, "pt") as batch:
                encoded += [key.split(" ")[0] for key in json.loads(batch.metadata()["pictures"])]
        assert sorted(encoded) == sorted(
            path.relative_to(data).as_posix() for path in data.glob("Image/*/*.png"))


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
    runs = [Together(tmp_path_factory.mktemp("alone") / "run", data, base)
            for base in (opt_base, t5_base)]
    assert [codes(run(1)) for run in runs] == [[0], [0]]
    return {run.base: run.out for run in runs}


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


def test_two_processes_of_torchrun_do_what_one_does(together, alone):
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         Path(finetune.__file__).resolve(), *flags_of(SETTINGS | {"MODEL_ID": together.base})],
        cwd=together.folder, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, encoding="utf-8", timeout=LIMIT)
    assert ended.returncode == 0 and "\r" not in ended.stderr, ended
    assert_one_voice(ended.stdout)
    assert json.loads((together.out / "settings.json").read_text())["processes"] == 2
    together.equals(alone)


def test_three_processes_do_what_one_does_with_t5(alone, data, t5_base, tmp_path):
    """Forked ones, as in all tests below."""
    together = Together(tmp_path / "run", data, t5_base)
    assert_one_voice(together.ends_as(alone, 3))
    assert together.ends_as(alone, 3).count("this run is finished") == 1


def test_nothing_is_held_out_and_no_two_dropouts_are_alike(together):
    def prepare(rank: int, settings: dict) -> None:
        real, stderr = finetune.Captioner.losses, sys.stderr

        def watched(captioner, rows):
            if torch.is_grad_enabled():
                print(torch.initial_seed(), file=stderr)
            return real(captioner, rows)

        finetune.Captioner.losses = watched

    ended = together(2, prepare, VALIDATION_FRACTION=0, EPOCHS=1)
    assert codes(ended) == [0, 0]
    seeds = [seed for one in ended for seed in one.err.split()]
    assert len(set(seeds)) == len(seeds) == 2 * 3  # processes, steps


def test_out_of_memory_on_one_process_halves_in_all(together, alone):
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
    together.equals(alone)


# ---- Stopped ------------------------------------------------------------------------------------


def in_process(*ranks: int, action, event: str = "before step 5"):
    """A patch: it happens there to some processes."""

    def prepare(rank: int, settings: dict) -> None:
        if rank in ranks:
            on(event, action)

    return prepare


@pytest.mark.parametrize("event, number, ranks, expected, said, steps, count", [
    ("before step 5", signal.SIGTERM, (1,), [130, 143], "stopped; a training", (5, 6), 1),
    ("before step 5", signal.SIGTERM, (1,), [130, 143], "stopped; a training", (5, 6), 3),
    ("before step 5", signal.SIGTERM, (0, 1), [143, 143], "\nstopping after this", (5, 6), 2),
    ("before step 5", signal.SIGKILL, (1,), [1, -9], ".*Another process has ended", (3,), 2),
    ("before step 9", signal.SIGTERM, (1,), [0, 0], r"\Z", (0,), 2),  # too late: it is finished
])  # fmt: skip
def test_all_stop_and_any_number_continues(
    event, number, ranks, expected, said, steps, count, together, alone
):
    """Of two, a launcher may stop both, or one gets the signal, and 130 is said by the other."""
    ended = together(2, in_process(*ranks, action=send(number), event=event))
    assert codes(ended) == expected and re.match(said, ended[0].err, re.S), ended
    step = step_of(together.folder)
    assert step in steps and together.out.exists() == (step == 0)
    done = f"\nsteps: 9, 3 an epoch, {step} done\n" if step else "this run is finished"
    assert done in together.ends_as(alone, count)


# ---- Processes that don't get on ----------------------------------------------------------------


def elsewhere(change, *, output: bool = False):
    """A patch: process 1 has a changed copy of TRAIN_DIR, or OUTPUT_DIR, under the same path."""

    def prepare(rank: int, settings: dict) -> None:
        if rank == 1:
            here, own = Path.cwd(), Path("../other machine").resolve()
            shutil.copytree(here, own)
            change(own)
            settings["OUTPUT_DIR"] = str((own if output else here) / "out")
            os.chdir(here if output else own)

    return prepare


def another_step(own: Path) -> None:
    path = own / "out.unfinished/checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["progress"]["step"] -= 1
    torch.save(checkpoint, path)


@pytest.mark.parametrize("begun, prepare", [
    (False, elsewhere(lambda own: next(own.glob("data/Image/*/*.png")).unlink())),
    (False, elsewhere(lambda own: next(own.glob("data/caption/*.txt")).write_text("a star"))),
    (False, elsewhere(lambda own: None)),
    (False, lambda rank, settings: settings.update(SEED=7 + rank)),
    (True, elsewhere(lambda own: shutil.rmtree(own / "out.unfinished"), output=True)),
    (True, elsewhere(another_step, output=True)),
], ids=["a picture is missing", "another caption", "features that are not shared",
        "another setting", "no checkpoint", "another checkpoint"])  # fmt: skip
def test_who_sees_something_else_says_so(begun, prepare, together):
    if begun:
        assert codes(together(2, in_process(1, action=send(signal.SIGTERM)))) == [130, 143]
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
