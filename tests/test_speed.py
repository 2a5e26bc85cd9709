"""What makes finetune.py fast changes no loss: beside the plain loop of benchmark.py."""

import shutil

import pytest
from benchmark import STEPS, Kind, load_loop

import finetune


def test_losses_are_those_of_a_plain_loop(opt_base, sample, tmp_path):
    """20 steps from the same start, in float32 and without dropout, on the sample."""
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    losses = {}
    for letter in "bc":
        loop = load_loop(Kind(letter, False, "float32"), opt_base, data, "cpu", dropout=0.0)
        loop.optimizer.param_groups[0]["lr"] = 3e-3
        batches = [finetune.epoch_order(len(loop.dataset), seed, 0)[:16] for seed in range(20)]
        losses[letter] = [STEPS[letter](loop, batch) for batch in batches]
    assert losses["c"] == pytest.approx(losses["b"], rel=0, abs=1e-5)
    assert losses["c"][-1] < losses["c"][0] / 2  # and it has learned meanwhile
