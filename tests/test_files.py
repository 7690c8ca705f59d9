"""Atomic writes: processes that are killed during a write, and several processes that write the same file."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from gflow_pl.files import atomic_save, write_rows, write_text


class Killer:
    """Kills its process with SIGKILL when it is pickled."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


KILLED_AT_RANDOM = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from gflow_pl.files import atomic_save
folder, target = sys.argv[1], sys.argv[1] + "/x.ckpt"
random.seed(0)
inside = files = 0
for kill in range(12):
    child = os.fork()
    if child == 0:
        for step in range(10**6):
            atomic_save({"step": step, "a": torch.full((2**19,), float(step))}, target)
    while not os.path.exists(target):
        time.sleep(0.001)
    time.sleep(random.uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    contents = torch.load(target, weights_only=True)
    assert torch.equal(contents["a"], torch.full((2**19,), float(contents["step"])))
    inside += any(name.endswith(".part") for name in os.listdir(folder))
    files += 1
atomic_save({"step": -1}, target)
assert os.listdir(folder) == ["x.ckpt"], os.listdir(folder)
print(files, inside)
"""


def test_a_process_killed_during_a_write_leaves_a_complete_file(tmp_path):
    folder, temporary = tmp_path / "run", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    # Another file system if there is one, else another folder.
    environment = {**os.environ, "TMPDIR": "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(temporary)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_RANDOM, str(folder)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    files, inside = map(int, done.stdout.split())
    assert files == 12
    assert inside >= 3


def test_a_process_killed_in_the_middle_of_the_pickle_leaves_the_old_file(tmp_path):
    target = tmp_path / "x.ckpt"
    atomic_save({"old": torch.ones(3)}, target)
    child = os.fork()
    if child == 0:
        atomic_save({"new": torch.zeros(3), "then": Killer()}, target)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(tmp_path.glob(".x.ckpt.*.part"))) == 1
    assert torch.load(target, weights_only=True)["old"].sum() == 3
    atomic_save({"new": torch.zeros(3)}, target)
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "x.ckpt"
    atomic_save({"old": 1}, target)
    with pytest.raises((AttributeError, TypeError)):
        atomic_save({"new": lambda: 0, "open": open(os.devnull)}, target)  # noqa: SIM115
    assert os.listdir(tmp_path) == ["x.ckpt"]
    assert torch.load(target, weights_only=True) == {"old": 1}


def test_the_temporary_file_of_a_running_process_is_left_alone(tmp_path):
    """Two processes write one target at the same time: both files are complete, and neither deletes the other."""
    target = tmp_path / "x[1].ckpt"  # a name with special characters of glob
    code = """
import collections, os, sys
import torch
from gflow_pl.files import atomic_save
class Waiting:
    def __reduce__(self):
        print("inside", flush=True)
        sys.stdin.readline()
        return (collections.OrderedDict, ())
atomic_save({"first": Waiting(), "all": torch.ones(9)}, sys.argv[1])
"""
    command = [sys.executable, "-c", code, str(target)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "inside\n"
    atomic_save({"second": torch.zeros(3)}, target)
    assert torch.load(target, weights_only=True)["second"].shape == (3,)
    assert len(os.listdir(tmp_path)) == 2
    first.communicate("\n", timeout=60)
    assert first.returncode == 0
    assert torch.load(target, weights_only=True)["all"].sum() == 9
    assert os.listdir(tmp_path) == [target.name]


@pytest.mark.skipif(os.name != "posix", reason="os.kill cannot check for a process there")
def test_only_leftovers_of_ended_processes_on_this_host_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    names = {
        "ended": f".x.ckpt.{host}.{ended.pid}.0a.part",
        "running": f".x.ckpt.{host}.{os.getpid()}.0b.part",
        "other host": f".x.ckpt.other{host}.{ended.pid}.0c.part",
        "other file": f".y.ckpt.{host}.{ended.pid}.0d.part",
        "foreign": ".x.ckpt.1234.part",
    }
    for name in names.values():
        (tmp_path / name).touch()
    atomic_save({"a": 1}, tmp_path / "x.ckpt")
    assert sorted(os.listdir(tmp_path)) == sorted({*names.values(), "x.ckpt"} - {names["ended"]})


@pytest.mark.parametrize("write", [lambda path: write_text(path, "a"), lambda path: write_rows(path, [{"a": 1}])])
def test_text_and_rows_remove_leftovers(write, tmp_path):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = tmp_path / f".x.csv.{socket.gethostname()}.{child}.0a.part"
    left.touch()
    write(tmp_path / "x.csv")
    assert os.listdir(tmp_path) == ["x.csv"]
