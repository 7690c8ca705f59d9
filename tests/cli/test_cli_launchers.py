"""Processes that torchrun, SLURM or the user starts share one run folder, and write one row per round."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gflow_pl.callbacks.lightning.ranks import is_first_process
from gflow_pl.cli.claimed_folder import ClaimedFolder
from gflow_pl.files import read_rows

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "lightning_cli"
COMMAND = ["-m", "gflow_pl", "prune", "--model", "their_pkg.Module", "--data", "their_pkg.Data", "--name", "run"]
COMMAND += ["--pruning.measure", "loss", "--pruning.fraction", "0.5", "--pruning.rounds", "2"]
COMMAND += ["--pruning.num_samples", "64", "--trainer.max_epochs", "3", "--trainer.limit_train_batches", "2"]
COMMAND += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(port: str) -> list[tuple[list[str], dict[str, str]]]:
    line = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    return [([*line, *COMMAND, "--trainer.devices", "2"], {})]


def slurm(port: str) -> list[tuple[list[str], dict[str, str]]]:
    """Return the environment that srun sets for two tasks on one node."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "prune", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NNODES": "1", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    tasks = [{**job, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in (0, 1)]
    return [([*COMMAND, "--trainer.devices", "2"], task) for task in tasks]


def nodes(port: str) -> list[tuple[list[str], dict[str, str]]]:
    """Return the same command for two nodes, as described in the documentation of Lightning, both on this host."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    line = [*COMMAND, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    return [(line, {**address, "NODE_RANK": str(node)}) for node in (0, 1)]


@pytest.mark.parametrize(
    "launcher",
    [torchrun, pytest.param(slurm, marks=pytest.mark.slow), pytest.param(nodes, marks=pytest.mark.slow)],
)
def test_prune_in_processes_that_a_launcher_starts(launcher, tmp_path) -> None:
    (tmp_path / "checkpoints" / "run").mkdir(parents=True)  # of an earlier run, so that this one is run-2 on every rank
    paths = [str(EXAMPLE), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    port = free_port()
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen([sys.executable, *line], env={**env, **more}, **options) for line, more in launcher(port)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)

    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["run", "run-2"]
    assert not list((tmp_path / "checkpoints" / "run").iterdir())
    folder = tmp_path / "checkpoints" / "run-2"
    names = {path.name for path in folder.iterdir()}
    assert {"best.ckpt", "config.yaml", "last.ckpt", "metrics.csv", "pruning.csv", "unpruned.ckpt"} <= names
    rows = read_rows(folder / "pruning.csv")
    assert [row["round"] for row in rows] == [1, 2]
    assert [row["epoch"] for row in read_rows(folder / "metrics.csv")] == [0, 1, 2]
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert sum(tensor.numel() for tensor in saved["state_dict"].values()) == rows[-1]["parameters"]
    assert len(saved["callbacks"]["PruningCallback"]["rng"]) == 2, "both processes belong to one run"
    assert sum(text.count("Best test accuracy") for text in outputs) == 1, "only one process prints the closing lines"


@pytest.mark.parametrize("name", ["NODE_RANK", "GROUP_RANK"])
def test_the_first_process_of_another_node_creates_no_folder(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GFLOW_RUN_FOLDER", "")
    monkeypatch.delenv("GFLOW_RUN_FOLDER")
    monkeypatch.setenv(name, "1")
    assert not is_first_process()
    assert ClaimedFolder().claim(str(tmp_path), "run") == tmp_path / "run"
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(name, "0")
    assert is_first_process()
    assert ClaimedFolder().claim(str(tmp_path), "run").is_dir()
