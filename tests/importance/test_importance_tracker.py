"""The exponential average of scores over the batches of training."""

import copy
import logging

import pytest
import torch
from importance_nets import class_batches, mixed
from torch import nn
from torch.nn import functional as F

from gflow_pl.importance import Tracker, measure_names, resolve_measure, score_filters


def own_gradients(net, batch):
    """Gradients in evaluation mode, as in `score_filters`."""
    net.eval()
    gradients = torch.autograd.grad(F.cross_entropy(net(batch[0]), batch[1]), list(net.parameters()))
    return dict(zip((name for name, _ in net.named_parameters()), gradients, strict=True))


def track(tracker, batches, net=None):
    net = net or mixed()
    for batch in batches:
        tracker.update(net, own_gradients(net, batch), batch=batch)
    return tracker


@pytest.mark.parametrize("bias", [None, "magnitude"])
@pytest.mark.parametrize("measure", measure_names())
def test_the_average_is_that_of_the_scores_of_each_batch(measure, bias):
    batches = class_batches()
    given = {"bias": bias} if resolve_measure(measure).needs_gradients else {}
    tracker = track(Tracker(measure, alpha=0.7, **given), batches)
    expected: dict[str, torch.Tensor] = {}
    for batch in batches:
        new = score_filters(mixed(), measure, [batch], **given)
        factor = 1 / 0.8 if resolve_measure(measure).is_tracked else 1  # one step of its own average is in it
        expected = {
            layer: 0.7 * new[layer] * factor + 0.3 * expected.get(layer, torch.zeros_like(new[layer])) for layer in new
        }
    ours = tracker.scores()
    assert list(ours) == list(expected)
    assert all(torch.allclose(ours[layer], expected[layer], rtol=1e-9, atol=0) for layer in ours)
    assert tracker.num_updates == 3


@pytest.mark.parametrize("measure", measure_names())
def test_a_saved_tracker_continues_with_the_same_scores(measure, tmp_path):
    through = track(Tracker(measure), class_batches(4))
    first = track(Tracker(measure), class_batches(4)[:2])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Tracker(measure)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    track(second, class_batches(4)[2:])
    assert second.num_updates == 4
    assert all(torch.equal(second.scores()[layer], vector) for layer, vector in through.scores().items())


def test_a_reset_tracker_starts_from_zero():
    tracker = track(Tracker("loss"), class_batches())
    tracker.reset()
    with pytest.raises(ValueError, match="no batch was tracked"):
        tracker.scores()
    track(tracker, class_batches()[:1])
    fresh = track(Tracker("loss"), class_batches()[:1])
    assert all(torch.equal(tracker.scores()[layer], vector) for layer, vector in fresh.scores().items())


def test_weights_are_the_current_ones_so_both_orders_are_possible():
    net, batch = mixed(), class_batches()[0]
    gradients = own_gradients(net, batch)
    before, after = Tracker("tfo", alpha=1.0), Tracker("tfo", alpha=1.0)
    before.update(net, gradients)
    stepped = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in stepped.named_parameters():
            parameter -= 0.1 * gradients[name]
    after.update(stepped, gradients)
    expected = (stepped.hidden.weight * gradients["hidden.weight"]).sum(1).abs()
    assert torch.allclose(after.scores()["hidden"], expected)
    assert not torch.allclose(before.scores()["hidden"], expected)


def test_names_are_those_of_the_gradients_that_are_needed():
    assert Tracker("loss").names(mixed()) == [f"{n}.weight" for n in ("conv1", "grouped", "up", "hidden", "head")]
    assert {"bn1.weight", "bn2.bias", "up.weight", "up.bias"} <= set(Tracker("nvidia").names(mixed()))
    assert Tracker("magnitude").names(mixed()) == Tracker("grasp").names(mixed()) == []


def test_a_layer_without_gradient_is_not_scored_and_that_is_logged_once(caplog):
    net, tracker = mixed(), Tracker("loss")
    gradients = {**own_gradients(net, class_batches()[0]), "grouped.weight": None}
    with caplog.at_level(logging.WARNING, logger="gflow_pl"):
        tracker.update(net, gradients)
        tracker.update(net, gradients)
    assert caplog.text.count("is kept whole: grouped") == 1
    assert list(tracker.scores()) == ["conv1", "up", "hidden", "head"]


def test_missing_arguments_are_refused():
    with pytest.raises(ValueError, match="'loss' needs `gradients`"):
        Tracker("loss").update(mixed())
    with pytest.raises(ValueError, match="'grasp' needs the `batch`"):
        Tracker("grasp").update(mixed())
    with pytest.raises(ValueError, match="none of the layers has a gradient"):
        Tracker("loss").update(mixed(), {})
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 1.5"):
        Tracker("loss", alpha=1.5)
    with pytest.raises(ValueError, match="a saved state holds 'num_updates'"):
        Tracker("loss").load_state_dict({"weight": torch.ones(1)})


def test_the_cost_of_tracking_hessian_measures_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING, logger="gflow_pl"):
        track(Tracker("loss"), class_batches())
        assert not caplog.text
        track(Tracker("grad_preserve"), class_batches())
    assert caplog.text.count("a Hessian-gradient product a tracked step") == 1


def test_a_tracked_batch_costs_one_product_and_the_strategy_is_chosen_once():
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1])

    net, tracker = mixed(), Tracker("grasp", loss_fn=loss)
    for batch in class_batches():
        tracker.update(net, batch=batch)
    assert sizes.count(6) == 2 * 3  # the gradient and the product of each
    assert sizes.index(6) == sizes.count(2) == 3  # all of the choice stands before
    tracker.reset()
    tracker.update(copy.deepcopy(net), batch=class_batches()[0])
    assert sizes.count(2) == 2 * 3


def test_gradients_that_are_not_finite_are_refused_when_scores_are_read():
    net = nn.Linear(3, 2)
    tracker = Tracker("loss")
    tracker.update(net, {"weight": torch.full((2, 3), float("inf"))})
    with pytest.raises(ValueError, match="NaN or infinity"):
        tracker.scores()
