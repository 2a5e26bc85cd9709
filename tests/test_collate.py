"""How pairs are laid out for the language model: without a model, and on no device."""

import pytest
import torch
from transformers import AutoTokenizer, Blip2Config

import finetune

FEATURES = torch.arange(4 * 8.0).view(4, 8)  # of a picture: four query tokens
CAPTIONS = ["a red circle", "a"]


@pytest.fixture
def tokenizer(any_base) -> finetune.RowBuilder:
    config = Blip2Config.from_pretrained(any_base)
    return finetune.RowBuilder(AutoTokenizer.from_pretrained(any_base), config, "on", 2)


def test_collate_fn(tokenizer):
    """Captions are cut at two tokens, and end with the stop token."""
    batch = tokenizer.collate_fn([finetune.Example(FEATURES, text) for text in CAPTIONS])
    long, short = (tokenizer.label_ids(text) for text in CAPTIONS)
    assert (len(long), len(short)) == (3, 2) and long[2] == short[1] == tokenizer.stop_id
    prompt, pad = tokenizer.prompt_ids, tokenizer.pad_id
    if tokenizer.is_t5:
        start = tokenizer.start_id
        assert batch.input_ids.tolist() == [prompt, prompt]
        assert batch.decoder_input_ids.tolist() == [[start, *long[:2]], [start, *short]]
        assert batch.positions.tolist() == [0, 1, 2, 3, 4]
    else:
        assert batch.input_ids.tolist() == [[*prompt, *long], [*prompt, *short, pad]]
        assert batch.decoder_input_ids.shape == (2, 0)
        length = 4 + len(prompt) + 3
        first = 4 + len(prompt) - 1  # the last token of the prompt predicts the caption's first
        assert batch.positions.tolist() == [
            first, first + 1, first + 2, length + first, length + first + 1]  # fmt: skip
    assert batch.targets.tolist() == long + short and batch.owners.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(batch.features, torch.stack([FEATURES, FEATURES]))
    assert all(part.dtype == torch.long for part in batch[:-1])
