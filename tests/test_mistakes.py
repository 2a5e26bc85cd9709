"""What goes wrong in the usual recipes, each reproduced with its number, beside finetune.py.

    python -m pytest tests/test_mistakes.py     prints the table that is in the README
"""

import math

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from PIL import Image
from transformers import BitsAndBytesConfig, Blip2ForConditionalGeneration, Blip2Processor

import finetune


def plain_model(folder: str, in_4bit: bool = False) -> Blip2ForConditionalGeneration:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=finetune.UNQUANTIZED,
    )  # fmt: skip
    return Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, quantization_config=nf4 if in_4bit else None
    )


def live_inputs(folder: str, pair: finetune.Pair) -> dict[str, torch.Tensor]:
    """Picture, image tokens, BOS and caption, from the processor alone."""
    processor = Blip2Processor.from_pretrained(folder)
    return processor(images=Image.open(pair.picture), text=pair.caption, return_tensors="pt")


def our_loss(built, rows) -> float:
    with torch.no_grad():
        losses = finetune.pair_losses(built.model, rows, built.base)
    return losses.sum().item() / finetune.count_tokens(rows)


def test_blind_to_the_picture(opt_base, small_data, build, report):
    """The tokenizer on the caption alone: no image tokens, so nothing is put in their place."""
    built = build(opt_base, small_data)
    model, processor = plain_model(opt_base).eval(), Blip2Processor.from_pretrained(opt_base)
    one, other = built.pairs[0], built.pairs[-1]
    assert one.caption != other.caption
    text = processor.tokenizer(one.caption, return_tensors="pt")
    with torch.no_grad():
        usual = [
            model(**text, pixel_values=live_inputs(opt_base, pair)["pixel_values"],
                  labels=text["input_ids"]).loss.item() for pair in (one, other)
        ]  # fmt: skip
    row = built.dataset[0]
    ours = [our_loss(built, [row | {"features": built.store[p.picture]}]) for p in (one, other)]
    assert usual[0] == usual[1]
    assert ours[1] > 2 * ours[0]
    report("Blind: the caption is tokenized without image tokens. Loss with its own picture, and "
           "with another one", f"{usual[0]:.3f}, {usual[1]:.3f}", f"{ours[0]:.3f}, {ours[1]:.3f}")


def test_no_stop_token(opt_base, small_data, build, report, tmp_path):
    """Captions shorter than those that the base writes: only a stop token can end them there."""
    for text in (small_data / "caption").iterdir():
        text.write_text(text.read_text().split(" over ")[0])
    right = {}
    for name in ("usual", "ours"):
        built = build(opt_base, small_data)
        if name == "usual":
            for ids in built.tokenized.values():
                assert ids.pop() == built.base.stop
        settings = finetune.parse_arguments(["--epochs=40", "--learning-rate=3e-3",
                                             f"--output-dir={tmp_path / name}"])  # fmt: skip
        (tmp_path / name).mkdir()
        finetune.train(settings, Accelerator(cpu=True), built.model, built.dataset, built.dataset)
        captions = finetune.caption_dataset(built.model, built.dataset, 64)
        expected = [pair.caption for pair in built.pairs]
        right[name] = sum(a == b for a, b in zip(captions, expected, strict=True))
        begun = sum(a.startswith(b) for a, b in zip(captions, expected, strict=True))
        assert begun == len(expected)  # the words themselves are learned either way
    assert right["usual"] == 0 and right["ours"] == len(expected)
    report("Run-on: no stop token among the labels. Captions that end where they should",
           f"{right['usual']} of {len(expected)}", f"{right['ours']} of {len(expected)}")


def test_padding_scored(opt_base, small_data, build, report):
    """labels = input_ids, padding and image tokens included, as in most notebooks."""
    texts = sorted((small_data / "caption").iterdir())
    texts[0].write_text("circle")
    built = build(opt_base, small_data)
    short, long = built.dataset[0], built.dataset[len(built.pairs) - 1]
    assert len(long["labels"]) > len(short["labels"]) + 3
    model, losses = plain_model(opt_base).eval(), {"usual": [], "ours": []}
    for rows in ([short], [short, long]):
        ids = finetune.collate_fn(rows, built.base.pad)["input_ids"][:1]
        picture = live_inputs(opt_base, built.pairs[0])["pixel_values"]
        with torch.no_grad():
            losses["usual"].append(model(pixel_values=picture, input_ids=ids, labels=ids).loss)
            summed = finetune.pair_losses(built.model, rows, built.base)[0]
        losses["ours"].append(summed / finetune.count_tokens([short]))
    usual, ours = ([loss.item() for loss in losses[name]] for name in ("usual", "ours"))
    assert abs(usual[1] - usual[0]) > 0.5
    assert math.isclose(*ours, rel_tol=1e-5)
    report("Padding scored. Loss of one short caption alone, and beside a longer one",
           f"{usual[0]:.3f}, {usual[1]:.3f}", f"{ours[0]:.3f}, {ours[1]:.3f}")


def test_gradients_through_the_vision_tower(opt_base, small_data, build, report):
    """prepare_model_for_kbit_training makes the input of frozen layers ask for gradients."""
    built = build(opt_base, small_data, in_4bit=True)
    usual = prepare_model_for_kbit_training(plain_model(opt_base, in_4bit=True))
    usual = get_peft_model(usual, LoraConfig(target_modules=finetune.LORA_PATTERNS["attention"]))
    usual.train()
    counts = []
    for model in (usual, built.model):
        reached = set()
        layers = [*model.vision_model.encoder.layers, *model.qformer.encoder.layer]
        for layer in layers:
            layer.register_full_backward_hook(lambda module, *_, seen=reached: seen.add(module))
        if model is usual:
            inputs = live_inputs(opt_base, built.pairs[0])
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        else:
            finetune.pair_losses(model, [built.dataset[0]], built.base).sum().backward()
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
    ours = [our_loss(built, [built.dataset[0]]) for _ in range(20)]
    spread = [(max(losses) - min(losses)) / min(losses) for losses in (usual, ours)]
    assert spread[0] > 0.05 and spread[1] == 0
    report("Dropout in frozen parts. Spread of one pair's loss, with no dropout asked for",
           f"{spread[0]:.0%}", f"{spread[1]:.0%}")


@pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with avx512_bf16")
def test_nf4_repacked_on_the_cpu(t5_base, small_data, build, report):
    """A held-out pass in eval mode repacks 4-bit weights in place, for inference only; silently."""
    built = build(t5_base, small_data, in_4bit=True)
    weights = {n: p.detach() for n, p in built.model.named_parameters() if p.requires_grad}
    usual = plain_model(t5_base, in_4bit=True).eval()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=finetune.LORA_PATTERNS["attention"])
    usual = get_peft_model(usual, config).eval()
    exact = build(t5_base, small_data)  # unquantized, then given the dequantized weights
    with torch.no_grad():
        for name, module in built.base.model.named_modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                data = dequantize_4bit(module.weight.data, module.weight.quant_state)
                exact.base.model.get_submodule(name).weight.copy_(data)
    grads = []
    for model in (usual, built.model, exact.model):
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])
        rows = [built.dataset[i] for i in range(len(built.pairs))]
        with torch.no_grad():
            finetune.pair_losses(model, rows, built.base)
        finetune.pair_losses(model, rows, built.base).sum().backward()
        parts = [p.grad.flatten() for n, p in model.named_parameters() if n in weights]
        grads.append(torch.cat(parts))
    errors = [((grad - grads[2]).norm() / grads[2].norm()).item() for grad in grads[:2]]
    assert errors[0] > 0.05 and errors[1] < 1e-3
    report("NF4 repacked on a CPU with avx512_bf16. Error of a T5's gradient after a held-out pass",
           f"{errors[0]:.0%}", f"{errors[1]:.0%}")
