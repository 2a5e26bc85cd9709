"""What goes wrong in the usual recipes: each mistake with its number, next to finetune.py's.

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


def load_plain_model(folder: str, in_4bit: bool = False) -> Blip2ForConditionalGeneration:
    quantization = None
    if in_4bit:
        quantization = BitsAndBytesConfig(**finetune.NF4, bnb_4bit_compute_dtype=torch.float32)
    return Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization
    )


def prepare_inputs(model, pair: finetune.Pair) -> dict[str, torch.Tensor]:
    """A row of picture and caption as the processor makes it: image tokens, BOS, caption."""
    processor = Blip2Processor.from_pretrained(model.name_or_path)
    picture = Image.open(pair.picture)
    inputs = processor(images=picture, text=pair.caption, return_tensors="pt")
    return {"pixel_values": inputs["pixel_values"], "input_ids": inputs["input_ids"]}


def compute_usual_loss(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of the usual recipe: labels = input_ids."""
    return model(**inputs, labels=inputs["input_ids"]).loss


@torch.no_grad()
def measure_our_losses(built, examples: list[finetune.Example]) -> list[float]:
    """The loss of each example in one batch, per token."""
    row_builder = built.captioner.row_builder
    losses = built.captioner.losses(row_builder.collate_fn(examples)).tolist()
    losses_per_token = []
    for example, loss in zip(examples, losses, strict=True):
        losses_per_token.append(loss / len(row_builder.label_ids(example.caption)))
    return losses_per_token


def format_losses(losses: list[float]) -> str:
    return ", ".join(f"{loss:.3f}" for loss in losses)


def test_without_image_tokens_the_model_is_blind(opt_base, small_data, build, report):
    """The usual recipe tokenizes the caption alone, so that the picture has no place in the row."""
    built = build(opt_base, small_data)
    own = built.pairs[0]
    other = built.pairs[-1]
    assert own.caption != other.caption

    model = load_plain_model(opt_base)
    caption_ids = built.captioner.row_builder.tokenizer(own.caption)["input_ids"]
    usual = []
    for pair in (own, other):
        inputs = prepare_inputs(model, pair)
        inputs["input_ids"] = torch.tensor([caption_ids])
        usual.append(compute_usual_loss(model, inputs).item())

    example = built.dataset[0]
    other_features = finetune.load_features(built.feature_files[other.picture])
    with_other_picture = example._replace(features=other_features)
    ours = measure_our_losses(built, [example, with_other_picture])

    assert usual[0] == usual[1]
    assert ours[1] > 2 * ours[0]
    report(
        "Blind: the caption is tokenized without image tokens. Loss with its own picture, and "
        "with another one",
        format_losses(usual),
        format_losses(ours),
    )


def count_right_captions(built) -> int:
    """How many captions are right after training; the others are right, and run on."""
    train(built, EPOCHS=40, LEARNING_RATE=3e-3)
    features = torch.stack([example.features for example in rows_of(built)])
    right = 0
    for caption, pair in zip(built.captioner.caption(features), built.pairs, strict=True):
        assert caption.text.startswith(pair.caption)  # the words are learned in either case
        if caption.text == pair.caption:
            right += 1
    return right


def test_without_a_stop_token_captions_run_on(opt_base, small_data, build, report, monkeypatch):
    """The captions are shorter than those of the base, so that only a stop token can end them."""
    for file in (small_data / "caption").iterdir():
        file.write_text(file.read_text().split(" over ")[0])
    label_ids = finetune.RowBuilder.label_ids

    def label_ids_without_stop_token(row_builder: finetune.RowBuilder, caption: str) -> list[int]:
        return label_ids(row_builder, caption)[:-1]

    with monkeypatch.context() as patch:
        patch.setattr(finetune.RowBuilder, "label_ids", label_ids_without_stop_token)
        usual = count_right_captions(build(opt_base, small_data))
    built = build(opt_base, small_data)
    ours = count_right_captions(built)

    count = len(built.pairs)
    assert (usual, ours) == (0, count)
    report(
        "Run-on: no stop token among the labels. Captions that end where they should",
        f"{usual} of {count}",
        f"{ours} of {count}",
    )


def test_padding_in_the_labels_changes_the_loss(opt_base, small_data, build, report):
    """labels = input_ids, padding included, as in most notebooks."""
    first_caption = min((small_data / "caption").iterdir())
    first_caption.write_text("circle")
    built = build(opt_base, small_data)
    row_builder = built.captioner.row_builder
    examples = rows_of(built)
    short = examples[0]
    long = examples[-1]
    short_length = len(row_builder.label_ids(short.caption))
    long_length = len(row_builder.label_ids(long.caption))
    missing = long_length - short_length
    assert missing > 3

    model = load_plain_model(opt_base)
    usual = []
    for padding in ([], [row_builder.pad_id] * missing):
        inputs = prepare_inputs(model, built.pairs[0])
        ids = inputs["input_ids"][0].tolist()
        inputs["input_ids"] = torch.tensor([[*ids, row_builder.stop_id, *padding]])
        usual.append(compute_usual_loss(model, inputs).item())

    [alone] = measure_our_losses(built, [short])
    next_to_a_longer_one, _ = measure_our_losses(built, [short, long])

    assert abs(usual[1] - usual[0]) > 0.5
    assert math.isclose(alone, next_to_a_longer_one, rel_tol=1e-5)
    report(
        "Padding scored. Loss of one short caption alone, and next to a longer one",
        format_losses(usual),
        format_losses([alone, next_to_a_longer_one]),
    )


def watch_frozen_layers(model) -> tuple[int, set]:
    """The number of vision and Q-Former layers, and those that a backward pass will reach."""
    reached = set()
    layers = [*model.vision_model.encoder.layers, *model.qformer.encoder.layer]
    for layer in layers:
        layer.register_full_backward_hook(lambda module, *_: reached.add(module))
    return len(layers), reached


def test_the_backward_pass_leaves_out_the_vision_side(opt_base, small_data, build, report):
    """prepare_model_for_kbit_training makes the input of frozen layers ask for gradients."""
    built = build(opt_base, small_data, LOAD_IN_4BIT=True)

    model = prepare_model_for_kbit_training(load_plain_model(opt_base, in_4bit=True))
    config = LoraConfig(target_modules=finetune.LORA_PATTERNS["attention"])
    model = get_peft_model(model, config).train()
    count, usual = watch_frozen_layers(model)
    compute_usual_loss(model, prepare_inputs(model, built.pairs[0])).backward()

    _, ours = watch_frozen_layers(built.captioner.model)
    built.learner.backward(rows_of(built), 1)

    assert (len(usual), len(ours)) == (count, 0)
    report(
        "Backward pass through frozen vision and Q-Former layers, for nothing",
        f"{len(usual)} of {count} layers",
        f"{len(ours)} of {count} layers",
    )


def measure_spread(losses: list[float]) -> float:
    return (max(losses) - min(losses)) / min(losses)


def test_dropout_in_frozen_parts_makes_the_loss_noisy(opt_base, small_data, build, report):
    """model.train() turns on the dropout of the frozen Q-Former and language model as well."""
    built = build(opt_base, small_data)
    model = load_plain_model(opt_base).requires_grad_(False).train()
    inputs = prepare_inputs(model, built.pairs[0])
    example = built.dataset[0]

    torch.manual_seed(0)
    usual = measure_spread([compute_usual_loss(model, inputs).item() for _ in range(20)])
    ours = measure_spread([built.learner.backward([example], 1).item() for _ in range(20)])

    assert usual > 0.05
    assert ours == 0
    report(
        "Dropout in frozen parts. Spread of one pair's loss, with no dropout asked for",
        f"{usual:.0%}",
        f"{ours:.0%}",
    )


@pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with avx512_bf16")
def test_nf4_weights_stay_right_for_training_on_the_cpu(t5_base, small_data, build, report):
    """A held-out pass in eval mode repacks 4-bit weights in place, for inference only; silently."""
    built = build(t5_base, small_data, LOAD_IN_4BIT=True)
    examples = rows_of(built)
    built.learner.backward(examples, 1)  # before anything could have been repacked
    exact = built.learner.gradient.clone()

    def measure_error(repack: bool) -> float:
        """Of the gradient after a held-out pass."""
        built = build(t5_base, small_data, LOAD_IN_4BIT=True)
        for module in built.captioner.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = repack
        measure_our_losses(built, examples)
        built.learner.backward(examples, 1)
        difference = built.learner.gradient - exact
        return (difference.norm() / exact.norm()).item()

    usual = measure_error(repack=True)  # as bitsandbytes sets it
    ours = measure_error(repack=False)  # as finetune.py does

    assert usual > 0.05
    assert ours == 0
    report(
        "NF4 repacked on a CPU with avx512_bf16. Error of a T5's gradient after a held-out pass",
        f"{usual:.0%}",
        f"{ours:.0%}",
    )
