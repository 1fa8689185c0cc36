// Attention over a step's items in one parallel call: rotate, write KV, attend.
//
// A unit of work is a tile of neighbouring queries and one KV head. It walks all segments that its
// queries see, shared ones for all their readers at once as matrix products, and carries the
// softmax's running maximum and sum along (FlashAttention-2, arXiv 2307.08691). Since all of a
// query's context is read by the unit that owns it, there are no partial results in memory and
// nothing to merge: the running maximum and sum are the log-sum-exp that cascades merge by. The
// price is that one query's context is never split over threads; tables have many queries.
//
// KV lies in the cache as the products want it, so nothing is gathered or packed in a step:
//   keys   [block][kv_head][block_size / W][head_dim / GROUP][W tokens][GROUP]
//   values [block][kv_head][block_size / GROUP][head_dim][GROUP tokens]
// A query's segments are read in the order of their positions, `pass_keys` at a time from the first
// of each. So where segments begin at multiples of that, a query's result is the same to the last
// bit however its context is cut into segments and with whom it shares them.
//
// A slot that was never written, or holds what a freed segment left, is masked, never multiplied.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "ahead.h"
#include "products.h"

namespace {

// What values stored as T are multiplied by.
template <typename T>
using Product = std::conditional_t<std::is_same_v<T, Bfloat16>, Bfloat16Product, Float32Product>;
template <typename T>
using Row = typename Product<T>::Value;

// Registers for the accumulators of a tile: ROWS x COLUMNS of them, and a few to spare.
#if defined(__AVX512F__)
constexpr int ROWS = 6, COLUMNS = 4;
#elif defined(__AVX2__)
constexpr int ROWS = 6, COLUMNS = 2;
#else
constexpr int ROWS = 4, COLUMNS = 2;
#endif

constexpr int KEYS = 256;  // most keys a pass: their scores stay in the first-level cache
static_assert(KEYS % (W * COLUMNS) == 0, "whole tiles of keys");
static_assert(ROWS <= W, "one number a row fits a vector");

template <typename T>
struct Layout {
    typedef typename T::Value Value;
    int head_dim, block_size;
    int64_t head_values, block_values;

    explicit Layout(const Step& s)
        : head_dim(s.head_dim),
          block_size(s.block_size),
          head_values(int64_t(s.block_size) * s.head_dim),
          block_values(head_values * s.num_kv_heads) {}

    int64_t key_place(int offset, int d) const {
        return int64_t(offset / W) * W * head_dim + (d / T::GROUP) * W * T::GROUP +
               (offset % W) * T::GROUP + d % T::GROUP;
    }
    int64_t value_place(int offset, int d) const {
        return (int64_t(offset / T::GROUP) * head_dim + d) * T::GROUP + offset % T::GROUP;
    }
};

// Rotates the queries in place; rotates the keys and writes them and the values to their slot.
template <typename T>
void rotate_and_write(const Step& s, const Layer& layer, int64_t token) {
    typedef typename T::Value Value;
    const Layout<T> layout(s);
    const int half = s.head_dim / 2, heads = s.num_heads + s.num_kv_heads;
    const float* cos = s.cos + token * half;
    const float* sin = s.sin + token * half;
    Value* row = static_cast<Value*>(layer.qkv) + token * (heads + s.num_kv_heads) * s.head_dim;
    for (int h = 0; h < heads; h++) {
        Value* left = row + h * s.head_dim;
        Value* right = left + half;
        int d = 0;
        for (; d + W <= half; d += W) {
            const Floats a = T::widen(left + d), b = T::widen(right + d);
            const Floats c = load<Floats>(cos + d), i = load<Floats>(sin + d);
            T::narrow(left + d, a * c - b * i);
            T::narrow(right + d, b * c + a * i);
        }
        for (; d < half; d++) {
            const float a = T::get(left[d]), b = T::get(right[d]);
            left[d] = T::put(a * cos[d] - b * sin[d]);
            right[d] = T::put(b * cos[d] + a * sin[d]);
        }
    }
    const int64_t block = s.slots[token] / s.block_size;
    const int offset = int(s.slots[token] % s.block_size);
    Value* keys = static_cast<Value*>(layer.keys) + block * layout.block_values;
    Value* values = static_cast<Value*>(layer.values) + block * layout.block_values;
    for (int h = 0; h < s.num_kv_heads; h++) {
        const Value* key = row + (s.num_heads + h) * s.head_dim;
        const Value* value = key + int64_t(s.num_kv_heads) * s.head_dim;
        Value* to = keys + h * layout.head_values + layout.key_place(offset, 0);
        for (int d = 0; d < s.head_dim; d += T::GROUP, to += W * T::GROUP)
            std::memcpy(to, key + d, sizeof(Value) * T::GROUP);
        to = values + h * layout.head_values + layout.value_place(offset, 0);
        for (int d = 0; d < s.head_dim; d++) to[d * T::GROUP] = value[d];
    }
}

// One thread's memory: the state of a tile, and a few rows' scores against one pass of keys.
template <typename T>
struct Scratch {
    Ahead<T> ahead;
    std::vector<float> out, peak, total, scores;
    std::vector<Row<T>> weights, widened;
    std::vector<const Row<T>*> queries;

    Scratch(int rows, int head_dim)
        : out(size_t(rows) * head_dim),
          peak(rows),
          total(size_t(rows) * W),
          scores(size_t(ROWS) * KEYS),
          weights(size_t(ROWS) * KEYS),
          widened(std::is_same_v<Row<T>, typename T::Value> ? 0 : size_t(rows) * head_dim),
          queries(rows) {}
};

// scores[r][.] of N panels of W keys, for R rows of queries.
template <typename T, int R, int N>
INLINE void multiply_keys(
    const Row<T>* const* queries, const typename T::Value* const* panels, int head_dim,
    Ahead<T>& ahead, float* scores) {
    const auto fetch = ahead.take(panels[0]);
    Floats sums[R][N] = {};
    for (int d = 0; d < head_dim; d += T::GROUP) {
        __builtin_prefetch(fetch.keys + d * W);
        __builtin_prefetch(fetch.values + d * W);
        add_products<Product<T>>(
            sums, [&](int n) { return load<Words>(panels[n] + d * W); },
            [&](int r) { return queries[r] + d; });
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(scores + r * KEYS + n * W, sums[r][n]);
}

// out[r][first : first + N * W] = keep[r] * itself + weights[r] . values, over `count` keys; every
// pointer of `blocks` is to the first of `block_size` of them.
template <typename T, int R, int N>
INLINE void multiply_values(
    const Row<T>* weights, const typename T::Value* const* blocks, int block_size,
    int count, int head_dim, Floats keep, int first, float* out) {
    out += first;
    Floats sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = load<Floats>(out + r * head_dim + n * W) * keep[r];
    for (int begin = 0; begin < count; begin += block_size) {
        const typename T::Value* values = blocks[begin / block_size] + first * T::GROUP;
        const int here = std::min(block_size, count - begin), whole = here - here % T::GROUP;
        for (int k = 0; k < whole; k += T::GROUP, values += head_dim * T::GROUP)
            add_products<Product<T>>(
                sums, [&](int n) { return load<Words>(values + n * W * T::GROUP); },
                [&](int r) { return weights + r * KEYS + begin + k; });
        if (whole == here) continue;
        add_products<Product<T>>(  // the rest of the last group may be anything, even NaN
            sums,
            [&](int n) {
                return T::first_of_group(load<Words>(values + n * W * T::GROUP), here - whole);
            },
            [&](int r) { return weights + r * KEYS + begin + whole; });
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(out + r * head_dim + n * W, sums[r][n]);
}

// Attends R rows of a tile, from `first` on, to `count` keys: row r to the first `seen[r]` of them.
template <typename T, int R>
void attend_rows(
    Scratch<T>& scratch, int first, const typename T::Value* const* panels,
    const typename T::Value* const* values, int count, const int* seen, int block_size,
    int head_dim, float scale) {
    const int num_panels = (count + W - 1) / W;
    float* scores = scratch.scores.data();
    const Row<T>* const* queries = scratch.queries.data() + first;
    int n = 0;
    for (; n + COLUMNS <= num_panels; n += COLUMNS)
        multiply_keys<T, R, COLUMNS>(queries, panels + n, head_dim, scratch.ahead, scores + n * W);
    for (; n < num_panels; n++)
        multiply_keys<T, R, 1>(queries, panels + n, head_dim, scratch.ahead, scores + n * W);

    Words lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    Floats old{}, peak{};
    for (int r = 0; r < R; r++) {
        const float* row = scores + r * KEYS;
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
    for (int r = 0; r < R; r++) {
        const float* row = scores + r * KEYS;
        const int whole = seen[r] / W;
        Row<T>* weights = scratch.weights.data() + r * KEYS;
        float* sums = scratch.total.data() + (first + r) * W;
        Floats total = load<Floats>(sums) * keep[r];
        int p = 0;
        for (; p < whole; p++) {
            const Floats w =
                exp2_of_negative<T::COARSE>(load<Floats>(row + p * W) * scale - peak[r]);
            total += w;
            Product<T>::put(weights + p * W, w);
        }
        for (; p < num_panels; p++) {  // the last that it sees may end within, the others beyond
            const Floats w =
                lane + p * W < seen[r]
                    ? exp2_of_negative<T::COARSE>(load<Floats>(row + p * W) * scale - peak[r])
                    : Floats{};
            total += w;
            Product<T>::put(weights + p * W, w);
        }
        store(sums, total);
    }

    const Row<T>* weights = scratch.weights.data();
    float* out = scratch.out.data() + int64_t(first) * head_dim;
    int d = 0;
    for (; d + COLUMNS * W <= head_dim; d += COLUMNS * W)
        multiply_values<T, R, COLUMNS>(weights, values, block_size, count, head_dim, keep, d, out);
    for (; d < head_dim; d += W)
        multiply_values<T, R, 1>(weights, values, block_size, count, head_dim, keep, d, out);
}

template <typename T, int R>
INLINE void attend_some(
    int rows, Scratch<T>& scratch, int first, const typename T::Value* const* panels,
    const typename T::Value* const* values, int count, const int* seen, int block_size,
    int head_dim, float scale) {
    if (rows == R)
        attend_rows<T, R>(scratch, first, panels, values, count, seen, block_size, head_dim, scale);
    else if constexpr (R > 1)
        attend_some<T, R - 1>(
            rows, scratch, first, panels, values, count, seen, block_size, head_dim, scale);
}

// How many tokens of an item's segment a query sees: all, or up to its own.
INLINE int64_t seen_of(const Step& s, int64_t item, int64_t query) {
    return s.kv_len[item] - (s.own[item] ? s.query_end[item] - 1 - query : 0);
}

// Lists what a tile reads of one KV head, in the order of reading.
template <typename T>
void look_ahead(
    const Step& s, const Layer& layer, Scratch<T>& scratch, int64_t tile, int kv_head) {
    typedef typename T::Value Value;
    const Layout<T> layout(s);
    scratch.ahead.clear();
    for (int64_t i = s.tile_offsets[tile]; i < s.tile_offsets[tile + 1]; i++) {
        const int64_t item = s.tile_items[i];
        const int64_t* ids = s.block_ids + s.block_offsets[item];
        const int64_t end = std::min(s.query_end[item], s.tile_begin[tile + 1]);
        for (int64_t token = 0; token < seen_of(s, item, end - 1); token += W) {
            const int64_t place = ids[token / s.block_size] * layout.block_values +
                                  kv_head * layout.head_values +
                                  token % s.block_size * s.head_dim;
            scratch.ahead.add(
                static_cast<const Value*>(layer.keys) + place,
                static_cast<const Value*>(layer.values) + place);
        }
    }
}

// Attends the tile's rows of one KV head to one item.
template <typename T>
void attend_item(
    const Step& s, const Layer& layer, Scratch<T>& scratch, int64_t item, int64_t tile_begin,
    int64_t tile_end, int kv_head) {
    typedef typename T::Value Value;
    const Layout<T> layout(s);
    const int group = s.num_heads / s.num_kv_heads;
    const int64_t begin = std::max(s.query_begin[item], tile_begin);
    const int64_t end = std::min(s.query_end[item], tile_end);
    const int64_t* ids = s.block_ids + s.block_offsets[item];
    const Value* all_keys = static_cast<const Value*>(layer.keys) + kv_head * layout.head_values;
    const Value* all_values =
        static_cast<const Value*>(layer.values) + kv_head * layout.head_values;
    const float scale = float(M_LOG2E / std::sqrt(double(s.head_dim)));
    const auto sees = [&](int64_t query) { return seen_of(s, item, query); };
    const Value* panels[KEYS / W];
    const Value* values[KEYS];
    for (int64_t start = 0; start < sees(end - 1); start += s.pass_keys) {
        const int most = int(std::min<int64_t>(s.pass_keys, sees(end - 1) - start));
        for (int p = 0; p * W < most; p++) {
            const int64_t token = start + p * W;
            panels[p] = all_keys + ids[token / s.block_size] * layout.block_values +
                        layout.key_place(int(token % s.block_size), 0);
        }
        // Blocks longer than a pass are taken in parts of it.
        const int step = std::min(s.block_size, s.pass_keys);
        for (int b = 0; b * step < most; b++) {
            const int64_t token = start + int64_t(b) * step;
            values[b] = all_values + ids[token / s.block_size] * layout.block_values +
                        layout.value_place(int(token % s.block_size), 0);
        }
        scratch.ahead.use((most + W - 1) / W);
        const int last = int(end - tile_begin) * group;
        for (int row = int(begin - tile_begin) * group; row < last; row += ROWS) {
            const int rows = std::min(ROWS, last - row);
            int seen[ROWS], count = 0;
            for (int r = 0; r < rows; r++) {
                const int64_t left = sees(tile_begin + (row + r) / group) - start;
                seen[r] = int(std::clamp<int64_t>(left, 0, most));
                count = std::max(count, seen[r]);
            }
            if (count > 0)
                attend_some<T, ROWS>(
                    rows, scratch, row, panels, values, count, seen, step, s.head_dim, scale);
        }
    }
}

template <typename T>
void attend_tile(
    const Step& s, const Layer& layer, Scratch<T>& scratch, int64_t tile, int kv_head) {
    typedef typename T::Value Value;
    const int group = s.num_heads / s.num_kv_heads;
    const int64_t width = int64_t(s.num_heads + 2 * s.num_kv_heads) * s.head_dim;
    const int64_t begin = s.tile_begin[tile], end = s.tile_begin[tile + 1];
    const int rows = int(end - begin) * group;
    std::fill_n(scratch.out.begin(), size_t(rows) * s.head_dim, 0.0f);
    std::fill_n(scratch.peak.begin(), rows, -INFINITY);
    std::fill_n(scratch.total.begin(), rows * W, 0.0f);
    for (int row = 0; row < rows; row++) {
        const Value* query = static_cast<const Value*>(layer.qkv) + (begin + row / group) * width +
                             (kv_head * group + row % group) * s.head_dim;
        if constexpr (std::is_same_v<Row<T>, Value>) {
            scratch.queries[row] = query;
        } else {
            Row<T>* widened = scratch.widened.data() + int64_t(row) * s.head_dim;
            for (int d = 0; d < s.head_dim; d += W) store(widened + d, T::widen(query + d));
            scratch.queries[row] = widened;
        }
    }
    look_ahead<T>(s, layer, scratch, tile, kv_head);
    for (int64_t i = s.tile_offsets[tile]; i < s.tile_offsets[tile + 1]; i++)
        attend_item<T>(s, layer, scratch, s.tile_items[i], begin, end, kv_head);
    for (int row = 0; row < rows; row++) {
        const float* from = scratch.out.data() + int64_t(row) * s.head_dim;
        Value* to = static_cast<Value*>(layer.out) +
                    ((begin + row / group) * s.num_heads + kv_head * group + row % group) *
                        s.head_dim;
        const float share = 1.0f / sum(load<Floats>(scratch.total.data() + row * W));
        for (int d = 0; d < s.head_dim; d += W) T::narrow(to + d, load<Floats>(from + d) * share);
    }
}

template <typename T>
void run(const Step& s, const Layer& layer) {
#pragma omp parallel
    {
        Scratch<T> scratch(s.tile_size * (s.num_heads / s.num_kv_heads), s.head_dim);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < s.num_tokens; token++)
            rotate_and_write<T>(s, layer, token);
        // The barrier between the loops: queries read keys that other threads write.
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < s.num_tiles * s.num_kv_heads; unit++)
            attend_tile<T>(
                s, layer, scratch, s.tile_order[unit / s.num_kv_heads], int(unit % s.num_kv_heads));
    }
}

}  // namespace

extern "C" void batchllm_attention(const Step* step, const Layer* layer) {
    if (step->is_bfloat16)
        run<Bfloat16>(*step, *layer);
    else
        run<Float32>(*step, *layer);
}
