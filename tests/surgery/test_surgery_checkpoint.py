import inspect
import os
import subprocess
import sys
import textwrap

import pytest
import pytorch_lightning as pl
import torch
from hand_graphs import Plain, Residual, example, random_plan, randomise

from gflow_pl.surgery import (
    StructureMixin,
    add_structure,
    apply_from_checkpoint,
    load_from_checkpoint,
    load_pruned,
    rewrite,
    save_pruned,
    structure_of,
)


class Foreign(pl.LightningModule):
    """A LightningModule without the mixin that defines on_load_checkpoint itself."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Plain(width) if width == 8 else Residual()
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def on_load_checkpoint(self, checkpoint):
        self.seen.append(tuple(self.net.conv1.weight.shape))


class Plainest(pl.LightningModule):
    """A LightningModule without the mixin and without hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def forward(self, x):
        return self.net(x)


class Own(StructureMixin, Plainest):
    pass


class OwnWithHooks(Own):
    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["added"] = 1

    def on_load_checkpoint(self, checkpoint):
        super().on_load_checkpoint(checkpoint)
        assert checkpoint["added"] == 1


def pruned(cls):
    module = cls()
    randomise(module).eval()
    rewrite(module.net, graph := module.net.graph(), random_plan(graph, 0))
    return module


def write(module, path, *, carries=True):
    """Write a checkpoint as a Trainer does."""
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(module)
    if carries and not isinstance(module, StructureMixin):
        module.on_save_checkpoint = lambda checkpoint: add_structure(module, checkpoint)
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("cls", [Foreign, Plainest, Own, OwnWithHooks])
def test_a_pruned_file_loads_into_a_class_and_the_class_is_unchanged(cls, tmp_path):
    module = pruned(cls)
    path = write(module, tmp_path / "x.ckpt")
    hooks = inspect.getattr_static(cls, "on_load_checkpoint"), "on_load_checkpoint" in vars(cls)
    loaded = load_from_checkpoint(cls, path, map_location="cpu").eval()
    x = example(module.net)
    assert torch.equal(loaded(x), module(x))
    assert structure_of(loaded) == structure_of(module)
    assert (inspect.getattr_static(cls, "on_load_checkpoint"), "on_load_checkpoint" in vars(cls)) == hooks
    if cls is Foreign:
        # The hook of the class ran after the shape was set.
        assert loaded.seen == [tuple(module.net.conv1.weight.shape)]


@pytest.mark.parametrize("cls", [Own, OwnWithHooks])
def test_with_the_mixin_lightnings_load_from_checkpoint_suffices(cls, tmp_path):
    module = pruned(cls)
    path = write(module, tmp_path / "x.ckpt")
    loaded = cls.load_from_checkpoint(path, weights_only=True).eval()
    assert torch.equal(loaded(example(module.net)), module(example(module.net)))


def test_the_class_is_restored_after_a_failure(tmp_path):
    write(pruned(Foreign), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"Structure does not fit Foreign: no tensor 'net\.conv1\.bias"):
        load_from_checkpoint(Foreign, tmp_path / "x.ckpt", width=3)
    assert Foreign.on_load_checkpoint.__qualname__ == "Foreign.on_load_checkpoint"
    with pytest.raises(FileNotFoundError):
        load_from_checkpoint(Plainest, tmp_path / "none.ckpt")
    assert "on_load_checkpoint" not in vars(Plainest)


def test_unpruned_files_without_a_structure_load(tmp_path):
    module = randomise(Plainest()).eval()
    path = write(module, tmp_path / "x.ckpt", carries=False)
    assert "gflow_pl" not in torch.load(path, weights_only=True)
    loaded = load_from_checkpoint(Plainest, path).eval()
    assert torch.equal(loaded(example(module.net)), module(example(module.net)))


def test_a_pruned_file_without_a_structure_is_refused_in_one_sentence(tmp_path):
    path = write(pruned(Plainest), tmp_path / "x.ckpt", carries=False)
    with pytest.raises(
        ValueError, match=r"'net.stem.weight' with shape \(\d, 3, 3, 3\), the network has \(6, 3, 3, 3\)"
    ) as e:
        load_from_checkpoint(Plainest, path)
    assert "PruningCallback" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_larger_file_grows_a_pruned_module():
    module, full = pruned(Plainest), randomise(Plainest(), seed=5).eval()
    checkpoint = {"state_dict": full.state_dict()}
    add_structure(full, checkpoint)
    apply_from_checkpoint(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(module(example(module.net)), full(example(full.net)))


def test_the_structure_in_a_checkpoint_is_plain_data():
    checkpoint = {}
    add_structure(pruned(Plainest), checkpoint)

    def kinds(value):
        yield type(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from kinds(item)

    assert set(kinds(checkpoint)) <= {dict, list, str, int, float}
    assert checkpoint["gflow_pl"]["version"] == 1


@pytest.mark.parametrize("cls", [Plain, Residual])
def test_networks_are_saved_together_with_their_structure(cls, tmp_path):
    model = randomise(cls()).eval()
    rewrite(model, graph := model.graph(), random_plan(graph, 0))
    save_pruned(model, tmp_path / "deep" / "x.pt")
    fresh = cls().eval()
    load_pruned(fresh, tmp_path / "deep" / "x.pt")
    assert torch.equal(fresh(example(model)), model(example(model)))
    assert structure_of(fresh) == structure_of(model)
    assert os.listdir(tmp_path / "deep") == ["x.pt"]


def test_load_pruned_refuses_other_files(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no file of save_pruned"):
        load_pruned(Plain(), tmp_path / "x.pt")


def test_a_new_process_rebuilds_the_network(tmp_path):
    module = pruned(Plainest)
    path = write(module, tmp_path / "x.ckpt")
    torch.save((example(module.net), module(example(module.net)).detach()), tmp_path / "pair.pt")
    code = f"""
    import sys; sys.path[:0] = {[os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]!r}
    import torch; torch.set_num_threads(1)
    from test_surgery_checkpoint import Plainest
    from gflow_pl.surgery import load_from_checkpoint
    x, y = torch.load({str(tmp_path / "pair.pt")!r})
    assert torch.equal(load_from_checkpoint(Plainest, {str(path)!r}).eval()(x), y)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
