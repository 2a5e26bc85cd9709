"""A random BLIP-2 of the size and layout of Salesforce/blip2-opt-2.7b, to try finetune.py without a
download: python tests/make_real_size.py FOLDER

3.7 billion parameters in bfloat16, in shards of safetensors: 7.5 GB on the disk and in memory. The
tokenizer is that of the tests, whose ids the model knows; the captions mean nothing.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: everything is made here

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

TINY = Path(__file__).resolve().parent / "tiny_blip2"
REAL = {  # all that is not said here is as Blip2Config has it
    # The vision tower's default, 1e-10, would make all pictures the same.
    "vision_config": {"initializer_range": 0.02},
    "qformer_config": {},
    "text_config": {
        "model_type": "opt",
        "hidden_size": 2560,
        "word_embed_proj_dim": 2560,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 50304,
    },
}
MEDIUM = {  # for a GPU of any size: a tenth of a GB in 4 bits, and 0.8 GB on the disk
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 4,
        "num_attention_heads": 20,
    },
    "text_config": {
        "hidden_size": 1536,
        "word_embed_proj_dim": 1536,
        "ffn_dim": 6144,
        "num_hidden_layers": 4,
        "num_attention_heads": 24,
    },
}


def make_config(sizes: dict[str, dict]) -> Blip2Config:
    """The config of the real size, where `sizes` says nothing else, for the tests' tokenizer."""
    tiny = Blip2Config.from_pretrained(TINY)
    parts = {name: part | sizes.get(name, {}) for name, part in REAL.items()}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        parts["text_config"][name] = getattr(tiny.text_config, name)
    return Blip2Config(**parts, num_query_tokens=32, image_token_index=tiny.image_token_index)


def make_model(config: Blip2Config) -> Blip2ForConditionalGeneration:
    """In bfloat16, with random weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.to_empty(device="cpu")

    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02)
        elif name.endswith("weight"):  # of a norm
            torch.nn.init.ones_(weight)
        else:
            torch.nn.init.zeros_(weight)
    for module in model.modules():  # buffers are not saved, but computed again on loading
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
    model.tie_weights()
    return model


def write_model(folder: str, sizes: dict[str, dict]) -> None:
    """Model and processor; `sizes` are other sizes of parts, by the names in REAL; {}: the real."""
    config = make_config(sizes)
    make_model(config).save_pretrained(folder, max_shard_size="5GB")
    processor = Blip2Processor.from_pretrained(TINY)
    processor.image_processor.size = {"height": 224, "width": 224}
    processor.num_query_tokens = config.num_query_tokens
    processor.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_model(sys.argv[1], {})
