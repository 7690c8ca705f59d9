"""Two processes give the scores of one, for every measure."""

import pytest
import torch
import torch.multiprocessing as mp
from importance_nets import class_batches, largest_difference, mixed
from torch import nn

from gflow_pl import select_units, trace_channels
from gflow_pl.importance import ActivationImportance, Tracker, measure_names, resolve_measure, score_filters
from gflow_pl.importance.reduction import Ranks


def average(tensor):
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def options(measure):
    # Three of each class, while a batch holds two: the last batch is used in part.
    return {"num_samples": 9, "seed": 3, "temperature": 2.0}


def halves(batch, rank):
    """Half of a batch; the ranks get different classes, so one has more examples of a balanced sample."""
    images, labels = batch
    order = labels.argsort()
    half = len(labels) // 2
    own = order[rank * half : (rank + 1) * half]
    return images[own], labels[own]


def joined(batch):
    (a, la), (b, lb) = (halves(batch, rank) for rank in (0, 1))
    return torch.cat([a, b]), torch.cat([la, lb])


class ActiveShare(ActivationImportance):
    """A custom measure of activations."""

    name = "active_share"

    def score_activations(self, activations):
        return (activations > 0.1).to(activations).transpose(0, 1).flatten(1).mean(1)


class SometimesCalled(nn.Module):
    """Calls one of its layers only for batches with a positive mean, which one of the two ranks has."""

    def __init__(self):
        super().__init__()
        self.inner = mixed()
        torch.manual_seed(0)
        self.sometimes, self.never = nn.Linear(50, 4).double(), nn.Linear(50, 4).double()

    def forward(self, x):
        if x.mean() > 0:
            self.sometimes(x.flatten(1))
        return self.inner(x)


def scored(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = [halves(batch, rank) for batch in class_batches(5)]
    found = {}
    for measure in measure_names():
        given = {**options(measure), "num_samples": 5, "reduce": average}
        found[measure] = dict(score_filters(mixed(), measure, own, **given))
    found["all"] = dict(score_filters(mixed(), "grasp", own, reduce=average))
    found["unbalanced"] = dict(score_filters(mixed(), "grasp", own, reduce=average, balanced=False))
    found["activation"] = dict(score_filters(mixed(), ActiveShare(), own, reduce=average))
    found["activation, uncalled"] = dict(score_filters(SometimesCalled(), ActiveShare(), own, reduce=average))
    tracker = Tracker("grasp", reduce=average)
    tracker.update(mixed(), batch=own[0])
    found["tracked"] = dict(tracker.scores())
    try:
        score_filters(mixed(), "grasp", own, reduce=average, num_samples=300)
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(scored, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("measure", measure_names())
def test_two_ranks_give_the_scores_of_one_process(by_rank, measure):
    batches = [joined(batch) for batch in class_batches(5)]
    alone = score_filters(mixed(), measure, batches, **options(measure))
    for found in by_rank:
        assert list(found[measure]) == list(alone)
        for layer in alone:
            if resolve_measure(measure).statistic == "noise":
                assert torch.equal(found[measure][layer], alone[layer])
            assert largest_difference(found[measure][layer], alone[layer]) < 1e-9
    # And the decisions that follow from them.
    graph = trace_channels(mixed(), class_batches()[0][0], frozen="expand")
    plans = [select_units(graph, scores, 0.4) for scores in (alone, *(found[measure] for found in by_rank))]
    assert plans[0].num_removed > 2
    assert all(plan.as_dict() == plans[0].as_dict() for plan in plans)


def test_two_ranks_agree_on_unlimited_and_on_unbalanced_samples(by_rank):
    batches = [joined(batch) for batch in class_batches(5)]
    everything = score_filters(mixed(), "grasp", batches)
    whole = score_filters(mixed(), "grasp", batches, balanced=False)
    tracker = Tracker("grasp")
    tracker.update(mixed(), batch=batches[0])
    for found in by_rank:
        for layer in everything:
            assert largest_difference(found["all"][layer], everything[layer]) < 1e-9
            assert largest_difference(found["unbalanced"][layer], whole[layer]) < 1e-9
            assert largest_difference(found["tracked"][layer], tracker.scores()[layer]) < 1e-9


def test_two_ranks_agree_on_a_measure_of_activations(by_rank):
    alone = score_filters(mixed(), ActiveShare(), [joined(batch) for batch in class_batches(5)])
    net, parts = SometimesCalled(), [halves(batch, rank) for batch in class_batches(5) for rank in (0, 1)]
    called = torch.cat([net.sometimes(x.flatten(1)) for x, _ in parts if x.mean() > 0]).detach()
    assert 0 < len(called) < 30
    for found in by_rank:
        assert all(largest_difference(found["activation"][layer], alone[layer]) < 1e-9 for layer in alone)
        sometimes = found["activation, uncalled"]
        assert list(sometimes) == [*(f"inner.{layer}" for layer in alone), "sometimes"]
        assert largest_difference(sometimes["sometimes"], (called > 0.1).double().mean(0)) < 1e-9


def test_both_ranks_raise_for_a_class_that_is_too_small(by_rank):
    assert all("each of 3 classes needs 200 images" in found["error"] for found in by_rank)


def test_messages_are_sent_in_the_order_of_the_tensors():
    """The order of a set differs between processes, and two ranks would mix up their messages."""
    kinds = [torch.float32, torch.float64]
    for order in (kinds, kinds[::-1]):
        seen = []
        ranks = Ranks(lambda message: seen.append(message.dtype) or message)  # noqa: B023
        ranks.weighted_mean([torch.ones(2, dtype=kind) for kind in order * 2], 4)
        assert seen == order


def test_the_sample_of_the_ranks_is_not_the_sum_of_their_own(by_rank):
    own = [halves(batch, 0) for batch in class_batches(5)]
    alone = score_filters(mixed(), "grasp", own, temperature=2.0, balanced=False)
    assert largest_difference(by_rank[0]["grasp"]["conv1"], alone["conv1"]) > 1e-3
