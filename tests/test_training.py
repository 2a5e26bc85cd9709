"""One row, one step, one adapter: each is compared with something that was computed otherwise."""

import contextlib
import json
import math
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from helpers import rows_of, train
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor

import finetune


def step(built, micro_batch: int = 100) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, by PEFT's names of the weights, of one step on all pairs."""
    rows, weights = rows_of(built), built.learner.adapter_weights
    tokens = sum(built.dataset.token_counts)
    losses = built.learner.backward(rows, tokens, micro_batch)
    parts = built.learner.gradient.clone().split([w.numel() for w in weights.values()])
    return losses.sum().item() / tokens, {
        name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)
    }


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, reference in expected.items():
        assert reference.norm() > 0
        assert (found[name] - reference).norm() <= tolerance * reference.norm(), name


# ---- An independent oracle ----------------------------------------------------------------------


def oracle(folder: str, pairs, prompt: str, limit: int, lora: dict[str, torch.Tensor]):
    """Loss and LoRA gradients of one step, from the live pictures, one unpadded pair at a time.

    Learned are the caption's words, `limit` at most, and the stop token. Of PEFT, only the names
    of the weights in `lora` are used, of finetune.py nothing.
    """
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor, config = Blip2Processor.from_pretrained(folder), model.config.text_config
    tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    model.requires_grad_(False)
    lora = {name: weight.clone().requires_grad_() for name, weight in lora.items()}

    def adapt(a, b):
        scale = 16.0 / 8  # LORA_ALPHA / LORA_RANK
        return lambda module, inputs, output: output + scale * (inputs[0] @ a.T) @ b.T

    for name in (name for name in lora if ".lora_A." in name):
        module = model.get_submodule(re.sub(r"^base_model\.model\.|\.lora_A\..*", "", name))
        module.register_forward_hook(adapt(lora[name], lora[name.replace("lora_A", "lora_B")]))
    is_t5, stop = config.model_type == "t5", torch.tensor([config.eos_token_id])
    assert is_t5 or tokenizer.decode(stop) == "\n"
    total, tokens = torch.zeros(()), 0
    for picture, caption in pairs:
        pixels = processor(images=Image.open(picture).convert("RGB"), return_tensors="pt")
        seen = model.vision_model(pixels["pixel_values"]).last_hidden_state
        queries = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=seen)
        image = model.language_projection(queries.last_hidden_state)
        words = (" " if prompt and not is_t5 else "") + caption
        words = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"][:limit])
        target = torch.cat([words, stop])
        embed = model.get_input_embeddings()
        given = torch.cat([image, embed(torch.tensor([tokenizer(prompt)["input_ids"]]))], dim=1)
        if is_t5:
            start = torch.tensor([config.decoder_start_token_id])
            output = model.language_model(
                inputs_embeds=given, decoder_input_ids=torch.cat([start, words])[None]
            )
        else:
            whole = torch.cat([given, embed(words)[None]], dim=1)
            output = model.language_model(inputs_embeds=whole)
        predicted = torch.log_softmax(output.logits[0, -len(target) :], dim=-1)
        chosen = predicted[torch.arange(len(target)), target]
        total, tokens = total - chosen.sum(), tokens + len(target)
    (total / tokens).backward()
    return (total / tokens).item(), {name: weight.grad for name, weight in lora.items()}


def copy_of_2023(base: str, folder: Path) -> Path:
    """No image token in its config or tokenizer, and no num_query_tokens."""
    shutil.copytree(base, folder)
    for name, change in (
        ("config.json", lambda content: content.pop("image_token_index")),
        ("processor_config.json", lambda content: content.pop("num_query_tokens")),
        (
            "tokenizer.json",
            lambda content: content["added_tokens"].remove(
                next(token for token in content["added_tokens"] if token["content"] == "<image>")
            ),
        ),
    ):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("prompt", ["", "a photo </s> of"])
@pytest.mark.parametrize("targets, limit, old", [
    ("attention", 64, False), ("all-linear", 4, True)])  # fmt: skip
def test_a_step_equals_the_oracle(
    any_base, small_data, build, prompt, targets, limit, old, tmp_path
):
    """With every pair's own picture; in checkpoints of 2023, too."""
    texts = sorted((small_data / "caption").iterdir())
    texts[0].write_text("one star")  # unequal lengths: padding
    texts[1].write_text("emerald </s> disc <image>")  # words, not tokens
    built = build(
        copy_of_2023(any_base, tmp_path / "old") if old else any_base,
        small_data,
        PROMPT=prompt,
        LORA_TARGETS=targets,
        MAX_CAPTION_TOKENS=limit,
    )
    loss, found = step(built)
    expected_loss, expected = oracle(
        any_base, built.pairs, prompt, limit, built.learner.adapter_weights
    )
    assert math.isclose(loss, expected_loss, rel_tol=1e-5)
    assert_close(found, expected, 1e-5)
    for micro_batch in (5, 1):  # however it is split
        split_loss, split = step(built, micro_batch)
        assert math.isclose(loss, split_loss, rel_tol=1e-6)
        assert_close(split, found, 1e-5)


@pytest.mark.parametrize("in_4bit", [True, False])
def test_bfloat16_is_float32_within_its_noise(any_base, small_data, build, in_4bit, tmp_path):
    """LoRA is in bfloat16 there; its gradients are added, and it is kept and saved, in float32."""
    losses, gradients = [], []
    for dtype in ("float32", "bfloat16"):
        built = build(any_base, small_data, DTYPE=dtype, LOAD_IN_4BIT=in_4bit)
        assert {weight.dtype for weight in built.learner.weights} == {built.captioner.dtype}
        losses.append(step(built, 5)[0])
        learner, rows, by_hand = built.learner, rows_of(built), 0
        gradients.append(learner.gradient.clone())
        for start in (0, 5, 10):
            batch = built.captioner.row_builder.collate_fn(rows[start : start + 5])
            loss = built.captioner.losses(batch).sum() / sum(built.dataset.token_counts)
            parts = torch.autograd.grad(loss, learner.weights)
            by_hand = by_hand + torch.cat([part.flatten().float() for part in parts])
        assert (gradients[-1] - by_hand).norm() < 1e-5 * by_hand.norm()
        learner.step(1e-3, 1.0, 1.0)
        finetune.save_adapter(tmp_path, {}, learner)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert {weight.dtype for weight in (learner.master, *saved.values())} == {torch.float32}
        for name, part in learner.adapter_weights.items():
            assert torch.equal(saved[name.replace(".default", "")], part)
    assert math.isclose(*losses, rel_tol=0.02)
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


# ---- What trains, and what stays still ----------------------------------------------------------


@pytest.mark.parametrize("most", [0.02, 0.0])
def test_the_loop_is_adamw_with_clipping_decay_and_rates(most, opt_base, small_data, build):
    """Against a hand-made loop: 2 epochs of 12 pairs in steps of 5, 5 and 2, longest first."""
    for number, text in enumerate((small_data / "caption").iterdir()):
        text.write_text("a red circle " * (number + 1))
    expected = build(opt_base, small_data)
    weights = [p for p in expected.adapter.parameters() if p.requires_grad]
    optimizer, norms = torch.optim.AdamW(weights, weight_decay=0.5), []
    for number in range(6):
        place = number % 3 * 5
        order = finetune.epoch_order(12, expected.settings.SEED, number // 3)[place : place + 5]
        rows = [expected.dataset[i] for i in order]
        optimizer.zero_grad()
        losses = expected.captioner.losses(expected.captioner.row_builder.collate_fn(rows))
        (losses.sum() / sum(expected.dataset.token_counts[i] for i in order)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, most or math.inf).item())
        optimizer.param_groups[0]["lr"] = finetune.learning_rate(number, 6, 0.01, 0.4)
        optimizer.step()
    assert min(norms) > 0.02  # every step was clipped, but with 0

    built, seen = build(opt_base, small_data, WEIGHT_DECAY=0.5), []
    real = built.captioner.losses
    built.captioner.losses = lambda batch: seen.append(batch) or real(batch)
    now = train(
        built, EPOCHS=2, BATCH_SIZE=5, LEARNING_RATE=0.01, MAX_GRAD_NORM=most, WARMUP_FRACTION=0.4
    )
    lengths = [batch.owners.bincount().tolist() for batch in seen]
    assert [len(some) for some in lengths] == [5, 5, 2] * 2
    assert all(some == sorted(some, reverse=True) for some in lengths)
    theirs = torch.cat([p.detach().flatten() for p in weights])
    assert (built.learner.master - theirs).norm() < 1e-4 * theirs.norm()
    assert [row["grad_norm"] for row in now.metrics[1:]] == pytest.approx(norms, rel=1e-3)


def test_order_and_rate_are_pure_functions():
    orders = [finetune.epoch_order(50, 42, epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert finetune.epoch_order(50, 43, 0) != orders[0]
    for fraction in (0.0, 0.05, 1.0):
        rates = [finetune.learning_rate(step, 100, 1e-3, fraction) for step in range(100)]
        assert min(rates) > 0 and max(rates) <= 1e-3
    rates = [finetune.learning_rate(step, 100, 1.0, 0.2) for step in (9, 20, 40, 60, 80)]
    cosine = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert rates == pytest.approx([10 / 21, *cosine])


def test_only_lora_in_the_language_model_trains_and_only_its_dropout_drops(
    any_base, small_data, build
):
    plain = Blip2ForConditionalGeneration.from_pretrained(any_base, dtype=torch.float32)
    plain = dict(plain.named_parameters())
    built, modes = build(any_base, small_data, LORA_DROPOUT=0.5), []
    now = dict(built.adapter.named_parameters())
    before = {name: weight.clone() for name, weight in now.items() if ".lora_" in name}
    real, modules = built.captioner.losses, dict(built.adapter.named_modules())
    built.captioner.losses = lambda rows: (
        modes.append([name for name in modules if modules[name].training]) or real(rows)
    )
    train(built, held_out=built.dataset, EPOCHS=1, LEARNING_RATE=0.01)
    assert modes[0] and all(".lora_dropout" in name for name in modes[0])
    assert modes[-1] == []  # the held-out loss
    assert len(before) > 10 and len(now) == len(before) + len(plain)
    for name, weight in before.items():
        assert "language_model" in name and not torch.equal(now[name], weight)
    frozen = {re.sub(r"^base_model\.model\.|\.base_layer", "", name): now[name] for name in now}
    assert all(torch.equal(weight, frozen[name]) for name, weight in plain.items())


def test_nf4_is_the_language_model_without_its_head_and_trains_as_the_dequantized_weights(
    any_base, small_data, build
):
    """Also after a held-out pass."""
    built, full = (
        build(any_base, small_data, LORA_TARGETS="all-linear", LOAD_IN_4BIT=in_4bit)
        for in_4bit in (True, False)
    )
    loss, found = step(built)
    with torch.no_grad():
        built.captioner.losses(built.captioner.row_builder.collate_fn(rows_of(built)))
        built.captioner.caption(torch.stack([row.features for row in rows_of(built)[:2]]))
    for name, module in built.captioner.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            in_4bit = name.startswith("language_model.") and "lm_head" not in name
            in_4bit &= "DenseReluDense.wo" not in name  # transformers keeps T5's out: it overflows
            assert isinstance(module, Linear4bit) == in_4bit, name
            if in_4bit:
                weight, state = module.weight, module.weight.quant_state
                assert weight.quant_type == "nf4" and state.nested
                assert module.compute_dtype == torch.float32
                same = full.captioner.model.get_submodule(name)
                same.weight.copy_(dequantize_4bit(weight.data, state))
    again, after = step(built)
    assert loss == again and all(torch.equal(found[name], after[name]) for name in found)
    expected_loss, expected = step(full)
    assert math.isclose(loss, expected_loss, rel_tol=1e-4)
    assert_close(found, expected, 1e-3)


def test_float16_trains_with_its_scaler(opt_base, small_data, command, monkeypatch):
    """As on an older GPU; transformers keeps the Q-Former in float32 there."""
    choice = torch.device("cpu"), torch.float16, "as on an older GPU"
    monkeypatch.setattr(finetune, "choose_device", lambda *arguments: choice)
    code, output, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=30,
                                  LEARNING_RATE=3e-3, BATCH_SIZE=4)  # fmt: skip
    assert code == 0, error
    assert "exact:           0 before, 1 after, of 1" in output and " nan" not in output


# ---- Memory -------------------------------------------------------------------------------------


@pytest.fixture
def limited(monkeypatch):
    """limited(most, message, where): no more than `most` rows at a time fit into memory."""
    real = finetune.Captioner.losses

    def limit(most: int, message: str, where: str = "forward") -> None:
        def fail(*_) -> None:
            raise RuntimeError(message)

        def losses(captioner, rows):
            too_much = torch.is_grad_enabled() and len(rows.features) > most
            if too_much and where == "forward":
                fail()
            result = real(captioner, rows)
            if too_much:
                result.register_hook(fail)
            return result

        monkeypatch.setattr(finetune.Captioner, "losses", losses)

    return limit


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_costs_nothing(any_base, small_data, build, limited, capsys, where):
    """12 pairs in steps of 7 and 5: both are halved until 2 fit, and the adapter is the same."""
    adapters = []
    for most in (100, 2):
        built = build(any_base, small_data)
        limited(most, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", where)
        train(built, EPOCHS=2, BATCH_SIZE=7, LEARNING_RATE=3e-3)
        adapters.append(built.learner.master.clone())
    assert (adapters[0] - adapters[1]).norm() <= 1e-5 * adapters[0].norm()
    assert capsys.readouterr().out.count("out of memory:") == 2


@pytest.mark.parametrize("known, message", [
    (True, "CUDA out of memory. Tried to allocate 2.00 GiB."), (True, "CUDA error: out of memory"),
    (True, "CUDA driver error: out of memory"),
    (True, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    (True, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate(handle)"),
    (False, "CUDA driver error: invalid argument"), (False, "CUDA error: device-side assert"),
    (False, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")])  # fmt: skip
def test_one_pair_that_does_not_fit_is_an_error_whoever_says_it(
    known, message, opt_base, small_data, command, limited
):
    limited(0, message)
    with contextlib.nullcontext() if known else pytest.raises(RuntimeError, match=message):
        code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base)
        assert code == 1 and "Lower MAX_CAPTION_TOKENS" in error and message in error


def test_out_of_memory_while_loading_says_so(opt_base, small_data, command, monkeypatch):
    fail = Mock(side_effect=RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    monkeypatch.setattr("transformers.Blip2ForConditionalGeneration.from_pretrained", fail)
    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base)
    assert code == 1 and error.startswith("error: CUDA out of memory.") and "LOAD_IN_4BIT" in error


def test_a_gpu_learns_one_pair_before_the_first_step(opt_base, small_data, build, monkeypatch):
    """The handles of cuBLAS are made then, while there is room."""
    built, calls = build(opt_base, small_data), []
    monkeypatch.setattr(finetune, "add_lora", lambda *_: built.adapter)
    monkeypatch.setattr(finetune.Learner, "backward", lambda _, rows, *more: calls.append(rows))
    nothing = finetune.ImageCaptioningDataset([], {}, built.captioner.row_builder)
    built.captioner.device = torch.device("cuda")
    datasets = finetune.Datasets(built.dataset, nothing, [])
    finetune.start(built.settings, built.captioner, datasets, None)
    assert [len(rows) for rows in calls] == [1]
