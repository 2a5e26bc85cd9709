"""START_FROM: training goes on from the adapter of a finished run."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers import LFS_POINTER, Child, assert_words, on, read_table, send

SETTINGS = {
    "TRAIN_DIR": "data",
    "DEVICE": "cpu",
    "BATCH_SIZE": 6,
    "EPOCHS": 3,
    "LORA_RANK": 4,
    "LEARNING_RATE": 3e-3,
    "VALIDATION_FRACTION": 0.25,
    "CHECKPOINT_MINUTES": 1e-6,
    "NUM_WORKERS": 1,
}


class Folder:
    """A folder with data/, and with first/, a finished run on it."""

    def __init__(self, path: Path, base: str) -> None:
        self.path = path
        self.base = base

    def run(self, *flags: str, prepare=lambda: None, **changed):
        settings = SETTINGS | {"MODEL_ID": self.base} | changed
        return Child(settings, *flags, folder=self.path, prepare=prepare).wait()

    def read_adapter(self, name: str) -> bytes:
        return (self.path / name / "adapter_model.safetensors").read_bytes()

    def read_results(self, name: str) -> dict:
        return json.loads((self.path / name / "settings.json").read_text())["results"]


@pytest.fixture(scope="module")
def finished(opt_base, sample, tmp_path_factory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("start_from") / "run", opt_base)
    ignored = shutil.ignore_patterns("circle-*", "moon-*", "square-*", "0[5-9].png", "1?.png")
    shutil.copytree(sample, folder.path / "data", ignore=ignored)
    ended = folder.run(OUTPUT_DIR="first")
    assert ended.code == 0, ended
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Folder:
    """A copy of the finished run."""
    shutil.copytree(finished.path, tmp_path / "run")
    return Folder(tmp_path / "run", finished.base)


def test_a_second_training_starts_where_the_first_ended_and_learns_more(folder):
    ended = folder.run(OUTPUT_DIR="second", START_FROM="first")

    assert ended.code == 0, ended
    assert "data: START_FROM was trained on" not in ended.out
    first = folder.read_results("first")["held_out_loss"]["after"]
    second = folder.read_results("second")["held_out_loss"]
    assert second["before"] == pytest.approx(first, rel=1e-5)
    assert second["after"] < first
    before = [row["before"] for row in read_table(folder.path / "second/held_out.csv")]
    after_first = [row["after"] for row in read_table(folder.path / "first/held_out.csv")]
    assert before == after_first
    for page in ("report.html", "README.md"):
        assert "first" in (folder.path / "second" / page).read_text(encoding="utf-8")


def test_the_output_folder_may_be_the_same_and_the_earlier_run_is_kept(folder):
    """On other pictures, which is said: a forgotten flag may be the reason."""
    first = folder.read_adapter("first")
    shutil.copytree(folder.path / "data", folder.path / "more")

    ended = folder.run(OUTPUT_DIR="first", START_FROM="first", TRAIN_DIR="more")

    assert ended.code == 0, ended
    assert "data: START_FROM was trained on data; this run trains on more\n" in ended.out
    assert folder.read_adapter("first") != first
    [earlier] = folder.path.glob("first-????-??-??")
    assert folder.read_adapter(earlier.name) == first


def test_killed_and_continued_it_ends_the_same(folder):
    """Also in the moment when the earlier run is replaced by the one that started from it."""
    assert folder.run(OUTPUT_DIR="whole", START_FROM="first").code == 0

    for event in ("before step 5", "before rename 1", "after rename 1"):
        killed = folder.run(
            OUTPUT_DIR="first",
            START_FROM="first",
            prepare=lambda event=event: on(event, send(signal.SIGKILL)),
        )
        assert killed.code == -signal.SIGKILL, event
    ended = folder.run(OUTPUT_DIR="first", START_FROM="first")

    assert ended.code == 0, ended
    assert folder.read_adapter("first") == folder.read_adapter("whole")


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"LORA_RANK": 8}, "LORA_RANK = 4 (now 8)"),
        ({"LORA_ALPHA": 8}, "LORA_ALPHA = 32.0 (now 8.0)"),
        ({"LORA_TARGETS": "all-linear"}, "LORA_TARGETS = 'attention'"),
        ({"LOAD_IN_4BIT": False}, "LOAD_IN_4BIT = True (now False)"),
        ({"MODEL_ID": "another/model"}, "MODEL_ID = "),
        ({"START_FROM": "data"}, "does not hold a finished run"),
        ({"START_FROM": "nowhere"}, "there is no folder 'nowhere'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_loading(folder, changed, words):
    ended = folder.run(**({"OUTPUT_DIR": "second", "START_FROM": "first"} | changed))

    assert ended.code == 1
    assert words in ended.err
    assert ended.err.count("\n") == 1
    assert "model: " not in ended.out


def test_a_base_that_was_moved_is_told_with_what_helps(folder):
    """As where the finished run comes from another machine."""
    path = folder.path / "first/settings.json"
    there = path.read_text()
    record = json.loads(there)
    record["settings"]["MODEL_ID"] = "/home/anna/base"
    path.write_text(json.dumps(record))

    ended = folder.run(OUTPUT_DIR="second", START_FROM="first")

    assert ended.code == 1
    assert_words(ended.err, ("'/home/anna/base'", "not on this machine", "settings.json"))

    path.write_text(there)  # which has the path of MODEL_ID
    assert folder.run(OUTPUT_DIR="second", START_FROM="first").code == 0


def test_another_adapter_to_start_from_is_another_run(folder):
    killed = folder.run(
        OUTPUT_DIR="second",
        START_FROM="first",
        prepare=lambda: on("before step 5", send(signal.SIGKILL)),
    )
    assert killed.code == -signal.SIGKILL
    assert folder.run(OUTPUT_DIR="other", SEED=1).code == 0
    shutil.copy(folder.path / "other/adapter_model.safetensors", folder.path / "first")

    ended = folder.run(OUTPUT_DIR="second", START_FROM="first")

    assert ended.code == 1
    assert "the adapter in START_FROM" in ended.err


def test_the_same_command_again_says_that_it_is_finished(folder):
    assert folder.run(OUTPUT_DIR="first", START_FROM="first").code == 0
    adapter = folder.read_adapter("first")

    ended = folder.run(OUTPUT_DIR="first", START_FROM="first")

    assert ended.code == 0
    assert "this run is finished" in ended.out
    assert "To train once more from the adapter in START_FROM, use --restart." in ended.out
    assert folder.read_adapter("first") == adapter


def test_a_record_without_start_from_is_completed(folder):
    """Of an earlier version: neither an unfinished nor a finished run is another one for that."""
    path = folder.path / "first/settings.json"
    record = json.loads(path.read_text())
    del record["settings"]["START_FROM"]
    del record["start_from_hash"]
    path.write_text(json.dumps(record))

    ended = folder.run(OUTPUT_DIR="first")

    assert "this run is finished" in ended.out


@pytest.mark.parametrize(
    "content, words",
    [
        (b"x" * 50, "is damaged, or only partly downloaded"),
        (b"", "is empty"),
        (LFS_POINTER.encode(), "git lfs pull"),
    ],
    ids=["damaged", "empty", "a pointer"],
)
def test_a_damaged_adapter_is_named_before_anything_is_encoded(folder, content, words):
    (folder.path / "first/adapter_model.safetensors").write_bytes(content)
    shutil.rmtree(folder.path / "data/.features")

    ended = folder.run(OUTPUT_DIR="second", START_FROM="first")

    assert ended.code == 1
    assert_words(ended.err, ("START_FROM 'first'", words))
    assert not (folder.path / "data/.features").exists()
