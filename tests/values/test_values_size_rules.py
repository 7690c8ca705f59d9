"""Whole numbers of modules that follow from groups, and their plain form in checkpoints."""

import pytest
import torch

from gflow_pl.values import ChannelGraph, ChannelGroup, SizeAttribute, SizeRule
from gflow_pl.values.size_rules import size_rules_as_dict, size_rules_from_dict

PLAIN = {
    "": {"heads": {"base": 0, "per_unit": {"first": 1}}},
    "block:1/a": {
        "splits[0]": {"base": 3, "per_unit": {}},
        "splits[1]": {"base": 1, "per_unit": {"first": 2, "second:1": 1}},
        "width": {"base": 0, "per_unit": {"second:1": 1}},
    },
}
"""As written into checkpoints by every version."""

RULES = {
    SizeAttribute("", "heads"): SizeRule(0, {"first": 1}),
    SizeAttribute("block:1/a", "splits", 0): SizeRule(3),
    SizeAttribute("block:1/a", "splits", 1): SizeRule(1, {"first": 2, "second:1": 1}),
    SizeAttribute("block:1/a", "width"): SizeRule(0, {"second:1": 1}),
}


def group(name: str, size: int) -> ChannelGroup:
    return ChannelGroup(name, "remove", size, tuple(range(size)), 1, (), ())


def test_the_plain_form_in_checkpoints_stays_the_same() -> None:
    assert size_rules_as_dict(RULES) == PLAIN
    assert size_rules_from_dict(PLAIN) == RULES


@pytest.mark.parametrize("name", ["sizes[12]", "x"])
def test_an_element_keeps_its_place(name: str) -> None:
    plain = {"m": {name: {"base": 1, "per_unit": {}}}}
    assert size_rules_as_dict(size_rules_from_dict(plain)) == plain


def test_a_graph_computes_numbers_and_lists_from_the_sizes_of_its_groups() -> None:
    graph = ChannelGraph([group("first", 4), group("second:1", 3)], patches=dict(RULES))
    expected = {"": {"heads": 4}, "block:1/a": {"splits": [3, 12], "width": 3}}
    assert graph.patched_attributes(graph.groups) == expected
    # Elements that no group changes, and that are not listed, are None.
    del graph.patches[SizeAttribute("block:1/a", "splits", 0)]
    assert graph.patched_attributes([group("first", 1), group("second:1", 0)]) == {
        "": {"heads": 1},
        "block:1/a": {"splits": [None, 3], "width": 0},
    }


def test_a_graph_with_size_rules_survives_a_file(tmp_path) -> None:
    graph = ChannelGraph([group("first", 4), group("second:1", 3)], patches=dict(RULES))
    torch.save(graph.as_dict(), tmp_path / "graph.pt")
    loaded = ChannelGraph.from_dict(torch.load(tmp_path / "graph.pt", weights_only=True))
    assert loaded.patches == RULES
    assert loaded.as_dict()["patches"] == PLAIN
