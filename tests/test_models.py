"""MODEL_ID, and what the model and the machine must have: what is wrong is told in a sentence."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from helpers import LFS_POINTER, assert_words
from safetensors.torch import load_file, save_file

# ---- What a setting asks for, and is not there --------------------------------------------------

LAYERS = r" must be attention, .*, or match(.|\n)*^  language_model.*\\d\+.*q_proj$"


@pytest.mark.parametrize(
    "name, value, pattern",
    [
        pytest.param(
            "DEVICE",
            "cuda",
            "DEVICE is 'cuda', .*--device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ("DEVICE", "cuda:63", "DEVICE is 'cuda:63', .*--device cpu"),
        ("MODEL_ID", "no-such/model", "can't load MODEL_ID 'no-such/model'.*network"),
        ("MAX_CAPTION_TOKENS", 999, "999.*256 positions.*Lower"),
        ("LORA_TARGETS", "query", "LORA_TARGETS 'query'" + LAYERS),
        ("LORA_TARGETS", ".*", r"LORA_TARGETS '\.\*'" + LAYERS),
        ("LORA_TARGETS", r"vision_model\..*\.qkv", r"LORA_TARGETS 'vision_model.*qkv'" + LAYERS),
    ],
)
def test_what_the_machine_or_the_model_does_not_have_is_told(
    refused, small_data, opt_base, name, value, pattern
):
    settings = {"TRAIN_DIR": small_data, "MODEL_ID": opt_base} | {name: value}
    assert re.search(pattern, refused(**settings), re.M)


# ---- Folders that are no model, or a damaged one ------------------------------------------------

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PROJECTION = "language_projection.weight"


class BadModel(NamedTuple):
    """What is wrong with a copy of the tiny BLIP-2, and words of the error."""

    name: str
    change: Callable[[Path], None]  # the folder
    words: tuple[str, ...]


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def cut_off(name: str, keep: float) -> Callable[[Path], None]:
    """Only this part of the file is there."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return change


def edit_config(**values) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return change


def edit_weights(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        edit(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def remove_projection(weights: dict) -> None:
    del weights[PROJECTION]


def shrink_projection(weights: dict) -> None:
    weights[PROJECTION] = torch.zeros(3, 3)


BAD_MODELS = [
    BadModel("no config", remove(CONFIG), ()),
    BadModel("another model", write(CONFIG, '{"model_type": "opt"}'), ("not a BLIP-2",)),
    BadModel(
        "another BLIP-2",
        edit_config(architectures=["Blip2ForImageTextRetrieval"]),
        ("Blip2ForImageTextRetrieval",),
    ),
    BadModel(
        "InstructBLIP",
        edit_config(
            model_type="instructblip", architectures=["InstructBlipForConditionalGeneration"]
        ),
        ("InstructBlipForConditionalGeneration", "not a BLIP-2"),
    ),
    BadModel(
        "code of its own",
        write(CONFIG, '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'),
        ("'own'", "not a BLIP-2"),
    ),
    BadModel("no tokenizer_config.json", remove("tokenizer_config.json"), ("download",)),
    BadModel("no tokenizer.json", remove("tokenizer.json"), ("tokenizer",)),
    BadModel("pickled weights alone", remove(WEIGHTS), ("safetensors",)),
    BadModel("weights without the end", cut_off(WEIGHTS, 0.9995), ()),
    BadModel("a missing weight", edit_weights(remove_projection), (PROJECTION,)),
    BadModel("a weight of another shape", edit_weights(shrink_projection), (PROJECTION,)),
]


@pytest.fixture
def model(small_data, opt_base, monkeypatch) -> Path:
    """A copy of the tiny BLIP-2, with pickled weights and code next to its own."""
    monkeypatch.chdir(small_data.parent)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked to run code"))
    folder = Path(shutil.copytree(opt_base, small_data.with_name("model")))
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / "own.py").write_text("raise SystemExit('code of a model was run')")
    return folder


@pytest.mark.parametrize("bad", BAD_MODELS, ids=lambda bad: bad.name)
def test_a_bad_model_is_named_and_none_of_its_code_is_run(refused, small_data, model, bad):
    bad.change(model)
    error = refused(TRAIN_DIR=small_data, MODEL_ID="model")
    assert_words(error, (f"can't load MODEL_ID {str(model)!r}", *bad.words))


# ---- New: which file is missing or wrong --------------------------------------------------------


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def split_weights(folder: Path) -> None:
    """Into two files, of which the second has not been downloaded."""
    first = "model-00001-of-00002.safetensors"
    second = "model-00002-of-00002.safetensors"
    names = sorted(load_file(folder / WEIGHTS))
    files = {name: first if number % 2 else second for number, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).rename(folder / first)


def enlarge_pictures(folder: Path) -> None:
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"] = {"height": 96, "width": 96}
    path.write_text(json.dumps(config))


def enlarge_tokenizer(folder: Path) -> None:
    """By 100 words for which the model has no weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{number}" for number in range(100)])
    tokenizer.save_pretrained(folder)


def quantized(method: str, **options) -> Callable[[Path], None]:
    """As a model is saved that was loaded so."""
    return edit_config(quantization_config={"quant_method": method, **options})


def move_into_snapshot(folder: Path) -> None:
    """As in the cache of the Hub's library."""
    inner = folder / "snapshots" / "0123abcd"
    inner.mkdir(parents=True)
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(inner / path.name)


def edit_image_processor(**values) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "processor_config.json"
        config = json.loads(path.read_text())
        config["image_processor"] |= values
        path.write_text(json.dumps(config))

    return change


def drop_last_layer(folder: Path) -> None:
    """From the config alone: the weights still have three layers."""
    config = json.loads((folder / CONFIG).read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (folder / CONFIG).write_text(json.dumps(config))


DAMAGED_MODELS = [
    BadModel("a folder of the cache", move_into_snapshot, ("snapshots/0123abcd", "name that")),
    BadModel("a config with fewer layers", drop_last_layer, ("layers.2.", "config.json")),
    BadModel(
        "pictures that are not square",
        edit_image_processor(size={"height": 64, "width": 96}),
        ("96 x 64", "64 x 64"),
    ),
    BadModel("pictures that are not scaled", edit_image_processor(do_resize=False), ("65 x 66",)),
    BadModel("an empty folder", remove_all, ("config.json",)),
    BadModel("no config", remove(CONFIG), ("config.json",)),
    BadModel("an empty config", write(CONFIG, ""), ("config.json", "empty")),
    BadModel("half a config", cut_off(CONFIG, 0.5), ("config.json",)),
    BadModel(
        "a web page as config",
        write(CONFIG, "<!DOCTYPE html><html>401</html>"),
        ("config.json", "web page"),
    ),
    BadModel("a pointer as config", write(CONFIG, LFS_POINTER), ("config.json", "git lfs pull")),
    BadModel("pickled weights alone", remove(WEIGHTS), ("pytorch_model.bin", "safetensors")),
    BadModel("no weights", remove(WEIGHTS, "pytorch_model.bin"), ("model.safetensors",)),
    BadModel("a pointer as weights", write(WEIGHTS, LFS_POINTER), (WEIGHTS, "git lfs pull")),
    BadModel("half of the weights", cut_off(WEIGHTS, 0.5), (WEIGHTS, "download")),
    BadModel("the head of the weights", cut_off(WEIGHTS, 0.001), (WEIGHTS, "download")),
    BadModel("an empty file of weights", write(WEIGHTS, b""), (WEIGHTS, "empty")),
    BadModel(
        "a web page as weights",
        write(WEIGHTS, "<html><title>Just a moment</title></html>"),
        (WEIGHTS, "web page"),
    ),
    BadModel("one of two files", split_weights, ("model-00002-of-00002.safetensors",)),
    BadModel("no tokenizer.json", remove("tokenizer.json"), ("tokenizer.json",)),
    BadModel(
        "no file of the tokenizer",
        remove("tokenizer.json", "tokenizer_config.json"),
        ("tokenizer.json",),
    ),
    BadModel(
        "a pointer as tokenizer",
        write("tokenizer.json", LFS_POINTER),
        ("tokenizer.json", "git lfs pull"),
    ),
    BadModel("half a tokenizer", cut_off("tokenizer.json", 0.5), ("tokenizer.json",)),
    BadModel("no processor", remove("processor_config.json"), ("processor_config.json",)),
    BadModel("pictures of another size", enlarge_pictures, ("96", "64")),
    BadModel("a tokenizer of another model", enlarge_tokenizer, ("tokenizer", "525", "425")),
    BadModel(
        "saved in 4 bits",
        quantized("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        ("quantized", "original"),
    ),
    BadModel(
        "saved in 8 bits",
        quantized("bitsandbytes", load_in_8bit=True),
        ("quantized", "original"),
    ),
    BadModel("saved by GPTQ", quantized("gptq", bits=4), ("quantized", "original")),
]


@pytest.mark.parametrize("bad", DAMAGED_MODELS, ids=lambda bad: bad.name)
def test_what_is_wrong_in_the_folder_is_named(refused, small_data, model, bad):
    """Before a picture is encoded, and without a word about the network."""
    bad.change(model)
    error = refused(TRAIN_DIR=small_data, MODEL_ID=model)
    assert_words(error, ("MODEL_ID", str(model), *bad.words))
    assert "network" not in error
    assert "hf auth" not in error
    assert not (small_data / ".features").exists()


@pytest.mark.parametrize("is_complete", [True, False], ids=["a run", "only what PEFT writes"])
def test_what_a_run_has_left_is_no_model_and_its_base_is_named(
    command, refused, small_data, opt_base, tmp_path, is_complete
):
    """And how to go on from it."""
    code, _, _ = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=1)
    assert code == 0
    shutil.rmtree(small_data / ".features")
    if not is_complete:
        (tmp_path / "out/settings.json").unlink()
        (tmp_path / "out/README.md").unlink()

    error = refused(TRAIN_DIR=small_data, MODEL_ID=tmp_path / "out", OUTPUT_DIR=tmp_path / "new")

    assert_words(error, (str(tmp_path / "out"), "adapter", opt_base, "START_FROM"))
    assert "network" not in error


@pytest.mark.parametrize(
    "path",
    [
        "missing/",
        "./missing",
        "../models/blip2",
        "/models/blip2",
        "models/blip2/opt",
        "Salesforce/blip2-opt-2.7b@main",
        "Salesforce/blip2-opt-2.7b/tree/main",
    ],
)
def test_a_model_folder_that_is_not_there_is_no_question_of_the_network(
    refused, small_data, monkeypatch, path
):
    monkeypatch.chdir(small_data.parent)
    error = refused(TRAIN_DIR=small_data, MODEL_ID=path)
    assert_words(error, ("MODEL_ID", path.strip("./"), "no such folder"))
    assert "network" not in error
    assert "hf auth" not in error


@pytest.mark.parametrize(
    "name", ["https://huggingface.co/Salesforce/blip2-opt-2.7b", "hf.co/Salesforce/blip2-opt-2.7b"]
)
def test_the_address_of_a_model_is_told_to_be_one(refused, small_data, name):
    error = refused(TRAIN_DIR=small_data, MODEL_ID=name)
    assert_words(error, ("MODEL_ID", "it is a URL", "as in Salesforce/blip2-opt-2.7b"))
    assert "network" not in error


def test_a_file_as_model_is_told_to_be_none(refused, small_data, model):
    error = refused(TRAIN_DIR=small_data, MODEL_ID=model / WEIGHTS)
    assert_words(error, ("MODEL_ID", str(model), "folder"))
    assert "network" not in error


@pytest.mark.parametrize("name", ["no-such/model", "blip2-opt-2.7b"])
def test_a_name_on_the_hub_may_need_network_or_login(refused, small_data, name):
    error = refused(TRAIN_DIR=small_data, MODEL_ID=name)
    assert_words(error, (repr(name), "network", "hf auth login"))


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040)"),
        ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes"),
        OSError("libbitsandbytes_cuda130.so: cannot open shared object file"),
        torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_failure_of_the_gpu_keeps_its_own_words(
    refused, small_data, opt_base, monkeypatch, failure
):
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(transformers.Blip2ForConditionalGeneration, "from_pretrained", fail)
    error = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base)
    assert str(failure) in error
    assert "network" not in error
    assert "hf auth" not in error
