"""The parts of a run, each measured alone: loading, encoding, a step, captioning."""

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

import finetune

PAIRS = 16  # pictures that are encoded and captioned, pairs in a step
TOKENS = 24  # of each caption that is learned, without its stop
CAPTION_TOKENS = 9  # of each caption that is made, with its stop
STEPS = 10  # of which the first two are not measured
GIB = 2**30

# What gpu_dry_run.py --parts computes, in GiB: OPT in NF4 and bfloat16, LoRA in the attention.
DRY_RUN = {
    "medium": {"load": 0.549, "encode": 0.671, "step": 0.612, "caption": 0.294},
    "real": {"load": 3.497, "encode": 3.639, "step": 4.132, "caption": 1.851},
}


class Part(NamedTuple):
    seconds: float
    memory: float  # in GiB, its peak; of loading, what is there afterwards


def synchronize() -> None:
    """Waits until the GPU, if there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def measured(parts: dict[str, Part], name: str) -> Iterator[None]:
    """Adds what is done within to `parts`."""
    gc.collect()
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    yield
    synchronize()
    seconds = time.perf_counter() - started
    memory = 0
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
        if name == "load":
            memory = torch.cuda.memory_allocated()
    parts[name] = Part(seconds, memory / GIB)


def measure_parts(model_id: str, *flags: str) -> dict[str, Part]:
    """What a run with this model does. `flags` are those of finetune.py."""
    settings = finetune.parse_arguments(["--model-id", model_id, *flags])
    parts: dict[str, Part] = {}
    with measured(parts, "load"):
        captioner = finetune.load_captioner(settings)

    side = captioner.model.config.vision_config.image_size
    pixel_values = [np.zeros((3, side, side), np.float32)] * PAIRS
    captioner.encode(pixel_values)  # the first call makes what later ones find
    with measured(parts, "encode"):
        features = captioner.encode(pixel_values)
    captioner.drop_vision_side()

    adapter = finetune.add_lora(
        captioner.model,
        settings.LORA_TARGETS,
        settings.LORA_RANK,
        settings.LORA_ALPHA,
        settings.LORA_DROPOUT,
    )
    learner = finetune.Learner(captioner, adapter, settings.WEIGHT_DECAY, PAIRS)
    caption = " ".join(["a"] * TOKENS)
    examples = [finetune.Example(picture, caption) for picture in features]

    def take_step() -> None:
        losses = learner.backward(examples, PAIRS * (TOKENS + 1))
        result = learner.sum_over_processes(losses, PAIRS, stop=False)
        learner.step(1e-4, result.norm, settings.MAX_GRAD_NORM)

    for _ in range(2):
        take_step()
    with measured(parts, "step"):
        for _ in range(STEPS - 2):
            take_step()
    parts["step"] = parts["step"]._replace(seconds=parts["step"].seconds / (STEPS - 2))

    captioner.row_builder.max_tokens = CAPTION_TOKENS - 1
    captioner.caption(features)
    with measured(parts, "caption"):
        captioner.caption(features)
    return parts
