"""What only a CUDA GPU can show; skipped without one."""

import re
import shutil
import warnings
from collections.abc import Callable

import gpu_parts
import pytest
import torch
from helpers import rows_of
from make_real_size import MEDIUM, write_model

import finetune

pytestmark = pytest.mark.gpu


@pytest.fixture
def train(command, sample, opt_base, tmp_path):
    """train(name, EPOCHS=1, ...): a run over the sample on the GPU. Returns what it says."""
    shutil.copytree(sample, tmp_path / "train")

    def run(name: str, **changed) -> str:
        settings = {
            "TRAIN_DIR": tmp_path / "train",
            "OUTPUT_DIR": tmp_path / name,
            "MODEL_ID": opt_base,
            "DEVICE": "cuda",
            "LEARNING_RATE": 3e-3,
            "EPOCHS": 10,
        }
        code, output, error = command(**(settings | changed))
        assert code == 0, error
        return output

    return run


@pytest.mark.parametrize("settings", [{}, {"LOAD_IN_4BIT": False}, {"DTYPE": "float16"}])
def test_a_run_on_the_gpu_learns(train, settings):
    output = train("out", **settings)

    found = re.search(r"^exact: +\d+ before, (\d+) after, of (\d+)$", output, re.M)
    right = int(found[1])
    captioned = int(found[2])
    assert right >= 0.9 * captioned


@pytest.mark.parametrize("in_4bit", [False, True], ids=["float32", "NF4"])
def test_a_step_on_the_gpu_is_that_of_the_cpu(any_base, small_data, build, in_4bit):
    """The only test that sees a kernel that calculates wrongly: a T5 has no trained weights."""
    losses = {}
    gradients = {}
    examples = None
    master = None
    for device in ("cpu", "cuda"):
        built = build(any_base, small_data, DEVICE=device, DTYPE="float32", LOAD_IN_4BIT=in_4bit)
        if device == "cpu":  # both start from its features and weights
            examples = rows_of(built)
            master = built.learner.master.clone()
        built.learner.set_master(master.to(device))
        tokens = built.dataset.count_tokens(range(len(built.dataset)))
        losses[device] = built.learner.backward(examples, tokens).cpu()
        gradients[device] = built.learner.gradient.cpu()

    torch.testing.assert_close(losses["cuda"], losses["cpu"], rtol=1e-3, atol=0)
    difference = (gradients["cuda"] - gradients["cpu"]).norm()
    assert difference <= 1e-3 * gradients["cpu"].norm()


def test_each_part_of_a_run_takes_the_memory_that_was_computed(tmp_path):
    """Within a tenth. The figures are those of gpu_dry_run.py --parts medium."""
    write_model(str(tmp_path / "medium"), MEDIUM)
    flags = ("--device", "cuda", "--dtype", "bfloat16")

    parts = gpu_parts.measure_parts(str(tmp_path / "medium"), *flags)

    measured = {name: part.memory for name, part in parts.items()}
    assert measured == pytest.approx(gpu_parts.DRY_RUN["medium"], rel=0.1)


@pytest.fixture
def cap_memory():
    """cap_memory(size): so many bytes of the GPU can be used, until the end of the test."""

    def cap(size: float) -> None:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(size / total)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_that_does_not_fit_is_halved(train, cap_memory):
    """The run gets 60 % of the memory for activations that another one used at its peak.

    What is there before the first step, cuBLAS's workspaces among it, is not capped.
    """
    settings = {"BATCH_SIZE": 187, "EPOCHS": 1, "DTYPE": "float32", "VALIDATION_FRACTION": 0}
    train("first", **settings, MAX_CAPTION_TOKENS=2)  # makes cuBLAS's handles
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    whole = train("whole", **settings)
    peak = torch.cuda.max_memory_reserved()

    cap_memory(before + 0.6 * (peak - before))
    split = train("split", **settings)

    assert "out of memory" not in whole
    assert ": 94 from now on" in split


@pytest.fixture
def all_warnings(monkeypatch):
    """The list of all warnings, also those of libraries, which the script does not show."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "filterwarnings", lambda *arguments, **named: None)
        yield caught


@pytest.fixture
def warn_of_waits():
    """PyTorch warns wherever the CPU waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    yield
    torch.cuda.set_sync_debug_mode("default")


def count_between_steps(monkeypatch, caught: list) -> Callable[[], list[int]]:
    """A function that returns how many warnings there were from each step to the next one."""
    counts = []  # of the warnings before each step
    real = finetune.Learner.backward

    def backward(*arguments):
        counts.append(len(caught))
        return real(*arguments)

    monkeypatch.setattr(finetune.Learner, "backward", backward)

    def differences() -> list[int]:
        return [later - earlier for earlier, later in zip(counts, counts[1:], strict=False)]

    return differences


def test_a_step_waits_for_the_gpu_once(train, monkeypatch, all_warnings, warn_of_waits):
    read_waits = count_between_steps(monkeypatch, all_warnings)

    train("out", VALIDATION_FRACTION=0, EPOCHS=1)

    waits = read_waits()[3:]  # the first steps make what later ones find
    assert len(waits) > 0
    assert max(waits) <= 1
