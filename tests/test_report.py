"""What a finished run leaves to look at: tables, report, model card, trackers, and what it says."""

import contextlib
import csv
import errno
import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from conftest import flags_of
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from test_measures import read_table, write_several

import finetune

MEASURES = ("held_out_loss", "exact", "cider_d")


def run(*flags: str, **settings) -> tuple[int, str, str]:
    """As the fixture `command`, for runs that several tests look at."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = finetune.main([*flags_of(settings), *flags])
    return code, out.getvalue(), err.getvalue()


def record_of(folder: Path) -> dict:
    return json.loads((folder / "settings.json").read_text())


def summary_of(output: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+): +(.+)$", output, re.M))


def remarks_of(folder: Path, output: str) -> list[str]:
    """Those at the end of the output, which are in settings.json and in the card, too."""
    remarks = re.findall(r"^to look at: +(.+)$", output, re.M)
    assert record_of(folder)["results"]["remarks"] == remarks
    assert re.findall(r"^To look at: (.+)\.$", (folder / "README.md").read_text(), re.M) == remarks
    return remarks


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def losses_of(folder: Path, rows: list[dict[str, str]]) -> list[float]:
    """The loss per token of these rows of pairs.csv, with the adapter in `folder`."""
    with contextlib.redirect_stdout(io.StringIO()):
        captioner = finetune.load_captioner(SimpleNamespace(**record_of(folder)["settings"]))
    PeftModel.from_pretrained(captioner.model, folder)
    losses = []
    for row in rows:
        picture = finetune.read_picture(row["picture"], 64)
        features = captioner.encode(captioner.processor.image_processor(picture).pixel_values)
        learned = [*captioner.tokenize(row["caption"]), captioner.stop]
        assert len(learned) == int(row["tokens"])
        with torch.no_grad():
            losses.append(captioner.losses([finetune.Row(features[0], learned)]).item())
    return [loss / int(row["tokens"]) for loss, row in zip(losses, rows, strict=True)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, sample, opt_base):
    """A run on several captions a picture, with a tracker, its losses noted as it trained.

    One picture is not in the table, and one can't be read.
    """
    root = tmp_path_factory.mktemp("ran")
    data = write_several(root / "data", sample, 24)
    shutil.copy(data / "pictures/00.png", data / "pictures/orphan.png")
    (data / "pictures/01.png").write_bytes(b"no picture")
    noted, seen, real, train = [], [], finetune.Captioner.losses, finetune.train

    def losses(captioner, rows):
        result = real(captioner, rows)
        if torch.is_grad_enabled():
            noted.extend(zip(rows, result.tolist(), strict=True))
        return result

    def watched(settings, learner, datasets, *more):
        seen.append(datasets)
        return train(settings, learner, datasets, *more)

    settings = {"TRAIN_DIR": data, "MODEL_ID": opt_base, "OUTPUT_DIR": root / "out", "EPOCHS": 3,
                "BATCH_SIZE": 5, "VALIDATION_FRACTION": 0.3, "LEARNING_RATE": 3e-3,
                "SAMPLE_COUNT": 200, "LOG_WITH": "tensorboard"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.Captioner, "losses", losses)
        patch.setattr(finetune, "train", watched)
        code, output, error = run(**settings)
    assert code == 0, error
    pairs = read_table(root / "out/pairs.csv")
    return SimpleNamespace(
        out=root / "out", data=data, output=output, error=error, noted=noted, datasets=seen[0],
        record=record_of(root / "out"), metrics=read_table(root / "out/metrics.csv"), pairs=pairs,
        train=[row for row in pairs if row["split"] == "train"],
        held_out=[row for row in pairs if row["split"] == "held out"])


@pytest.fixture(scope="module")
def taught(tmp_path_factory, sample, opt_base):
    """The README's first command, in a folder with what it names."""
    root = tmp_path_factory.mktemp("repository")
    readme = (Path(finetune.__file__).parent / "README.md").read_text(encoding="utf-8")
    words = re.search(r"finetune\.py (--model-id tests/tiny_blip2.*)", readme)[1].split()
    shutil.copytree(sample, root / "train")
    shutil.copytree(opt_base, root / "tests/tiny_blip2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        code, output, error = run(*words)
    assert code == 0, error
    return SimpleNamespace(root=root, out=root / "blip2_lora_finetuned", output=output)


# ---- Tables -------------------------------------------------------------------------------------


def test_pairs_csv_has_every_pair_once_highest_loss_first(ran):
    assert list(ran.pairs[0]) == ["split", "loss", "tokens", "picture", "caption"]
    assert ran.pairs == ran.train + ran.held_out
    for rows in (ran.train, ran.held_out):
        losses = [float(row["loss"]) for row in rows]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) > 5
    pairs, _ = finetune.find_pairs(str(ran.data))
    assert sorted((row["picture"], row["caption"]) for row in ran.pairs) == [
        tuple(pair) for pair in pairs if not pair.picture.endswith("01.png")]
    assert {row["picture"] for row in ran.train}.isdisjoint(row["picture"] for row in ran.held_out)
    assert len({row["picture"] for row in ran.held_out}) == 7  # three tenths of 23
    said = ran.output.partition("highest losses")[2].splitlines()[1:7]
    for line, row in zip(said, ran.train[:3] + ran.held_out[:3], strict=True):
        assert f"{row['split']}, {row['picture']}: {row['caption']}" in line


def test_training_losses_are_means_over_the_epochs(ran):
    training = ran.datasets.training
    assert len(ran.train) == len(training)
    for index, pair in enumerate(training.pairs):
        mine = training[index]
        losses = [loss for row, loss in ran.noted if row.learned == mine.learned
                  and torch.equal(row.features, mine.features)]
        (row,) = [row for row in ran.train if (row["picture"], row["caption"]) == pair]
        assert len(losses) == 3 and len({round(loss, 3) for loss in losses}) > 1
        assert int(row["tokens"]) == len(mine.learned)
        assert float(row["loss"]) == pytest.approx(sum(losses) / 3 / len(mine.learned), abs=1e-4)


def test_the_best_epoch_is_saved_and_not_the_last(sample, small_data, command, opt_base, tmp_path):
    """Trained on wrong captions. The held-out losses in pairs.csv are those of what is saved."""
    for text in (small_data / "caption").iterdir():
        text.write_text("enamel pin: scarlet plus over rose")
    code, _, error = command(
        TRAIN_DIR=small_data, VALIDATION_DIR=sample, MODEL_ID=opt_base, EPOCHS=6, BATCH_SIZE=4,
        LEARNING_RATE=3e-3, MAX_CAPTION_TOKENS=16, SAMPLE_COUNT=0)
    assert code == 0, error
    metrics = read_table(tmp_path / "out/metrics.csv")
    losses = [float(row["held_out_loss"]) for row in metrics if row["held_out_loss"]]
    results = record_of(tmp_path / "out")["results"]
    assert results["held_out_loss"] == {"before": losses[0], "after": min(losses[1:])}
    assert min(losses[1:]) < losses[-1] - 0.1 and results["best_step"] < 18
    rows = [row for row in read_table(tmp_path / "out/pairs.csv") if row["split"] == "held out"]
    found = [float(row["loss"]) for row in rows]
    assert found[::20] == pytest.approx(losses_of(tmp_path / "out", rows[::20]), abs=1e-4)
    mean = np.average(found, weights=[int(row["tokens"]) for row in rows])
    assert mean == pytest.approx(results["held_out_loss"]["after"], abs=1e-3)


def test_a_picture_in_the_wrong_folder_is_among_the_first(sample, command, opt_base, tmp_path):
    """Two, in fact: one that is trained on, and one that is held out."""
    data = shutil.copytree(sample, tmp_path / "data")
    folders, moved = sorted((data / "Image").iterdir()), {}
    for number, split in enumerate(("train", "held out")):
        source = folders[5 * number] / "02.png"
        for name in range(200):  # until one falls into that part
            target = folders[5 * number + 2] / f"moved{name}.png"
            source = source.rename(target)
            parts = finetune.split_pairs(finetune.find_pairs(str(data))[0], 0.1, finetune.SEED,
                                         str(data))
            if any(pair.picture == str(target) for pair in parts[number]):
                break
        moved[split] = str(target)
    code, output, error = command(TRAIN_DIR=data, MODEL_ID=opt_base, LEARNING_RATE=3e-3, EPOCHS=6)
    assert code == 0, error
    rows = read_table(tmp_path / "out/pairs.csv")
    for split, picture in moved.items():
        worst = [row["picture"] for row in rows if row["split"] == split][:3]
        assert picture in worst
        assert f"{split}, {picture}: " in output.partition("highest losses")[2]


def test_metrics_csv_begins_before_the_training(ran):
    before, *rows = ran.metrics
    assert list(before) == ["step", "epoch", "learning_rate", "train_loss", "held_out_loss",
                            "grad_norm", "pairs_per_second", "seconds"]
    assert (before["step"], before["epoch"], before["train_loss"]) == ("0", "0", "")
    loss = ran.record["results"]["held_out_loss"]
    assert float(before["held_out_loss"]) == loss["before"]
    steps = math.ceil(len(ran.train) / 5)
    assert [int(row["step"]) for row in rows] == list(range(1, 3 * steps + 1))
    assert [int(row["epoch"]) for row in rows] == sorted([1, 2, 3] * steps)
    measured = [int(row["step"]) for row in rows if row["held_out_loss"]]
    assert measured == [steps, 2 * steps, 3 * steps]
    times = [float(row["seconds"]) for row in ran.metrics]
    assert times == sorted(times) and all(float(row["train_loss"]) > 0 for row in rows)


def test_held_out_csv_has_all_that_the_measures_are_made_of(ran):
    rows, captions = read_table(ran.out / "held_out.csv"), {}
    assert list(rows[0]) == ["picture", "references", "before", "after", "confidence"]
    for row in ran.held_out:
        captions.setdefault(row["picture"], set()).add(row["caption"])
    references = [json.loads(row["references"]) for row in rows]
    assert {row["picture"]: set(texts) for row, texts in zip(rows, references, strict=True)
            } == captions
    assert {len(texts) for texts in references} == {3, 4, 5}
    assert "«" in "".join(row["references"] for row in rows)  # a table is read by people, too
    results, shown = ran.record["results"], summary_of(ran.output)
    for when in ("before", "after"):
        texts = [row[when] for row in rows]
        exact = np.mean([text in some for text, some in zip(texts, references, strict=True)])
        assert results["exact"][when] == pytest.approx(exact)
        assert results["cider_d"][when] == pytest.approx(
            finetune.cider_d(texts, references), abs=1e-6)
        assert f"{results['cider_d'][when]:.4f} {when}" in shown["cider_d"]
        assert f"{exact * len(rows):.0f} {when}" in shown["exact"]
    assert shown["exact"].endswith(f"of {len(rows)}") and results["cider_d"]["after"] > 0
    assert ran.output.count("  reference: ") == len(rows) == 7  # SAMPLE_COUNT is above


def test_held_out_csv_has_256_pictures_at_most_but_all_of_validation_dir(
    sample, small_data, command, opt_base, tmp_path
):
    many = tmp_path / "many"
    many.mkdir()
    for number, picture in enumerate((sorted(sample.glob("Image/*/*.png")) * 2)[:300]):
        shutil.copy(picture, many / f"{number:03}.png")
        (many / f"{number:03}.txt").write_text(f"a {'star' if number % 2 else 'moon'}")
    flags = {"MODEL_ID": opt_base, "EPOCHS": 1, "MAX_CAPTION_TOKENS": 3, "SAMPLE_COUNT": 3}
    for more, count, held_out in (({"TRAIN_DIR": many, "VALIDATION_FRACTION": 0.95}, 256, 285),
                                  ({"TRAIN_DIR": small_data, "VALIDATION_DIR": many}, 300, 300)):
        code, output, error = command(**flags, **more)
        assert code == 0, error
        rows = read_table(tmp_path / "out/held_out.csv")
        assert len({row["picture"] for row in rows}) == len(rows) == count
        assert summary_of(output)["held_out_pairs"] == str(held_out)
        assert summary_of(output)["exact"].endswith(f"of {count}")
        assert output.count("  reference: ") == 3


def test_skipped_csv_and_settings_json(ran, tmp_path):
    """Each file that is not used, and what is needed to repeat the run."""
    rows = {Path(row["path"]).name: row["reason"] for row in read_table(ran.out / "skipped.csv")}
    assert rows.keys() == {"orphan.png", "01.png"} and "not used: 2" in ran.output
    assert rows["orphan.png"].startswith("is not in ") and "JPEG" in rows["01.png"]
    record = ran.record
    assert {"settings", "data", "dtype", "device", "versions", "results"} <= record.keys()
    assert (record["dtype"], record["device"]) == ("float32", "cpu")
    assert record["versions"]["torch"] == torch.__version__
    assert all(record["results"][name].keys() == {"before", "after"} for name in MEASURES)
    settings = record["settings"] | {"OUTPUT_DIR": str(tmp_path / "again"), "LOG_WITH": ""}
    code, _, error = run(**settings)
    assert code == 0, error
    name = "adapter_model.safetensors"
    assert (ran.out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# ---- What a run says ----------------------------------------------------------------------------


def test_the_readmes_first_command_gives_21_of_21(taught):
    assert re.fullmatch(r"\d before, 21 after, of 21", summary_of(taught.output)["exact"])
    assert remarks_of(taught.out, taught.output) == []
    assert taught.output.count("  reference: ") == 6


def test_output_in_a_file_has_no_bars(ran):
    assert ran.error == "" and not re.search(r"[\r\x1b]|it/s|step/s|picture/s|%\|", ran.output)


def test_a_run_that_got_worse_says_so(small_data, command, opt_base, tmp_path):
    code, output, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=3,
                                  LEARNING_RATE=1, BATCH_SIZE=4)
    assert (code, error) == (0, "")
    (remark,) = [text for text in remarks_of(tmp_path / "out", output) if "not below" in text]
    assert "held-out loss" in remark and "lower LEARNING_RATE" in remark
    loss = record_of(tmp_path / "out")["results"]["held_out_loss"]
    assert loss["after"] > loss["before"]


def test_captions_nearly_all_alike_are_said(sample, small_data, command, opt_base, tmp_path):
    for text in (small_data / "caption").iterdir():
        text.write_text("enamel pin")
    flags = {"TRAIN_DIR": small_data, "MODEL_ID": opt_base, "EPOCHS": 2, "LEARNING_RATE": 1e-2,
             "BATCH_SIZE": 1, "MAX_CAPTION_TOKENS": 16}
    code, output, error = command(**flags, VALIDATION_DIR=sample)
    assert code == 0, error
    captions = [row["after"] for row in read_table(tmp_path / "out/held_out.csv")]
    assert captions.count("enamel pin") > 0.9 * len(captions)
    (remark,) = [text for text in remarks_of(tmp_path / "out", output) if "alike" in text]
    assert "LEARNING_RATE" in remark and "held_out.csv" in remark
    code, output, error = command(**flags | {"EPOCHS": 8}, VALIDATION_FRACTION=0.5)
    assert code == 0, error
    (remark,) = remarks_of(tmp_path / "out", output)
    assert "CIDEr-D" in remark and "captions that differ" in remark
    results, shown = record_of(tmp_path / "out")["results"], summary_of(output)
    assert results["cider_d"] == {"before": None, "after": None} and shown["cider_d"] == "-"
    assert results["exact"]["after"] == 1 and shown["exact"].endswith("6 after, of 6")


def test_with_nothing_held_out(small_data, command, opt_base, tmp_path):
    code, output, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=2,
                                  BATCH_SIZE=4, VALIDATION_FRACTION=0)  # fmt: skip
    assert (code, error) == (0, "")
    out, shown = tmp_path / "out", summary_of(output)
    (remark,) = remarks_of(out, output)
    assert "nothing is held out" in remark
    results = record_of(out)["results"]
    for name in MEASURES:
        assert results[name] == {"before": None, "after": None} and shown[name] == "-"
    assert results["best_step"] == results["steps"] == 6
    assert read_table(out / "held_out.csv") == []
    words = output + (out / "settings.json").read_text() + (out / "README.md").read_text()
    assert not re.search(r"\bnan\b", words, re.I)
    picture = pixels(out / "report.png").astype(int)
    assert picture.shape[:2] == (400, 1300)
    inside = picture[30:340, 250:1250]  # of the axes, beside the legend
    assert ((inside[..., 2] - inside[..., 0]) > 60).any(axis=0).sum() > 800  # a curve


def test_a_tracker_reads_what_metrics_csv_has(ran):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for path in sorted(ran.out.rglob("events.out.tfevents.*")):
        reader = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in reader.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update((e.step, e.value) for e in reader.Scalars(tag))
    for name in ("train_loss", "held_out_loss", "learning_rate", "grad_norm", "seconds"):
        expected = {int(row["step"]): float(row[name]) for row in ran.metrics if row[name]}
        assert scalars[name] == pytest.approx(expected, rel=1e-6), name
    logged = "".join(path.read_text() for path in ran.out.rglob("hparams.yml"))
    assert "EPOCHS: 3\n" in logged and "BATCH_SIZE: 5\n" in logged


def test_a_tracker_that_is_not_installed_is_a_sentence(command, small_data, tmp_path):
    installed = set(map(str, finetune.get_available_trackers()))
    for tracker in ({str(tracker.value) for tracker in LoggerType} - installed - {"all"}):
        code, output, error = command(TRAIN_DIR=small_data, LOG_WITH=tracker)
        assert (code, output) == (1, "") and "Traceback" not in error
        assert f"LOG_WITH is '{tracker}'" in error and "'tensorboard'" in error
        assert not list(tmp_path.glob("out*"))


# ---- report.png ---------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The words beside the pictures, as matplotlib's objects."""
    from matplotlib.axes import Axes

    words, real = [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda *arguments, **more: words.append(
        real(*arguments, **more)) or words[-1])
    return words


def draw(ran, folder: Path, rows: list[tuple], count: int) -> np.ndarray:
    """report.png of the run with other rows of held_out.csv: references, before, after."""
    shutil.copytree(ran.out, folder)
    pictures = sorted(map(str, ran.data.glob("pictures/1*.png")))
    with open(folder / "held_out.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([
            ("picture", "references", "before", "after", "confidence"),
            *((pictures[i % len(pictures)], json.dumps(row[0]), *row[1:], 0.5)
              for i, row in enumerate(rows))])
    settings = ran.record["settings"] | {"SAMPLE_COUNT": count}
    finetune.draw_report(folder, ran.record | {"settings": settings})
    return pixels(folder / "report.png")


ODD = [  # a caption or its beginning, as it must be read in the report
    "only $x^2$ or $6, 100% \\frac_{1}^2 a_b", "$", "$$ \\alpha % { } _ ^ & # ~ <b>", "", " ",
    "一只红色的猫坐在桌子上看着窗外的鸟和树", "قطة حمراء على الطاولة",
    "🎉 party 👩\u200d👩\u200d👧 🇫🇷", "Ünïcödé e\u0301",
    "bell \x07 escape \x1b[31m null-like \x01 end", "line\nbreak\ttab\r\u2028end",
    "enamel pin: " + "a red circle on a yellow background " * 20, "word" * 60, "W" * 300,
    "A WOMAN WITH A MAROON MOHAWK WATCHES SWIMMING WOMEN IN MANHATTAN " * 4,
    "猫" * 200, "🎉" * 100, "a\u0378\U0010fffd star 𓀀",
]  # fmt: skip


@pytest.mark.parametrize("start", [0, 10])
def test_the_report_of_odd_captions(start, ran, drawn, tmp_path):
    """All is said as it is, in its own place: no words run into the next picture or line."""
    odd = ODD[start : start + 10]
    picture = draw(ran, tmp_path / "drawn", [([text], text, text) for text in odd], 12)
    assert picture.shape[:2] == (400 + 180 * math.ceil(len(odd) / 2), 1300)
    assert len(drawn) == 3 * len(odd)
    for number, text in enumerate(odd):
        lowest, right = 1e9, 650 if number % 2 == 0 else 1300
        for label, said in zip(("caption:", "before:", "✓ after:"), drawn[3 * number :]):  # noqa: B905
            words = said.get_text()
            shown = re.sub(r"\s", "", words).removesuffix("...")
            whole = re.sub(r"\s", "", label + text)
            assert shown == whole or whole.startswith(shown) and len(shown) > 20
            box, place = said.get_window_extent(), said.axes.get_window_extent()
            assert said.get_clip_on() or box.x1 <= right, text
            assert box.y0 >= place.y0 - 2 and box.y1 <= lowest + 3, text
            lowest = box.y0


@pytest.mark.parametrize("count, rows", [(0, 5), (1, 5), (12, 12), (200, 200), (6, 0)])
def test_the_report_of_so_many_samples(count, rows, ran, drawn, tmp_path):
    texts = [([f"a red circle {i}"], "", f"a red circle {i}") for i in range(rows)]
    picture, shown = draw(ran, tmp_path / "drawn", texts, count), min(count, rows, 12)
    assert picture.shape[:2] == (400 + 180 * math.ceil(shown / 2), 1300)
    captions = [said.get_text() for said in drawn if said.get_text().startswith("caption: ")]
    assert len(set(captions)) == len(captions) == shown
    assert rows < 200 or int(captions[-1].split()[-1]) > 180  # spread over all of them


def test_right_captions_are_green_and_wrong_ones_red(ran, drawn, tmp_path):
    draw(ran, tmp_path / "drawn", [
        (["a moon", "a red star"], "a moon", "a red star"), (["a red star"], "a red star", "a star")
    ], 6)
    assert [(said.get_text(), said.get_color()) for said in drawn] == [
        ("caption: a moon / a red star", "black"), ("before: a moon", "gray"),
        ("✓ after: a red star", "tab:green"),
        ("caption: a red star", "black"), ("before: a red star", "gray"),
        ("✗ after: a star", "tab:red")]


def test_the_report_is_drawn_from_three_files_alone(ran, tmp_path):
    for name in ("metrics.csv", "held_out.csv"):
        shutil.copy(ran.out / name, tmp_path)
    finetune.draw_report(tmp_path, ran.record)
    assert np.array_equal(pixels(tmp_path / "report.png"), pixels(ran.out / "report.png"))


def test_pictures_that_are_gone_at_the_end(
    small_data, command, opt_base, drawn, monkeypatch, tmp_path
):
    def train(*arguments):
        shutil.rmtree(small_data / "Image")
        return real(*arguments)

    real = finetune.train
    monkeypatch.setattr(finetune, "train", train)
    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, EPOCHS=1,
                             VALIDATION_FRACTION=0.3)  # fmt: skip
    assert (code, error) == (0, "")
    assert sum(said.get_text().startswith("caption: enamel pin") for said in drawn) == 4
    assert pixels(tmp_path / "out/report.png").shape[:2] == (760, 1300)


@pytest.mark.parametrize("full", [False, True], ids=["exception", "full disk"])
@pytest.mark.parametrize("page, broken", [
    ("report.png", "matplotlib.figure.Figure.savefig"),
    ("README.md", "finetune.write_card"),
])  # fmt: skip
def test_a_page_that_fails_costs_nothing(
    page, broken, full, small_data, command, opt_base, monkeypatch, tmp_path
):
    """The adapter is there, a sentence is said, and the same command makes the page."""
    def fails(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device") if full else ValueError("odd")

    flags = {"TRAIN_DIR": small_data, "MODEL_ID": opt_base, "EPOCHS": 1, "SAMPLE_COUNT": 1}
    with monkeypatch.context() as patch:
        patch.setattr(broken, fails)
        code, _, error = command(**flags)
    assert code == 1 and "Traceback" not in error
    assert ("No space left on device" if full else f"{page} can't be made: ValueError") in error
    assert "same command" in error
    there = tmp_path / ("out.unfinished" if full else "out")
    adapter = (there / "adapter_model.safetensors").read_bytes()
    assert not (there / page).exists()
    code, output, error = command(**flags)
    assert (code, error) == (0, "") and "epoch 1/1" not in output
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == adapter
    assert ModelCard.load(tmp_path / "out/README.md").data.library_name == "peft"
    assert pixels(tmp_path / "out/report.png").shape[:2] == (580, 1300)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out", "out.lock"]


# ---- The model card -----------------------------------------------------------------------------


def test_the_card_says_what_was_measured(ran, taught):
    card = ModelCard.load(taught.out / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model is None  # a folder here
    assert card.data.license and {"lora", "image-captioning"} <= set(card.data.tags)
    assert card.text.strip().splitlines()[0] == "# BLIP-2 captions: blip2_lora_finetuned"
    text, shown = ModelCard.load(ran.out / "README.md").text, summary_of(ran.output)
    assert text.strip().splitlines()[0] == "# BLIP-2 captions: out" and "(report.png)" in text
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.M))
    for name in (*MEASURES, "training_pairs", "held_out_pairs", "steps", "best_step"):
        assert rows[name.replace("_", " ")] == shown[name]


def test_the_card_names_a_base_of_the_hub(ran, tmp_path):
    base = "Salesforce/blip2-opt-2.7b"
    settings = ran.record["settings"] | {"MODEL_ID": base, "OUTPUT_DIR": "a/b: c's \"d\""}
    finetune.write_card(tmp_path, ran.record | {"settings": settings})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base and f"`{base}`" in card.text
    compile(re.search(r"```python\n(.*?)```", card.text, re.S)[1], "README.md", "exec")


@pytest.mark.parametrize("kind, in_4bit, dtype, prompt", [
    ("opt", True, "float32", "a photo of"), ("opt", False, "bfloat16", "it's \"a\""),
    ("opt", True, "bfloat16", ""),
    ("t5", True, "bfloat16", ""), ("t5", False, "float32", "say it's"),
])  # fmt: skip
def test_the_cards_snippet_captions_as_the_flag_does(
    kind, in_4bit, dtype, prompt, request, small_data, command, monkeypatch, tmp_path, capsys
):
    """As it is printed, with the picture's path put in; a quote is in the folder's name."""
    monkeypatch.chdir(tmp_path)
    base = request.getfixturevalue(f"{kind}_base")
    code, _, error = command(
        OUTPUT_DIR="it's out", TRAIN_DIR=small_data, MODEL_ID=base, LOAD_IN_4BIT=in_4bit,
        DTYPE=dtype, PROMPT=prompt, EPOCHS=12, LEARNING_RATE=3e-3, MAX_CAPTION_TOKENS=24)
    assert code == 0, error
    pictures = list(map(str, sorted(small_data.glob("Image/*/*.png"))[::5]))
    code, output, error = command("--caption", *pictures, OUTPUT_DIR="it's out")
    assert code == 0, error
    captions = [line.split("\t")[1] for line in output.splitlines()]
    assert len(captions) == len(pictures) and any(captions)
    card = Path("it's out/README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", card, re.S)[1]
    for picture, caption in zip(pictures, captions, strict=True):
        capsys.readouterr()
        exec(snippet.replace("picture.jpg", picture), {})
        assert capsys.readouterr().out == caption + "\n"
