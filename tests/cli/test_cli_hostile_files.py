"""A file never decides which code runs: hostile checkpoints at every entrance, and damaged ones."""

import io
import random
import sys
import threading
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import gflow_pl
from gflow_pl.cli.app import GflowCLI
from gflow_pl.common.classes_in_files import network_from_file
from gflow_pl.common.errors import SettingsError
from gflow_pl.surgery import load_pruned, save_pruned
from gflow_pl.tasks import ImageClassifier, load_pretrained

HOSTILE = {
    "a shell command": {"class_path": "os.system", "init_args": {"command": "touch {flag}"}},
    "a shell command as a string": "os.system",
    "a process": {"class_path": "subprocess.Popen", "dict_kwargs": {"args": ["touch", "{flag}"]}},
    "code of builtins": {"class_path": "builtins.exec", "init_args": {"source": "open('{flag}', 'w')"}},
    "a module in the working folder": {"class_path": "runs_when_imported.Net"},
    "a class of torch": {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "{flag}", "model": "x"}},
    "a nested class": {
        "class_path": "torchvision.models.resnet18",
        "init_args": {"norm_layer": {"class_path": "os.system", "init_args": {"command": "touch {flag}"}}},
    },
    "weights to fetch": {"class_path": "torchvision.models.resnet18", "init_args": {"weights": "IMAGENET1K_V1"}},
    "weights to fetch, timm": {
        "class_path": "timm.create_model",
        "init_args": {"model_name": "resnet18", "pretrained": 1},
    },
    "a model of a hub": {"class_path": "timm.create_model", "init_args": {"model_name": "hf-hub:someone/model"}},
    "a model of a folder": {"class_path": "timm.create_model", "init_args": {"model_name": "local-dir:/tmp/model"}},
    "a file of weights": {
        "class_path": "timm.create_model",
        "init_args": {"model_name": "resnet18", "checkpoint_path": "weights.pth"},
    },
    "a configuration": {
        "class_path": "timm.create_model",
        "init_args": {"model_name": "resnet18", "pretrained_cfg": {"file": "weights.pth"}},
    },
    "no builder of torchvision": {"class_path": "torchvision.models._api.get_weight", "init_args": {"name": "x"}},
    "a helper of torchvision": {"class_path": "torchvision.models.get_model", "init_args": {"name": "resnet18"}},
    "a class of torchvision": {"class_path": "torchvision.models.ResNet", "init_args": {"block": "x", "layers": [1]}},
    "another room of torchvision": {"class_path": "torchvision.datasets.ImageFolder", "init_args": {"root": "."}},
    "a walk out of torchvision": {"class_path": "torchvision.models.os.system", "init_args": {"command": "ls"}},
    "a class path that is no string": {"class_path": ["os", "system"]},
    "arguments that are no dict": {"class_path": "torchvision.models.resnet18", "init_args": ["x"]},
}


def filled(value, flag):
    if isinstance(value, dict):
        return {key: filled(item, flag) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, flag) for item in value]
    return value.replace("{flag}", str(flag)) if isinstance(value, str) else value


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a module that leaves a flag when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "runs_when_imported.py").write_text(f"open({str(tmp_path / 'flag')!r}, 'w')\nNet = None\n")
    yield tmp_path
    sys.modules.pop("runs_when_imported", None)


def hostile_file(folder: Path, network) -> Path:
    """Write a checkpoint of a classifier whose hyperparameters name something else than its network."""
    path = folder / "hostile.ckpt"
    if not path.exists():
        torch.manual_seed(0)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(ImageClassifier("vgg13", 10))
    trainer.save_checkpoint(path)
    contents = torch.load(path, weights_only=True)
    contents["hyper_parameters"]["network"] = filled(network, folder / "flag")
    torch.save(contents, path)
    return path


ENTRANCES = {
    "load_from_checkpoint of the class": lambda path: ImageClassifier.load_from_checkpoint(path),
    "load_from_checkpoint of the package": lambda path: gflow_pl.load_from_checkpoint(ImageClassifier, path),
    "bytes in memory": lambda path: gflow_pl.load_from_checkpoint(ImageClassifier, io.BytesIO(path.read_bytes())),
    **{
        f"gflow {command} {option}": lambda path, command=command, option=option: GflowCLI(
            [command, option, str(path), "--trainer.accelerator", "cpu"]
        )
        for command, option in [
            ("fit", "--ckpt_path"),
            ("prune", "--ckpt_path"),
            ("test", "--ckpt_path"),
            ("validate", "--ckpt_path"),
            ("predict", "--ckpt_path"),
            ("fit", "--pretrained"),
            ("test", "--pretrained"),
            ("prune", "--model.pretrained"),
            ("finetune", "--model.pretrained"),
        ]
    },
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_description_in_a_file_is_refused(kind, folder):
    modules = set(sys.modules)
    with pytest.raises(SettingsError, match="network"):
        network_from_file(filled(HOSTILE[kind], folder / "flag"), "x.ckpt")
    assert not (folder / "flag").exists()
    assert "runs_when_imported" not in set(sys.modules) - modules


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_refuses_a_hostile_file(entrance, folder):
    refused = 0
    for kind in ("a shell command", "a module in the working folder", "a nested class"):
        path = hostile_file(folder, HOSTILE[kind])
        before = path.read_bytes()
        with pytest.raises((SettingsError, SystemExit), match=r"trust|2"):
            ENTRANCES[entrance](path)
        refused += 1
        assert path.read_bytes() == before
        assert not (folder / "flag").exists()
    assert refused == 3


@pytest.mark.parametrize(
    "network",
    [
        "resnet56",
        "torchvision.models.resnet18",
        {"class_path": "torchvision.models.mobilenet_v3_small", "init_args": {"dropout": 0.1}},
        {"class_path": "torchvision.models.segmentation.fcn_resnet50"},
        {"class_path": "timm.create_model", "init_args": {"model_name": "resnet18", "drop_path_rate": 0.1}},
        {"class_path": "timm.models.resnet18", "init_args": {"pretrained": False}},
    ],
    ids=str,
)
def test_networks_of_known_packages_are_built(network):
    found = network_from_file(network, "x.ckpt")
    if "segmentation" in str(network):
        assert found["init_args"] == {"weights_backbone": None}  # torchvision fetches these weights by default
    else:
        assert found == network


def test_a_trusted_file_is_followed(tmp_path):
    class_path = "torch.nn.Identity"
    path = hostile_file(tmp_path, {"class_path": class_path})
    with pytest.raises(SettingsError, match=r"torch\.nn\.Identity"):
        gflow_pl.load_from_checkpoint(ImageClassifier, path)
    with pytest.raises(
        SettingsError, match="no tensor 'network"
    ):  # it was built, but the weights are of another network
        gflow_pl.load_from_checkpoint(ImageClassifier, path, trust_file=True)
    module = gflow_pl.load_from_checkpoint(ImageClassifier, path, network="vgg13")
    assert type(module.network).__name__ == "VGG"


class _WithBackbone(pl.LightningModule):
    def __init__(self, backbone: dict | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, 2)


def test_a_nested_class_of_another_module_is_refused(tmp_path):
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(_WithBackbone({"layers": [{"class_path": "os.system"}]}))
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    with pytest.raises(SettingsError, match=r"`backbone` names the class 'os\.system'"):
        gflow_pl.load_from_checkpoint(_WithBackbone, tmp_path / "m.ckpt")
    assert gflow_pl.load_from_checkpoint(_WithBackbone, tmp_path / "m.ckpt", backbone=None).hparams.backbone is None
    assert gflow_pl.load_from_checkpoint(_WithBackbone, tmp_path / "m.ckpt", trust_file=True).net is not None


def test_a_module_in_place_of_its_class_is_one_sentence(tmp_path):
    with pytest.raises(SettingsError, match="give the class _WithBackbone"):
        gflow_pl.load_from_checkpoint(_WithBackbone(), tmp_path / "m.ckpt")


# -- damaged files ---------------------------------------------------------------------------------------------------


READERS = {
    "load_pruned": lambda path: load_pruned(nn.Linear(20, 20), path),
    "load_pretrained": lambda path: load_pretrained(nn.Linear(20, 20), path),
    "load_from_checkpoint": lambda path: gflow_pl.load_from_checkpoint(_WithBackbone, path),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_or_a_cut_is_one_sentence(reader, tmp_path):
    """Every damage either is refused in one sentence, or lies in bytes that do not belong to the contents."""
    torch.manual_seed(0)
    path, damaged = tmp_path / "whole.pt", tmp_path / "damaged.pt"
    if reader == "load_from_checkpoint":
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
        trainer.strategy.connect(_WithBackbone())
        trainer.save_checkpoint(path)
    else:
        save_pruned(nn.Linear(20, 20), path)
    data = path.read_bytes()
    draw = random.Random(0)
    reference = torch.load(path, weights_only=True)["state_dict"]
    refused = accepted = 0
    for number in range(60):
        if number % 3:
            position = draw.randrange(len(data) * 8)
            changed = bytearray(data)
            changed[position // 8] ^= 1 << position % 8
        else:
            changed = data[: draw.randrange(len(data))]
        damaged.write_bytes(changed)
        try:
            READERS[reader](damaged)
        except SettingsError as error:
            refused += "\n" not in str(error)
        else:
            accepted += 1
            state = torch.load(damaged, weights_only=True)["state_dict"]
            assert all(torch.equal(state[name], tensor) for name, tensor in reference.items())
    assert refused + accepted == 60
    assert refused >= 40


def test_concurrent_loads_leave_the_class_as_it_was(tmp_path):
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(_WithBackbone())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    failures = []

    def load():
        for _ in range(15):
            try:
                gflow_pl.load_from_checkpoint(_WithBackbone, tmp_path / "m.ckpt")
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert "on_load_checkpoint" not in vars(_WithBackbone)
