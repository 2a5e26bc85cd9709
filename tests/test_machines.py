"""Machines that are not this one: GPUs, Windows and macOS, small containers."""

import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import flags_of

import finetune

HERE = Path(__file__).resolve().parent
ARCHITECTURES = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120".split()  # the registry's wheels

FAKE_GPU = """
import gpu_dry_run, sys, torch, pytest
with gpu_dry_run.fake_gpu(), pytest.raises(Exception, match="given tensors of"):
    torch.ones(3, device="cuda") + torch.ones(3)
with gpu_dry_run.fake_gpu(), pytest.raises(Exception, match="local_scalar_dense"):
    bool(torch.ones(3, device="cuda").all())
for folder in sys.argv[1:]:
    gpu_dry_run.rehearse(folder)
"""


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_cuda_path_waits_once_in_a_step_and_mixes_no_devices(opt_base, t5_base):
    """Encoding, captioning and a step on a fake GPU; it raises for whatever is not right."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FAKE_GPU, opt_base, t5_base],
                          cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^(\w+) torch\.(\w+) (4 bits)?: reads in a step: 1$", done.stdout, re.M) == [
        (kind, dtype, bits) for kind in ("opt", "t5")
        for dtype, bits in (("bfloat16", "4 bits"), ("bfloat16", ""), ("float16", ""))]


def test_a_gpu_that_this_pytorch_has_nothing_for_is_known():
    gpus = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]
    assert [gpu for gpu in gpus if finetune.has_kernels(*gpu, ARCHITECTURES)] == gpus[1:]
    assert [gpu for gpu in gpus if finetune.has_kernels(*gpu, ["sm_86"])] == [(8, 6), (8, 9)]
    assert [gpu for gpu in gpus if finetune.has_kernels(*gpu, ["compute_80"])] == gpus[2:]


def test_such_a_gpu_is_refused_before_loading(opt_base, small_data, command, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ARCHITECTURES)
    code, output, error = command(TRAIN_DIR=small_data, MODEL_ID=opt_base)
    assert code == 1 and "Tesla V100" in error and "sm_75" in error and "Install" in error
    assert "memory:" not in output


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    """Each takes a GPU of its own: with cuda:1 all would load their models into the same one."""
    several = SimpleNamespace(num_processes=2, local_process_index=0)
    monkeypatch.setattr(finetune, "PartialState", lambda: several)
    with pytest.raises(finetune.UserError, match="'cuda:1', but each process takes a GPU"):
        finetune.choose_device("cuda:1", "auto", False, 1)


@pytest.mark.parametrize("device, dtype, is_t5, size, gpu, expected", [
    ("auto", "auto", False, 10**10, (8, 0), ("cuda:3", "bfloat16")),
    ("cuda:1", "float16", False, 10**10, (9, 0), ("cuda:1", "float16")),
    ("auto", "auto", False, 10**10, (7, 5), ("cuda:3", "float16")),
    ("auto", "auto", True, 10**10, (7, 5), ("cuda:3", "float32")),
    ("cpu", "auto", False, 10**10, (8, 0), ("cpu", "float32")),
    ("auto", "auto", False, 500_000_000, None, ("cpu", "float32")),
    ("auto", "auto", False, 500_000_001, None, "no driver.*--device cpu"),
    ("cuda", "auto", False, 1, None, "no driver.*--device cpu"),
    ("auto", "float16", True, 1, (8, 0), "float16 is for OPT on a GPU"),
    ("cpu", "float16", False, 1, (8, 0), "float16 is for OPT on a GPU"),
])  # fmt: skip
def test_device_and_dtype(device, dtype, is_t5, size, gpu, expected, monkeypatch):
    """In the fourth process of a machine; a capability, or no GPU at all."""
    capability = Mock(return_value=gpu, side_effect=None if gpu else RuntimeError("no driver"))
    monkeypatch.setattr("torch.cuda.get_device_capability", capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "a GPU")
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ARCHITECTURES)
    state = SimpleNamespace(num_processes=1, local_process_index=3)
    monkeypatch.setattr(finetune, "PartialState", lambda: state)
    refused = isinstance(expected, str)
    with pytest.raises(finetune.UserError, match=expected) if refused else nullcontext():
        where, kind, _ = finetune.choose_device(device, dtype, is_t5, size)
        assert (str(where), str(kind)) == (expected[0], f"torch.{expected[1]}")


ELSEWHERE = """
import multiprocessing, os, pathlib, sys
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
sys.exit(finetune.main(sys.argv[1:] + ["--check"]) or finetune.main(sys.argv[1:]))
"""


def test_help_check_and_training_need_nothing_that_only_linux_has(opt_base, small_data, tmp_path):
    """Without fork, fcntl and the like, and, where namespaces allow it, without /dev/shm."""
    settings = {"TRAIN_DIR": small_data, "MODEL_ID": opt_base, "EPOCHS": 1, "NUM_WORKERS": 4,
                "OUTPUT_DIR": tmp_path / "out"}
    without = ["unshare", "-rm", "sh", "-c",
               'mount -t tmpfs -o size=4k none /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*without, "true"]).returncode:
        warnings.warn("no namespaces here: /dev/shm stays", stacklevel=1)
        without = []  # what else is shown here does not depend on it
    done = subprocess.run([*without, sys.executable, "-c", ELSEWHERE, *flags_of(settings)],
                          cwd=HERE.parent, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python finetune.py --check" in done.stdout and "pairs: 12" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
