"""A training step of the published sizes on a GPU that is not there: its launches and its memory.

    python tests/gpu_dry_run.py --model opt-2.7b --pairs 16 --tokens 24 [--no-4bit]
    python tests/gpu_dry_run.py --table
    python tests/gpu_dry_run.py --try FOLDER ...     all that a run does, with these models

Fake tensors have shapes, dtypes and a device, and no values. finetune.py's own Captioner and
Learner run on them, so that what is counted is what runs: every operation of torch that is no view
is a kernel launch, and what is alive is memory. A synchronization raises, for there is no value to
wait for, but for the reads of whole tensors, which are counted; so does an operation of the GPU
that is given a tensor of the CPU. Of what is computed, two things are made by hand: attention,
which torch would choose by asking the GPU, and the 4-bit layers; conversion of modules, pinning and
reading only because fake tensors can't. A C++ compiler is needed: torch's CPU build knows no CUDA
device, and is given one that does nothing.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;
struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override {
    return Stream(Stream::DEFAULT, getDevice());
  }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
static int install = [] {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard());
  return 0;
}();
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}
"""


def load_guard() -> None:
    """Gives the CPU build of torch, before it is imported, a CUDA device that does nothing."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        sys.exit("needs a C++ compiler: g++ or clang++")
    torch_dir = importlib.util.find_spec("torch").submodule_search_locations[0]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        subprocess.run(
            [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch_dir}/include",
             str(source), "-o", str(library), f"-L{torch_dir}/lib", f"-Wl,-rpath,{torch_dir}/lib",
             "-ltorch_cpu", "-lc10"], check=True)
        ctypes.CDLL(str(library))


load_guard()
import bitsandbytes  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bitsandbytes.functional import QuantState  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import (  # noqa: E402
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
)
from transformers.initialization import no_init_weights  # noqa: E402

import finetune  # noqa: E402

VIEWS = set(  # operations that launch nothing
    "view t transpose expand detach alias as_strided unsqueeze squeeze slice select split "
    "split_with_sizes permute _unsafe_view unbind view_as lift_fresh _reshape_alias empty "
    "empty_like empty_strided new_empty new_empty_strided is_same_size set_ unfold resize_ "
    "diagonal chunk detach_ is_pinned device".split())
ROWS = 512  # with more, bitsandbytes' product is a dequantization and a product
MARKS = {"quant_state", "compress_statistics", "quant_type", "bnb_quantized"}  # of a 4-bit weight


class Counted(TorchDispatchMode):
    """Counts launches by kind, and the memory that is alive on the GPU, in blocks of 512 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0
        self.launches, self.reads, self.patient = Counter(), 0, False

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "cuda" and key not in self.live:
            self.live[key] = -(-storage.nbytes() // 512) * 512
            self.now += self.live[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function._schema.name.split("::")[1]
        given = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
        if name == "_pin_memory":  # fake tensors can't, nor can those of the GPU
            assert arguments[0].device.type == "cpu"
            return arguments[0]
        devices = {x.device.type for x in given if x.dim()}  # a scalar of the CPU is no copy
        if len(devices) > 1 and name not in ("copy_", "_to_copy"):
            raise RuntimeError(f"{name} is given tensors of {sorted(devices)}")
        if name == "_local_scalar_dense" and self.patient:
            return True
        result = function(*arguments, **(named or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            self.see(tensor)
            devices.add(tensor.device.type)
        if "cuda" in devices and name not in VIEWS:
            self.launches[name] += 1
        if name == "gemm_4bit" and arguments[0].numel() // arguments[0].shape[-1] > ROWS:
            self.launches["of gemm_4bit"] += 3  # the scales' scales, their offset, the weights
        return result

    def read(self, tensor: torch.Tensor) -> list:
        """In the place of Tensor.tolist: the GPU is waited for."""
        self.reads += tensor.device.type == "cuda"
        return np.ones(tuple(tensor.shape), float if tensor.is_floating_point() else int).tolist()

    def start(self) -> None:
        """From now on."""
        gc.collect()
        self.launches.clear()
        self.peak = self.now

    def total(self) -> int:
        """Launches so far."""
        return sum(self.launches.values())


def convert(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """Module._apply, which has no way for fake tensors that somebody refers to."""
    for child in module.children() if recurse else ():
        convert(child, function)
    for name, weight in module._parameters.items():
        if weight is not None:
            made = torch.nn.Parameter(function(weight.detach()), weight.requires_grad)
            for mark in MARKS & weight.__dict__.keys():
                setattr(made, mark, getattr(weight, mark))
            module._parameters[name] = made
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):  # fmt: skip
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


def quantized(linear: torch.nn.Linear, dtype: torch.dtype) -> bitsandbytes.nn.Linear4bit:
    """The layer in NF4 with double quantization, as bitsandbytes leaves it."""
    made = bitsandbytes.nn.Linear4bit.__new__(bitsandbytes.nn.Linear4bit)
    torch.nn.Module.__init__(made)
    blocks = -(-linear.weight.numel() // 64)
    scales = QuantState(absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256),
                        blocksize=256, dtype=torch.float32)
    state = QuantState(absmax=torch.empty(blocks, dtype=torch.uint8), shape=linear.weight.shape,
                       code=torch.empty(16), blocksize=64, quant_type="nf4", dtype=dtype,
                       offset=torch.empty(()), state2=scales)
    data = torch.empty((linear.weight.numel() // 2, 1), dtype=torch.uint8)
    made.weight = torch.nn.Parameter(data, requires_grad=False)
    for name, value in {"quant_state": state, "compress_statistics": True, "quant_type": "nf4",
                        "bnb_quantized": True}.items():  # fmt: skip
        setattr(made.weight, name, value)
    made.in_features, made.out_features, made.bias = (
        linear.in_features, linear.out_features, linear.bias)
    made.compute_dtype, made.compute_type_is_set = dtype, True
    made.quant_state, made.quant_storage = state, torch.uint8
    made.support_avx512bf16_for_cpu = False
    return made


def published(name: str) -> Blip2Config:
    """The configuration of a BLIP-2 on the Hub."""
    kind, size = name.split("-")
    if kind == "opt":
        width = {"2.7b": 2560, "6.7b": 4096}[size]
        text = {"model_type": "opt", "hidden_size": width, "word_embed_proj_dim": width,
                "ffn_dim": 4 * width, "num_hidden_layers": 32, "num_attention_heads": 32,
                "vocab_size": 50304, "eos_token_id": 50118}  # fmt: skip
        return Blip2Config(text_config=text, num_query_tokens=32, image_token_index=50265)
    width, inner, heads = {"xl": (2048, 5120, 32), "xxl": (4096, 10240, 64)}[size]
    text = {"model_type": "t5", "d_model": width, "d_kv": 64, "d_ff": inner, "num_layers": 24,
            "num_decoder_layers": 24, "num_heads": heads, "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "eos_token_id": 1,
            "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip
    return Blip2Config(text_config=text, num_query_tokens=32, image_token_index=32100)


def build(config: Blip2Config, dtype: torch.dtype, in_4bit: bool) -> Blip2ForConditionalGeneration:
    """The frozen model, as finetune.load_captioner leaves it."""
    torch.set_default_dtype(dtype)
    with no_init_weights(), torch.device("cuda"):
        model = Blip2ForConditionalGeneration(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    language = model.language_model
    if in_4bit:
        model.is_loaded_in_4bit = True
        for name, module in list(language.named_modules()):  # transformers keeps T5's wo whole
            if type(module) is torch.nn.Linear and not name.endswith(("lm_head", ".wo")):
                with torch.device("cuda"):
                    language.set_submodule(name, quantized(module, dtype))
    if config.text_config.model_type == "opt":
        language.lm_head.weight = language.model.decoder.embed_tokens.weight
    else:
        shared = language.shared.weight
        language.encoder.embed_tokens.weight = language.decoder.embed_tokens.weight = shared
    if dtype == torch.float16:  # as transformers does
        model.qformer.float()
        model.query_tokens.data = model.query_tokens.data.float()
    return model


@contextlib.contextmanager
def fake_gpu() -> Iterator[Counted]:
    """Within, tensors are fake, and what the GPU does is counted."""
    counted, functional = Counted(), torch.nn.functional
    with (mock.patch.object(functional, "scaled_dot_product_attention", attention),
          mock.patch.object(torch.nn.Module, "_apply", convert),
          mock.patch.object(FakeTensor, "tolist", lambda tensor: counted.read(tensor)),
          FakeTensorMode(allow_non_fake_inputs=True), counted):
        yield counted


class DryRun:
    """A model on the GPU that is not there, and what a run does with it."""

    def __init__(self, counted: Counted, config: Blip2Config, dtype: torch.dtype, in_4bit: bool,
                 **settings) -> None:  # fmt: skip
        processor = Blip2Processor.from_pretrained(HERE / "tiny_blip2")
        self.counted, self.settings = counted, finetune.parse_arguments([])
        vars(self.settings).update(settings)
        model = build(config, dtype, in_4bit)
        self.captioner = finetune.Captioner(model, processor, self.settings)
        self.shape = config.num_query_tokens, config.qformer_config.hidden_size
        self.side = config.vision_config.image_size

    def encode(self) -> torch.Tensor:
        """The features of a batch of pictures."""
        self.counted.start()
        pixel_values = np.zeros((3, self.side, self.side), np.float32)
        return self.captioner.encode([pixel_values] * finetune.INFERENCE_BATCH)

    def learn(self) -> None:
        """LoRA in the place of the vision side."""
        model, settings = self.captioner.model, self.settings
        model.vision_model, model.qformer = torch.nn.Identity(), torch.nn.Identity()
        with contextlib.redirect_stdout(io.StringIO()):
            adapter = finetune.add_lora(model, settings.LORA_TARGETS, settings.LORA_RANK,
                                        settings.LORA_ALPHA, settings.LORA_DROPOUT)
        self.learner = finetune.Learner(self.captioner, adapter, settings.WEIGHT_DECAY)

    def backward(self, pairs: int, tokens: int) -> torch.Tensor:
        """Forward and backward of one micro-batch of equally long captions."""
        features = torch.zeros(self.shape, dtype=self.captioner.dtype)
        rows = [finetune.Row(features, [5] * (tokens + 1)) for _ in range(pairs)]
        self.counted.start()
        return self.learner.backward(rows, pairs * (tokens + 1), pairs)

    def step(self, losses: torch.Tensor) -> None:
        """The rest of an optimizer step."""
        self.counted.start()
        *_, norm = self.learner.add_up(losses, len(losses), False)
        self.learner.step(1e-4, norm, 1.0)

    def caption(self, features: torch.Tensor) -> None:
        """generate, which ends after its first pass: every question to the GPU is answered yes."""
        self.counted.start()
        self.counted.patient = True
        self.captioner.caption(features)
        self.counted.patient = False
        assert self.counted.launches["argmax"] == 1


def try_all(folder: str) -> None:
    """A line for each dtype and quantization."""
    config = Blip2Config.from_pretrained(folder)
    for dtype, in_4bit in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)):
        with fake_gpu() as counted:
            dry_run = DryRun(counted, config, dtype, in_4bit, LORA_TARGETS="all-linear")
            dry_run.caption(dry_run.encode())
            dry_run.learn()
            counted.reads = 0
            dry_run.step(dry_run.backward(3, 5))
            print(f"{config.text_config.model_type} {dtype} {'4 bits' * in_4bit}: reads in a step: "
                  f"{counted.reads}")


def table() -> None:
    """The memory of the published models, and the smallest of the usual cards."""
    print("| GiB | bits | encoding | 1 pair | 16 pairs | 16 of 64 tokens | runs on | 16 at once |\n"
          "|---|---|---|---|---|---|---|---|")
    for name in ("opt-2.7b", "opt-6.7b", "t5-xl", "t5-xxl"):
        for in_4bit in (True, False):
            with fake_gpu() as counted:
                dry_run = DryRun(counted, published(name), torch.bfloat16, in_4bit)
                dry_run.encode()
                peaks = [counted.peak]
                dry_run.learn()
                dry_run.step(dry_run.backward(1, 24))  # AdamW has its state from now on
                for pairs, tokens in ((1, 24), (16, 24), (16, 64)):
                    dry_run.backward(pairs, tokens)
                    peaks.append(counted.peak)
            peaks = [peak / 2**30 for peak in peaks]
            cards = [next((f"{size} GB" for size in (6, 8, 12, 16, 24) if need + 1 <= size), "more")
                     for need in (max(peaks[:2]), max(peaks[:3]))]
            cells = [name, "4" if in_4bit else "16", *(f"{peak:.1f}" for peak in peaks), *cards]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="opt-2.7b", help="opt-2.7b, opt-6.7b, t5-xl, t5-xxl")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="of each caption, without its stop")
    parser.add_argument("--no-4bit", action="store_true")
    parser.add_argument("--kinds", action="store_true", help="launches of a step by kind")
    parser.add_argument("--try", nargs="+", dest="folders", metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="the memory table instead")
    arguments = parser.parse_args()
    if arguments.folders:
        for folder in arguments.folders:
            try_all(folder)
        return None
    if arguments.table:
        return table()
    with fake_gpu() as counted:
        dry_run = DryRun(counted, published(arguments.model), torch.bfloat16, not arguments.no_4bit)
        dry_run.encode()
        print(f"encoding {finetune.INFERENCE_BATCH} pictures: launches {counted.total()}, "
              f"peak {counted.peak / 2**30:.2f} GiB")
        dry_run.learn()
        dry_run.step(dry_run.backward(1, 24))  # AdamW has its state from now on
        losses = dry_run.backward(arguments.pairs, arguments.tokens)
        print(f"launches {counted.total()}, peak {counted.peak / 2**30:.2f} GiB")
        if arguments.kinds:
            for name, count in counted.launches.most_common():
                print(f"{count:6} {name}")
        counted.reads = 0
        dry_run.step(losses)
        print(f"sums, norm, AdamW, master to weights: launches {counted.total()}, of which "
              f"{counted.reads} read is waited for")


if __name__ == "__main__":
    main()
