"""Finding the compiled simulator, which needs neither torch nor OpenMP."""

import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_void_p
from functools import cache

from batchllm.native.kernels import library_path


@cache
def load_simulator() -> Callable[..., int] | None:
    """`batchllm_simulate` of native/src/simulator/simulate.h; None where it was not compiled."""
    path = library_path("simulator")
    if path is None:
        return None
    try:
        function = ctypes.CDLL(str(path)).batchllm_simulate
    except OSError:
        return None
    function.argtypes = [c_void_p] * 4
    function.restype = c_int32
    run: Callable[..., int] = function
    return run
