"""Tables of captions: a row a pair, as a person sees it in a spreadsheet or an editor."""

import csv
import io
import json
import re
import tracemalloc
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import (
    LFS_POINTER,
    Case,
    assert_reasons,
    for_each_case,
    write_file,
    write_files,
    write_picture,
)

import finetune

PICTURES = {"a.jpg": None, "b.jpg": None}
PAIRS = [("a.jpg", "a red rose"), ("b.jpg", "a tulip")]
CSV = "file_name,text\na.jpg,a red rose\nb.jpg,a tulip\n"
OBJECTS = [{"file_name": "a.jpg", "text": "a red rose"}, {"file_name": "b.jpg", "text": "a tulip"}]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in OBJECTS)


def table(
    name: str,
    content: str | bytes,
    file: str = "metadata.csv",
    pairs: list[tuple[str, str]] = PAIRS,
    **expected,
) -> Case:
    """A table of a.jpg and b.jpg, and the pairs that a person sees in it."""
    return Case(name, PICTURES | {file: content}, pairs, **expected)


def no_table(name: str, content: str | bytes, *words: str, file: str = "metadata.csv") -> Case:
    """A file of which no row can be used, and words of the error."""
    return Case(name, PICTURES | {file: content}, error=words)


# ---- Rows ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    file_name: str  # as it is in the table; {data} is the folder
    caption: str
    picture: str = ""  # the one that is meant
    reason: str = ""  # or why the row is not used


CAFE_APART = unicodedata.normalize("NFD", "café.png")  # an accent of its own, as macOS stores it

ROWS = [
    Row("a/1.png", "a cat", picture="a/1.png"),
    Row("a\\1.png", 'le café,\n "noir"', picture="a/1.png"),
    Row("./a//1.png", "a third", picture="a/1.png"),
    Row("{data}/a/1.png", "a fourth", picture="a/1.png"),
    Row("a/café.png", "a cat", picture=f"a/{CAFE_APART}"),
    Row("2.png", "x" * 200_000, picture="2.png"),
    Row("2.png", "", reason="is empty"),
    Row("a/1.png", "a  cat", reason="repeats an earlier row"),
    Row("no.png", "x", reason="no such file"),
    Row("../outside.png", "x", reason="points outside the folder"),
    Row("{data}/../outside.png", "x", reason="points outside the folder"),
    Row("", "x", reason="file_name is empty"),
]


@pytest.mark.parametrize(
    "name, mark",
    [
        ("metadata.csv", b""),
        ("metadata.csv", b"\xef\xbb\xbf"),
        ("metadata.jsonl", b"\xef\xbb\xbf"),
    ],
    ids=["CSV", "CSV with a byte order mark", "JSON lines with a byte order mark"],
)
def test_each_row_is_a_pair_or_is_named_with_its_number(check, tmp_path, name, mark):
    """Without a mark, the captions are in `text`, next to a column `caption` that is not used."""
    data = tmp_path / "data"
    for picture in ("a/1.png", f"a/{CAFE_APART}", "2.png", "not in the table.png"):
        write_picture(data / picture)
    write_picture(tmp_path / "outside.png")

    objects = []
    for row in ROWS:
        columns = {"caption": "not used", "file_name": row.file_name.format(data=data)}
        columns["caption" if mark else "text"] = row.caption
        objects.append(columns)
    text = io.StringIO()
    if name == "metadata.csv":
        writer = csv.DictWriter(text, objects[0])
        writer.writeheader()
        writer.writerows(objects)
    else:
        for columns in objects:
            text.write(json.dumps(columns, ensure_ascii=False) + "\n")
    write_file(data / name, mark + text.getvalue().encode())

    result = check(data)

    assert result.code == 0
    used = [row for row in ROWS if row.picture]
    assert result.pairs == sorted((row.picture, " ".join(row.caption.split())) for row in used)
    reasons = {"not in the table.png": name}
    line = 2 if name == "metadata.csv" else 1  # where the first row starts in an editor
    for row in ROWS:
        if row.reason:
            reasons[f"{name}, line {line}"] = row.reason
        line += 1
        if name == "metadata.csv":
            line += row.caption.count("\n")
    assert_reasons(result.skipped, reasons)


CELLS = [
    table("Windows' line ends", CSV.replace("\n", "\r\n")),
    table("line ends of old Macs", CSV.replace("\n", "\r")),
    table("no line end after the last row", CSV.rstrip()),
    table(
        "quotes around all cells", '"file_name","text"\n"a.jpg","a red rose"\n"b.jpg","a tulip"\n'
    ),
    table(
        "quotes inside a caption",
        'file_name,text\na.jpg,a "red" rose\nb.jpg,"a ""tulip"""\n',
        pairs=[("a.jpg", 'a "red" rose'), ("b.jpg", 'a "tulip"')],
    ),
    table(
        "a caption of several lines",
        'file_name,text\na.jpg,"a red\nrose"\nb.jpg,"a\r\ntulip"\n',
    ),
    table("other columns", "id,split,file_name,text\n1,x,a.jpg,a red rose\n2,y,b.jpg,a tulip\n"),
    table("empty lines at the end", f"{CSV}\n\n"),
    table("JSON lines", JSON_LINES, file="metadata.jsonl"),
    table("JSON with empty lines", JSON_LINES.replace("\n", "\n\n"), file="metadata.jsonl"),
    table(
        "a caption with commas is not cut",
        "file_name,text\na.jpg,a red, red rose\nb.jpg,a tulip\n",
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.csv, line 2": ("a.jpg", "put quotes around a caption with commas")},
    ),
    table(
        "a row without a caption",
        "file_name,text\na.jpg\nb.jpg,a tulip\n",
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.csv, line 2": ("a.jpg", "it has 1 cell, and the header 2")},
    ),
    table(
        "letters in Windows-1252",
        "file_name,text\na.jpg,a café\nb.jpg,a tulip\n".encode("cp1252"),
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.csv, line 2": ("a.jpg", "UTF-8")},
    ),
    table(
        "half a letter",
        JSON_LINES.replace("rose", "rose \\ud83d"),
        file="metadata.jsonl",
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.jsonl, line 1": ("a.jpg", "half a character")},
    ),
    table(
        "a file name in Windows-1252",
        "file_name,text\ncaf\xe9.jpg,a rose\nb.jpg,a tulip\n".encode("cp1252"),
        pairs=[("b.jpg", "a tulip")],
        reasons={
            "metadata.csv, line 2": "the file name is not in UTF-8",
            "a.jpg": "has no caption in",
        },
    ),
    table(
        "a caption with the delimiter of the table",
        "file_name;text\na.jpg;a red; red rose\nb.jpg;a tulip\n",
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.csv, line 2": ("a.jpg", "put quotes around a caption with semicolons")},
    ),
    table(
        "a caption with the delimiter of a table that knows no quotes",
        "image_name| comment\na.jpg| a red| red rose\nb.jpg| a tulip\n",
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.csv, line 2": ("a.jpg", "can't have vertical bars in it")},
    ),
    table(
        "a number in place of a caption",
        '{"file_name": "a.jpg", "text": 5}\n{"file_name": "b.jpg", "text": "a tulip"}\n',
        file="metadata.jsonl",
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.jsonl, line 1": ("a.jpg", "not text")},
    ),
]


@for_each_case(CELLS)
def test_a_cell_is_read_as_it_is_written(check_case, case):
    check_case(case)


@pytest.mark.parametrize("name, content", [("metadata.csv", CSV), ("metadata.jsonl", JSON_LINES)])
def test_check_says_that_the_layout_is_a_table(check, tmp_path, name, content):
    data = tmp_path / "data"
    write_files(data, PICTURES | {name: content})
    assert f"layout of {data}: {name}\n" in check(data).out


# ---- Files that can't be used -------------------------------------------------------------------

UNUSABLE = [
    no_table("no row is in UTF-8", "file_name,text\na.jpg,é\n".encode("cp1252"), "no picture in"),
    no_table("quotes that do not end", 'file_name,text\na.jpg,"a cat\n', "can't be read"),
    no_table("no header", "a.jpg,a cat\n", "no column names", "Add a row"),
    no_table("other columns", "picture,words\na.jpg,a cat\n", "['picture', 'words']", "Rename"),
    no_table("one column", "file_name\na.jpg\n", "one column", "Save the table as CSV"),
    no_table("no header, with numbers", "a.jpg#0\ta cat\n", "no column names", "Add a row"),
    no_table(
        "a bracket that is missing in line 2",
        '{"file_name": "a.jpg", "text": "a cat"}\n{"file_name": "b.jpg", "text": "a dog"\n{}\n',
        "can't be read from line 2 on",
        "there and just before",
        file="metadata.jsonl",
    ),
    no_table("no columns", "{}", "file_name and text", file="metadata.jsonl"),
    no_table("JSON cut off in line 3", JSON_LINES + '{"file', "line 3 ", file="metadata.jsonl"),
    Case(
        "not in the folder itself",
        {**PICTURES, "deeper/metadata.csv": CSV},
        reasons={
            "deeper/metadata.csv": "tables in subfolders are not read; set TRAIN_DIR",
            "a.jpg": "no caption with this name",
            "b.jpg": "no caption with this name",
        },
        error="no picture in",
    ),
    Case(
        "a table, and captions in folders",
        {**PICTURES, "metadata.csv": CSV, "caption/a.txt": "a cat"},
        error=("'data': caption/ and Image/ and metadata.csv.", "Keep one of them"),
    ),
    Case(
        "two tables",
        {**PICTURES, "metadata.csv": CSV, "metadata.jsonl": JSON_LINES},
        error=("'data': metadata.csv and metadata.jsonl.", "Keep one of them"),
    ),
]


@for_each_case(UNUSABLE)
def test_a_table_that_can_not_be_used_is_an_error(check_case, case):
    check_case(case)


def test_rows_are_named_in_the_order_of_their_lines(check, tmp_path):
    lines = ["file_name,text", *["no.jpg,a cat"] * 11, "1.png,a cat"]
    write_files(tmp_path / "data", {"metadata.csv": "\n".join(lines), "1.png": None})
    skipped = check(tmp_path / "data").skipped
    assert list(skipped) == [f"metadata.csv, line {number}" for number in range(2, 13)]


def test_names_in_a_table_can_be_written_to_another(tmp_path):
    """Half a letter, too, which no file of Linux has in its name."""
    write_picture(tmp_path / "1.png")
    lines = rb'{"file_name": "b\ud83d.jpg", "text": "a cat"}' + b"\n"
    lines += rb'{"file_name": "1.png", "text": "a cat"}'
    write_file(tmp_path / "metadata.jsonl", lines)
    findings = finetune.Findings()
    finetune.find_pairs(str(tmp_path), findings)

    finetune.write_csv(tmp_path / "skipped.csv", findings.skipped)

    assert 'b\\ud83d.jpg",there is no such file' in (tmp_path / "skipped.csv").read_text()


def write_many_rows(folder: Path, count: int) -> None:
    """A table of 100 files, which are no pictures: nothing reads them."""
    for number in range(100):
        write_file(folder / f"{number}.png", b"")
    lines = ["file_name,text"]
    for number in range(count):
        lines.append(f"{number % 100}.png,a caption of picture number {number}")
    write_file(folder / "metadata.csv", "\n".join(lines).encode())


def test_many_rows_need_little_memory(tmp_path):
    """Below 1 kB for each pair, so that a million fit anywhere."""
    write_many_rows(tmp_path, 20_000)

    tracemalloc.start()
    pairs = finetune.find_pairs(str(tmp_path), finetune.Findings())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(pairs) == 20_000
    assert peak < 1000 * len(pairs)


# ---- New: tables as a spreadsheet shows them ----------------------------------------------------

DELIMITERS = [
    table("a space before quotes", 'file_name, text\na.jpg, "a red rose"\nb.jpg, "a tulip"\n'),
    table(
        "a space before quotes, and a comma between them",
        'file_name, text\na.jpg, "a red rose, in a vase"\nb.jpg, a tulip\n',
        pairs=[("a.jpg", "a red rose, in a vase"), ("b.jpg", "a tulip")],
    ),
    table("a space after quotes", 'file_name,text\na.jpg,"a red rose" \n"b.jpg" ,"a tulip"\n'),
    table("spaces around all cells", " file_name , text \n a.jpg , a red rose \nb.jpg ,a tulip\n"),
    table("semicolons", CSV.replace(",", ";")),
    table("semicolons after a byte order mark", "\ufeff" + CSV.replace(",", ";")),
    table(
        "semicolons, and commas in captions",
        "file_name;text\na.jpg;a red, red rose\nb.jpg;a tulip\n",
        pairs=[("a.jpg", "a red, red rose"), ("b.jpg", "a tulip")],
    ),
    table("Excel's line that names the delimiter", "sep=;\n" + CSV.replace(",", ";")),
    table("tabs", CSV.replace(",", "\t")),
    table("tabs in a .tsv", CSV.replace(",", "\t"), file="metadata.tsv"),
    table("tabs in a .txt", CSV.replace(",", "\t"), file="metadata.txt"),
    table("commas in a .tsv", CSV, file="metadata.tsv"),
    table("bars", CSV.replace(",", "| ")),
    table("UTF-16 with tabs", CSV.replace(",", "\t").encode("utf-16")),
    table("big-endian UTF-16", ("\ufeff" + CSV).encode("utf-16-be")),
    table(
        "semicolons, and a caption in which they are quoted",
        'file_name;text\na.jpg;"a rose; red"\nb.jpg;a tulip\n',
        pairs=[("a.jpg", "a rose; red"), ("b.jpg", "a tulip")],
    ),
]

EMPTY_CELLS = [
    table(
        "a row with more cells than the header, which are empty", CSV.replace("tulip", "tulip,,")
    ),
    table(
        "empty columns",
        "file_name,text,,\na.jpg,a red rose,,\nb.jpg,a tulip,,,,\n,,,\n",
    ),
    table("empty rows", "file_name,text\n,\na.jpg,a red rose\n , \n\nb.jpg,a tulip\n,,,\n"),
    table("empty lines before the header", f"\n\n{CSV}"),
    table(
        "an empty column before the others",
        ",file_name,text\n0,a.jpg,a red rose\n1,b.jpg,a tulip\n",
    ),
    table(
        "a row with a caption alone",
        f"{CSV},a lily\n",
        reasons={"metadata.csv": "file_name"},
    ),
]

COLUMNS = [
    table(header, CSV.replace("file_name,text", header))
    for header in (
        "image,caption",
        "Image,Caption",
        "image_name,comment",
        "filename,text",
        "FILE_NAME,TEXT",
        "File_Name,caption",
        "filename , Comment",
    )
]

KINDS = [
    table("a JSON array", json.dumps(OBJECTS), file="metadata.jsonl"),
    table("a JSON array over several lines", json.dumps(OBJECTS, indent=2), file="metadata.json"),
    table("a JSON array after a mark", "\ufeff" + json.dumps(OBJECTS), file="metadata.json"),
    table("a JSON array in UTF-16", json.dumps(OBJECTS).encode("utf-16"), file="metadata.json"),
    table("a JSON array after empty lines", f"\n\n {json.dumps(OBJECTS)}", file="metadata.json"),
    table("JSON lines in a .json", JSON_LINES, file="metadata.json"),
    table("JSON lines with commas", JSON_LINES.replace("}", "},"), file="metadata.jsonl"),
    table(
        "JSON objects over several lines",
        "\n".join(json.dumps(row, indent=2) for row in OBJECTS),
        file="metadata.json",
    ),
    table("CSV in a .jsonl", CSV, file="metadata.jsonl"),
    table("CSV in a .json", CSV, file="metadata.json"),
    table("JSON lines in a .csv", JSON_LINES),
    table(
        "names of columns in capitals",
        JSON_LINES.replace("file_name", "File_Name").replace("text", "CAPTION"),
        file="metadata.jsonl",
    ),
    table(
        "several captions in a list",
        '{"file_name": "a.jpg", "text": ["a red rose", "a rose"]}\n'
        '{"file_name": "b.jpg", "text": ["a tulip"]}\n',
        file="metadata.jsonl",
        pairs=[*PAIRS, ("a.jpg", "a rose")],
    ),
    table(
        "a list in which one is empty",
        '[{"file_name": "a.jpg", "text": ["a red rose", " "]},'
        ' {"file_name": "b.jpg", "text": "a tulip"}]',
        file="metadata.json",
        reasons={"metadata.json": ("a.jpg", "empty")},
    ),
    table(
        "an empty list",
        '[{"file_name": "a.jpg", "text": []}, {"file_name": "b.jpg", "text": "a tulip"}]',
        file="metadata.json",
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.json": ("a.jpg", "empty")},
    ),
]

CAPTION_CELLS = [
    table(
        "a cell with letters of no width alone",
        "file_name,text\na.jpg,\u200b\nb.jpg,a tulip\n",
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.csv": ("a.jpg", "empty")},
    ),
    table(
        "a cell without a letter",
        "file_name,text\na.jpg,...\nb.jpg,a tulip\n",
        pairs=[("b.jpg", "a tulip")],
        reasons={"metadata.csv": ("a.jpg", "letter")},
    ),
    table(
        "letters of no width around cells",
        "file_name,text\n\u200ba.jpg,\ufeffa red rose\u200b\nb.jpg,a tulip\n",
    ),
]

TABLE_NAMES = [
    table(name, CSV, file=name)
    for name in (
        "Metadata.csv",
        "METADATA.CSV",
        "Metadata.TXT",
        "captions.csv",
        "Captions.txt",
        "results.csv",
        "Results.TSV",
        "captions_val2017.csv",
    )
] + [table("CAPTIONS.JSONL", JSON_LINES, file="CAPTIONS.JSONL")]


@for_each_case(DELIMITERS, EMPTY_CELLS, COLUMNS, KINDS, CAPTION_CELLS, TABLE_NAMES)
def test_a_table_is_what_a_spreadsheet_shows(check_case, case):
    check_case(case)


# ---- New: data sets as they are downloaded ------------------------------------------------------


def coco(images: dict[int, str], annotations: list[tuple[int, str]]) -> str:
    """COCO's JSON of captions: images by their ids, and captions for these."""
    content = {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "name": "a licence"}],
        "images": [{"id": number, "file_name": name} for number, name in images.items()],
        "annotations": [],
    }
    for number, (image, caption) in enumerate(annotations):
        content["annotations"].append({"id": number, "image_id": image, "caption": caption})
    return json.dumps(content)


TWO_IMAGES = {7: "a.jpg", 9: "b.jpg"}
COCO_CAPTIONS = [(7, "a red rose"), (9, "a tulip\n"), (7, "a rose")]
COCO_PAIRS = [
    ("val2017/a.jpg", "a red rose"),
    ("val2017/a.jpg", "a rose"),
    ("val2017/b.jpg", "a tulip"),
]

DATA_SETS = [
    Case(
        "Flickr8k from Kaggle",
        {
            "Images/a.jpg": None,
            "Images/b.jpg": None,
            "captions.txt": "image,caption\na.jpg,a red rose .\n"
            'a.jpg,"a rose , in a vase ."\nb.jpg,a tulip\n',
        },
        pairs=[
            ("Images/a.jpg", "a red rose ."),
            ("Images/a.jpg", "a rose , in a vase ."),
            ("Images/b.jpg", "a tulip"),
        ],
    ),
    Case(
        "Flickr30k from Kaggle, in which one row lacks a bar",
        {
            "flickr30k_images/a.jpg": None,
            "flickr30k_images/b.jpg": None,
            "results.csv": "image_name| comment_number| comment\na.jpg| 0| a red rose .\n"
            'a.jpg| 1| a rose , and " thorns " .\nb.jpg| 0| a tulip\nb.jpg| 4   A dog runs .\n',
        },
        pairs=[
            ("flickr30k_images/a.jpg", "a red rose ."),
            ("flickr30k_images/a.jpg", 'a rose , and " thorns " .'),
            ("flickr30k_images/b.jpg", "a tulip"),
        ],
        reasons={"results.csv": ("b.jpg", "2 cells")},
    ),
    Case(
        "COCO",
        {
            "val2017/a.jpg": None,
            "val2017/b.jpg": None,
            "captions_val2017.json": coco(TWO_IMAGES, COCO_CAPTIONS),
        },
        pairs=COCO_PAIRS,
    ),
    Case(
        "COCO by its other names",
        {
            "val2017/a.jpg": None,
            "val2017/b.jpg": None,
            "metadata.json": coco(
                {7: "val2017/a.jpg", 9: "./val2017/b.jpg"},
                COCO_CAPTIONS,
            ),
        },
        pairs=COCO_PAIRS,
    ),
    Case(
        "COCO without some of its pictures and captions",
        {
            "train2017/a.jpg": None,
            "train2017/c.jpg": None,
            "captions_train2017.json": coco(
                TWO_IMAGES | {11: "c.jpg"}, [(7, "a red rose"), (9, "a tulip")]
            ),
        },
        pairs=[("train2017/a.jpg", "a red rose")],
        reasons={
            "captions_train2017.json": ("b.jpg", "no such file"),
            "train2017/c.jpg": "captions_train2017.json",
        },
    ),
    Case(
        "COCO with a caption for an image that is not listed",
        {
            "val2017/a.jpg": None,
            "val2017/b.jpg": None,
            "captions_val2017.json": coco(TWO_IMAGES, [*COCO_CAPTIONS, (8, "a lily")]),
        },
        pairs=COCO_PAIRS,
        reasons={"captions_val2017.json, annotation 4": "no image has the id 8"},
    ),
    Case(
        "COCO whose annotations have their ids as text",
        {
            "val2017/a.jpg": None,
            "val2017/b.jpg": None,
            "captions_val2017.json": coco(
                TWO_IMAGES, [(str(number), caption) for number, caption in COCO_CAPTIONS]
            ),
        },
        pairs=COCO_PAIRS,
    ),
    Case(
        "COCO with its table in a folder",
        {
            "val2017/a.jpg": None,
            "annotations/captions_val2017.json": coco(TWO_IMAGES, COCO_CAPTIONS),
        },
        reasons={
            "val2017/a.jpg": "no caption with this name",
            "annotations/captions_val2017.json": "tables in subfolders are not read; set TRAIN_DIR",
        },
        error="no picture in",
    ),
]


@for_each_case(DATA_SETS)
def test_a_data_set_works_as_it_is_downloaded(check_case, case):
    check_case(case)


# ---- New: which file is meant -------------------------------------------------------------------


def near_name(name: str, file_name: str, picture: str) -> Case:
    """A row that names a picture nearly as it is, next to a row that is right."""
    rows = f"file_name,text\ngood.jpg,a cat\n{file_name},a rose\n"
    return Case(
        name,
        {picture: None, "good.jpg": None, "metadata.csv": rows},
        pairs=[("good.jpg", "a cat")],
        reasons={
            "metadata.csv": (file_name, f"there is '{picture}'"),
            picture: "has no caption in",
        },
    )


PLACES = [
    Case(
        "hidden names",
        {
            ".5in pipe.jpg": None,
            ".more/b.jpg": None,
            "good.jpg": None,
            "metadata.csv": "file_name,text\n.5in pipe.jpg,a pipe\n.more/b.jpg,b\ngood.jpg,a cat\n",
        },
        pairs=[("good.jpg", "a cat")],
        reasons={
            "metadata.csv, line 2": ("hidden file", "a dot at the start", "rename it"),
            "metadata.csv, line 3": ("hidden file", "a dot at the start", "rename it"),
        },
    ),
    Case(
        "a picture without a caption in COCO",
        {
            "a.jpg": None,
            "b.jpg": None,
            "captions_val2017.json": json.dumps(
                {
                    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
                    "annotations": [{"image_id": 1, "caption": "a cat"}],
                }
            ),
        },
        pairs=[("a.jpg", "a cat")],
        reasons={"b.jpg": "has no caption in data/captions_val2017.json"},
    ),
    Case(
        "a picture that is called metadata, with its caption",
        {"metadata.jpg": None, "metadata.txt": "a scan", "a.jpg": None, "a.txt": "a cat"},
        pairs=[("metadata.jpg", "a scan"), ("a.jpg", "a cat")],
    ),
    Case(
        "a bare name in the only folder that has it",
        {"pictures/deep/a.jpg": None, "b.jpg": None, "metadata.csv": CSV},
        pairs=[("pictures/deep/a.jpg", "a red rose"), ("b.jpg", "a tulip")],
    ),
    Case(
        "a bare name in the folder itself, and in another one",
        {"pictures/a.jpg": None, "a.jpg": None, "b.jpg": None, "metadata.csv": CSV},
        pairs=PAIRS,
        reasons={"pictures/a.jpg": "has no caption in"},
    ),
    Case(
        "a bare name in two folders",
        {"x/a.jpg": None, "y/a.jpg": None, "b.jpg": None, "metadata.csv": CSV},
        pairs=[("b.jpg", "a tulip")],
        reasons={
            "metadata.csv": ("x/a.jpg", "y/a.jpg"),
            "x/a.jpg": "has no caption in",
            "y/a.jpg": "has no caption in",
        },
    ),
    near_name("small and capital letters", "A.JPG", "a.jpg"),
    near_name("the number of a caption, as in Flickr8k", "a.jpg#0", "a.jpg"),
    near_name("small and capital letters of a folder", "Images/a.jpg", "images/a.jpg"),
    near_name("no extension", "a", "a.jpg"),
    near_name("another extension", "a.png", "a.jpg"),
    near_name("another extension in capitals", "a.JPEG", "a.jpg"),
    near_name("as in a URL", "red%20rose.jpg", "red rose.jpg"),
    near_name("as in a URL, with an accent", "caf%C3%A9.jpg", "café.jpg"),
    near_name("a bare name in other letters", "A.jpg", "pictures/a.jpg"),
    Case(
        "other letters, and the same name in two folders",
        {
            "x/a.jpg": None,
            "y/a.jpg": None,
            "b.jpg": None,
            "metadata.csv": "file_name,text\nX/A.JPG,a rose\nY/a.jpg,a rose\nb.jpg,a tulip\n",
        },
        pairs=[("b.jpg", "a tulip")],
        reasons={
            "metadata.csv, line 2": "there is 'x/a.jpg'",
            "metadata.csv, line 3": "there is 'y/a.jpg'",
            "x/a.jpg": "has no caption in",
            "y/a.jpg": "has no caption in",
        },
    ),
    Case(
        "a name with a percent sign",
        {"100%20.jpg": None, "b.jpg": None, "metadata.csv": CSV.replace("a.jpg", "100%20.jpg")},
        pairs=[("100%20.jpg", "a red rose"), ("b.jpg", "a tulip")],
    ),
    Case(
        "a name that is like no other",
        {**PICTURES, "metadata.csv": f"{CSV}c.jpg,a lily\n"},
        pairs=PAIRS,
        reasons={"metadata.csv": ("c.jpg", "no such file")},
    ),
]


@for_each_case(PLACES)
def test_the_picture_is_found_or_the_near_name_is_told(check_case, case):
    check_case(case)


# ---- New: what is next to a table, and files that are no tables ---------------------------------

NEIGHBORS = [
    Case(
        "captions.txt is a caption",
        {
            "captions.jpg": None,
            "captions.txt": "a rose",
            "results.jpg": None,
            "results.txt": "a cat",
        },
        pairs=[("captions.jpg", "a rose"), ("results.jpg", "a cat")],
    ),
    Case(
        "captions.txt is no table, and the caption of no picture",
        {"a.jpg": None, "a.txt": "a rose", "captions.txt": "a.jpg: a rose\n"},
        pairs=[("a.jpg", "a rose")],
        reasons={"captions.txt": "it is not a table either"},
    ),
    Case(
        "results.csv has other columns",
        {"a.jpg": None, "a.txt": "a rose", "results.csv": "epoch,loss\n1,0.5\n"},
        pairs=[("a.jpg", "a rose")],
    ),
    Case(
        "captions.json has other content",
        {"a.jpg": None, "a.txt": "a rose", "captions.json": '{"language": "en"}'},
        pairs=[("a.jpg", "a rose")],
    ),
    Case(
        "what --caption has printed into a file",
        {"a.jpg": None, "a.txt": "a rose", "captions.tsv": "a.jpg\ta rose\t0.9876\n"},
        pairs=[("a.jpg", "a rose")],
    ),
    Case(
        "videos and texts",
        {**PICTURES, "metadata.csv": CSV, "clip.mov": "x", "README.md": "x", "LICENSE.txt": "x"},
        pairs=PAIRS,
        says=("3 files",),
    ),
    Case(
        "a table and captions in folders",
        {"captions.csv": CSV, "caption/a.txt": "a rose", "Image/a.jpg": None},
        error=("captions.csv", "caption", "Keep one of them"),
    ),
    Case(
        "a table and captions next to pictures",
        {**PICTURES, "metadata.csv": CSV, "a.txt": "another rose"},
        error=("metadata.csv", ".txt files", "'a.txt'", "Keep the table or"),
    ),
    Case(
        "two tables of other kinds",
        {**PICTURES, "metadata.csv": CSV, "captions.txt": CSV},
        error=("metadata.csv", "captions.txt", "Keep one of them"),
    ),
    Case(
        "two tables, none of which is metadata",
        {**PICTURES, "captions.jsonl": JSON_LINES, "results.csv": CSV},
        error=("captions.jsonl", "results.csv", "Keep one of them"),
    ),
    Case(
        "a spreadsheet as it is",
        {**PICTURES, "metadata.xlsx": b"PK\x03\x04" + bytes(range(256))},
        error=("metadata.xlsx", "CSV"),
    ),
]

NO_TABLES = [
    no_table("a header alone", "file_name,text\n", "no rows"),
    no_table("a header and empty rows", "file_name,text\n,\n\n,,\n", "no rows"),
    no_table("an empty array", "[]", "no rows", file="metadata.json"),
    no_table("COCO without captions", coco(TWO_IMAGES, []), "no rows", file="metadata.json"),
    no_table("an empty file", b"", "empty"),
    no_table("an empty file of JSON lines", b"", "empty", file="metadata.jsonl"),
    no_table("white space", " \n\n", "empty"),
    no_table("a spreadsheet", b"PK\x03\x04" + bytes(range(256)) * 4, "spreadsheet", "CSV"),
    no_table(
        "an old spreadsheet",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(999),
        "spreadsheet",
        "CSV",
    ),
    no_table(
        "a Git LFS pointer",
        LFS_POINTER,
        "git lfs pull",
    ),
    no_table(
        "a Git LFS pointer of JSON lines",
        LFS_POINTER,
        "git lfs pull",
        file="metadata.jsonl",
    ),
    no_table("a web page", "<!DOCTYPE html><html>404</html>", "web page"),
    no_table("a web page in place of JSON", "\n<html>404</html>", "web page", file="metadata.json"),
    no_table("RTF", "{\\rtf1\\ansi file_name,text\\par a.jpg,a rose}", "RTF"),
    no_table("UTF-16 without a mark", CSV.encode("utf-16-le"), "UTF-8"),
    no_table(
        "columns of other names",
        "path,description\na.jpg,a red rose\n",
        "'path'",
        "'description'",
        "file_name",
        "text",
    ),
    no_table(
        "one column of another name",
        "file_name;description\na.jpg;a red rose\n",
        "'file_name'",
        "'description'",
        "text",
    ),
    no_table("no header", "a.jpg,a red rose\nb.jpg,a tulip\n", "'a red rose'", "file_name"),
    no_table(
        "JSON with other names",
        '{"path": "a.jpg", "label": "a rose"}',
        "'path'",
        "'label'",
        "file_name",
        "text",
        file="metadata.jsonl",
    ),
    no_table("JSON of lists", '["a.jpg", "a rose"]\n', "object", file="metadata.jsonl"),
    no_table("an array of lists", '[["a.jpg", "a rose"]]', "object", file="metadata.json"),
    no_table(
        "a pandas table by columns",
        json.dumps({"image": {"0": "a.jpg"}, "text": {"0": "a rose"}}),
        "holds columns, not rows",
        'orient="records"',
        file="metadata.json",
    ),
    no_table(
        "lists by column",
        json.dumps({"file_name": ["a.jpg"], "text": ["a rose"]}),
        "holds columns, not rows",
        file="metadata.json",
    ),
    no_table(
        "rows inside an object",
        json.dumps({"data": OBJECTS}),
        "'data'",
        "one object such as",
        file="metadata.json",
    ),
    no_table(
        "brackets in brackets",
        "[" * 100_000,
        "brackets are nested too deeply",
        file="metadata.json",
    ),
    no_table("two columns of one name", "file_name,text,text\na.jpg,a,b\n", "two columns 'text'"),
    no_table(
        "COCO with addresses in place of names",
        coco(TWO_IMAGES, COCO_CAPTIONS).replace("file_name", "coco_url"),
        "image 1 has no 'file_name'",
        file="metadata.json",
    ),
    no_table(
        "COCO of two pictures with one id",
        coco(TWO_IMAGES, COCO_CAPTIONS).replace('"id": 9', '"id": 7'),
        "two pictures the id 7",
        file="metadata.json",
    ),
    no_table(
        "COCO's boxes in place of captions",
        coco(TWO_IMAGES, COCO_CAPTIONS).replace('"caption"', '"bbox"'),
        "has no captions: use the file called captions_",
        file="metadata.json",
    ),
    no_table("JSON of captions by name", '{"a.jpg": "a rose"}', "file_name", file="metadata.json"),
    no_table(
        "an array that is cut off", json.dumps(OBJECTS)[:-20], "can't be read", file="metadata.json"
    ),
    no_table(
        "JSON that is cut off after empty lines",
        JSON_LINES.replace("\n", "\n\n") + '{"file',
        "line 5",
        file="metadata.jsonl",
    ),
    no_table(
        "quotes that do not end, after a caption of several lines",
        'file_name,text\na.jpg,"a\nred\nrose"\nb.jpg,"a tulip\n',
        "line 5",
    ),
]


@for_each_case(NEIGHBORS, NO_TABLES)
def test_what_is_no_table_is_told_as_what_it_is(check_case, case):
    check_case(case)


@pytest.mark.parametrize(
    "name, content",
    [("captions.txt", CSV), ("Results.csv", CSV), ("metadata.json", json.dumps(OBJECTS))],
)
def test_check_says_which_file_is_the_table(check, tmp_path, name, content):
    data = tmp_path / "data"
    write_files(data, PICTURES | {name: content})
    assert re.search(rf"^layout of {re.escape(str(data))}: .*{name}", check(data).out, re.M)
