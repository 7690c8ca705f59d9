"""Every example is pruned by a real Trainer, saved, and loaded in a new process, with bit-identical outputs."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_images import shuffled
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
CASES = [
    ("plain_module", "DigitReader", {}),
    ("torchvision_finetuning", "FineTuner", {"name": "resnet18"}),
    ("torchvision_finetuning", "FineTuner", {"name": "mobilenet_v3_small"}),
    ("timm_model", "TimmClassifier", {"name": "resnet10t"}),
    ("segmentation", "UNet", {}),
    ("autoencoder", "Autoencoder", {"measure": "grasp"}),
    ("autoencoder", "Autoencoder", {"measure": "fisher"}),
    ("gan", "GAN", {}),
    ("activation_measure", "DigitReader", {"measure": "apoz"}),
    ("activation_measure", "DigitReader", {"measure": "hrank"}),
]


def photographs() -> DataLoader:
    """Return a loader of fifty CIFAR-100 images of ten classes, in batches of ten."""
    images, labels = shuffled("train")
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return DataLoader(TensorDataset(inputs, torch.from_numpy(labels)), batch_size=10, shuffle=True)


class FreshProcess:
    """A new process that has imported the package only."""

    def __init__(self) -> None:
        paths = [str(EXAMPLES), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__).parent / "fresh_process.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    def load(self, **job) -> dict:
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the fresh process could not load the file; its error is above"
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def fresh_process():
    process = FreshProcess()
    yield process
    process.close()


@pytest.mark.parametrize(("name", "cls", "options"), CASES, ids=["-".join((n, *o.values())) for n, _, o in CASES])
def test_an_example_is_pruned_saved_and_loaded_in_a_fresh_process(
    name, cls, options, fresh_process, tmp_path, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module(name)
    torch.manual_seed(0)
    module = example.main(data=photographs(), folder=tmp_path, max_epochs=3, **options).eval()

    path = tmp_path / "pruned.ckpt"
    rows = torch.load(path, weights_only=True)["callbacks"]["PruningCallback"]["rows"]
    assert [row["round"] for row in rows] == [1, 2]
    assert all(row["filters_removed"] > 0 for row in rows)
    built = type(module)(**module.hparams)
    assert rows[-1]["parameters"] < sum(p.numel() for p in built.parameters())

    inputs = torch.randn(4, 16) if name == "gan" else photographs().dataset.tensors[0][:4]
    with torch.no_grad():
        expected = module(inputs)
        assert not torch.equal(built.eval()(inputs), expected)
    torch.save(inputs, tmp_path / "inputs.pt")
    job = {"module": name, "cls": cls, "path": str(path), "uses_mixin": name == "segmentation"}
    answer = fresh_process.load(**job, inputs=str(tmp_path / "inputs.pt"), outputs=str(tmp_path / "outputs.pt"))
    assert answer["parameters"] == rows[-1]["parameters"] == sum(p.numel() for p in module.parameters())
    assert torch.equal(torch.load(tmp_path / "outputs.pt", weights_only=True), expected)


def test_every_example_is_run_and_is_in_the_list() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    assert files == {name for name, _, _ in CASES}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}.py`" in listed for name in files)
