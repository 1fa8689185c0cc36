// Products with packed weights; see linear.cpp. The fields' order is that of models/native_linear.py.
#pragma once

#include <cstdint>

extern "C" {

// A weight [outputs, inputs], packed, and what turns its sums into outputs. For int8 `scales` and
// `starts` [outputs, in whole panels] are given, else null; `bias` [outputs, the same] may be null.
// Where it is `gated`, half of each panel are gates, and of them and the other half come half as
// many outputs: silu(gate) * up.
struct PackedLinear {
    int64_t inputs;
    int64_t outputs;
    int64_t gated;
    void* panels;
    float* scales;
    int32_t* starts;
    const float* bias;
};

// Asks whatever must be asked before anything else of this library is called; 0 if it may not be.
int32_t batchllm_may_run();

// How many outputs a panel has.
int32_t batchllm_panel_width();

// How many gates a panel of a gated weight has; its other outputs follow. Weights whose rows are no
// whole number of these bytes cannot be gated; 0: none can.
int32_t batchllm_gated_width();
int32_t batchllm_gated_row_bytes();

// Bytes of memory that batchllm_linear wants for each value of x where that is bfloat16, to widen
// it; may be none.
int32_t batchllm_widened_bytes();

// Bytes of a rounded value of x. Where it is two, the four inputs of an int8 weight's word lie in
// the order 0, 2, 1, 3.
int32_t batchllm_rounded_bytes();

// Packs a weight [outputs, inputs], bfloat16 or float32, of a gated one all gates and then all ups:
// to what `linear` points to, for int8 rounded to [-127, 127]. Its bias is the caller's. Inputs are
// whole words. An output one of whose weights is not finite has a scale that is not a number.
void batchllm_pack(int32_t is_bfloat16, const PackedLinear* linear, const void* weight);

// Rows that lie in strips (strips.h), or none of both.
enum Strips { IN_STRIPS = 1, OUT_STRIPS = 2 };

// Whether a product takes x, and puts its outputs, in strips: in tiles, of whole chunks and panels.
int32_t batchllm_takes_strips(int32_t is_bfloat16, int32_t is_int8, const PackedLinear* linear);

// out [rows, outputs] = x [rows, inputs] . weight' + bias, x and out bfloat16 or float32;
// `widened` [rows, inputs] is memory, see above. `strips`: which of them are in strips.
void batchllm_linear(
    int32_t is_bfloat16, int64_t rows, const PackedLinear* linear, const void* x, void* widened,
    void* out, int32_t strips);

// The same with an int8 weight. x is rounded to eight bits a row; `rounded` [rows to the next whole
// strip, inputs] and `row_scales` [rows] are memory for that.
void batchllm_linear_int8(
    int32_t is_bfloat16, int64_t rows, const PackedLinear* linear, const void* x, void* rounded,
    float* row_scales, void* out, int32_t strips);

// out [rows]: of each row the first largest of those outputs, as bfloat16 or float32 holds them; -1
// where one is not a number, or the largest is infinite. The outputs are not written. Returns
// whether it was done: only matrix tiles do it. `rounded` and `row_scales` are memory for int8.
int32_t batchllm_linear_argmax(
    int32_t is_bfloat16, int32_t is_int8, int64_t rows, const PackedLinear* linear, const void* x,
    void* rounded, float* row_scales, int32_t* out);

}
