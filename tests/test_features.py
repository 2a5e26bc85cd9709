"""What the frozen vision side says of a picture is computed once, and never served stale."""

import json
import os
import shutil
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file

import finetune


@pytest.fixture
def run(command, small_data, tmp_path, monkeypatch):
    """run(name, **settings) -> the names of the pictures that it opens, and its adapter."""
    read = Mock(wraps=finetune.read_picture)
    monkeypatch.setattr(finetune, "read_picture", read)

    def call(name: str, **settings) -> tuple[list[str], bytes]:
        read.reset_mock()
        code, _, error = command(
            TRAIN_DIR=small_data, OUTPUT_DIR=tmp_path / name, EPOCHS=2, SAMPLE_COUNT=0,
            **settings)  # a report with samples would open those
        assert code == 0, error
        return ([os.path.basename(call.args[0]) for call in read.call_args_list],
                (tmp_path / name / "adapter_model.safetensors").read_bytes())

    return call


def test_a_second_run_opens_only_what_is_new(any_base, small_data, run):
    old = small_data / ".features/0123456789abcdef/000000-ab.bin"  # of an earlier version
    old.parent.mkdir(parents=True)
    old.write_bytes(b"features")
    pictures = sorted(small_data.glob("Image/*/*.png"))
    opened, first = run("first", MODEL_ID=any_base)
    assert len(opened) == len(pictures)
    assert run("second", MODEL_ID=any_base) == ([], first)
    new = [pictures[0].with_name(f"new{number}.png") for number in range(10)]
    for path in new:
        shutil.copy(pictures[0], path)
    assert sorted(run("more", MODEL_ID=any_base)[0]) == [path.name for path in new]
    os.utime(pictures[1], ns=(0, pictures[1].stat().st_mtime_ns + 1))  # touched
    shutil.copy(pictures[-1], pictures[2])  # other bytes, another size
    opened, changed = run("changed", MODEL_ID=any_base)
    assert len(opened) == 2 and old.read_bytes() == b"features"
    shutil.rmtree(small_data / ".features")
    opened, fresh = run("fresh", MODEL_ID=any_base)
    assert len(opened) == len(pictures) + 10 and changed == fresh


def test_other_models_processors_and_dtypes_have_features_of_their_own(opt_base, tmp_path, run):
    assert len(run("first", MODEL_ID=opt_base)[0]) == 12
    assert len(run("bfloat16", MODEL_ID=opt_base, DTYPE="bfloat16")[0]) == 12
    for name, expected in (("vision_model.encoder.layers.1.mlp.fc1.bias", 12),
                           ("language_model.model.decoder.layers.0.fc1.bias", 0)):
        base = shutil.copytree(opt_base, tmp_path / name)
        weights = load_file(base / "model.safetensors")
        weights[name][5] += 1
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        assert len(run(f"{name} out", MODEL_ID=base)[0]) == expected
    path = shutil.copytree(opt_base, tmp_path / "processor") / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(config))
    assert len(run("processor out", MODEL_ID=path.parent)[0]) == 12
    assert run("again", MODEL_ID=opt_base)[0] == []
