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
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor

import finetune

REPOSITORY = Path(finetune.__file__).parent


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(built) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step on all pairs, as the training loop computes them."""
    built.model.zero_grad()
    rows = [built.dataset[i] for i in range(len(built.dataset))]
    loss = finetune.pair_losses(built.model, rows, built.base).sum() / finetune.count_tokens(rows)
    loss.backward()
    return loss.item(), gradients(built.model)


# ---- Rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "a photo of"])
@pytest.mark.parametrize("limit", [64, 3])
def test_rows_are_picture_prompt_caption_stop_padding(any_base, small_data, build, prompt, limit):
    texts = sorted((small_data / "caption").iterdir())
    texts[0].write_text("one")  # so that a batch has padding
    texts[1].write_text("emerald </s> disc <image>")  # words, not tokens
    built = build(any_base, small_data, prompt=prompt, limit=limit)
    processor = Blip2Processor.from_pretrained(any_base)
    is_t5 = built.base.is_t5
    stop = built.base.model.config.text_config.eos_token_id
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert is_t5 or processor.tokenizer.decode([stop]) == "\n"
    lengths = []
    for index, pair in enumerate(built.pairs):
        row = built.dataset[index]
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        given = processor(images=Image.open(pair.picture), text=prompt)["input_ids"][0]
        space = " " if prompt and not is_t5 else ""
        tokenizer = AutoTokenizer.from_pretrained(any_base, split_special_tokens=True)
        caption = tokenizer(space + pair.caption, add_special_tokens=False)["input_ids"][:limit]
        assert given.count(image_token) == built.base.num_query_tokens == 8
        assert ids.count(image_token) == 8 and ids[:8] == [image_token] * 8
        if is_t5:
            assert ids == given and labels == caption + [stop]
        else:
            assert ids == given + caption + [stop]
            assert labels == [-100] * len(given) + caption + [stop]
        lengths.append(len(labels))
    batch = finetune.collate_fn([built.dataset[i] for i in range(len(lengths))], built.base.pad)
    assert batch["labels"].shape == (len(lengths), max(lengths)) and min(lengths) < max(lengths)
    for i, length in enumerate(lengths):
        assert (batch["labels"][i, length:] == -100).all()
        row = built.dataset[i]["input_ids"]
        assert batch["input_ids"][i, : len(row)].equal(row)
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * (
            batch["input_ids"].shape[1] - len(row))  # fmt: skip
        assert (batch["input_ids"][i, len(row) :] == built.base.pad).all()


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
    built = build(any_base, small_data, prompt=prompt, targets=targets)
    loss, found = step(built)

    def plain(name):
        short = name.removeprefix("base_model.model.").removesuffix(".default.weight")
        return short.replace(".lora_A", ".A").replace(".lora_B", ".B")

    lora = {plain(n): p.detach() for n, p in built.model.named_parameters() if p.requires_grad}
    expected_loss, expected = oracle(any_base, built.pairs, prompt, lora, scale=16.0 / 8)
    assert math.isclose(loss, expected_loss, rel_tol=1e-5)
    assert len(found) == len(expected) > 10
    for name, gradient in found.items():
        reference = expected[plain(name)]
        assert reference.norm() > 0
        assert (gradient - reference).norm() <= 1e-5 * reference.norm(), name


# ---- What trains, and what stays still ----------------------------------------------------------


def test_the_loop_is_adamw_with_clipping_decay_and_the_learning_rates(
    opt_base, small_data, build, tmp_path, monkeypatch
):
    """finetune.train against a hand-made loop: 2 epochs of 12 pairs in steps of 5, 5 and 2."""
    flags = ["--epochs=2", "--batch-size=5", "--learning-rate=0.01", "--weight-decay=0.5",
             "--max-grad-norm=0.02", "--warmup-fraction=0.4", f"--output-dir={tmp_path / 'out'}"]
    settings = finetune.parse_arguments(flags)
    for number, text in enumerate((small_data / "caption").iterdir()):
        text.write_text("a red circle " * (number + 1))
    expected = build(opt_base, small_data)
    weights = [p for p in expected.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.5)
    norms = []
    for step in range(6):
        order = finetune.epoch_order(12, settings.SEED, step // 3)[step % 3 * 5 : step % 3 * 5 + 5]
        rows = [expected.dataset[i] for i in order]
        optimizer.zero_grad()
        losses = finetune.pair_losses(expected.model, rows, expected.base)
        (losses.sum() / finetune.count_tokens(rows)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, 0.02).item())
        optimizer.param_groups[0]["lr"] = finetune.learning_rate(step, 6, 0.01, 0.4)
        optimizer.step()
    assert min(norms) > 0.02  # every step was clipped

    lengths, real = [], finetune.pair_losses

    def watched(model, rows, base):
        lengths.append([len(row["labels"]) for row in rows])
        return real(model, rows, base)

    monkeypatch.setattr(finetune, "pair_losses", watched)
    (tmp_path / "out").mkdir()
    built = build(opt_base, small_data)
    nothing = finetune.ImageCaptioningDataset([], built.store, built.tokenized, built.base)
    finetune.train(settings, Accelerator(cpu=True), built.model, built.dataset, nothing)
    assert [len(some) for some in lengths] == [5, 5, 2] * 2
    assert all(some == sorted(some, reverse=True) for some in lengths)
    assert len({length for some in lengths for length in some}) == 3
    ours = torch.cat([p.flatten() for p in built.model.parameters() if p.requires_grad])
    theirs = torch.cat([p.flatten() for p in weights])
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    metrics = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    logged = [float(line.split(",")[5]) for line in metrics[2:]]
    assert logged == pytest.approx(norms, rel=1e-3)


def test_only_lora_in_the_language_model_trains(any_base, small_data, build, command):
    plain = Blip2ForConditionalGeneration.from_pretrained(any_base, dtype=torch.float32)
    built = build(any_base, small_data)
    settings = finetune.parse_arguments(
        ["--epochs", "2", "--learning-rate", "0.01", "--output-dir", str(small_data)]
    )
    before = {n: p.clone() for n, p in built.model.named_parameters()}
    finetune.train(settings, Accelerator(cpu=True), built.model, built.dataset, built.dataset)
    changed = {n for n, p in built.model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in built.model.named_parameters() if p.requires_grad}
    assert changed == trainable
    assert all("language_model" in name and "lora_" in name for name in trainable)
    layers = 3 * 4 if not built.base.is_t5 else (2 + 2 * 2) * 4
    assert len(trainable) == 2 * layers
    for name, parameter in plain.named_parameters():
        wrapped = f"base_model.model.{name}"
        if wrapped not in before:
            wrapped = re.sub(r"\.(weight|bias)$", r".base_layer.\1", wrapped)
        assert torch.equal(parameter, before[wrapped])


@pytest.mark.parametrize("pattern, problem", [
    (r"no_such_layer", "matches nothing"),
    (r".*\.(fc1|k)", "vision_model.encoder.layers.0.mlp.fc1"),
    (r".*qkv", "vision_model.encoder.layers.0.self_attn.qkv"),
    (r"language_projection|language_model\..*\.(k|k_proj)", "language_projection"),
    (r"language_model\.lm_head", "lm_head"),
])  # fmt: skip
def test_targets_beyond_the_language_model_are_refused(
    any_base, small_data, command, pattern, problem
):
    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=any_base, LORA_TARGETS=pattern)
    assert code == 1 and problem in error and "Traceback" not in error
    example = "SelfAttention" if "t5" in any_base else r"decoder\.layers\.\d+\.self_attn\.k_proj"
    assert example in error  # what could match


def test_everything_but_lora_dropout_is_in_eval_mode(any_base, small_data, build, monkeypatch):
    built = build(any_base, small_data, dropout=0.5)
    modes, real = [], finetune.pair_losses

    def watched(model, rows, base):
        modes.append({n for n, m in model.named_modules() if m.training})
        return real(model, rows, base)

    monkeypatch.setattr(finetune, "pair_losses", watched)
    settings = finetune.parse_arguments(["--epochs", "1", "--output-dir", str(small_data)])
    finetune.train(settings, Accelerator(cpu=True), built.model, built.dataset, built.dataset)
    assert modes[0] == modes[-1] == set()  # held-out loss
    assert modes[1] and all(".lora_dropout" in name for name in modes[1])
    picture = built.pairs[0].picture
    _, pixels = finetune.decode_batch([picture], built.base.processor)
    plain = Blip2ForConditionalGeneration.from_pretrained(any_base, dtype=torch.float32).eval()
    with torch.no_grad():
        live = plain.get_image_features(pixels).qformer_outputs.last_hidden_state[0]
    assert torch.equal(built.store[picture], live)


def test_nf4_is_the_language_model_without_its_head(any_base, small_data, build):
    built = build(any_base, small_data, in_4bit=True, targets="all-linear")
    kinds = {n: type(m) for n, m in built.base.model.named_modules()
             if isinstance(m, torch.nn.Linear) and "lora_" not in n}  # fmt: skip
    for name, kind in kinds.items():
        in_4_bits = name.startswith("language_model.") and "lm_head" not in name
        in_4_bits &= "DenseReluDense.wo" not in name  # transformers keeps T5's out: it overflows
        assert (kind is Linear4bit) == in_4_bits, name
    quantized = [m for m in built.base.model.modules() if isinstance(m, Linear4bit)]
    assert len(quantized) > 10
    for module in quantized:
        assert module.weight.quant_type == "nf4" and module.weight.quant_state.nested
        assert module.compute_dtype == torch.float32


def test_a_held_out_pass_does_not_change_the_next_gradient(any_base, small_data, build):
    built = build(any_base, small_data, in_4bit=True)
    loss, before = step(built)
    rows = [built.dataset[i] for i in range(len(built.dataset))]
    with torch.no_grad():
        finetune.pair_losses(built.model, rows, built.base)
    finetune.caption_dataset(built.model, built.dataset, 5)
    again, after = step(built)
    assert loss == again
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nf4_gradients_are_those_of_the_dequantized_weights(any_base, small_data, build):
    built, full = build(any_base, small_data, in_4bit=True), build(any_base, small_data)
    loss, found = step(built)
    with torch.no_grad():
        for name, module in built.base.model.named_modules():
            if isinstance(module, Linear4bit):
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                full.base.model.get_submodule(name).weight.copy_(weight)
    expected_loss, expected = step(full)
    assert math.isclose(loss, expected_loss, rel_tol=1e-4)
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-3 * expected[name].norm(), name


# ---- The picture, and the captions --------------------------------------------------------------


def test_a_base_that_ignores_pictures_is_refused(opt_base, small_data, command, tmp_path):
    blind = tmp_path / "blind"
    shutil.copytree(opt_base, blind)
    weights = load_file(blind / "model.safetensors")
    for name in ("language_projection.weight", "language_projection.bias"):
        weights[name].zero_()
    save_file(weights, blind / "model.safetensors", metadata={"format": "pt"})
    code, output, error = command(TRAIN_DIR=small_data, MODEL_ID=blind)
    assert code == 1 and "blank pictures" in error
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_captions_end_by_the_stop_token(any_base, small_data, build, monkeypatch):
    built = build(any_base, small_data, prompt="a photo of")
    language_model = built.base.model.language_model
    seen, real = [], language_model.generate

    def watched(**arguments):
        seen.append(real(**arguments))
        return seen[-1]

    monkeypatch.setattr(language_model, "generate", watched)
    captions = finetune.caption_dataset(built.model, built.dataset, 30)
    assert len(captions) == len(built.pairs)
    assert not any("a photo of" in text or "<" in text or "\n" in text for text in captions)
    if not built.base.is_t5:  # the T5 one is random: nobody taught it to stop
        assert all(built.base.stop in ids and ids.index(built.base.stop) < 30
                   for output in seen for ids in output.tolist())  # fmt: skip


def test_a_checkpoint_of_2023_is_mended(any_base, small_data, command, tmp_path):
    """No image token in its config, none in its tokenizer, no num_query_tokens in its processor."""
    old = tmp_path / "old"
    shutil.copytree(any_base, old)
    config = json.loads((old / "config.json").read_text())
    expected = config.pop("image_token_index")
    (old / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((old / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<image>"]
    (old / "tokenizer.json").write_text(json.dumps(tokenizer))
    processor = json.loads((old / "processor_config.json").read_text())
    processor.pop("num_query_tokens")
    (old / "processor_config.json").write_text(json.dumps(processor))
    flags = {"TRAIN_DIR": small_data, "EPOCHS": 1}
    code, mended, error = command(MODEL_ID=old, OUTPUT_DIR=tmp_path / "a", **flags)
    assert code == 0, error
    assert f"mended: a checkpoint of 2023 without an image token; <image> is {expected}" in mended
    code, whole, _ = command(MODEL_ID=any_base, OUTPUT_DIR=tmp_path / "b", **flags)
    assert code == 0 and "mended" not in whole
    losses = [re.findall(r"held-out (?:loss before: )?(\d+\.\d+)", t) for t in (mended, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


# ---- The whole way ------------------------------------------------------------------------------


def exact(output: str) -> dict[str, tuple[int, int]]:
    found = re.findall(r"^exact_captions_(\w+): +(\d+) of (\d+)$", output, re.M)
    return {name: (int(right), int(count)) for name, right, count in found}


def readme_flags() -> dict[str, str]:
    """The flags of the README's first command."""
    line = re.search(r"finetune\.py (--model-id .*)", (REPOSITORY / "README.md").read_text())[1]
    return {k.replace("-", "_").upper(): v for k, v in re.findall(r"--(\S+) (\S+)", line)}


def test_the_readmes_first_command_teaches_the_sample(command, monkeypatch, sample, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    shutil.copytree(sample, tmp_path / "train")
    code, output, error = command(**readme_flags(), TRAIN_DIR=tmp_path / "train")
    assert code == 0, error
    right, count = exact(output)["before"]
    assert count >= 20 and right <= 0.1 * count
    right, count = exact(output)["after"]
    assert count >= 20 and right >= 0.9 * count


def test_pictures_kept_back_are_captioned_by_flag_and_by_the_readmes_snippet(
    command, monkeypatch, sample, tmp_path, capsys
):
    """One picture of each caption never enters the training folder."""
    monkeypatch.chdir(REPOSITORY)
    shutil.copytree(sample, tmp_path / "train")
    (tmp_path / "kept").mkdir()
    expected = {}
    for folder in sorted((tmp_path / "train" / "Image").iterdir()):
        picture = tmp_path / "kept" / f"{folder.name}.png"
        sorted(folder.iterdir())[4].rename(picture)
        text = tmp_path / "train" / "caption" / f"{folder.name}.txt"
        expected[str(picture)] = text.read_text().strip()
    code, _, error = command(**readme_flags(), TRAIN_DIR=tmp_path / "train")
    assert code == 0, error
    code, output, error = command("--caption", str(tmp_path / "kept"))
    assert code == 0, error
    captions = dict(line.split("\t") for line in output.splitlines())
    assert captions.keys() == expected.keys()
    assert sum(captions[p] == expected[p] for p in expected) >= 0.9 * len(expected)

    snippet = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1]
    for picture, caption in captions.items():
        code = snippet.replace("blip2_lora_finetuned", str(tmp_path / "out"))
        code = code.replace("picture.jpg", picture)
        capsys.readouterr()
        exec(code, {})
        assert capsys.readouterr().out.strip().splitlines()[-1] == caption


def test_the_adapter_gives_plain_peft_the_same_logits(any_base, small_data, build, tmp_path):
    built = build(any_base, small_data, prompt="a photo of")
    finetune.save_adapter(built.model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip
    plain = Blip2ForConditionalGeneration.from_pretrained(any_base, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    processor = Blip2Processor.from_pretrained(any_base)
    pair = built.pairs[0]
    inputs = processor(images=Image.open(pair.picture), text="a photo of", return_tensors="pt")
    row = built.dataset[0]
    labels = row["labels"][row["labels"] != -100]
    if built.base.is_t5:
        inputs["labels"] = labels[None]
    else:
        inputs["input_ids"] = row["input_ids"][None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = plain(**inputs).logits[0]
        logits = logits if built.base.is_t5 else logits[-1 - len(labels) : -1]
        chosen = -torch.log_softmax(logits, -1)[torch.arange(len(labels)), labels].sum()
        found = finetune.pair_losses(built.model, [row], built.base)[0]
    assert math.isclose(chosen.item(), found.item(), rel_tol=1e-5)


def test_an_earlier_run_is_moved_aside_and_one_that_was_stopped_can_caption(
    opt_base, small_data, command, monkeypatch, tmp_path
):
    flags = {"TRAIN_DIR": small_data, "MODEL_ID": opt_base, "EPOCHS": 1}
    assert command(**flags)[0] == 0
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    losses, real = [], finetune.measure_losses

    def stopped(*arguments):
        losses.append(real(*arguments))
        if len(losses) == 3:  # one before, one after each epoch
            raise KeyboardInterrupt
        return losses[-1]

    monkeypatch.setattr(finetune, "measure_losses", stopped)
    code, _, error = command(**flags | {"EPOCHS": 3, "LEARNING_RATE": 3e-3})
    assert code == 130 and "Traceback" not in error
    (aside,) = tmp_path.glob("out-*")
    assert (aside / "adapter_model.safetensors").read_bytes() == first
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != first
    for folder in (aside, tmp_path / "out"):
        code, output, error = command("--caption", str(small_data / "Image"), OUTPUT_DIR=folder)
        assert code == 0 and output.count("\t") == 12, error


def test_a_slash_at_the_end_names_the_same_folder(opt_base, small_data, command, tmp_path):
    flags = {"MODEL_ID": opt_base, "EPOCHS": 1}
    assert command(TRAIN_DIR=small_data, OUTPUT_DIR=tmp_path / "out", **flags)[0] == 0
    _, output, _ = command(TRAIN_DIR=f"{small_data}/", OUTPUT_DIR=f"{tmp_path}/out/", **flags)
    assert "this run is finished" in output and not list(tmp_path.glob("out-*"))


def test_an_unfinished_run_does_not_go_on_with_other_pictures(
    opt_base, small_data, command, monkeypatch, tmp_path
):
    """One of them is overwritten by as many bytes that are no picture."""
    flags = {"TRAIN_DIR": small_data, "MODEL_ID": opt_base, "EPOCHS": 2}
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "save_checkpoint", raiser(KeyboardInterrupt))
        assert command(**flags)[0] == 130
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    picture = next(small_data.glob("Image/*/*.png"))
    content = picture.read_bytes()
    picture.write_bytes(bytes(len(content)))
    code, _, error = command(**flags)
    assert code == 1 and f"{picture} could be read when this run began" in error
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    picture.write_bytes(content)
    assert command(**flags)[0] == 0


def raiser(error):
    def fail(*_):
        raise error

    return fail


def test_float16_trains_on_finite_features_in_their_own_dtype(
    opt_base, small_data, command, monkeypatch
):
    """transformers keeps the Q-Former in float32 there; features are stored as float16."""
    choice = torch.device("cpu"), torch.float16, "as on an older GPU"
    monkeypatch.setattr(finetune, "choose_device", lambda *arguments: choice)
    code, output, error = command(
        TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=30, LEARNING_RATE=3e-3, BATCH_SIZE=4
    )
    assert code == 0, error
    right, count = exact(output)["after"]
    assert right == count == 1
    assert "nan" not in output.split("reference")[0]


def test_what_is_saved_is_the_best_and_not_the_last(opt_base, small_data, build, tmp_path):
    """Trained on other captions than those of the held-out pairs, which get worse some day."""
    built = build(opt_base, small_data)
    wrong = {caption: built.tokenized[built.pairs[0].caption] for caption in built.tokenized}
    train = finetune.ImageCaptioningDataset(built.pairs, built.store, wrong, built.base)
    held_out = built.dataset
    flags = ["--epochs=8", "--learning-rate=3e-3", f"--output-dir={tmp_path / 'out'}"]
    (tmp_path / "out").mkdir()
    settings = finetune.parse_arguments(flags)
    done, _ = finetune.train(settings, Accelerator(cpu=True), built.model, train, held_out)
    assert done.best_epoch < 8
    losses = finetune.measure_losses(built.model, held_out)
    left = (losses.sum() / held_out.tokens().sum()).item()
    assert math.isclose(left, done.best, abs_tol=1e-6)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    live = {n.replace(".default", ""): p for n, p in built.model.named_parameters()}
    assert all(torch.equal(weight, live[name]) for name, weight in saved.items())


@pytest.mark.parametrize("where", ["loss", "gradient", "held-out loss"])
def test_a_value_that_is_not_finite_stops_the_run_and_keeps_the_weights(
    opt_base, small_data, build, monkeypatch, where, tmp_path
):
    built = build(opt_base, small_data)
    before = {n: p.clone() for n, p in built.model.named_parameters() if p.requires_grad}
    real = finetune.pair_losses

    def losses(model, rows, base):
        result = real(model, rows, base)
        if where == "gradient" and torch.is_grad_enabled():
            result.register_hook(lambda gradient: gradient * math.nan)
        bad = where == ("loss" if torch.is_grad_enabled() else "held-out loss")
        return result * math.nan if bad else result

    monkeypatch.setattr(finetune, "pair_losses", losses)
    settings = finetune.parse_arguments(["--epochs=2", f"--output-dir={tmp_path}"])
    with pytest.raises(finetune.UserError, match="nan.*Lower LEARNING_RATE"):
        finetune.train(settings, Accelerator(cpu=True), built.model, built.dataset, built.dataset)
    assert all(torch.equal(p, before[n]) for n, p in built.model.named_parameters() if n in before)
