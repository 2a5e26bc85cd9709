"""What goes wrong in the usual recipes, each reproduced with its number, beside finetune.py.

python -m pytest tests/test_mistakes.py     prints the table that is in the README
"""

import math

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from helpers import rows_of, train
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from PIL import Image
from transformers import BitsAndBytesConfig, Blip2ForConditionalGeneration, Blip2Processor

import finetune


def plain_model(folder: str, in_4bit: bool = False) -> Blip2ForConditionalGeneration:
    nf4 = BitsAndBytesConfig(**finetune.NF4, bnb_4bit_compute_dtype=torch.float32)
    return Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, quantization_config=nf4 if in_4bit else None
    )


def usual_loss(model, pair: finetune.Pair, text: list[int] | None = None, ending=()):
    """labels = input_ids: image tokens, BOS and caption, or `text`; then `ending`."""
    processor = Blip2Processor.from_pretrained(model.name_or_path)
    inputs = processor(images=Image.open(pair.picture), text=pair.caption, return_tensors="pt")
    ids = torch.tensor([[*(text or inputs["input_ids"][0]), *ending]])
    return model(pixel_values=inputs["pixel_values"], input_ids=ids, labels=ids).loss


@torch.no_grad()
def our_losses(built, *rows: finetune.Example) -> list[float]:
    """Of each row, per token."""
    text = built.captioner.tokenizer
    losses = built.captioner.losses(text.collate_fn(rows)).tolist()
    return [loss / len(text.label_ids(row.caption)) for loss, row in zip(losses, rows, strict=True)]


def both(losses: list[float]) -> str:
    return ", ".join(f"{loss:.3f}" for loss in losses)


def test_blind_to_the_picture(opt_base, small_data, build, report):
    """The tokenizer on the caption alone: no image tokens, so nothing is put in their place."""
    built, model = build(opt_base, small_data), plain_model(opt_base)
    one, other = built.pairs[0], built.pairs[-1]
    assert one.caption != other.caption
    text = built.captioner.row_builder.tokenizer(one.caption)["input_ids"]
    usual = [usual_loss(model, pair, text).item() for pair in (one, other)]
    row, features = built.dataset[0], finetune.load_features(built.feature_files[other.picture])
    ours = our_losses(built, row, row._replace(features=features))
    assert usual[0] == usual[1] and ours[1] > 2 * ours[0]
    report(
        "Blind: the caption is tokenized without image tokens. Loss with its own picture, and "
        "with another one",
        both(usual),
        both(ours),
    )


def test_no_stop_token(opt_base, small_data, build, report):
    """Captions shorter than those that the base writes: only a stop token can end them there."""
    for text in (small_data / "caption").iterdir():
        text.write_text(text.read_text().split(" over ")[0])
    right = []
    for usual in (True, False):
        built = build(opt_base, small_data)
        if usual:
            real = built.captioner.row_builder.label_ids
            built.captioner.row_builder.label_ids = lambda caption, real=real: real(caption)[:-1]
        train(built, EPOCHS=40, LEARNING_RATE=3e-3)
        captions = built.captioner.caption(torch.stack([row.features for row in rows_of(built)]))
        pairs = [
            (text, pair.caption) for (text, _), pair in zip(captions, built.pairs, strict=True)
        ]
        assert all(a.startswith(b) for a, b in pairs)  # the words are learned either way
        right.append(sum(a == b for a, b in pairs))
    assert right == [0, len(pairs)]
    report(
        "Run-on: no stop token among the labels. Captions that end where they should",
        *(f"{count} of {len(pairs)}" for count in right),
    )


def test_padding_scored(opt_base, small_data, build, report):
    """labels = input_ids, padding included, as in most notebooks."""
    min((small_data / "caption").iterdir()).write_text("circle")
    built, model, usual = build(opt_base, small_data), plain_model(opt_base), []
    short, long = built.dataset[0], built.dataset[len(built.pairs) - 1]
    text = built.captioner.tokenizer
    missing = len(text.label_ids(long.caption)) - len(text.label_ids(short.caption))
    for padding in ([], [text.pad_id] * missing):
        ending = [text.stop_id, *padding]
        usual.append(usual_loss(model, built.pairs[0], ending=ending).item())
    ours = our_losses(built, short)[0], our_losses(built, short, long)[0]
    assert missing > 3 and abs(usual[1] - usual[0]) > 0.5 and math.isclose(*ours, rel_tol=1e-5)
    report(
        "Padding scored. Loss of one short caption alone, and beside a longer one",
        both(usual),
        both(ours),
    )


def test_gradients_through_the_vision_tower(opt_base, small_data, build, report):
    """prepare_model_for_kbit_training makes the input of frozen layers ask for gradients."""
    built = build(opt_base, small_data, LOAD_IN_4BIT=True)
    usual = prepare_model_for_kbit_training(plain_model(opt_base, in_4bit=True))
    usual = get_peft_model(usual, LoraConfig(target_modules=finetune.LORA_PATTERNS["attention"]))
    counts = []
    for model in (usual.train(), built.captioner.model):
        reached = set()
        layers = [*model.vision_model.encoder.layers, *model.qformer.encoder.layer]
        for layer in layers:
            layer.register_full_backward_hook(lambda module, *_, seen=reached: seen.add(module))
        if model is usual:
            usual_loss(usual, built.pairs[0]).backward()
        else:
            built.learner.backward(rows_of(built), 1)
        counts.append(len(reached))
    assert counts == [len(layers), 0]
    report(
        "Backward pass through frozen vision and Q-Former layers, for nothing",
        *(f"{count} of {len(layers)} layers" for count in counts),
    )


def test_dropout_in_frozen_parts(opt_base, small_data, build, report):
    """model.train() turns on the dropout of the frozen Q-Former and language model as well."""
    built, model = build(opt_base, small_data), plain_model(opt_base).requires_grad_(False).train()
    torch.manual_seed(0)
    usual = [usual_loss(model, built.pairs[0]).item() for _ in range(20)]
    ours = [built.learner.backward([built.dataset[0]], 1).item() for _ in range(20)]
    spread = [(max(losses) - min(losses)) / min(losses) for losses in (usual, ours)]
    assert spread[0] > 0.05 and spread[1] == 0
    report(
        "Dropout in frozen parts. Spread of one pair's loss, with no dropout asked for",
        f"{spread[0]:.0%}",
        f"{spread[1]:.0%}",
    )


@pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with avx512_bf16")
def test_nf4_repacked_on_the_cpu(t5_base, small_data, build, report):
    """A held-out pass in eval mode repacks 4-bit weights in place, for inference only; silently."""
    built = build(t5_base, small_data, LOAD_IN_4BIT=True)
    rows, gradients = rows_of(built), []
    built.learner.backward(rows, 1)
    exact = built.learner.gradient.clone()  # nothing has been repacked: a test shows that
    for kernel in (True, False):
        again = build(t5_base, small_data, LOAD_IN_4BIT=True)
        for module in again.captioner.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = kernel  # as bitsandbytes sets it, and as we do
        with torch.no_grad():
            again.captioner.losses(again.captioner.row_builder.collate_fn(rows))
        again.learner.backward(rows, 1)
        gradients.append(again.learner.gradient)
    errors = [((found - exact).norm() / exact.norm()).item() for found in gradients]
    assert errors[0] > 0.05 and errors[1] == 0
    report(
        "NF4 repacked on a CPU with avx512_bf16. Error of a T5's gradient after a held-out pass",
        f"{errors[0]:.0%}",
        f"{errors[1]:.0%}",
    )
