// Attention in vectors: the products of a few rows of queries with a pass of keys and values.
#pragma once

#include "attention_state.h"

// Registers for the accumulators of a tile: ROWS x COLUMNS of them, and a few to spare.
#if defined(__AVX512F__)
constexpr int ROWS = 6, COLUMNS = 4;
#elif defined(__AVX2__)
constexpr int ROWS = 6, COLUMNS = 2;
#else
constexpr int ROWS = 4, COLUMNS = 2;
#endif

static_assert(KEYS<Rounded<Bfloat16>> % (W * COLUMNS) == 0, "whole tiles of keys");
static_assert(ROWS <= MOST_ROWS && ROWS <= W, "one number a row fits a vector");

// scores[r][.] of N panels of W keys, for R rows of queries.
template <typename T, int R, int N>
INLINE void multiply_keys(
    const Row<T>* const* queries, const typename T::Value* const* panels, int head_dim,
    Ahead& ahead, float* scores) {
    Floats sums[R][N] = {};
    const char *keys = nullptr, *values = nullptr;
    if (!T::ROUNDED) ahead.take(keys, values);  // else it was done while these were widened
    for (int d = 0; d < head_dim; d += T::GROUP) {
        if (keys != nullptr) {
            __builtin_prefetch(keys + d * W * sizeof(typename T::Value));
            __builtin_prefetch(values + d * W * sizeof(typename T::Value));
        }
        add_products<Product<T>>(
            sums, [&](int n) { return load<Words>(panels[n] + d * W); },
            [&](int r) { return queries[r] + d; });
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(scores + r * KEYS<T> + n * W, sums[r][n]);
}

// out[r][first : first + N * W] = keep[r] * itself + weights[r] . values, over `count` keys.
template <typename T, int R, int N>
INLINE void multiply_values(
    const Scratch<T>& scratch, const Pass<T>& pass, int count, Floats keep, int first, float* out) {
    const int head_dim = pass.head_dim;
    const Row<T>* weights = scratch.weights.data();
    out += first;
    Floats sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = load<Floats>(out + r * head_dim + n * W) * keep[r];
    for (int begin = 0; begin < count; begin += pass.step) {
        const typename T::Value* values = scratch.value_parts[begin / W] + first * T::GROUP;
        const int here = std::min(pass.step, count - begin), whole = here - here % T::GROUP;
        for (int k = 0; k < whole; k += T::GROUP, values += head_dim * T::GROUP)
            add_products<Product<T>>(
                sums, [&](int n) { return load<Words>(values + n * W * T::GROUP); },
                [&](int r) { return weights + r * KEYS<T> + begin + k; });
        if (whole == here) continue;
        add_products<Product<T>>(  // the rest of the last group may be anything, even NaN
            sums,
            [&](int n) {
                return T::first_of_group(load<Words>(values + n * W * T::GROUP), here - whole);
            },
            [&](int r) { return weights + r * KEYS<T> + begin + whole; });
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(out + r * head_dim + n * W, sums[r][n]);
}

// Attends R rows of a tile, from `first` on, to the first `count` keys of a pass: row r to the
// first `seen[r]` of them.
template <typename T, int R>
void attend_rows(
    Scratch<T>& scratch, const Pass<T>& pass, int first, int count, const int* seen) {
    const int num_panels = (count + W - 1) / W, head_dim = pass.head_dim;
    float* scores = scratch.scores.data();
    const Row<T>* const* queries = scratch.queries.data() + first;
    int n = 0;
    for (; n + COLUMNS <= num_panels; n += COLUMNS)
        multiply_keys<T, R, COLUMNS>(
            queries, scratch.key_parts + n, head_dim, scratch.ahead, scores + n * W);
    for (; n < num_panels; n++)
        multiply_keys<T, R, 1>(
            queries, scratch.key_parts + n, head_dim, scratch.ahead, scores + n * W);
    const Floats keep = weigh_rows(scratch, pass, first, 0, R, seen, num_panels);
    float* out = scratch.out.data() + int64_t(first) * head_dim;
    int d = 0;
    for (; d + COLUMNS * W <= head_dim; d += COLUMNS * W)
        multiply_values<T, R, COLUMNS>(scratch, pass, count, keep, d, out);
    for (; d < head_dim; d += W) multiply_values<T, R, 1>(scratch, pass, count, keep, d, out);
}

template <typename T, int R>
INLINE void attend_some(
    int rows, Scratch<T>& scratch, const Pass<T>& pass, int first, int count, const int* seen) {
    if (rows == R)
        attend_rows<T, R>(scratch, pass, first, count, seen);
    else if constexpr (R > 1)
        attend_some<T, R - 1>(rows, scratch, pass, first, count, seen);
}

// How a tile is attended, in vectors; the same in matrix tiles is in attention_tiles.h.
template <typename T>
struct InVectors {
    typedef typename T::Value Value;
    static constexpr int MOST = ROWS;  // rows at once
    static constexpr int FEW = 0;      // rows that are better attended with others

    static void begin_thread() {}
    static void end_thread() {}
    // Makes a query's row ready.
    static void put_query(Scratch<T>& scratch, int row, const Value* query, int head_dim) {
        if constexpr (std::is_same_v<Row<T>, Value>) {
            scratch.queries[row] = query;
        } else {
            Row<T>* to = scratch.copied.data() + int64_t(row) * head_dim;
            for (int d = 0; d < head_dim; d += W) store(to + d, T::widen(query + d));
            scratch.queries[row] = to;
        }
    }
    // Makes a pass ready.
    static void open(Scratch<T>& scratch, const Pass<T>& pass) {
        for (int p = 0; p < pass.num_panels(); p++) {
            if constexpr (T::ROUNDED) {
                Value* keys = scratch.keys.data() + p * W * pass.head_dim;
                Value* values = scratch.values.data() + p * W * pass.head_dim;
                widen_part<T>(pass.keys[p], pass.head_dim / 4, W, scratch.ahead, keys);
                widen_part<T>(pass.values[p], W / 4, pass.head_dim, scratch.ahead, values);
                scratch.key_parts[p] = keys, scratch.value_parts[p] = values;
            } else {
                scratch.key_parts[p] = pass.keys[p], scratch.value_parts[p] = pass.values[p];
            }
        }
    }
    static void attend_each(
        Scratch<T>&, const Pass<T>*, const int*, int, int, const int*) {}
    static void attend(
        int rows, Scratch<T>& scratch, const Pass<T>& pass, int first, int count,
        const int* seen) {
        attend_some<T, ROWS>(rows, scratch, pass, first, count, seen);
    }
};
