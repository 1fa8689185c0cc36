// Row-wise operations on [rows, size] arrays of bfloat16 or float32; see elementwise.cpp.
#pragma once

#include <cstdint>

extern "C" {

// Where there is no delta, nothing is added, and without a weight nothing is normed. `strips`:
// delta and normed are in strips (strips.h), of whole chunks.
void batchllm_add_rms_norm(
    int32_t is_bfloat16, int64_t rows, int64_t size, float epsilon, void* hidden,
    const void* delta, const void* weight, void* normed, int32_t strips);
void batchllm_silu_and_multiply(
    int32_t is_bfloat16, int64_t rows, int64_t size, const void* gate_up, void* out);
void batchllm_argmax(
    int32_t is_bfloat16, int64_t rows, int64_t size, const void* values, int32_t* out);

}
