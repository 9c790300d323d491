"""Operations that make the host wait for the device, found without a GPU.

Everything runs on the CPU.  Tensors that existed before count as being on the device, and so does what is made of
them or with their `device`; what is made otherwise is on the host.  Code that asks for the kind of device gets "cpu":
what it does on CUDA only is not seen (there `torch.cuda.set_sync_debug_mode("warn")` tells).
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)  # plays the device: unequal to torch.device("cpu"), which is the host
HERE, TORCH = (str(Path(file).parent) + "/" for file in (__file__, torch.__file__))
# Their result, or its shape, is a number that the host must know.
READING = """_local_scalar_dense nonzero masked_select _unique _unique2 unique_dim unique_consecutive
    unique_dim_consecutive equal allclose bincount repeat_interleave _linalg_check_errors""".split()
INDEXING = "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"
TO_HOST = Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__
OF_DATA = torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor


@dataclass(frozen=True)
class Sync:
    operation: str
    where: str  # file:line function; triptych's code, where the call passed through it
    backward: bool = False  # in the gradient of that line


def host_syncs(run: Callable[[], object]) -> list[Sync]:
    """The waits of one call, in order.

    `run` is called twice and the second call counts: an optimiser makes its state in the first.
    """
    host, found = {}, []
    # In this mode a gradient remembers the line that it belongs to.
    with torch.autograd.set_detect_anomaly(True, check_nan=False), _Calls(host, found), _Operations(host, found):
        run()
        found.clear()
        run()
    return found


class _Operations(TorchDispatchMode):
    """Operations on tensors, those of gradients too."""

    def __init__(self, host: dict[int, Any], found: list[Sync]):
        super().__init__()
        self.host, self.found = host, found  # storages made on the host: kept, so that no other gets their address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = any(on_device(x, self.host) for x in given)
        if device and (operation := self._waits(name, args, kwargs)):
            self.found.append(Sync(operation, *_origin()))
        out = func(*args, **kwargs)
        if not device or name == "lift_fresh":  # that is how numbers of Python become a tensor
            self.host |= {_key(x): x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out

    def _waits(self, name: str, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """What to call the wait for this operation; None where there is none."""
        if name in READING and kwargs.get("output_size") is None:
            return name
        if name in INDEXING and on_device(args[0], self.host):
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                return f"{name} by a mask"
            if not all(on_device(x, self.host) for x in indices):
                return f"{name} by indices of the host"
        if name == "copy_" and not any((*args[2:], kwargs.get("non_blocking"))):
            target, source = (on_device(x, self.host) for x in args[:2])
            if target != source:
                return "copy to the device" if target else "copy to the host"
        return None


class _Calls(TorchFunctionMode):
    """Calls that name a device, or whose result leaves torch: on the CPU no operation tells them."""

    def __init__(self, host: dict[int, Any], found: list[Sync]):
        super().__init__()
        self.host, self.found = host, found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = bool(args) and on_device(args[0], self.host)
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if there else torch.device("cpu")
        to, so_far = self._destination(func, args, kwargs), len(self.found)
        moved = to is not None and to != there and bool(args) and isinstance(args[0], Tensor)
        copied = moved or (func in OF_DATA and to and not there) or (func in TO_HOST and there)
        if copied and not kwargs.get("non_blocking"):
            self.found.append(Sync(f"copy to the {'device' if to else 'host'}", *_origin()))
        out = func(*args, **kwargs)
        if func is one_hot and (len(args) > 1 or "num_classes" in kwargs):
            del self.found[so_far:]  # it checks the classes on the CPU only
        if to is None or not isinstance(out, Tensor):
            return out
        if moved and _key(out) == _key(args[0]):
            out = out.clone()
        if to:
            self.host.pop(_key(out), None)
        else:
            self.host[_key(out)] = out.untyped_storage()
        return out

    def _destination(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool | None:
        """Is the result to be on the device?  None: where the arguments are."""
        if func is Tensor.cpu:
            return False
        named = [kwargs.get("device")]
        if func is Tensor.to:
            named += [*args[1:], kwargs.get("other")]
        for x in named:
            if isinstance(x, Tensor):
                return on_device(x, self.host)
            if isinstance(x, str | torch.device):
                return torch.device(x) == DEVICE
        return True if func is Tensor.new_tensor and on_device(args[0], self.host) else None


def on_device(x: Any, host: dict[int, Any]) -> bool:
    return isinstance(x, Tensor) and _key(x) not in host


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _origin() -> tuple[str, bool]:
    """(where, backward) of a Sync."""
    backward = torch._C._current_autograd_node() is not None
    places = [(file, at) for file, at in _stack() if file != __file__ and not file.startswith(TORCH)]
    ours = [(file.removeprefix(HERE), at) for file, at in places if file.startswith(HERE)]
    return ":".join((ours or places or [("?", "0 ?")])[0]), backward


def _stack() -> Iterator[tuple[str, str]]:
    """(file, "line function"), innermost first; a gradient is called by its forward pass."""
    node, frame = torch._C._current_autograd_node(), sys._getframe(2)
    while frame is not None:
        if node is not None and frame.f_code.co_name == "_engine_run_backward":
            for line in reversed(node.metadata.get("traceback_", [])):  # type: ignore[attr-defined]
                if found := re.search(r'File "(.+)", line (\d+), in (.+)', line):
                    yield found[1], f"{found[2]} {found[3]}"
        yield frame.f_code.co_filename, f"{frame.f_lineno} {frame.f_code.co_qualname}"
        frame = frame.f_back
