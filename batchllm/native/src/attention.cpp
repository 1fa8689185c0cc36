// Attention over a step's items in one parallel call: rotate, write KV, attend.
//
// A unit of work is a tile of neighbouring queries and one KV head. It walks all segments that its
// queries see, shared ones for all their readers at once as matrix products, and carries the
// softmax's running maximum and sum along (FlashAttention-2, arXiv 2307.08691). Since all of a
// query's context is read by the unit that owns it, there are no partial results in memory and
// nothing to merge: the running maximum and sum are the log-sum-exp that cascades merge by. The
// price is that one query's context is never split over threads; tables have many queries.
//
// A query's segments are read in the order of their positions, `pass_keys` at a time from the first
// of each. So where segments begin at multiples of that, a query's result is the same to the last
// bit however its context is cut into segments and with whom it shares them.
//
// A slot that was never written, or holds what a freed segment left, is masked, never multiplied.
#include "attention.h"

#include <atomic>
#include <memory>

#include "attention_tiles.h"
#include "attention_vectors.h"
#include "strips.h"

namespace {

// How many tokens are attended to at a time.
template <typename T>
INLINE int pass_keys(const Step& s) {
    return std::min(s.pass_keys, KEYS<T>);
}

// How many tokens of an item's segment a query sees: all, or up to its own.
INLINE int64_t seen_of(const Step& s, int64_t item, int64_t query) {
    return s.kv_len[item] - (s.own[item] ? s.query_end[item] - 1 - query : 0);
}

// Lists what a unit reads, a tile of one KV head, in the order of reading.
template <typename T>
void look_ahead(const Step& s, const Layer& layer, Scratch<T>& scratch, int64_t unit) {
    typedef typename T::Kept Kept;
    const Layout<T> layout(s);
    const int64_t tile = s.tile_order[unit / s.num_kv_heads], kv_head = unit % s.num_kv_heads;
    const Kept* keys = static_cast<const Kept*>(layer.keys) + kv_head * layout.head_values;
    const Kept* values = static_cast<const Kept*>(layer.values) + kv_head * layout.head_values;
    scratch.ahead.forget();
    for (int64_t i = s.tile_offsets[tile]; i < s.tile_offsets[tile + 1]; i++) {
        const int64_t item = s.tile_items[i];
        const int64_t* ids = s.block_ids + s.block_offsets[item];
        const int64_t end = std::min(s.query_end[item], s.tile_begin[tile + 1]);
        for (int64_t token = 0; token < seen_of(s, item, end - 1); token += W) {
            const int64_t block = ids[token / s.block_size], offset = token % s.block_size;
            const int64_t place = layout.part_place(block, offset);
            const float *key_scales = nullptr, *value_scales = nullptr;
            if (T::ROUNDED) {
                key_scales = layout.scales(keys, block, offset);
                value_scales = layout.scales(values, block, offset);
            }
            scratch.ahead.add(keys + place, values + place, key_scales, value_scales);
        }
    }
}

// The pass of an item that begins at its token `start`, up to token `end`.
template <typename T>
void set_pass(
    const Step& s, const Layer& layer, int64_t item, int kv_head, int64_t start, int64_t end,
    Pass<T>& pass) {
    typedef typename T::Kept Kept;
    const Layout<T> layout(s);
    const int64_t* ids = s.block_ids + s.block_offsets[item];
    const Kept* keys = static_cast<const Kept*>(layer.keys) + kv_head * layout.head_values;
    const Kept* values = static_cast<const Kept*>(layer.values) + kv_head * layout.head_values;
    pass.head_dim = s.head_dim;
    pass.scale = float(M_LOG2E / std::sqrt(double(s.head_dim)));
    pass.count = int(std::min<int64_t>(pass_keys<T>(s), end - start));
    pass.step = std::min(s.block_size, pass_keys<T>(s));
    for (int p = 0; p < pass.num_panels(); p++) {
        const int64_t token = start + p * W, offset = token % s.block_size;
        const int64_t block = ids[token / s.block_size], place = layout.part_place(block, offset);
        pass.keys[p] = keys + place;
        pass.values[p] = values + place;
        if (!T::ROUNDED) continue;
        pass.key_scales[p] = layout.scales(keys, block, offset);
        pass.value_scales[p] = layout.scales(values, block, offset);
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
    for (int64_t start = 0; start < sees(queries.end - 1); start += pass_keys<T>(s)) {
        set_pass(s, layer, item, kv_head, start, sees(queries.end - 1), pass);
        scratch.ahead.use(pass.num_panels());
        Way::open(scratch, pass);
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
        if (here > Way::FEW || all + here > Way::MOST || most > pass_keys<T>(s)) break;
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

template <typename T, typename Way>
void attend_tile(
    const Step& s, const Layer& layer, Scratch<T>& scratch, int64_t tile, int kv_head) {
    typedef typename T::Value Value;
    constexpr int LINE = 64 / sizeof(Value), QUERIES_AHEAD = 4;  // others may have rotated them
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
        for (int d = 0; d < s.head_dim; d += LINE)
            __builtin_prefetch(query + QUERIES_AHEAD * width + d);
        Way::put_query(scratch, row, query, s.head_dim);
    }
    for (int64_t i = s.tile_offsets[tile], several = 0; i < s.tile_offsets[tile + 1];
         i += std::max<int64_t>(several, 1)) {
        if constexpr (Way::FEW > 0)
            several = attend_several<T, Way>(s, layer, scratch, i, tile, kv_head);
        if (several == 0) attend_item<T, Way>(s, layer, scratch, s.tile_items[i], tile, kv_head);
    }
    const Rows<Value> out(
        static_cast<Value*>(layer.out), int64_t(s.num_heads) * s.head_dim, layer.out_in_strips);
    for (int row = 0; row < rows; row++) {
        const float* from = scratch.out.data() + int64_t(row) * s.head_dim;
        const int64_t first = int64_t(kv_head * group + row % group) * s.head_dim;
        Value* to = out.row(begin + row / group);
        const float share = 1.0f / sum(load<Floats>(scratch.total.data() + row * W));
        for (int d = 0; d < s.head_dim; d += W)
            T::narrow(to + out.place(first + d), load<Floats>(from + d) * share);
    }
}

// The calling thread's memory, as its last call left it but for `ahead`; were it given back, the
// system would clear its pages for every call. It is here since what is static in a header's
// template is one for all libraries of a process, and each has its own idea of it.
template <typename T>
Scratch<T>& scratch_of_thread(int rows, int head_dim) {
    static thread_local std::unique_ptr<Scratch<T>> kept;
    if (kept == nullptr || kept->most_rows < rows || kept->head_dim != head_dim)
        kept = std::make_unique<Scratch<T>>(rows, head_dim);
    kept->ahead.clear();
    return *kept;
}

template <typename T, typename Way>
void run(const Step& s, const Layer& layer) {
    const int64_t units = s.num_tiles * s.num_kv_heads;
    std::atomic<int64_t> taken{0};
#pragma omp parallel
    {
        Scratch<T>& scratch =
            scratch_of_thread<T>(s.tile_size * (s.num_heads / s.num_kv_heads), s.head_dim);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < s.num_tokens; token++) {
            if (token + 1 < s.num_tokens) fetch_slot<T>(s, layer, token + 1);
            rotate_and_write<T>(s, layer, token, scratch.wide.data(), scratch.narrow.data());
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

template <typename T>
void run_fastest(const Step& s, const Layer& layer) {
#if defined(BATCHLLM_TILES)
    if constexpr (T::GROUP == 2)
        if (InTiles<T>::fit(s.head_dim)) return run<T, InTiles<T>>(s, layer);
#endif
    run<T, InVectors<T>>(s, layer);
}

}  // namespace

extern "C" void batchllm_attention(const Step* step, const Layer* layer) {
    if (step->kv_is_int8)
        (step->is_bfloat16 ? run_fastest<Rounded<Bfloat16>> : run_fastest<Rounded<Float32>>)(
            *step, *layer);
    else
        (step->is_bfloat16 ? run_fastest<Bfloat16> : run_fastest<Float32>)(*step, *layer);
}
