"""Signs finetune.py for a GPU, in some ten minutes: python tests/gpu_first_minutes.py FOLDER

Runs the tests that need a GPU, trains on the sample in each dtype, and trains a model of the size
of Salesforce/blip2-opt-2.7b, which is interrupted and continued. That model has random weights. It
is in FOLDER, or is made there, and takes 7.5 GB. Each of its parts is timed, and its memory is
compared with what tests/gpu_dry_run.py computed.

Prints a table to paste into the README, and which of its lines fall short. Needs what
requirements-dev.txt installs.
"""

import argparse
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "finetune.py"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gpu_parts import CAPTION_TOKENS, DRY_RUN, PAIRS, TOKENS, measure_parts  # noqa: E402
from make_real_size import write_model  # noqa: E402

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


class Line(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    wanted: str = ""
    falls_short: bool = False


def say(text: str) -> None:
    """To stderr: the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def run(*command: str) -> subprocess.CompletedProcess:
    """A command of Python from the project's folder; its stderr is shown."""
    say(f"$ python {' '.join(command)}")
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )


def describe_machine() -> list[Line]:
    """The GPU, its driver, and the packages."""
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    versions = {name: version(name) for name in PACKAGES}
    versions["torch"] = torch.__version__  # with its build, as in 2.13.0+cu130
    return [
        Line("GPU", f"{torch.cuda.get_device_name()}, {memory:.0f} GB, {major}.{minor}"),
        Line("driver", driver.strip() or "unknown"),
        Line("packages", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]


def run_marked_tests() -> Line:
    done = run("-m", "pytest", "-m", "gpu")
    last = done.stdout.strip().splitlines()[-1]
    return Line("tests marked gpu", last, "passed", falls_short=done.returncode != 0)


def train_on_sample(folder: Path, dtype: str, *flags: str) -> Line:
    """The tiny base learns the sample's captions."""
    output = folder / f"sample-{dtype}{''.join(flags)}"
    started = time.perf_counter()
    done = run(
        *(str(SCRIPT), "--model-id", "tests/tiny_blip2", "--output-dir", str(output)),
        *("--device", "cuda", "--dtype", dtype, "--learning-rate", "3e-3", *flags),
    )
    seconds = time.perf_counter() - started
    exact = 0.0
    if done.returncode == 0:
        results = json.loads((output / "settings.json").read_text())["results"]
        exact = results["exact"]["after"]
    what = f"sample, {dtype}, {'16 or 32 bits' if flags else '4 bits'}"
    return Line(what, f"{exact:.0%} exact, {seconds:.0f} s", "90%", falls_short=exact < 0.9)


def measure_real_size(model: str) -> list[Line]:
    """Time and memory of each part, in a process of its own, whose memory is only its own."""
    say("$ parts of a run at the real size")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        flags = ("--device", "cuda", "--dtype", "bfloat16")
        parts = pool.submit(measure_parts, model, *flags).result()
    whats = {
        "load": "loading",
        "encode": f"encoding {PAIRS} pictures",
        "step": f"a step of {PAIRS} pairs of {TOKENS} tokens",
        "caption": f"captioning {PAIRS} pictures, {CAPTION_TOKENS} tokens each",
    }
    lines = []
    for name, what in whats.items():
        part = parts[name]
        computed = DRY_RUN["real"][name]
        lines.append(
            Line(
                what,
                f"{part.seconds:.3g} s, {part.memory:.2f} GiB",
                f"{computed:.2f} GiB, within a tenth",
                falls_short=abs(part.memory - computed) > 0.1 * computed,
            )
        )
    return lines


def interrupt_and_continue(model: str, output: Path) -> list[Line]:
    """Two epochs of the real size on the sample, of which the first is interrupted."""
    command = [
        *(str(SCRIPT), "--model-id", model, "--output-dir", str(output), "--device", "cuda"),
        *("--epochs", "2", "--checkpoint-minutes", "0.01"),
    ]
    say(f"$ python {' '.join(command)}  (interrupted, then continued)")
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not Path(f"{output}.unfinished/checkpoint.pt").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stopped = process.wait()

    started = time.perf_counter()
    done = run(*command)
    seconds = time.perf_counter() - started
    is_continued = re.search(r"^steps: .* [1-9]\d* done$", done.stdout, re.M) is not None
    loss = "no loss"
    if done.returncode == 0:
        results = json.loads((output / "settings.json").read_text())["results"]
        loss = f"held-out loss {results['held_out_loss']['after']:.3f}"
    return [
        Line("real size, Ctrl-C", f"exit code {stopped}", "130", falls_short=stopped != 130),
        Line(
            "real size, the same command again",
            f"exit code {done.returncode}, {seconds:.0f} s, {loss}",
            "continues, 0",
            falls_short=done.returncode != 0 or not is_continued,
        ),
    ]


def caption_with_beams(output: Path) -> Line:
    started = time.perf_counter()
    done = run(
        *(str(SCRIPT), "--caption", "train/Image", "--output-dir", str(output)),
        *("--num-beams", "5", "--device", "cuda"),
    )
    seconds = time.perf_counter() - started
    count = len(done.stdout.splitlines())
    found = f"{count} pictures, {seconds:.0f} s, loading included"
    return Line("real size, five beams", found, "exit code 0", falls_short=done.returncode != 0)


def print_table(lines: list[Line]) -> None:
    print("| | found | wanted |")
    print("|---|---|---|")
    for line in lines:
        mark = " **falls short**" if line.falls_short else ""
        print(f"| {line.what} | {line.found}{mark} | {line.wanted} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="of the model of the real size; it is made if it is missing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: PyTorch finds no GPU on this machine, and nothing else is tried here.")
        return 1

    model = str(Path(arguments.folder).resolve())
    lines = [*describe_machine(), run_marked_tests()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dtypes = ["float32", "float16"]
        if torch.cuda.get_device_capability() >= (8, 0):
            dtypes.append("bfloat16")
        for dtype in dtypes:
            lines.append(train_on_sample(folder, dtype))
            lines.append(train_on_sample(folder, dtype, "--no-load-in-4bit"))

        if not Path(model, "config.json").exists():
            say(f"making a model of the real size in {model}: 7.5 GB")
            write_model(model, {})
        lines += measure_real_size(model)
        lines += interrupt_and_continue(model, folder / "real")
        lines.append(caption_with_beams(folder / "real"))
    benchmark = run("tests/benchmark.py", "--device", "cuda", "--repeats", "3", "--real", model)
    lines.append(
        Line(
            "benchmark.py --real",
            f"exit code {benchmark.returncode}",
            "0",
            falls_short=benchmark.returncode != 0,
        )
    )

    print_table(lines)
    print(benchmark.stdout)
    short = [line.what for line in lines if line.falls_short]
    if short:
        print(f"falls short: {', '.join(short)}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
