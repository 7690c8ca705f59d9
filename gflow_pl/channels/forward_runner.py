"""Run a model's forward on placeholders of its tensors, at full or at smaller shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from gflow_pl.channels.constraints import Labels
from gflow_pl.channels.data_flow import Constants, DataFlow
from gflow_pl.channels.shape_cache import ShapeCache
from gflow_pl.common.attention import attention_fast_path_disabled
from gflow_pl.common.errors import SettingsError
from gflow_pl.common.nested import copy_nested, exhaust_iterators, iter_tensors
from gflow_pl.common.own_width_attention import own_widths
from gflow_pl.common.snapshot import ModuleSnapshot, module_snapshots, restored_afterwards, seed_generators

__all__ = ["Call", "Calls", "ForwardRunner", "NetworkCopies"]

Call = tuple[Callable[..., object], tuple[Any, ...]]
"""A function that runs the model, and its positional arguments."""

Calls = Mapping[bool, Sequence[Call]]
"""For every mode (True = training), the calls that are recorded one after the other."""

PreHook = Callable[[str, nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]
"""Called with a module's name, the module and its arguments; may return other arguments."""
PostHook = Callable[[str, nn.Module, object], object]
"""Called with a module's name, the module and its output; may return another output."""


@dataclass(frozen=True, eq=False)
class NetworkCopies:
    """Copies of parts of a network, whose channels are those of the part that they copy: a teacher, averaged weights.

    Attributes:
        modules: Name of a submodule to the name of the submodule that it copies. Names and shapes of their tensors are
            the same.
        hidden: Modules that are not registered in the network, each with the name of the submodule that it copies.
        tensors: Tensors that are neither parameters nor buffers, each with the name of the tensor that it copies.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    hidden: Sequence[tuple[nn.Module, str]] = ()
    tensors: Sequence[tuple[Tensor, str]] = ()

    def original(self, name: str) -> str:
        """Return the name of the module or tensor that one of the network copies; its own name if it is no copy."""
        for copied, source in self.modules.items():
            if name == copied or name.startswith(f"{copied}."):
                return source + name[len(copied) :]
        return name


@dataclass(eq=False)
class ForwardRunner:
    """A model and its inputs, whose forward can be run any number of times without a change to the model.

    Attributes:
        model: The network.
        args: Positional arguments of the forward. Every run gets a copy: a forward may change what it is given.
        meta: Whether placeholders and inputs are on the meta device, so that nothing is computed.
        doubled: Whether inputs that hold one example are doubled: in training mode, a batch norm refuses a single value
            per channel.
        calls: What is run in every mode in place of the forward; None to run the forward.
        copies: Copies of parts of the network, which count as the same part that is called again.
        whole: Name of a module to the reason why all of its tensors stay whole.
        unread: Name of a module that no call runs to the reason why channels that it could read stay.
        call_number: Number of the call that is running, from 0.
        drawn_modules: For every mode that draws numbers, the modules that not every pass runs.
        inputs: The tensors among the arguments, as the next run passes them to the forward.
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
    calls: Calls | None = None
    copies: NetworkCopies = field(default_factory=NetworkCopies)
    whole: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.call_number, self._training = 0, False
        self.drawn_modules: dict[bool, frozenset[str]] = {}
        self.shape_cache = ShapeCache()
        self._constants: Constants = {}
        self.modules = dict(self.model.named_modules())
        self.tensors = {**self._own("_parameters"), **self._own("_buffers")}
        lazy = next((name for name, tensor in self.tensors.items() if is_lazy(tensor)), None)
        if lazy is not None:
            raise SettingsError(
                f"trace_channels: '{lazy}' has no shape yet; run the network once to initialize its lazy layers."
            )
        # Scripted modules hide their tensors from Python. The dispatch mode replaces these when an operator reads them.
        hidden = [part for module, _ in self.copies.hidden for part in module.modules()]
        every = (*self.modules.values(), *hidden)
        self.accessible_modules = [m for m in every if not isinstance(m, torch.jit.ScriptModule)]
        self._snapshots = _restorable_snapshots(self.model)
        self._names = {id(module): self.copies.original(name) for name, module in self.modules.items()}
        self._further = self._copied_tensors()
        self._whole_placeholders: dict[int, Tensor] = {}
        self.inputs: list[Tensor] = []
        calls = self.calls or {training: [(self.model, self.args)] for training in (True, False)}
        self._prepared = {
            training: [(function, copy_nested(args, self._prepare_input)) for function, args in calls_of_mode]
            for training, calls_of_mode in calls.items()
        }
        self._renew_inputs()

    @property
    def num_examples(self) -> int:
        """Number of examples in the inputs of the call that is running."""
        inputs = iter_tensors(self._calls[self._training][self.call_number][1])
        return next((x.shape[0] for x in inputs if x.ndim), 1) or 1

    def _renew_inputs(self) -> None:
        """Make copies of all arguments for the next run."""
        self.inputs = []

        def copied(value: Tensor) -> Tensor:
            value = value.detach() if self.meta else value.clone()
            self.inputs.append(value)
            return value

        self._calls = {
            training: [(function, copy_nested(args, copied)) for function, args in calls]
            for training, calls in self._prepared.items()
        }

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

    def _copied_tensors(self) -> list[tuple[Tensor, str]]:
        """Return the tensors outside of the network that copy one of it, with the name of that tensor.

        The hidden modules are called by the names of what they copy.
        """
        further = [(tensor, name) for tensor, name in self.copies.tensors if name in self.tensors]
        for hidden, source in self.copies.hidden:
            prefix = f"{source}." if source else ""
            self._names |= {id(m): prefix + name if name else source for name, m in hidden.named_modules()}
            named = (*hidden.named_parameters(), *hidden.named_buffers())
            further += [(tensor, prefix + name) for name, tensor in named if prefix + name in self.tensors]
        return further

    def data_flow(self, placeholders: Mapping[int, Tensor], *, is_recorded: bool) -> DataFlow:
        """Return the data flow of the next pass, see `DataFlow`.

        Args:
            placeholders: id of a real tensor to its placeholder.
            is_recorded: Whether the pass is recorded; if not, it is compared with a record.
        """
        return DataFlow([*placeholders.values(), *self.inputs], self._constants, is_recorded=is_recorded)

    def names(self) -> dict[int, str]:
        """Return the name of every parameter, buffer and copy by the id of the tensor, the first name of tied ones."""
        found = {id(tensor): self.copies.original(name) for name, tensor in reversed(self.tensors.items())}
        return {**found, **{id(tensor): name for tensor, name in self._further}}

    def modules_like(self, name: str) -> list[nn.Module]:
        """Return a module of the network and the copies of it."""
        if not self.copies.modules:
            return [self.modules[name]]
        copied = [module for other, module in self.modules.items() if self.copies.original(other) == name]
        return copied or [self.modules[name]]

    def _prepare_input(self, value: Tensor) -> Tensor:
        value = value.detach()
        if self.doubled and value.ndim and value.shape[0] == 1:
            value = torch.cat([value, value])
        return torch.empty_like(value, device="meta") if self.meta else value.clone()

    def placeholders(self, kept: Mapping[str, Mapping[int, Labels]] | None = None) -> dict[int, Tensor]:
        """Return a placeholder for every parameter and buffer, by the id of the real tensor.

        Args:
            kept: For each tensor name, and for each dimension that shrinks, the positions to keep. All other dimensions
                keep all positions.
        """
        made = {}
        for name, tensor in (*self.tensors.items(), *((name, tensor) for tensor, name in self._further)):
            positions = kept.get(self.copies.original(name)) if kept else None
            if positions is None and self.meta:
                # A meta tensor holds no values that a forward could change: all passes share one.
                if id(tensor) not in self._whole_placeholders:
                    self._whole_placeholders[id(tensor)] = self._placeholder(tensor, {})
                made[id(tensor)] = self._whole_placeholders[id(tensor)]
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
        self._training = training
        with ExitStack() as stack:
            stack.enter_context(restored_afterwards(self._snapshots, () if self.meta else self._writable_tensors()))
            seed_generators(0)  # every pass draws the same numbers, whatever the state of the generators
            # Compiled submodules run as written, and attention calls plain operators.
            stack.enter_context(attention_fast_path_disabled())
            stack.enter_context(own_widths(self.accessible_modules))
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
        """Run the calls of the present mode and return their outputs, with iterators replaced by lists.

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
                return exhaust_iterators(self._run_calls())
        finally:
            for hook in hooks:
                hook.remove()
            self._renew_inputs()

    def run_as_it_is(self) -> None:
        """Run the calls of the present mode without recording anything, with gradients; raises what they raise."""
        try:
            with torch.enable_grad():
                self._run_calls()
        finally:
            self._renew_inputs()

    def _run_calls(self) -> list[object]:
        outputs = []
        for number, (function, args) in enumerate(self._calls[self._training]):
            self.call_number = number
            outputs.append(function(*args))
        return outputs


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
