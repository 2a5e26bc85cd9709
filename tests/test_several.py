"""Several processes do what one does: the same losses, the same adapter, one voice."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import LIMIT, Child, Ended, fail_with, flags_of, on, read_table, send, step_of
from safetensors.torch import load_file
from torch.distributed.elastic.utils.distributed import get_free_port

import finetune

WORDS = ["red", "circle", "green", "background", "on", "a", "yellow", "star"]  # a token each
TRAINING_PAIRS = 11
HELD_OUT_PAIRS = 3
EPOCHS = 3
EPOCH_STEPS = 3  # of 5, 5 and 1 pairs: too few for all processes in the last one
STEPS = EPOCHS * EPOCH_STEPS
SETTINGS = {
    "TRAIN_DIR": "data",
    "OUTPUT_DIR": "out",
    "DEVICE": "cpu",
    "LOAD_IN_4BIT": False,
    "LORA_DROPOUT": 0.0,
    "VALIDATION_FRACTION": 0.2,
    "BATCH_SIZE": 5,
    "EPOCHS": EPOCHS,
    "LEARNING_RATE": 3e-3,
    "NUM_WORKERS": 1,
    "SAMPLE_COUNT": 1,
}
OUT_OF_MEMORY = "CUDA out of memory."


# ---- Several processes in one folder ------------------------------------------------------------


def do_nothing(rank: int, settings: dict) -> None:
    """What a process does before the command, where a test asks for nothing."""


def read_adapter(folder: Path) -> torch.Tensor:
    """All its weights, one after the other."""
    weights = load_file(folder / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def read_losses(folder: Path) -> dict[tuple[str, str], float]:
    """Every loss that a run has measured: of steps, of epochs' ends, of pairs."""
    losses = {}
    for row in read_table(folder / "metrics.csv"):
        for name in ("train_loss", "held_out_loss"):
            if row[name]:
                losses[row["step"], name] = float(row[name])
    for row in read_table(folder / "pairs.csv"):
        losses[row["split"], row["picture"]] = float(row["loss"])
    return losses


def exit_codes(ended: list[Ended]) -> list[int]:
    """Of processes that must not show a traceback."""
    for process in ended:
        assert "Traceback" not in process.err, process
    return [process.code for process in ended]


class Group:
    """A copy of a folder, in which several processes run the command together."""

    def __init__(self, folder: Path, source: Path, base: str) -> None:
        self.folder = shutil.copytree(source, folder)
        self.data = folder / "data"
        self.out = folder / "out"
        self.unfinished = folder / "out.unfinished"
        self.base = base

    def run(self, count: int, prepare: Callable = do_nothing, **changed) -> list[Ended]:
        """As torchrun starts them. prepare(rank, settings) runs in each, and may change both."""
        settings = SETTINGS | {"MODEL_ID": self.base} | changed
        port = str(get_free_port())

        def join_the_others(rank: int) -> None:
            if count > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    "LOCAL_WORLD_SIZE": str(count),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "GLOO_SOCKET_IFNAME": "lo",
                }
            prepare(rank, settings)

        children = []
        for rank in range(count):
            join = functools.partial(join_the_others, rank)
            children.append(Child(settings, folder=self.folder, rank=rank, prepare=join))
        try:
            return [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()

    def finish(self, alone: dict[str, Path], count: int) -> str:
        """They must end as one process does, and only the first one speaks. Returns its words."""
        first, *others = self.run(count)
        assert first.code == 0, first
        assert first.err == "", first
        for other in others:
            assert other == Ended(code=0, out="", err="")
        self.assert_equals(alone)
        return first.out

    def assert_equals(self, alone: dict[str, Path]) -> None:
        """The result is that of one process, except for rounding."""
        expected = alone[self.base]
        losses = read_losses(self.out)
        measured = STEPS + 1 + EPOCHS + TRAINING_PAIRS + HELD_OUT_PAIRS  # 1: before training
        assert len(losses) == measured
        assert losses == pytest.approx(read_losses(expected), abs=2e-4)

        adapter = read_adapter(self.out)
        expected_adapter = read_adapter(expected)
        assert (adapter - expected_adapter).norm() <= 1e-4 * expected_adapter.norm()
        assert not self.unfinished.exists()
        self.assert_every_picture_was_encoded_once()

    def assert_every_picture_was_encoded_once(self) -> None:
        """There are no other files with features, such as one that is half written."""
        expected = set()
        for picture in self.data.glob("Image/*/*.png"):
            expected.add(finetune.feature_name(str(picture), str(self.data)))
        assert {path.name for path in self.data.glob(".features/*/*")} == expected


@pytest.fixture(scope="module")
def source(sample, tmp_path_factory) -> Path:
    """A folder with data/: 14 pairs of the sample's pictures, with captions of 3 to 15 words."""
    folder = tmp_path_factory.mktemp("several")
    others = ["[!s]*-on-*", "square-green-*", "0[4-9].png", "1?.png"]
    shutil.copytree(sample, folder / "data", ignore=shutil.ignore_patterns(*others))
    rng = random.Random(0)
    for number, text in enumerate(sorted(folder.glob("data/caption/*.txt")), 1):
        text.write_text(" ".join(rng.choices(WORDS, k=3 * number)))
    pictures = sorted(folder.glob("data/Image/*/*.png"))
    pictures[-1].unlink()
    assert len(pictures) - 1 == TRAINING_PAIRS + HELD_OUT_PAIRS
    return folder


@pytest.fixture(scope="module")
def alone(source, opt_base, t5_base, tmp_path_factory) -> dict[str, Path]:
    """The OUTPUT_DIR of a run of one process, by base."""
    outputs = {}
    for base in (opt_base, t5_base):
        group = Group(tmp_path_factory.mktemp("alone") / "run", source, base)
        assert exit_codes(group.run(1)) == [0]
        outputs[base] = group.out
    return outputs


@pytest.fixture
def group(tmp_path, source, opt_base) -> Group:
    return Group(tmp_path / "run", source, opt_base)


# ---- The same result ----------------------------------------------------------------------------


def assert_one_voice(output: str) -> None:
    """Each line is said once, and no process has a progress bar."""
    for start in (
        "layout",
        "model:",
        "device:",
        "memory:",
        "pictures:",
        "pairs:",
        "row:",
        "LoRA:",
        f"steps: {STEPS},",
        "epoch 1/3",
        "epoch 3/3",
        "exact:",
        "training_pairs:",
        "adapter:",
    ):
        lines = [line for line in output.splitlines() if line.startswith(start)]
        assert len(lines) == 1, start
    assert "\r" not in output


def test_two_processes_of_torchrun_do_what_one_does(group, alone):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(Path(finetune.__file__).resolve())
    flags = flags_of(SETTINGS | {"MODEL_ID": group.base})
    ended = subprocess.run(
        [*launcher, "--nproc_per_node", "2", script, *flags],
        cwd=group.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT,
    )

    assert ended.returncode == 0, ended
    assert "\r" not in ended.stderr
    assert_one_voice(ended.stdout)
    assert json.loads((group.out / "settings.json").read_text())["processes"] == 2
    group.assert_equals(alone)


def test_three_processes_do_what_one_does_with_t5(alone, source, t5_base, tmp_path):
    """They are forked, as in all tests below."""
    group = Group(tmp_path / "run", source, t5_base)

    assert_one_voice(group.finish(alone, 3))


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_two_processes_with_a_qformer_that_learns_do_what_one_does(kind, source, request, tmp_path):
    """In both phases: in the first third of the steps the Q-Former learns alone."""
    base = request.getfixturevalue(f"{kind}_base")
    one = Group(tmp_path / "one", source, base)
    two = Group(tmp_path / "two", source, base)

    assert exit_codes(one.run(1, LORA_TARGETS="qformer+attention")) == [0]
    assert exit_codes(two.run(2, LORA_TARGETS="qformer+attention")) == [0, 0]

    two.assert_equals({base: one.out})


def test_with_nothing_held_out_no_two_dropouts_are_alike(group):
    """Each process prints the seed of each of its steps, to stderr."""

    def print_seeds(rank: int, settings: dict) -> None:
        stderr = sys.stderr
        real = finetune.Captioner.losses

        def losses(captioner, batch):
            if torch.is_grad_enabled():
                print(torch.initial_seed(), file=stderr)
            return real(captioner, batch)

        finetune.Captioner.losses = losses

    ended = group.run(2, print_seeds, VALIDATION_FRACTION=0, EPOCHS=1)

    assert exit_codes(ended) == [0, 0]
    seeds = ended[0].err.split() + ended[1].err.split()
    assert len(seeds) == 2 * EPOCH_STEPS
    assert len(set(seeds)) == len(seeds)


def test_out_of_memory_in_one_process_halves_there_and_the_other_goes_on(group, alone):
    """Process 1 is short in its second step. Each prints how many pairs it is given, to stderr."""

    def print_sizes_and_fail_once(rank: int, settings: dict) -> None:
        stderr = sys.stderr
        sizes = []
        real = finetune.Captioner.losses

        def losses(captioner, batch):
            if torch.is_grad_enabled():
                sizes.append(len(batch.features))
                print(sizes[-1], file=stderr)
                if rank == 1 and len(sizes) == 2:
                    raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            return real(captioner, batch)

        finetune.Captioner.losses = losses

    ended = group.run(2, print_sizes_and_fail_once)

    assert exit_codes(ended) == [0, 0]
    first = [int(size) for size in ended[0].err.split()]
    second = [int(size) for size in ended[1].err.split()]
    assert first == [3, 3, 1] * 3, "each step in one part"
    assert second[:4] == [2, 2, 1, 1], "of five pairs; then those of the second step again"
    assert max(second[2:]) == 1
    group.assert_equals(alone)


# ---- Stopped ------------------------------------------------------------------------------------


def in_processes(ranks: set[int], action: Callable, event: str = "before step 5") -> Callable:
    """For prepare: the action comes at the event, in these processes."""

    def prepare(rank: int, settings: dict) -> None:
        if rank in ranks:
            on(event, action)

    return prepare


@pytest.mark.parametrize("count", [1, 3])
def test_after_a_signal_to_one_all_stop_and_any_number_continues(count, group, alone):
    """The one says 143, for SIGTERM, the other 130."""
    ended = group.run(2, in_processes({1}, send(signal.SIGTERM)))

    assert exit_codes(ended) == [130, 143]
    assert ended[0].err.startswith("stopped; to continue")
    step = step_of(group.folder)
    assert step in (5, 6)
    assert not group.out.exists()
    assert f"\nsteps: 9, 3 per epoch, {step} done\n" in group.finish(alone, count)


def test_after_a_signal_to_all_all_stop_and_continue(group, alone):
    """As a launcher sends it."""
    ended = group.run(2, in_processes({0, 1}, send(signal.SIGTERM)))

    assert exit_codes(ended) == [143, 143]
    assert ended[0].err.startswith("\nstopping after this")
    step = step_of(group.folder)
    assert step in (5, 6)
    assert not group.out.exists()
    assert f"\nsteps: 9, 3 per epoch, {step} done\n" in group.finish(alone, 2)


def test_after_a_process_was_killed_the_others_end_and_all_continue(group, alone):
    ended = group.run(2, in_processes({1}, send(signal.SIGKILL)))

    assert exit_codes(ended) == [1, -signal.SIGKILL]
    assert "Another process has ended" in ended[0].err
    assert step_of(group.folder) == 3  # that of the last epoch's end
    assert not group.out.exists()
    assert "\nsteps: 9, 3 per epoch, 3 done\n" in group.finish(alone, 2)


def test_a_signal_in_the_last_step_stops_all_and_the_run_can_be_finished(group, alone):
    ended = group.run(2, in_processes({1}, send(signal.SIGTERM), event="before step 9"))

    assert exit_codes(ended) == [128 + signal.SIGINT, 128 + signal.SIGTERM]
    assert ended[0].err.startswith("stopped; to continue")
    assert not group.out.exists()
    assert f"{STEPS} done" in group.finish(alone, 2)


# ---- Processes that do not agree ----------------------------------------------------------------


def on_another_machine(change: Callable[[Path], None], own_output: bool = False) -> Callable:
    """For prepare: process 1 has a changed copy of TRAIN_DIR, or OUTPUT_DIR, under the same path.

    What is not its own, it shares with process 0.
    """

    def prepare(rank: int, settings: dict) -> None:
        if rank == 0:
            return
        shared = Path.cwd()
        own = shared.with_name("other machine")
        shutil.copytree(shared, own)
        change(own)
        if own_output:
            settings["OUTPUT_DIR"] = str(own / "out")
        else:
            settings["OUTPUT_DIR"] = str(shared / "out")
            os.chdir(own)

    return prepare


def delete_a_picture(folder: Path) -> None:
    next(folder.glob("data/Image/*/*.png")).unlink()


def change_a_caption(folder: Path) -> None:
    next(folder.glob("data/caption/*.txt")).write_text("a star")


def change_nothing(folder: Path) -> None:
    """Then the features that process 0 encodes are not there."""


def delete_the_data(folder: Path) -> None:
    shutil.rmtree(folder / "data")


def delete_the_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "out.unfinished")


def put_the_checkpoint_back_a_step(folder: Path) -> None:
    path = folder / "out.unfinished/checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["progress"]["step"] -= 1
    torch.save(checkpoint, path)


def change_the_seed(rank: int, settings: dict) -> None:
    settings["SEED"] = 7 + rank


def assert_all_refuse(ended: list[Ended]) -> None:
    assert exit_codes(ended) == [1, 1]
    sentence = "error: the processes do not see the same files or settings"
    assert ended[0].err.startswith(sentence)
    assert ended[1].err.startswith(f"process 1: {sentence}")


@pytest.mark.parametrize("change", [delete_a_picture, change_a_caption, change_nothing])
def test_processes_with_other_data_or_features_refuse(change, group):
    assert_all_refuse(group.run(2, on_another_machine(change)))

    assert step_of(group.folder) == 0
    assert not group.out.exists()


def test_processes_with_other_settings_refuse(group):
    assert_all_refuse(group.run(2, change_the_seed))

    assert step_of(group.folder) == 0
    assert not group.out.exists()


@pytest.mark.parametrize("change", [delete_the_checkpoint, put_the_checkpoint_back_a_step])
def test_processes_with_other_checkpoints_refuse(change, group):
    stopped = group.run(2, in_processes({1}, send(signal.SIGTERM)))
    assert exit_codes(stopped) == [130, 143]
    step = step_of(group.folder)

    assert_all_refuse(group.run(2, on_another_machine(change, own_output=True)))

    assert step_of(group.folder) == step
    assert not group.out.exists()


def fail_with_a_bug() -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    "prepare, said",
    [
        (on_another_machine(delete_the_data), "'data'"),
        (  # where nothing can be halved
            in_processes(
                {1}, fail_with(torch.OutOfMemoryError(OUT_OF_MEMORY)), event="before caption 1"
            ),
            f"process 1: error: {OUT_OF_MEMORY} ",
        ),
    ],
    ids=["no data", "out of memory"],
)
def test_an_error_of_one_process_is_seen_and_ends_all(prepare, said, group):
    first, second = group.run(2, prepare)

    assert first.code != 0
    assert "Another process has ended" in first.err, first
    assert second.code != 0
    assert said in second.err, second
    assert "Traceback" not in second.err


def test_a_bug_in_one_process_is_shown_and_ends_all(group):
    first, second = group.run(2, in_processes({1}, fail_with_a_bug))

    assert first.code != 0
    assert "Another process has ended" in first.err, first
    assert second.code != 0
    assert "Traceback" in second.err
    assert "ZeroDivisionError: " in second.err
