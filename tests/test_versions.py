"""The README's first command, and checkpoints in the layouts that are published.

These tests are also run with the oldest versions that requirements.txt allows.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import read_captions
from safetensors.torch import load_file, save_file

import finetune


def test_the_readmes_first_command_gives_21_of_21(sample, opt_base, monkeypatch, tmp_path, capsys):
    readme = (Path(finetune.__file__).parent / "README.md").read_text(encoding="utf-8")
    words = re.search(r"finetune\.py (--model-id tests/tiny_blip2.*)", readme)[1].split()
    shutil.copytree(sample, tmp_path / "train")
    shutil.copytree(opt_base, tmp_path / "tests/tiny_blip2")
    monkeypatch.chdir(tmp_path)

    code = finetune.main(words)

    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert re.search(r"^exact: +\d before, 21 after, of 21$", out, re.M)
    assert "please check" not in out
    assert out.count("  reference: ") == 6
    # No progress bars, and no colors, where the output is not a terminal.
    assert not re.search(r"[\r\x1b]|it/s|step/s|picture/s|%\|", out)


def list_weights(folder: Path) -> set[str]:
    """Names of all weights in a checkpoint."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_sharded_opt(base: Path) -> None:
    """As blip2-opt-2.7b: float32, in two files with an index, the head is the embedding."""
    weights = {
        name: weight.float() for name, weight in load_file(base / "model.safetensors").items()
    }
    (base / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    assert not any("lm_head" in name for name in list_weights(base))


def remove_image_token(base: Path) -> None:
    """As the checkpoints of 2023: nothing in it knows of a token for the picture."""
    edit_json(base / "config.json", lambda content: content.pop("image_token_index"))
    edit_json(base / "processor_config.json", lambda content: content.pop("num_query_tokens"))

    def remove(content: dict) -> None:
        tokens = content["added_tokens"]
        content["added_tokens"] = [token for token in tokens if token["content"] != "<image>"]

    edit_json(base / "tokenizer.json", remove)


def keep_untied_t5(base: Path) -> None:
    """As blip2-flan-t5-xl: a head of its own, and one embedding for encoder and decoder."""
    names = list_weights(base)
    assert "language_model.lm_head.weight" in names
    assert "language_model.shared.weight" in names
    assert not any("embed_tokens" in name for name in names)


@pytest.mark.parametrize(
    "kind, change",
    [
        ("opt", make_sharded_opt),
        ("opt", remove_image_token),
        ("t5", keep_untied_t5),
        ("t5", remove_image_token),
    ],
    ids=["OPT in float32 shards", "OPT of 2023", "Flan-T5", "Flan-T5 of 2023"],
)
def test_a_published_layout_trains_and_captions(
    command, request, small_data, tmp_path, kind, change
):
    base = Path(shutil.copytree(request.getfixturevalue(f"{kind}_base"), tmp_path / "base"))
    change(base)

    code, out, err = command(
        TRAIN_DIR=small_data,
        MODEL_ID=base,
        EPOCHS=2,
        LEARNING_RATE=3e-3,
        MAX_CAPTION_TOKENS=8,  # an untrained T5 never ends a caption
    )

    assert (code, err) == (0, "")
    assert "nan" not in out

    pictures = sorted((small_data / "Image").glob("*/*.png"))
    code, out, _ = command("--caption", *map(str, pictures))
    assert code == 0
    captions = read_captions(out)
    assert len(captions) == len(pictures)
    assert all(0 < confidence <= 1 for _, confidence in captions.values())
