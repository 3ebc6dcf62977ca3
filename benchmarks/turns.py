"""Timing and weighing of variants of the same work, each in a process of its own, which take turns."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch

# Freed memory is given back at once, so that what a process has is what it uses. This takes time.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class PeakMemory:
    """Highest memory of a block over what there was before it, in MB: of the GPU, or of the process on the CPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        self.before = self.highest = self.resident()
        self.running = True
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.highest = torch.cuda.max_memory_allocated(self.device)
        else:
            self.running = False
            self.watcher.join()
        self.megabytes = (self.highest - self.before) / 1e6

    def watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, self.resident())
            time.sleep(0.002)

    def resident(self) -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(work: Callable[[], dict[str, float] | None], device: torch.device) -> None:
    """Work once for every line on stdin, and print as JSON its seconds, its memory, and what else it tells."""
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        with PeakMemory(device) as memory:
            start = time.perf_counter()
            told = work()
            synchronize(device)
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "megabytes": memory.megabytes, **(told or {})}), flush=True)


def synchronize(device: torch.device) -> None:
    """Wait for a device that computes while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(commands: dict[str, list[str]], repeats: int) -> dict[str, dict[str, float]]:
    """
    Fastest seconds and largest memory of every variant, and what else it told.

    Args:
        commands: variant -> arguments of Python by which a process serves it.
        repeats: how often each works; before that once to warm up, and afterwards once with memory given back at once.
            0 for work so long that none of this matters: it is done once.
    """
    if repeats == 0:
        return {variant: results[0] for variant, results in _take_turns(commands, 1, {}).items()}
    timed = _take_turns(commands, repeats + 1, {})
    weighed = _take_turns(commands, 2, GIVE_BACK)
    return {
        variant: min(timed[variant][1:], key=lambda one: one["seconds"])
        | {"megabytes": weighed[variant][1]["megabytes"]}
        for variant in commands
    }


def _take_turns(commands: dict[str, list[str]], times: int, environment: dict[str, str]) -> dict[str, list[dict]]:
    processes = {}
    for variant, command in commands.items():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[variant] = subprocess.Popen([sys.executable, *command], env=os.environ | environment, **pipes)
        if not processes[variant].stdout.readline():
            raise RuntimeError(f"{variant} cannot be made, for the reason above")
    results = {variant: [] for variant in commands}
    for _ in range(times):
        for variant, process in processes.items():
            process.stdin.write("work\n")
            process.stdin.flush()
            if not (line := process.stdout.readline()):
                raise RuntimeError(f"{variant} has failed, for the reason above")
            results[variant].append(json.loads(line))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return results
