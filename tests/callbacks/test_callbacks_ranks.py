"""Two gloo processes on one machine agree bit by bit, and agree with one process on the same global batches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gflow_pl.files import read_rows

HERE = Path(__file__).parent


def run(folder: Path, devices: int, **options) -> list[dict]:
    """Train with a number of processes, fail if one of them fails, and return the state of every rank."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "two_ranks.py"), str(folder), str(devices), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(folder.glob(f"rank*_of_{devices}.pt"))
    assert len(files) == devices, "a rank left no state"
    return [torch.load(file, weights_only=True) for file in files]


def assert_same(one: dict, two: dict, parts: tuple[str, ...]) -> None:
    assert one["plans"] == two["plans"]
    assert one["kept"] == two["kept"]
    for part in parts:
        assert one[part].keys() == two[part].keys()
        for name, tensor in one[part].items():
            assert torch.equal(tensor, two[part][name]), (part, name)


def assert_close(single: dict, first: dict, parts: tuple[str, ...]) -> None:
    """Assert that the plans are equal, and all tensors to 1e-6 of their largest value."""
    assert first["kept"] == single["kept"]
    assert sum(row["filters_removed"] for row in single["plans"]) > 10
    compared = 0
    for part in parts:
        for name, tensor in single[part].items():
            if tensor.numel() and tensor.ndim:
                error = (tensor - first[part][name]).abs().max()
                assert error <= 1e-6 * tensor.abs().max() + 1e-12, (part, name, error)
                compared += 1
    assert compared >= 20


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_two_ranks_equal_one_process_on_the_same_global_batches(optimizer, tmp_path) -> None:
    callback = {"measure": "loss", "fraction": 0.5, "rounds": 3, "num_samples": 32, "keep_momentum": True}
    options = {"optimizer": optimizer, "double": True, "callback": callback, "trainer": {"max_epochs": 5}}
    (single,) = run(tmp_path / "one", 1, **options)
    first, second = run(tmp_path / "two", 2, **options)
    assert_same(first, second, ("parameters", "buffers", "momenta"))
    assert_close(single, first, ("parameters", "momenta"))


@pytest.mark.slow
def test_synchronized_batch_norm_equals_one_process_and_resumes(tmp_path) -> None:
    """With `sync_batchnorm=True`, Lightning replaces modules between `setup` and training, and expansions must be
    restored.

    SyncBatchNorm of torch does not train on a CPU; two_ranks.py replaces its forward. The conversion itself is tested
    in test_callbacks_carries_structure.py.
    """
    callback = {"measure": "loss", "fraction": 0.5, "rounds": 3, "num_samples": 32, "keep_momentum": True}
    options = {"double": True, "norm": True, "callback": callback, "trainer": {"max_epochs": 5, "sync_batchnorm": True}}
    (single,) = run(tmp_path / "one", 1, **options)
    first, second = run(tmp_path / "two", 2, **options)
    assert (single["norms"], first["norms"]) == (0, 3)
    assert_same(first, second, ("parameters", "buffers", "momenta", "scored_with"))
    assert_close(single, first, ("parameters", "momenta", "buffers"))

    ckpt_path = str(tmp_path / "two" / "epoch=2.ckpt")
    resumed = run(tmp_path / "resumed", 2, ckpt_path=ckpt_path, **options)
    for one, two in zip((first, second), resumed, strict=True):
        assert_same(one, two, ("parameters", "buffers", "momenta"))


@pytest.mark.parametrize(
    ("measure", "trainer"),
    [
        ("fisher", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
        ("grasp", {}),
    ],
)
def test_tracked_scores_are_those_of_the_global_batch(measure, trainer, tmp_path) -> None:
    callback = {"measure": measure, "fraction": 0.5, "rounds": 3, "track": True, "keep_momentum": True}
    options = {"double": True, "callback": callback, "trainer": {"max_epochs": 4, **trainer}}
    (single,) = run(tmp_path / "one", 1, **options)
    first, second = run(tmp_path / "two", 2, **options)
    assert_same(first, second, ("parameters", "buffers", "momenta"))
    assert first["kept"] == single["kept"]
    assert sum(row["filters_removed"] for row in single["plans"]) > 10
    for name, vector in single["scores"].items():
        assert (vector - first["scores"][name]).abs().max() <= 1e-6 * vector.abs().max(), name
    assert sum(vector.numel() for vector in single["scores"].values()) > 20


@pytest.mark.parametrize(
    ("network", "measure"),
    [
        ("resnet56", "loss"),
        ("mobilenet_v1", "grasp"),
        ("mobilenet_v1", "biased_loss_tracked"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("resnet56", "grasp"), ("resnet56", "biased_loss_tracked"), ("mobilenet_v1", "loss")]
        ),
    ],
)
def test_ranks_agree_to_the_bit_with_batch_norm_and_momentum(network, measure, tmp_path) -> None:
    callback = {"measure": measure, "fraction": 0.4, "rounds": 2, "num_samples": 16, "keep_momentum": True}
    trainer = {"max_epochs": 3, "limit_train_batches": 1, "limit_val_batches": 0}
    first, second = run(tmp_path, 2, network=network, callback=callback, trainer=trainer)
    assert_same(first, second, ("parameters", "momenta", "scored_with"))
    assert len(first["plans"]) == 2


def test_ranks_with_different_data_and_seeds_agree_on_every_plan(tmp_path) -> None:
    callback = {"measure": "loss", "fraction": 0.5, "rounds": 2, "num_samples": 32}
    options = {"norm": True, "data_differs": True, "seed_differs": True, "callback": callback}
    first, second = run(tmp_path, 2, **options)
    assert_same(first, second, ("parameters", "scored_with"))
    assert [row["epoch"] for row in read_rows(tmp_path / "pruning.csv")] == [1, 2]
    assert any(not torch.equal(value, second["buffers"][name]) for name, value in first["buffers"].items())


@pytest.mark.parametrize(
    "ddp",
    [
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True, "broadcast_buffers": False, "bucket_cap_mb": 0.001},
    ],
    ids=lambda d: next(iter(d)),
)
def test_every_kind_of_wrapper_is_rebuilt(ddp, tmp_path) -> None:
    callback = {"measure": "loss", "fraction": 0.5, "rounds": 2, "num_samples": 32, "keep_momentum": True}
    validates = "static_graph" in ddp
    first, second = run(tmp_path, 2, callback=callback, ddp=ddp, norm=True, validates=validates)
    assert_same(first, second, ("parameters", "momenta", "scored_with"))
    # One rank has the only validation image; the ranks must not wait for each other forever.
    assert {row["accuracy_after_cut"] for row in first["plans"]} <= ({0.0, 1.0} if validates else {""})
