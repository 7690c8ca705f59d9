"""Runs a model's forward on stand-ins of its tensors, at their own or at smaller shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.shape_cache import Shapes
from gflow_pl.common.attention import attention_fast_path_disabled
from gflow_pl.common.nested import exhaust_iterators, map_tensors
from gflow_pl.common.snapshot import ModuleSnapshot, restored_afterwards

__all__ = ["Stage"]

Enter = Callable[[str, nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]
Leave = Callable[[str, nn.Module, Any], Any]


@dataclass(eq=False)
class Stage:
    """A model and its inputs, ready to be run so that no trace is left.

    Attributes:
        model: The network.
        args: Positional arguments of the forward.
        meta: Whether stand-ins and inputs live on the meta device, so that nothing is computed.
        doubled: Whether inputs that hold one example are doubled (train-mode batch norm refuses one value a channel).
        num_examples: Examples in the inputs as they are run.
        modules: Every module under its first name.
        tensors: Every parameter and buffer under its first name.
    """

    model: nn.Module
    args: tuple[Any, ...]
    meta: bool
    doubled: bool

    def __post_init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.shapes = Shapes()
        self.modules = dict(self.model.named_modules())
        self.tensors = {**self._own("_parameters"), **self._own("_buffers")}
        lazy = next((name for name, tensor in self.tensors.items() if is_lazy(tensor)), None)
        if lazy is not None:
            raise ValueError(
                f"trace_channels: '{lazy}' has no shape yet; run the network once, so that its lazy layers are made."
            )
        self._whole: dict[str, Tensor] = {}
        self._names = {id(module): name for name, module in self.modules.items()}
        # scripted parts keep their tensors out of Python's reach; they are swapped as they come by
        self.open_modules = [m for m in self.modules.values() if not isinstance(m, torch.jit.ScriptModule)]
        self._snapshots = [ModuleSnapshot(module) for module in self.open_modules]
        self.args = map_tensors(self.args, self._prepared)
        self.num_examples = next((x.shape[0] for x in self.inputs if x.ndim), 1) or 1

    def _own(self, kind: str) -> dict[str, Tensor]:
        """Parameters or buffers, a tied one under its first name: what torch lists, without a walk of its own for each."""
        seen: dict[int, str] = {}
        found: dict[str, Tensor] = {}
        for prefix, module in self.modules.items():
            for leaf, tensor in getattr(module, kind).items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if tensor is not None and seen.setdefault(id(tensor), name) == name:
                    found[name] = tensor
        return found

    def _prepared(self, value: Tensor) -> Tensor:
        value = value.detach()
        if self.doubled and value.ndim and value.shape[0] == 1:
            value = torch.cat([value, value])
        value = torch.empty_like(value, device="meta") if self.meta else value.clone()
        self.inputs.append(value)
        return value

    def stand_ins(self, keep: Mapping[str, Mapping[int, Labels]] | None = None) -> dict[int, Tensor]:
        """A tensor to run with in place of every parameter and buffer, by the id of the real one.

        Args:
            keep: Tensor to dim to the positions left of it; what is not named stays whole.
        """
        made = {}
        for name, tensor in self.tensors.items():
            left = keep.get(name) if keep else None
            if left is None and self.meta:
                # nothing is written into it: one will do for all forwards
                if name not in self._whole:
                    self._whole[name] = self._stand_in(tensor)
                made[id(tensor)] = self._whole[name]
            else:
                made[id(tensor)] = self._stand_in(tensor, left)
        return made

    def _stand_in(self, tensor: Tensor, left: Mapping[int, Labels] | None = None) -> Tensor:
        if self.meta:
            shape = list(tensor.shape)
            for dim, index in (left or {}).items():
                shape[dim] = len(index)
            own = torch.empty(shape, dtype=tensor.dtype, device="meta")
        else:
            own = tensor.detach().clone()
            for dim, index in (left or {}).items():
                own = own.index_select(dim, torch.from_numpy(index).to(own.device))
        return nn.Parameter(own, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own

    def _real_tensors(self) -> list[Tensor]:
        """What a forward on real tensors may write into: buffers, and tensors that modules keep as plain attributes."""
        plain = [tensor for snapshot in self._snapshots for tensor in snapshot.tensors]
        return list({id(tensor): tensor for tensor in (*self.model.buffers(), *plain)}.values())

    @contextmanager
    def set(self, stand_ins: Mapping[int, Tensor], training: bool) -> Iterator[None]:
        """Inside the block the model holds the stand-ins and runs in the given mode; afterwards all is as before.

        Args:
            stand_ins: id of the real tensor to what stands in for it.
            training: Whether every module is in training mode.
        """
        with ExitStack() as stack:
            stack.enter_context(restored_afterwards(self._snapshots, () if self.meta else self._real_tensors()))
            stack.enter_context(_quiet())
            for module in self.open_modules:
                for own in (module._parameters, module._buffers):
                    for name, tensor in own.items():
                        if tensor is not None and id(tensor) in stand_ins:
                            own[name] = stand_ins[id(tensor)]
                # a synchronised batch norm refuses to train without its process group; its rule is the same in both modes
                vars(module)["training"] = training and not isinstance(module, nn.SyncBatchNorm)
            yield

    def run(self, mode: Any, enter: Enter | None, leave: Leave | None) -> Any:
        """One forward under `mode`, with a call back before and after every module where there is one."""
        names = self._names

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            name = names.get(id(module))
            return None if name is None else enter(name, module, args)  # type: ignore[misc]

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            name = names.get(id(module))
            return None if name is None else leave(name, module, output)  # type: ignore[misc]

        hooks = [] if enter is None else [nn.modules.module.register_module_forward_pre_hook(before)]  # type: ignore[arg-type]
        hooks += [] if leave is None else [nn.modules.module.register_module_forward_hook(after)]
        try:
            with torch.no_grad(), mode:
                return exhaust_iterators(self.model(*self.args))
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Compiled submodules run as written, and attention takes the path that is made of plain ops."""
    with attention_fast_path_disabled(), torch.compiler.set_stance("force_eager"):
        yield
