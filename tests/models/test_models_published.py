"""Weight files of the published code: reading without running code, pruned shapes, and refusals."""

import os
import pickle

import numpy as np
import pytest
import torch
from golden_recipe import golden_weights

from gflow_pl.common.checkpoint_file import read_checkpoint
from gflow_pl.models import build, is_published, strip_prefix


def wrapped(state):
    return {f"module.{name}": value for name, value in state.items()}


def save_published(path, state, cfg, **options):
    torch.save({"net": wrapped(state), "cfg": cfg}, path, **options)
    return path


CFGS = {
    "numpy integers, as the published pruner leaves them": [np.int64(10), np.int64(64), "M", np.int32(3), 512],
    "strides as pairs and as text": [(np.int64(30), 2), "61/2", [np.int64(1), np.uint8(200)]],
    "other numbers": [np.float64(0.1), np.float32(2.5), np.bool_(True), np.float16(-1.0), np.uint32(7)],
    "nothing": None,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("cfg", CFGS.values(), ids=CFGS.keys())
def test_numpy_numbers_in_the_cfg_are_read_as_they_were_written(tmp_path, cfg, zipped):
    state = {"conv1.weight": torch.randn(3, 2, 1, 1), "bn1.num_batches_tracked": torch.tensor(5)}
    path = tmp_path / "published.pth"
    save_published(path, state, cfg, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(path)
    assert is_published(checkpoint)
    assert checkpoint["cfg"] == cfg
    read = strip_prefix(checkpoint)
    assert list(read) == list(state)
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert [tuple(tensor.shape) for tensor in read.values()] == [(3, 2, 1, 1), ()]


def test_the_module_name_of_older_numpy_versions_is_read(tmp_path):
    path = tmp_path / "published.pth"
    save_published(path, {"w": torch.ones(1)}, [np.int64(7)], _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"cnumpy._core.multiarray\n") == 1
    path.write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert read_checkpoint(path)["cfg"] == [7]


def test_numbers_in_big_endian_order_are_read(tmp_path):
    path = tmp_path / "published.pth"
    save_published(path, {"w": torch.ones(1)}, [np.int64(7)], _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    text = b"X\x01\x00\x00\x00"
    assert content.count(text + b"<") == 1
    path.write_bytes(content.replace(text + b"<", text + b">"))
    assert read_checkpoint(path)["cfg"] == [7 << 56]


def test_reading_does_not_change_what_pytorch_allows_elsewhere(tmp_path):
    path = save_published(tmp_path / "published.pth", {"w": torch.ones(1)}, [np.int64(7)])
    read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_a_published_network_is_loaded_with_its_weights(tmp_path):
    state = {name: torch.from_numpy(value) for name, value in golden_weights("resnet56").items()}
    path = save_published(tmp_path / "resnet.pth", state, [[np.int64(16)] * 9] * 3)
    net = build("resnet56", 10)
    net.load_state_dict(strip_prefix(read_checkpoint(path)), strict=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_the_shapes_of_a_pruned_network_are_read(tmp_path):
    state = build("vgg13", 10).state_dict()
    state["features.0.weight"] = state["features.0.weight"][:10]
    state["features.3.weight"] = state["features.3.weight"][:, :10]
    path = save_published(tmp_path / "vgg.pth", state, [np.int64(10), 64, "M"])
    shapes = {name: tuple(tensor.shape) for name, tensor in strip_prefix(read_checkpoint(path)).items()}
    assert shapes["features.0.weight"] == (10, 3, 3, 3)
    assert shapes["features.3.weight"] == (64, 10, 3, 3)
    assert list(shapes) == list(build("vgg13", 10).state_dict())


class RunsCode:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (self.flag,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_with_code_in_it_is_refused_and_the_code_is_not_run(tmp_path, zipped):
    flag = tmp_path / "the code ran"
    path = tmp_path / "evil.pth"
    torch.save({"net": {}, "cfg": RunsCode(str(flag))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds code \(posix\.mkdir\) .* refused: only tensors and plain data"):
        read_checkpoint(path)
    assert not flag.exists()
    torch.load(path, weights_only=False)
    assert flag.exists(), "the file would have run its code"


def test_a_plain_pickle_with_code_in_it_is_refused(tmp_path):
    flag = tmp_path / "the code ran"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(RunsCode(str(flag)), protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pkl"):
        read_checkpoint(path)
    assert not flag.exists()


def test_numpy_objects_that_are_no_numbers_are_refused(tmp_path):
    path = save_published(tmp_path / "odd.pth", {"w": torch.ones(1)}, [np.array([1, "a"], dtype=object)])
    with pytest.raises(ValueError, match=r"odd\.pth"):
        read_checkpoint(path)
    path = save_published(tmp_path / "text.pth", {"w": torch.ones(1)}, [np.str_("64")])
    with pytest.raises(ValueError, match=r"text\.pth"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", ["nothing", "garbage", "truncated", "text"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_file_is_one_sentence(tmp_path, content, zipped):
    path = save_published(tmp_path / "x.pth", {"w": torch.randn(500)}, [], _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    broken = {
        "nothing": b"",
        "garbage": np.random.default_rng(0).bytes(2000),
        "truncated": whole[: len(whole) // 2],
        "text": b"epoch,loss\n1,2\n",
    }
    path.write_bytes(broken[content])
    with pytest.raises(
        ValueError, match=r"^Checkpoint '.*x\.pth' could not be read \(\w+\): it is damaged or no checkpoint\.$"
    ):
        read_checkpoint(path)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^Checkpoint '.*none\.pth' does not exist or is no file"):
        read_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize(
    "other", [{"state_dict": {"w": torch.ones(1)}}, {"net": {}}, {"net": {"w": 3}}, [torch.ones(1)], 7]
)
def test_other_files_are_not_recognized_as_published_ones(other):
    assert not is_published(other)
    with pytest.raises(
        ValueError, match=r"^The checkpoint is no weight file of the published code: expected a state dict"
    ):
        strip_prefix(other)


def test_names_keep_the_prefix_if_not_all_have_it(tmp_path):
    assert list(strip_prefix({"net": {"module.a": torch.ones(1), "b": torch.ones(1)}})) == ["module.a", "b"]
