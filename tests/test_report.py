"""What a finished run leaves to look at: tables, report, model card, trackers, and what it says."""

import io
import json
import math
import re
import shutil
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PlainModel, flags_of, read_captions, read_table, write_several
from huggingface_hub import ModelCard
from matplotlib.axes import Axes
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune

MEASURES = ("held_out_loss", "exact", "cider_d")


def finish(folder: Path, *words: str, **settings) -> SimpleNamespace:
    """A run to its end, in this process: what it says, and what it leaves in `folder`."""
    words = words or flags_of({"OUTPUT_DIR": folder} | settings)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = finetune.main([*words])
    assert (code, err.getvalue()) == (0, "")
    output, pairs = out.getvalue(), read_table(folder / "pairs.csv")
    record = json.loads((folder / "settings.json").read_text())
    card, remarks = (folder / "README.md").read_text(), record["results"]["remarks"]
    assert re.findall(r"^to look at: +(.+)$", output, re.M) == remarks
    assert re.findall(r"^To look at: (.+)\.$", card, re.M) == remarks
    return SimpleNamespace(
        out=folder,
        output=output,
        record=record,
        results=record["results"],
        remarks=remarks,
        shown=dict(re.findall(r"^(\w+): +(.+)$", output, re.M)),
        card=card,
        metrics=read_table(folder / "metrics.csv"),
        captioned=read_table(folder / "held_out.csv"),
        pairs=pairs,
        train=[row for row in pairs if row["split"] == "train"],
        held_out=[row for row in pairs if row["split"] == "held out"],
    )


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def plain_loss(run: SimpleNamespace, base: str, rows: list[dict[str, str]]) -> float:
    """Per token, by the saved adapter in plain transformers; and so is each row of pairs.csv."""
    plain, total, tokens = PlainModel(base, run.out), 0.0, 0
    for row in rows:
        words = plain.processor.tokenizer(row["caption"], add_special_tokens=False).input_ids
        ids = [*words, plain.stop]
        loss = -plain.predict(row["picture"], ids)[range(len(ids)), ids].log().sum().item()
        assert int(row["tokens"]) == len(ids)
        assert float(row["loss"]) == pytest.approx(loss / len(ids), abs=1e-4)
        total, tokens = total + loss, tokens + len(ids)
    return total / tokens


@pytest.fixture(scope="module")
def ran(tmp_path_factory, sample, opt_base):
    """A run on several captions a picture, with a tracker.

    One picture is not in the table, one can't be read. It captions 5 pictures, in place of 256.
    """
    root = tmp_path_factory.mktemp("ran")
    data = write_several(root / "data", sample, 24)
    shutil.copy(data / "pictures/00.png", data / "pictures/orphan.png")
    (data / "pictures/01.png").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "MAX_CAPTIONED", 5)
        run = finish(
            root / "out",
            TRAIN_DIR=data,
            MODEL_ID=opt_base,
            EPOCHS=3,
            BATCH_SIZE=5,
            VALIDATION_FRACTION=0.3,
            LEARNING_RATE=3e-3,
            SAMPLE_COUNT=200,
            LOG_WITH="tensorboard",
        )
    run.data = data
    return run


def test_pairs_csv_has_every_pair_once_highest_loss_first(ran):
    assert ran.pairs == ran.train + ran.held_out
    for rows in (ran.train, ran.held_out):
        losses = [float(row["loss"]) for row in rows]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) > 5
    pairs = finetune.find_pairs(str(ran.data), finetune.Findings())
    assert sorted((row["picture"], row["caption"]) for row in ran.pairs) == [
        tuple(pair) for pair in pairs if not pair.picture.endswith("01.png")
    ]
    said = ran.output.partition("highest losses")[2].splitlines()[1:7]
    for line, row in zip(said, ran.train[:3] + ran.held_out[:3], strict=True):
        assert f"{row['split']}, {row['picture']}: {row['caption']}" in line


def test_losses_of_pairs_are_those_of_plain_transformers(sample, opt_base, tmp_path):
    """Of a model that stays as it is; how those of one that learns are averaged is below."""
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
    assert len({row["loss"] for row in run.train}) > 12
    plain_loss(run, opt_base, run.train)
    shown = run.results["held_out_loss"]["after"]
    assert plain_loss(run, opt_base, run.held_out) == pytest.approx(shown, abs=1e-4)


def test_pictures_in_the_wrong_folder_are_among_the_first(sample, small_data, opt_base, tmp_path):
    """One that is trained on, and one that is held out."""
    data = shutil.copytree(sample, tmp_path / "train")
    for folder in (data, small_data):
        right, wrong = sorted((folder / "Image").iterdir())[:2]
        sorted(right.iterdir())[1].rename(wrong / "moved.png")
    run = finish(
        tmp_path / "out",
        TRAIN_DIR=data,
        VALIDATION_DIR=small_data,
        MODEL_ID=opt_base,
        LEARNING_RATE=3e-3,
        EPOCHS=5,
    )
    for rows in (run.train, run.held_out):
        assert "moved.png" in [Path(row["picture"]).name for row in rows[:3]]


def test_metrics_csv_begins_before_the_training_and_a_tracker_reads_it(ran):
    before, *rows = ran.metrics
    assert (before["step"], before["epoch"], before["train_loss"]) == ("0", "0", "")
    assert float(before["held_out_loss"]) == ran.results["held_out_loss"]["before"]
    steps = math.ceil(len(ran.train) / 5)
    assert [int(row["step"]) for row in rows] == list(range(1, 3 * steps + 1))
    assert [int(row["epoch"]) for row in rows] == sorted([1, 2, 3] * steps)
    assert [int(row["step"]) % steps for row in rows if row["held_out_loss"]] == [0, 0, 0]
    times = [float(row["seconds"]) for row in ran.metrics]
    assert times == sorted(times) and all(float(row["train_loss"]) > 0 for row in rows)

    scalars = defaultdict(dict)
    for path in sorted(ran.out.rglob("events.out.tfevents.*")):
        reader = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in reader.Tags()["scalars"]:
            scalars[tag] |= {event.step: event.value for event in reader.Scalars(tag)}
    for name in before.keys() - {"step"}:
        expected = {int(row["step"]): float(row[name]) for row in ran.metrics if row[name]}
        assert scalars[name] == pytest.approx(expected, rel=1e-6), name


def test_held_out_csv_has_all_that_the_measures_are_made_of(ran):
    rows, captions = ran.captioned, defaultdict(set)
    for row in ran.held_out:
        captions[row["picture"]].add(row["caption"])
    references = [json.loads(row["references"]) for row in rows]
    assert [captions[row["picture"]] for row in rows] == list(map(set, references))
    assert {len(texts) for texts in references} == {3, 4, 5}
    assert "«" in "".join(row["references"] for row in rows)  # a table is read by people, too
    for when in ("before", "after"):
        texts = [row[when] for row in rows]
        exact = sum(text in some for text, some in zip(texts, references, strict=True))
        cider = finetune.cider_d(texts, references)
        assert ran.results["exact"][when] == pytest.approx(exact / len(rows))
        assert ran.results["cider_d"][when] == pytest.approx(cider, abs=1e-6)
        assert f"{cider:.4f} {when}" in ran.shown["cider_d"]
        assert f"{exact} {when}" in ran.shown["exact"]
    assert ran.shown["exact"].endswith(f"of {len(rows)}") and ran.results["cider_d"]["after"] > 0
    assert len(captions) == 7 and finetune.MAX_CAPTIONED == 256  # three tenths of 23; unpatched
    assert len({row["picture"] for row in rows}) == len(rows) == 5
    assert ran.output.count("  reference: ") == 5  # SAMPLE_COUNT is above


def test_skipped_csv_and_settings_json(ran, tmp_path):
    """Each file that is not used, and what is needed to repeat the run."""
    rows = {Path(row["path"]).name: row["reason"] for row in read_table(ran.out / "skipped.csv")}
    assert rows.keys() == {"orphan.png", "01.png"} and ran.output.count("not used: 1") == 2
    assert rows["orphan.png"].startswith("is not in ") and "JPEG" in rows["01.png"]
    assert (ran.record["dtype"], ran.record["device"]) == ("float32", "cpu")
    assert ran.record["versions"]["torch"] == torch.__version__
    settings = ran.record["settings"] | {"OUTPUT_DIR": tmp_path / "again", "LOG_WITH": ""}
    first, again = (
        (run.out / "adapter_model.safetensors").read_bytes()
        for run in (ran, finish(tmp_path / "again", **settings))
    )
    assert first == again


def test_the_readmes_first_command_gives_21_of_21(sample, opt_base, monkeypatch, tmp_path):
    readme = (Path(finetune.__file__).parent / "README.md").read_text(encoding="utf-8")
    words = re.search(r"finetune\.py (--model-id tests/tiny_blip2.*)", readme)[1].split()
    shutil.copytree(sample, tmp_path / "train")
    shutil.copytree(opt_base, tmp_path / "tests/tiny_blip2")
    monkeypatch.chdir(tmp_path)
    run = finish(tmp_path / "blip2_lora_finetuned", *words)
    assert re.fullmatch(r"\d before, 21 after, of 21", run.shown["exact"])
    assert run.remarks == [] and run.output.count("  reference: ") == 6
    assert not re.search(r"[\r\x1b]|it/s|step/s|picture/s|%\|", run.output)  # no bars in a file


def test_a_worse_run_keeps_its_best_epoch_and_says_so(small_data, opt_base, monkeypatch, tmp_path):
    """Trained on one caption for all. Held-out losses are those of what is saved."""
    monkeypatch.setattr(finetune, "MAX_CAPTIONED", 5)  # which is not for VALIDATION_DIR
    data = shutil.copytree(small_data, tmp_path / "alike")
    for text in (data / "caption").iterdir():
        text.write_text("enamel pin")
    run = finish(
        tmp_path / "out",
        TRAIN_DIR=data,
        VALIDATION_DIR=small_data,
        MODEL_ID=opt_base,
        LOAD_IN_4BIT=False,
        EPOCHS=6,
        BATCH_SIZE=2,
        LEARNING_RATE=1e-2,
    )
    losses = [float(row["held_out_loss"]) for row in run.metrics if row["held_out_loss"]]
    assert run.results["held_out_loss"] == {"before": losses[0], "after": min(losses[1:])}
    assert losses[0] < min(losses[1:]) < losses[-1] - 0.1 and run.results["best_step"] < 36
    assert len(run.captioned) == len(run.held_out) == 12
    worse, alike = run.remarks
    assert "the held-out loss is not below" in worse and "lower LEARNING_RATE" in worse
    assert "captions are alike: lower LEARNING_RATE" in alike and "held_out.csv" in alike
    assert plain_loss(run, opt_base, run.held_out) == pytest.approx(min(losses[1:]), abs=1e-4)
    steps, pairs = (
        [float(row[name]) for row in rows]
        for name, rows in (("train_loss", run.metrics[1:]), ("loss", run.train))
    )  # all of the same length
    assert np.mean(pairs) == pytest.approx(np.mean(steps), abs=1e-4)


@pytest.mark.parametrize("fraction, unknown, said", [
    (0, MEASURES, ["nothing is held out"]),
    (0.1, ["cider_d"], ["CIDEr-D is '-': it needs two", "no held-out caption has changed: raise"]),
])  # fmt: skip
def test_what_cannot_be_measured(fraction, unknown, said, small_data, opt_base, tmp_path):
    run = finish(
        tmp_path / "out",
        TRAIN_DIR=small_data,
        MODEL_ID=opt_base,
        EPOCHS=2,
        BATCH_SIZE=4,
        VALIDATION_FRACTION=fraction,
    )
    assert all(words in remark for words, remark in zip(said, run.remarks, strict=True))
    for name in unknown:
        assert run.results[name] == {"before": None, "after": None} and run.shown[name] == "-"
    assert run.results["best_step"] == run.results["steps"] == 6
    assert len(run.captioned) == len(run.held_out) == (1 if fraction else 0)
    assert not re.search(r"\bnan\b", run.output + json.dumps(run.record) + run.card, re.I)
    picture = pixels(run.out / "report.png").astype(int)
    finetune.draw_report(run.out, run.record)  # again, from what is in the folder
    assert np.array_equal(pixels(run.out / "report.png"), picture)
    assert picture.shape[:2] == (580 if fraction else 400, 1300)
    inside = picture[30:340, 250:1250]  # of the axes, beside the legend
    assert ((inside[..., 2] - inside[..., 0]) > 60).any(axis=0).sum() > 800  # a curve


@pytest.fixture
def draw(ran, monkeypatch, tmp_path):
    """draw(rows, count): the report on references, before, after; one picture is gone.

    Returns its height, and the words beside the pictures as matplotlib's objects.
    """

    def make(rows: list[tuple], count: int) -> tuple[int, list]:
        shutil.copy(ran.out / "metrics.csv", tmp_path)
        finetune.write_csv(
            tmp_path / "held_out.csv",
            [
                finetune.CaptionedPicture._fields,
                *(
                    (
                        ran.data / f"pictures/{i % 24:02}.png" if i else "gone",
                        json.dumps(texts),
                        *more,
                        0.5,
                    )
                    for i, (texts, *more) in enumerate(rows)
                ),
            ],
        )
        settings = ran.record["settings"] | {"SAMPLE_COUNT": count}
        finetune.draw_report(tmp_path, ran.record | {"settings": settings})
        return len(pixels(tmp_path / "report.png")), words

    words, real = [], Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda *arguments, **more: words.append(real(*arguments, **more)) or words[-1]
    )
    return make


ODD = [  # a caption or its beginning, as it must be read in the report
    "only $x^2$ or $6, 100% \\frac_{1}^2 a_b", "$$ \\alpha % { } _ ^ & # ~ <b>", "",
    "一只红色的猫坐在桌子上看着窗外的鸟和树", "قطة حمراء على الطاولة", "Ünïcödé e\u0301",
    "🎉 party 👩\u200d👩\u200d👧 🇫🇷 a\u0378\U0010fffd star 𓀀",
    "bell \x07 escape \x1b[31m null-like \x01 end", "line\nbreak\ttab\r\u2028end",
    "enamel pin: " + "a red circle on a yellow background " * 20, "W" * 300, "猫" * 200,
]  # fmt: skip


def test_odd_captions_in_the_report(draw, ran):
    """All is said as it is, in its own place: no words run into the next picture or line.

    Right captions, equal to any of their picture's, are green, and wrong ones red.
    """
    rows = [
        (["a moon", text], text, text if number % 3 else f"{text} too")
        for number, text in enumerate(ODD)
    ]
    height, drawn = draw(rows, 12)
    assert height == 400 + 180 * 6 and len(drawn) == 3 * 12
    losses, *places = drawn[0].figure.axes
    assert sum(bool(place.images) for place in places) == 10  # one is gone, one is none
    assert losses.get_legend_handles_labels()[1] == ["training", "held out"]
    said = "held-out loss: {held_out_loss}; exact: {exact}; CIDEr-D: {cider_d}"
    assert losses.get_title() == said.format(**ran.shown)
    for number, (references, before, after) in enumerate(rows):
        lowest, right, three = math.inf, (650, 1300)[number % 2], drawn[3 * number :][:3]
        mark, color = ("✓", "tab:green") if number % 3 else ("✗", "tab:red")
        lines = {
            f"caption: {' / '.join(references)}": "black",
            f"before: {before}": "gray",
            f"{mark} after: {after}": color,
        }
        for (line, color), said in zip(lines.items(), three, strict=True):
            shown, whole = (re.sub(r"\s", "", some) for some in (said.get_text(), line))
            shown = shown.removesuffix("...")
            assert shown == whole or whole.startswith(shown) and len(shown) > 20
            box, place = said.get_window_extent(), said.axes.get_window_extent()
            assert said.get_color() == color and (said.get_clip_on() or box.x1 <= right), line
            assert box.y0 >= place.y0 - 2 and box.y1 <= lowest + 3, line
            lowest = box.y0


@pytest.mark.parametrize("count, rows, shown", [(0, 5, 0), (1, 5, 1), (200, 200, 12)])
def test_so_many_samples_in_the_report(count, rows, shown, draw):
    height, drawn = draw([([f"circle {i}"], "", f"circle {i}") for i in range(rows)], count)
    assert height == 400 + 180 * math.ceil(shown / 2)
    captions = [said.get_text() for said in drawn if said.get_text().startswith("caption: ")]
    assert len(set(captions)) == len(captions) == shown
    assert rows < 200 or int(captions[-1].split()[-1]) > 180  # spread over all of them


@pytest.mark.parametrize(
    "page, broken",
    [("report.png", "matplotlib.figure.Figure.savefig"), ("README.md", "finetune.write_card")],
)
def test_a_page_that_fails(page, broken, small_data, command, opt_base, monkeypatch, tmp_path):
    """The adapter is there, a sentence is said, and the same command makes the page."""
    flags = {"TRAIN_DIR": small_data, "MODEL_ID": opt_base, "EPOCHS": 1, "SAMPLE_COUNT": 1}
    with monkeypatch.context() as patch:
        patch.setattr(broken, lambda *arguments, **more: 1 / 0)
        code, _, error = command(**flags)
    assert code == 1 and "Traceback" not in error and "same command" in error
    assert f"{page} can't be made: ZeroDivisionError" in error
    assert not (tmp_path / "out" / page).exists()
    code, output, error = command(**flags)
    assert (code, error) == (0, "") and "epoch 1/1" not in output
    assert (tmp_path / "out" / page).exists()


SNIPPET = re.compile(r"```python\n(.*?)```", re.S)


def test_the_card_can_be_read_and_says_what_was_measured(ran, tmp_path):
    card = ModelCard.load(ran.out / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model is None  # a folder here
    assert card.data.license and {"lora", "image-captioning"} <= set(card.data.tags)
    assert card.text.strip().startswith("# BLIP-2 captions: out\n") and "(report.png)" in card.text
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.M))
    for name in (*MEASURES, "training_pairs", "held_out_pairs", "steps", "best_step"):
        assert rows[name.replace("_", " ")] == ran.shown[name]
    base = "Salesforce/blip2-opt-2.7b"
    settings = ran.record["settings"] | {"MODEL_ID": base, "OUTPUT_DIR": 'a/b: c\'s "d"'}
    finetune.write_card(tmp_path, ran.record | {"settings": settings})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base and f"`{base}`" in card.text
    compile(SNIPPET.search(card.text)[1], "README.md", "exec")


@pytest.mark.parametrize("kind, in_4bit, dtype, prompt", [
    ("opt", True, "float32", "a photo of"), ("opt", False, "bfloat16", "it's \"a\""),
    ("t5", True, "bfloat16", ""), ("t5", False, "float32", "say it's"),
])  # fmt: skip
def test_the_cards_snippet_captions_as_the_flag_does(
    kind, in_4bit, dtype, prompt, request, small_data, command, monkeypatch, tmp_path, capsys
):
    """As it is printed, with the picture's path put in; a quote is in the folder's name."""
    monkeypatch.chdir(tmp_path)
    run = finish(Path("it's out"), TRAIN_DIR=small_data, DTYPE=dtype, PROMPT=prompt, EPOCHS=12,
                 MODEL_ID=request.getfixturevalue(f"{kind}_base"), LOAD_IN_4BIT=in_4bit,
                 LEARNING_RATE=3e-3, MAX_CAPTION_TOKENS=24)  # fmt: skip
    pictures = list(map(str, sorted(small_data.glob("Image/*/*.png"))[::5]))
    code, output, error = command("--caption", *pictures, OUTPUT_DIR="it's out")
    assert code == 0, error
    captions = [caption for caption, _ in read_captions(output).values()]
    for picture in pictures:
        exec(SNIPPET.search(run.card)[1].replace("picture.jpg", picture), {})
    assert any(captions) and capsys.readouterr().out.splitlines() == captions
