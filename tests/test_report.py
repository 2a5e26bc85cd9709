"""What a finished run leaves to look at: tables, losses, model card, trackers, and what it says."""

import dataclasses
import io
import json
import math
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from helpers import PlainModel, flags_of, read_captions, read_table, write_several
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune

MEASURES = ("held_out_loss", "exact", "cider_d")


@dataclasses.dataclass
class FinishedRun:
    """What a run has said, and what it has left in its folder."""

    folder: Path
    output: str
    record: dict  # settings.json
    card: str  # README.md
    metrics: list[dict[str, str]]  # metrics.csv
    captioned: list[dict[str, str]]  # held_out.csv
    pairs: list[dict[str, str]]  # pairs.csv

    @property
    def results(self) -> dict:
        return self.record["results"]

    @property
    def remarks(self) -> list[str]:
        """What is said to look wrong."""
        return self.results["remarks"]

    @property
    def printed(self) -> dict[str, str]:
        """The results as they are printed, by their names."""
        return dict(re.findall(r"^(\w+): +(.+)$", self.output, re.M))

    @property
    def training_pairs(self) -> list[dict[str, str]]:
        return [row for row in self.pairs if row["split"] == "train"]

    @property
    def held_out_pairs(self) -> list[dict[str, str]]:
        return [row for row in self.pairs if row["split"] == "held out"]

    @property
    def held_out_losses(self) -> list[float]:
        """The held-out loss before training, and that after each epoch."""
        cells = [row["held_out_loss"] for row in self.metrics]
        return [float(cell) for cell in cells if cell]


def finish_command(folder: Path, words: list[str]) -> FinishedRun:
    """Runs a command in this process, to its end, which leaves its results in `folder`."""
    output = io.StringIO()
    errors = io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        code = finetune.main(words)
    assert (code, errors.getvalue()) == (0, "")

    run = FinishedRun(
        folder=folder,
        output=output.getvalue(),
        record=json.loads((folder / "settings.json").read_text()),
        card=(folder / "README.md").read_text(),
        metrics=read_table(folder / "metrics.csv"),
        captioned=read_table(folder / "held_out.csv"),
        pairs=read_table(folder / "pairs.csv"),
    )
    # In every run, the same remarks are in settings.json, on the screen and in the card.
    assert re.findall(r"^please check: +(.+)$", run.output, re.M) == run.remarks
    assert re.findall(r"^Please check: (.+)\.$", run.card, re.M) == run.remarks
    return run


def finish(folder: Path, **settings) -> FinishedRun:
    """Runs finetune.py with these settings, to its end."""
    return finish_command(folder, flags_of({"OUTPUT_DIR": folder} | settings))


def write_different(folder: Path, sample: Path, caption: str = "") -> Path:
    """A TRAIN_DIR of twelve different pictures, with their captions or with this one for all."""
    folder.mkdir(parents=True)
    for picture in finetune.spread(sorted(sample.glob("Image/*/*.png")), 12):
        name = picture.parent.name
        shutil.copy(picture, folder / f"{name}.png")
        text = caption or (sample / "caption" / f"{name}.txt").read_text()
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, sample) -> Path:
    """A table with several captions a picture; of two pictures more, neither can be used.

    One is not in the table, one can't be read.
    """
    folder = write_several(tmp_path_factory.mktemp("several") / "data", sample, 24)
    shutil.copy(folder / "pictures/00.png", folder / "pictures/orphan.png")
    (folder / "pictures/01.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def ran(data, opt_base, tmp_path_factory) -> FinishedRun:
    """A run on `data`, with a tracker. It captions 5 pictures, in place of 256."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "MAX_CAPTIONED", 5)
        return finish(
            tmp_path_factory.mktemp("ran") / "out",
            TRAIN_DIR=data,
            MODEL_ID=opt_base,
            EPOCHS=3,
            BATCH_SIZE=5,
            VALIDATION_FRACTION=0.3,
            LEARNING_RATE=3e-3,
            SAMPLE_COUNT=200,
            LOG_WITH="tensorboard",
        )


# ---- pairs.csv: every pair with its loss --------------------------------------------------------


def test_pairs_csv_has_every_pair_once(ran, data):
    expected = []
    for line in (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["file_name"] != "pictures/01.png":  # which can't be read
            expected.append((f"{data}/{row['file_name']}", row["text"]))

    pairs = [(row["picture"], row["caption"]) for row in ran.pairs]

    assert sorted(pairs) == sorted(expected)


def test_pairs_csv_has_the_highest_losses_first(ran):
    assert ran.pairs == ran.training_pairs + ran.held_out_pairs
    for rows in (ran.training_pairs, ran.held_out_pairs):
        losses = [float(row["loss"]) for row in rows]
        assert losses == sorted(losses, reverse=True)
        assert len(set(losses)) > 5


def assert_plain_losses(run: FinishedRun, base: str, rows: list[dict[str, str]]) -> float:
    """These rows of pairs.csv have the losses of the saved adapter in plain transformers.

    Returns the loss per token of all of them.
    """
    plain = PlainModel(base, run.folder)
    total = 0.0
    tokens = 0
    for row in rows:
        caption_ids = plain.processor.tokenizer(row["caption"], add_special_tokens=False).input_ids
        ids = [*caption_ids, plain.stop]
        probabilities = plain.predict(row["picture"], ids)[range(len(ids)), ids]
        loss = -probabilities.log().sum().item()
        assert int(row["tokens"]) == len(ids)
        assert float(row["loss"]) == pytest.approx(loss / len(ids), abs=1e-4)
        total += loss
        tokens += len(ids)
    return total / tokens


def test_losses_of_pairs_are_those_of_plain_transformers(sample, opt_base, tmp_path):
    """Of a model that stays as it is; how the losses of one that learns are averaged is below."""
    run = finish(
        tmp_path / "out",
        TRAIN_DIR=write_several(tmp_path / "data", sample, 8),
        MODEL_ID=opt_base,
        LOAD_IN_4BIT=False,
        LORA_DROPOUT=0,
        LEARNING_RATE=1e-9,
        EPOCHS=3,
        BATCH_SIZE=5,
        VALIDATION_FRACTION=0.3,
    )

    assert len({row["loss"] for row in run.training_pairs}) > 12
    assert_plain_losses(run, opt_base, run.training_pairs)
    held_out_loss = assert_plain_losses(run, opt_base, run.held_out_pairs)
    assert run.results["held_out_loss"]["after"] == pytest.approx(held_out_loss, abs=1e-4)


def test_a_picture_in_the_wrong_folder_has_the_highest_loss(sample, small_data, opt_base, tmp_path):
    """One that is trained on, and one that is held out."""
    data = shutil.copytree(sample, tmp_path / "train")
    for folder in (data, small_data):
        right, wrong = sorted((folder / "Image").iterdir())[:2]
        picture = sorted(right.iterdir())[1]
        picture.rename(wrong / "moved.png")

    run = finish(
        tmp_path / "out",
        TRAIN_DIR=data,
        VALIDATION_DIR=small_data,
        MODEL_ID=opt_base,
        LEARNING_RATE=3e-3,
        EPOCHS=3,
    )

    assert Path(run.training_pairs[0]["picture"]).name == "moved.png"
    assert Path(run.held_out_pairs[0]["picture"]).name == "moved.png"


# ---- metrics.csv, and trackers ------------------------------------------------------------------


def test_metrics_csv_begins_with_the_held_out_loss_before_training(ran):
    before = ran.metrics[0]

    assert (before["step"], before["epoch"], before["train_loss"]) == ("0", "0", "")
    assert float(before["held_out_loss"]) == ran.results["held_out_loss"]["before"]


def test_metrics_csv_has_a_row_for_each_step(ran):
    rows = ran.metrics[1:]
    epoch_steps = math.ceil(len(ran.training_pairs) / 5)

    assert [int(row["step"]) for row in rows] == list(range(1, 3 * epoch_steps + 1))
    epochs = [1] * epoch_steps + [2] * epoch_steps + [3] * epoch_steps
    assert [int(row["epoch"]) for row in rows] == epochs
    assert all(float(row["train_loss"]) > 0 for row in rows)
    seconds = [float(row["seconds"]) for row in ran.metrics]
    assert seconds == sorted(seconds)


def test_the_held_out_loss_is_measured_at_the_end_of_each_epoch(ran):
    epoch_steps = math.ceil(len(ran.training_pairs) / 5)

    measured = [int(row["step"]) for row in ran.metrics if row["held_out_loss"]]

    assert measured == [0, epoch_steps, 2 * epoch_steps, 3 * epoch_steps]


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: the values of each curve by their steps."""
    scalars: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        reader = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in reader.Tags()["scalars"]:
            curve = scalars.setdefault(name, {})
            for event in reader.Scalars(name):
                curve[event.step] = event.value
    return scalars


def test_a_tracker_gets_all_metrics(ran):
    scalars = read_scalars(ran.folder)

    for name in ran.metrics[0].keys() - {"step"}:
        expected = {int(row["step"]): float(row[name]) for row in ran.metrics if row[name]}
        assert scalars[name] == pytest.approx(expected, rel=1e-6), name


# ---- held_out.csv, and the measures -------------------------------------------------------------


def test_held_out_csv_has_all_captions_of_each_picture(ran):
    captions: dict[str, set[str]] = {}
    for row in ran.held_out_pairs:
        captions.setdefault(row["picture"], set()).add(row["caption"])

    counts = set()
    for row in ran.captioned:
        references = json.loads(row["references"])
        counts.add(len(references))
        assert set(references) == captions[row["picture"]]

    assert counts == {3, 4, 5}
    text = "".join(row["references"] for row in ran.captioned)
    assert "«" in text  # and not \u00ab: people read this table, too


def test_the_printed_measures_are_those_of_held_out_csv(ran):
    references = [json.loads(row["references"]) for row in ran.captioned]
    count = len(references)
    for when in ("before", "after"):
        captions = [row[when] for row in ran.captioned]
        exact = 0
        for caption, texts in zip(captions, references, strict=True):
            if caption in texts:
                exact += 1
        cider = finetune.cider_d(captions, references)

        assert ran.results["exact"][when] == pytest.approx(exact / count)
        assert ran.results["cider_d"][when] == pytest.approx(cider, abs=1e-6)
        assert f"{exact} {when}" in ran.printed["exact"]
        assert f"{cider:.4f} {when}" in ran.printed["cider_d"]
    assert ran.printed["exact"].endswith(f"of {count}")
    assert ran.results["cider_d"]["after"] > 0


def test_not_more_than_max_captioned_held_out_pictures_are_captioned(ran):
    held_out = {row["picture"] for row in ran.held_out_pairs}
    captioned = [row["picture"] for row in ran.captioned]

    assert len(held_out) == 7  # three tenths of 23
    assert len(captioned) == len(set(captioned)) == 5
    assert ran.output.count("  reference: ") == 5  # though SAMPLE_COUNT is more
    assert finetune.MAX_CAPTIONED == 256  # where no test changes it


# ---- skipped.csv and settings.json --------------------------------------------------------------


def test_skipped_csv_names_each_file_that_is_not_used(ran):
    reasons = {}
    for row in read_table(ran.folder / "skipped.csv"):
        reasons[Path(row["path"]).name] = row["reason"]

    assert reasons.keys() == {"orphan.png", "01.png"}
    assert reasons["orphan.png"].startswith("has no caption in ")
    assert reasons["01.png"].startswith("is text, not a picture")
    # Said twice: of the file that is found first, and of the one that is read later.
    assert ran.output.count("not used: 1") == 2


def test_settings_json_has_the_facts_of_the_run(ran):
    assert ran.record["dtype"] == "float32"
    assert ran.record["device"] == "cpu"
    assert ran.record["versions"]["torch"] == torch.__version__


def test_the_settings_in_settings_json_repeat_the_run(ran, tmp_path):
    settings = ran.record["settings"] | {"OUTPUT_DIR": tmp_path / "again", "LOG_WITH": ""}

    again = finish(tmp_path / "again", **settings)

    first_adapter = (ran.folder / "adapter_model.safetensors").read_bytes()
    assert (again.folder / "adapter_model.safetensors").read_bytes() == first_adapter


# ---- What is said at the end --------------------------------------------------------------------


@pytest.fixture(scope="module")
def worse(sample, opt_base, tmp_path_factory) -> FinishedRun:
    """A run that forgets: it learns one caption for all pictures, and is measured on their own.

    The learning rate is so low that the held-out loss rises slowly, from epoch to epoch.
    """
    root = tmp_path_factory.mktemp("worse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "MAX_CAPTIONED", 5)
        return finish(
            root / "out",
            TRAIN_DIR=write_different(root / "alike", sample, caption="enamel pin"),
            VALIDATION_DIR=write_different(root / "data", sample),
            MODEL_ID=opt_base,
            LOAD_IN_4BIT=False,
            EPOCHS=4,
            BATCH_SIZE=2,
            LEARNING_RATE=1e-3,
        )


def test_a_worse_run_keeps_its_best_epoch(worse, opt_base):
    before = worse.held_out_losses[0]
    first = worse.held_out_losses[1]
    last = worse.held_out_losses[-1]
    assert before < first < last - 0.1

    assert worse.results["held_out_loss"] == {"before": before, "after": first}
    assert worse.results["best_step"] == 6  # the end of the first of four epochs
    assert worse.results["steps"] == 24
    saved = assert_plain_losses(worse, opt_base, worse.held_out_pairs)
    assert saved == pytest.approx(first, abs=1e-4)


def test_a_worse_run_is_remarked(worse):
    remark = worse.remarks[0]

    assert "the held-out loss is no lower than before training" in remark
    assert "lower LEARNING_RATE" in remark


def test_all_pictures_of_validation_dir_are_captioned(worse):
    """Whatever MAX_CAPTIONED is."""
    assert len(worse.captioned) == len(worse.held_out_pairs) == 12


def test_losses_of_pairs_are_averaged_over_the_epochs(worse):
    """All captions are of the same length, so that the mean over pairs is that over steps."""
    of_steps = [float(row["train_loss"]) for row in worse.metrics[1:]]
    of_pairs = [float(row["loss"]) for row in worse.training_pairs]

    assert np.mean(of_pairs) == pytest.approx(np.mean(of_steps), abs=1e-4)


@pytest.mark.parametrize("alike, is_remarked", [(11, True), (10, False)])
def test_captions_that_are_nearly_all_alike_are_remarked(
    alike, is_remarked, sample, opt_base, monkeypatch, tmp_path
):
    """Of twelve. The captions are not those of the model, which depend on the processor."""
    before = [f"drawing {number}" for number in range(12)]
    after = ["enamel pin"] * alike + before[alike:]
    answers = [before, after]

    def caption(captioner: finetune.Captioner, features: torch.Tensor) -> list[finetune.Caption]:
        return [finetune.Caption(text, 0.5) for text in answers.pop(0)]

    monkeypatch.setattr(finetune.Captioner, "caption", caption)
    data = write_different(tmp_path / "data", sample)
    run = finish(tmp_path / "out", TRAIN_DIR=data, VALIDATION_DIR=data, MODEL_ID=opt_base, EPOCHS=1)

    assert [row["after"] for row in run.captioned] == after
    remarks = [remark for remark in run.remarks if "nearly the same caption" in remark]
    if is_remarked:
        [remark] = remarks
        assert "for all held-out pictures: lower LEARNING_RATE" in remark
        assert "held_out.csv" in remark
    else:
        assert remarks == []


def finish_short(root: Path, sample: Path, base: str, fraction: float) -> FinishedRun:
    """Six steps on twelve pictures, of which this share is held out."""
    return finish(
        root / "out",
        TRAIN_DIR=write_different(root / "data", sample),
        MODEL_ID=base,
        EPOCHS=2,
        BATCH_SIZE=4,
        VALIDATION_FRACTION=fraction,
    )


@pytest.fixture(scope="module")
def nothing_held_out(tmp_path_factory, sample, opt_base) -> FinishedRun:
    return finish_short(tmp_path_factory.mktemp("nothing"), sample, opt_base, 0)


@pytest.fixture(scope="module")
def one_held_out(tmp_path_factory, sample, opt_base) -> FinishedRun:
    return finish_short(tmp_path_factory.mktemp("one"), sample, opt_base, 0.1)


def assert_not_measured(run: FinishedRun, names: tuple[str, ...]) -> None:
    """These results are a dash, nowhere NaN; and the adapter of the last step is saved."""
    for name in names:
        assert run.results[name] == {"before": None, "after": None}
        assert run.printed[name] == "-"
    assert run.results["best_step"] == run.results["steps"] == 6
    assert not re.search(r"\bnan\b", run.output + json.dumps(run.record) + run.card, re.I)


def test_nothing_is_measured_where_nothing_is_held_out(nothing_held_out):
    assert nothing_held_out.captioned == nothing_held_out.held_out_pairs == []
    assert_not_measured(nothing_held_out, MEASURES)
    [remark] = nothing_held_out.remarks
    assert "nothing is held out" in remark


def test_one_held_out_picture_has_no_cider_d(one_held_out):
    assert len(one_held_out.captioned) == len(one_held_out.held_out_pairs) == 1
    assert_not_measured(one_held_out, ("cider_d",))
    no_cider_d, unchanged = one_held_out.remarks
    assert "cider_d is '-': it needs two" in no_cider_d
    assert "captions of the held-out pictures did not change: raise" in unchanged


# ---- losses.png ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nothing_held_out", "one_held_out"])
def test_losses_png_shows_the_curve_of_the_training_loss(name, request):
    """Also where there is no held-out loss to draw."""
    run = request.getfixturevalue(name)

    with Image.open(run.folder / "losses.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)

    height, width, _ = pixels.shape
    inside = pixels[height // 20 : height * 17 // 20]  # above the numbers of the steps
    is_blue = inside[..., 2] - inside[..., 0] > 60
    assert is_blue.any(axis=0).sum() > width * 2 / 3  # columns in which the curve is


# ---- The model card -----------------------------------------------------------------------------

SNIPPET = re.compile(r"```python\n(.*?)```", re.S)


def test_the_card_has_the_metadata_that_the_hub_reads(ran):
    card = ModelCard.load(ran.folder / "README.md")

    assert card.data.library_name == "peft"
    assert card.data.license
    assert {"lora", "image-captioning"} <= set(card.data.tags)
    assert card.data.base_model is None  # for the base is a folder, which the Hub does not have


def test_the_card_says_what_was_measured(ran):
    text = ModelCard.load(ran.folder / "README.md").text

    assert text.strip().startswith("# BLIP-2 captions: out\n")
    assert "(losses.png)" in text
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.M))
    for name in (*MEASURES, "training_pairs", "held_out_pairs", "steps", "best_step"):
        assert rows[name.replace("_", " ")] == ran.printed[name]


@pytest.mark.parametrize("name, count", [("ran", 3), ("one_held_out", 1), ("nothing_held_out", 0)])
def test_the_card_shows_up_to_three_captioned_pictures(name, count, request):
    run = request.getfixturevalue(name)

    shown = 0
    for row in run.captioned:
        example = (
            f"    reference: {' / '.join(json.loads(row['references']))}\n"
            f"    before:    {row['before']}\n"
            f"    after:     {row['after']}\n"
        )
        if example in run.card:
            shown += 1

    assert shown == count
    assert run.card.count("reference: ") == count


def test_the_card_names_a_base_from_the_hub(ran, tmp_path):
    """The folder's name has all that YAML and Python could trip over."""
    base = "Salesforce/blip2-opt-2.7b"
    settings = ran.record["settings"] | {"MODEL_ID": base, "OUTPUT_DIR": 'a/b: c\'s "d"'}

    shutil.copy(ran.folder / "held_out.csv", tmp_path)
    finetune.write_card(tmp_path, ran.record | {"settings": settings})

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base
    assert f"`{base}`" in card.text
    compile(SNIPPET.search(card.text)[1], "README.md", "exec")


def run_snippet(card: str, picture: str) -> str:
    """What the card's snippet prints, with the picture's path put in."""
    [snippet] = SNIPPET.findall(card)
    output = io.StringIO()
    with redirect_stdout(output):
        exec(snippet.replace("picture.jpg", picture), {})
    return output.getvalue()


@pytest.mark.parametrize(
    "kind, in_4bit, dtype, prompt, epochs, rate",
    [
        ("opt", True, "float32", 'it\'s "a"', 24, 2e-3),
        ("opt", False, "bfloat16", "", 8, 3e-3),
        ("t5", True, "bfloat16", "", 6, 6e-3),
        ("t5", False, "float32", "say it's", 8, 6e-3),
    ],
)
def test_the_cards_snippet_captions_as_the_flag_does(
    kind,
    in_4bit,
    dtype,
    prompt,
    epochs,
    rate,
    request,
    small_data,
    command,
    monkeypatch,
    tmp_path,
):
    """On any CPU. A quote is in the folder's name.

    It is trained until the captions are sure, and do not depend on the last digit.
    """
    monkeypatch.chdir(tmp_path)
    run = finish(
        Path("it's out"),
        TRAIN_DIR=small_data,
        MODEL_ID=request.getfixturevalue(f"{kind}_base"),
        LOAD_IN_4BIT=in_4bit,
        DTYPE=dtype,
        PROMPT=prompt,
        EPOCHS=epochs,
        BATCH_SIZE=4,
        LEARNING_RATE=rate,
        MAX_CAPTION_TOKENS=16,
        SAMPLE_COUNT=2,
    )
    pictures = [str(path) for path in sorted(small_data.glob("Image/*/*.png"))[::8]]
    code, output, error = command("--caption", *pictures, OUTPUT_DIR="it's out")
    assert code == 0, error
    captions = read_captions(output)

    for picture in pictures:
        caption, _ = captions[picture]
        assert caption.startswith("enamel pin: ")  # which the base does not say
        assert run_snippet(run.card, picture) == f"{caption}\n"

    # On a CPU with avx512_bf16, bitsandbytes sets a flag with which it repacks 4-bit weights.
    if in_4bit:
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
        caption, _ = captions[pictures[0]]
        assert run_snippet(run.card, pictures[0]) == f"{caption}\n", "with avx512_bf16"


@pytest.mark.parametrize(
    "page, broken",
    [
        ("losses.png", "matplotlib.figure.Figure.savefig"),
        ("report.html", "finetune.write_page"),
        ("README.md", "finetune.write_card"),
    ],
)
def test_a_page_that_fails_costs_nothing_else(
    page, broken, small_data, command, opt_base, monkeypatch, tmp_path
):
    """A sentence says so, and the same command makes the page."""
    settings = {"TRAIN_DIR": small_data, "MODEL_ID": opt_base, "EPOCHS": 1, "SAMPLE_COUNT": 1}

    with monkeypatch.context() as patch:
        patch.setattr(broken, lambda *arguments, **named: 1 / 0)
        code, output, error = command(**settings)

    assert code == 1
    assert f"{page} can't be made: ZeroDivisionError" in error
    assert "same command" in error
    assert "Traceback" not in error
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / page).exists()
    assert ("look at: " in output) == (page != "report.html")

    code, output, error = command(**settings)

    assert (code, error) == (0, "")
    assert "epoch 1/1" not in output  # it has not trained again
    assert (tmp_path / "out" / page).exists()
