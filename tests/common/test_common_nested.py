"""Tensors are found and replaced in containers and in the attributes of other objects; iterators are exhausted."""

import dataclasses
import itertools
import threading
from collections import UserDict, namedtuple

import pytest
import torch

from gflow_pl.common.nested import copy_nested, exhaust_iterators, iter_tensors, map_tensors, on_copies

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass(frozen=True)
class Annotated:
    """An object that `torch.utils._pytree` does not know, and whose attributes cannot be set."""

    image: torch.Tensor
    boxes: list


def test_tensors_are_yielded_in_order():
    nested = {"a": [torch.tensor(1), (torch.tensor(2), "text")], "b": Pair(torch.tensor(3), None)}
    assert [x.item() for x in iter_tensors(nested)] == [1, 2, 3]
    in_mapping = [x.item() for x in iter_tensors(UserDict(a=torch.tensor(1), b=[torch.tensor(2)]))]
    assert in_mapping == [1, 2, 1, 2]  # as items of the mapping, and in its attribute `data`
    assert [x.item() for x in iter_tensors(Annotated(torch.tensor(1), [torch.tensor(2)]))] == [1, 2]
    assert list(iter_tensors(torch.nn.Linear(2, 2))) == []


def test_mapped_containers_and_objects_are_copies():
    annotated = Annotated(torch.tensor(1), [torch.tensor(2)])
    nested = {"pair": Pair(annotated, torch.tensor(3)), "name": "text"}
    changed = map_tensors(nested, lambda x: x * 10)
    assert [x.item() for x in iter_tensors(changed)] == [30, 10, 20]  # objects come after the tensors of containers
    assert (type(changed["pair"]), type(changed["pair"].first), changed["name"]) == (Pair, Annotated, "text")
    assert [x.item() for x in iter_tensors(nested)] == [3, 1, 2]
    assert annotated.image.item() == 1


def test_iterators_become_lists():
    nested = {"all": iter([1, 2]), "rest": (x for x in "ab"), "n": 3}
    assert exhaust_iterators(nested) == {"all": [1, 2], "rest": ["a", "b"], "n": 3}
    with pytest.raises(ValueError, match="an iterator with more than 1000 items"):
        exhaust_iterators([itertools.count()])


def test_a_deep_copy_shares_modules_and_keeps_repeated_tensors_one():
    module, x, lock = torch.nn.Linear(2, 2), torch.zeros(2), threading.Lock()
    value = {"x": [x, x], "module": module, "ids": [1]}
    copied = copy_nested(value, torch.Tensor.clone)
    assert copied["module"] is module
    assert copied["x"][0] is copied["x"][1] is not x
    copied["ids"].pop()
    assert value["ids"] == [1]
    # A lock cannot be copied: containers with tensors are copied nevertheless.
    shallow = copy_nested({"x": [x], "lock": lock}, torch.Tensor.clone)
    assert shallow["lock"] is lock
    assert shallow["x"][0] is not x


def test_a_function_of_a_batch_gets_copies():
    def take(model, batch):
        batch["x"].add_(1)
        return batch.pop("x")

    batch = {"x": torch.zeros(1)}
    for _ in range(2):
        assert on_copies(take)(None, batch).item() == 1
    assert batch["x"].item() == 0
