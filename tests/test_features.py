"""What the frozen vision side says of a picture is computed once, and never served stale."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration, BlipImageProcessorPil

import finetune


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the pictures that are opened."""
    names, real = [], finetune.read_picture

    def watched(path, side):
        names.append(os.path.basename(path))
        return real(path, side)

    monkeypatch.setattr(finetune, "read_picture", watched)
    return names


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_a_second_run_opens_only_what_is_new(any_base, small_data, command, tmp_path, opened):
    def run(name: str) -> tuple[int, bytes]:
        opened.clear()
        code, _, error = command(
            TRAIN_DIR=small_data, OUTPUT_DIR=tmp_path / name, EPOCHS=2, MODEL_ID=any_base,
            SAMPLE_COUNT=0)  # the report opens the pictures that it shows
        assert code == 0, error
        return len(opened), (tmp_path / name / "adapter_model.safetensors").read_bytes()

    old = small_data / ".features" / "0123456789abcdef"  # of an earlier version: left alone
    old.mkdir(parents=True)
    (old / "000000-ab.bin").write_bytes(b"features")
    pictures = sorted(small_data.glob("Image/*/*.png"))
    count, first = run("first")
    assert count == len(pictures)
    count, second = run("second")
    assert count == 0 and first == second

    for number in range(10):
        shutil.copy(pictures[0], pictures[0].with_name(f"new{number}.png"))
    count, _ = run("ten more")
    assert count == 10 and all(name.startswith("new") for name in opened)

    os.utime(pictures[1], ns=(0, pictures[1].stat().st_mtime_ns + 1))  # touched
    shutil.copy(pictures[-1], pictures[2])  # other bytes, another size
    count, changed = run("changed")
    assert count == 2
    assert (old / "000000-ab.bin").read_bytes() == b"features"

    shutil.rmtree(small_data / ".features")
    count, fresh = run("fresh")
    assert count == len(pictures) + 10 and changed == fresh


def test_other_models_processors_and_dtypes_have_features_of_their_own(
    opt_base, small_data, command, tmp_path, opened
):
    def run(folder, **settings) -> int:
        opened.clear()
        code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=folder, EPOCHS=1, SAMPLE_COUNT=0,
                                 **settings)  # fmt: skip
        assert code == 0, error
        return len(opened)

    def changed(name: str, change) -> Path:
        shutil.copytree(opt_base, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    def one_weight(weights):
        weights["vision_model.encoder.layers.1.mlp.fc1.bias"][5] += 1

    def language(weights):  # which changes nothing of a picture's features
        weights["language_model.model.decoder.layers.0.fc1.bias"] += 0.1

    assert run(opt_base) == 12 and run(opt_base) == 0
    assert run(opt_base, DTYPE="bfloat16") == 12
    assert run(changed("vision", one_weight)) == 12
    assert run(changed("language", language)) == 0
    other = changed("processor", lambda weights: None)
    config = json.loads((other / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (other / "processor_config.json").write_text(json.dumps(config))
    assert run(other) == 12 and run(opt_base) == 0


def test_features_are_those_of_the_live_model(any_base, small_data, build):
    """Also of the pictures of a last, smaller batch."""
    picture = next(small_data.glob("Image/*/*.png"))
    for number in range(9):
        shutil.copy(picture, picture.with_name(f"copy{number}.png"))
    built = build(any_base, small_data)
    plain = Blip2ForConditionalGeneration.from_pretrained(any_base, dtype=torch.float32).eval()
    processor = BlipImageProcessorPil.from_pretrained(any_base)
    for pair in built.pairs:
        pixels = processor(Image.open(pair.picture).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            seen = plain.vision_model(pixels["pixel_values"]).last_hidden_state
            live = plain.qformer(query_embeds=plain.query_tokens, encoder_hidden_states=seen)
        assert torch.allclose(built.dataset.features(pair.picture), live[0], atol=1e-5)


def test_reduced_decoding_changes_less_than_bfloat16(opt_base, small_data, build, tmp_path):
    """A 12-megapixel JPEG, decoded at reduced scale and in full, against rounding to bfloat16."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    noise.resize((4000, 3000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=90)
    captioner = build(opt_base, small_data).captioner
    processor = captioner.processor.image_processor
    side = processor.size["height"]
    reduced = finetune.read_picture(str(tmp_path / "large.jpg"), side)
    full = finetune.read_picture(str(tmp_path / "large.jpg"), 10_000)
    assert full.size == (4000, 3000) and 2 * side <= min(reduced.size) < 1000

    def features(picture, dtype):
        captioner.dtype, _ = dtype, captioner.model.to(dtype)
        return captioner.encode([processor(picture).pixel_values[0]]).float()

    exact = features(full, torch.float32)
    decoding = distance(features(reduced, torch.float32), exact)
    rounding = distance(features(full, torch.bfloat16), exact)
    print(f"decoding at reduced scale {decoding:.2%}, bfloat16 {rounding:.2%}")
    assert 0 < decoding < rounding
