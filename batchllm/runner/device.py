"""What a runner needs of the device it runs on, beyond tensors: memory, and not having to wait."""

from collections.abc import Callable
from typing import Protocol

import torch

from batchllm.cache.memory import free_memory
from batchllm.errors import UsageError

_OLDEST = (8, 0)  # compute capability: bfloat16 products, and what attention kernels are made for


class Event(Protocol):
    """A place in the order of what the device does."""

    def record(self) -> None:
        """It is here: behind all that the device was given so far."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has got there; not at all if it was never recorded."""
        ...


class Started(Protocol):
    """Work that was given to a side stream."""

    def join(self) -> torch.Tensor:
        """Its result, for what the device is given from here on, which waits for it."""
        ...


class SideStream(Protocol):
    """A second stream of work, beside the one that all else is in."""

    def start(self, call: Callable[[], torch.Tensor]) -> Started:
        """Let the device do what a call gives it, behind all that it was given so far.

        It goes on with what it is given after this, at the same time. What the call made may be
        given up once a later call was started whose work had to wait for its last reader.
        """
        ...


class Device(Protocol):
    """A device that works through what it is given in order, while the host goes on."""

    torch_device: torch.device

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory, uint8 [num_bytes], that the device copies from and to by itself."""
        ...

    def event(self) -> Event:
        """A new event."""
        ...

    def side_stream(self) -> SideStream:
        """A stream beside the main one."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        ...

    def free_memory(self) -> int:
        """Bytes that can still be taken; what torch keeps for later is given back first."""
        ...

    def peak_memory(self, call: Callable[[], object]) -> int:
        """Bytes that a call took at most, beyond what was held before."""
        ...


class CpuDevice:
    """The processor, by torch's own means: everything is done at once. For tests of the runner."""

    torch_device = torch.device("cpu")

    def __str__(self) -> str:
        return "CPU"

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def event(self) -> Event:
        return _Past()

    def side_stream(self) -> SideStream:
        return _AtOnce()

    def synchronize(self) -> None:
        pass

    def free_memory(self) -> int:
        return free_memory()

    def peak_memory(self, call: Callable[[], object]) -> int:
        """Nobody counts it here."""
        call()
        return 0


class CudaDevice:
    """The GPU that torch calls the current one.

    Raises:
        UsageError: it is too old.
    """

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.torch_device)
        self._name, self._total_memory = properties.name, properties.total_memory
        if (properties.major, properties.minor) < _OLDEST:
            raise UsageError(
                f"the GPU ({self._name}) has compute capability "
                f"{properties.major}.{properties.minor}; "
                f"{_OLDEST[0]}.{_OLDEST[1]} is needed; --device cpu runs without it"
            )

    def __str__(self) -> str:
        return f"{self._name} ({self._total_memory / 2**30:.1f} GiB)"

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def event(self) -> Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def side_stream(self) -> SideStream:
        return _CudaSideStream()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def free_memory(self) -> int:
        self.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def peak_memory(self, call: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch_device) - before


class _Past:
    """An event where everything is done at once."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _AtOnce:
    """A side stream where everything is done at once."""

    def start(self, call: Callable[[], torch.Tensor]) -> Started:
        return _Done(call())


class _Done:
    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def join(self) -> torch.Tensor:
        return self._result


class _CudaSideStream:
    """A CUDA stream whose kernels go first: they are few, and the others fill what they leave."""

    def __init__(self) -> None:
        make_stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream  # torch leaves it untyped
        self._stream = make_stream(priority=-1)

    def start(self, call: Callable[[], torch.Tensor]) -> Started:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = call()
            done = self._stream.record_event()
        return _OnSideStream(result, done)


class _OnSideStream:
    def __init__(self, result: torch.Tensor, done: torch.cuda.Event) -> None:
        self._result = result
        self._done = done

    def join(self) -> torch.Tensor:
        torch.cuda.current_stream().wait_event(self._done)
        return self._result
