"""What a run leaves to look at: report, pairs.csv, model card, trackers, and what it says."""

import contextlib
import csv
import errno
import io
import json
import math
import re
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

import finetune

REPOSITORY = Path(finetune.__file__).parent
SAMPLE = {"learning_rate": 3e-3, "epochs": 10}  # the README's


def run(folder: Path, *flags: str, **settings) -> tuple[int, str, str]:
    """As the fixture `command`, for fixtures of a module."""
    words = [part for name, value in ({"num_workers": 0, "output_dir": folder} | settings).items()
             for part in ("--" + name.lower().replace("_", "-"), str(value))]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = finetune.main([*words, *flags])
    return code, out.getvalue(), err.getvalue()


def flags_of(settings: dict) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for name, value in settings.items():
        flag = "--" + name.lower().replace("_", "-")
        switch = [flag if value else flag.replace("--", "--no-", 1)]
        words += switch if isinstance(value, bool) else [flag, str(value)]
    return words


def write_data(folder: Path, sample: Path, captions: list[str], each: int = 1) -> Path:
    """A TRAIN_DIR: `each` pictures of the sample for every caption."""
    (folder / "caption").mkdir(parents=True)
    drawings = sorted((sample / "Image").iterdir())
    for number, caption in enumerate(captions):
        name = f"{number:03}"
        (folder / "caption" / f"{name}.txt").write_text(caption, encoding="utf-8")
        (folder / "Image" / name).mkdir(parents=True)
        for picture in sorted(drawings[number % len(drawings)].iterdir())[:each]:
            shutil.copy(picture, folder / "Image" / name)
    return folder


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def record_of(folder: Path) -> dict:
    return json.loads((folder / "settings.json").read_text())


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """All words that are drawn: of samples, titles and the line below."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    words = []

    def watch(kind: type, name: str, place: int) -> None:
        real = getattr(kind, name)

        def watched(*arguments, **more):
            words.append(arguments[place])
            return real(*arguments, **more)

        monkeypatch.setattr(kind, name, watched)

    watch(Axes, "text", 3)
    watch(Axes, "set_title", 1)
    watch(Figure, "supxlabel", 1)
    return words


def size_of_report(folder: Path) -> tuple[int, int]:
    with Image.open(folder / "report.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 5  # not one colour
        return picture.size


# ---- report.png ---------------------------------------------------------------------------------

LONG = " ".join(f"{word} number {i}" for i, word in enumerate(["enamel pin", "a red circle"] * 25))
ODD = {
    "plain": ["a red circle", "a green star"],
    "one pair": ["a red circle"],
    "200 words": [LONG + " and a yellow background" * 12, "word" * 60],
    "prices": ["only $5 or $6, 100% \\frac_{1}^2 a_b", "$", "$$ \\alpha % { } _ ^ & # ~"],
    "other scripts": ["一只红色的猫坐在桌子上", "قطة حمراء على الطاولة", "🎉 party", "Ünïcödé"],
}


@pytest.mark.parametrize("name", ODD)
def test_the_report_of_odd_captions(name, sample, command, opt_base, drawn, tmp_path):
    each = 1 if name == "one pair" else 3
    data = write_data(tmp_path / "data", sample, ODD[name], each)
    code, output, error = command(TRAIN_DIR=data, MODEL_ID=opt_base, EPOCHS=2, SAMPLE_COUNT=12,
                                  VALIDATION_FRACTION=0.5, MAX_CAPTION_TOKENS=200)  # fmt: skip
    assert (code, error) == (0, "")
    width, height = size_of_report(tmp_path / "out")
    held_out = [row for row in read_table(tmp_path / "out/pairs.csv") if row["split"] == "held out"]
    assert width == 1300 and height == 400 + 180 * math.ceil(len(held_out) / 2)
    references = [text for text in drawn if text.startswith("caption: ")]
    assert len(references) == len(held_out) == (len(ODD[name]) * each) // 2
    for row in held_out:
        words = "caption: " + " ".join(row["caption"].split())
        shown = [text.replace("\n", " ") for text in references]
        if name == "200 words":
            assert all(text.count("\n") == 2 and text.endswith(" ...") for text in references
                       if "number" in text)  # fmt: skip
        elif name != "other scripts":
            assert words in shown
        else:
            assert words.replace(" ", "") in [text.replace(" ", "") for text in shown]
    assert all(len(line) <= 60 for text in drawn if text.startswith(("caption", "before", "✗"))
               for line in text.splitlines())  # fmt: skip
    assert ("nothing held out" in output) == (name == "one pair")


@pytest.mark.parametrize("count", [0, 1, 12, 200])
def test_the_report_of_so_many_samples(count, sample, command, opt_base, drawn, tmp_path):
    data = write_data(tmp_path / "data", sample, ["a red circle"] * 10, 5)
    code, output, error = command(TRAIN_DIR=data, MODEL_ID=opt_base, EPOCHS=1, SAMPLE_COUNT=count,
                                  VALIDATION_FRACTION=0.5)  # fmt: skip
    assert (code, error) == (0, "")
    shown = min(count, 12)
    assert size_of_report(tmp_path / "out") == (1300, 400 + 180 * math.ceil(shown / 2))
    assert sum(text.startswith("caption:") for text in drawn) == shown
    assert output.count("  reference:") == min(count, 25)


def test_the_report_without_held_out_pairs(sample, command, opt_base, drawn, tmp_path):
    data = write_data(tmp_path / "data", sample, ["a red circle", "a star"])
    code, output, error = command(TRAIN_DIR=data, MODEL_ID=opt_base, EPOCHS=3,
                                  VALIDATION_FRACTION=0)  # fmt: skip
    assert (code, error) == (0, "")
    assert size_of_report(tmp_path / "out") == (1300, 400)
    assert drawn == ["nothing held out"]
    assert "nan" not in "".join(drawn) + output + (tmp_path / "out/README.md").read_text().lower()
    assert "nothing held out" in output
    assert "NaN" not in (tmp_path / "out/settings.json").read_text()


def test_a_picture_that_is_gone_at_the_end(sample, command, opt_base, drawn, tmp_path, monkeypatch):
    data, real = write_data(tmp_path / "data", sample, ["a red circle"] * 4), finetune.list_samples

    def list_samples(dataset, *texts):
        for pair in dataset.pairs:
            Path(pair.picture).unlink()
        return real(dataset, *texts)

    monkeypatch.setattr(finetune, "list_samples", list_samples)
    code, _, error = command(TRAIN_DIR=data, MODEL_ID=opt_base, EPOCHS=1, VALIDATION_FRACTION=0.5)
    assert (code, error) == (0, "")
    assert not any(Path(pair["picture"]).exists() for pair in read_table(tmp_path / "out/pairs.csv")
                   if pair["split"] == "held out")  # fmt: skip
    assert sum(text.startswith("caption: a red circle") for text in drawn) == 2


def test_the_report_is_refreshed_at_each_epoch(small_data, command, opt_base, drawn, monkeypatch):
    monkeypatch.setattr(finetune, "REPORT_SECONDS", 0)
    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=3, SAMPLE_COUNT=1)
    assert (code, error) == (0, "")
    assert sum(text.startswith("caption:") for text in drawn) == 3 + 1
    assert "nothing held out" not in drawn


@pytest.mark.parametrize("length, count", [(0, 3), (1, 3), (13, 12), (300, 256), (5, 0)])
def test_as_many_are_spread_as_are_asked_for(length, count):
    chosen = finetune.spread(list(range(length)), count)
    assert len(set(chosen)) == min(length, count) and chosen == sorted(chosen)
    gaps = {b - a for a, b in zip(chosen, [*chosen[1:], length], strict=True)} if chosen else set()
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_right_and_wrong_captions_are_told_apart(sample, command, opt_base, drawn, tmp_path):
    """The base knows the first caption; the second is beyond it."""
    captions = ["a green circle on a black background", "x y z"]
    data = write_data(tmp_path / "data", sample, captions, 5)
    code, output, _ = command(TRAIN_DIR=data, MODEL_ID=opt_base, EPOCHS=1, LEARNING_RATE=1e-9,
                              VALIDATION_FRACTION=0.8)  # fmt: skip
    assert code == 0
    right = [text for text in drawn if "after:" in text and text.startswith("✓")]
    wrong = [text for text in drawn if "after:" in text and text.startswith("✗")]
    assert right and wrong and len(right + wrong) == 6
    assert "✓ after: a green circle on a black background" in right


def test_missing_characters_are_said_in_one_line(opt_base, sample, command, drawn, tmp_path):
    data = write_data(tmp_path / "data", sample, ["a \U000e0fff\U0010fffd\u0378 star 𓀀"] * 4)
    code, _, error = command(TRAIN_DIR=data, MODEL_ID=opt_base, EPOCHS=1, VALIDATION_FRACTION=0.5)
    assert (code, error) == (0, "")
    _, missing = finetune.find_fonts("".join(drawn))
    said = [text for text in drawn if text.startswith("No installed font has")]
    assert said == [f"No installed font has {len(missing)} of the characters: they are boxes."] * (
        len(missing) > 0)  # fmt: skip


def test_fonts_are_found_for_what_the_first_one_lacks(monkeypatch):
    """STIX comes with matplotlib, and has letters that DejaVu Sans has not."""
    from matplotlib import font_manager, ft2font

    entries = {entry.name: entry for entry in font_manager.fontManager.ttflist
               if entry.name in ("DejaVu Sans", "STIXGeneral") and entry.style == "normal"}
    sets = [set(ft2font.FT2Font(entries[name].fname).get_charmap()) for name in sorted(entries)]
    letter = chr(min(code for code in sets[1] - sets[0]
                     if unicodedata.category(chr(code))[0] not in "CZM"))  # fmt: skip
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(entries.values()))
    families, missing = finetune.find_fonts("plain")
    assert set(families) == {"DejaVu Sans"} and missing == ""
    families, missing = finetune.find_fonts(f"plain {letter}")
    assert "STIXGeneral" in families and missing == ""
    assert finetune.find_fonts("\u0378中")[1] == "中"  # what is no character is not missed


# ---- A whole run, and what it leaves ------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory, sample, opt_base):
    """A run with TensorBoard, on captions of several lengths, with a few training losses noted."""
    root = tmp_path_factory.mktemp("ran")
    captions = ["a red circle", "pin", "enamel pin: a green star over violet", "a plus on a square"]
    data = write_data(root / "data", sample, captions, 4)
    noted, real = [], finetune.pair_losses

    def pair_losses(model, rows, base):
        losses = real(model, rows, base)
        if torch.is_grad_enabled():
            noted.extend(zip((row["index"] for row in rows), losses.tolist(), strict=True))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "pair_losses", pair_losses)
        code, output, error = run(
            root / "out", train_dir=data, model_id=opt_base, epochs=3, batch_size=5,
            validation_fraction=0.3, learning_rate=3e-3, log_with="tensorboard")  # fmt: skip
    assert code == 0, error
    return SimpleNamespace(out=root / "out", data=data, output=output, error=error, noted=noted,
                           pairs=read_table(root / "out/pairs.csv"))  # fmt: skip


def test_pairs_are_listed_once_with_the_highest_loss_first(ran):
    header = (ran.out / "pairs.csv").read_text().splitlines()[0]
    assert header == "split,loss,tokens,picture,caption"
    losses = [float(row["loss"]) for row in ran.pairs]
    assert losses == sorted(losses, reverse=True)
    pairs, _, _ = finetune.find_pairs(str(ran.data))
    assert sorted((row["picture"], row["caption"]) for row in ran.pairs) == pairs
    assert {row["split"] for row in ran.pairs} == {"train", "held out"}


def test_training_losses_in_pairs_are_means_over_the_epochs(ran):
    pairs, _, _ = finetune.find_pairs(str(ran.data))
    train_pairs, _ = finetune.split_pairs(pairs, 0.3, finetune.SEED, str(ran.data))
    found = {row["picture"]: float(row["loss"]) * int(row["tokens"]) for row in ran.pairs
             if row["split"] == "train"}  # fmt: skip
    assert len(found) == len(train_pairs)
    for index, pair in enumerate(train_pairs):
        mine = [loss for place, loss in ran.noted if place == index]
        assert len(mine) == 3
        assert found[pair.picture] == pytest.approx(sum(mine) / 3, abs=2e-3)


def test_held_out_losses_in_pairs_are_those_of_the_adapter(ran, opt_base):
    from peft import PeftModel

    held_out = [row for row in ran.pairs if row["split"] == "held out"]
    with contextlib.redirect_stdout(io.StringIO()):
        base = finetune.load_base(opt_base, "", "cpu", "auto", True)
        store = finetune.open_features(base, str(ran.data), "")
    pairs = [finetune.Pair(row["picture"], row["caption"]) for row in held_out]
    tokenized, _ = finetune.tokenize_captions([pair.caption for pair in pairs], base, "", 64)
    dataset = finetune.ImageCaptioningDataset(pairs, store, tokenized, base)
    model = PeftModel.from_pretrained(base.model, str(ran.out))
    with torch.no_grad():
        losses = finetune.measure_losses(model, dataset)
    counts = dataset.tokens()
    assert [int(row["tokens"]) for row in held_out] == counts.tolist()
    found = [float(row["loss"]) for row in held_out]
    assert found == pytest.approx((losses / counts).tolist(), abs=1e-4)
    mean = (losses.sum() / counts.sum()).item()
    assert record_of(ran.out)["results"]["held_out_loss_after"] == pytest.approx(mean, abs=1e-4)


def test_the_summary_names_the_worst_three(ran):
    said = ran.output.partition("highest losses")[2].splitlines()[1:4]
    for line, row in zip(said, ran.pairs, strict=False):
        assert line == f"  {float(row['loss']):.3f} {row['picture']}: {row['caption']}"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_picture_in_the_wrong_folder_is_among_the_first_three(
    seed, sample, command, opt_base, tmp_path
):
    """Two, in fact: one that is trained on, and one that is held out."""
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    names = sorted(path.name for path in (data / "Image").iterdir())
    moved = []
    for wanted in ("train", "held out"):
        for number in range(13):  # until one lands in that part
            wrong = (5 * seed + 7 * len(moved) + number) % len(names)
            source = sorted((data / "Image" / names[wrong]).iterdir())[number % 4]
            target = data / "Image" / names[wrong - 1] / f"moved{seed}{number}.png"
            source.rename(target)
            pairs, _, _ = finetune.find_pairs(str(data))
            parts = finetune.split_pairs(pairs, 0.1, finetune.SEED, str(data))
            is_held_out = any(pair.picture == str(target) for pair in parts[1])
            if is_held_out == (wanted == "held out"):
                moved.append(str(target))
                break
            target.rename(source)
    assert len(moved) == 2
    code, output, error = command(**SAMPLE, TRAIN_DIR=data, MODEL_ID=opt_base)
    assert code == 0, error
    worst = read_table(tmp_path / "out/pairs.csv")[:3]
    assert set(moved) <= {row["picture"] for row in worst}
    assert {row["split"] for row in worst if row["picture"] in moved} == {"train", "held out"}
    said = output.partition("highest losses")[2]
    assert all(f" {picture}: " in said for picture in moved)


# ---- Model card and settings --------------------------------------------------------------------


def test_the_cards_metadata_and_numbers(ran):
    card, record = ModelCard.load(ran.out / "README.md"), record_of(ran.out)
    assert card.data.library_name == "peft" and card.data.base_model is None  # a folder here
    assert {"lora", "image-captioning"} <= set(card.data.tags)
    assert card.data.license == "other" and card.data.license_name == "of-the-base-model"
    assert "OPT's weights" not in card.text
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.M))
    assert record["results"]["steps"] == 9
    for name, value in record["results"].items():
        assert rows[name.replace("_", " ")] == str(value)
    said = json.loads(re.search(r"```json\n(.*?)```", card.text, re.S)[1])
    assert said["settings"] == record["settings"] and said["versions"] == record["versions"]
    samples = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", card.text, re.M)[1:]
    held_out = {row["caption"] for row in ran.pairs if row["split"] == "held out"}
    assert samples and {row[0] for row in samples} <= held_out


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_card_names_a_base_of_the_hub_with_its_licence(kind, ran, tmp_path):
    record = record_of(ran.out)
    base = {"opt": "Salesforce/blip2-opt-2.7b", "t5": "Salesforce/blip2-flan-t5-xl"}[kind]
    record["settings"] |= {"MODEL_ID": base}
    finetune.save_card(tmp_path, [], record | {"language_model": kind})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base
    assert card.data.license == {"opt": "other", "t5": "apache-2.0"}[kind]
    assert ("OPT's weights are for research only." in card.text) == (kind == "opt")


@pytest.mark.parametrize("text", [
    "a | b", "two\nlines", "{name} {} {0!r}", "\"quotes\" 'and' `ticks`", "---\n", "中文 🎉 قطة",
    "```", "\\", "a\r\u2028b",
], ids=ascii)  # fmt: skip
def test_captions_do_not_break_the_card(text, ran, tmp_path):
    sample = finetune.Sample("picture.png", text, text, text)
    finetune.save_card(tmp_path, [sample, sample], record_of(ran.out))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    table = card.text.partition("| caption | before | after |\n")[2].splitlines()
    assert re.fullmatch(r"\|[-|]+\|", table[0]) and table[3] == ""
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in table[1:3])
    snippet = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    compile(snippet, "README.md", "exec")


@pytest.mark.parametrize("kind, in_4bit, prompt", [
    ("opt", True, "a photo of"), ("opt", False, ""), ("t5", True, ""), ("t5", False, "say it's"),
], ids=["opt 4bit prompt", "opt", "t5 4bit", "t5 prompt"])  # fmt: skip
def test_the_cards_snippet_captions_as_the_flag_does(
    kind, in_4bit, prompt, request, small_data, monkeypatch, tmp_path, capsys
):
    """With a quote in the folder's name."""
    monkeypatch.chdir(tmp_path)
    base = request.getfixturevalue(f"{kind}_base")
    code, _, error = run(
        Path("it's out"), "--load-in-4bit" if in_4bit else "--no-load-in-4bit",
        train_dir=small_data, model_id=base, epochs=8, learning_rate=3e-3, prompt=prompt,
        max_caption_tokens=24, sample_count=0)  # fmt: skip
    assert code == 0, error
    with Image.open(next(small_data.glob("Image/*/*.png"))) as picture:
        picture.convert("RGB").save("picture.jpg")
    code, output, error = run(Path("it's out"), "--caption", "picture.jpg")
    assert code == 0, error
    name, _, caption = output.rstrip("\n").partition("\t")
    assert name == "picture.jpg" and caption
    card = Path("it's out/README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.S)[1]
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out == caption + "\n"


def test_a_run_is_repeated_from_its_settings(ran):
    settings = record_of(ran.out)["settings"] | {"OUTPUT_DIR": str(ran.out) + "-again"}
    with contextlib.redirect_stdout(io.StringIO()):
        assert finetune.main(flags_of(settings)) == 0
    one, other = (Path(folder, "adapter_model.safetensors").read_bytes()
                  for folder in (ran.out, settings["OUTPUT_DIR"]))
    assert one == other
    assert record_of(Path(settings["OUTPUT_DIR"]))["settings"] == settings


# ---- Trackers -----------------------------------------------------------------------------------


def test_tensorboard_reads_what_was_logged(ran):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    readers = []
    for path in sorted(ran.out.rglob("events.out.tfevents.*")):
        readers.append(EventAccumulator(str(path), size_guidance={"images": 0, "scalars": 0}))
        readers[-1].Reload()
    scalars = {}
    for reader in readers:
        for tag in reader.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update((e.step, e.value) for e in reader.Scalars(tag))
    for name in ("train_loss", "held_out_loss", "learning_rate"):
        expected = {int(row["step"]): float(row[name])
                    for row in read_table(ran.out / "metrics.csv") if row[name]}  # fmt: skip
        assert scalars[name] == pytest.approx(expected, rel=1e-6)
    assert sorted(scalars["train_loss"]) == list(range(1, 10))
    assert sorted(scalars["held_out_loss"]) == [0, 3, 6, 9]
    (image,) = [e for reader in readers if "report" in reader.Tags()["images"]
                for e in reader.Images("report")]  # fmt: skip
    logged = Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")
    assert image.step == 9
    assert np.array_equal(logged, Image.open(ran.out / "report.png").convert("RGB"))
    logged = "".join(path.read_text() for path in ran.out.rglob("hparams.yml"))
    for name in record_of(ran.out)["settings"]:
        assert re.search(rf"^{name}: ", logged, re.M), name
    assert "EPOCHS: 3\n" in logged and "BATCH_SIZE: 5\n" in logged


@pytest.mark.parametrize("tracker", ["wandb", "nonsense"])
def test_a_tracker_that_is_not_there_is_a_sentence(tracker, monkeypatch, command, tmp_path, ran):
    monkeypatch.setattr(finetune, "get_available_trackers", lambda: ["tensorboard"])
    code, output, error = command(TRAIN_DIR=ran.data, LOG_WITH=tracker)
    assert (code, output) == (1, "")
    sentence = "it must be empty, or a tracker whose package is installed: tensorboard."
    assert f"LOG_WITH is '{tracker}'; {sentence}" in error
    assert "Traceback" not in error and not (tmp_path / "out").exists()


# ---- Memory told before it is short -------------------------------------------------------------


@pytest.fixture(scope="module", params=["opt", "t5"])
def wide_base(request, tmp_path_factory) -> str:
    """As the tiny ones, with a language model wide enough to matter beside the vision tower."""
    folder = tmp_path_factory.mktemp("wide")
    opt_base = request.getfixturevalue("opt_base")
    config = Blip2Config.from_pretrained(request.getfixturevalue(f"{request.param}_base")).to_dict()
    config["text_config"] |= {
        "opt": {"hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048},
        "t5": {"d_model": 512, "d_kv": 128, "d_ff": 1024},
    }[request.param]
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(Blip2Config(**config)).save_pretrained(folder)
    Blip2Processor.from_pretrained(opt_base).save_pretrained(folder)
    return str(folder)


def bytes_loaded(model: torch.nn.Module) -> int:
    """Of all storages: weights, buffers, and what quantization keeps beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in tensors}  # fmt: skip
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("in_4bit", [True, False], ids=["4bit", "whole"])
def test_memory_is_told_within_3_percent(in_4bit, dtype, wide_base, capsys, monkeypatch):
    if dtype == "float16":  # as on an older GPU
        if finetune.load_config(wide_base).text_config.model_type == "t5":
            pytest.skip("T5 is not loaded in float16")
        choice = torch.device("cpu"), torch.float16, "to try it"
        monkeypatch.setattr(finetune, "choose_device", lambda *arguments: choice)
    base = finetune.load_base(wide_base, "", "cpu", dtype, in_4bit)
    with torch.device("meta"):
        skeleton = Blip2ForConditionalGeneration(finetune.load_config(wide_base))
    told = finetune.count_bytes(skeleton, base.dtype, in_4bit)
    assert told == pytest.approx(bytes_loaded(base.model), rel=0.03)
    line = re.search(r"^memory: (\S+) GB for the weights, (\S+) GB free$",
                     capsys.readouterr().out, re.M)  # fmt: skip
    assert float(line[1]) == pytest.approx(told / 1e9, rel=0.01)


# ---- What must not cost the adapter -------------------------------------------------------------


@pytest.mark.parametrize("name", ["draw_report", "save_card"])
def test_a_report_that_fails_leaves_the_adapter_and_exit_code_1(
    name, ran, command, opt_base, monkeypatch, tmp_path
):
    def fails(*arguments):
        raise ValueError("a defect")

    fails.__name__ = name
    monkeypatch.setattr(finetune, name, fails)
    flags = {"TRAIN_DIR": ran.data, "MODEL_ID": opt_base, "EPOCHS": 1}
    code, output, error = command(**flags)
    assert code == 1 and "Traceback" not in error
    assert error.count("\n") == 1 and "a defect" in error and "The adapter is saved." in error
    assert load_file(tmp_path / "out/adapter_model.safetensors")
    assert record_of(tmp_path / "out")["finished"] and "adapter:" in output
    code, output, _ = command(**flags)
    assert code == 0 and "this run is finished" in output


@pytest.mark.parametrize("name", ["draw_report", "save_card"])
def test_a_full_disk_at_the_end_is_continued_when_there_is_room(
    name, ran, command, opt_base, monkeypatch, tmp_path
):
    def fails(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    flags = {"TRAIN_DIR": ran.data, "MODEL_ID": opt_base, "EPOCHS": 2}
    with monkeypatch.context() as patch:
        patch.setattr(finetune, name, fails)
        code, _, error = command(**flags)
    assert code == 1 and "No space left on device" in error and "Traceback" not in error
    adapter = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    assert not record_of(tmp_path / "out")["finished"]
    code, output, error = command(**flags)
    assert (code, error) == (0, "") and "epoch 2/2" not in output  # trained already
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == adapter
    assert record_of(tmp_path / "out")["finished"]
    assert ModelCard.load(tmp_path / "out/README.md") and size_of_report(tmp_path / "out")


# ---- What is held out ---------------------------------------------------------------------------


def test_validation_dir_is_what_is_held_out(small_data, sample, command, opt_base, tmp_path):
    data = write_data(tmp_path / "held", sample, ["a red star", "pin"], 2)
    flags = {"TRAIN_DIR": small_data, "MODEL_ID": opt_base, "EPOCHS": 1, "VALIDATION_DIR": data}
    code, output, error = command(**flags)
    assert code == 0, error
    assert "pairs: 12 to train on, 4 held out" in output and "pictures: 16 to encode" in output
    rows = read_table(tmp_path / "out/pairs.csv")
    held_out = sorted(row["picture"] for row in rows if row["split"] == "held out")
    assert held_out == sorted(map(str, data.glob("Image/*/*.png")))
    assert all(row["picture"].startswith(str(small_data)) for row in rows
               if row["split"] == "train")  # fmt: skip
    (index,) = small_data.glob(".features/*/*.jsonl")
    assert index.read_text().count("\n") == 16
    (data / "caption/001.txt").write_text("enamel pin")
    code, output, error = command(**flags)
    assert code == 0, error
    assert "the earlier run is in" in output and "pictures: 0 to encode" in output


@pytest.mark.parametrize("count, fraction, held_out", [
    (1, 0.1, 0), (2, 0.1, 1), (2, 0.9, 1), (12, 0, 0),
], ids=["1 pair", "2 pairs", "2 pairs, most held out", "all are trained on"])  # fmt: skip
def test_tiny_folders_train_and_say_what_is_missing(
    count, fraction, held_out, sample, command, opt_base, tmp_path
):
    data = write_data(tmp_path / "data", sample, ["a red circle"], count)
    code, output, error = command(TRAIN_DIR=data, MODEL_ID=opt_base, EPOCHS=2,
                                  VALIDATION_FRACTION=fraction)  # fmt: skip
    assert (code, error) == (0, "")
    assert f"pairs: {count - held_out} to train on, {held_out} held out" in output
    assert ("nothing held out" in output) == (not held_out)
    assert "too few to learn much" in output
    assert ("held_out_loss_after" in output) == (held_out > 0)
    assert load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(read_table(tmp_path / "out/pairs.csv")) == count


def test_with_nothing_held_out_the_last_adapter_is_saved(
    small_data, command, opt_base, tmp_path, monkeypatch
):
    saved, real = [], finetune.save_adapter

    def save_adapter(model, folder):
        real(model, folder)
        saved.append((folder / "adapter_model.safetensors").read_bytes())

    monkeypatch.setattr(finetune, "save_adapter", save_adapter)
    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=3,
                             VALIDATION_FRACTION=0)  # fmt: skip
    assert code == 0, error
    assert len(set(saved)) == 3
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == saved[-1]


# ---- The terminal, and --caption ----------------------------------------------------------------


def test_output_in_a_file_has_no_bars_and_short_lines(ran):
    assert ran.error == ""
    assert "\r" not in ran.output and "\x1b" not in ran.output and "it/s" not in ran.output
    text = ran.output.replace(str(ran.data), "D").replace(str(ran.out), "O")
    text = text.replace(str(REPOSITORY), "R")
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_captions_come_as_they_are_made(ran, sample, monkeypatch, tmp_path):
    """40 pictures in 3 batches, each in the file before the next is made; 2 can't be read."""
    folder = tmp_path / "pictures"
    for number, picture in enumerate(sorted(sample.glob("Image/*/*.png"))[:38]):
        (folder / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder / f"{number % 3}/{number:02}.png")
    (folder / "0/broken.png").write_bytes(b"no picture")
    (folder / "2/empty.jpg").write_bytes(b"")
    path, there, real = tmp_path / "captions.tsv", [], finetune.generate_captions

    def generate_captions(*arguments):
        there.append(path.read_text().count("\n"))
        return real(*arguments)

    monkeypatch.setattr(finetune, "generate_captions", generate_captions)
    with open(path, "w") as file, contextlib.redirect_stdout(file):
        with contextlib.redirect_stderr(io.StringIO()) as error:
            code = finetune.main(["--caption", str(folder), "--output-dir", str(ran.out),
                                  "--num-workers", "0"])  # fmt: skip
    assert code == 1
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    captioned = [str(p) for p in sorted(folder.glob("*/*.png")) if p.name != "broken.png"]
    assert [row[0] for row in rows] == captioned and len(rows) == 38
    assert all(len(row) == 2 and row[1] for row in rows)
    assert len(there) == 3 and there[0] == 0 and there[1] in (15, 16) and there[2] in (31, 32)
    named = [line for line in error.getvalue().splitlines() if line.startswith("not captioned: ")]
    assert len(named) == 2
    assert "broken.png: is none of" in named[0] and "empty.jpg: is empty" in named[1]
