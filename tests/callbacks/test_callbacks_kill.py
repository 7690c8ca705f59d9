"""A run that is killed at any moment and resumed ends like an uninterrupted one, to the last bit."""

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from comparisons import assert_identical

from gflow_pl.files import read_rows

SCRIPT = Path(__file__).parent / "kill_script.py"


class Server:
    """A process that has imported everything and forks the runs (kill_script.py)."""

    def __init__(self, hash_seed: int) -> None:
        # Sets of strings have another order in each of them, as in any two processes of a user.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)}
        pipe = subprocess.PIPE
        # Not buffered, so that `select` sees all that is there.
        self.process = subprocess.Popen([sys.executable, SCRIPT], stdin=pipe, stdout=pipe, env=env, bufsize=0)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def _answer(self, folder: Path) -> dict:
        assert select.select([self.process.stdout], [], [], 240)[0], f"no answer\n{log(folder)}"
        return json.loads(self.process.stdout.readline())

    def run(self, folder: Path, *, seed=0, ranks=1, ckpt=None, count=False, kill_at=None, delay=None):
        """Train, and perhaps be killed; returns whether it was, and the seconds since it was ready."""
        folder.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {"folder": str(folder), "seed": seed, "ckpt": ckpt and str(ckpt), "ranks": ranks, "port": port}
        self.process.stdin.write((json.dumps({**job, "count": count, "kill_at": kill_at}) + "\n").encode())
        answers: dict = {}
        while not {"pids", "ready"} <= answers.keys() and "ended" not in answers:
            answers |= self._answer(folder)
        began = time.monotonic()
        if delay is not None and "ended" not in answers:
            time.sleep(delay)
            # The process may just have ended.
            with contextlib.suppress(ProcessLookupError):
                os.kill(answers["pids"][seed % ranks], signal.SIGKILL)
        while "ended" not in answers:
            answers |= self._answer(folder)
        killed = -signal.SIGKILL in answers["ended"]
        assert killed or set(answers["ended"]) == {0}, log(folder)
        return killed, time.monotonic() - began


def log(folder: Path) -> str:
    return "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("log*.txt")))


@pytest.fixture(scope="module")
def servers():
    both = [Server(hash_seed) for hash_seed in (1, 2)]
    yield both
    for server in both:
        server.close()


def result(folder: Path, rank: int) -> dict:
    return torch.load(folder / f"result{rank}.pt", weights_only=True)


def assert_same_end(whole: Path, folder: Path, ranks: int) -> None:
    """Compare weights, buffers, momentum, rows in memory and in files, and checkpoints."""
    for rank in range(ranks):
        one, two = result(whole, rank), result(folder, rank)
        assert len(one["momenta"]) > 5
        assert [row["round"] for row in one["pruning"]] == [1, 2, 3, 4, 5]
        if rank == 0:
            assert [row["epoch"] for row in one["metrics"]] == [0, 1, 2, 3, 4, 5, 6]
        for each in (one, two):
            del each["calls"]
        assert_identical(one, two)
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    rows = [read_rows(place / "pruning.csv") for place in (whole, folder)]
    assert len(rows[0]) == 5
    for row in (*rows[0], *rows[1]):
        assert row.pop("seconds") >= 0
    assert rows[0] == rows[1]
    for name in ("best.ckpt", "last.ckpt", "unpruned.ckpt"):
        one, two = (torch.load(place / name, weights_only=True) for place in (whole, folder))
        assert_identical(one["state_dict"], two["state_dict"], name)
        assert_identical(one.get("optimizer_states"), two.get("optimizer_states"), name)


def assert_all_readable(folder: Path) -> None:
    for file in folder.glob("*.ckpt"):
        assert torch.load(file, weights_only=True)["state_dict"], file
    for file in folder.glob("*.csv"):
        read_rows(file)
        assert file.read_text().endswith("\n"), file


def kill_and_resume(servers, folder: Path, moments: int, ranks: int, least_after: float) -> Counter:
    """Kill a run at `moments` moments, resume it each time, and compare its end; return the number of kills by stage.

    Half of the moments are drawn by the clock, from the whole run; the other half are calls of Python, drawn within a
    stage.
    """
    first, second = servers
    whole, again = folder / "whole", folder / "again"
    _, seconds = first.run(whole, ranks=ranks)
    # From a second process, also so that the equality below is not of a run with itself.
    second.run(again, ranks=ranks, count=True)
    assert_same_end(whole, again, ranks)
    calls = result(again, ranks - 1)["calls"]
    stages = [stage for stage in ("round", "saving", "validation", "rows", "training") if calls[stage] > 20]

    draw, seen, tried = random.Random(0), Counter(), 0
    while seen["killed"] < moments or seen["after a checkpoint"] < least_after * moments:
        assert tried < 3 * moments, f"too few were killed in time: {seen}"
        run = folder / f"run{tried}"
        if tried % 2:
            killed, _ = first.run(run, ranks=ranks, delay=draw.uniform(0, seconds), seed=0)
        else:
            stage = stages[tried // 2 % len(stages)]
            killed, _ = first.run(run, ranks=ranks, kill_at=[stage, draw.randint(1, int(0.98 * calls[stage]))])
        tried += 1
        if not killed:
            continue
        seen["killed"] += 1
        seen[(run / f"stage{ranks - 1}").read_text().strip()] += 1
        assert_all_readable(run)
        last = run / "last.ckpt"
        seen["after a checkpoint"] += last.exists()
        # A run that had no checkpoint begins anew, with its own seed.
        resume = {"ckpt": last, "seed": 1000 + tried} if last.exists() else {"seed": 0}
        killed, _ = second.run(run, ranks=ranks, **resume)
        assert not killed
        assert_all_readable(run)
        assert_same_end(whole, run, ranks)
    return seen


def test_a_killed_and_resumed_run_ends_like_an_uninterrupted_one(servers, tmp_path) -> None:
    seen = kill_and_resume(servers, tmp_path, 3, 1, least_after=0.5)
    assert seen["killed"] >= 3


def test_a_killed_and_resumed_run_of_two_ranks_ends_like_an_uninterrupted_one(servers, tmp_path) -> None:
    seen = kill_and_resume(servers, tmp_path, 1, 2, least_after=1)
    assert seen["after a checkpoint"] >= 1


@pytest.mark.slow
def test_forty_killed_and_resumed_runs_end_like_an_uninterrupted_one(servers, tmp_path) -> None:
    seen = kill_and_resume(servers, tmp_path, 40, 1, least_after=0.75)
    print(dict(seen))
    assert seen["killed"] >= 40
    assert seen["after a checkpoint"] >= 30
    assert min(seen[stage] for stage in ("round", "saving", "validation", "training")) >= 2


@pytest.mark.slow
def test_ten_killed_and_resumed_runs_of_two_ranks_end_like_an_uninterrupted_one(servers, tmp_path) -> None:
    seen = kill_and_resume(servers, tmp_path, 10, 2, least_after=0.6)
    print(dict(seen))
    assert seen["killed"] >= 10
