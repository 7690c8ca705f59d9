"""Measures of activations: which tensor they read, and that their mean is that of a plain loop."""

import weakref

import pytest
import pytorch_lightning as pl
import torch
from importance_nets import class_batches, largest_difference, mixed
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from gflow_pl import PruningCallback, models
from gflow_pl.importance import ActivationImportance, Importance, Tracker, resolve_measure, score_filters


class APoZ(ActivationImportance):
    """Share of the activations that are not zero."""

    name = "apoz"

    def score_activations(self, activations):
        return (activations > 0).to(activations).transpose(0, 1).flatten(1).mean(1)


class HRank(ActivationImportance):
    """Mean rank of the feature maps."""

    name = "hrank"

    def score_activations(self, activations):
        maps = activations[(..., *[None] * (4 - activations.ndim))]
        return torch.linalg.matrix_rank(maps).to(activations).transpose(0, 1).flatten(1).mean(1)


class Mean(ActivationImportance):
    """Mean activation, which differs between any two tensors."""

    name = "mean"

    def score_activations(self, activations):
        return activations.transpose(0, 1).flatten(1).mean(1)


MEASURES = pytest.mark.parametrize("measure", [APoZ(), HRank(), Mean()], ids=lambda measure: measure.name)


def slow_score(measure, maps):
    """The score of one filter, from its activations in single examples."""
    if measure.name == "apoz":
        return sum(sum(float(v) > 0 for v in one.flatten()) / one.numel() for one in maps) / len(maps)
    if measure.name == "hrank":
        ranks = [
            int((torch.linalg.svdvals(one.reshape(*one.shape, *[1] * (2 - one.ndim))) > 1e-9).sum()) for one in maps
        ]
        return sum(ranks) / len(ranks)
    return sum(float(one.sum()) / one.numel() for one in maps) / len(maps)


def slow_scores(measure, activations, *, filters_last=False):
    """The scores of a layer, filter by filter, from its activations for all examples."""
    activations = activations.movedim(-1, 1) if filters_last else activations
    filters = activations.detach().unbind(1)
    return torch.tensor([slow_score(measure, list(maps)) for maps in filters], dtype=torch.float64)


class Various(nn.Module):
    """Layers with every kind of successor; `trace` holds what their activations should be."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.branch, self.branch_norm = nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.act, self.late_norm = nn.ReLU(inplace=True), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.tokens, self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)
        self.double().eval()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.weight, 0.5, 1.5)

    def forward(self, x):
        self.trace = {}
        x = F.relu(self.drop(self.norm(self.first(x))))  # norm, dropout, function
        self.trace["first"] = x.clone()
        branch = self.branch_norm(self.branch(x))  # an addition reads the norm
        self.trace["branch"] = branch.clone()
        branch += x
        x = self.act(self.up(branch))  # in place, then a norm
        self.trace["up"] = x.clone()
        x = self.late_norm(x)
        calls = []
        for _ in range(2):  # two calls of one layer
            x = self.twice(x).clamp(min=0)
            calls.append(x.clone())
        self.trace["twice"] = torch.cat(calls)
        x = F.gelu(self.tokens(x.flatten(2).transpose(1, 2)))  # (examples, positions, filters)
        self.trace["tokens"] = x.clone()
        x = self.hidden(x.mean(1))  # a gate: the product is no known non-linearity, its first reader is
        self.trace["hidden"] = x.sigmoid()
        x = x * self.trace["hidden"]
        x = self.head(x)  # no operator reads it
        self.trace["head"] = x.clone()
        return x


@MEASURES
def test_scores_are_those_of_a_loop_over_filters_and_examples(measure):
    net, batches = Various(), class_batches()
    batches[-1] = (batches[-1][0][:3], batches[-1][1][:3])  # the last batch is shorter: sizes must count
    ours = score_filters(net, measure, batches)
    expected = {}
    for images, _ in batches:
        net(images)
        for layer, activations in net.trace.items():
            expected.setdefault(layer, []).append(activations)
    assert list(ours) == list(expected)
    for layer, parts in expected.items():
        theirs = slow_scores(measure, torch.cat(parts), filters_last=layer == "tokens")
        assert largest_difference(ours[layer], theirs) < 1e-9, layer
        assert ours[layer].dtype == torch.float64
    assert measure.name != "apoz" or 0 < float(ours["first"].min()) < float(ours["first"].max()) < 1


@MEASURES
def test_scores_of_resnet56_are_those_of_a_loop(measure):
    torch.manual_seed(0)
    net = models.resnet56(num_classes=10).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    ours = score_filters(net, measure, [(images, torch.arange(2))])

    seen, handles = {}, []
    names = {module: name for name, module in net.named_modules()}
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            note = lambda m, _x, output: seen.__setitem__(names[m], output.clone())  # noqa: E731
            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        net(images)
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    for layer in layers:
        norm = layer.replace("conv", "bn") if "shortcut" not in layer else layer[:-1] + "1"
        # ReLU follows the first norm of a block (and the stem's); an addition follows the others.
        activations = seen[norm].relu() if layer.endswith("conv1") else seen[norm]
        assert largest_difference(ours[layer], slow_scores(measure, activations)) < 1e-9, layer
    assert largest_difference(ours["linear"], slow_scores(measure, seen["linear"])) < 1e-9
    assert set(ours) == {*layers, "linear"}


class Swish(nn.Module):
    """A custom non-linearity that is a module."""

    def forward(self, x):
        return x * torch.sigmoid(x)


SUCCESSORS = {
    "none": (lambda y: y.flatten(1), lambda y: y),
    "relu": (F.relu, F.relu),
    "relu, in place": (nn.ReLU(inplace=True), F.relu),
    "method": (lambda y: y.relu_(), F.relu),
    "shape and relu": (lambda y: F.relu(y) if y.shape[0] and y.dim() == 4 else y, F.relu),
    "clamp": (lambda y: torch.clamp(y, min=0.0), F.relu),
    "silu": (nn.SiLU(), F.silu),
    "prelu": (nn.PReLU().double(), lambda y: F.leaky_relu(y, 0.25)),
    "custom module": (Swish(), lambda y: y * y.sigmoid()),
    "softmax": (lambda y: y.softmax(1), lambda y: y),
    "softmax module": (nn.Softmax(1), lambda y: y),
    "pooling": (nn.MaxPool2d(2), lambda y: y),
    "identity and relu": (nn.Sequential(nn.Identity(), nn.Dropout(0.3), nn.ReLU()), F.relu),
    "norm function and relu": (lambda y: F.relu(F.layer_norm(y, (5, 5))), lambda y: F.relu(F.layer_norm(y, (5, 5)))),
    "norm and tanh": (nn.Sequential(nn.InstanceNorm2d(4), nn.Tanh()), lambda y: F.instance_norm(y).tanh()),
    "relu and norm": (nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(4)), F.relu),
    "two norms": (nn.Sequential(nn.GroupNorm(2, 4), nn.GroupNorm(1, 4)).double(), lambda y: F.group_norm(y, 2)),
    "addition, in place": (lambda y: torch.relu(y.add_(1)), lambda y: y),
    "addition by operator": (lambda y: torch.relu(y.__iadd__(1)), lambda y: y),
    "addition": (lambda y: torch.relu(y + 1), lambda y: y),
    "concatenation": (lambda y: torch.cat([y, y], 1).relu(), lambda y: y),
    "read twice": (lambda y: y.relu() + y, F.relu),
}


@pytest.mark.parametrize("successor", SUCCESSORS)
def test_the_activations_are_those_behind_the_norm_and_the_non_linearity(successor):
    torch.manual_seed(0)
    follow, expected = SUCCESSORS[successor]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1).double()
            self.follow = follow if isinstance(follow, nn.Module) else None

        def forward(self, x):
            return (self.follow or follow)(self.conv(x))

    net, (images, labels) = Net().eval(), class_batches(1)[0]
    ours = score_filters(net, Mean(), [(images, labels)])
    theirs = slow_scores(Mean(), expected(net.conv(images).detach()))
    assert largest_difference(ours["conv"], theirs) < 1e-9
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_one_dimensional_and_an_unbatched_layer_are_scored_by_position():
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU()).double()
    x = torch.randn(4, 2, 7, dtype=torch.float64)
    assert largest_difference(score_filters(net, Mean(), [x])["0"], net(x).mean((0, 2)).detach()) < 1e-12
    assert largest_difference(score_filters(net, Mean(), [x[0]])["0"], net(x[0]).mean(1).detach()) < 1e-12


def test_a_layer_that_is_not_called_is_not_scored_and_that_is_logged(caplog):
    net = mixed()
    net.unused = nn.Linear(3, 3).double()
    scores = score_filters(net, Mean(), class_batches())
    assert "unused" not in scores
    assert len(scores) == 5
    assert "does not call are not scored: unused" in caplog.text
    with pytest.raises(ValueError, match="calls none of the model's conv and linear layers"):
        score_filters(net, Mean(), class_batches(), loss_fn=lambda model, batch: 0)


def test_any_batch_can_be_scored_on():
    inputs = [images for images, _ in class_batches()]
    expected = score_filters(mixed(), Mean(), class_batches())
    plain = score_filters(mixed(), Mean(), inputs)
    by_loss = score_filters(
        mixed(), Mean(), [{"image": x} for x in inputs], loss_fn=lambda model, batch: model(batch["image"]).sum()
    )
    fewer = score_filters(mixed(), Mean(), inputs, num_samples=7)
    for layer, vector in expected.items():
        assert torch.equal(plain[layer], vector)
        assert torch.equal(by_loss[layer], vector)
        assert torch.equal(fewer[layer], score_filters(mixed(), Mean(), inputs[:2])[layer])


def test_finish_follows_the_mean():
    class Negative(Mean):
        name = "negative"
        is_signed = True

        def finish(self, total):
            return -total

    plain, ours = (score_filters(mixed(), measure, class_batches()) for measure in (Mean(), Negative()))
    assert all(torch.equal(ours[layer], -plain[layer]) for layer in plain)


def test_the_result_of_a_measure_is_checked():
    class Wrong(ActivationImportance):
        name = "wrong"

        def score_activations(self, activations):
            return activations.mean((2, 3))

    with pytest.raises(
        ValueError, match=r"'wrong': `score_activations` must return one number .* \(4,\), got \(6, 4\)"
    ):
        score_filters(mixed(), Wrong(), class_batches())

    class Plain(Importance):
        name, statistic = "plain", "activation"

        def summand(self, theta, flow):
            return flow

    with pytest.raises(ValueError, match="must be a subclass of ActivationImportance"):
        resolve_measure(Plain())
    with pytest.raises(ValueError, match="'mean' needs `batches`, got None"):
        score_filters(mixed(), Mean())
    with pytest.raises(ValueError, match="`batches` is empty"):
        score_filters(mixed(), Mean(), [])


def test_half_precision_activations_are_read_in_float32():
    class Dtype(Mean):
        def score_activations(self, activations):
            assert activations.dtype == torch.float32
            return super().score_activations(activations)

    scores = score_filters(mixed().bfloat16(), Dtype(), [images.bfloat16() for images, _ in class_batches()])
    assert {vector.dtype for vector in scores.values()} == {torch.float32}


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_and_nothing_loops_over_filters():
    def operators(width):
        net = nn.Sequential(
            nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 9, 3)
        )
        with _Operators() as operators:
            score_filters(net.double(), APoZ(), class_batches())
        return operators.seen

    seen = operators(4)
    assert len(operators(8)) == len(seen)
    assert not [name for name in seen if "_local_scalar_dense" in name or "item" in name]


def test_only_tensors_that_are_not_read_yet_are_kept():
    """The peak is that of a plain forward pass, not of all activations."""
    alive, most = [], []

    class Watched(nn.Conv2d):
        def forward(self, x):
            output = super().forward(x)
            alive.append(weakref.ref(output))
            most.append(sum(ref() is not None for ref in alive))
            return output

    net = nn.Sequential(*(layer for _ in range(6) for layer in (Watched(2, 2, 1), nn.ReLU()))).double()
    score_filters(net, APoZ(), class_batches(1))
    assert len(most) == 6
    assert max(most) <= 2


def test_tracked_scores_are_the_average_of_the_scores_of_each_batch():
    tracker, expected = Tracker(APoZ(), alpha=0.7), {}
    for batch in class_batches():
        tracker.update(mixed(), batch=batch)
        for layer, vector in score_filters(mixed(), APoZ(), [batch]).items():
            expected[layer] = 0.7 * vector + 0.3 * expected.get(layer, 0)
    assert all(torch.allclose(tracker.scores()[layer], vector) for layer, vector in expected.items())
    with pytest.raises(ValueError, match="'apoz' needs the `batch`"):
        Tracker(APoZ()).update(mixed())


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = mixed()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Recording(PruningCallback):
    def select(self, graph, scores):
        self.__dict__.setdefault("seen", []).append(dict(scores))
        return super().select(graph, scores)


@pytest.mark.parametrize("track", [False, True])
@MEASURES
def test_a_run_prunes_by_a_measure_of_activations(measure, track, tmp_path):
    images, labels = (torch.cat(parts) for parts in zip(*class_batches(4), strict=True))
    pruning = Recording(
        measure, fraction=0.4, rounds=2, num_samples=24, track=track, epochs=[1, 2] if track else [0, 1]
    )
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=3, precision="64-true", callbacks=[pruning], default_root_dir=tmp_path, **options)
    expected = score_filters(Classifier().net, measure, class_batches(4))
    trainer.fit(Classifier(), DataLoader(TensorDataset(images, labels), batch_size=6))
    assert all(row["filters_removed"] > 0 for row in pruning.rows)
    assert [row["measure"] for row in pruning.rows] == [measure.name] * 2
    scores = {name.removeprefix("net."): vector for name, vector in pruning.seen[0].items()}
    assert scores.keys() == expected.keys()
    if not track:  # before the first step, on all 24 images
        assert all(torch.allclose(scores[layer], vector, rtol=1e-9) for layer, vector in expected.items())
