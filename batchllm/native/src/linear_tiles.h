// Products in matrix tiles: strips of up to 32 rows times the panels of linear.cpp.
//
// A step of a strip and a panel is four products of tiles. To read their four operands takes as
// long from the first-level cache, and longer from the second. So one of the two is to stay in the
// first: the strip, where it fits there and meets many panels (`by_groups`), else the panel
// (`by_panels`).
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "linear.h"
#include "products.h"
#include "tiles.h"

#if defined(BATCHLLM_TILES)
constexpr int TILE_STRIP = 2 * TILE_ROWS;    // rows
constexpr int TILE_PANEL = 2 * W;            // outputs
constexpr int64_t STRIP_BYTES = 40 * 1024;   // of rows, in the first-level cache
constexpr int64_t BLOCK_BYTES = 768 * 1024;  // of rows, in the second-level cache
constexpr int64_t GROUP_BYTES = 600 * 1024;  // of panels, the same

// tile SUM += A . B, whatever In's values are.
template <typename In, int SUM, int A, int B>
INLINE void multiply_tile() {
    if constexpr (In::SCALED)
        multiply_bytes<SUM, A, B>();
    else
        multiply_bfloat16<SUM, A, B>();
}

// What is read next is fetched into the second-level cache while this is multiplied.
struct Fetch {
    const char *next, *end;

    int lines_a_step(int64_t steps) const {
        const int64_t lines = (end - next + 63) / 64;
        return int((lines + steps - 1) / steps);
    }

    INLINE void lines(int count) {
        for (int i = 0; i < count && next < end; i++, next += 64)
            __builtin_prefetch(next, 0, 2);
    }
};

// The sums of a strip and a panel on their way to the outputs, while the next strip is multiplied:
// what was stored from tiles is not read at once, and the vectors' work hides behind the tiles'.
template <typename In, typename Out>
class Outputs {
    typedef typename In::Sums Sums;
    alignas(64) Sums sums[TILE_STRIP][2];
    Sums start[2]{};
    Floats scale[2]{}, bias[2]{};
    const float* row_scales = nullptr;
    typename Out::Value* out = nullptr;
    int64_t stride = 0, left = 0;
    int row = 0, rows = 0;
    bool gated = false;

    INLINE Floats value(int n) const {
        const Floats v = In::floats(sums[row][n] + start[n]);
        if constexpr (In::SCALED) return v * (scale[n] * row_scales[row]) + bias[n];
        return v + bias[n];
    }

  public:
    // Tiles FIRST and its neighbour are the sums of the rows from `at` on.
    template <int FIRST>
    INLINE void store(int at) {
        store_tile<FIRST>(sums[at], sizeof sums[0]);
        store_tile<FIRST + 1>(&sums[at][1], sizeof sums[0]);
    }

    // What was stored is this: `count` rows of x, `scales` and `to` being theirs.
    INLINE void begin(
        const PackedLinear& linear, int64_t panel, int count, const float* scales,
        typename Out::Value* to) {
        const int64_t first = panel * TILE_PANEL;
        for (int n = 0; n < 2; n++) {
            if constexpr (In::SCALED) {
                start[n] = load<Sums>(linear.starts + first + n * W);
                scale[n] = load<Floats>(linear.scales + first + n * W);
            }
            if (linear.bias != nullptr) bias[n] = load<Floats>(linear.bias + first + n * W);
        }
        row_scales = scales;
        gated = linear.gated != 0;
        out = to + (gated ? first / 2 : first);
        stride = gated ? linear.outputs / 2 : linear.outputs;
        left = linear.outputs - first;
        row = 0;
        rows = count;
    }

    // Writes the next `count` rows that wait, if there are.
    INLINE void write(int count) {
        for (const int end = std::min(row + count, rows); row < end; row++) {
            typename Out::Value* to = out + row * stride;
            if (gated) {
                Out::narrow(to, silu<Out::COARSE>(value(0)) * value(1));
                continue;
            }
            for (int n = 0; n < 2; n++, to += W)
                if (left >= TILE_PANEL)
                    Out::narrow(to, value(n));
                else
                    for (int64_t i = 0; i < std::min<int64_t>(W, left - n * W); i++)
                        to[i] = Out::put(value(n)[i]);
        }
    }

    INLINE void write_all() { write(TILE_STRIP); }
};

// Of more than TILE_ROWS rows, and at most TILE_STRIP. Either the rows or the panel are used again,
// and are to stay in the first-level cache.
template <typename In, typename Out, bool ROWS_STAY>
void multiply_strip_tiles(
    const PackedLinear& linear, int rows, const typename In::Value* x, const float* row_scales,
    int64_t panel, typename Out::Value* out, Fetch fetch, Outputs<In, Out>& outputs) {
    const int64_t row_bytes = linear.inputs * int64_t(sizeof(*x));
    const int64_t steps = row_bytes / TILE_BYTES;
    const char* weight = static_cast<const char*>(linear.panels) + panel * row_bytes * TILE_PANEL;
    const char* upper = reinterpret_cast<const char*>(x);
    const char* lower = upper + TILE_ROWS * row_bytes;
    const int lines = fetch.lines_a_step(steps), written = int((TILE_STRIP + steps - 1) / steps);
    clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
    for (int64_t k = 0; k < steps; k++, upper += TILE_BYTES, lower += TILE_BYTES) {
        if constexpr (ROWS_STAY) {
            load_tile_once<6>(weight, 2 * TILE_BYTES);
            load_tile_once<7>(weight + TILE_BYTES, 2 * TILE_BYTES);
            load_tile<4>(upper, row_bytes);
            load_tile<5>(lower, row_bytes);
        } else {
            load_tile<6>(weight, 2 * TILE_BYTES);
            load_tile<7>(weight + TILE_BYTES, 2 * TILE_BYTES);
            load_tile_once<4>(upper, row_bytes);
            load_tile_once<5>(lower, row_bytes);
        }
        multiply_tile<In, 0, 4, 6>();
        multiply_tile<In, 1, 4, 7>();
        multiply_tile<In, 2, 5, 6>();
        multiply_tile<In, 3, 5, 7>();
        fetch.lines(lines);
        outputs.write(written);
        weight += TILE_PANEL * TILE_BYTES;
    }
    outputs.template store<0>(0);
    outputs.template store<2>(TILE_ROWS);
    outputs.begin(linear, panel, rows, row_scales, out);
}

// At most TILE_ROWS rows, and PANELS panels side by side: sums wait for their last term.
template <typename In, typename Out, int PANELS>
void multiply_few_tiles(
    const PackedLinear& linear, int rows, const typename In::Value* x, const float* row_scales,
    int64_t panel, typename Out::Value* out, Fetch fetch, Outputs<In, Out>& outputs) {
    const int64_t row_bytes = linear.inputs * int64_t(sizeof(*x));
    const int64_t steps = row_bytes / TILE_BYTES, panel_bytes = row_bytes * TILE_PANEL;
    const char* weight = static_cast<const char*>(linear.panels) + panel * panel_bytes;
    const char* row = reinterpret_cast<const char*>(x);
    const int lines = fetch.lines_a_step(steps), written = int((TILE_ROWS + steps - 1) / steps);
    clear_tile<0>(), clear_tile<1>();
    if constexpr (PANELS == 2) clear_tile<2>(), clear_tile<3>();
    for (int64_t k = 0; k < steps; k++, row += TILE_BYTES) {
        load_tile<4>(row, row_bytes);
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
        fetch.lines(lines);
        outputs.write(written);
        weight += TILE_PANEL * TILE_BYTES;
    }
    outputs.write_all();
    outputs.template store<0>(0);
    outputs.begin(linear, panel, rows, row_scales, out);
    if constexpr (PANELS == 2) {
        outputs.write_all();
        outputs.template store<2>(0);
        outputs.begin(linear, panel + 1, rows, row_scales, out);
    }
}

template <typename In>
INLINE bool fits_tiles(const PackedLinear& linear) {
    return linear.inputs * int64_t(sizeof(typename In::Value)) % TILE_BYTES == 0;
}

INLINE TileShape strip_shape(int rows) {
    if (rows <= TILE_ROWS) return TileShape(rows, rows, rows, TILE_ROWS);
    return TileShape(TILE_ROWS, rows - TILE_ROWS, TILE_ROWS, rows - TILE_ROWS);
}

// One product, for whoever takes a part of it: a thread of a parallel region.
template <typename In, typename Out>
class TileWork {
    typedef typename In::Value Value;
    const PackedLinear& linear;
    const int64_t rows;
    const Value* const x;
    const float* const row_scales;
    typename Out::Value* const out;
    std::atomic<int64_t>& taken;
    const int64_t panels, panel_bytes, strips;
    const int64_t threads = omp_get_num_threads();
    Outputs<In, Out> outputs;
    int shaped = 0;

    int64_t take() { return taken.fetch_add(1, std::memory_order_relaxed); }
    const char* weight(int64_t panel) const {
        return static_cast<const char*>(linear.panels) + panel * panel_bytes;
    }
    // The part of `bytes` from a panel on that is fetched in turn `i` of `count`.
    Fetch part(int64_t panel, int64_t bytes, int64_t i, int64_t count) const {
        return {weight(panel) + bytes * i / count, weight(panel) + bytes * (i + 1) / count};
    }
    template <bool ROWS_STAY>
    void multiply(int64_t strip, int64_t panel, bool pair, Fetch fetch) {
        const int64_t row = strip * TILE_STRIP;
        const int here = int(std::min<int64_t>(TILE_STRIP, rows - row));
        if (here != shaped) shape_tiles(strip_shape(here));
        shaped = here;
        const auto function = here > TILE_ROWS ? multiply_strip_tiles<In, Out, ROWS_STAY>
                              : pair           ? multiply_few_tiles<In, Out, 2>
                                               : multiply_few_tiles<In, Out, 1>;
        function(
            linear, here, x + row * linear.inputs, row_scales + row, panel,
            out + row * linear.outputs / (linear.gated ? 2 : 1), fetch, outputs);
    }

  public:
    TileWork(
        const PackedLinear& linear, int64_t rows, const Value* x, const float* row_scales,
        typename Out::Value* out, std::atomic<int64_t>& taken)
        : linear(linear),
          rows(rows),
          x(x),
          row_scales(row_scales),
          out(out),
          taken(taken),
          panels((linear.outputs + TILE_PANEL - 1) / TILE_PANEL),
          panel_bytes(linear.inputs * int64_t(sizeof(*x)) * TILE_PANEL),
          strips((rows + TILE_STRIP - 1) / TILE_STRIP) {}
    TileWork(const TileWork&) = delete;
    ~TileWork() {
        outputs.write_all();
        release_tiles();
    }

    // Whether a strip of many stays in the first-level cache beside what else is read.
    bool strips_stay() const { return strips > 2 && panel_bytes <= STRIP_BYTES; }

    // A panel meets a block of rows, which stays in the second-level cache; few rows read every
    // panel from memory once. A thread asks for its next panels before it needs them, to fetch
    // them. Pairs first, and as many for each thread: one tile of rows is multiplied by two panels
    // at once, and two of a gated weight put out a line of the cache, which one thread should write.
    void by_panels() {
        const int64_t fitting = std::max<int64_t>(8, BLOCK_BYTES / panel_bytes);
        const int64_t blocks = (strips + fitting - 1) / fitting;
        const bool together = rows <= TILE_ROWS, in_pairs = together || linear.gated;
        const int64_t pairs = in_pairs ? panels / 2 / threads * threads : 0;
        const int64_t a_block = panels - pairs, units = blocks * a_block;
        const auto first = [&](int64_t u) { return u < pairs ? 2 * u : u + pairs; };
        for (int64_t unit = take(), next; unit < units; unit = next) {
            next = take();
            const int64_t block = unit / a_block, u = unit % a_block, after = next % a_block;
            const int64_t begin = strips * block / blocks, end = strips * (block + 1) / blocks;
            const int64_t last = first(u + 1), step = together ? last - first(u) : 1;
            for (int64_t panel = first(u); panel < last; panel += step) {
                const bool more = panel + step < last, none = !more && next >= units;
                const int64_t coming = more ? panel + step : first(after);
                const int64_t count = none ? 0 : together ? first(after + 1) - coming : 1;
                for (int64_t s = begin; s < end; s++)
                    multiply<false>(
                        s, panel, step == 2,
                        part(coming, count * panel_bytes, s - begin, end - begin));
            }
        }
    }

    // A strip of rows stays in the first-level cache while it meets a group of panels, and these in
    // the second while they meet a block of rows. So outputs are written row by row, too: where
    // rows are many pages, to write a little of each is slow.
    void by_groups() {
        const int64_t a_block = BLOCK_BYTES / panel_bytes;  // a strip has as many bytes
        const int64_t blocks = (strips + a_block - 1) / a_block;
        const int64_t fitting = (panels * panel_bytes + GROUP_BYTES - 1) / GROUP_BYTES;
        const int64_t wanted = std::max(fitting, (2 * threads + blocks - 1) / blocks);
        const int64_t groups = std::min(panels, (wanted + threads - 1) / threads * threads);
        const auto first = [&](int64_t group) { return panels * group / groups; };
        for (int64_t unit = take(), next; unit < groups * blocks; unit = next) {
            next = take();
            const int64_t block = unit / groups, group = unit % groups, coming = next % groups;
            const int64_t begin = strips * block / blocks, end = strips * (block + 1) / blocks;
            const int64_t count = first(group + 1) - first(group);
            const bool fetches = next < groups * blocks && coming != group;
            const int64_t bytes = fetches ? (first(coming + 1) - first(coming)) * panel_bytes : 0;
            int64_t turn = 0;
            for (int64_t s = begin; s < end; s++)
                for (int64_t panel = first(group); panel < first(group + 1); panel++, turn++)
                    multiply<true>(
                        s, panel, false, part(first(coming), bytes, turn, (end - begin) * count));
        }
    }
};

// All rows times all panels; called by every thread of a parallel region, `taken` being 0.
template <typename In, typename Out>
void multiply_tiles(
    const PackedLinear& linear, int64_t rows, const typename In::Value* x, const float* row_scales,
    typename Out::Value* out, std::atomic<int64_t>& taken) {
    TileWork<In, Out> work(linear, rows, x, row_scales, out, taken);
    if (work.strips_stay())
        work.by_groups();
    else
        work.by_panels();
}
#endif
