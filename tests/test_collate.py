"""How pairs are laid out for the language model: without a model, and on no device."""

import pytest
import torch
from transformers import AutoTokenizer, Blip2Config

import finetune

QUERY_TOKENS = 8  # as the tiny base
MAX_TOKENS = 2
FEATURES = torch.arange(QUERY_TOKENS * 8.0).view(QUERY_TOKENS, 8)  # of a picture
LONG = finetune.Example(FEATURES, "a red circle")  # it is cut at MAX_TOKENS
SHORT = finetune.Example(FEATURES, "a")


def make_row_builder(base: str) -> finetune.RowBuilder:
    config = Blip2Config.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return finetune.RowBuilder(tokenizer, config, prompt="on", max_tokens=MAX_TOKENS)


def test_captions_are_cut_and_end_with_the_stop_token(any_base):
    row_builder = make_row_builder(any_base)

    long = row_builder.label_ids(LONG.caption)
    short = row_builder.label_ids(SHORT.caption)

    assert len(long) == MAX_TOKENS + 1
    assert long[-1] == row_builder.stop_id
    assert len(short) == 2
    assert short[-1] == row_builder.stop_id


def test_a_batch_has_the_targets_of_all_rows_and_no_padding_among_them(any_base):
    row_builder = make_row_builder(any_base)

    batch = row_builder.collate_fn([LONG, SHORT])

    long = row_builder.label_ids(LONG.caption)
    short = row_builder.label_ids(SHORT.caption)
    assert batch.targets.tolist() == long + short
    assert batch.owners.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(batch.features, torch.stack([FEATURES, FEATURES]))


def test_all_integers_of_a_batch_are_long(any_base):
    """They travel to the device in one vector."""
    batch = make_row_builder(any_base).collate_fn([LONG, SHORT])

    *integers, _ = batch
    assert {tensor.dtype for tensor in integers} == {torch.long}


def test_for_opt_prompt_and_caption_are_one_text(opt_base):
    row_builder = make_row_builder(opt_base)
    prompt = row_builder.prompt_ids
    long = row_builder.label_ids(LONG.caption)
    short = row_builder.label_ids(SHORT.caption)

    batch = row_builder.collate_fn([LONG, SHORT])

    assert batch.input_ids.tolist() == [[*prompt, *long], [*prompt, *short, row_builder.pad_id]]
    assert batch.decoder_input_ids.shape == (2, 0)
    row_length = QUERY_TOKENS + len(prompt) + len(long)
    first = QUERY_TOKENS + len(prompt) - 1  # the prompt's last token predicts the caption's first
    of_long = [first, first + 1, first + 2]
    of_short = [row_length + first, row_length + first + 1]
    assert batch.positions.tolist() == of_long + of_short


def test_for_t5_the_encoder_reads_the_prompt_and_the_decoder_the_caption(t5_base):
    row_builder = make_row_builder(t5_base)
    prompt = row_builder.prompt_ids
    start = row_builder.start_id
    long = row_builder.label_ids(LONG.caption)
    short = row_builder.label_ids(SHORT.caption)

    batch = row_builder.collate_fn([LONG, SHORT])

    assert batch.input_ids.tolist() == [prompt, prompt]
    assert batch.decoder_input_ids.tolist() == [[start, *long[:2]], [start, *short]]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("prompt", ["on", ""])
def test_a_space_is_between_prompt_and_caption_for_opt_alone(any_base, prompt):
    config = Blip2Config.from_pretrained(any_base)
    tokenizer = AutoTokenizer.from_pretrained(any_base)
    row_builder = finetune.RowBuilder(tokenizer, config, prompt, MAX_TOKENS)

    ids = row_builder.tokenize("red circle")

    expected = " red circle" if prompt and not row_builder.is_t5 else "red circle"
    assert ids == tokenizer(expected, add_special_tokens=False).input_ids
