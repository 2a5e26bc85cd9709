"""LoRA in the Q-Former: what is computed once, what learns when, and that all of it is saved."""

import re
import shutil
import signal

import pytest
import torch
from helpers import Child, PlainModel, on, read_captions, send, step_of
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import Blip2ForConditionalGeneration

import finetune

SETTINGS = {
    "TRAIN_DIR": "data",
    "OUTPUT_DIR": "out",
    "DEVICE": "cpu",
    "BATCH_SIZE": 6,
    "EPOCHS": 3,
    "LORA_RANK": 4,
    "LEARNING_RATE": 3e-3,
    "VALIDATION_FRACTION": 0.25,
    "CHECKPOINT_MINUTES": 1e-6,
    "NUM_WORKERS": 1,
    "MAX_CAPTION_TOKENS": 8,  # an untrained T5 never ends a caption
    "LORA_TARGETS": "qformer+attention",
}


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_losses_and_gradients_are_those_of_the_whole_model(any_base, build, small_data, prompt):
    """Pictures and captions through plain transformers, one by one: no cache, no packing."""
    built = build(any_base, small_data, LORA_TARGETS="qformer", PROMPT=prompt)
    examples = [built.dataset[i] for i in range(len(built.dataset))]
    tokens = sum(built.dataset.token_counts)
    losses = built.learner.backward(examples, tokens)
    gradient = built.learner.gradient.clone()

    model = built.captioner.model
    row_builder = built.captioner.row_builder
    processor = built.captioner.processor
    total = 0
    for pair, loss in zip(built.pairs, losses.tolist(), strict=True):
        picture = finetune.read_picture(pair.picture, 64)
        pixels = torch.from_numpy(processor.image_processor(picture).pixel_values[0])[None]
        labels = row_builder.label_ids(pair.caption)
        image_ids = [model.config.image_token_index] * model.config.num_query_tokens
        if row_builder.is_t5:
            output = model(
                pixel_values=pixels,
                input_ids=torch.tensor([image_ids + row_builder.prompt_ids]),
                decoder_input_ids=torch.tensor([[row_builder.start_id, *labels[:-1]]]),
            )
            logits = output.logits[0]
        else:
            ids = torch.tensor([image_ids + row_builder.prompt_ids + labels])
            logits = model(pixel_values=pixels, input_ids=ids).logits[0, -len(labels) - 1 : -1]
        plain = cross_entropy(logits, torch.tensor(labels), reduction="sum")
        assert loss == pytest.approx(plain.item(), rel=1e-5)
        total = total + plain / tokens

    for weight in built.learner.weights:
        weight.requires_grad_(True)
    plain_gradients = torch.autograd.grad(total, built.learner.weights)
    # Attention's queries have gradients a million times smaller than others: what rounding does
    # to these is measured against the whole gradient.
    norm = torch.cat([part.flatten() for part in plain_gradients]).norm()
    assert norm > 0
    ours = gradient.split([weight.numel() for weight in built.learner.weights])
    for name, found, plain in zip(
        built.learner.adapter_weights, ours, plain_gradients, strict=True
    ):
        assert (found - plain.flatten()).norm() <= 1e-5 * norm, name


def copy_data(sample, folder):
    ignored = shutil.ignore_patterns("circle-*", "moon-*", "square-*", "0[4-9].png", "1?.png")
    shutil.copytree(sample, folder / "data", ignore=ignored)


@pytest.fixture(scope="module")
def whole(any_base_of_module, sample, tmp_path_factory):
    """An uninterrupted run with two phases: settings, folder, and what it said."""
    folder = tmp_path_factory.mktemp("qformer") / "run"
    copy_data(sample, folder)
    settings = SETTINGS | {"MODEL_ID": any_base_of_module}
    ended = Child(settings, folder=folder).wait()
    assert ended.code == 0, ended
    return settings, folder, ended


@pytest.fixture(scope="module", params=["opt", "t5"])
def any_base_of_module(request):
    return request.getfixturevalue(f"{request.param}_base")


def test_the_output_says_that_the_qformer_learns_alone_at_first(whole):
    _, folder, ended = whole
    steps = int(ended.out.partition("steps: ")[2].partition(",")[0])
    assert f"for the first {steps // 3} steps the Q-Former learns alone" in ended.out
    assert "qformer steps" in (folder / "out/report.html").read_text(encoding="utf-8")


def test_killed_in_either_phase_it_ends_the_same(whole, tmp_path):
    """In the first phase, at the boundary, and in the second phase, one after the other."""
    settings, reference, ended = whole
    steps = int(ended.out.partition("steps: ")[2].partition(",")[0])
    folder = tmp_path / "run"
    shutil.copytree(reference / "data", folder / "data")

    for step in (2, steps // 3 + 1, steps - 2):
        number = step - step_of(folder)  # in a process, its first step is number 1

        def kill_at_step(number: int = number) -> None:
            on(f"before step {number}", send(signal.SIGKILL))

        killed = Child(settings, folder=folder, prepare=kill_at_step).wait()
        assert killed.code == -signal.SIGKILL
        assert step_of(folder) == step - 1
    assert Child(settings, folder=folder).wait().code == 0

    name = "out/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (reference / name).read_bytes()


def test_in_the_first_phase_the_language_model_does_not_change(whole, tmp_path):
    settings, reference, ended = whole
    steps = int(ended.out.partition("steps: ")[2].partition(",")[0])
    folder = tmp_path / "run"
    shutil.copytree(reference / "data", folder / "data")

    def stop_at_the_boundary() -> None:
        on(f"before step {steps // 3}", send(signal.SIGTERM))

    stopped = Child(settings, folder=folder, prepare=stop_at_the_boundary).wait()

    assert stopped.code == 128 + signal.SIGTERM, stopped
    checkpoint = torch.load(folder / "out.unfinished/checkpoint.pt", weights_only=True)
    states = checkpoint["learner"]["optimizer"]["state"]
    assert list(states) == [0], "the optimizer knows nothing of the language model yet"
    assert states[0]["step"] == checkpoint["progress"]["step"] == steps // 3


def test_the_saved_adapter_has_both_and_plain_peft_captions_as_the_script(
    command, sample, opt_base, tmp_path
):
    """With LoRA in the Q-Former alone, and a rate that changes captions."""
    copy_data(sample, tmp_path)
    code, _, error = command(
        TRAIN_DIR=tmp_path / "data",
        MODEL_ID=opt_base,
        LORA_TARGETS="qformer",
        LEARNING_RATE=1e-2,
        EPOCHS=3,
        BATCH_SIZE=6,
        LOAD_IN_4BIT=False,
    )
    assert (code, error) == (0, "")
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(".qformer." in name or ".language_projection." in name for name in weights)
    changed = [name for name, weight in weights.items() if "lora_B" in name and weight.any()]
    assert any(".qformer." in name for name in changed)

    pictures = sorted((tmp_path / "data/Image").glob("*/*.png"))[:8]
    code, out, _ = command("--caption", *map(str, pictures))
    assert code == 0

    plain = PlainModel(opt_base, tmp_path / "out")
    for path, (caption, confidence) in read_captions(out).items():
        text, plain_confidence, _ = plain.caption(path, 65, 1)
        assert text == caption
        assert plain_confidence == pytest.approx(confidence, abs=2e-4)


def test_the_vision_tower_is_refused_before_anything_is_encoded(refused, small_data, opt_base):
    pattern = r"vision_model\..*qkv|language_model\..*q_proj"
    sentence = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base, LORA_TARGETS=pattern)
    assert "vision_model" in sentence
    assert not (small_data / ".features").exists()


def test_features_of_both_kinds_lie_next_to_each_other(command, small_data, opt_base):
    """What was computed for one is not taken for the other, and not computed again.

    No caption changes with such a rate: what to do depends on LORA_TARGETS.
    """
    for targets, encoded, remedy in (
        ("attention", 12, "raise EPOCHS or LEARNING_RATE"),
        ("qformer", 12, "qformer alone teaches no wording; use qformer+attention"),
        ("all-linear", 0, "raise EPOCHS or LEARNING_RATE"),
    ):
        code, out, _ = command(
            "--restart",
            TRAIN_DIR=small_data,
            MODEL_ID=opt_base,
            LORA_TARGETS=targets,
            LEARNING_RATE=1e-9,
            EPOCHS=1,
        )
        assert code == 0
        assert f"pictures: {encoded} to encode" in out
        [remark] = re.findall("captions of the held-out pictures did not change: (.+)", out)
        assert remedy in remark
    model = Blip2ForConditionalGeneration.from_pretrained(opt_base)
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    shapes = set()
    for file in small_data.glob(".features/*/*.safetensors"):
        shapes.add(tuple(load_file(file)["features"].shape))
    assert (patches, vision.hidden_size) in shapes
    assert len(shapes) == 2
