"""What makes finetune.py fast changes no loss: beside the plain loop of benchmark.py."""

import pytest
from benchmark import Kind, load_loop

import finetune


def test_losses_are_those_of_a_plain_loop(opt_base, sample):
    """20 steps from the same start, in float32 and without dropout, on the sample."""
    losses = {}
    for letter in "bc":
        loop = load_loop(Kind(letter, False, "float32"), opt_base, sample, "cpu", dropout=0.0)
        loop.rate = 3e-3
        batches = [finetune.epoch_order(len(loop.learned), seed, 0)[:16] for seed in range(20)]
        losses[letter] = [loop.step(batch) for batch in batches]
    assert losses["c"] == pytest.approx(losses["b"], rel=0, abs=1e-5)
    assert losses["c"][-1] < losses["c"][0] / 2  # and it has learned meanwhile
