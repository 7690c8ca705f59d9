"""One harness over the list of measures: every measure does what it declares."""

import inspect
import re
from pathlib import Path

import jaxtyping
import pytest
import torch
from importance_nets import class_batches, mixed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gflow_pl import importance
from gflow_pl.importance import ActivationImportance, Importance, measure_names, resolve_measure, score_filters
from gflow_pl.importance.measures import MEASURES
from gflow_pl.values import Scores

BY_NAME = pytest.mark.parametrize("measure", measure_names())
BY_CLASS = pytest.mark.parametrize("cls", MEASURES)
PAGE = (Path(__file__).parents[2] / "docs" / "measures.md").read_text(encoding="utf-8")


def test_promised_names_and_classes_are_there():
    promised = {
        "magnitude", "mag_based", "loss", "loss_based", "biased_loss", "grasp", "grad_preserve", "biased_loss_tracked",
        "tfo", "fisher", "nvidia", "l1", "bn", "random",
    }  # fmt: skip
    assert promised <= set(measure_names(aliases=True))
    exported = {getattr(importance, name) for name in importance.__all__}
    public = {cls for cls in exported if inspect.isclass(cls) and issubclass(cls, Importance)}
    assert public - {Importance, ActivationImportance} <= set(MEASURES)


def test_no_name_stands_for_two_measures():
    names = measure_names(aliases=True)
    assert len(set(names)) == len(names)


@BY_CLASS
def test_names_and_aliases_lead_to_the_class(cls):
    assert all(type(resolve_measure(name)) is cls for name in (cls.name, *cls.aliases))


@BY_CLASS
def test_a_measure_has_a_docstring_with_its_formula_and_its_source(cls):
    text = vars(cls).get("__doc__") or ""  # not one that is inherited
    summary, _, rest = text.partition("\n")
    assert re.match(r"[A-Z].*[.:]", summary)
    assert text != Importance.__doc__
    if cls.statistic != "noise":
        assert "``" in summary or "``" in rest.partition("References:")[0]
        assert re.search(r"References:.*(19|20)\d\d", text, re.DOTALL)


NEEDS = {"hessian_product": "Hessian products", "activation": "activations", "weights": "weights", "noise": "nothing"}


@BY_CLASS
def test_a_measure_has_a_row_in_the_documentation_with_its_facts(cls):
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in PAGE.splitlines() if line[:1] == "|"
    ]
    (row,) = [row for row in rows if re.match(rf"`{cls.name}`", row[0])]
    name, _, needs, signed, temperature, source = row
    assert re.findall(r"`(\w+)`", name) == [cls.name, *cls.aliases]
    assert needs == NEEDS.get(cls.statistic, "gradients")
    assert signed == ("yes" if cls.is_signed else "no")
    assert temperature == (f"{cls.temperature or 1:g}" if cls.needs_gradients else "-")
    assert source


@BY_NAME
def test_batches_are_needed_exactly_where_they_are_declared(measure):
    if resolve_measure(measure).needs_batches:
        with pytest.raises(ValueError, match="needs `batches`, got None"):
            score_filters(mixed(), measure)
    else:
        unread = iter(class_batches())
        score_filters(mixed(), measure, unread)
        assert len(list(unread)) == 3


@BY_NAME
def test_scores_are_negative_only_if_the_measure_is_signed(measure):
    lowest = min(
        float(vector.min())
        for seed in range(3)
        for vector in score_filters(mixed(seed), measure, class_batches()).values()
    )
    assert (lowest < 0) == resolve_measure(measure).is_signed


@BY_NAME
def test_samples_are_balanced_exactly_where_labels_are_needed(measure):
    (images, labels), *rest = class_batches(3)
    # A sixth image of class 0 in front: balanced sampling takes two of each class and must not see the sixth.
    batches = [(images[labels != 2], labels[labels != 2]), *rest]
    kept = score_filters(mixed(), measure, batches, num_samples=6)
    zero = torch.cat([rest[0][0][rest[0][1] != 2] * 0, rest[0][0][rest[0][1] == 2]])
    order = torch.cat([rest[0][1][rest[0][1] != 2], rest[0][1][rest[0][1] == 2]])
    other = score_filters(mixed(), measure, [batches[0], (zero, order), batches[2]], num_samples=6)
    same = all(torch.allclose(kept[layer], other[layer], rtol=1e-9, atol=0) for layer in kept)
    declared = resolve_measure(measure)
    assert same == (declared.needs_labels or not declared.needs_gradients)


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen, self.devices = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten._efficientzerotensor.default:  # the rate of change of a number, without memory
            self.devices |= {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@BY_NAME
def test_second_derivatives_are_taken_exactly_where_they_are_declared(measure):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mixed()

        def forward(self, x):
            return self.inner(Once.apply(self.inner.conv1.weight.sum() * 0 + x))

    if resolve_measure(measure).needs_hessian:
        with pytest.raises(ValueError, match=r"needs second derivatives.*Once"):
            score_filters(Net(), measure, class_batches())
    else:
        score_filters(Net(), measure, class_batches())


@BY_NAME
def test_nothing_is_read_back_and_nothing_loops_over_filters(measure):
    """No scalar is read in Python, and wide layers need as many operations as narrow ones."""

    def operations(width):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.Tanh(), nn.ConvTranspose2d(width, width, 3), nn.Flatten(),
            nn.Linear(width * 25, 3),
        ).double()  # fmt: skip
        with _Counter() as counter:
            score_filters(net, measure, class_batches(), num_samples=9)
        return counter.seen

    seen = operations(4)
    names = [str(func) for func in seen]
    assert not [name for name in names if "_local_scalar_dense" in name or "item" in name]
    assert len(operations(8)) == len(seen)


@BY_NAME
def test_nothing_is_copied_to_another_device(measure, monkeypatch):
    """Meta tensors have no values, so reading one fails, and a tensor on another device is counted."""
    if not resolve_measure(measure).needs_gradients:
        pytest.skip("there is no batch before the scores")
    net = mixed().to("meta")
    batches = [(images.to("meta"), labels.to("meta")) for images, labels in class_batches()]
    monkeypatch.setattr(Scores, "_first_not_finite", staticmethod(lambda scores: None))  # the finished scores are read
    with _Counter() as counter:
        scores = score_filters(net, measure, batches, balanced=False)
    assert {vector.device.type for vector in scores.values()} == {"meta"}
    assert counter.devices == {"meta"}


def test_the_counter_detects_reads_and_devices():
    with _Counter() as counter:
        torch.ones(1).sum().item()
        torch.ones(1, device="meta")
    assert any("_local_scalar_dense" in str(func) for func in counter.seen)
    assert counter.devices == {"cpu", "meta"}


class Momentum(Importance):
    """A custom measure: the squared sum of theta g."""

    name = "squared_sum"
    statistic = "gradient"

    def summand(self, theta, flow):
        return theta * flow

    def finish(self, total):
        return total.square()


def test_a_custom_measure_is_scored_like_any_other():
    own, tfo = (score_filters(mixed(), m, class_batches()) for m in (Momentum(), "tfo"))
    assert own.measure == "squared_sum"
    assert all(torch.allclose(own[layer], tfo[layer] ** 2) for layer in own)


def from_the_documentation(number):
    """The code block of the page, and what it defines."""
    code = PAGE.split("```python\n")[number].split("```")[0]
    exec(code, found := {})
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    return found


def test_the_measure_that_the_documentation_adds_is_ten_lines_and_runs():
    measure = from_the_documentation(1)["MeanLoss"]()
    scores, loss = (score_filters(mixed(), m, class_batches()) for m in (measure, "loss"))
    assert torch.allclose(scores["hidden"], loss["hidden"] / 4)


def test_the_measure_of_activations_that_the_documentation_adds_is_ten_lines_and_runs():
    net, measure = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), from_the_documentation(2)["APoZ"]()
    batches = [(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)) for _ in range(2)]
    scores = score_filters(net, measure, batches)
    hidden = torch.cat([net[0](x) for x, _ in batches])
    assert torch.allclose(scores["0"], (hidden > 0).float().mean(0))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown measure 'grasp2'. Known: .*grad_preserve.* Did you mean 'grasp'\?"):
        resolve_measure("grasp2")
    with pytest.raises(ValueError, match="must be a name or an Importance object"):
        resolve_measure(3)


def test_the_shapes_in_the_signatures_of_measures_are_checked() -> None:
    """pyproject.toml turns the check on for tests; users do without it."""
    with pytest.raises(jaxtyping.TypeCheckError):
        resolve_measure("magnitude").finish(torch.ones(2, 2))
    with pytest.raises(jaxtyping.TypeCheckError):
        resolve_measure("fisher").summand(torch.ones(2, 3), torch.ones(3, 3))
