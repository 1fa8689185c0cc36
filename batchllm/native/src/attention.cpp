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
//   keys   [kv_head][block][block_size / W][head_dim / GROUP][W tokens][GROUP]
//   values [kv_head][block][block_size / GROUP][head_dim][GROUP tokens]
// A unit reads one head's, so what it reads of neighbouring blocks lies in order.
// A query's segments are read in the order of their positions, `pass_keys` at a time from the first
// of each. So where segments begin at multiples of that, a query's result is the same to the last
// bit however its context is cut into segments and with whom it shares them.
//
// A slot that was never written, or holds what a freed segment left, is masked, never multiplied.
#include "attention.h"

#include <atomic>

#include "attention_tiles.h"
#include "attention_vectors.h"

namespace {

template <typename T>
struct Layout {
    typedef typename T::Value Value;
    int head_dim, block_size;
    int64_t head_values, block_values;

    explicit Layout(const Step& s)
        : head_dim(s.head_dim),
          block_size(s.block_size),
          head_values(s.num_blocks * s.block_size * s.head_dim),
          block_values(int64_t(s.block_size) * s.head_dim) {}

    int64_t key_place(int offset, int d) const {
        return int64_t(offset / W) * W * head_dim + (d / T::GROUP) * W * T::GROUP +
               (offset % W) * T::GROUP + d % T::GROUP;
    }
    int64_t value_place(int offset, int d) const {
        return (int64_t(offset / T::GROUP) * head_dim + d) * T::GROUP + offset % T::GROUP;
    }
};

// Fetches where a token's keys and values will be written: a key is a word in each of many lines,
// which its neighbours in the block share.
template <typename T>
INLINE void fetch_slot(const Step& s, const Layer& layer, int64_t token) {
    typedef typename T::Value Value;
    const Layout<T> layout(s);
    const int offset = int(s.slots[token] % s.block_size);
    if (token > 0 && s.slots[token] == s.slots[token - 1] + 1 && offset % W != 0) return;
    for (int h = 0; h < s.num_kv_heads; h++) {
        const int64_t place =
            s.slots[token] / s.block_size * layout.block_values + h * layout.head_values;
        const Value* key = static_cast<Value*>(layer.keys) + place + layout.key_place(offset, 0);
        const Value* value =
            static_cast<Value*>(layer.values) + place + layout.value_place(offset, 0);
        for (int d = 0; d < s.head_dim; d += T::GROUP) __builtin_prefetch(key + d * W, 1);
        for (int d = 0; d < s.head_dim; d += W) __builtin_prefetch(value + d * T::GROUP, 1);
    }
}

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
        int d = 0;
#if defined(__AVX512BW__)
        if constexpr (T::GROUP == 2)  // to one half of each word
            for (; d + W <= s.head_dim; d += W)
                _mm512_mask_storeu_epi16(
                    to + d * 2 - offset % 2, offset % 2 ? 0xaaaaaaaa : 0x55555555,
                    _mm512_slli_epi32(
                        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value + d))),
                        offset % 2 * 16));
#endif
        for (; d < s.head_dim; d++) to[d * T::GROUP] = value[d];
    }
}

// How many tokens of an item's segment a query sees: all, or up to its own.
INLINE int64_t seen_of(const Step& s, int64_t item, int64_t query) {
    return s.kv_len[item] - (s.own[item] ? s.query_end[item] - 1 - query : 0);
}

// Lists what a unit reads, a tile of one KV head, in the order of reading.
template <typename T>
void look_ahead(const Step& s, const Layer& layer, Scratch<T>& scratch, int64_t unit) {
    typedef typename T::Value Value;
    const Layout<T> layout(s);
    const int64_t tile = s.tile_order[unit / s.num_kv_heads], kv_head = unit % s.num_kv_heads;
    scratch.ahead.forget();
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

// The pass of an item that begins at its token `start`, up to token `end`.
template <typename T>
void set_pass(
    const Step& s, const Layer& layer, int64_t item, int kv_head, int64_t start, int64_t end,
    Pass<T>& pass) {
    typedef typename T::Value Value;
    const Layout<T> layout(s);
    const int64_t* ids = s.block_ids + s.block_offsets[item];
    const Value* keys = static_cast<const Value*>(layer.keys) + kv_head * layout.head_values;
    const Value* values = static_cast<const Value*>(layer.values) + kv_head * layout.head_values;
    pass.head_dim = s.head_dim;
    pass.scale = float(M_LOG2E / std::sqrt(double(s.head_dim)));
    pass.count = int(std::min<int64_t>(s.pass_keys, end - start));
    for (int p = 0; p * W < pass.count; p++) {
        const int64_t token = start + p * W;
        pass.panels[p] = keys + ids[token / s.block_size] * layout.block_values +
                         layout.key_place(int(token % s.block_size), 0);
    }
    pass.step = std::min(s.block_size, s.pass_keys);  // of longer blocks a part
    for (int b = 0; b * pass.step < pass.count; b++) {
        const int64_t token = start + int64_t(b) * pass.step;
        pass.values[b] = values + ids[token / s.block_size] * layout.block_values +
                         layout.value_place(int(token % s.block_size), 0);
    }
}

// A tile's queries of an item.
struct Queries {
    const int64_t begin, end;

    Queries(const Step& s, int64_t item, int64_t tile)
        : begin(std::max(s.query_begin[item], s.tile_begin[tile])),
          end(std::min(s.query_end[item], s.tile_begin[tile + 1])) {}
};

// Attends the tile's rows of one KV head to one item.
template <typename T, typename Way>
void attend_item(
    const Step& s, const Layer& layer, Scratch<T>& scratch, int64_t item, int64_t tile,
    int kv_head) {
    const int group = s.num_heads / s.num_kv_heads;
    const int64_t tile_begin = s.tile_begin[tile];
    const Queries queries(s, item, tile);
    const auto sees = [&](int64_t query) { return seen_of(s, item, query); };
    Pass<T> pass;
    for (int64_t start = 0; start < sees(queries.end - 1); start += s.pass_keys) {
        set_pass(s, layer, item, kv_head, start, sees(queries.end - 1), pass);
        scratch.ahead.use((pass.count + W - 1) / W);
        Way::begin_pass(scratch, pass);
        const int last = int(queries.end - tile_begin) * group;
        for (int row = int(queries.begin - tile_begin) * group; row < last; row += Way::MOST) {
            const int rows = std::min(Way::MOST, last - row);
            int seen[Way::MOST], count = 0;
            for (int r = 0; r < rows; r++) {
                const int64_t left = sees(tile_begin + (row + r) / group) - start;
                seen[r] = int(std::clamp<int64_t>(left, 0, pass.count));
                count = std::max(count, seen[r]);
            }
            if (count > 0) Way::attend(rows, scratch, pass, row, count, seen);
        }
    }
}

// Attends to several items at once, from a tile's `place` on: those of few rows next to each other,
// with one pass each. Returns how many these are, which may be none.
template <typename T, typename Way>
int64_t attend_several(
    const Step& s, const Layer& layer, Scratch<T>& scratch, int64_t place, int64_t tile,
    int kv_head) {
    const int group = s.num_heads / s.num_kv_heads;
    Pass<T> passes[Way::MOST];
    int rows[Way::MOST], seen[Way::MOST], count = 0, all = 0;
    int64_t next_query = 0;
    for (int64_t i = place; i < s.tile_offsets[tile + 1] && count < Way::MOST; i++) {
        const int64_t item = s.tile_items[i];
        const Queries queries(s, item, tile);
        const int64_t most = seen_of(s, item, queries.end - 1);
        const int64_t here = (queries.end - queries.begin) * group;
        if (here > Way::FEW || all + here > Way::MOST || most > s.pass_keys) break;
        if (count > 0 && queries.begin != next_query) break;
        set_pass(s, layer, item, kv_head, 0, most, passes[count]);
        rows[count++] = int(here);
        next_query = queries.end;
        for (int r = 0; r < here; r++)
            seen[all++] = int(seen_of(s, item, queries.begin + r / group));
    }
    if (count < 2) return 0;
    const int first = int(next_query - s.tile_begin[tile]) * group - all;
    Way::attend_each(scratch, passes, rows, count, first, seen);
    return count;
}

// Where a row's query is to be read.
template <typename T, typename Way>
INLINE const Row<T>* query_row(
    Scratch<T>& scratch, int row, const typename T::Value* query, int head_dim) {
    if constexpr (!Way::COPIES) {
        return query;
    } else {
        Row<T>* to = scratch.copied.data() + int64_t(row) * head_dim;
        if constexpr (std::is_same_v<Row<T>, typename T::Value>)
            for (int d = 0; d < head_dim; d += W) store(to + d, load<Halves>(query + d));
        else
            for (int d = 0; d < head_dim; d += W) store(to + d, T::widen(query + d));
        return to;
    }
}

template <typename T, typename Way>
void attend_tile(
    const Step& s, const Layer& layer, Scratch<T>& scratch, int64_t tile, int kv_head) {
    typedef typename T::Value Value;
    const int group = s.num_heads / s.num_kv_heads;
    const int64_t width = int64_t(s.num_heads + 2 * s.num_kv_heads) * s.head_dim;
    const int64_t begin = s.tile_begin[tile], end = s.tile_begin[tile + 1];
    const int rows = int(end - begin) * group;
    std::fill_n(scratch.out.data(), size_t(rows) * s.head_dim, 0.0f);
    std::fill_n(scratch.peak.data(), rows, -INFINITY);
    std::fill_n(scratch.total.data(), rows * W, 0.0f);
    for (int row = 0; row < rows; row++) {
        const Value* query = static_cast<const Value*>(layer.qkv) + (begin + row / group) * width +
                             (kv_head * group + row % group) * s.head_dim;
        scratch.queries[row] = query_row<T, Way>(scratch, row, query, s.head_dim);
    }
    for (int64_t i = s.tile_offsets[tile], several = 0; i < s.tile_offsets[tile + 1];
         i += std::max<int64_t>(several, 1)) {
        if constexpr (Way::FEW > 0)
            several = attend_several<T, Way>(s, layer, scratch, i, tile, kv_head);
        if (several == 0) attend_item<T, Way>(s, layer, scratch, s.tile_items[i], tile, kv_head);
    }
    for (int row = 0; row < rows; row++) {
        const float* from = scratch.out.data() + int64_t(row) * s.head_dim;
        Value* to = static_cast<Value*>(layer.out) +
                    ((begin + row / group) * s.num_heads + kv_head * group + row % group) *
                        s.head_dim;
        const float share = 1.0f / sum(load<Floats>(scratch.total.data() + row * W));
        for (int d = 0; d < s.head_dim; d += W) T::narrow(to + d, load<Floats>(from + d) * share);
    }
}

template <typename T, typename Way>
void run(const Step& s, const Layer& layer) {
    const int64_t units = s.num_tiles * s.num_kv_heads;
    std::atomic<int64_t> taken{0};
#pragma omp parallel
    {
        Scratch<T> scratch(s.tile_size * (s.num_heads / s.num_kv_heads), s.head_dim);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < s.num_tokens; token++) {
            if (token + 1 < s.num_tokens) fetch_slot<T>(s, layer, token + 1);
            rotate_and_write<T>(s, layer, token);
        }
        // The barrier after the loop: queries read keys that other threads write.
        Way::begin_thread();
        const auto take = [&] {
            const int64_t unit = taken.fetch_add(1, std::memory_order_relaxed);
            if (unit < units) look_ahead<T>(s, layer, scratch, unit);
            return unit;
        };
        for (int64_t unit = take(), next; unit < units; unit = next) {
            next = take();
            attend_tile<T, Way>(
                s, layer, scratch, s.tile_order[unit / s.num_kv_heads],
                int(unit % s.num_kv_heads));
        }
        Way::end_thread();
    }
}

}  // namespace

extern "C" void batchllm_attention(const Step* step, const Layer* layer) {
    if (!step->is_bfloat16) return run<Float32, InVectors<Float32>>(*step, *layer);
#if defined(BATCHLLM_TILES)
    if (InTiles::fit(step->head_dim)) return run<Bfloat16, InTiles>(*step, *layer);
#endif
    run<Bfloat16, InVectors<Bfloat16>>(*step, *layer);
}
