"""What only a CUDA GPU can show; skipped without one."""

import re
import shutil
import warnings

import pytest
import torch

import finetune

pytestmark = pytest.mark.gpu


@pytest.fixture
def train(command, sample, opt_base, tmp_path):
    """A run over the sample on the GPU; its stdout."""
    shutil.copytree(sample, tmp_path / "train")

    def run(name: str, **settings) -> str:
        code, output, error = command(
            **{
                "TRAIN_DIR": tmp_path / "train",
                "OUTPUT_DIR": tmp_path / name,
                "DEVICE": "cuda",
                "MODEL_ID": opt_base,
                "LEARNING_RATE": 3e-3,
                "EPOCHS": 10,
            }
            | settings
        )
        assert code == 0, error
        return output

    return run


@pytest.mark.parametrize("settings", [{}, {"LOAD_IN_4BIT": False}, {"DTYPE": "float16"}])
def test_a_run_on_the_gpu_learns(train, settings):
    output = train("out", **settings)
    right, count = re.search(r"exact: +\d+ before, (\d+) after, of (\d+)", output).groups()
    assert int(right) >= 0.9 * int(count)


def test_a_step_that_does_not_fit_is_halved(train):
    """The second run gets 60 % of the activations' memory that the first one used at its peak.

    What is there before the first step, cuBLAS's workspaces among it, is not capped.
    """
    settings = {"BATCH_SIZE": 187, "EPOCHS": 1, "DTYPE": "float32", "VALIDATION_FRACTION": 0}
    train("first", **settings, MAX_CAPTION_TOKENS=2)  # makes the handles
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    assert "out of memory" not in train("whole", **settings)
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((before + 0.6 * (peak - before)) / total)
    try:
        assert "out of memory: 94 pairs" in train("split", **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_waits_for_the_gpu_once(train, monkeypatch):
    """No hidden synchronization: PyTorch's own check counts them, between two steps."""
    real, steps = finetune.Learner.backward, []

    def watched(*arguments):
        steps.append(len(caught))
        return real(*arguments)

    monkeypatch.setattr(finetune.Learner, "backward", watched)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train("out", VALIDATION_FRACTION=0, EPOCHS=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    within = [b - a for a, b in zip(steps[3:], steps[4:], strict=False)]
    assert within and max(within) <= 1
