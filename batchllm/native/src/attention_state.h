// A tile of queries on its way through its context: types, memory, the softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "ahead.h"
#include "products.h"
#include "tiles.h"

// What values stored as T are multiplied by.
template <typename T>
using Product = std::conditional_t<std::is_same_v<T, Bfloat16>, Bfloat16Product, Float32Product>;
template <typename T>
using Row = typename Product<T>::Value;

constexpr int KEYS = 256;  // most keys a pass: their scores stay in the first-level cache
#if defined(BATCHLLM_TILES)
constexpr int MOST_ROWS = 2 * TILE_ROWS;  // whose scores are there at once
constexpr int ROOM_ROWS = MOST_ROWS + TILE_ROWS;  // a tile may begin at the last
constexpr int LINES_A_ROW = 16;                   // fetched while a row is weighed
#else
constexpr int MOST_ROWS = W, ROOM_ROWS = W;
#endif

// What a tile attends to at once: up to KEYS tokens of a segment.
template <typename T>
struct Pass {
    typedef typename T::Value Value;
    int count, head_dim;
    float scale;
    const Value* panels[KEYS / W];  // the keys, W tokens each
    int step;                       // the values, so many tokens each
    const Value* values[KEYS / W];

    // The values of a token, and of its group's others.
    const Value* values_of(int token) const {
        return values[token / step] + token % step / T::GROUP * head_dim * T::GROUP;
    }
};

// One thread's memory: the state of a tile, and a few rows' scores against one pass of keys.
template <typename T>
struct Scratch {
    Ahead<T> ahead;
    Lines<float> out, peak, total, scores;
    Lines<Row<T>> weights, copied;
#if defined(BATCHLLM_TILES)
    Lines<float> sums;                               // of one pass
    Lines<Row<T>> values;                            // copied
    const typename T::Value* groups[KEYS / W] = {};  // all values, TILE_VALUES tokens each
#endif
    std::vector<const Row<T>*> queries;  // of each row, where they are or copied to

    Scratch(int rows, int head_dim)
        : ahead(head_dim),
          out(size_t(rows) * head_dim),
          peak(rows),
          total(size_t(rows) * W),
          scores(size_t(ROOM_ROWS) * KEYS),
          weights(size_t(ROOM_ROWS) * KEYS),
          copied(size_t(rows + ROOM_ROWS) * head_dim),  // the last tile of rows may be part-filled
#if defined(BATCHLLM_TILES)
          sums(size_t(ROOM_ROWS) * head_dim),
          values(size_t(KEYS) * head_dim),
#endif
          queries(rows) {}
};

// Scores to weights for `rows` <= W rows from `first` on, row r of which sees `seen[r]` keys; the
// others, up to `num_panels` panels of W, get none. `at`: where their scores and weights begin.
// Returns what the rows' sums so far are to be multiplied by.
template <typename T>
INLINE Floats weigh_rows(
    Scratch<T>& scratch, int first, int at, int rows, const int* seen, int num_panels,
    float scale) {
    Words lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    Floats old{}, peak{};
    for (int r = 0; r < rows; r++) {
        const float* row = scratch.scores.data() + (at + r) * KEYS;
        const int whole = seen[r] / W;
        Floats most = broadcast(-INFINITY);
        for (int p = 0; p < whole; p++) most = largest(most, load<Floats>(row + p * W));
        if (whole * W < seen[r])
            most = lane + whole * W < seen[r] ? largest(most, load<Floats>(row + whole * W)) : most;
        old[r] = scratch.peak[first + r];
        peak[r] = std::max(old[r], largest(most) * scale);
        scratch.peak[first + r] = peak[r];
    }
    const Floats keep = exp2_of_negative(old - peak);
    for (int r = 0; r < rows; r++) {
        const float* row = scratch.scores.data() + (at + r) * KEYS;
        const int whole = seen[r] / W;
        Row<T>* weights = scratch.weights.data() + (at + r) * KEYS;
        float* sums = scratch.total.data() + (first + r) * W;
        Floats total = load<Floats>(sums) * keep[r];
        const auto weigh = [&](int p) {
            return exp2_of_negative<T::COARSE>(load<Floats>(row + p * W) * scale - peak[r]);
        };
        int p = 0;
        for (; p + 2 <= whole; p += 2) {
            const Floats w = weigh(p), next = weigh(p + 1);
            total += w + next;
            Product<T>::put(weights + p * W, w, next);
        }
        for (; p < whole; p++) {
            const Floats w = weigh(p);
            total += w;
            Product<T>::put(weights + p * W, w);
        }
        if (p * W < seen[r]) {
            const Floats w = lane + p * W < seen[r] ? weigh(p) : Floats{};
            total += w;
            Product<T>::put(weights + p++ * W, w);
        }
        for (; p < num_panels; p++) Product<T>::put(weights + p * W, Floats{});
        store(sums, total);
#if defined(BATCHLLM_TILES)  // vectors fetch all beside the keys' products, which take longer
        scratch.ahead.fetch(LINES_A_ROW);
#endif
    }
    return keep;
}

