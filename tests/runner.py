"""Runs in child processes: forked ones, which have imported everything already, and real ones.

What happens to them is said by events such as "before step 3" (see `on`).
"""

import builtins
import fnmatch
import functools
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import peft
import psutil
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
    "losses": (finetune.Captioner, "losses"),
    "step": (torch.optim.AdamW, "step"),
    "adapter": (peft.PeftModel, "save_pretrained"),
    "processor": (transformers.Blip2Processor, "save_pretrained"),
    "serialize": (torch, "save"),
    "draw": (matplotlib.figure.Figure, "savefig"),
    "open": (builtins, "open"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "rename": (Path, "rename"),
    "unlink": (Path, "unlink"),
}


def matches(call: tuple, pattern: str) -> bool:
    """Whether a path among the arguments matches, or that of an open file given by its number."""
    if isinstance(call[0], int):
        call = (os.readlink(f"/proc/self/fd/{call[0]}"),)
    return any(fnmatch.fnmatch(os.fspath(part), pattern) for part in call
               if isinstance(part, str | os.PathLike))


def on(event: str, action: Callable[[], None]) -> None:
    """Patches this process: action() before or after the n-th call of a place.

    "before encode 2"; "after replace *.pt 2", of those calls with such a path; with " > ", what
    follows is counted from the first event on.
    """
    event, _, following = event.partition(" > ")
    when, place, *pattern, number = event.split()
    owner, name = PLACES[place]
    real, count = getattr(owner, name), 0
    act = functools.partial(on, following, action) if following else action

    @functools.wraps(real)
    def watched(*arguments, **named):
        nonlocal count
        meant = not pattern or matches(arguments, *pattern)
        count += meant
        now = meant and count == int(number)
        if now and when == "before":
            act()
        result = real(*arguments, **named)
        if now and when == "after":
            act()
        return result

    setattr(owner, name, watched)


def send(number: int) -> None:
    """A signal to this very process."""
    os.kill(os.getpid(), number)


def fail_with(error: BaseException) -> None:
    raise error


def wait_for(condition: Callable[[], object], what: str = "a process") -> None:
    """Until the condition holds, and not for ever."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)


class Ended(NamedTuple):
    code: int  # negative: the signal that killed it
    out: str
    err: str


class Child:
    """A forked child that calls `run`, which returns its exit code; its output is in `logs`."""

    def __init__(self, run: Callable[[], int], logs: Path) -> None:
        self.logs, self.status = logs, None
        logs.mkdir(parents=True, exist_ok=True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                gc.freeze()  # else the first collection copies all that was imported
                for number, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout, sys.stderr = (open(n, "w", 1, closefd=False) for n in (1, 2))
                signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background too
                code = run()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def kill(self) -> None:
        """With all that it has started."""
        if not self.ended():
            process = psutil.Process(self.pid)
            for one in [*process.children(recursive=True), process]:
                one.kill()
            wait_for(self.ended)

    def wait(self) -> Ended:
        try:
            wait_for(self.ended, f"what writes into {self.logs}")
        finally:
            self.kill()
        return Ended(os.waitstatus_to_exitcode(self.status),
                     *((self.logs / name).read_text() for name in ("out", "err")))


def start(command: list, logs: Path, folder: Path) -> Child:
    """A real command, as a user gives it in `folder`, with the seconds of its imports."""
    words = [str(word) for word in command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def run() -> int:
        os.chdir(folder)
        os.execvpe(words[0], words, environment)

    return Child(run, logs)


def fork(
    settings: dict, *flags: str, logs: Path, folder: Path, prepare: Callable | None = None,
    environment: dict | None = None,
) -> Child:
    """finetune.main in a forked child, in `folder`; `prepare` may patch it and change settings."""

    def run() -> int:
        os.environ |= {"TOKENIZERS_PARALLELISM": "false"} | (environment or {})
        tqdm.set_lock(threading.RLock())  # not the one that a killed child may hold
        torch.set_num_threads(1)  # a pool of threads does not survive the fork
        for state in (PartialState, AcceleratorState, GradientState):
            state._shared_state.clear()  # of tests in the parent
        os.chdir(folder)
        if prepare:
            prepare()
        return finetune.main([*flags_of(settings), *flags])

    return Child(run, logs)


def fork_several(
    count: int, settings: dict, folder: Path, prepare: Callable | None = None
) -> list[Ended]:
    """As torchrun starts them; prepare(rank, settings) runs in each. None of them may hang."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    children = []
    for rank in range(count):
        own = dict(settings)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count,
                       "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                       "GLOO_SOCKET_IFNAME": "lo"} if count > 1 else {}
        children.append(fork(
            own, logs=folder / f"logs-{rank}", folder=folder,
            prepare=functools.partial(prepare, rank, own) if prepare else None,
            environment={name: str(value) for name, value in environment.items()}))
    try:
        return [child.wait() for child in children]
    finally:
        for child in children:
            child.kill()
