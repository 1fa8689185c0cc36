// A tile of queries on its way through its context: types, memory, the softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "ahead.h"
#include "attention_cache.h"
#include "products.h"
#include "tiles.h"

// What values stored as T are multiplied by.
template <typename T>
using Product = std::conditional_t<T::GROUP == 2, Bfloat16Product, Float32Product>;
template <typename T>
using Row = typename Product<T>::Value;

// Most keys a pass, whose scores, weights, keys and values stay in the first-level cache. Of a
// cache in int8 a row's are two rows in tiles, and keys and values are widened in vectors.
template <typename T>
constexpr int KEYS = T::ROUNDED ? 128 : 256;
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
    int count, head_dim;
    int step;  // so many tokens' parts lie one behind the other
    float scale;
    const typename T::Kept *keys[KEYS<T> / W], *values[KEYS<T> / W];   // W tokens each
    const float *key_scales[KEYS<T> / W], *value_scales[KEYS<T> / W];  // in int8

    int num_panels() const { return (count + W - 1) / W; }
};

// A thread's memory: the state of a tile, and a few rows' scores against one pass of keys.
template <typename T>
struct Scratch {
    const int most_rows, head_dim;
    Ahead ahead;
    Lines<float> out, peak, total, scores;
    Lines<Row<T>> weights, copied;
    Lines<float> wide;     // a head's numbers on their way into a cache of int8
    Lines<int8_t> narrow;  // rounded
    Lines<typename T::Value> keys, values;            // of one pass, widened
    const typename T::Value* key_parts[KEYS<T> / W];  // its parts, there or in the cache
    const typename T::Value* value_parts[KEYS<T> / W];
#if defined(BATCHLLM_TILES)
    Lines<float> sums;                            // of one pass
    Lines<float> kept, units;                     // what rows' earlier sums, and these, are worth
    Lines<float> query_scales;                    // of rows for a cache in int8
    Lines<typename T::Kept> parted;               // values of one pass, copied together
    const typename T::Kept* groups[KEYS<T> / W];  // all of its values, as many as a tile has each
#endif
    std::vector<const Row<T>*> queries;  // of each row, where they are or copied to

    Scratch(int rows, int head_dim)
        : most_rows(rows),
          head_dim(head_dim),
          ahead(int(W * head_dim * sizeof(typename T::Kept)), T::ROUNDED),
          out(size_t(rows) * head_dim),
          peak(rows),
          total(size_t(rows) * W),
          scores(size_t(ROOM_ROWS) * KEYS<T>),
          weights(size_t(ROOM_ROWS) * KEYS<T>),
          copied(size_t(rows + ROOM_ROWS) * head_dim),  // the last tile of rows may be part-filled
          wide(T::ROUNDED ? head_dim : 0),
          narrow(T::ROUNDED ? head_dim : 0),
          keys(T::ROUNDED ? size_t(KEYS<T>) * head_dim : 0),
          values(T::ROUNDED ? size_t(KEYS<T>) * head_dim : 0),
#if defined(BATCHLLM_TILES)
          sums(size_t(ROOM_ROWS) * head_dim),
          kept(ROOM_ROWS),
          units(ROOM_ROWS),
          query_scales(rows),
          parted(size_t(KEYS<T>) * head_dim),
#endif
          queries(rows) {}
};

// Scores to weights for `rows` <= W rows from `first` on, row r of which sees `seen[r]` keys; the
// others, up to `num_panels` panels of W, get none. `at`: where their scores and weights begin.
// Returns what the rows' sums so far are to be multiplied by.
template <typename T>
INLINE Floats weigh_rows(
    Scratch<T>& scratch, const Pass<T>& pass, int first, int at, int rows, const int* seen,
    int num_panels) {
    const auto score = [&](int r, int p) {
        const Floats product = load<Floats>(scratch.scores.data() + (at + r) * KEYS<T> + p * W);
        if constexpr (T::ROUNDED)
            return product * load<Floats>(pass.key_scales[p]);
        else
            return product;
    };
    Words lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    Floats old{}, peak{};
    for (int r = 0; r < rows; r++) {
        const int whole = seen[r] / W;
        Floats most = broadcast(-INFINITY);
        for (int p = 0; p < whole; p++) most = largest(most, score(r, p));
        if (whole * W < seen[r])
            most = lane + whole * W < seen[r] ? largest(most, score(r, whole)) : most;
        old[r] = scratch.peak[first + r];
        peak[r] = std::max(old[r], largest(most) * pass.scale);
        scratch.peak[first + r] = peak[r];
    }
    const Floats keep = exp2_of_negative(old - peak);
    for (int r = 0; r < rows; r++) {
        const int whole = seen[r] / W;
        Row<T>* weights = scratch.weights.data() + (at + r) * KEYS<T>;
        float* sums = scratch.total.data() + (first + r) * W;
        Floats total = load<Floats>(sums) * keep[r];
        const auto weigh = [&](int p) {
            return exp2_of_negative<T::COARSE>(score(r, p) * pass.scale - peak[r]);
        };
        const auto valued = [&](int p, Floats w) {  // what the values' whole numbers are weighed by
            if constexpr (T::ROUNDED)
                return w * load<Floats>(pass.value_scales[p]);
            else
                return w;
        };
        int p = 0;
        for (; p + 2 <= whole; p += 2) {
            const Floats w = weigh(p), next = weigh(p + 1);
            total += w + next;
            Product<T>::put(weights + p * W, valued(p, w), valued(p + 1, next));
        }
        for (; p < whole; p++) {
            const Floats w = weigh(p);
            total += w;
            Product<T>::put(weights + p * W, valued(p, w));
        }
        if (p * W < seen[r]) {
            const Words sees = lane + p * W < seen[r];
            const Floats w = sees ? weigh(p) : Floats{};
            total += w;
            Product<T>::put(weights + p * W, sees ? valued(p, w) : Floats{});
            p++;
        }
        for (; p < num_panels; p++) Product<T>::put(weights + p * W, Floats{});
        store(sums, total);
#if defined(BATCHLLM_TILES)  // vectors fetch all beside the keys' products, which take longer
        scratch.ahead.fetch(LINES_A_ROW);
#endif
    }
    return keep;
}

