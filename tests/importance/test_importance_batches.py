"""The examples that filters are scored on."""

import logging
import weakref
from dataclasses import dataclass

import pytest
import torch
from importance_nets import class_batches, largest_difference, mixed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gflow_pl.common.nested import map_tensors
from gflow_pl.importance import batches, measure_names, resolve_measure, score_filters
from gflow_pl.importance.batches import balanced_sample, batch_size, labels_of, take_whole, to_device
from gflow_pl.importance.reduction import Ranks


def counted(batches, drawn):
    for batch in batches:
        drawn.append(batch)
        yield batch


def same(ours, theirs):
    return all(largest_difference(ours[layer], theirs[layer]) < 1e-9 for layer in theirs)


@pytest.mark.parametrize(("num_samples", "expected"), [(1, 1), (6, 1), (7, 2), (12, 2), (1000, 5), (None, 5)])
def test_whole_batches_are_drawn_until_the_number_is_reached_and_none_beyond(num_samples, expected):
    drawn = []
    ours = score_filters(mixed(), "loss", counted(class_batches(5), drawn), num_samples=num_samples)
    assert len(drawn) == expected
    assert same(ours, score_filters(mixed(), "loss", class_batches(5)[:expected]))


def test_a_balanced_sample_is_the_first_n_of_each_class_in_order():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 1, 1, 0, 2, 1, 2])
    numbers = torch.arange(12.0)
    batches = [(numbers[i : i + 4], labels[i : i + 4]) for i in range(0, 12, 4)]
    drawn = []
    sample = balanced_sample(counted(batches, drawn), 6, 3, Ranks(), torch.device("cpu"))
    assert torch.cat([x for x, _ in sample]).tolist() == [0, 1, 3, 4, 5, 6]
    assert [len(x) for x, _ in sample] == [4, 2]
    assert len(drawn) == 2  # full after the second batch: the third is not drawn
    everything = balanced_sample(batches, None, 3, Ranks(), torch.device("cpu"))
    assert torch.cat([y for _, y in everything]).bincount().tolist() == [4, 4, 4]


def test_the_order_of_a_balanced_sample_and_the_cuts_into_batches_do_not_matter():
    images, labels = (torch.cat(parts) for parts in zip(*class_batches(4), strict=True))
    first = [torch.cat([(labels == c).nonzero().flatten()[:3] for c in range(3)])]
    by_class = [(images[first[0]], labels[first[0]])]
    ours = score_filters(mixed(), "grasp", class_batches(4), num_samples=11)  # 11 // 3 = 3 of each class
    assert same(ours, score_filters(mixed(), "grasp", by_class))


def test_a_class_that_is_too_small_is_named():
    batches = [(images[labels != 1], labels[labels != 1]) for images, labels in class_batches()]
    with pytest.raises(ValueError, match=r"each of 3 classes needs 4 images, but .* class 1 has 0"):
        score_filters(mixed(), "grasp", batches, num_samples=12)
    with pytest.raises(ValueError, match="class 1 has 0"):
        score_filters(mixed(), "grad_preserve", batches)
    score_filters(mixed(), "grasp", batches, balanced=False)


def test_too_few_samples_for_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"`num_samples` of 2 gives no image to each of 3 classes; .* at least 3"):
        score_filters(mixed(), "grasp", class_batches(), num_samples=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        score_filters(mixed(), "loss", class_batches(), num_samples=0)


@pytest.mark.parametrize("place", [0, 5])
def test_a_label_beyond_the_logits_is_refused(place):
    images, labels = class_batches(1)[0]
    labels = labels.roll(place - labels.tolist().index(2))  # the first of the two that are beyond them
    with pytest.raises(ValueError, match=r"labels must lie in 0..2 .* got 0..7"):
        score_filters(mixed(), "grasp", [(images, torch.where(labels == 2, 7, labels))])


@pytest.mark.parametrize("measure", ["loss", "grasp", "fisher", "biased_loss_tracked"])
def test_no_batch_at_all_is_refused(measure):
    with pytest.raises(ValueError, match="`batches` is empty"):
        score_filters(mixed(), measure, [])


def test_without_labels_whole_batches_are_used_and_that_is_logged(caplog):
    batches = [(images, torch.nn.functional.one_hot(labels, 3).double()) for images, labels in class_batches()]
    with caplog.at_level(logging.INFO, logger="gflow_pl"):
        ours = score_filters(mixed(), "grasp", batches, num_samples=7)
    assert caplog.text.count("not balanced over classes") == 1
    assert same(ours, score_filters(mixed(), "grasp", class_batches()[:2], balanced=False))


def test_a_loss_function_is_used_as_it_is():
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]) / 5, batch[1])

    ours = score_filters(mixed(), "loss", class_batches(), loss_fn=loss, temperature=3.0)
    assert same(ours, score_filters(mixed(), "loss", class_batches(), temperature=5.0))
    ours = score_filters(mixed(), "grasp", class_batches(), loss_fn=loss)
    assert same(ours, score_filters(mixed(), "grasp", class_batches(), temperature=5.0))


def test_logits_can_come_from_any_batch():
    batches = [{"image": images, "label": labels} for images, labels in class_batches()]
    ours = score_filters(
        mixed(), "grasp", batches, logits_fn=lambda model, b: (model(b["image"]), b["label"]), balanced=False
    )
    assert same(ours, score_filters(mixed(), "grasp", class_batches(), balanced=False))
    with pytest.raises(ValueError, match=r"a batch must be \(inputs, targets\), got dict"):
        score_filters(mixed(), "loss", batches)


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match="must be > 0, got 0"):
        score_filters(mixed(), "loss", class_batches(), temperature=0)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("measure", [name for name in measure_names() if resolve_measure(name).needs_gradients])
def test_the_number_of_batches_on_the_device_does_not_grow(measure, balanced, monkeypatch):
    copies, most = [], []

    def copy(tensor, device):
        here = tensor.clone()
        copies.append(weakref.ref(here))
        most.append(sum(copy() is not None for copy in copies))
        return here

    monkeypatch.setattr(batches, "_move", copy)
    score_filters(mixed(), measure, class_batches(12), balanced=balanced)
    passes = 2 if resolve_measure(measure).needs_hessian else 1
    assert len(most) >= 2 * 2 * passes
    assert max(most) <= 2 * 2  # images and labels of the batch that is done with, and of the next


class _Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.waits.append(not kwargs.get("non_blocking", False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("start", "end", "waits"), [("cuda", "cpu", True), ("cpu", "cuda", False)])
def test_only_copies_to_the_cpu_block(start, end, waits):
    """A copy to the CPU that does not block would be read before it has finished."""
    with FakeTensorMode():
        batch = (torch.empty(4, device=start), {"n": torch.empty(4, device=start)})
        with _Copies() as copies:
            moved = to_device(batch, torch.device(end))
    assert moved[1]["n"].device.type == end
    assert copies.waits == [waits, waits]


class Named(dict):
    """A subclass of dict, as some tokenizers return."""


class Listed(list):
    """A subclass of list."""


def test_nested_batches_are_read():
    batch = {"a": [torch.ones(3), (torch.zeros(3, 2), "text")], "n": 4}
    assert batch_size(batch) == 3
    changed = map_tensors(batch, lambda t: t + 1)
    assert changed["a"][1][0].sum() == 6
    assert changed["a"][1][1] == "text"
    assert labels_of((torch.ones(3), torch.arange(2))) is None
    assert labels_of((torch.ones(3), torch.ones(3))) is None
    assert len(list(take_whole([(torch.ones(3),)] * 4, 4))) == 2


def test_batches_of_subclasses_of_dict_and_list_are_moved_and_keep_their_class():
    batch = Named(x=torch.ones(3), more=Listed([torch.zeros(3), "text"]))
    moved = to_device(batch, torch.device("meta"))
    assert (type(moved), type(moved["more"])) == (Named, Listed)
    assert {moved["x"].device.type, moved["more"][0].device.type} == {"meta"}
    assert batch["x"].device.type == batch["more"][0].device.type == "cpu"
    assert moved["more"][1] == "text"


@dataclass
class Images:
    pixels: torch.Tensor
    scale: torch.Tensor


def test_a_balanced_sample_of_objects_is_that_of_their_tensors():
    """Tensors in the attributes of an object are selected and merged like any other."""
    batches = class_batches(4)
    objects = [(Images(images, torch.tensor(1.0)), labels) for images, labels in batches]
    expected = balanced_sample(batches, 9, 3, Ranks(), torch.device("cpu"))
    found = balanced_sample(objects, 9, 3, Ranks(), torch.device("cpu"))
    assert [len(labels) for _, labels in found] == [6, 3]
    for (image, labels), (pixels, same) in zip(found, expected, strict=True):
        assert torch.equal(image.pixels, pixels)
        assert torch.equal(labels, same)
