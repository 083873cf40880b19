"""CUDA graphs on a CPU: recording changes no tensor that was there before, a replay runs operators.

Stands in for `torch` in a script. It shows whether a recorded run is the run that was meant: no
number of Python's is frozen in the graph, no update is lost or made twice, each replay draws new
numbers. All tensors are on the CPU: a tensor on the wrong device, a copy from or to the host,
streams, the graph's memory and what an operator requires on a GPU are not seen here.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ATEN = torch.ops.aten
WAIT_FOR_THE_DEVICE = {
    ATEN._local_scalar_dense,  # .item()
    ATEN.lift_fresh,  # torch.tensor()
    ATEN.equal,
    ATEN.nonzero,
    ATEN.masked_select,
}


class Device(str):
    """Tensors are on the CPU, the script sees the device of its `type`."""


class Graph(TorchDispatchMode):
    """Operators in the order of their calls, with the memory they read and write."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.generators = []
        self.replays = 0

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = operator.overloadpacket in WAIT_FOR_THE_DEVICE
        assert not waits, f"{operator} cannot be recorded: it waits for the device"
        if operator._schema.is_mutable:  # an operator in place: a replay will run it
            self.remember(operator, args, kwargs, None)
            return args[0] if operator._schema.returns else None
        result = operator(*args, **kwargs)
        if not operator.is_view:
            self.remember(operator, args, kwargs, result)
            invalidate(result)
        return result

    def remember(self, *call) -> None:
        self.calls.append(tree_map_only(torch.Tensor, torch.Tensor.detach, call))  # same memory

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for operator, args, kwargs, result in self.calls:
            again = operator(*args, **kwargs)
            for tensor, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(tensor, torch.Tensor):
                    tensor.copy_(new)


def invalidate(result) -> None:
    """What is recorded has no value before a replay."""
    for tensor in tree_leaves(result):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)


@contextmanager
def record(graph: Graph, stream=None):
    """Recording draws nothing from a generator, even if it fails."""
    states = [generator.get_state() for generator in graph.generators]
    try:
        with graph:
            yield
    finally:
        for generator, state in zip(graph.generators, states):
            generator.set_state(state)


class Torch:
    """The module torch, but with one GPU; `graphs` are those that were recorded, or tried."""

    def __init__(self):
        self.graphs = []
        self.cuda = SimpleNamespace(
            CUDAGraph=self.new_graph,
            graph=record,
            Stream=object,
            set_stream=lambda stream: None,
            current_stream=object,
            is_available=lambda: True,
        )

    def new_graph(self) -> Graph:
        self.graphs.append(Graph())
        return self.graphs[-1]

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def device(self, name: str) -> Device:
        device = Device("cpu")
        device.type = name
        return device

    def ones(self, *size: int, device: str = "cpu") -> torch.Tensor:
        return torch.ones(*size)
