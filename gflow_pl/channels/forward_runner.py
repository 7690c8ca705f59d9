"""Run a model's forward on placeholders of its tensors, at full or at smaller shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.shape_cache import ShapeCache
from gflow_pl.common.attention import attention_fast_path_disabled
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.nested import exhaust_iterators, map_tensors
from gflow_pl.common.snapshot import ModuleSnapshot, module_snapshots, restored_afterwards, seed_generators

__all__ = ["ForwardRunner"]

PreHook = Callable[[str, nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]
"""Called with a module's name, the module and its arguments; may return other arguments."""
PostHook = Callable[[str, nn.Module, object], object]
"""Called with a module's name, the module and its output; may return another output."""


@dataclass(eq=False)
class ForwardRunner:
    """A model and its inputs, whose forward can be run any number of times without a change to the model.

    Attributes:
        model: The network.
        args: Positional arguments of the forward.
        meta: Whether placeholders and inputs are on the meta device, so that nothing is computed.
        doubled: Whether inputs that hold one example are doubled: in training mode, a batch norm refuses a single value
            per channel.
        num_examples: Number of examples in the inputs.
        inputs: The tensors among the arguments, as they are passed to the forward.
        modules: Every module under its first name.
        tensors: Every parameter and buffer under its first name.
        accessible_modules: The modules whose tensors can be replaced: all but scripted ones.
        shape_cache: Output shapes of operators, which all forward passes share.

    Raises:
        SettingsError: A parameter or buffer is lazy and has no shape yet.
    """

    model: nn.Module
    args: tuple[Any, ...]
    meta: bool
    doubled: bool

    def __post_init__(self) -> None:
        self.shape_cache = ShapeCache()
        self.modules = dict(self.model.named_modules())
        self.tensors = {**self._own("_parameters"), **self._own("_buffers")}
        lazy = next((name for name, tensor in self.tensors.items() if is_lazy(tensor)), None)
        if lazy is not None:
            raise SettingsError(
                f"trace_channels: '{lazy}' has no shape yet; run the network once to initialize its lazy layers."
            )
        # Scripted modules hide their tensors from Python. The dispatch mode replaces these when an operator reads them.
        self.accessible_modules = [m for m in self.modules.values() if not isinstance(m, torch.jit.ScriptModule)]
        self._snapshots = _restorable_snapshots(self.model)
        self._names = {id(module): name for name, module in self.modules.items()}
        self._whole_placeholders: dict[str, Tensor] = {}
        self.inputs: list[Tensor] = []
        self.args = map_tensors(self.args, self._prepare_input)
        self.num_examples = next((x.shape[0] for x in self.inputs if x.ndim), 1) or 1

    def _own(self, kind: str) -> dict[str, Tensor]:
        """Return the parameters or buffers, each tied one under its first name.

        The same as `named_parameters` or `named_buffers`, from the modules that are listed already.
        """
        seen: dict[int, str] = {}
        found: dict[str, Tensor] = {}
        for prefix, module in self.modules.items():
            for leaf, tensor in getattr(module, kind).items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if tensor is not None and seen.setdefault(id(tensor), name) == name:
                    found[name] = tensor
        return found

    def _prepare_input(self, value: Tensor) -> Tensor:
        value = value.detach()
        if self.doubled and value.ndim and value.shape[0] == 1:
            value = torch.cat([value, value])
        value = torch.empty_like(value, device="meta") if self.meta else value.clone()
        self.inputs.append(value)
        return value

    def placeholders(self, kept: Mapping[str, Mapping[int, Labels]] | None = None) -> dict[int, Tensor]:
        """Return a placeholder for every parameter and buffer, by the id of the real tensor.

        Args:
            kept: For each tensor name, and for each dimension that shrinks, the positions to keep. All other dimensions
                keep all positions.
        """
        made = {}
        for name, tensor in self.tensors.items():
            positions = kept.get(name) if kept else None
            if positions is None and self.meta:
                # A meta tensor holds no values that a forward could change: all passes share one.
                if name not in self._whole_placeholders:
                    self._whole_placeholders[name] = self._placeholder(tensor, {})
                made[id(tensor)] = self._whole_placeholders[name]
            else:
                made[id(tensor)] = self._placeholder(tensor, positions or {})
        return made

    def _placeholder(self, tensor: Tensor, kept: Mapping[int, Labels]) -> Tensor:
        if self.meta:
            shape = list(tensor.shape)
            for dim, positions in kept.items():
                shape[dim] = len(positions)
            made = torch.empty(shape, dtype=tensor.dtype, device="meta")
        else:
            made = tensor.detach().clone()
            for dim, positions in kept.items():
                made = made.index_select(dim, torch.from_numpy(positions).to(made.device))
        return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    @contextmanager
    def placeholders_set(self, placeholders: Mapping[int, Tensor], training: bool) -> Iterator[None]:
        """Replace the model's tensors by placeholders for the block; then restore the model and all generators.

        Args:
            placeholders: id of a real tensor to its placeholder.
            training: Whether all modules are in training mode during the block.
        """
        with ExitStack() as stack:
            stack.enter_context(restored_afterwards(self._snapshots, () if self.meta else self._writable_tensors()))
            seed_generators(0)  # every pass draws the same numbers, whatever the state of the generators
            # Compiled submodules run as written, and attention calls plain operators.
            stack.enter_context(attention_fast_path_disabled())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in self.accessible_modules:
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None and id(tensor) in placeholders:
                            dict.__setitem__(tensors, name, placeholders[id(tensor)])  # a subclass may refuse it
                # A synchronized batch norm needs a process group in training mode. It has one rule for both modes.
                vars(module)["training"] = training and not isinstance(module, nn.SyncBatchNorm)
            yield

    def _writable_tensors(self) -> list[Tensor]:
        """Return the tensors that a forward on real tensors may write to: buffers, and plain attributes of modules."""
        plain = [tensor for snapshot in self._snapshots for tensor in snapshot.tensors]
        return list({id(tensor): tensor for tensor in (*self.model.buffers(), *plain)}.values())

    def run(self, mode: TorchDispatchMode, pre_hook: PreHook | None, post_hook: PostHook | None) -> Any:
        """Run the forward once and return its output, with iterators replaced by lists.

        Args:
            mode: The dispatch mode that handles all operators.
            pre_hook: Called before every module, or None.
            post_hook: Called after every module, or None.
        """
        names = self._names

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            name = names.get(id(module))
            return None if name is None or pre_hook is None else pre_hook(name, module, args)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            name = names.get(id(module))
            return None if name is None or post_hook is None else post_hook(name, module, output)

        global_hooks = nn.modules.module
        hooks = [] if pre_hook is None else [global_hooks.register_module_forward_pre_hook(before)]  # type: ignore[arg-type]
        hooks += [] if post_hook is None else [global_hooks.register_module_forward_hook(after)]
        try:
            with torch.no_grad(), mode:
                return exhaust_iterators(self.model(*self.args))
        finally:
            for hook in hooks:
                hook.remove()


def _restorable_snapshots(model: nn.Module) -> list[ModuleSnapshot]:
    """Return a snapshot of every module, after a proof that it can be restored.

    Raises:
        SettingsError: The state of a module cannot be saved or restored. Nothing has been changed.
    """
    try:
        snapshots = module_snapshots(model)
        for snapshot in snapshots:
            snapshot.check()
    except Exception as error:  # an attribute of a foreign class may raise anything
        raise SettingsError(
            f"trace_channels: the state of {type(model).__name__} must be saved before its forward is run, but "
            f"{type(error).__name__}: {error}; remove the attribute that cannot be copied for the time of the trace."
        ) from error
    return snapshots
