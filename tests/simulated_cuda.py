"""CUDA graphs on a CPU: recording writes to no tensor that was there before, a replay calls no Python, only operators.

Stands in for `torch` in a script. It shows whether a recorded run is the run that was meant: no number of Python's frozen in
the graph, no update lost or made twice, new draws at each replay. All tensors are on the CPU: a tensor on the wrong device, a
copy from or to the host, streams, the graph's memory and what an operator requires on a GPU are not seen here.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ATEN = torch.ops.aten
CANNOT_BE_RECORDED = {ATEN._local_scalar_dense, ATEN.lift_fresh, ATEN.equal, ATEN.nonzero, ATEN.masked_select}


class Device(str):
    """Tensors are on the CPU, the script sees a GPU."""

    type = "cuda"


class Graph(TorchDispatchMode):
    replays = 0  # of all graphs

    def __init__(self):
        super().__init__()
        self.calls, self.generators = [], []

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator.overloadpacket not in CANNOT_BE_RECORDED, f"{operator} waits for the device"
        changes = operator._schema.is_mutable
        result = (args[0] if operator._schema.returns else None) if changes else operator(*args, **(kwargs or {}))
        if not operator.is_view:
            call = args, kwargs or {}, None if changes else result
            self.calls.append((operator, *tree_map_only(torch.Tensor, torch.Tensor.detach, call)))  # the same memory
            for tensor in tree_leaves(call[2]):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.fill_(torch.nan)  # until a replay
        return result

    @torch.no_grad()
    def replay(self) -> None:
        Graph.replays += 1
        for operator, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(operator(*args, **kwargs))):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@contextmanager
def record(graph: Graph, stream=None):
    states = [generator.get_state() for generator in graph.generators]
    with graph:
        yield
    for generator, state in zip(graph.generators, states):
        generator.set_state(state)


class Torch:
    """The module torch, but with one GPU."""

    cuda = SimpleNamespace(
        CUDAGraph=Graph,
        graph=record,
        Stream=object,
        set_stream=lambda stream: None,
        current_stream=object,
        is_available=lambda: True,
        get_device_name=lambda: "a simulated GPU",
    )

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def device(self, name: str) -> Device:
        return Device("cpu")
