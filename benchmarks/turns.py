"""Timing and weighing of variants of the same work, each in a process of its own, which take turns."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

# Freed memory is given back at once, so that what a process has is what it uses. This takes up to twice the time.
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


def serve(work: Callable[[], Any], device: torch.device, tell: Callable[[Any], dict[str, float]]) -> None:
    """Work once for every line on stdin, and print as JSON its seconds, its memory, and what else is to be told of the
    result, which is not timed."""
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        with PeakMemory(device) as memory:
            start = time.perf_counter()
            result = work()
            synchronize(device)
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "megabytes": memory.megabytes, **tell(result)}), flush=True)
        del result


def synchronize(device: torch.device) -> None:
    """Wait for a device that computes while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(commands: dict[str, list[str]], repeats: int) -> dict[str, dict[str, float]]:
    """
    Fastest seconds and largest memory of every variant, and what else it told; nothing of one that failed.

    Args:
        commands: variant -> arguments of Python by which a process serves it.
        repeats: how often each works; before that once to warm up, and afterwards once with memory given back at once.
            0 for work so long that it is done once, timed and weighed as it is, and one variant ends before the next
            begins. A GPU is warmed up for that too, and is never asked to give memory back: torch counts it.
    """
    on_gpu = torch.cuda.is_available()
    if repeats == 0:
        results = {}
        for variant, command in commands.items():
            results |= _take_turns({variant: command}, 2 if on_gpu else 1, {})
        return {variant: of_variant[-1] if of_variant else {} for variant, of_variant in results.items()}
    timed = _take_turns(commands, repeats + 1, {})
    weighed = timed if on_gpu else _take_turns(commands, 2, GIVE_BACK)
    return {
        variant: min(timed[variant][1:], key=lambda one: one["seconds"])
        | {"megabytes": weighed[variant][1]["megabytes"]}
        if timed[variant] and weighed[variant]
        else {}
        for variant in commands
    }


def _take_turns(commands: dict[str, list[str]], times: int, environment: dict[str, str]) -> dict[str, list[dict]]:
    def start(command: list[str]) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, *command], env=os.environ | environment, **pipes)
        process.stdout.readline()
        return process

    # To get ready a process reads and converts weights, which keeps two cores busy.
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as starting:
        processes = dict(zip(commands, starting.map(start, commands.values())))
    results = {variant: [] for variant in commands}
    failed = set()
    for _ in range(times):
        for variant, process in processes.items():
            if variant in failed:
                continue
            try:
                process.stdin.write("work\n")
                process.stdin.flush()
                results[variant].append(json.loads(process.stdout.readline()))
            except (BrokenPipeError, json.JSONDecodeError):  # it has ended, maybe for want of memory
                print(f"{variant} has failed, for the reason above if one is there", file=sys.stderr)
                failed.add(variant)
    for variant, process in processes.items():
        process.kill() if variant in failed else process.stdin.close()
        process.wait()
    return {variant: [] if variant in failed else of_variant for variant, of_variant in results.items()}
