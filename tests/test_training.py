"""One row, one step, one adapter: each is compared with something that was computed otherwise."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from helpers import flags_of, read_table, rows_of, train
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor

import finetune


class Step(NamedTuple):
    loss: float  # per token
    gradients: dict[str, torch.Tensor]  # by PEFT's names of the weights


def compute_losses(built: SimpleNamespace, rows: list[finetune.Example]) -> torch.Tensor:
    """Of each row, summed over its tokens."""
    batch = built.captioner.row_builder.collate_fn(rows)
    return built.captioner.losses(batch)


def compute_step(built: SimpleNamespace, micro_batch: int = 100) -> Step:
    """The loss and the gradients of one step on all pairs; no weight is changed."""
    tokens = sum(built.dataset.token_counts)
    built.learner.part_size.size = micro_batch
    losses = built.learner.backward(rows_of(built), tokens)

    weights = built.learner.adapter_weights
    sizes = [weight.numel() for weight in weights.values()]
    parts = built.learner.gradient.clone().split(sizes)
    gradients = {}
    for name, part in zip(weights, parts, strict=True):
        gradients[name] = part.view_as(weights[name])
    return Step(losses.sum().item() / tokens, gradients)


def assert_close(found: Step, expected: Step, tolerance: float) -> None:
    """The tolerance is relative; that of the gradients is for the norm of each weight's."""
    assert math.isclose(found.loss, expected.loss, rel_tol=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    assert len(found.gradients) > 10
    for name, reference in expected.gradients.items():
        assert reference.norm() > 0, name
        difference = (found.gradients[name] - reference).norm()
        assert difference <= tolerance * reference.norm(), name


# ---- An independent oracle ----------------------------------------------------------------------


def plain_name(name: str) -> str:
    """The name of a module of the base, of what PEFT has made of it."""
    return re.sub(r"^base_model\.model\.|\.lora_A\..*|\.base_layer", "", name)


def add_plain_lora(model: torch.nn.Module, lora: dict[str, torch.Tensor]) -> None:
    """Adds LORA_ALPHA / LORA_RANK * B A x to the outputs of the layers that `lora` names."""

    def make_hook(a: torch.Tensor, b: torch.Tensor) -> Callable:
        def hook(module, inputs, output):
            return output + 16.0 / 8 * (inputs[0] @ a.T) @ b.T

        return hook

    for name, a in lora.items():
        if ".lora_A." in name:
            b = lora[name.replace("lora_A", "lora_B")]
            model.get_submodule(plain_name(name)).register_forward_hook(make_hook(a, b))


class Oracle:
    """A step as transformers alone would do it: live pictures, one unpadded pair at a time.

    Of PEFT, it uses only the names of the weights; of finetune.py, nothing.
    """

    def __init__(self, folder: str, prompt: str, limit: int) -> None:
        self.model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.processor = Blip2Processor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
        self.config = self.model.config.text_config
        self.is_t5 = self.config.model_type == "t5"
        self.prompt = prompt
        self.limit = limit
        if not self.is_t5:
            assert self.tokenizer.decode([self.config.eos_token_id]) == "\n"

    def see(self, picture: str) -> torch.Tensor:
        """What the language model is given of a picture, (1, query tokens, width)."""
        image = Image.open(picture).convert("RGB")
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        patches = self.model.vision_model(pixels).last_hidden_state
        queries = self.model.qformer(
            query_embeds=self.model.query_tokens, encoder_hidden_states=patches
        )
        return self.model.language_projection(queries.last_hidden_state)

    def compute_loss(self, pair: finetune.Pair) -> tuple[torch.Tensor, int]:
        """Summed over the caption's tokens, `limit` at most, and the stop token; their number."""
        text = pair.caption
        if self.prompt and not self.is_t5:
            text = " " + text
        words = self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.limit]
        targets = torch.tensor([*words, self.config.eos_token_id])

        embed = self.model.get_input_embeddings()
        prompt = torch.tensor([self.tokenizer(self.prompt)["input_ids"]])
        given = torch.cat([self.see(pair.picture), embed(prompt)], dim=1)
        known = torch.tensor([words], dtype=torch.long)
        if self.is_t5:
            start = torch.tensor([[self.config.decoder_start_token_id]])
            output = self.model.language_model(
                inputs_embeds=given, decoder_input_ids=torch.cat([start, known], dim=1)
            )
        else:
            inputs = torch.cat([given, embed(known)], dim=1)
            output = self.model.language_model(inputs_embeds=inputs)
        predicted = torch.log_softmax(output.logits[0, -len(targets) :], dim=-1)
        return -predicted[range(len(targets)), targets].sum(), len(targets)

    def compute_step(self, pairs: list[finetune.Pair], lora: dict[str, torch.Tensor]) -> Step:
        lora = {name: weight.clone().requires_grad_() for name, weight in lora.items()}
        add_plain_lora(self.model, lora)
        total = torch.zeros(())
        tokens = 0
        for pair in pairs:
            loss, count = self.compute_loss(pair)
            total = total + loss
            tokens += count
        mean = total / tokens
        mean.backward()
        return Step(mean.item(), {name: weight.grad for name, weight in lora.items()})


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_base_of_2023(base: str, folder: Path) -> str:
    """A copy without an image token in config and tokenizer, and without num_query_tokens."""

    def remove_image_token(tokenizer: dict) -> None:
        others = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
        tokenizer["added_tokens"] = others

    shutil.copytree(base, folder)
    edit_json(folder / "config.json", lambda config: config.pop("image_token_index"))
    edit_json(folder / "processor_config.json", lambda config: config.pop("num_query_tokens"))
    edit_json(folder / "tokenizer.json", remove_image_token)
    return str(folder)


@pytest.mark.parametrize("prompt", ["", "a photo </s> of"])
@pytest.mark.parametrize("targets, limit", [("attention", 64), ("all-linear", 4)])
def test_a_step_equals_the_oracle_however_it_is_split(
    any_base, small_data, build, prompt, targets, limit
):
    """The captions have unequal lengths, so that there is padding, and words like tokens."""
    captions = sorted((small_data / "caption").iterdir())
    captions[0].write_text("one star")
    captions[1].write_text("emerald </s> disc <image>")
    built = build(
        any_base, small_data, PROMPT=prompt, LORA_TARGETS=targets, MAX_CAPTION_TOKENS=limit
    )
    oracle = Oracle(any_base, prompt, limit)

    expected = oracle.compute_step(built.pairs, built.learner.adapter_weights)

    for micro_batch in (12, 5, 1):
        assert_close(compute_step(built, micro_batch), expected, 1e-5)


def test_a_step_of_a_base_of_2023_is_that_of_the_same_base_today(
    any_base, small_data, build, tmp_path
):
    old_base = make_base_of_2023(any_base, tmp_path / "old")
    caption = next((small_data / "caption").iterdir())
    caption.write_text("emerald </s> disc <image>")

    old = compute_step(build(old_base, small_data, PROMPT="a photo </s> of"))
    new = compute_step(build(any_base, small_data, PROMPT="a photo </s> of"))

    assert_close(old, new, 1e-5)


def test_all_weights_are_those_of_the_file(any_base):
    """The head of a Flan-T5 is not its embedding, though transformers' config says so."""
    flags = flags_of({"MODEL_ID": any_base, "LOAD_IN_4BIT": False})

    captioner = finetune.load_captioner(finetune.parse_arguments(flags))

    weights = load_file(Path(any_base, "model.safetensors"))
    assert ("language_model.lm_head.weight" in weights) == captioner.row_builder.is_t5
    for name, weight in weights.items():
        assert torch.equal(captioner.model.get_parameter(name), weight.float()), name


# ---- Dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_4bit", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_added_and_weights_kept_and_saved_in_float32(
    any_base, small_data, build, dtype, in_4bit, tmp_path
):
    """Whatever the model's dtype, which is also that of its LoRA weights."""
    built = build(any_base, small_data, DTYPE=dtype, LOAD_IN_4BIT=in_4bit)
    learner = built.learner
    assert {str(weight.dtype) for weight in learner.weights} == {f"torch.{dtype}"}
    rows = rows_of(built)
    tokens = sum(built.dataset.token_counts)
    by_hand = torch.zeros_like(learner.master)
    for start in (0, 5, 10):
        loss = compute_losses(built, rows[start : start + 5]).sum() / tokens
        gradients = torch.autograd.grad(loss, learner.weights)
        by_hand += torch.cat([gradient.flatten().float() for gradient in gradients])

    compute_step(built, micro_batch=5)
    learner_gradient = learner.gradient.clone()
    learner.step(rate=1e-3, norm=1.0, max_norm=1.0)
    finetune.save_adapter(tmp_path, {}, learner)

    assert (learner_gradient - by_hand).norm() < 1e-5 * by_hand.norm()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(learner.adapter_weights)
    for name, weight in learner.adapter_weights.items():
        assert weight.dtype == torch.float32
        saved_weight = saved[name.replace(".default", "")]
        assert saved_weight.dtype == torch.float32
        assert torch.equal(saved_weight, weight), name


@pytest.mark.parametrize("in_4bit", [True, False])
def test_bfloat16_is_float32_within_its_noise(any_base, small_data, build, in_4bit):
    losses = []
    gradients = []
    for dtype in ("float32", "bfloat16"):
        built = build(any_base, small_data, DTYPE=dtype, LOAD_IN_4BIT=in_4bit)
        losses.append(compute_step(built, micro_batch=5).loss)
        gradients.append(built.learner.gradient)

    assert math.isclose(losses[0], losses[1], rel_tol=0.02)
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


@pytest.fixture
def older_gpu(monkeypatch):
    """Runs are in float16, as on an older GPU, where transformers keeps the Q-Former in float32."""
    choice = (torch.device("cpu"), torch.float16, "as on an older GPU")
    monkeypatch.setattr(finetune, "choose_device", lambda *arguments: choice)


def test_float16_trains_with_its_scaler(older_gpu, opt_base, small_data, command):
    code, output, error = command(
        TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=12, LEARNING_RATE=3e-3, BATCH_SIZE=4
    )

    assert code == 0, error
    assert "exact:           0 before, 1 after, of 1" in output
    assert " nan" not in output


class Float16Run(NamedTuple):
    attempts: int  # at steps: gradients that were computed
    metrics: list[dict[str, str]]  # the rows of metrics.csv
    weights: dict[str, torch.Tensor]  # of the adapter


@pytest.fixture
def train_float16(older_gpu, opt_base, small_data, command, monkeypatch, tmp_path):
    """train_float16("name", init_scale=...): a run of 6 steps, with these options of GradScaler."""
    real_scaler = torch.amp.GradScaler
    real_backward = finetune.Learner.backward

    def run(name: str, **options) -> Float16Run:
        attempts = []

        def make_scaler(device: str, enabled: bool) -> torch.amp.GradScaler:
            return real_scaler(device, enabled=enabled, **options)

        def backward(learner, examples, tokens):
            attempts.append(len(examples))
            return real_backward(learner, examples, tokens)

        monkeypatch.setattr(torch.amp, "GradScaler", make_scaler)
        monkeypatch.setattr(finetune.Learner, "backward", backward)
        output = tmp_path / name
        code, _, error = command(
            TRAIN_DIR=small_data,
            MODEL_ID=opt_base,
            OUTPUT_DIR=output,
            EPOCHS=2,
            BATCH_SIZE=4,
            LEARNING_RATE=3e-3,
            LORA_DROPOUT=0.3,
            VALIDATION_FRACTION=0,
        )
        assert code == 0, error
        weights = load_file(output / "adapter_model.safetensors")
        return Float16Run(len(attempts), read_table(output / "metrics.csv"), weights)

    return run


def test_a_float16_step_whose_gradient_overflows_is_taken_again_and_counts_once(train_float16):
    """The run is that of a scale that was right from the start: one attempt later it is."""
    usual = train_float16("usual", init_scale=2.0**16)
    overflowed = train_float16("overflowed", init_scale=2.0**40, backoff_factor=2.0**-24)

    assert usual.attempts == 6
    assert overflowed.attempts == 7
    assert [row["step"] for row in overflowed.metrics] == ["0", "1", "2", "3", "4", "5", "6"]
    rates = [float(row["learning_rate"]) for row in overflowed.metrics[1:]]
    assert rates == [finetune.learning_rate(step, 6, 3e-3, 0.05) for step in range(6)]

    # The first attempt's norm, which is infinite, is not among them; dropout's noise is as it was.
    for found, expected in zip(overflowed.metrics[1:], usual.metrics[1:], strict=True):
        for column in ("train_loss", "grad_norm"):
            assert math.isfinite(float(found[column]))
            assert float(found[column]) == pytest.approx(float(expected[column]), rel=1e-6)
    assert overflowed.weights.keys() == usual.weights.keys()
    for name, weight in usual.weights.items():
        torch.testing.assert_close(overflowed.weights[name], weight, rtol=1e-6, atol=1e-9, msg=name)


def test_a_float16_gradient_that_overflows_at_any_scale_ends_the_run(
    older_gpu, opt_base, small_data, refused, monkeypatch
):
    """Below a scale of 1; before that, each attempt halves it."""
    attempts = []
    real_backward = finetune.Learner.backward

    def backward(learner, examples, tokens):
        losses = real_backward(learner, examples, tokens)
        learner.gradient.fill_(math.inf)
        attempts.append(learner.scaler.get_scale())
        return losses

    monkeypatch.setattr(finetune.Learner, "backward", backward)

    error = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base)

    assert attempts == [2.0**power for power in range(16, -1, -1)]
    assert "error: at step 1 the norm of the gradient is inf. Lower LEARNING_RATE" in error
    assert "DTYPE to float32" in error
    assert "--restart" in error


def test_nf4_is_for_the_language_model_without_its_head(any_base, small_data, build):
    """transformers leaves out T5's wo, which overflows in float16."""
    built = build(any_base, small_data, LORA_TARGETS="all-linear", LOAD_IN_4BIT=True)

    in_4bit = set()
    others = set()
    for name, module in built.captioner.model.named_modules():
        if isinstance(module, Linear4bit):
            in_4bit.add(name)
            assert module.weight.quant_type == "nf4", name
            assert module.weight.quant_state.nested, name
            assert module.compute_dtype == torch.float32, name
        elif isinstance(module, torch.nn.Linear) and "lora_" not in name:
            others.add(name)

    for name in in_4bit:
        assert name.startswith("language_model."), name
        assert "lm_head" not in name
        assert "DenseReluDense.wo" not in name
    for name in others:
        is_exception = "lm_head" in name or "DenseReluDense.wo" in name
        assert is_exception or not name.startswith("language_model."), name
    assert len(in_4bit) > 10
    assert "language_model.lm_head" in others


def test_nf4_trains_as_the_dequantized_weights(any_base, small_data, build):
    built = build(any_base, small_data, LORA_TARGETS="all-linear", LOAD_IN_4BIT=True)
    plain = build(any_base, small_data, LORA_TARGETS="all-linear", LOAD_IN_4BIT=False)
    for name, module in built.captioner.model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.captioner.model.get_submodule(name).weight.copy_(weight)

    found = compute_step(built)
    expected = compute_step(plain)

    assert math.isclose(found.loss, expected.loss, rel_tol=1e-4)
    assert_close(found, expected, 1e-3)


def test_measuring_and_captioning_do_not_change_nf4_weights(any_base, small_data, build):
    """On some CPUs bitsandbytes would repack them, for inference only."""
    built = build(any_base, small_data, LORA_TARGETS="all-linear", LOAD_IN_4BIT=True)
    rows = rows_of(built)
    before = compute_step(built)

    with torch.no_grad():
        compute_losses(built, rows)
    built.captioner.caption(torch.stack([rows[0].features, rows[1].features]))

    after = compute_step(built)
    assert after.loss == before.loss
    for name, gradient in before.gradients.items():
        assert torch.equal(after.gradients[name], gradient), name


# ---- What trains, and what stays still ----------------------------------------------------------


@pytest.fixture
def uneven_data(small_data) -> Path:
    """small_data with captions of one, two and three times three words."""
    for number, text in enumerate((small_data / "caption").iterdir(), 1):
        text.write_text("a red circle " * number)
    return small_data


class HandMadeRun(NamedTuple):
    weights: torch.Tensor  # of LoRA, one after the other
    norms: list[float]  # of the gradient, in each step


def train_by_hand(built: SimpleNamespace, max_norm: float) -> HandMadeRun:
    """Two epochs of 12 pairs in steps of 5, 5 and 2, with PyTorch's own AdamW and clipping."""
    weights = [weight for weight in built.adapter.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.5)
    norms = []
    for step in range(6):
        epoch, place = divmod(step, 3)
        order = finetune.epoch_order(12, built.settings.SEED, epoch)
        indices = order[5 * place : 5 * place + 5]
        tokens = sum(built.dataset.token_counts[i] for i in indices)

        optimizer.zero_grad()
        losses = compute_losses(built, [built.dataset[i] for i in indices])
        (losses.sum() / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, max_norm or math.inf)
        optimizer.param_groups[0]["lr"] = finetune.learning_rate(step, 6, 0.01, 0.4)
        optimizer.step()
        norms.append(norm.item())
    together = torch.cat([weight.detach().flatten() for weight in weights])
    return HandMadeRun(together, norms)


@pytest.mark.parametrize("max_norm", [0.02, 0.0])
def test_the_loop_is_adamw_with_clipping_decay_and_rates(max_norm, opt_base, uneven_data, build):
    by_hand = train_by_hand(build(opt_base, uneven_data), max_norm)
    assert min(by_hand.norms) > 0.02  # every step is clipped, except with 0

    built = build(opt_base, uneven_data, WEIGHT_DECAY=0.5)
    progress = train(
        built,
        EPOCHS=2,
        BATCH_SIZE=5,
        LEARNING_RATE=0.01,
        MAX_GRAD_NORM=max_norm,
        WARMUP_FRACTION=0.4,
    )

    difference = (built.learner.master - by_hand.weights).norm()
    assert difference < 1e-4 * by_hand.weights.norm()
    norms = [row["grad_norm"] for row in progress.metrics[1:]]
    assert norms == pytest.approx(by_hand.norms, rel=1e-3)


def test_the_pairs_of_a_step_are_sorted_by_length_the_longest_first(opt_base, uneven_data, build):
    """So that little padding is needed where a step is split."""
    built = build(opt_base, uneven_data)
    lengths = []
    real = built.captioner.losses

    def losses(batch: finetune.Batch) -> torch.Tensor:
        lengths.append(batch.owners.bincount().tolist())
        return real(batch)

    built.captioner.losses = losses
    train(built, EPOCHS=2, BATCH_SIZE=5)

    assert [len(of_step) for of_step in lengths] == [5, 5, 2, 5, 5, 2]
    for of_step in lengths:
        assert of_step == sorted(of_step, reverse=True)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    order = finetune.epoch_order(50, 42, 0)
    next_order = finetune.epoch_order(50, 42, 1)

    assert sorted(order) == list(range(50))
    assert sorted(next_order) == list(range(50))
    assert next_order != order
    assert finetune.epoch_order(50, 43, 0) != order
    assert finetune.epoch_order(50, 42, 0) == order


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.05, 1.0])
def test_the_learning_rate_is_never_0_and_at_most_the_given_one(warmup_fraction):
    rates = [finetune.learning_rate(step, 100, 1e-3, warmup_fraction) for step in range(100)]

    assert min(rates) > 0
    assert max(rates) <= 1e-3


def test_the_learning_rate_rises_along_a_line_and_falls_along_a_cosine():
    rates = [finetune.learning_rate(step, 100, 1.0, 0.2) for step in (9, 20, 40, 60, 80)]

    slope = math.sqrt(0.5)  # the cosine of 45 degrees
    assert rates == pytest.approx([10 / 21, 1, (1 + slope) / 2, 0.5, (1 - slope) / 2])


def test_only_lora_in_the_language_model_trains(any_base, small_data, build):
    base = Blip2ForConditionalGeneration.from_pretrained(any_base, dtype=torch.float32)
    built = build(any_base, small_data, LORA_DROPOUT=0.5)
    lora_before = {}
    for name, weight in built.adapter.named_parameters():
        if ".lora_" in name:
            lora_before[name] = weight.clone()

    train(built, EPOCHS=1, LEARNING_RATE=0.01)

    after = dict(built.adapter.named_parameters())
    for name, weight in lora_before.items():
        assert "language_model" in name
        assert not torch.equal(after.pop(name), weight), name
    assert len(lora_before) > 10
    frozen = {plain_name(name): weight for name, weight in after.items()}
    base_weights = dict(base.named_parameters())
    assert frozen.keys() == base_weights.keys()
    for name, weight in base_weights.items():
        assert torch.equal(frozen[name], weight), name


def test_only_the_dropout_of_lora_drops_and_only_in_training(any_base, small_data, build):
    built = build(any_base, small_data, LORA_DROPOUT=0.5)
    training_modules = []  # in each forward pass
    real = built.captioner.losses

    def losses(batch: finetune.Batch) -> torch.Tensor:
        modules = built.adapter.named_modules()
        training_modules.append([name for name, module in modules if module.training])
        return real(batch)

    built.captioner.losses = losses
    train(built, held_out=built.dataset, EPOCHS=1)

    first_step = training_modules[0]
    held_out_loss = training_modules[-1]
    assert len(first_step) > 0
    for name in first_step:
        assert ".lora_dropout" in name
    assert held_out_loss == []
