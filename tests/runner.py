"""finetune.main in forked children, which have imported everything already.

What happens to them is said by events such as "before step 3" (see `on`).
"""

import builtins
import csv
import fnmatch
import functools
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import peft
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import flags_of
from tqdm import tqdm

import finetune

LIMIT = 120  # seconds that anything may take
PLACES = {  # where something may happen: the function that is called there
    "load": (transformers.Blip2ForConditionalGeneration, "from_pretrained"),
    "encode": (finetune.Captioner, "encode"),
    "caption": (finetune.Captioner, "caption"),
    "measure": (finetune, "held_out_loss"),
    "step": (torch.optim.AdamW, "step"),
    "adapter": (peft.PeftModel, "save_pretrained"),
    "processor": (transformers.Blip2Processor, "save_pretrained"),
    "serialize": (torch, "save"),
    "draw": (matplotlib.figure.Figure, "savefig"),
    "open": (builtins, "open"),
    "replace": (os, "replace"),
    "rename": (Path, "rename"),
    "unlink": (Path, "unlink"),
}


def on(event: str, action: Callable[[], None]) -> None:
    """Patches this process: action() before or after the n-th call of a place.

    "before encode 2"; "after replace *.pt 2": of those calls with such a path.
    """
    when, place, *pattern, number = event.split()
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(real)
    def watched(*arguments, **named):
        paths = [os.fspath(one) for one in arguments if isinstance(one, str | Path)]
        meant = not pattern or any(fnmatch.fnmatch(path, *pattern) for path in paths)
        now = meant and next(calls) == int(number)
        if now and when == "before":
            action()
        result = real(*arguments, **named)
        if now and when == "after":
            action()
        return result

    setattr(owner, name, watched)


def send(number: int) -> Callable[[], None]:
    """An action: a signal to this very process."""
    return lambda: os.kill(os.getpid(), number)


def fail_with(error: BaseException) -> Callable[[], None]:
    """An action: raises."""
    def action() -> None:
        raise error

    return action


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def step_of(folder: Path) -> int:
    """That of the checkpoint in out.unfinished/, which must be whole; 0: there is none."""
    path = folder / "out.unfinished/checkpoint.pt"
    return torch.load(path, weights_only=True)["progress"]["step"] if path.exists() else 0


class Ended(NamedTuple):
    code: int  # negative: the signal that killed it
    out: str
    err: str


class Child(multiprocessing.get_context("fork").Process):
    """finetune.main in `folder`, beside which its logs are; `prepare` may patch the process."""

    def __init__(
        self, settings: dict, *flags: str, folder: Path, rank: int = 0,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(daemon=True)
        self.settings, self.flags, self.folder, self.prepare = settings, flags, folder, prepare
        self.logs = [folder.with_name(f"{name}-{rank}") for name in ("out", "err")]
        self.start()

    def run(self) -> None:
        gc.freeze()  # else the first collection copies all that was imported
        for number, path in enumerate(self.logs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(n, "w", 1, closefd=False) for n in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background too
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tqdm.set_lock(threading.RLock())  # not the one that a killed child may hold
        torch.set_num_threads(1)  # a pool of threads does not survive the fork
        for state in (PartialState, AcceleratorState, GradientState):
            state._shared_state.clear()  # of tests in the parent
        os.chdir(self.folder)
        self.prepare()
        sys.exit(finetune.main([*flags_of(self.settings), *self.flags]))

    def wait(self) -> Ended:
        self.join(LIMIT)
        hangs = self.is_alive()
        self.kill()
        assert not hangs, f"what writes into {self.logs} hangs"
        return Ended(self.exitcode, *(path.read_text() for path in self.logs))
