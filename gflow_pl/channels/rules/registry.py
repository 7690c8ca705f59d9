"""The table: op name to its rule."""

from __future__ import annotations

from gflow_pl.channels.rules.elementwise import ELEMENTWISE
from gflow_pl.channels.rules.layout import LAYOUT
from gflow_pl.channels.rules.operator_call import Rule
from gflow_pl.channels.rules.products import PRODUCTS
from gflow_pl.channels.rules.reductions import REDUCTIONS
from gflow_pl.channels.rules.views import VIEWS

__all__ = ["RULES"]

RULES: dict[str, Rule] = {**ELEMENTWISE, **REDUCTIONS, **PRODUCTS, **VIEWS, **LAYOUT}
