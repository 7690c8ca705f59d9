"""The table: op name to its rule."""

from __future__ import annotations

from gflow_pl.channels.recorder import Rule
from gflow_pl.channels.rules_elementwise import ELEMENTWISE
from gflow_pl.channels.rules_layout import LAYOUT
from gflow_pl.channels.rules_products import PRODUCTS
from gflow_pl.channels.rules_reductions import REDUCTIONS
from gflow_pl.channels.rules_views import VIEWS

__all__ = ["RULES"]

RULES: dict[str, Rule] = {**ELEMENTWISE, **REDUCTIONS, **PRODUCTS, **VIEWS, **LAYOUT}
