"""CUDA graphs on a CPU: what is recorded computes nothing, a replay does the same to the same tensors and calls no Python.

Stands in for `torch` in a script. It shows whether a recorded run is the run that was meant: no value of Python's or of the
host's frozen in the graph, no update lost or made twice, new draws at each replay. It knows nothing of streams and kernels.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

WAITS_FOR_THE_DEVICE = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default}


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
        assert operator not in WAITS_FOR_THE_DEVICE, f"{operator} cannot be recorded"
        changes = operator._schema.is_mutable
        result = (args[0] if operator._schema.returns else None) if changes else operator(*args, **(kwargs or {}))
        if not operator.is_view:
            call = args, kwargs or {}, None if changes else result
            self.calls.append((operator, *tree_map_only(torch.Tensor, torch.Tensor.detach, call)))  # the same memory
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
