"""Machines that are not this one: GPUs, Windows and macOS, small containers."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import flags_of

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

    with pytest.raises(finetune.UserError, match="'cuda:1', but each process takes a GPU"):
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


@pytest.mark.parametrize("device, is_t5", [("auto", True), ("cpu", False)])
def test_float16_is_refused_for_t5_and_on_the_cpu(device, is_t5, machine):
    machine((8, 0))

    with pytest.raises(finetune.UserError, match="float16 is for OPT on a GPU"):
        finetune.choose_device(device, "float16", is_t5, 1)


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
