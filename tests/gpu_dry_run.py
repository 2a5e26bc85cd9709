"""A training step of the published sizes on a GPU that is not there: its launches and its memory.

    python tests/gpu_dry_run.py --model opt-2.7b --pairs 16 --tokens 24 [--no-4bit]
    python tests/gpu_dry_run.py --table

finetune.py's own Captioner and Learner run on fake tensors, which have shapes, dtypes and a device,
and no values. Every operation of torch that is no view counts as a kernel launch, what is alive as
memory. A synchronization raises, for there is no value to wait for, but for reads of whole tensors,
which are counted; so does an operation on the GPU that is given a tensor of the CPU. Two things are
made by hand: attention, which torch would choose by asking the GPU, and the 4-bit layers. A C++
compiler is needed: torch's CPU build knows no CUDA device, and is given one that does nothing.
"""
# ruff: noqa: E402

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
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
        subprocess.run(
            [compiler, *"-x c++ -std=c++20 -shared -fPIC - -o".split(), f"{folder}/guard.so",
             f"-I{torch_dir}/include", f"-L{torch_dir}/lib", f"-Wl,-rpath,{torch_dir}/lib",
             "-ltorch_cpu", "-lc10"], input=GUARD, text=True, check=True)
        ctypes.CDLL(f"{folder}/guard.so")


load_guard()
import bitsandbytes
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from transformers.initialization import no_init_weights

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import finetune

OPT = {"model_type": "opt", "num_hidden_layers": 32, "num_attention_heads": 32,
       "vocab_size": 50304}  # fmt: skip
T5 = {"model_type": "t5", "num_layers": 24, "d_kv": 64, "vocab_size": 32128,
      "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
      "decoder_start_token_id": 0}  # fmt: skip
PUBLISHED = {  # the language models on the Hub; all else is as Blip2Config has it
    "opt-2.7b": OPT | {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240},
    "opt-6.7b": OPT | {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384},
    "t5-xl": T5 | {"d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "t5-xxl": T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
}
NO_LAUNCH = "empty empty_like empty_strided new_empty _unsafe_view is_pinned device".split()


class Counted(TorchDispatchMode):
    """Counts launches by kind, and the memory that is alive on the GPU, in blocks of 512 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0
        self.launches, self.reads, self.patient = Counter(), 0, False

    def start(self) -> None:
        """From now on."""
        gc.collect()
        self.launches.clear()
        self.peak = self.now

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "cuda" and key not in self.live:
            self.live[key] = -(-storage.nbytes() // 512) * 512
            self.now += self.live[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def read(self, tensor: torch.Tensor) -> list:
        """In the place of Tensor.tolist: the GPU is waited for."""
        self.reads += tensor.device.type == "cuda"
        return np.ones(tuple(tensor.shape), float if tensor.is_floating_point() else int).tolist()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function._schema.name.split("::")[1]
        given = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in given if x.dim()}  # a scalar of the CPU is let pass
        if len(devices) > 1 and name not in ("copy_", "_to_copy"):
            raise RuntimeError(f"{name} is given tensors of {sorted(devices)}")
        if name == "_pin_memory":  # fake tensors can't, nor can those of the GPU
            assert devices == {"cpu"}
            return arguments[0]
        if name == "_local_scalar_dense" and self.patient:
            return True
        result = function(*arguments, **(named or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            self.see(tensor)
            devices.add(tensor.device.type)
        if "cuda" in devices and not function.is_view and name not in NO_LAUNCH:
            self.launches[name] += 1
        if name == "gemm_4bit" and arguments[0].numel() // arguments[0].shape[-1] > 512:
            self.launches["dequantization"] += 3  # the scales' scales, their offset, the weights
        return result


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """As torch chooses: flash attention without a mask in 16 bits, else memory-efficient."""
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def convert(module: torch.nn.Module, function) -> torch.nn.Module:
    """Module._apply, for PEFT's layers: torch's fails for fake tensors that are referred to."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            made = torch.nn.Parameter(function(weight.detach()), weight.requires_grad)
            setattr(part, name, made)
    return module


@contextlib.contextmanager
def fake_gpu() -> Iterator[Counted]:
    """Within, tensors are fake, and what the GPU does is counted."""
    code, counted = bitsandbytes.functional.create_dynamic_map(), Counted()
    with (mock.patch.dict(bitsandbytes.functional.name2qmap, dynamic=code),
          mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
          mock.patch.object(torch.nn.Module, "_apply", convert),
          mock.patch.object(FakeTensor, "tolist", lambda tensor: counted.read(tensor)),
          FakeTensorMode(allow_non_fake_inputs=True), counted):
        yield counted


def quantize(linear: torch.nn.Linear) -> None:
    """Makes of the layer what bitsandbytes does: NF4 with double quantization."""
    linear.__class__ = bitsandbytes.nn.Linear4bit
    linear.compute_dtype, linear.compute_type_is_set = linear.weight.dtype, True
    data, state = bitsandbytes.functional.quantize_4bit(
        linear.weight, compress_statistics=True, quant_type="nf4")
    linear.weight = torch.nn.Parameter(data, requires_grad=False)
    vars(linear.weight).update(quant_state=state, compress_statistics=True, quant_type="nf4")


def build(config: Blip2Config, dtype: torch.dtype, in_4bit: bool) -> Blip2ForConditionalGeneration:
    """The frozen model, as finetune.load_captioner leaves it."""
    with no_init_weights(), torch.device("cuda"):
        model = Blip2ForConditionalGeneration._from_config(config, dtype=dtype)
    model.eval().requires_grad_(False).tie_weights()
    model.is_loaded_in_4bit, language = in_4bit, model.language_model
    if config.text_config.model_type == "t5":  # a Flan-T5's is not that of its embedding
        language.lm_head.weight = torch.nn.Parameter(language.lm_head.weight.clone(), False)
    for name, module in language.named_modules() if in_4bit else ():
        if type(module) is torch.nn.Linear and not name.endswith(("lm_head", ".wo")):
            quantize(module)  # transformers keeps T5's wo whole
    if dtype == torch.float16:  # and these in float32
        for weight in (model.query_tokens, *model.qformer.parameters()):
            weight.data = weight.data.float()
    return model


class DryRun:
    """A model on the GPU that is not there, and what a run does with it."""

    def __init__(self, counted: Counted, config: Blip2Config, in_4bit: bool,
                 dtype: torch.dtype = torch.bfloat16, *flags: str) -> None:  # fmt: skip
        self.counted, self.config, self.settings = counted, config, finetune.parse_arguments(flags)
        self.captioner = finetune.Captioner(
            build(config, dtype, in_4bit), Blip2Processor.from_pretrained(HERE / "tiny_blip2"),
            self.settings.PROMPT, self.settings.MAX_CAPTION_TOKENS, self.settings.NUM_BEAMS)

    def encode(self) -> torch.Tensor:
        """The features of a batch of pictures."""
        self.counted.start()
        side = self.config.vision_config.image_size
        pixel_values = np.zeros((3, side, side), np.float32)
        return self.captioner.encode([pixel_values] * finetune.INFERENCE_BATCH)

    def caption(self, features: torch.Tensor) -> None:
        """generate, which ends after its first pass: every question to the GPU is answered yes."""
        self.counted.start()
        self.counted.patient = True
        self.captioner.caption(features)
        self.counted.patient = False
        assert self.counted.launches["argmax"] == 1

    def learn(self) -> None:
        """LoRA in the place of the vision side; a step, for AdamW to have its state."""
        model, settings = self.captioner.model, self.settings
        model.vision_model, model.qformer = torch.nn.Identity(), torch.nn.Identity()
        with contextlib.redirect_stdout(None):
            adapter = finetune.add_lora(model, settings.LORA_TARGETS, settings.LORA_RANK,
                                        settings.LORA_ALPHA, settings.LORA_DROPOUT)
        self.learner = finetune.Learner(self.captioner, adapter, settings.WEIGHT_DECAY)
        self.step(self.backward(2, 24))

    def backward(self, pairs: int, tokens: int) -> torch.Tensor:
        """Forward and backward of one micro-batch of equally long captions."""
        shape = self.config.num_query_tokens, self.config.qformer_config.hidden_size
        features = torch.zeros(shape, dtype=self.captioner.dtype)
        rows = [finetune.Row(features, [5] * (tokens + 1))] * pairs
        self.counted.start()
        # transformers asks a mask whether it masks anything, and waits, but not a fake one.
        with mock.patch("transformers.utils.import_utils.is_fake_tensor", lambda _: False):
            return self.learner.backward(rows, pairs * (tokens + 1), pairs)

    def step(self, losses: torch.Tensor) -> None:
        """The rest of an optimizer step."""
        self.counted.start()
        *_, norm = self.learner.add_up(losses, len(losses), False)
        self.learner.step(1e-4, norm, 1.0)


def rehearse(folder: str) -> None:
    """All that a run does, with this model: a line for each dtype and quantization."""
    config = Blip2Config.from_pretrained(folder)
    for dtype, in_4bit in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)):
        with fake_gpu() as counted:
            dry_run = DryRun(counted, config, in_4bit, dtype, "--lora-targets", "all-linear")
            dry_run.caption(dry_run.encode())
            counted.reads = 0
            dry_run.learn()
            print(f"{config.text_config.model_type} {dtype} {'4 bits' * in_4bit}: reads in a step: "
                  f"{counted.reads}")


def table() -> None:
    """The memory of the published models, and the smallest of the usual cards."""
    print("| model | bits | encoding | step, 1 pair | step, 16 pairs | step, 16 pairs of 64 tokens "
          "| runs on | 16 pairs at once on |\n|---|---|---|---|---|---|---|---|")
    for name, text in PUBLISHED.items():
        for in_4bit in (True, False):
            with fake_gpu() as counted:
                dry_run = DryRun(counted, Blip2Config(text_config=text), in_4bit)
                dry_run.encode()
                peaks = [counted.peak / 2**30]
                dry_run.learn()
                for pairs, tokens in ((1, 24), (16, 24), (16, 64)):
                    dry_run.backward(pairs, tokens)
                    peaks.append(counted.peak / 2**30)
            cards = [next((f"{size} GB" for size in (6, 8, 12, 16, 24) if need + 1 <= size), "more")
                     for need in (max(peaks[:2]), max(peaks[:3]))]
            cells = ["blip2-" + name.replace("t5", "flan-t5"), "4" if in_4bit else "16",
                     *(f"{peak:.1f}" for peak in peaks), *cards]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="opt-2.7b", choices=PUBLISHED)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="of each caption, without its stop")
    parser.add_argument("--no-4bit", action="store_true")
    parser.add_argument("--table", action="store_true", help="the memory table instead")
    arguments = parser.parse_args()
    if arguments.table:
        return table()
    with fake_gpu() as counted:
        config = Blip2Config(text_config=PUBLISHED[arguments.model])
        dry_run = DryRun(counted, config, not arguments.no_4bit)
        dry_run.learn()
        losses = dry_run.backward(arguments.pairs, arguments.tokens)
        print(f"launches {counted.launches.total()}, peak {counted.peak / 2**30:.2f} GiB")
        counted.reads = 0
        dry_run.step(losses)
        print(f"sums, norm, AdamW, master to weights: launches {counted.launches.total()}, "
              f"of which {counted.reads} read is waited for")


if __name__ == "__main__":
    main()
