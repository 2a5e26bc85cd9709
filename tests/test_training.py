"""One row, one step, one adapter: each is compared with something that was computed otherwise."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor

import finetune


def rows_of(built) -> list[finetune.Row]:
    return [built.dataset[i] for i in range(len(built.dataset))]


def step(built, micro_batch: int = 100) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, by module name, of one step on all pairs."""
    rows = rows_of(built)
    tokens = sum(len(row.learned) for row in rows)
    losses = built.learner.backward(rows, tokens, micro_batch)
    parts = built.learner.master.grad.split([part.numel() for part in built.learner.parts])
    names = [name.removeprefix("base_model.model.").replace(".default.weight", "").replace(
        "lora_", "") for name in built.learner.state_dict]
    shapes = [part.shape for part in built.learner.parts]
    grads = {name: part.view(shape).clone() for name, part, shape
             in zip(names, parts, shapes, strict=True)}
    return losses.sum().item() / tokens, grads


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, reference in expected.items():
        assert reference.norm() > 0
        assert (found[name] - reference).norm() <= tolerance * reference.norm(), name


def run_of(built, folder: Path) -> finetune.Run:
    """Where train() writes, without a command."""
    record = {"settings": {}, "data": ""}
    return finetune.Run(folder, folder, record, Accelerator(cpu=True))


def train(built, held_out=None, **settings) -> finetune.Progress:
    """finetune.train on all pairs, from a start that is not zero; `held_out`: other pairs."""
    vars(built.settings).update(settings)
    held_out = held_out or finetune.ImageCaptioningDataset([], built.slots, built.captioner)
    datasets = finetune.Datasets(built.dataset, held_out, [])
    first = dict.fromkeys(finetune.METRICS, math.nan) | {"step": 0, "seconds": 0.0}
    now = finetune.Progress([], [first], torch.zeros(len(built.dataset)))
    finetune.train(built.settings, built.learner, datasets, now,
                   run_of(built, Path(built.settings.OUTPUT_DIR)))
    return now


# ---- Rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "a photo of"])
@pytest.mark.parametrize("limit", [64, 3])
def test_what_is_learned_is_the_caption_and_the_stop_token(
    any_base, small_data, build, prompt, limit
):
    texts = sorted((small_data / "caption").iterdir())
    texts[1].write_text("emerald </s> disc <image>")  # words, not tokens
    built = build(any_base, small_data, PROMPT=prompt, MAX_CAPTION_TOKENS=limit)
    processor, is_t5 = Blip2Processor.from_pretrained(any_base), built.captioner.is_t5
    stop = built.captioner.model.config.text_config.eos_token_id
    assert is_t5 or processor.tokenizer.decode([stop]) == "\n"
    plain = AutoTokenizer.from_pretrained(any_base, split_special_tokens=True)
    assert built.captioner.prefix == plain(prompt)["input_ids"]
    for pair, row in zip(built.pairs, rows_of(built), strict=True):
        space = " " if prompt and not is_t5 else ""
        caption = plain(space + pair.caption, add_special_tokens=False)["input_ids"][:limit]
        assert row.learned == [*caption, stop] and row.features.shape[0] == 8


# ---- An independent oracle ----------------------------------------------------------------------


def oracle(folder: str, pairs, prompt: str, lora: dict[str, torch.Tensor], scale: float):
    """Loss and LoRA gradients of one step, from the live pictures, one unpadded pair at a time.

    `lora` maps "<module>.A" and "<module>.B" to weights. Nothing of PEFT or finetune.py is used.
    """
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Blip2Processor.from_pretrained(folder)
    tokenizer, config = processor.tokenizer, model.config
    model.requires_grad_(False)
    lora = {name: weight.clone().requires_grad_() for name, weight in lora.items()}

    def adapt(name):
        def hook(module, inputs, output):
            return output + scale * (inputs[0] @ lora[f"{name}.A"].T) @ lora[f"{name}.B"].T
        return hook  # fmt: skip

    for name in {name[:-2] for name in lora}:
        model.get_submodule(name).register_forward_hook(adapt(name))
    is_t5 = config.text_config.model_type == "t5"
    stop = torch.tensor([config.text_config.eos_token_id])
    total, tokens = torch.zeros(()), 0
    for picture, caption in pairs:
        pixels = processor(images=Image.open(picture).convert("RGB"), return_tensors="pt")
        seen = model.vision_model(pixels["pixel_values"]).last_hidden_state
        queries = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=seen)
        image = model.language_projection(queries.last_hidden_state)
        words = (" " if prompt and not is_t5 else "") + caption
        words = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])
        target = torch.cat([words, stop])
        embed = model.get_input_embeddings()
        given = embed(torch.tensor([tokenizer(prompt)["input_ids"]]))
        if is_t5:
            start = torch.tensor([config.text_config.decoder_start_token_id])
            logits = model.language_model(
                inputs_embeds=torch.cat([image, given], dim=1),
                decoder_input_ids=torch.cat([start, words])[None],
            ).logits[0]
        else:
            whole = torch.cat([image, given, embed(words)[None]], dim=1)
            logits = model.language_model(inputs_embeds=whole).logits[0, -len(target) :]
        chosen = torch.log_softmax(logits, dim=-1)[torch.arange(len(target)), target]
        total, tokens = total - chosen.sum(), tokens + len(target)
    (total / tokens).backward()
    return (total / tokens).item(), {name: weight.grad for name, weight in lora.items()}


@pytest.mark.parametrize("prompt", ["", "a photo of"])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_a_step_equals_the_oracle(any_base, small_data, build, prompt, targets):
    next((small_data / "caption").iterdir()).write_text("one star")  # unequal lengths: padding
    built = build(any_base, small_data, PROMPT=prompt, LORA_TARGETS=targets)
    loss, found = step(built)
    lora = dict(zip(found, built.learner.parts, strict=True))
    expected_loss, expected = oracle(any_base, built.pairs, prompt, lora, scale=16.0 / 8)
    assert math.isclose(loss, expected_loss, rel_tol=1e-5)
    assert_close(found, expected, 1e-5)
    for micro_batch in (5, 1):  # however it is split
        split_loss, split = step(built, micro_batch)
        assert math.isclose(loss, split_loss, rel_tol=1e-6)
        assert_close(split, found, 1e-5)


@pytest.mark.parametrize("in_4bit", [True, False])
def test_bfloat16_is_float32_within_its_noise(any_base, small_data, build, in_4bit):
    """LoRA is in bfloat16 there, its gradients are added in float32, masters are float32."""
    losses, gradients = [], []
    for dtype in ("float32", "bfloat16"):
        built = build(any_base, small_data, DTYPE=dtype, LOAD_IN_4BIT=in_4bit)
        assert {weight.dtype for weight in built.learner.weights} == {built.captioner.dtype}
        assert built.learner.master.dtype == torch.float32
        losses.append(step(built, 5)[0])
        gradients.append(built.learner.master.grad)
    assert math.isclose(*losses, rel_tol=0.02)
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


# ---- What trains, and what stays still ----------------------------------------------------------


def test_the_loop_is_adamw_with_clipping_decay_and_the_learning_rates(
    opt_base, small_data, build, monkeypatch, tmp_path
):
    """Against a hand-made loop: 2 epochs of 12 pairs in steps of 5, 5 and 2, longest first."""
    settings = {"EPOCHS": 2, "BATCH_SIZE": 5, "LEARNING_RATE": 0.01, "WEIGHT_DECAY": 0.5,
                "MAX_GRAD_NORM": 0.02, "WARMUP_FRACTION": 0.4}  # fmt: skip
    for number, text in enumerate((small_data / "caption").iterdir()):
        text.write_text("a red circle " * (number + 1))
    expected = build(opt_base, small_data)
    weights = [p for p in expected.adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.5)
    norms = []
    for number in range(6):
        place = number % 3 * 5
        order = finetune.epoch_order(12, expected.settings.SEED, number // 3)[place : place + 5]
        rows = [expected.dataset[i] for i in order]
        optimizer.zero_grad()
        losses = expected.captioner.losses(rows)
        (losses.sum() / sum(len(row.learned) for row in rows)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, 0.02).item())
        optimizer.param_groups[0]["lr"] = finetune.learning_rate(number, 6, 0.01, 0.4)
        optimizer.step()
    assert min(norms) > 0.02  # every step was clipped

    built, lengths, real = build(opt_base, small_data, WEIGHT_DECAY=0.5), [], None
    real = built.captioner.losses

    def watched(rows):
        lengths.append([len(row.learned) for row in rows])
        return real(rows)

    monkeypatch.setattr(built.captioner, "losses", watched)
    now = train(built, **settings)
    assert [len(some) for some in lengths] == [5, 5, 2] * 2
    assert all(some == sorted(some, reverse=True) for some in lengths)
    theirs = torch.cat([p.detach().flatten() for p in weights])
    assert (built.learner.master - theirs).norm() < 1e-4 * theirs.norm()
    logged = [row["grad_norm"] for row in now.metrics[1:]]
    assert logged == pytest.approx(norms, rel=1e-3)


def test_order_and_rate_are_pure_functions():
    orders = [finetune.epoch_order(50, 42, epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert finetune.epoch_order(50, 43, 0) != orders[0]
    for fraction in (0.0, 0.05, 1.0):
        rates = [finetune.learning_rate(step, 100, 1e-3, fraction) for step in range(100)]
        assert min(rates) > 0 and max(rates) <= 1e-3


def test_only_lora_in_the_language_model_trains_and_only_its_dropout_drops(
    any_base, small_data, build, monkeypatch
):
    plain = Blip2ForConditionalGeneration.from_pretrained(any_base, dtype=torch.float32)
    built = build(any_base, small_data, LORA_DROPOUT=0.5)
    before = {n: p.clone() for n, p in built.adapter.named_parameters()}
    modes, real = [], built.captioner.losses

    def watched(rows):
        modes.append({n for n, m in built.adapter.named_modules() if m.training})
        return real(rows)

    monkeypatch.setattr(built.captioner, "losses", watched)
    train(built, held_out=built.dataset, EPOCHS=1, LEARNING_RATE=0.01)
    assert modes[0] and all(".lora_dropout" in name for name in modes[0])
    assert modes[-1] == set()  # the held-out loss
    changed = {n for n, p in built.adapter.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".lora_" in n} and len(changed) > 10
    assert all("language_model" in name for name in changed)
    for name, parameter in plain.named_parameters():
        wrapped = f"base_model.model.{name}"
        if wrapped not in before:
            wrapped = re.sub(r"\.(weight|bias)$", r".base_layer.\1", wrapped)
        assert torch.equal(parameter, before[wrapped])


def test_nf4_is_the_language_model_without_its_head(any_base, small_data, build):
    built = build(any_base, small_data, LOAD_IN_4BIT=True, LORA_TARGETS="all-linear")
    kinds = {n: m for n, m in built.captioner.model.named_modules()
             if isinstance(m, torch.nn.Linear) and "lora_" not in n}  # fmt: skip
    for name, module in kinds.items():
        in_4_bits = name.startswith("language_model.") and "lm_head" not in name
        in_4_bits &= "DenseReluDense.wo" not in name  # transformers keeps T5's out: it overflows
        assert isinstance(module, Linear4bit) == in_4_bits, name
        if in_4_bits:
            assert module.weight.quant_type == "nf4" and module.weight.quant_state.nested
            assert module.compute_dtype == torch.float32


def test_nf4_gradients_are_those_of_the_dequantized_weights_also_after_a_held_out_pass(
    any_base, small_data, build
):
    built, full = build(any_base, small_data, LOAD_IN_4BIT=True), build(any_base, small_data)
    loss, found = step(built)
    with torch.no_grad():
        built.captioner.losses(rows_of(built))
        built.captioner.caption([row.features for row in rows_of(built)[:2]])
        for name, module in built.captioner.model.named_modules():
            if isinstance(module, Linear4bit):
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                full.captioner.model.get_submodule(name).weight.copy_(weight)
    again, after = step(built)
    assert loss == again and all(torch.equal(found[name], after[name]) for name in found)
    expected_loss, expected = step(full)
    assert math.isclose(loss, expected_loss, rel_tol=1e-4)
    assert_close(found, expected, 1e-3)


# ---- The picture, the captions, the adapter ------------------------------------------------------


def test_the_loss_changes_with_the_picture_also_in_a_checkpoint_of_2023(
    any_base, small_data, build, tmp_path
):
    """That has no image token in its config or tokenizer, and no num_query_tokens."""
    old = tmp_path / "old"
    shutil.copytree(any_base, old)
    for name, entry in (("config.json", "image_token_index"),
                        ("processor_config.json", "num_query_tokens")):
        content = json.loads((old / name).read_text())
        del content[entry]
        (old / name).write_text(json.dumps(content))
    tokenizer = json.loads((old / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<image>"]
    (old / "tokenizer.json").write_text(json.dumps(tokenizer))
    losses = []
    for base in (any_base, old):
        built = build(base, small_data)
        row, other = built.dataset[0], built.dataset[len(built.dataset) - 1]
        assert not torch.equal(row.features, other.features)
        with torch.no_grad():
            losses.append(built.captioner.losses([row, row._replace(features=other.features)]))
    assert torch.equal(*losses)
    assert abs(losses[0][0] - losses[0][1]) > 1e-3 * losses[0][0]


def test_captions_end_by_the_stop_token(opt_base, small_data, build):
    built = build(opt_base, small_data, PROMPT="a photo of", MAX_CAPTION_TOKENS=30)
    captions = built.captioner.caption([row.features for row in rows_of(built)])
    assert len(captions) == len(built.pairs)
    for text, _ in captions:
        assert text and "a photo of" not in text and "<" not in text and "\n" not in text
        assert len(built.captioner.tokenize(text)) < 30  # the limit did not end them


def test_the_adapter_gives_plain_peft_the_same_loss(any_base, small_data, build, tmp_path):
    built = build(any_base, small_data, PROMPT="a photo of")
    finetune.save_adapter(tmp_path / "adapter", {}, built.learner)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    plain = Blip2ForConditionalGeneration.from_pretrained(any_base, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    processor = Blip2Processor.from_pretrained(tmp_path / "adapter")
    row = built.dataset[0]
    picture = Image.open(built.pairs[0].picture)
    inputs = processor(images=picture, text="a photo of", return_tensors="pt")
    labels = torch.tensor(row.learned)
    if built.captioner.is_t5:
        inputs["labels"] = labels[None]
    else:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], labels[None]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = plain(**inputs).logits[0]
        logits = logits if built.captioner.is_t5 else logits[-1 - len(labels) : -1]
        chosen = -torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels].sum()
        found = built.captioner.losses([row])[0]
    assert math.isclose(chosen.item(), found.item(), rel_tol=1e-5)


def test_what_is_kept_is_the_best_and_not_the_last(opt_base, small_data, build):
    """Trained on other captions than those of the held-out pairs, which get worse some day."""
    built = build(opt_base, small_data)
    held_out = finetune.ImageCaptioningDataset(built.pairs, built.slots, built.captioner)
    first = built.pairs[0].caption
    built.dataset.learned = dict.fromkeys(built.dataset.learned, built.dataset.learned[first])
    now = train(built, held_out, EPOCHS=8, LEARNING_RATE=3e-3)
    assert now.best_step < 8
    assert math.isclose(finetune.held_out_loss(held_out), now.best, abs_tol=1e-6)


def test_float16_trains_with_its_scaler(opt_base, small_data, command, monkeypatch):
    """As on an older GPU; transformers keeps the Q-Former in float32 there."""
    choice = torch.device("cpu"), torch.float16, "as on an older GPU"
    monkeypatch.setattr(finetune, "choose_device", lambda *arguments: choice)
    code, output, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=30,
                                  LEARNING_RATE=3e-3, BATCH_SIZE=4)  # fmt: skip
    assert code == 0, error
    assert "exact:           0 before, 1 after, of 1" in output and " nan" not in output


# ---- Memory -------------------------------------------------------------------------------------


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("CUDA error: out of memory")


@pytest.fixture
def limited(monkeypatch):
    """limited(most, message, where): no more than `most` rows at a time fit into memory."""
    real, sizes = finetune.Captioner.losses, []

    def limit(most: int, message: str, where: str = "forward") -> list[int]:
        def losses(captioner, rows):
            if torch.is_grad_enabled():
                sizes.append(len(rows))
                if len(rows) > most and where == "forward":
                    raise RuntimeError(message)
            result = real(captioner, rows)
            too_much = torch.is_grad_enabled() and len(rows) > most
            return FailingBackward.apply(result) if too_much else result

        monkeypatch.setattr(finetune.Captioner, "losses", losses)
        return sizes

    return limit


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_costs_nothing(any_base, small_data, build, limited, capsys, where):
    """12 pairs in steps of 7 and 5: both are halved until 2 fit, and the adapter is the same."""
    adapters = []
    for most in (100, 2):
        built = build(any_base, small_data)
        sizes = limited(most, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", where)
        train(built, EPOCHS=2, BATCH_SIZE=7, LEARNING_RATE=3e-3)
        adapters.append(built.learner.master.detach().clone())
    assert (adapters[0] - adapters[1]).norm() <= 1e-5 * adapters[0].norm()
    assert sizes[-1] <= 2 and capsys.readouterr().out.count("out of memory:") == 2


def test_one_pair_that_does_not_fit_is_an_error_with_its_message(
    opt_base, small_data, command, limited
):
    message = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate(handle)"
    limited(0, message)
    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base)
    assert code == 1 and "Lower MAX_CAPTION_TOKENS" in error and message in error


@pytest.mark.parametrize("message, known", [
    ("CUDA out of memory. Tried to allocate 2.00 GiB.", True), ("CUDA error: out of memory", True),
    ("CUDA driver error: out of memory", True),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)", True),
    ("CUDA driver error: invalid argument", False), ("CUDA error: device-side assert", False),
    ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False)])  # fmt: skip
def test_out_of_memory_is_known_whoever_says_it(message, known):
    assert finetune.is_out_of_memory(RuntimeError(message)) == known
