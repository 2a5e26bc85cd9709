"""Machines that are not this one: GPUs, Windows and macOS, small containers."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gpu_first_minutes
import gpu_parts
import pytest
import torch
from helpers import flags_of, write_several
from transformers import Blip2ForConditionalGeneration

import finetune

HERE = Path(__file__).resolve().parent
MAX_CPU_PARAMETERS = 500_000_000  # a larger model runs on the CPU only when told to
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # PyPI's


# ---- The code for a GPU, on one that is not there -----------------------------------------------

REHEARSE = """
import sys

import gpu_dry_run
import pytest
import torch

# The fake GPU refuses what a real one does, or waits for.
with gpu_dry_run.fake_gpu():
    with pytest.raises(Exception, match="given tensors of"):
        torch.ones(3, device="cuda") + torch.ones(3)
with gpu_dry_run.fake_gpu():
    with pytest.raises(Exception, match="local_scalar_dense"):
        bool(torch.ones(3, device="cuda").all())

for folder in sys.argv[1:]:
    gpu_dry_run.rehearse(folder)
print("parts of a run:", gpu_dry_run.list_parts(gpu_dry_run.MEDIUM))
"""
has_compiler = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(not has_compiler, reason="no C++ compiler")
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch can't be given a fake GPU")
def test_on_a_gpu_a_step_waits_once_and_mixes_no_devices(opt_base, t5_base):
    """Encoding, captioning and a step on a fake GPU; it raises where anything is wrong."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REHEARSE, opt_base, t5_base],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "reads in a step" in line]
    assert lines == [
        "opt torch.bfloat16 4 bits: reads in a step: 1",
        "opt torch.bfloat16 : reads in a step: 1",
        "opt torch.float16 : reads in a step: 1",
        "t5 torch.bfloat16 4 bits: reads in a step: 1",
        "t5 torch.bfloat16 : reads in a step: 1",
        "t5 torch.float16 : reads in a step: 1",
    ]
    # What test_gpu.py compares with a GPU that is there.
    assert f"parts of a run: {gpu_parts.DRY_RUN['medium']}" in done.stdout


def test_what_is_measured_on_a_gpu_runs_on_the_cpu_too(opt_base):
    """Its memory is not known there, but no part of it must fail on a GPU for a slip."""
    parts = gpu_parts.measure_parts(opt_base, "--device", "cpu")

    assert parts.keys() == gpu_parts.DRY_RUN["real"].keys()
    assert min(part.seconds for part in parts.values()) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_first_minutes_of_a_gpu_need_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_first_minutes.py", str(tmp_path / "model")])

    assert gpu_first_minutes.main() == 1

    assert capsys.readouterr().out == (
        "error: PyTorch finds no GPU on this machine, and nothing else is tried here.\n"
    )
    assert not (tmp_path / "model").exists()


# ---- Which device, and which dtype --------------------------------------------------------------


@pytest.mark.parametrize(
    "architectures, capabilities",
    [
        (ARCHITECTURES, [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]),
        (["sm_86"], [(8, 6), (8, 9)]),
        (["compute_80"], [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]),
    ],
)
def test_which_gpus_a_pytorch_has_kernels_for(architectures, capabilities):
    known = []
    for capability in [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]:
        if finetune.has_kernels(*capability, architectures):
            known.append(capability)

    assert known == capabilities


@pytest.fixture
def machine(monkeypatch):
    """machine(capability, name): a machine with such GPUs, or, without a capability, with none.

    The tests run in the first of `processes` processes, or in the one with another `rank`.
    """

    def make(
        capability: tuple[int, int] | None = None,
        name: str = "a GPU",
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        def get_capability(index: int) -> tuple[int, int]:
            if capability is None:
                raise RuntimeError("no driver")
            return capability

        monkeypatch.setattr("torch.cuda.get_device_capability", get_capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda index: name)
        monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ARCHITECTURES)
        gpu = torch.device("cuda", rank)
        state = SimpleNamespace(num_processes=processes, device=gpu)
        monkeypatch.setattr(finetune, "PartialState", lambda *_, **__: state)

    return make


def test_a_gpu_without_kernels_is_refused_before_loading(opt_base, small_data, command, machine):
    machine((7, 0), name="Tesla V100")

    code, output, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base, DEVICE="auto")

    assert code == 1
    assert "Tesla V100" in error
    assert "sm_75" in error
    assert "Install" in error
    assert "memory:" not in output


def test_one_gpu_for_several_processes_is_refused(machine):
    """Each takes a GPU of its own: with cuda:1 all would load their models into the same one."""
    machine((8, 0), processes=2)

    with pytest.raises(finetune.UserError, match="'cuda:1', but each process uses its own GPU"):
        finetune.choose_device("cuda:1", "auto", False, 1)


@pytest.mark.parametrize(
    "device, dtype, is_t5, capability, expected",
    [
        ("auto", "auto", False, (8, 0), ("cuda:3", "torch.bfloat16")),
        ("auto", "auto", False, (7, 5), ("cuda:3", "torch.float16")),
        ("auto", "auto", True, (7, 5), ("cuda:3", "torch.float32")),
        ("cuda:1", "float16", False, (9, 0), ("cuda:1", "torch.float16")),
        ("cpu", "auto", False, (8, 0), ("cpu", "torch.float32")),
    ],
)
def test_device_and_dtype_where_there_are_gpus(device, dtype, is_t5, capability, expected, machine):
    """In the fourth process of the machine."""
    machine(capability, rank=3)

    found = finetune.choose_device(device, dtype, is_t5, parameters=10**10)

    assert (str(found[0]), str(found[1])) == expected


def test_the_gpu_that_accelerate_has_chosen_is_used(machine, monkeypatch):
    """As under SLURM, where each of four processes sees a single GPU, which is number 0 to it."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    machine((8, 0), processes=4, rank=0)

    assert finetune.choose_device("auto", "auto", False, 1).device == torch.device("cuda:0")


def test_on_one_gpu_no_context_is_opened_on_another(machine, small_data, opt_base, monkeypatch):
    """Pinned memory belongs to the current GPU, which is the first one where none is set."""
    machine((8, 0))
    current = []

    def fail(*arguments, **options):
        assert current == [torch.device("cuda:1")]
        raise RuntimeError("so far, and no further")

    monkeypatch.setattr("torch.cuda.set_device", current.append)
    monkeypatch.setattr(Blip2ForConditionalGeneration, "from_pretrained", fail)
    settings = finetune.parse_arguments(
        flags_of({"TRAIN_DIR": small_data, "MODEL_ID": opt_base, "DEVICE": "cuda:1"})
    )

    with pytest.raises(RuntimeError, match="so far"):
        finetune.load_model(settings)


def test_without_a_gpu_a_small_model_runs_on_the_cpu(machine):
    machine(capability=None)

    device, dtype, reason = finetune.choose_device("auto", "auto", False, MAX_CPU_PARAMETERS)

    assert (str(device), str(dtype)) == ("cpu", "torch.float32")
    assert "no driver" in reason


@pytest.mark.parametrize("device, parameters", [("auto", MAX_CPU_PARAMETERS + 1), ("cuda", 1)])
def test_without_a_gpu_a_large_model_or_cuda_is_refused(device, parameters, machine):
    machine(capability=None)

    with pytest.raises(finetune.UserError, match="no driver.*--device cpu"):
        finetune.choose_device(device, "auto", False, parameters)


@pytest.mark.parametrize(
    "reason, count, words",
    [
        ("Invalid device id", 1, "but there is only cuda:0 ("),
        ("Invalid device id", 2, "but there is only cuda:0 to cuda:1 ("),
        ("CUDA unknown error", 8, "See what nvidia-smi shows"),
        ("No CUDA GPUs are available", 0, "CUDA_VISIBLE_DEVICES"),
        ("Found no NVIDIA driver on your system", 0, "Install NVIDIA's driver"),
        ("The NVIDIA driver on your system is too old", 1, 'pip install "torch<2.11"'),
    ],
)
def test_the_remedy_fits_the_reason_why_a_gpu_can_not_be_used(
    machine, monkeypatch, reason, count, words
):
    """With a PyTorch that is made for CUDA."""

    def fail(index: int) -> None:
        raise AssertionError(reason)

    machine((8, 0))
    monkeypatch.setattr("torch.cuda.get_device_capability", fail)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.version.cuda", "13.0")

    with pytest.raises(finetune.UserError) as refused:
        finetune.choose_device("cuda:5", "auto", False, 1)

    assert reason in str(refused.value)
    assert words in str(refused.value)
    assert "Install a PyTorch" not in str(refused.value)


@pytest.mark.parametrize("device, is_t5", [("auto", True), ("cpu", False)])
def test_float16_is_refused_for_t5_and_on_the_cpu(device, is_t5, machine):
    machine((8, 0))

    with pytest.raises(finetune.UserError, match="float16 works only for OPT on a GPU"):
        finetune.choose_device(device, "float16", is_t5, 1)


# ---- Loading that fails on the machine, and not for the model -----------------------------------

DEBUG_HINTS = (  # what PyTorch adds to errors of CUDA
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version."
)
OTHER_PYTORCH = 'pip install "torch<2.11"'
OTHER_BITSANDBYTES = "pip install --upgrade bitsandbytes"


class LoadingFailure(NamedTuple):
    """What a library raises while a model is loaded, and the command that helps, if any does."""

    name: str
    error: Exception
    remedy: str = ""


LOADING_FAILURES = [
    LoadingFailure(
        "CUDA", RuntimeError(f"CUDA error: an illegal memory access was encountered{DEBUG_HINTS}")
    ),
    LoadingFailure("CUDA is unknown", RuntimeError("CUDA error: unknown error")),
    LoadingFailure(
        "cuBLAS",
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(handle)`"),
    ),
    LoadingFailure("driver is too old", RuntimeError(OLD_DRIVER), OTHER_PYTORCH),
    LoadingFailure(
        "driver is too old for the runtime",
        RuntimeError(
            "CUDA error: CUDA driver version is insufficient for CUDA runtime version" + DEBUG_HINTS
        ),
        OTHER_PYTORCH,
    ),
    LoadingFailure(
        "no kernel image",
        RuntimeError(
            "CUDA error: no kernel image is available for execution on the device" + DEBUG_HINTS
        ),
        OTHER_PYTORCH,
    ),
    LoadingFailure(
        "bitsandbytes without this CUDA",
        RuntimeError(
            "\nCUDA VERSION MISMATCH\nRequested CUDA version:          14.0\n"
            "Attempted to use bitsandbytes native library functionality but it's not available.\n"
        ),
        OTHER_BITSANDBYTES,
    ),
    LoadingFailure(
        "bitsandbytes for the CPU",
        RuntimeError(
            "Method 'cquantize_blockwise_bf16_nf4' not available in CPU-only version of "
            "bitsandbytes.\nReinstall with GPU support or use CUDA-enabled hardware."
        ),
        OTHER_BITSANDBYTES,
    ),
    LoadingFailure(
        "bitsandbytes whose library is missing",
        OSError("libbitsandbytes_cuda130.so: cannot open shared object file"),
        OTHER_BITSANDBYTES,
    ),
    LoadingFailure(
        "no bitsandbytes",
        ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes"),
        OTHER_BITSANDBYTES,
    ),
    LoadingFailure(
        "a call that was deferred",
        torch.cuda.DeferredCudaCallError(
            "CUDA call failed lazily at initialization with error: device >= 0 && device < "
            "num_gpus INTERNAL ASSERT FAILED\n\nCUDA call was originally invoked at:\n\n  File"
        ),
    ),
]


@pytest.fixture
def hub_model(opt_base, monkeypatch) -> str:
    """The name of a model on the Hub, whose config and tokenizer can be read.

    Only such a name is looked up, so that only then a word about the network could be said.
    """
    real_config = finetune.read_config
    real_processor = finetune.read_processor
    monkeypatch.setattr(finetune, "read_config", lambda name: real_config(opt_base))
    monkeypatch.setattr(
        finetune, "read_processor", lambda name, config: real_processor(opt_base, config)
    )
    return "Salesforce/blip2-opt-2.7b"


def assert_own_words(sentence: str, failure: LoadingFailure) -> None:
    """One sentence with all that the library said, the remedy, and nothing about the Hub."""
    assert sentence.startswith("error: can't load MODEL_ID")
    assert sentence.count("\n") == 1
    assert " ".join(str(failure.error).split()).rstrip(".") in sentence
    assert failure.remedy in sentence
    for remedy in (OTHER_PYTORCH, OTHER_BITSANDBYTES):
        assert remedy in failure.remedy or remedy not in sentence
    for word in ("network", "login", "hf auth", "Hub", "no such folder"):
        assert word not in sentence


@pytest.mark.parametrize("failure", LOADING_FAILURES, ids=lambda failure: failure.name)
def test_a_failure_while_loading_keeps_its_own_words(
    refused, small_data, hub_model, monkeypatch, failure
):
    def fail(*arguments, **named):
        raise failure.error

    monkeypatch.setattr(Blip2ForConditionalGeneration, "from_pretrained", fail)

    sentence = refused(TRAIN_DIR=small_data, MODEL_ID=hub_model)

    assert_own_words(sentence, failure)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, sample, opt_base) -> Path:
    """The OUTPUT_DIR of a run on two pictures."""
    folder = tmp_path_factory.mktemp("adapter")
    flags = flags_of(
        {
            "TRAIN_DIR": write_several(folder / "data", sample, 2),
            "MODEL_ID": opt_base,
            "OUTPUT_DIR": folder / "out",
            "EPOCHS": 1,
        }
    )
    assert finetune.main(flags) == 0
    return folder / "out"


@pytest.mark.parametrize("failure", LOADING_FAILURES, ids=lambda failure: failure.name)
def test_a_failure_while_loading_for_captions_keeps_its_own_words(
    command, adapter, sample, hub_model, monkeypatch, failure
):
    """The base is on the Hub, as that of most adapters."""
    path = adapter / "settings.json"
    record = json.loads(path.read_text())
    record["settings"]["MODEL_ID"] = hub_model
    path.write_text(json.dumps(record))

    def fail(*arguments, **named):
        raise failure.error

    monkeypatch.setattr(Blip2ForConditionalGeneration, "from_pretrained", fail)

    code, output, error = command("--caption", str(sample / "Image"), OUTPUT_DIR=adapter)

    assert code == 1
    assert output == ""
    assert_own_words(error[error.index("error: ") :], failure)


def test_a_gpu_that_fails_when_it_is_asked_keeps_its_own_words(
    refused, small_data, hub_model, monkeypatch
):
    """Here it is PyTorch's question about the GPU that fails, before anything is loaded."""
    failure = LOADING_FAILURES[-1]
    assert isinstance(failure.error, torch.cuda.DeferredCudaCallError)

    def fail(index: int):
        raise failure.error

    monkeypatch.setattr("torch.cuda.get_device_capability", fail)

    sentence = refused(TRAIN_DIR=small_data, MODEL_ID=hub_model, DEVICE="cuda")

    assert_own_words(sentence, failure)


def test_a_gpu_whose_driver_is_too_old_is_refused_with_the_command_that_helps(
    refused, small_data, hub_model, monkeypatch
):
    def fail(index: int):
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr("torch.cuda.get_device_capability", fail)

    sentence = refused(TRAIN_DIR=small_data, MODEL_ID=hub_model, DEVICE="cuda")

    assert OLD_DRIVER.rstrip(".") in sentence
    assert OTHER_PYTORCH in sentence
    assert "--device cpu" in sentence
    assert "network" not in sentence
    assert "login" not in sentence


# ---- Other systems ------------------------------------------------------------------------------

CHECK_AND_TRAIN_ON_ANOTHER_SYSTEM = """
import multiprocessing
import os
import pathlib
import sys

for name in ("fork", "sync", "sched_getaffinity"):
    delattr(os, name)
pathlib.Path.is_mount = None  # raises on Windows before Python 3.12
sys.modules["fcntl"] = None
multiprocessing.set_start_method("spawn")

import finetune

try:
    finetune.main(["--help"])
except SystemExit as done:
    assert done.code == 0
flags = sys.argv[1:]
code = finetune.main([*flags, "--check"])
if code == 0:
    code = finetune.main(flags)
sys.exit(code)
"""


def test_help_check_and_training_need_nothing_that_only_linux_has(opt_base, small_data, tmp_path):
    """Without fork, fcntl and the like, and, where namespaces allow it, without /dev/shm."""
    flags = flags_of(
        {
            "TRAIN_DIR": small_data,
            "MODEL_ID": opt_base,
            "OUTPUT_DIR": tmp_path / "out",
            "DEVICE": "cpu",
            "EPOCHS": 1,
            "NUM_WORKERS": 4,
        }
    )
    hide_shm = 'mount -t tmpfs -o size=4k none /dev/shm && exec "$@"'
    without_shm = ["unshare", "-rm", "sh", "-c", hide_shm, "sh"]
    if not shutil.which("unshare") or subprocess.run([*without_shm, "true"]).returncode != 0:
        warnings.warn("no namespaces here: /dev/shm stays", stacklevel=1)
        without_shm = []  # what else is shown here does not depend on it

    done = subprocess.run(
        [*without_shm, sys.executable, "-c", CHECK_AND_TRAIN_ON_ANOTHER_SYSTEM, *flags],
        cwd=HERE.parent,
        timeout=200,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert "python finetune.py --check" in done.stdout
    assert re.search(r"^pairs: 12$", done.stdout, re.M)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
