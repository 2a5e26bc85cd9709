"""A random BLIP-2 of the size and layout of Salesforce/blip2-opt-2.7b, to try finetune.py without a
download: python tests/make_real_size.py FOLDER

3.7 billion parameters in bfloat16, in shards of safetensors: 7.5 GB on the disk and in memory. The
tokenizer is the tests' own, whose ids the model knows; what it writes means nothing.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: everything is made here

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

TINY = Path(__file__).resolve().parent / "tiny_blip2"


def write_model(folder: str, sizes: dict = {}) -> None:  # noqa: B006 - is only read
    """A random BLIP-2 with an OPT of 2.7 billion parameters, or with other `sizes` of its parts."""
    tiny = Blip2Config.from_pretrained(TINY)
    text = {"model_type": "opt", "hidden_size": 2560, "word_embed_proj_dim": 2560,
            "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
            "vocab_size": 50304} | sizes.get("text_config", {})  # fmt: skip
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # as the tokenizer has them
        text[name] = getattr(tiny.text_config, name)
    # The vision tower's default, 1e-10, makes all pictures the same.
    vision = {"initializer_range": 0.02} | sizes.get("vision_config", {})
    config = Blip2Config(text_config=text, vision_config=vision, num_query_tokens=32,
                         qformer_config=sizes.get("qformer_config"),
                         image_token_index=tiny.image_token_index)  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02)
        else:
            torch.nn.init.constant_(weight, float(name.endswith("weight")))  # norms; biases are 0
    for module in model.modules():  # what is not saved is made anew when it is loaded
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="5GB")
    processor = Blip2Processor.from_pretrained(TINY)
    processor.image_processor.size = {"height": 224, "width": 224}
    processor.num_query_tokens = config.num_query_tokens
    processor.save_pretrained(folder)


if __name__ == "__main__":
    write_model(*sys.argv[1:2] or sys.exit(__doc__))
