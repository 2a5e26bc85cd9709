"""Memory that runs out: the work is done in smaller parts, with the same results.

Where there is no room even for a single picture, a sentence says so. Memory is acted here: a
function fails if it is given more than there is room for.
"""

import contextlib
import functools
import io
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import (
    assert_words,
    copy_small,
    flags_of,
    read_captions,
    read_table,
    rows_of,
    train,
    write_several,
)
from transformers import Blip2ForConditionalGeneration, Blip2VisionModel, GenerationMixin

import finetune

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
ASYNCHRONOUS = (  # as PyTorch writes it, over several lines
    "CUDA error: out of memory\n"
    "CUDA kernel errors might be asynchronously reported at some other API call.\n"
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
SIZES = (16, 3, 1)  # how many are worked on at a time: all, an uneven split, each alone


# ---- Acted memory -------------------------------------------------------------------------------


def count_pictures(model, pixel_values, *_, **__) -> int:
    return len(pixel_values)


def count_beams(model, *, inputs_embeds, num_beams, **_) -> int:
    return len(inputs_embeds) * num_beams


def count_measured(captioner, batch) -> int:
    return 0 if torch.is_grad_enabled() else len(batch.features)


def count_trained(captioner, batch) -> int:
    return len(batch.features) if torch.is_grad_enabled() else 0


class Place(NamedTuple):
    """A function that needs memory, and how many items it is given."""

    owner: type
    name: str
    count: Callable[..., int]


PLACES = {
    "encoding": Place(Blip2VisionModel, "forward", count_pictures),
    "measuring": Place(finetune.Captioner, "target_losses", count_measured),
    "captioning": Place(GenerationMixin, "generate", count_beams),
    "step": Place(finetune.Captioner, "target_losses", count_trained),
}


@pytest.fixture
def limit_memory(monkeypatch):
    """limit_memory("encoding", 3): there, from now on, no more than 3 items fit into memory.

    `error` is what is raised; with `in_backward`, only the backward pass of a step raises it.
    """

    def limit(
        place_name: str,
        room: int,
        error: BaseException | None = None,
        in_backward: bool = False,
    ) -> None:
        place = PLACES[place_name]
        real = getattr(place.owner, place.name)

        def fail(*_) -> None:
            raise error or torch.OutOfMemoryError(OUT_OF_MEMORY)

        def limited(*arguments, **named):
            is_too_much = place.count(*arguments, **named) > room
            if is_too_much and not in_backward:
                fail()
            result = real(*arguments, **named)
            if is_too_much:
                result.register_hook(fail)
            return result

        monkeypatch.setattr(place.owner, place.name, limited)

    return limit


def read_sizes(output: str) -> list[int]:
    """How many are worked on at a time, each time that this is said to be lowered."""
    sizes = re.findall(r"^out of memory with \d+ at a time: (\d+) from now on$", output, re.M)
    assert output.count("out of memory") == len(sizes)
    return [int(size) for size in sizes]


# ---- The results do not depend on how many are worked on at a time ------------------------------


@pytest.fixture
def built(any_base, sample, tmp_path, build):
    """What a run has made, in float32, of 16 pictures with captions of different lengths."""
    return build(any_base, write_several(tmp_path / "several", sample, 16))


def pick_rows(built) -> list[finetune.Example]:
    """16 examples, whose captions have different lengths: there is padding, but not for 1."""
    rows = finetune.spread(rows_of(built), 16)
    lengths = {len(built.captioner.row_builder.label_ids(row.caption)) for row in rows}
    assert len(lengths) > 1
    return rows


def flatten(losses: list[list[float]]) -> list[float]:
    return [loss for losses_of_row in losses for loss in losses_of_row]


def test_features_do_not_depend_on_the_size(built):
    pictures = list(built.feature_files)
    image_processor = built.captioner.processor.image_processor
    pixels = list(finetune.decode_pictures(pictures, image_processor).pixels.values())
    features = {}

    for size in SIZES:
        built.captioner.encode_size.size = size
        features[size] = built.captioner.encode(pixels)

    assert len(features[16]) == 16
    for size in SIZES:
        # The values are between -5 and 5.
        torch.testing.assert_close(features[size], features[16], rtol=0, atol=1e-5)


def test_losses_do_not_depend_on_the_size(built):
    rows = pick_rows(built)
    losses = {}

    for size in SIZES:
        built.captioner.measure_size.size = size
        losses[size] = built.captioner.measure(rows).tolist()

    assert len(losses[16]) == 16
    for size in SIZES:
        assert losses[size] == pytest.approx(losses[16], rel=1e-6)


def test_losses_of_words_do_not_depend_on_the_size(built):
    rows = pick_rows(built)
    losses = {}

    for size in SIZES:
        built.captioner.measure_size.size = size
        losses[size] = built.captioner.measure_tokens(rows)

    lengths = [len(losses_of_row) for losses_of_row in losses[16]]
    for size in SIZES:
        assert [len(losses_of_row) for losses_of_row in losses[size]] == lengths
        # Of a single token, which is not averaged; most are above 1.
        assert flatten(losses[size]) == pytest.approx(flatten(losses[16]), rel=1e-6, abs=1e-5)


def test_losses_of_a_step_do_not_depend_on_the_size(built):
    rows = pick_rows(built)
    losses = {}

    for size in SIZES:
        built.learner.part_size.size = size
        losses[size] = built.learner.backward(rows, tokens=100).tolist()

    assert len(losses[16]) == 16
    for size in SIZES:
        assert losses[size] == pytest.approx(losses[16], rel=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_do_not_depend_on_the_size(built, beams):
    built.captioner.num_beams = beams
    built.captioner.row_builder.max_tokens = 12
    features = torch.stack([row.features for row in pick_rows(built)])
    texts = {}
    confidences = {}

    for size in SIZES:
        built.captioner.caption_size.size = size
        captions = built.captioner.caption(features)
        texts[size] = [caption.text for caption in captions]
        confidences[size] = [caption.confidence for caption in captions]

    assert len(set(texts[16])) > 1
    for size in SIZES:
        assert texts[size] == texts[16]
        assert confidences[size] == pytest.approx(confidences[16], abs=1e-6)


# ---- A run --------------------------------------------------------------------------------------


class Squeeze(NamedTuple):
    """A run over 6 training and 6 held-out pictures, in a place of which there is little room."""

    name: str
    place: str
    room: int
    sizes: list[int]  # what it says, one after the other
    beams: int = 1


SQUEEZES = [
    Squeeze("encoding, for two", "encoding", 2, [6, 3, 2]),  # all 12 at once
    Squeeze("encoding, for one", "encoding", 1, [6, 3, 2, 1]),
    # Captions have a size of their own, and their confidence is measured.
    Squeeze("measuring, for two", "measuring", 2, [3, 2, 3, 2]),
    Squeeze("measuring, for one", "measuring", 1, [3, 2, 1, 3, 2, 1]),
    Squeeze("captioning, for two", "captioning", 2, [3, 2]),
    Squeeze("captioning, for one", "captioning", 1, [3, 2, 1]),
    Squeeze("beams, for two pictures", "captioning", 6, [3, 2], beams=3),
    Squeeze("step, for two", "step", 2, [3, 2]),
    Squeeze("step, for one", "step", 1, [3, 2, 1]),
]


@pytest.fixture(scope="module")
def run(sample, opt_base, tmp_path_factory):
    """run(folder, NUM_BEAMS=3): what a run says that must end well; its files are in the folder.

    It encodes the pictures, though an earlier run has encoded them.
    """
    data = copy_small(sample, tmp_path_factory.mktemp("data") / "data")

    def call(folder: Path, **settings) -> str:
        shutil.rmtree(data / ".features", ignore_errors=True)
        flags = flags_of(
            {
                "TRAIN_DIR": data,
                "MODEL_ID": opt_base,
                "OUTPUT_DIR": folder,
                "VALIDATION_FRACTION": 0.5,
                "EPOCHS": 2,
                "BATCH_SIZE": 6,
                "LEARNING_RATE": 3e-3,
                "LORA_DROPOUT": 0,  # whose noise depends on how a step is split
            }
            | settings
        )
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert finetune.main(flags) == 0
        return output.getvalue()

    return call


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """whole(3): the folder of a run that has room for everything, with so many beams."""

    @functools.cache
    def call(beams: int) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "out"
        assert read_sizes(run(folder, NUM_BEAMS=beams)) == []
        return folder

    return call


@pytest.mark.parametrize("squeeze", SQUEEZES, ids=lambda squeeze: squeeze.name)
def test_a_run_halves_what_does_not_fit_with_the_same_results(
    run, whole, limit_memory, squeeze, tmp_path
):
    """Two epochs measure three times and caption twice: each size is told once, and kept."""
    whole_folder = whole(squeeze.beams)

    limit_memory(squeeze.place, squeeze.room)
    split_output = run(tmp_path / "split", NUM_BEAMS=squeeze.beams)
    assert read_sizes(split_output) == squeeze.sizes

    whole_rows = read_table(whole_folder / "held_out.csv")
    split_rows = read_table(tmp_path / "split/held_out.csv")
    assert len(whole_rows) == 6
    for column in ("picture", "before", "after"):
        assert [row[column] for row in split_rows] == [row[column] for row in whole_rows]

    whole_metrics = read_table(whole_folder / "metrics.csv")
    split_metrics = read_table(tmp_path / "split/metrics.csv")
    assert len(split_metrics) == len(whole_metrics) == 3
    for split_row, whole_row in zip(split_metrics, whole_metrics, strict=True):
        loss = float(whole_row["held_out_loss"])
        # AdamW makes much of tiny differences in rounding.
        assert float(split_row["held_out_loss"]) == pytest.approx(loss, rel=1e-4)


def test_a_continued_run_starts_from_the_largest_size_again(
    command, small_data, opt_base, monkeypatch, limit_memory
):
    """It may be on a larger GPU. The run is interrupted in its second epoch."""
    settings = {
        "TRAIN_DIR": small_data,
        "MODEL_ID": opt_base,
        "EPOCHS": 3,
        "BATCH_SIZE": 12,
        "VALIDATION_FRACTION": 0,
    }
    limit_memory("step", 3)
    real_step = finetune.take_step

    def interrupt_second_step(learner, dataset, plan, *arguments):
        if plan.number == 1:
            raise KeyboardInterrupt
        return real_step(learner, dataset, plan, *arguments)

    monkeypatch.setattr(finetune, "take_step", interrupt_second_step)
    code, output, _ = command(**settings)
    assert code == 130
    assert read_sizes(output) == [6, 3]
    monkeypatch.undo()  # there is room again

    sizes = []
    real_losses = finetune.Captioner.losses

    def losses(captioner, batch):
        if torch.is_grad_enabled():
            sizes.append(len(batch.features))
        return real_losses(captioner, batch)

    monkeypatch.setattr(finetune.Captioner, "losses", losses)
    code, output, error = command(**settings)

    assert code == 0, error
    assert "steps: 3, 1 per epoch, 1 done" in output
    assert read_sizes(output) == []
    assert sizes == [12, 12]


# ---- --caption ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(sample, opt_base, tmp_path_factory) -> Path:
    """The OUTPUT_DIR of a run."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(sample, folder / "train", ignore=shutil.ignore_patterns(".features", "0*"))
    flags = ["--train-dir", str(folder / "train"), "--model-id", opt_base, "--epochs", "1"]
    assert finetune.main([*flags, "--output-dir", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def caption(command, finished, small_data):
    """caption(NUM_BEAMS=3) -> code, stdout, stderr of --caption for the 12 pictures."""

    def call(**settings) -> tuple[int, str, str]:
        return command("--caption", str(small_data / "Image"), OUTPUT_DIR=finished, **settings)

    return call


@pytest.mark.parametrize(
    "place, room, beams, sizes",
    [
        ("encoding", 3, 1, [6, 3]),
        ("encoding", 1, 1, [6, 3, 2, 1]),
        ("captioning", 3, 1, [6, 3]),
        ("captioning", 9, 3, [6, 3]),
        ("captioning", 3, 3, [6, 3, 2, 1]),
    ],
)
def test_caption_with_little_memory_prints_the_same(
    caption, limit_memory, place, room, beams, sizes
):
    """What is told about memory goes to stderr: stdout has a line for each picture alone."""
    _, whole_output, _ = caption(NUM_BEAMS=beams)
    whole = read_captions(whole_output)

    limit_memory(place, room)
    code, output, error = caption(NUM_BEAMS=beams)

    assert code == 0
    assert read_sizes(error) == sizes
    assert "out of memory" not in output
    found = read_captions(output)
    assert list(found) == list(whole)
    assert len(found) == 12
    for picture, (text, confidence) in whole.items():
        assert found[picture][0] == text
        assert found[picture][1] == pytest.approx(confidence, abs=1.5e-4)  # four decimals


@pytest.mark.parametrize(
    "place, remedy", [("encoding", "a smaller MODEL_ID"), ("captioning", "lower NUM_BEAMS")]
)
def test_caption_without_room_for_one_picture_says_so(caption, limit_memory, place, remedy):
    limit_memory(place, 0)

    code, output, error = caption()

    assert code == 1
    assert output == ""
    last_line = error.splitlines()[-1]
    assert_words(last_line, (f"error: {OUT_OF_MEMORY}", remedy))
    assert ("NUM_BEAMS" in last_line) == (place == "captioning")


# ---- No room for a single one -------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, remedy",
    [
        ("encoding", "a smaller MODEL_ID"),
        ("measuring", "a lower MAX_CAPTION_TOKENS"),
        ("captioning", "lower NUM_BEAMS"),
        ("step", "a lower MAX_CAPTION_TOKENS"),
    ],
)
def test_without_room_for_one_a_sentence_has_the_remedy_of_that_place(
    refused, small_data, opt_base, limit_memory, place, remedy
):
    """The allocator's own sentence comes first. Beams are of use only where captions are made."""
    limit_memory(place, 0)

    error = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base)

    assert error.startswith(f"error: {OUT_OF_MEMORY} Free memory on the device")
    assert error.count("\n") == 1
    assert remedy in error
    assert ("NUM_BEAMS" in error) == (place == "captioning")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate(handle)",
    ],
)
def test_when_one_pair_does_not_fit_a_sentence_says_so(
    message, opt_base, small_data, command, limit_memory
):
    limit_memory("step", 0, RuntimeError(message))

    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base)

    assert code == 1
    assert message in error
    assert "MAX_CAPTION_TOKENS" in error


@pytest.mark.parametrize(
    "failure, words",
    [
        (RuntimeError(ASYNCHRONOUS), " ".join(ASYNCHRONOUS.split())),
        (MemoryError(), "error: out of memory. Free"),
    ],
    ids=["several lines", "no words"],
)
def test_the_sentence_is_one_line_whatever_the_allocator_says(
    refused, small_data, opt_base, limit_memory, failure, words
):
    limit_memory("encoding", 0, failure)

    error = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base)

    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError(OUT_OF_MEMORY), MemoryError()])
def test_without_room_for_the_model_the_sentence_says_so(
    refused, small_data, opt_base, monkeypatch, failure
):
    def fail(*arguments, **named) -> None:
        raise failure

    monkeypatch.setattr(Blip2ForConditionalGeneration, "from_pretrained", fail)

    error = refused(TRAIN_DIR=small_data, MODEL_ID=opt_base)

    assert re.match("error: .*out of memory.*, while the model was loaded. Free", error)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA driver error: invalid argument",
        "CUDA error: device-side assert",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED",
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_other_errors_of_cuda_are_not_taken_for_a_lack_of_memory(
    message, place, opt_base, small_data, command, limit_memory
):
    limit_memory(place, 0, RuntimeError(message))

    with pytest.raises(RuntimeError, match=message):
        command(TRAIN_DIR=small_data, MODEL_ID=opt_base)


def test_out_of_memory_while_loading_says_so(opt_base, small_data, command, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(Blip2ForConditionalGeneration, "from_pretrained", fail)

    code, _, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base)

    assert code == 1
    assert error.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB, while")
    assert "LOAD_IN_4BIT" in error


# ---- The step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_that_is_split_for_memory_trains_the_same_adapter(
    any_base, small_data, build, limit_memory, capsys, in_backward
):
    """12 pairs in steps of 7 and 5: at first 4 pairs at a time are tried, then 2, which fit.

    Rounding may differ, and AdamW makes tiny gradients large: what counts is that the difference
    is small beside what has been learned.
    """
    settings = {"EPOCHS": 2, "BATCH_SIZE": 7, "LEARNING_RATE": 3e-3}
    whole = build(any_base, small_data)
    untrained = whole.learner.master.clone()
    train(whole, **settings)

    split = build(any_base, small_data)
    failure = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")
    limit_memory("step", 2, failure, in_backward)
    capsys.readouterr()
    train(split, **settings)

    assert read_sizes(capsys.readouterr().out) == [4, 2]
    learned = (whole.learner.master - untrained).norm()
    assert (split.learner.master - whole.learner.master).norm() <= 1e-3 * learned


def test_what_did_not_fit_is_freed_before_less_is_tried():
    """Else its activations would take the memory of the second attempt."""
    held = []  # weak references to what the attempts have made
    alive = []  # how much of it there is, at the start of each attempt

    def work(part: list[int]) -> None:
        alive.append(sum(reference() is not None for reference in held))
        activations = torch.zeros(len(part))
        held.append(weakref.ref(activations))
        if len(part) > 1:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    finetune.PartSize(4, "").run(work, [1, 2, 3, 4])

    assert alive == [0, 0, 0, 0, 0, 0]  # of 4, of 2, and of each


def test_on_a_gpu_one_pair_is_tried_before_the_first_step(opt_base, small_data, build, monkeypatch):
    """The handles of cuBLAS are made then, while there is room."""
    built = build(opt_base, small_data)
    tried = []
    monkeypatch.setattr(finetune, "add_lora", lambda *arguments: built.adapter)

    def backward(learner, rows, tokens):
        tried.append(len(rows))

    monkeypatch.setattr(finetune.Learner, "backward", backward)
    nothing = finetune.ImageCaptioningDataset([], {}, built.captioner.row_builder)
    datasets = finetune.Datasets(built.dataset, nothing, [])
    built.captioner.device = torch.device("cuda")

    finetune.start(built.settings, built.captioner, datasets, None)

    assert tried == [1]
