// Products of a strip and a panel in matrix tiles: all of the summed axis, or a chunk of it.
#pragma once

#include "fetch.h"
#include "linear_sums.h"

#if defined(BATCHLLM_TILES)
// tile SUM += A . B, whatever In's values are.
template <typename In, int SUM, int A, int B>
INLINE void multiply_tile() {
    if constexpr (In::SCALED)
        multiply_bytes<SUM, A, B>();
    else
        multiply_bfloat16<SUM, A, B>();
}

// Sums of a strip and a panel up to some chunk.
template <typename In>
struct Partial {
    alignas(64) typename In::Sums sums[STRIP][2];
};

// Steps of the summed axis, and what the ones before came to, unless they are the first.
template <typename In>
struct Chunk {
    int64_t begin, end;
    Partial<In>* partial = nullptr;
};

// Up to STRIP rows, and what belongs to them.
template <typename Sink>
struct Strip {
    int count;
    const typename Sink::Product::Value* x;
    const float* scales;
    typename Sink::To* out;
};

template <typename Sink>
using Inputs = Rows<const typename Sink::Product::Value>;

// Where the rows of a strip and the weights of a panel begin in a chunk, and how far it is from row
// to row and from step to step.
template <typename Sink>
struct Walk {
    static constexpr int64_t SIZE = sizeof(typename Sink::Product::Value);
    const int64_t panel_bytes, stride, next, steps;
    const char *const weight, *const row;
    const bool is_last;

    Walk(
        const PackedLinear& linear, const Inputs<Sink>& all, const Strip<Sink>& strip,
        int64_t panel, const Chunk<typename Sink::Product>& chunk)
        : panel_bytes(linear.inputs * SIZE * TILE_PANEL),
          stride(all.stride * SIZE),
          next(all.chunk_stride * SIZE),
          steps(chunk.end - chunk.begin),
          weight(
              static_cast<const char*>(linear.panels) + panel * panel_bytes +
              chunk.begin * TILE_BYTES * TILE_PANEL),
          row(reinterpret_cast<const char*>(strip.x) + chunk.begin * next),
          is_last(chunk.end * TILE_BYTES == linear.inputs * SIZE) {}
};

// Of more than TILE_ROWS rows. Either the rows or the panel are used again, and are to stay in the
// first-level cache. IN_CHUNKS: maybe not all of the summed axis.
template <typename Sink, bool ROWS_STAY, bool IN_CHUNKS>
void multiply_strip_tiles(
    const PackedLinear& linear, const Inputs<Sink>& all, const Strip<Sink>& strip, int64_t panel,
    Fetches& fetch, Sink& sink, const Chunk<typename Sink::Product>& chunk) {
    typedef typename Sink::Product In;
    const Walk<Sink> walk(linear, all, strip, panel, chunk);
    const int64_t stride = walk.stride, next = walk.next, steps = walk.steps;
    const char *weight = walk.weight, *upper = walk.row, *lower = upper + TILE_ROWS * stride;
    const int written = int((STRIP + steps - 1) / steps);
    Fetches fetching = fetch;
    constexpr int64_t SUMS = sizeof(*chunk.partial->sums);
    const auto earlier = [&](int row, int n) { return &chunk.partial->sums[row][n]; };
    if (!IN_CHUNKS || chunk.begin == 0) {
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
    } else {
        load_tile<0>(earlier(0, 0), SUMS), load_tile<1>(earlier(0, 1), SUMS);
        load_tile<2>(earlier(TILE_ROWS, 0), SUMS), load_tile<3>(earlier(TILE_ROWS, 1), SUMS);
    }
    for (int64_t k = 0; k < steps; k++, upper += next, lower += next) {
        if constexpr (ROWS_STAY) {
            load_tile_once<6>(weight, 2 * TILE_BYTES);
            load_tile_once<7>(weight + TILE_BYTES, 2 * TILE_BYTES);
            load_tile<4>(upper, stride);
            load_tile<5>(lower, stride);
        } else {
            load_tile<6>(weight, 2 * TILE_BYTES);
            load_tile<7>(weight + TILE_BYTES, 2 * TILE_BYTES);
            load_tile_once<4>(upper, stride);
            load_tile_once<5>(lower, stride);
        }
        multiply_tile<In, 0, 4, 6>();
        multiply_tile<In, 1, 4, 7>();
        multiply_tile<In, 2, 5, 6>();
        multiply_tile<In, 3, 5, 7>();
        fetching.some();
        sink.write(written);
        weight += TILE_PANEL * TILE_BYTES;
    }
    fetch = fetching;
    if (!IN_CHUNKS || walk.is_last) {
        sink.template store<0>(0);
        sink.template store<2>(TILE_ROWS);
        sink.begin(linear, panel, strip.count, strip.scales, strip.out);
    } else {
        store_tile<0>(earlier(0, 0), SUMS), store_tile<1>(earlier(0, 1), SUMS);
        store_tile<2>(earlier(TILE_ROWS, 0), SUMS), store_tile<3>(earlier(TILE_ROWS, 1), SUMS);
    }
}

// At most TILE_ROWS rows, and PANELS panels side by side, of two all of the summed axis: sums wait
// for their last term.
template <typename Sink, int PANELS>
void multiply_few_tiles(
    const PackedLinear& linear, const Inputs<Sink>& all, const Strip<Sink>& strip, int64_t panel,
    Fetches& fetch, Sink& sink, const Chunk<typename Sink::Product>& chunk) {
    typedef typename Sink::Product In;
    const Walk<Sink> walk(linear, all, strip, panel, chunk);
    const int64_t stride = walk.stride, next = walk.next, steps = walk.steps;
    const int64_t panel_bytes = walk.panel_bytes;
    const char *weight = walk.weight, *row = walk.row;
    const int written = int((TILE_ROWS + steps - 1) / steps);
    Fetches fetching = fetch;
    constexpr int64_t SUMS = sizeof(*chunk.partial->sums);
    const auto earlier = [&](int n) { return &chunk.partial->sums[0][n]; };
    if (chunk.begin == 0) {
        clear_tile<0>(), clear_tile<1>();
        if constexpr (PANELS == 2) clear_tile<2>(), clear_tile<3>();
    } else {
        load_tile<0>(earlier(0), SUMS), load_tile<1>(earlier(1), SUMS);
    }
    for (int64_t k = 0; k < steps; k++, row += next) {
        load_tile<4>(row, stride);
        load_tile<6>(weight, 2 * TILE_BYTES);
        load_tile<7>(weight + TILE_BYTES, 2 * TILE_BYTES);
        multiply_tile<In, 0, 4, 6>();
        multiply_tile<In, 1, 4, 7>();
        if constexpr (PANELS == 2) {
            load_tile<5>(weight + panel_bytes, 2 * TILE_BYTES);
            load_tile<6>(weight + panel_bytes + TILE_BYTES, 2 * TILE_BYTES);
            multiply_tile<In, 2, 4, 5>();
            multiply_tile<In, 3, 4, 6>();
        }
        fetching.some();
        sink.write(written);
        weight += TILE_PANEL * TILE_BYTES;
    }
    fetch = fetching;
    if (!walk.is_last) {
        store_tile<0>(earlier(0), SUMS), store_tile<1>(earlier(1), SUMS);
        return;
    }
    sink.write(STRIP);
    sink.template store<0>(0);
    sink.begin(linear, panel, strip.count, strip.scales, strip.out);
    if constexpr (PANELS == 2) {
        sink.write(STRIP);
        sink.template store<2>(0);
        sink.begin(linear, panel + 1, strip.count, strip.scales, strip.out);
    }
}
#endif
