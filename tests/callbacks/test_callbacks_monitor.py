"""GradientFlowMonitor against plain loops, dense Hessians and the identities of gradient descent."""

import csv
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from small_nets import SmallModule, images, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gflow_pl import GradientFlowMonitor, PruningCallback

LR = 0.05


class Plain(pl.LightningModule):
    """Gradient descent without momentum, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64) * 1.5)
        self.first = nn.Linear(3, 4, dtype=torch.float64)
        self.second = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def points(number: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(number, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long())


def plain(seed: int = 0) -> Plain:
    torch.manual_seed(seed)
    return Plain()


def whole(monitor: GradientFlowMonitor, layer: str = "") -> list[dict]:
    return [row for row in monitor.rows if row["layer"] == layer]


def fit(folder, module, callbacks, data=None, **options) -> pl.Trainer:
    run = trainer(folder, callbacks=callbacks, enable_checkpointing=False, **options)
    run.fit(module, data if data is not None else DataLoader(points(), batch_size=4))
    return run


def test_rows_equal_the_measurements_of_a_plain_loop_at_the_last_step_of_each_epoch(tmp_path) -> None:
    monitor = GradientFlowMonitor()
    fit(tmp_path, plain(), [monitor], max_epochs=3)

    module = plain()
    initial = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = module.configure_optimizers()
    expected = []
    for epoch in range(3):
        for x, y in DataLoader(points(), batch_size=4):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            last = {
                name: (p.detach().clone(), p.grad.clone(), p.detach() - initial[name])
                for name, p in module.named_parameters()
            }
            optimizer.step()
        for layer in ("", "scale", "first", "second"):
            parts = [v for name, v in last.items() if not layer or name.split(".")[0] == layer]
            theta, g, d = (torch.cat([part[i].flatten() for part in parts]) for i in range(3))
            expected.append(
                {
                    "epoch": epoch,
                    "step": 3 * (epoch + 1),
                    "layer": layer,
                    "parameter_norm": theta.norm().item(),
                    "theta_g": (theta @ g).item(),
                    "gradient_norm": g.norm().item(),
                    "distance_from_init": d.norm().item(),
                }
            )
    assert len(monitor.rows) == len(expected) == 12
    for row, other in zip(monitor.rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in other.items():
            assert row[key] == (pytest.approx(value, rel=1e-12, abs=1e-15) if isinstance(value, float) else value), key


def test_theta_g_is_the_rate_at_which_gradient_descent_changes_the_norm(tmp_path) -> None:
    # One full batch an epoch: |theta'|^2 = |theta|^2 - 2 lr theta.g + lr^2 |g|^2, exactly, for any network.
    monitor = GradientFlowMonitor(per_layer=False)
    fit(tmp_path, plain(), [monitor], DataLoader(points(), batch_size=12), max_epochs=6)
    assert [row["layer"] for row in monitor.rows] == [""] * 6
    for row, following in zip(monitor.rows, monitor.rows[1:], strict=False):
        predicted = row["parameter_norm"] ** 2 - 2 * LR * row["theta_g"] + (LR * row["gradient_norm"]) ** 2
        assert following["parameter_norm"] ** 2 == pytest.approx(predicted, rel=1e-12)
    assert monitor.rows[0]["distance_from_init"] == 0
    assert monitor.rows[1]["distance_from_init"] == pytest.approx(LR * monitor.rows[0]["gradient_norm"], rel=1e-10)


def test_theta_h_g_equals_that_of_the_dense_hessian(tmp_path) -> None:
    monitor = GradientFlowMonitor(hessian=True)
    module = plain()
    module.first.bias.requires_grad_(False)
    fit(tmp_path, module, [monitor], max_epochs=1)

    x, y = (tensor[8:] for tensor in points().tensors)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    values = {name: p.detach() for name, p in module.named_parameters()}
    theta = torch.cat([values[name].flatten() for name in names])

    def loss(flat):
        parts = dict(zip(names, flat.split([values[name].numel() for name in names]), strict=True))
        given = {name: part.view(values[name].shape) for name, part in parts.items()}
        return F.cross_entropy(torch.func.functional_call(module, {**values, **given}, x), y)

    product = torch.func.hessian(loss)(theta) @ torch.func.grad(loss)(theta)
    assert whole(monitor)[0]["theta_h_g"] == pytest.approx((theta @ product).item(), rel=1e-10)
    assert whole(monitor)[0]["theta_h_g"] != 0
    by_name = dict(zip(names, (theta * product).split([values[n].numel() for n in names]), strict=True))
    assert whole(monitor, "first")[0]["theta_h_g"] == pytest.approx(by_name["first.weight"].sum().item(), rel=1e-10)
    layers = sum(row["theta_h_g"] for row in monitor.rows if row["layer"])
    assert layers == pytest.approx(whole(monitor)[0]["theta_h_g"], rel=1e-12)


@pytest.mark.parametrize("hessian", [False, True])
def test_the_monitor_does_not_change_training(hessian, tmp_path) -> None:
    def run(callbacks) -> dict:
        pl.seed_everything(1)
        module = SmallModule(dropout=0.3)
        fit(tmp_path, module, callbacks, loader(images()), max_epochs=2)
        return module.state_dict()

    alone, monitored = run([]), run([GradientFlowMonitor(hessian=hessian)])
    for name, tensor in alone.items():
        assert torch.equal(tensor, monitored[name]), name


def test_gradients_are_taken_before_clipping_and_after_accumulation(tmp_path) -> None:
    plainly, clipped, accumulated = (GradientFlowMonitor() for _ in range(3))
    fit(tmp_path, plain(), [plainly], DataLoader(points(), batch_size=12), max_epochs=1)
    fit(tmp_path, plain(), [clipped], DataLoader(points(), batch_size=12), max_epochs=1, gradient_clip_val=1e-3)
    fit(tmp_path, plain(), [accumulated], max_epochs=1, accumulate_grad_batches=3)
    expected = plainly.rows[0]["gradient_norm"]
    assert clipped.rows[0]["gradient_norm"] == pytest.approx(expected, rel=1e-12)
    assert accumulated.rows[0]["gradient_norm"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_unscaled(fused, tmp_path) -> None:
    # A fused optimizer divides by the loss scale within its step, any other finds its gradients divided before.
    class Module(SmallModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR, fused=fused)

    def run(**options) -> float:
        pl.seed_everything(1)
        monitor = GradientFlowMonitor()
        fit(tmp_path, Module(norm=False), [monitor], loader(images(16)), max_epochs=1, **options)
        return monitor.rows[0]["gradient_norm"]

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert run(plugins=[MixedPrecision("16-mixed", "cpu", scaler)]) == pytest.approx(run(), rel=0.02)
    assert scaler.get_scale() == 1024


def test_a_step_that_overflows_is_left_out(tmp_path) -> None:
    class Overflowing(Plain):
        def on_after_backward(self):
            if self.trainer.global_step in overflows:
                self.first.weight.grad.fill_(math.inf)

    def run(num_batches: int) -> dict:
        torch.manual_seed(0)
        monitor = GradientFlowMonitor(num_batches=num_batches)
        fit(tmp_path, Overflowing(), [monitor], max_epochs=1)
        return monitor.rows[0]

    overflows = {2}  # the last of three, after which weights are lost
    assert run(1)["gradient_norm"] is None
    assert math.isfinite(run(2)["gradient_norm"])
    overflows = set()
    assert math.isfinite(run(1)["gradient_norm"])


def test_measurements_are_averaged_over_several_batches(tmp_path) -> None:
    class Still(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def run(num_batches: int, data) -> dict:
        torch.manual_seed(0)
        monitor = GradientFlowMonitor(num_batches=num_batches)
        fit(tmp_path, Still(), [monitor], data, max_epochs=1)
        return monitor.rows[0]

    batches = list(DataLoader(points(), batch_size=4))
    singles = [run(1, DataLoader(TensorDataset(*batch), batch_size=4)) for batch in batches]
    both = run(2, DataLoader(points(), batch_size=4))
    assert both["theta_g"] == pytest.approx((singles[1]["theta_g"] + singles[2]["theta_g"]) / 2, rel=1e-12)
    square = (singles[1]["gradient_norm"] ** 2 + singles[2]["gradient_norm"] ** 2) / 2
    assert both["gradient_norm"] == pytest.approx(math.sqrt(square), rel=1e-12)


class Endless(IterableDataset):
    def __iter__(self):
        return zip(*points().tensors, strict=True)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_epochs": 1}, 3), ({"max_steps": 2, "max_epochs": -1}, 2), ({"limit_train_batches": 1, "max_epochs": 1}, 1)],
    ids=["no length", "max_steps", "limit_train_batches"],
)
def test_the_last_step_is_found_however_an_epoch_ends(options, steps, tmp_path) -> None:
    monitor = GradientFlowMonitor(per_layer=False, hessian=True)
    fit(tmp_path, plain(), [monitor], DataLoader(Endless(), batch_size=4), **options)
    (row,) = monitor.rows
    assert row["step"] == steps
    assert row["gradient_norm"] > 0
    assert row["theta_h_g"] is not None


def test_an_interrupted_epoch_keeps_what_is_known(tmp_path) -> None:
    class Stops(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    monitor = GradientFlowMonitor()
    fit(tmp_path, Stops(), [monitor], max_epochs=1)
    row = monitor.rows[0]
    assert row["gradient_norm"] is None
    assert row["theta_g"] is None
    assert row["parameter_norm"] > 0
    assert row["distance_from_init"] > 0


class TwoOptimizers(Plain):
    """Each optimizer steps with gradients of its own loss, while the other's parameters hold old gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer, factor in zip(self.optimizers(), (1.0, 10.0), strict=True):
            optimizer.zero_grad()
            self.manual_backward(factor * F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.first.parameters(), 0.0), torch.optim.SGD(self.second.parameters(), 0.0)


def test_with_several_optimizers_a_parameter_is_measured_at_the_step_of_its_own(tmp_path) -> None:
    torch.manual_seed(0)
    monitor, reference = GradientFlowMonitor(), GradientFlowMonitor()
    fit(tmp_path, TwoOptimizers(), [monitor], DataLoader(points(), batch_size=12), max_epochs=1)
    fit(tmp_path, plain(), [reference], DataLoader(points(), batch_size=12), max_epochs=1)
    assert whole(monitor, "first")[0]["theta_g"] == pytest.approx(whole(reference, "first")[0]["theta_g"], rel=1e-12)
    twice = 10 * whole(reference, "second")[0]["theta_g"]
    assert whole(monitor, "second")[0]["theta_g"] == pytest.approx(twice, rel=1e-12)
    assert whole(monitor, "scale")[0]["theta_g"] is None  # no optimizer moves it
    assert whole(monitor, "scale")[0]["parameter_norm"] == pytest.approx(1.5)


def test_manual_optimization_needs_a_loss_for_the_hessian(tmp_path) -> None:
    with pytest.raises(ValueError, match="give `loss_fn"):
        fit(tmp_path, TwoOptimizers(), [GradientFlowMonitor(hessian=True)])
    monitor = GradientFlowMonitor(hessian=True, loss_fn=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    fit(tmp_path, TwoOptimizers(), [monitor], max_epochs=1)
    assert monitor.rows[0]["theta_h_g"] is not None


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_curvature_that_is_not_finite_is_none_and_training_continues(factor, tmp_path) -> None:
    def loss_fn(module, batch):
        return factor * module(batch[0]).square().mean() + module.second(torch.tanh(module.first(batch[0]))).sum()

    monitor = GradientFlowMonitor(hessian=True, loss_fn=loss_fn)
    fit(tmp_path, plain(), [monitor], max_epochs=2)
    assert len(whole(monitor)) == 2
    assert [row["theta_h_g"] for row in monitor.rows] == [None] * len(monitor.rows)
    assert all(row["theta_g"] is not None for row in monitor.rows)


def test_the_initial_parameters_shrink_with_the_network(tmp_path) -> None:
    torch.manual_seed(0)
    module = SmallModule()
    initial = {name: p.detach().clone() for name, p in module.named_parameters()}
    monitor, pruning = GradientFlowMonitor(), PruningCallback("magnitude", 0.5, 2, num_samples=16)
    run = trainer(tmp_path, callbacks=[monitor, pruning], max_epochs=4, enable_checkpointing=False)
    run.fit(module, loader(images()))
    kept = {group.name: list(group.kept) for group in pruning.graph.groups}
    assert len(kept["net.4"]) < 12  # a plain conv before the linear layer: its kept filters are rows of both
    conv = monitor.tensors_by_name()["net.4.weight"]
    assert conv.shape == module.net[4].weight.shape
    assert torch.equal(monitor.tensors_by_name()["net.9.weight"], initial["net.9.weight"][:, kept["net.4"]])
    distance = whole(monitor, "net.9")[-1]["distance_from_init"]
    present = (module.net[9].weight - initial["net.9.weight"][:, kept["net.4"]]).norm().item()
    assert 0 < distance == pytest.approx(present, rel=0.3)  # measured one step before the end
    assert [row["epoch"] for row in whole(monitor)] == [0, 1, 2, 3]


def test_a_rewrite_that_does_not_cut_the_initial_parameters_raises(tmp_path) -> None:
    class Shrinks(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.second.weight.set_(pl_module.second.weight[:, :3].clone())
                pl_module.first.weight.set_(pl_module.first.weight[:3].clone())
                pl_module.first.bias.set_(pl_module.first.bias[:3].clone())

    with pytest.raises(ValueError, match="`tensors_by_name\\(\\)` alike"):
        fit(tmp_path, plain(), [Shrinks(), GradientFlowMonitor()], max_epochs=1)


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path) -> None:
    def run(folder, max_epochs, ckpt_path=None) -> GradientFlowMonitor:
        pl.seed_everything(2)
        monitor, pruning = GradientFlowMonitor(), PruningCallback("magnitude", 0.4, 1, epochs=[1], num_samples=16)
        save = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1)
        run = trainer(folder, callbacks=[monitor, pruning, save], max_epochs=max_epochs)
        run.fit(SmallModule(), loader(images()), ckpt_path=ckpt_path, weights_only=True)
        return monitor

    through = run(tmp_path / "through", 4)
    run(tmp_path / "broken", 2)
    (path,) = (tmp_path / "broken").glob("epoch=1*.ckpt")
    resumed = run(tmp_path / "broken", 4, path)
    assert resumed.rows == through.rows
    assert len(whole(resumed)) == 4


def test_every_logger_receives_the_statistics(tmp_path) -> None:
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    monitor = GradientFlowMonitor()
    fit(tmp_path, plain(), [monitor], max_epochs=2, logger=loggers)
    for logger in loggers:
        with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["gradient_flow/theta_g"]]
        assert [float(row["gradient_flow/theta_g"]) for row in rows] == [row["theta_g"] for row in whole(monitor)]
        assert float(rows[1]["gradient_flow/gradient_norm/second"]) == whole(monitor, "second")[1]["gradient_norm"]


def test_every_n_epochs_and_unset_statistics(tmp_path) -> None:
    monitor = GradientFlowMonitor(every_n_epochs=2, distance=False, per_layer=False)
    fit(tmp_path, plain(), [monitor], max_epochs=5)
    assert [row["epoch"] for row in monitor.rows] == [0, 2, 4]
    assert "distance_from_init" not in monitor.rows[0]
    assert not monitor.state_dict()["initial"]


def test_initial_parameters_of_another_network_are_dropped_with_a_warning(tmp_path) -> None:
    monitor = GradientFlowMonitor()
    fit(tmp_path, plain(), [monitor], max_epochs=1)
    with pytest.warns(UserWarning, match="are not of this SmallModule"):
        fit(tmp_path, SmallModule(), [monitor], loader(images(16)), max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_batches": 0}, "`num_batches` must be a whole number >= 1, got 0."),
        ({"every_n_epochs": True}, "`every_n_epochs` must be a whole number >= 1, got True."),
        ({"loss_fn": "mse"}, "`loss_fn` must be a function (module, batch), got 'mse'."),
    ],
)
def test_wrong_options_raise_an_error_of_one_sentence(arguments, sentence) -> None:
    with pytest.raises(ValueError) as error:
        GradientFlowMonitor(**arguments)
    assert sentence in str(error.value)
