// What kernels are written in: the same names stand for PTX under nvcc (device_ptx.h) and for
// functions of the host elsewhere (emulation.h), so that one source is compiled both ways.
#pragma once

#include <cstdint>
#include <type_traits>

namespace batchllm {

// An array in device memory as Python hands it over. Only the emulation looks at `size`.
template <typename T>
struct Global;

constexpr int kWarpSize = 32;

}  // namespace batchllm

#ifdef __CUDACC__
#include "device_ptx.h"
#else
#include "emulation.h"
#endif
