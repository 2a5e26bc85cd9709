"""A training step of the published sizes on a GPU that is not there: its launches and its memory.

    python tests/gpu_dry_run.py --model opt-2.7b --pairs 16 --tokens 24 [--no-4bit]
    python tests/gpu_dry_run.py --targets qformer+attention
    python tests/gpu_dry_run.py --table
    python tests/gpu_dry_run.py --parts real

finetune.py's own Captioner and Learner run on fake tensors, which have shapes, dtypes and a device,
but no values. Every operation of torch that is not a view counts as a kernel launch; what is alive
counts as memory. A synchronization raises, because there is no value to wait for, except for reads
of whole tensors, which are counted. An operation on the GPU that gets a tensor of the CPU raises
too. Two things are made by hand: attention, which torch would choose by asking the GPU, and the
4-bit layers. A C++ compiler is needed: torch's CPU build has no CUDA device, and is given one that
does nothing.
"""
# ruff: noqa: E402

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import math
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0));
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


def load_guard() -> None:
    """Gives torch, before it is imported, a CUDA device that does nothing."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        sys.exit("needs a C++ compiler: g++ or clang++")

    torch_dir = importlib.util.find_spec("torch").submodule_search_locations[0]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/guard.so"
        command = [
            compiler,
            *("-x", "c++", "-std=c++20", "-shared", "-fPIC", "-"),  # - is the standard input
            *("-o", library),
            f"-I{torch_dir}/include",
            f"-L{torch_dir}/lib",
            f"-Wl,-rpath,{torch_dir}/lib",
            "-ltorch_cpu",
            "-lc10",
        ]
        subprocess.run(command, input=GUARD, text=True, check=True)
        ctypes.CDLL(library)


load_guard()
import bitsandbytes
import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from transformers.initialization import no_init_weights

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import gpu_parts
from make_real_size import MEDIUM, make_config

import finetune

transformers.utils.logging.set_verbosity_error()
gc.freeze()  # what was imported stays: GpuMeter.start need not look for garbage in it
OPT = {
    "model_type": "opt",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50304,
}
T5 = {
    "model_type": "t5",
    "num_layers": 24,
    "d_kv": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
PUBLISHED = {  # the language models on the Hub; all else is as Blip2Config has it
    "opt-2.7b": OPT | {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240},
    "opt-6.7b": OPT | {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384},
    "t5-xl": T5 | {"d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "t5-xxl": T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
}
WITHOUT_LAUNCH = (  # operations that start no kernel, though they are not views
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "_unsafe_view",
    "is_pinned",
    "device",
)
CARDS = (6, 8, 12, 16, 24)  # the usual sizes, in GB
GIB = 2**30


# ---- The GPU that is not there ------------------------------------------------------------------


class GpuMeter(TorchDispatchMode):
    """Counts launches by their kind, and the memory that is alive on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}  # the bytes of each storage that is alive
        self.memory = 0  # bytes that are alive now
        self.peak = 0  # the most bytes that were alive
        self.launches: Counter[str] = Counter()
        self.reads = 0  # of whole tensors, for which the GPU is waited for
        self.questions = 0  # that the CPU has asked the GPU, such as whether all captions ended
        self.noes = range(0)  # the numbers of those that are answered by no; all others by yes
        self.answers_questions = False

    def start(self) -> None:
        """Counts from now on; what is alive stays."""
        gc.collect()
        self.launches.clear()
        self.peak = self.memory

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the memory of a tensor, in blocks of 512 bytes, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "cuda" and key not in self.live:
            self.live[key] = math.ceil(storage.nbytes() / 512) * 512
            self.memory += self.live[key]
            self.peak = max(self.peak, self.memory)
            weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.memory -= self.live.pop(key)

    def read(self, tensor: torch.Tensor) -> list:
        """In the place of Tensor.tolist: some values of the right shape."""
        if tensor.device.type == "cuda":
            self.reads += 1
        dtype = float if tensor.is_floating_point() else int
        return np.ones(tuple(tensor.shape), dtype).tolist()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None
    ) -> Any:
        name = function._schema.name.split("::")[1]
        given = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, torch.Tensor)]
        # A scalar of the CPU may go to the GPU with a launch.
        devices = {tensor.device.type for tensor in given if tensor.dim()}
        if len(devices) > 1 and name not in ("copy_", "_to_copy"):
            raise RuntimeError(f"{name} is given tensors of {sorted(devices)}")
        if name == "_pin_memory":  # fake tensors can't be pinned, nor can those of the GPU
            assert devices == {"cpu"}
            return arguments[0]
        if name == "_local_scalar_dense" and self.answers_questions:
            self.questions += 1
            return self.questions not in self.noes

        result = function(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
                devices.add(leaf.device.type)
        if "cuda" in devices and not function.is_view and name not in WITHOUT_LAUNCH:
            self.launches[name] += 1
        if name == "gemm_4bit":
            rows = arguments[0].numel() // arguments[0].shape[-1]
            if rows > 512:  # for fewer, one kernel does all
                # One more launch each for the scales' scales, their offset, and the weights.
                self.launches["dequantization"] += 3
        return result


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """As torch chooses: flash attention without a mask in 16 bits, else memory-efficient."""
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def convert(module: torch.nn.Module, function: Callable) -> torch.nn.Module:
    """Module._apply, for PEFT's layers: torch's fails for fake tensors that are referred to."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            converted = torch.nn.Parameter(function(weight.detach()), weight.requires_grad)
            setattr(part, name, converted)
    return module


@contextlib.contextmanager
def fake_gpu() -> Iterator[GpuMeter]:
    """Within, tensors are fake, and what the GPU does is counted."""
    meter = GpuMeter()
    code = bitsandbytes.functional.create_dynamic_map()  # while tensors are real
    with (
        mock.patch.dict(bitsandbytes.functional.name2qmap, dynamic=code),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.object(torch.nn.Module, "_apply", convert),
        mock.patch.object(FakeTensor, "tolist", lambda tensor: meter.read(tensor)),
        FakeTensorMode(allow_non_fake_inputs=True),
        meter,
    ):
        yield meter


# ---- A model on it, and what a run does with the model ------------------------------------------


def quantize(linear: torch.nn.Linear) -> None:
    """Turns the layer into one of bitsandbytes: NF4 with double quantization."""
    linear.__class__ = bitsandbytes.nn.Linear4bit
    linear.compute_dtype = linear.weight.dtype
    linear.compute_type_is_set = True
    data, state = bitsandbytes.functional.quantize_4bit(
        linear.weight, compress_statistics=True, quant_type="nf4"
    )
    linear.weight = torch.nn.Parameter(data, requires_grad=False)
    linear.weight.quant_state = state
    linear.weight.compress_statistics = True
    linear.weight.quant_type = "nf4"


def build(config: Blip2Config, dtype: torch.dtype, in_4bit: bool) -> Blip2ForConditionalGeneration:
    """The frozen model, as finetune.load_captioner leaves it."""
    with no_init_weights(), torch.device("cuda"):
        model = Blip2ForConditionalGeneration._from_config(config, dtype=dtype)
    model.eval().requires_grad_(False).tie_weights()
    model.is_loaded_in_4bit = in_4bit

    language_model = model.language_model
    if config.text_config.model_type == "t5":  # the head of a Flan-T5 is not its embedding
        head = language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    if in_4bit:
        for name, module in language_model.named_modules():
            # Of T5, transformers does not quantize wo.
            is_whole = name.endswith(("lm_head", ".wo"))
            if type(module) is torch.nn.Linear and not is_whole:
                quantize(module)
    if dtype == torch.float16:  # where transformers keeps the Q-Former in float32
        for weight in (model.query_tokens, *model.qformer.parameters()):
            weight.data = weight.data.float()
    return model


class DryRun:
    """A model on the GPU that is not there, and what a run does with it."""

    def __init__(
        self,
        meter: GpuMeter,
        config: Blip2Config,
        in_4bit: bool,
        dtype: torch.dtype = torch.bfloat16,
        flags: tuple[str, ...] = (),
    ) -> None:
        self.meter = meter
        self.config = config
        self.settings = finetune.parse_arguments(flags)
        self.captioner = finetune.Captioner(
            build(config, dtype, in_4bit),
            Blip2Processor.from_pretrained(HERE / "tiny_blip2"),
            self.settings.PROMPT,
            self.settings.MAX_CAPTION_TOKENS,
            self.settings.NUM_BEAMS,
            trains_qformer=self.settings.LORA_TARGETS.startswith("qformer"),
        )

    def encode(self) -> torch.Tensor:
        """The features of a batch of pictures."""
        self.meter.start()
        side = self.config.vision_config.image_size
        pixel_values = np.zeros((3, side, side), np.float32)
        return self.captioner.encode([pixel_values] * finetune.INFERENCE_BATCH)

    def caption(self, features: torch.Tensor, tokens: int = 1) -> int:
        """Captions of so many tokens for these pictures. Returns the launches.

        The last question of a caption of one token is whether it has ended; with more tokens, it is
        asked again after each.
        """
        if tokens > 1:
            self.caption(features)
            self.meter.noes = range(self.meter.questions, self.meter.questions + tokens - 1)
        self.meter.start()
        self.meter.questions = 0
        self.meter.answers_questions = True
        self.captioner.caption(features)
        self.meter.answers_questions = False
        self.meter.noes = range(0)
        assert self.meter.launches["argmax"] == tokens
        return self.meter.launches.total()

    def add_learner(self) -> None:
        """Replaces the vision side by LoRA, and takes a step, so that AdamW has its state."""
        model = self.captioner.model
        model.vision_model = torch.nn.Identity()
        if not self.captioner.trains_qformer:
            model.qformer = torch.nn.Identity()
        with contextlib.redirect_stdout(None):
            adapter = finetune.add_lora(
                model,
                self.settings.LORA_TARGETS,
                self.settings.LORA_RANK,
                self.settings.LORA_ALPHA,
                self.settings.LORA_DROPOUT,
            )
        self.learner = finetune.Learner(
            self.captioner, adapter, self.settings.WEIGHT_DECAY, self.settings.BATCH_SIZE
        )
        self.step(self.backward(2, 24))

    def backward(self, pairs: int, tokens: int) -> torch.Tensor:
        """Forward and backward of one micro-batch of equally long captions."""
        caption = " ".join(["a"] * tokens)
        assert len(self.captioner.row_builder.tokenize(caption)) == tokens
        features = torch.zeros(self.captioner.feature_shape(), dtype=self.captioner.dtype)
        examples = [finetune.Example(features, caption)] * pairs

        self.meter.start()
        # transformers asks a mask whether it masks anything, and waits, but not for a fake one.
        with mock.patch("transformers.utils.import_utils.is_fake_tensor", lambda _: False):
            return self.learner.backward(examples, pairs * (tokens + 1))

    def step(self, losses: torch.Tensor) -> None:
        """The rest of an optimizer step."""
        self.meter.start()
        result = self.learner.sum_over_processes(losses, len(losses), False)
        self.learner.step(1e-4, result.norm, 1.0)


# ---- Commands -----------------------------------------------------------------------------------


def rehearse(folder: str) -> None:
    """All that a run does, with the model in `folder`: a line for each dtype and quantization."""
    config = Blip2Config.from_pretrained(folder)
    for dtype, in_4bit in (
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ):
        with fake_gpu() as meter:
            dry_run = DryRun(meter, config, in_4bit, dtype, ("--lora-targets", "all-linear"))
            dry_run.caption(dry_run.encode())
            meter.reads = 0
            dry_run.add_learner()
            bits = "4 bits" if in_4bit else ""
            model_type = config.text_config.model_type
            print(f"{model_type} {dtype} {bits}: reads in a step: {meter.reads}")


def find_card(peak: float) -> str:
    """The smallest usual card with room for these GiB, and one more for CUDA itself."""
    for size in CARDS:
        if peak + 1 <= size:
            return f"{size} GB"
    return "more"


def list_parts(sizes: dict[str, dict]) -> dict[str, float]:
    """The memory, in GiB, of the parts of a run that gpu_parts.py measures on a GPU that is there.

    `sizes` are those of make_real_size.py.
    """
    with fake_gpu() as meter:
        dry_run = DryRun(meter, make_config(sizes), in_4bit=True)
        peaks = {"load": meter.memory}
        features = dry_run.encode()
        peaks["encode"] = meter.peak
        dry_run.add_learner()
        losses = dry_run.backward(gpu_parts.PAIRS, gpu_parts.TOKENS)
        backward_peak = meter.peak
        dry_run.step(losses)
        peaks["step"] = max(backward_peak, meter.peak)
        dry_run.caption(features, gpu_parts.CAPTION_TOKENS)
        peaks["caption"] = meter.peak
    return {name: round(peak / GIB, 3) for name, peak in peaks.items()}


def print_table() -> None:
    """The memory of the published models, and the smallest card that each runs on."""
    header = [
        "model",
        "bits",
        "LORA_TARGETS",
        "encoding",
        "step, 1 pair",
        "step, 16 pairs",
        "step, 16 pairs of 64 tokens",
        "runs on",
        "16 pairs at once on",
    ]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for name, text_config in PUBLISHED.items():
        for in_4bit, targets in (
            (True, "attention"),
            (True, "qformer+attention"),
            (False, "attention"),
        ):
            with fake_gpu() as meter:
                config = Blip2Config(text_config=text_config)
                dry_run = DryRun(meter, config, in_4bit, flags=("--lora-targets", targets))
                dry_run.encode()
                encoding = meter.peak / GIB
                dry_run.add_learner()
                steps = []
                for pairs, tokens in ((1, 24), (16, 24), (16, 64)):
                    dry_run.backward(pairs, tokens)
                    steps.append(meter.peak / GIB)
            cells = [
                "blip2-" + name.replace("t5", "flan-t5"),
                "4" if in_4bit else "16",
                targets,
                f"{encoding:.1f}",
                *(f"{peak:.1f}" for peak in steps),
                find_card(max(encoding, steps[0])),
                find_card(max(encoding, steps[0], steps[1])),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def print_step(model: str, targets: str, in_4bit: bool, pairs: int, tokens: int) -> None:
    """Launches and memory of one training step."""
    with fake_gpu() as meter:
        config = Blip2Config(text_config=PUBLISHED[model])
        dry_run = DryRun(meter, config, in_4bit, flags=("--lora-targets", targets))
        dry_run.add_learner()
        losses = dry_run.backward(pairs, tokens)
        print(f"launches {meter.launches.total()}, peak {meter.peak / GIB:.2f} GiB")
        meter.reads = 0
        dry_run.step(losses)
        print(
            f"sums, norm, AdamW, master to weights: launches {meter.launches.total()}, "
            f"of which {meter.reads} read is waited for"
        )
        shape = dry_run.captioner.feature_shape()
        features = torch.zeros(pairs, *shape, dtype=dry_run.captioner.dtype)
        launches = [dry_run.caption(features, tokens) for tokens in (2, 3)]
        print(f"each generated token: launches {launches[1] - launches[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="opt-2.7b", choices=PUBLISHED)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="of each caption, without its stop")
    parser.add_argument("--targets", default="attention", help="LORA_TARGETS")
    parser.add_argument("--no-4bit", action="store_true")
    parser.add_argument("--parts", choices=("medium", "real"), help="what gpu_parts.py compares")
    parser.add_argument("--table", action="store_true", help="the memory table instead")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
    elif arguments.parts:
        print(list_parts(MEDIUM if arguments.parts == "medium" else {}))
    else:
        in_4bit = not arguments.no_4bit
        print_step(arguments.model, arguments.targets, in_4bit, arguments.pairs, arguments.tokens)


if __name__ == "__main__":
    main()
