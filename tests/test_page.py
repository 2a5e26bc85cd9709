"""The page of a run, report.html: what is on it, and how a browser shows it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import read_table, write_picture

import finetune

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ODD_CAPTIONS = (
    "a <script>document.title = 'run'</script> & \"quotes\"",
    "وردة حمراء على طاولة",
    "一朵红玫瑰在花瓶里" * 5,
    "👩‍👩‍👧 family",
    "Donaudampfschifffahrt" * 24,  # 500 letters without a space
)
# What is asked of the browser. The page is shown in a frame, next to which the answers are written.
MEASURE = """
<script>
addEventListener("load", () => {
  const figures = [...document.querySelectorAll("figure")];
  const inside = figure => [...figure.querySelectorAll("p, small, span, img")].every(element => {
    const inner = element.getBoundingClientRect();
    const outer = figure.getBoundingClientRect();
    return inner.left >= outer.left - 1 && inner.right <= outer.right + 1;
  });
  const answers = {
    title: document.title,
    widths: [...document.images].map(image => image.naturalWidth),
    figures: figures.length,
    inside: figures.every(inside),
    page_width: document.documentElement.scrollWidth,
    window_width: innerWidth,
    directions: [...document.querySelectorAll("span[dir]")].map(
      span => getComputedStyle(span).direction),
    requests: performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
  };
  const place = parent.document.createElement("pre");
  place.id = "answers";
  place.textContent = JSON.stringify(answers);
  parent.document.body.append(place);
});
</script>
"""


def look_at(page: Path, width: int) -> dict:
    """What a browser with a window of this width says about a page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text(encoding="utf-8") + MEASURE, encoding="utf-8")
    frame = page.with_name("frame.html")  # a window can't be as narrow as a phone, but a frame can
    frame.write_text(
        f'<body style="margin:0"><iframe src="{measured.name}" width="{width}" height="900" '
        'style="border:0"></iframe>'
    )
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--allow-file-access-from-files",
        "--virtual-time-budget=10000",
        f"--user-data-dir={page.parent / 'browser'}",
        f"--window-size={width + 20},900",
        "--dump-dom",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="answers">(.*)</pre>', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(finetune.html.unescape(found[1]))


def make_finished_run(folder: Path, captions: tuple[str, ...], held_out_count: int) -> dict:
    """The tables of a run, made by hand. Returns its record."""
    data = folder.with_name("data")
    for number in range(held_out_count):
        write_picture(data / f"{number}.png", number)
    held_out = []
    pairs = []
    for number in range(held_out_count):
        picture = str(data / f"{number}.png")
        caption = captions[number % len(captions)]
        is_right = number % 3 > 0
        after = caption if is_right else f"not {caption}"
        confidence = (number * 37 % 100) / 100
        held_out.append((picture, json.dumps([caption]), "a picture", after, confidence))
        pairs.append(("train", 5 - number / 100, 4, picture, caption))
    pairs.append(("train", 0.0, 4, str(data / "gone.png"), "a picture that is gone"))
    folder.mkdir()
    finetune.write_csv(folder / "held_out.csv", [finetune.CaptionedPicture._fields, *held_out])
    finetune.write_csv(folder / "pairs.csv", [finetune.PairLoss._fields, *pairs])
    rows = []
    for step in range(4):
        row = dict.fromkeys(finetune.METRICS, 0.5)
        rows.append([(row | {"step": step})[name] for name in finetune.METRICS])
    finetune.write_csv(folder / "metrics.csv", [finetune.METRICS, *rows])
    results = {
        "captioned": held_out_count,
        "held_out_loss": {"before": 1.0, "after": 0.5},
        "exact": {"before": 0.0, "after": 0.5},
        "cider_d": {"before": None, "after": None},
        "remarks": ["something <b>odd</b>"],
    }
    settings = {"TRAIN_DIR": str(data), "OUTPUT_DIR": str(folder), "START_FROM": ""}
    return {"settings": settings, "results": results}


def find_cards(page: str, heading: str) -> list[str]:
    """The HTML of the cards below a heading."""
    section = page.partition(heading)[2].partition("</section>")[0]
    return re.findall(r"<figure>.*?</figure>", section, re.S)


@pytest.mark.parametrize("width", [1300, 400])
def test_a_browser_shows_every_caption_inside_its_card(tmp_path, width):
    record = make_finished_run(tmp_path / "run", ODD_CAPTIONS, 10)
    finetune.draw_losses(tmp_path / "run", record)
    finetune.write_report(tmp_path / "run", record)

    seen = look_at(tmp_path / "run/report.html", width)

    assert seen["title"] == "BLIP-2 captions: run", "a caption was run as a script"
    assert seen["requests"] == [], "one file, without a network"
    assert len(seen["widths"]) == 1 + 10 + 10, "the losses, and each picture twice"
    assert min(seen["widths"]) > 0, "every picture can be seen"
    assert seen["figures"] == 10 + 11, "also a card for the picture that is gone"
    assert seen["inside"], "everything lies inside its card"
    assert seen["page_width"] <= seen["window_width"], "nothing has to be scrolled sideways"
    assert "rtl" in seen["directions"] and "ltr" in seen["directions"]


def test_nothing_in_the_page_is_loaded_or_run(tmp_path):
    record = make_finished_run(tmp_path / "run", ODD_CAPTIONS, 5)
    finetune.draw_losses(tmp_path / "run", record)

    finetune.write_report(tmp_path / "run", record)

    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "http" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "something &lt;b&gt;odd&lt;/b&gt;" in page


def test_wrong_captions_come_first_and_then_the_least_sure(tmp_path):
    record = make_finished_run(tmp_path / "run", ("a rose",), 9)

    finetune.write_report(tmp_path / "run", record)

    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    ranks = []
    for card in find_cards(page, "Held-out pictures"):
        is_right = "✓" in card
        assert is_right == ("✗" not in card)
        assert is_right == ('class="right"' in card)
        confidence = float(re.search(r"confidence</small> <span[^>]*>([\d.]+)", card)[1])
        ranks.append((is_right, confidence))
    assert len(ranks) == 9
    assert ranks == sorted(ranks)


def test_a_page_of_many_pictures_says_how_many_it_shows(tmp_path):
    record = make_finished_run(tmp_path / "run", ("a rose",), 320)

    finetune.write_report(tmp_path / "run", record)

    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 300
    assert "240 of 320 are shown" in page
    assert "60 of 321 are shown" in page


def test_a_picture_that_is_gone_is_said_to_be(tmp_path):
    record = make_finished_run(tmp_path / "run", ("a rose",), 1)

    finetune.write_report(tmp_path / "run", record)

    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    [card] = [card for card in find_cards(page, "Training pairs") if "gone.png" in card]
    assert "<img" not in card
    assert "can't be read" in card


def test_wrong_captions_are_the_first_pairs_of_the_page(command, sample, opt_base, tmp_path):
    """Five captions that belong to other pictures, among those of the sample."""
    data = tmp_path / "data"
    rows = []
    pictures = sorted(sample.glob("Image/*/*.png"))
    for number, picture in enumerate(pictures):
        caption = (sample / "caption" / f"{picture.parent.name}.txt").read_text().strip()
        if number in (20, 60, 100, 140, 180):
            caption = "enamel pin: " + ("ivory cross over ivory" if number < 90 else "jet jet jet")
        name = f"{number:03}.png"
        data.mkdir(exist_ok=True)
        shutil.copy(picture, data / name)
        rows.append((name, caption))
    finetune.write_csv(data / "metadata.csv", [("file_name", "text"), *rows])

    code, _, error = command(
        TRAIN_DIR=data, MODEL_ID=opt_base, LEARNING_RATE=3e-3, EPOCHS=4, VALIDATION_FRACTION=0
    )

    assert (code, error) == (0, "")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    first = find_cards(page, "Training pairs")[:5]
    names = sorted(re.search(r"(\d+)\.png", card)[1] for card in first)
    assert names == ["020", "060", "100", "140", "180"]
    assert all("<img" in card for card in first)
    assert len(read_table(tmp_path / "out/pairs.csv")) == 208
