"""Frozen features are computed once, and a step is the same however it is split."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune

REPOSITORY = Path(finetune.__file__).parent


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the pictures that are opened."""
    names, real = [], finetune.read_picture

    def watched(path, side):
        names.append(os.path.basename(path))
        return real(path, side)

    monkeypatch.setattr(finetune, "read_picture", watched)
    return names


def adapter(folder) -> torch.Tensor:
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# ---- The store ----------------------------------------------------------------------------------


def test_a_second_run_opens_only_what_is_new(any_base, small_data, command, tmp_path, opened):
    def run(name, **settings):
        opened.clear()
        code, output, error = command(
            TRAIN_DIR=small_data, OUTPUT_DIR=tmp_path / name, EPOCHS=2,
            SAMPLE_COUNT=0,  # the report opens the pictures that it shows
            **{"MODEL_ID": any_base} | settings)  # fmt: skip
        assert code == 0, error
        return len(opened), adapter(tmp_path / name)

    (small_data / "Image" / "stray.png").write_bytes(b"")
    (small_data / "caption" / "stray.txt").write_text("nothing to see")
    pictures = sorted(small_data.glob("Image/*/*.png"))
    count, first = run("first")
    assert count == len(pictures) + 1
    count, second = run("second")
    assert count == 0  # not even the broken one
    assert torch.equal(first, second)

    for number in range(10):
        shutil.copy(pictures[0], pictures[0].with_name(f"new{number}.png"))
    count, _ = run("ten more")
    assert count == 10 and all(name.startswith("new") for name in opened)

    os.utime(pictures[1], ns=(0, pictures[1].stat().st_mtime_ns + 1))  # touched
    shutil.copy(pictures[-1], pictures[2])  # other bytes, another size
    os.utime(pictures[3], ns=(0, 12345))
    shutil.move(pictures[4], small_data / "moved.png")
    shutil.copy(small_data / "moved.png", pictures[4])
    (small_data / "Image" / "stray.png").write_bytes(b"no picture either")
    count, changed = run("changed")
    assert count == 5

    shutil.rmtree(small_data / ".features")
    count, fresh = run("fresh")
    assert count == len(pictures) + 11 and torch.equal(changed, fresh)


def test_other_models_processors_and_dtypes_have_features_of_their_own(
    opt_base, small_data, command, tmp_path, opened
):
    def run(folder, **settings):
        opened.clear()
        code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=folder, EPOCHS=1, SAMPLE_COUNT=0,
                                 **settings)  # fmt: skip
        assert code == 0, error
        return len(opened)

    assert run(opt_base) == 12 and run(opt_base) == 0
    assert run(opt_base, DTYPE="bfloat16") == 12
    other = tmp_path / "other weights"
    shutil.copytree(opt_base, other)
    weights = load_file(other / "model.safetensors")
    weights["vision_model.encoder.layers.1.mlp.fc1.bias"][5] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert run(other) == 12
    other = tmp_path / "other processor"
    shutil.copytree(opt_base, other)
    config = json.loads((other / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (other / "processor_config.json").write_text(json.dumps(config))
    assert run(other) == 12
    other = tmp_path / "another language model"  # which changes nothing of a picture's features
    shutil.copytree(opt_base, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.fc1.bias"))
    weights[name] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert run(other) == 0 and run(opt_base) == 0


def test_a_killed_pass_continues(opt_base, sample, tmp_path):
    """SIGKILL in the middle of the pass; the next one takes up what was encoded, and no more."""
    data = tmp_path / "train"
    shutil.copytree(sample, data)
    script = (
        "import sys, time, finetune\n"
        "real = finetune.encode\n"
        "def slow(*arguments):\n"
        "    time.sleep(0.2)\n"
        "    return real(*arguments)\n"
        "finetune.encode = slow\n"
        "finetune.main(sys.argv[1:])\n"
    )
    flags = ["--train-dir", str(data), "--model-id", opt_base, "--output-dir", str(tmp_path / "o")]
    process = subprocess.Popen([sys.executable, "-c", script, *flags], cwd=REPOSITORY,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    lines = 0
    while lines < 40 and process.poll() is None and time.monotonic() < deadline:
        lines = sum(p.read_bytes().count(b"\n") for p in data.glob(".features/*/*.jsonl"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    (index,) = data.glob(".features/*/*.jsonl")
    with open(index, "a") as file:
        file.write('["torn", 12')  # what a kill in the middle of a write leaves
    kept = index.read_text().count("\n")
    assert 40 <= kept < 208
    base = finetune.load_base(opt_base, "", "cpu", "auto", True)
    pairs, _, _ = finetune.find_pairs(str(data))
    store = finetune.open_features(base, str(data), "")
    new = [pair.picture for pair in pairs if not store.knows(pair.picture)]
    assert len(new) == 208 - kept
    finetune.encode_pictures(base, store, [pair.picture for pair in pairs], 2)
    again = finetune.open_features(base, str(data), "")
    for pair in pairs:
        _, pixels = finetune.decode_batch([pair.picture], base.processor)
        assert torch.allclose(again[pair.picture], finetune.encode(base, pixels)[0], atol=1e-5)


def test_features_go_beside_the_output_where_the_data_can_not_be_written(
    opt_base, small_data, command, monkeypatch, tmp_path
):
    real = os.access
    read_only = lambda path, mode: mode != os.W_OK and real(path, mode)  # noqa: E731
    monkeypatch.setattr(finetune.os, "access", read_only)
    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=1)
    assert code == 0, error
    assert not (small_data / ".features").exists()
    assert list(tmp_path.glob("out.features/*/*.bin"))


def test_reduced_decoding_changes_features_less_than_bfloat16(opt_base, tmp_path, report):
    """A 12-megapixel JPEG, decoded at reduced scale and in full, against rounding to bfloat16."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    noise.resize((4000, 3000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=90)
    base = finetune.load_base(opt_base, "", "cpu", "auto", False)
    side = base.processor.image_processor.size["height"]
    reduced = finetune.read_picture(str(tmp_path / "large.jpg"), side)
    full = finetune.read_picture(str(tmp_path / "large.jpg"), 10_000)
    assert full.size == (4000, 3000)
    assert 2 * side <= min(reduced.size) < 1000

    def features(picture, dtype):
        pixels = base.processor.image_processor(picture, return_tensors="pt").pixel_values
        return finetune.encode(base._replace(dtype=dtype, model=base.model.to(dtype)), pixels)

    exact = features(full, torch.float32)
    decoding = distance(features(reduced, torch.float32), exact)
    rounding = distance(features(full, torch.bfloat16).float(), exact)
    print(f"decoding at reduced scale {decoding:.2%}, bfloat16 {rounding:.2%}")
    assert 0 < decoding < rounding


# ---- The step -----------------------------------------------------------------------------------


@pytest.fixture
def trained(any_base, sample, command, tmp_path):
    """The adapter after EPOCHS on the sample's first captions, dropout off, float32."""
    data = tmp_path / "train"
    (data / "Image").mkdir(parents=True)
    (data / "caption").mkdir()
    words = "enamel pin: scarlet disc over violet".split()
    for number, text in enumerate(sorted((sample / "caption").iterdir())[:5]):
        caption = " ".join(words * (number + 1))  # of unequal length
        (data / "caption" / text.name).write_text(caption)
        shutil.copytree(sample / "Image" / text.stem, data / "Image" / text.stem)

    def run(name: str, **settings) -> torch.Tensor:
        code, output, error = command(
            "--no-load-in-4bit", TRAIN_DIR=data, MODEL_ID=any_base, OUTPUT_DIR=tmp_path / name,
            LORA_DROPOUT=0, VALIDATION_FRACTION=0, EPOCHS=4, **settings)  # fmt: skip
        assert code == 0, error
        steps = math.ceil(65 / settings.get("BATCH_SIZE", 16)) * 4
        assert f"steps:                 {steps}" in output
        run.output = output
        return adapter(tmp_path / name)

    return run


def test_any_micro_batch_gives_the_same_adapter(trained, monkeypatch):
    """20 steps; the last one of each epoch has one pair. Halved to 4 and to 1, and cut into 5s."""
    sizes, real = [], finetune.pair_losses

    def limited(model, rows, base):
        if len(rows) > most and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        sizes.extend([len(rows)] * torch.is_grad_enabled())
        return real(model, rows, base)

    def fives(model, rows, base):
        return torch.cat([real(model, rows[i : i + 5], base) for i in range(0, len(rows), 5)])

    whole = trained("whole")
    for most, halved, times in ((5, 4, 2), (1, 1, 4)):
        monkeypatch.setattr(finetune, "pair_losses", limited)
        sizes.clear()
        assert distance(trained(f"at most {most}"), whole) < 1e-5
        assert max(sizes) == halved
        assert trained.output.count("out of memory") == times
    monkeypatch.setattr(finetune, "pair_losses", fives)
    assert distance(trained("fives"), whole) < 1e-5


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("call", [1, 2, 9])
def test_out_of_memory_costs_nothing(trained, monkeypatch, where, call):
    whole, calls, real = trained("whole", BATCH_SIZE=10), [], finetune.pair_losses

    def losses(model, rows, base):
        result = real(model, rows, base)
        if not torch.is_grad_enabled():
            return result
        calls.append(len(rows))
        if len(calls) == call and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return FailingBackward.apply(result) if len(calls) == call else result

    monkeypatch.setattr(finetune, "pair_losses", losses)
    split = trained("split", BATCH_SIZE=10)
    assert calls[call - 1] > max(calls[call:])
    assert distance(split, whole) < 1e-6
    assert trained.output.count("out of memory") == 1


def test_one_pair_that_does_not_fit_is_an_error_that_says_what_to_change(
    opt_base, small_data, command, monkeypatch
):
    real = finetune.pair_losses

    def losses(model, rows, base):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return real(model, rows, base)

    monkeypatch.setattr(finetune, "pair_losses", losses)
    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base)
    assert code == 1 and "Lower MAX_CAPTION_TOKENS" in error


def test_order_and_rate_are_pure_functions():
    orders = [finetune.epoch_order(50, 42, epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert finetune.epoch_order(50, 43, 0) != orders[0]
    for fraction in (0.0, 0.05, 1.0):
        rates = [finetune.learning_rate(step, 100, 1e-3, fraction) for step in range(100)]
        assert min(rates) > 0 and max(rates) <= 1e-3
    assert finetune.learning_rate(0, 1, 1e-3, 0.0) == 1e-3


def test_a_new_picture_does_not_reshuffle_what_is_held_out():
    pairs = [finetune.Pair(f"data/Image/{n % 10}/{n:03}.png", str(n % 10)) for n in range(200)]
    train, held_out = finetune.split_pairs(pairs, 0.1, 42, "data")
    assert len(held_out) == 20 and sorted(train + held_out) == sorted(pairs)
    assert {pair.caption for pair in train} == {str(n) for n in range(10)}
    more = [*pairs, finetune.Pair("data/Image/3/new.png", "3")]
    _, after = finetune.split_pairs(more, 0.1, 42, "data")
    assert len(set(after) - set(held_out)) <= 1
    _, elsewhere = finetune.split_pairs(
        [pair._replace(picture="/else/" + pair.picture) for pair in pairs], 0.1, 42, "/else/data")
    assert [p.picture for p in elsewhere] == ["/else/" + p.picture for p in held_out]
    single = [finetune.Pair(f"data/Image/{n}.png", str(n)) for n in range(10)]
    assert [len(part) for part in finetune.split_pairs(single, 0.2, 1, "data")] == [8, 2]
    assert finetune.split_pairs(pairs, 0, 42, "data") == (pairs, [])


# ---- Scale --------------------------------------------------------------------------------------


def test_a_hundred_thousand_pictures_are_found_in_little_memory(sample, tmp_path):
    (tmp_path / "caption").mkdir()
    picture = next(sample.glob("Image/*/*.png"))
    for folder in range(1000):
        (tmp_path / "caption" / f"{folder:04}.txt").write_text(f"caption number {folder}")
        place = tmp_path / "Image" / f"{folder:04}"
        place.mkdir(parents=True)
        for number in range(100):
            os.symlink(picture, place / f"{number:03}.png")
    tracemalloc.start()
    pairs, skipped, _ = finetune.find_pairs(str(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == 100_000 and not skipped
    assert peak < 1000 * len(pairs)
