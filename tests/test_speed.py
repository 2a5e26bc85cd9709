"""What makes finetune.py fast changes no loss: next to the plain loop of benchmark.py."""

import pytest
from benchmark import Kind, load_loop

import finetune

STEPS = 20


def train_on_sample(letter: str, base: str, sample) -> list[float]:
    """The losses of 16 pairs a step, in float32 and without dropout, by the loop of this letter."""
    loop = load_loop(Kind(letter, False, "float32"), base, sample, "cpu", dropout=0.0)
    loop.rate = 3e-3
    losses = []
    for number in range(STEPS):
        indices = finetune.epoch_order(len(loop.learned), seed=number, epoch=0)[:16]
        losses.append(loop.step(indices))
    return losses


def test_losses_are_those_of_a_plain_loop(opt_base, sample):
    plain = train_on_sample("b", opt_base, sample)
    ours = train_on_sample("c", opt_base, sample)

    assert ours == pytest.approx(plain, rel=0, abs=1e-5)
    assert ours[-1] < ours[0] / 2  # and something has been learned
