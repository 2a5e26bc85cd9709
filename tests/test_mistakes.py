"""What goes wrong in the usual recipes, each reproduced with its number, beside finetune.py.

    python -m pytest tests/test_mistakes.py     prints the table that is in the README
"""

import math

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from PIL import Image
from test_training import rows_of, train
from transformers import BitsAndBytesConfig, Blip2ForConditionalGeneration, Blip2Processor

import finetune


def plain_model(folder: str, in_4bit: bool = False) -> Blip2ForConditionalGeneration:
    nf4 = BitsAndBytesConfig(**finetune.NF4, bnb_4bit_compute_dtype=torch.float32)
    return Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, quantization_config=nf4 if in_4bit else None)


def live_inputs(folder: str, pair: finetune.Pair) -> dict[str, torch.Tensor]:
    """Picture, image tokens, BOS and caption, from the processor alone."""
    processor = Blip2Processor.from_pretrained(folder)
    return processor(images=Image.open(pair.picture), text=pair.caption, return_tensors="pt")


@torch.no_grad()
def our_losses(built, *rows: finetune.Row) -> list[float]:
    """Of each row, per token."""
    losses = built.captioner.losses(rows).tolist()
    return [loss / len(row.learned) for loss, row in zip(losses, rows, strict=True)]


def test_blind_to_the_picture(opt_base, small_data, build, report):
    """The tokenizer on the caption alone: no image tokens, so nothing is put in their place."""
    built = build(opt_base, small_data)
    model, processor = plain_model(opt_base).eval(), Blip2Processor.from_pretrained(opt_base)
    one, other = built.pairs[0], built.pairs[-1]
    assert one.caption != other.caption
    text = processor.tokenizer(one.caption, return_tensors="pt")
    with torch.no_grad():
        usual = [model(**text, pixel_values=live_inputs(opt_base, pair)["pixel_values"],
                       labels=text["input_ids"]).loss.item() for pair in (one, other)]
    row, features = built.dataset[0], built.dataset.features(other.picture)
    ours = our_losses(built, row, row._replace(features=features))
    assert usual[0] == usual[1]
    assert ours[1] > 2 * ours[0]
    report("Blind: the caption is tokenized without image tokens. Loss with its own picture, and "
           "with another one", f"{usual[0]:.3f}, {usual[1]:.3f}", f"{ours[0]:.3f}, {ours[1]:.3f}")


def test_no_stop_token(opt_base, small_data, build, report):
    """Captions shorter than those that the base writes: only a stop token can end them there."""
    for text in (small_data / "caption").iterdir():
        text.write_text(text.read_text().split(" over ")[0])
    right = {}
    for name in ("usual", "ours"):
        built = build(opt_base, small_data)
        if name == "usual":
            built.dataset.learned = {k: ids[:-1] for k, ids in built.dataset.learned.items()}
        train(built, EPOCHS=40, LEARNING_RATE=3e-3)
        captions = built.captioner.caption([row.features for row in rows_of(built)])
        expected = [pair.caption for pair in built.pairs]
        right[name] = sum(a == b for (a, _), b in zip(captions, expected, strict=True))
        begun = sum(a.startswith(b) for (a, _), b in zip(captions, expected, strict=True))
        assert begun == len(expected)  # the words themselves are learned either way
    assert right["usual"] == 0 and right["ours"] == len(expected)
    report("Run-on: no stop token among the labels. Captions that end where they should",
           f"{right['usual']} of {len(expected)}", f"{right['ours']} of {len(expected)}")


def test_padding_scored(opt_base, small_data, build, report):
    """labels = input_ids, padding included, as in most notebooks."""
    next(iter(sorted((small_data / "caption").iterdir()))).write_text("circle")
    built = build(opt_base, small_data)
    short, long = built.dataset[0], built.dataset[len(built.pairs) - 1]
    assert len(long.learned) > len(short.learned) + 3
    model, usual = plain_model(opt_base).eval(), []
    for missing in (0, len(long.learned) - len(short.learned)):
        inputs = live_inputs(opt_base, built.pairs[0])
        padding = torch.full((1, missing), built.captioner.pad)
        ids = torch.cat([inputs["input_ids"], torch.tensor([[built.captioner.stop]]), padding], 1)
        with torch.no_grad():
            usual.append(model(pixel_values=inputs["pixel_values"], input_ids=ids,
                               labels=ids).loss.item())
    ours = our_losses(built, short)[0], our_losses(built, short, long)[0]
    assert abs(usual[1] - usual[0]) > 0.5
    assert math.isclose(*ours, rel_tol=1e-5)
    report("Padding scored. Loss of one short caption alone, and beside a longer one",
           f"{usual[0]:.3f}, {usual[1]:.3f}", f"{ours[0]:.3f}, {ours[1]:.3f}")


def test_gradients_through_the_vision_tower(opt_base, small_data, build, report):
    """prepare_model_for_kbit_training makes the input of frozen layers ask for gradients."""
    built = build(opt_base, small_data, LOAD_IN_4BIT=True)
    usual = prepare_model_for_kbit_training(plain_model(opt_base, in_4bit=True))
    usual = get_peft_model(usual, LoraConfig(target_modules=finetune.LORA_PATTERNS["attention"]))
    usual.train()
    counts = []
    for model in (usual, built.captioner.model):
        reached = set()
        layers = [*model.vision_model.encoder.layers, *model.qformer.encoder.layer]
        for layer in layers:
            layer.register_full_backward_hook(lambda module, *_, seen=reached: seen.add(module))
        if model is usual:
            inputs = live_inputs(opt_base, built.pairs[0])
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        else:
            built.learner.backward(rows_of(built), 1, 100)
        counts.append(len(reached))
    assert counts == [len(layers), 0]
    report("Backward pass through frozen vision and Q-Former layers, for nothing",
           f"{counts[0]} of {len(layers)} layers", f"{counts[1]} of {len(layers)} layers")


def test_dropout_in_frozen_parts(opt_base, small_data, build, report):
    """model.train() turns on the dropout of the frozen Q-Former and language model as well."""
    built = build(opt_base, small_data)
    inputs = live_inputs(opt_base, built.pairs[0])
    model = plain_model(opt_base).requires_grad_(False).train()
    torch.manual_seed(0)
    with torch.no_grad():
        usual = [model(**inputs, labels=inputs["input_ids"]).loss.item() for _ in range(20)]
    ours = [built.learner.backward([built.dataset[0]], 1, 1).item() for _ in range(20)]
    spread = [(max(losses) - min(losses)) / min(losses) for losses in (usual, ours)]
    assert spread[0] > 0.05 and spread[1] == 0
    report("Dropout in frozen parts. Spread of one pair's loss, with no dropout asked for",
           f"{spread[0]:.0%}", f"{spread[1]:.0%}")


@pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with avx512_bf16")
def test_nf4_repacked_on_the_cpu(t5_base, small_data, build, report):
    """A held-out pass in eval mode repacks 4-bit weights in place, for inference only; silently."""
    built = build(t5_base, small_data, LOAD_IN_4BIT=True)
    rows, gradients = rows_of(built), []
    built.learner.backward(rows, 1, 100)
    exact = built.learner.master.grad.clone()  # nothing has been repacked: a test shows that
    for kernel in (True, False):
        again = build(t5_base, small_data, LOAD_IN_4BIT=True)
        for module in again.captioner.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = kernel  # as bitsandbytes sets it, and as we do
        with torch.no_grad():
            again.captioner.losses(rows)
        again.learner.backward(rows, 1, 100)
        gradients.append(again.learner.master.grad)
    errors = [((found - exact).norm() / exact.norm()).item() for found in gradients]
    assert errors[0] > 0.05 and errors[1] == 0
    report("NF4 repacked on a CPU with avx512_bf16. Error of a T5's gradient after a held-out pass",
           f"{errors[0]:.0%}", f"{errors[1]:.0%}")
