// Products of rows with a packed weight: x . weight', for few rows as for many.
//
// The weight lies in panels (panels.h), so that a strip of LINEAR_ROWS rows times a panel keeps its
// sums in registers and reads both operands in order. A thread takes a block of rows that stays in
// the second-level cache times one panel; with few rows there is one block, and every panel is read
// from memory once. In matrix tiles the same panels are multiplied in an order of their own
// (linear_tiles.h).
//
// int8 is symmetric, one scale a row of x and one an output. x is stored with 128 added; what that
// adds to each output's sum is known when the weight is packed, and sums start at its negative
// (`starts`).
#include "linear.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "linear_tiles.h"
#include "panels.h"
#include "products.h"
#include "rounding.h"

namespace {

#if defined(BATCHLLM_TILES)
constexpr int LINEAR_ROWS = 12;  // for what does not fit tiles
#elif defined(__AVX512F__)
constexpr int LINEAR_ROWS = 8;
#else
constexpr int LINEAR_ROWS = 6;
#endif
constexpr int LINE = 16;  // words in a line of the cache
constexpr int64_t ROWS_BYTES = 256 * 1024;  // a block's, beside a panel in the second-level cache
constexpr int AHEAD = 40;                   // groups of a panel are fetched so early
#if defined(BATCHLLM_TILES)
static_assert(PANEL == TILE_PANEL, "the same weight in vectors and in tiles");
#endif

// out[r][.] of R rows and one panel. In: what is multiplied; Out: the outputs.
template <typename In, typename Out, int R>
void multiply_strip(
    const PackedLinear& linear, const typename In::Value* x, const float* row_scales, int64_t panel,
    typename Out::Value* out) {
    typedef typename In::Sums Sums;
    const int64_t first = panel * PANEL;
    const Words* weight = static_cast<const Words*>(linear.panels) +
                          panel * (linear.inputs / In::GROUP) * LINEAR_COLUMNS;
    Sums sums[R][LINEAR_COLUMNS] = {};
    if constexpr (In::SCALED)
        for (int n = 0; n < LINEAR_COLUMNS; n++)
            for (int r = 0; r < R; r++) sums[r][n] = load<Sums>(linear.starts + first + n * W);
    for (int64_t k = 0; k < linear.inputs; k += In::GROUP, weight += LINEAR_COLUMNS) {
        for (int n = 0; n < LINEAR_COLUMNS; n += LINE / W)
            __builtin_prefetch(weight + AHEAD * LINEAR_COLUMNS + n);
        add_products<In>(
            sums, [&](int n) { return load<Words>(weight + n); },
            [&](int r) { return x + r * linear.inputs + k; });
    }
    for (int r = 0; r < R; r++) {
        typename Out::Value* to = out + r * linear.outputs + first;
        for (int n = 0; n < LINEAR_COLUMNS; n++) {
            Floats v = In::floats(sums[r][n]);
            if constexpr (In::SCALED)
                v *= load<Floats>(linear.scales + first + n * W) * row_scales[r];
            if (linear.bias != nullptr) v += load<Floats>(linear.bias + first + n * W);
            const int64_t left = linear.outputs - first - n * W;
            if (left >= W)
                Out::narrow(to + n * W, v);
            else
                for (int64_t i = 0; i < left; i++) to[n * W + i] = Out::put(v[i]);
        }
    }
}

template <typename In, typename Out, int R>
INLINE void multiply_some(
    int rows, const PackedLinear& linear, const typename In::Value* x, const float* row_scales,
    int64_t panel, typename Out::Value* out) {
    if (rows == R)
        multiply_strip<In, Out, R>(linear, x, row_scales, panel, out);
    else if constexpr (R > 1)
        multiply_some<In, Out, R - 1>(rows, linear, x, row_scales, panel, out);
}

// Whether a product is of tiles.
template <typename In>
INLINE bool in_tiles(const PackedLinear& linear) {
#if defined(BATCHLLM_TILES)
    return !std::is_same_v<In, Float32Product> && fits_tiles<In>(linear);
#else
    return false;
#endif
}

INLINE bool in_tiles(bool is_bfloat16, bool is_int8, const PackedLinear& linear) {
    return is_int8 ? in_tiles<Int8Product>(linear)
                   : is_bfloat16 && in_tiles<Bfloat16Product>(linear);
}

INLINE int64_t width_of(const PackedLinear& linear) {
    return linear.gated ? linear.outputs / 2 : linear.outputs;
}

// All rows times all panels; called by every thread of a parallel region. Only tiles take strips.
template <typename In, typename Out>
void multiply(
    const PackedLinear& linear, int64_t rows, const Rows<const typename In::Value>& all,
    const float* row_scales, const Rows<typename Out::Value>& outs, Taken* taken) {
#if defined(BATCHLLM_TILES)
    if constexpr (!std::is_same_v<In, Float32Product>)
        if (in_tiles<In>(linear))
            return multiply_tiles<Outputs<In, Out>>(linear, rows, all, row_scales, outs, taken);
#endif
    const typename In::Value* const x = all.values;
    typename Out::Value* const out = outs.values;
    const int64_t panels = (linear.outputs + PANEL - 1) / PANEL;
    const int64_t strips = (rows + LINEAR_ROWS - 1) / LINEAR_ROWS;
    const int64_t strip_bytes = LINEAR_ROWS * linear.inputs * int64_t(sizeof(*x));
    const int64_t a_block = std::max<int64_t>(1, ROWS_BYTES / strip_bytes);
    const int64_t blocks = (strips + a_block - 1) / a_block;
    // Neighbouring panels' outputs share cache lines, so two go to one thread where there are many.
    const int pair = blocks * panels >= 8 * omp_get_num_threads() ? 2 : 1;
#pragma omp for schedule(dynamic, pair) collapse(2)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t s = strips * block / blocks; s < strips * (block + 1) / blocks; s++) {
                const int64_t begin = rows * s / strips, end = rows * (s + 1) / strips;
                multiply_some<In, Out, LINEAR_ROWS>(
                    int(end - begin), linear, x + begin * linear.inputs, row_scales + begin, panel,
                    out + begin * linear.outputs);
            }
}

template <typename T>
void widen_row(const typename T::Value* row, int64_t size, float* wide) {
    const int64_t whole = size - size % W;
    for (int64_t j = 0; j < whole; j += W) store(wide + j, T::widen(row + j));
    for (int64_t j = whole; j < size; j++) wide[j] = T::get(row[j]);
}

// Rounds all rows, in a parallel region whose threads then call `multiply`. What is rounded lies in
// strips where there are tiles.
template <typename T, typename Multiply>
void round_rows(
    int64_t rows, const PackedLinear& linear, const Rows<const typename T::Value>& x, void* memory,
    float* row_scales, Multiply multiply) {
    typedef Int8Product::Value Value;
    const bool strips = in_tiles<Int8Product>(linear);
    const Rows<Value> rounded(static_cast<Value*>(memory), linear.inputs, strips);
    const Rows<const Value> read(rounded.values, linear.inputs, strips);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) row_scales[i] = round_row<T>(x, i, rounded);
        multiply(read);
    }
}

template <typename T>
Rows<const typename T::Value> inputs_of(const PackedLinear& linear, const void* x, int strips) {
    return {static_cast<const typename T::Value*>(x), linear.inputs, (strips & IN_STRIPS) != 0};
}

template <typename T>
Rows<typename T::Value> outputs_of(const PackedLinear& linear, void* out, int strips) {
    return {static_cast<typename T::Value*>(out), width_of(linear), (strips & OUT_STRIPS) != 0};
}

template <typename T>
void linear_int8(
    int64_t rows, const PackedLinear& linear, const void* x, void* memory, float* row_scales,
    void* out, int strips) {
    Taken taken[MOST_PARTS];
    const auto outs = outputs_of<T>(linear, out, strips);
    round_rows<T>(
        rows, linear, inputs_of<T>(linear, x, strips), memory, row_scales,
        [&](const Rows<const Int8Product::Value>& rounded) {
            multiply<Int8Product, T>(linear, rows, rounded, row_scales, outs, taken);
        });
}

template <typename Product, typename T>
void linear_plain(
    int64_t rows, const PackedLinear& linear, const void* x, void* memory, void* out, int strips) {
    const auto outs = outputs_of<T>(linear, out, strips);
    Taken taken[MOST_PARTS];
#pragma omp parallel
    if constexpr (std::is_same_v<typename Product::Value, typename T::Value>) {
        multiply<Product, T>(
            linear, rows, inputs_of<T>(linear, x, strips), nullptr, outs, taken);
    } else {
        const auto* from = static_cast<const typename T::Value*>(x);
        float* widened = static_cast<float*>(memory);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++)
            widen_row<T>(from + i * linear.inputs, linear.inputs, widened + i * linear.inputs);
        multiply<Product, T>(
            linear, rows, Rows<const float>(widened, linear.inputs, false), nullptr, outs, taken);
    }
}

#if defined(BATCHLLM_TILES)
// Each row's largest, among a thread's outputs, then among all threads'; called by each of them.
template <typename In, typename Out>
void rank_tiles(
    const PackedLinear& linear, int64_t rows, const Rows<const typename In::Value>& x,
    const float* row_scales, std::vector<Largest>& largest, Taken* taken) {
    std::vector<Largest> own(rows);
    multiply_tiles<LargestOutputs<In, Out>>(
        linear, rows, x, row_scales, Rows<Largest>(own.data(), 1, false), taken);
#pragma omp critical(batchllm_rank)
    for (int64_t i = 0; i < rows; i++) largest[i].meet(own[i].value, own[i].index);
}

template <typename T>
void linear_argmax(
    bool is_int8, int64_t rows, const PackedLinear& linear, const void* x, void* memory,
    float* row_scales, int32_t* out) {
    const auto in = inputs_of<T>(linear, x, 0);
    std::vector<Largest> largest(rows);
    Taken taken[MOST_PARTS];
    if (is_int8) {
        round_rows<T>(
            rows, linear, in, memory, row_scales,
            [&](const Rows<const Int8Product::Value>& rounded) {
                rank_tiles<Int8Product, T>(linear, rows, rounded, row_scales, largest, taken);
            });
    } else if constexpr (T::GROUP == 2) {
#pragma omp parallel
        rank_tiles<Bfloat16Product, T>(linear, rows, in, nullptr, largest, taken);
    }
    for (int64_t i = 0; i < rows; i++)
        out[i] = std::isfinite(largest[i].value) ? largest[i].index : -1;
}
#endif

}  // namespace

extern "C" {

int32_t batchllm_may_run() { return may_use_tiles(); }

int32_t batchllm_panel_width() { return PANEL; }

#if defined(BATCHLLM_TILES)
int32_t batchllm_gated_width() { return TILE_PANEL / 2; }
int32_t batchllm_gated_row_bytes() { return TILE_BYTES; }
#else
int32_t batchllm_gated_width() { return 0; }
int32_t batchllm_gated_row_bytes() { return 0; }
#endif

int32_t batchllm_widened_bytes() {
    return std::is_same_v<Bfloat16Product::Value, Bfloat16::Value> ? 0 : sizeof(float);
}

int32_t batchllm_rounded_bytes() { return sizeof(Int8Product::Value); }

void batchllm_linear(
    int32_t is_bfloat16, int64_t rows, const PackedLinear* linear, const void* x, void* widened,
    void* out, int32_t strips) {
    (is_bfloat16 ? linear_plain<Bfloat16Product, Bfloat16> : linear_plain<Float32Product, Float32>)(
        rows, *linear, x, widened, out, strips);
}

void batchllm_linear_int8(
    int32_t is_bfloat16, int64_t rows, const PackedLinear* linear, const void* x, void* rounded,
    float* row_scales, void* out, int32_t strips) {
    (is_bfloat16 ? linear_int8<Bfloat16> : linear_int8<Float32>)(
        rows, *linear, x, rounded, row_scales, out, strips);
}

int32_t batchllm_takes_strips(int32_t is_bfloat16, int32_t is_int8, const PackedLinear* linear) {
    const int64_t chunk = is_bfloat16 ? Rows<uint16_t>::CHUNK : Rows<float>::CHUNK;
    const bool whole = linear->inputs % chunk == 0 && width_of(*linear) % chunk == 0;
    return in_tiles(is_bfloat16, is_int8, *linear) && whole && linear->outputs % PANEL == 0;
}

int32_t batchllm_linear_argmax(
    int32_t is_bfloat16, int32_t is_int8, int64_t rows, const PackedLinear* linear, const void* x,
    void* rounded, float* row_scales, int32_t* out) {
#if defined(BATCHLLM_TILES)
    const bool fits = in_tiles(is_bfloat16, is_int8, *linear);
    if (fits)
        (is_bfloat16 ? linear_argmax<Bfloat16> : linear_argmax<Float32>)(
            is_int8, rows, *linear, x, rounded, row_scales, out);
    return fits;
#else
    return 0;
#endif
}

}
