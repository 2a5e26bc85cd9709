"""What the frozen vision side says of a picture is computed once, and never out of date."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune

PICTURES = 12  # in small_data


@pytest.fixture
def run(command, small_data, tmp_path, monkeypatch):
    """run(**settings) -> `opened`, the names of the pictures that a run opens, and its `adapter`.

    Each run has an OUTPUT_DIR of its own. The page would open pictures, too.
    """
    opened = []
    outputs = []
    real = finetune.read_picture

    def read_picture(path: str, side: int):
        opened.append(os.path.basename(path))
        return real(path, side)

    monkeypatch.setattr(finetune, "read_picture", read_picture)
    monkeypatch.setattr(finetune, "embed_picture", lambda path: "")

    def call(**settings) -> SimpleNamespace:
        opened.clear()
        output = tmp_path / f"out{len(outputs)}"
        outputs.append(output)
        short = {"EPOCHS": 2, "MAX_CAPTION_TOKENS": 4, "SAMPLE_COUNT": 0}
        code, _, error = command(TRAIN_DIR=small_data, OUTPUT_DIR=output, **short, **settings)
        assert code == 0, error
        adapter = (output / "adapter_model.safetensors").read_bytes()
        return SimpleNamespace(opened=sorted(opened), adapter=adapter)

    return call


def list_pictures(data: Path) -> list[Path]:
    return sorted(data.glob("Image/*/*.png"))


def read_features(data: Path) -> dict[str, torch.Tensor]:
    """Of each file with features, by its name, in .features."""
    features = {}
    for path in data.glob(".features/*/*.safetensors"):
        features[path.name] = load_file(path)["features"]
    return features


def test_a_second_run_opens_no_picture_and_has_the_same_adapter(any_base, small_data, run):
    pictures = list_pictures(small_data)

    first = run(MODEL_ID=any_base)
    second = run(MODEL_ID=any_base)

    assert first.opened == sorted(path.name for path in pictures)
    assert second.opened == []
    assert second.adapter == first.adapter


def test_a_run_opens_only_pictures_that_are_new(opt_base, small_data, run):
    run(MODEL_ID=opt_base)
    picture = list_pictures(small_data)[0]
    new = [f"new{number}.png" for number in range(10)]
    for name in new:
        shutil.copy(picture, picture.with_name(name))

    assert run(MODEL_ID=opt_base).opened == new


def test_a_run_opens_pictures_that_have_changed_and_uses_what_is_in_them(any_base, small_data, run):
    """By its time or its size, a picture is known to have changed."""
    run(MODEL_ID=any_base)
    before = read_features(small_data)
    pictures = list_pictures(small_data)
    touched = pictures[1]
    os.utime(touched, ns=(0, touched.stat().st_mtime_ns + 1))
    changed = pictures[2]
    shutil.copy(pictures[-1], changed)

    assert run(MODEL_ID=any_base).opened == sorted([touched.name, changed.name])

    new = read_features(small_data)
    for name in before:
        del new[name]
    shutil.rmtree(small_data / ".features")
    run(MODEL_ID=any_base)
    from_scratch = read_features(small_data)
    assert len(from_scratch) == PICTURES
    assert len(new) == 2
    for name, features in new.items():
        torch.testing.assert_close(features, from_scratch[name], rtol=1e-4, atol=1e-5)


def test_features_of_an_earlier_version_are_left_alone(opt_base, small_data, run):
    old = small_data / ".features/0123456789abcdef/000000-ab.bin"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"features")

    run(MODEL_ID=opt_base)

    assert old.read_bytes() == b"features"


def change_a_weight(base: Path, name: str) -> None:
    weights = load_file(base / "model.safetensors")
    weights[name][5] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def test_another_dtype_has_features_of_its_own(opt_base, run):
    run(MODEL_ID=opt_base)

    assert len(run(MODEL_ID=opt_base, DTYPE="bfloat16").opened) == PICTURES
    assert run(MODEL_ID=opt_base).opened == []  # those of float32 are still there


def test_another_vision_tower_has_features_of_its_own(opt_base, tmp_path, run):
    run(MODEL_ID=opt_base)
    base = shutil.copytree(opt_base, tmp_path / "base")
    change_a_weight(base, "vision_model.encoder.layers.1.mlp.fc1.bias")

    assert len(run(MODEL_ID=base).opened) == PICTURES


def test_another_image_processor_has_features_of_its_own(opt_base, tmp_path, run):
    run(MODEL_ID=opt_base)
    base = shutil.copytree(opt_base, tmp_path / "base")
    path = base / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(config))

    assert len(run(MODEL_ID=base).opened) == PICTURES


def test_another_language_model_has_the_same_features(opt_base, tmp_path, run):
    run(MODEL_ID=opt_base)
    base = shutil.copytree(opt_base, tmp_path / "base")
    change_a_weight(base, "language_model.model.decoder.layers.0.fc1.bias")

    assert run(MODEL_ID=base).opened == []
