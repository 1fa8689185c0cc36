// Products in matrix tiles: strips of up to 32 rows times the panels of a weight (panels.h).
//
// A step of a strip and a panel is four products of tiles. To read their operands takes half as
// long from the first-level cache, and longer from the second, which two of the four may come from.
// What comes next is fetched there.
//
// Few rows stay in the second-level cache, and every panel is read from memory once and meets them
// all (`by_panels`). Many are divided among threads, since what one core has just written another
// reads slower than from memory; a strip stays in the first-level cache while it meets a group of
// panels, where its rows are long a chunk of them at a time, and the group stays in the second
// (`by_groups`).
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "linear_sums.h"

constexpr int MOST_PARTS = 64;  // of a product's rows

// How many of a part's units of work were given out, in a line of the cache.
struct alignas(64) Taken {
    std::atomic<int64_t> count{0};

    int64_t next() { return count.fetch_add(1, std::memory_order_relaxed); }
};

#if defined(BATCHLLM_TILES)
constexpr int64_t CHUNK_BYTES = 20 * TILE_BYTES;  // of a row, whose strip stays where it is
constexpr int64_t GROUP_BYTES = 600 * 1024;       // of panels, in the second-level cache
constexpr int64_t ROWS_BYTES = 400 * 1024;        // of rows that stay there beside them
constexpr int64_t BLOCK_BYTES = 1536 * 1024;      // and beside one panel
constexpr int64_t WIDE_BYTES = 32 * 1024;         // of a row's outputs
constexpr int MOST_IN_CHUNKS = GROUP_BYTES / (CHUNK_BYTES * TILE_PANEL) + 1;  // panels a group
constexpr int64_t PART_STRIPS = 8;  // for fewer a thread does not read all of a weight

// tile SUM += A . B, whatever In's values are.
template <typename In, int SUM, int A, int B>
INLINE void multiply_tile() {
    if constexpr (In::SCALED)
        multiply_bytes<SUM, A, B>();
    else
        multiply_bfloat16<SUM, A, B>();
}

// What is read next, fetched into the second-level cache while something is multiplied: so many
// lines in each of its steps.
struct Fetch {
    const char *next = nullptr, *end = nullptr;
    int lines = 0;

    Fetch() = default;
    Fetch(const char* next, const char* end, int64_t steps) : next(next), end(end) {
        steps = std::max<int64_t>(steps, 1);
        lines = int(((end - next + 63) / 64 + steps - 1) / steps);
    }

    INLINE void some() {
        for (int i = 0; i < lines && next < end; i++, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// Steps of the summed axis, and what the ones before came to, unless they are the first.
template <typename In>
struct Chunk {
    int64_t begin, end;
    typename In::Sums (*partial)[2];
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

// Of more than TILE_ROWS rows. Either the rows or the panel are used again, and are to stay in the
// first-level cache.
template <typename Sink, bool ROWS_STAY>
void multiply_strip_tiles(
    const PackedLinear& linear, const Inputs<Sink>& all, const Strip<Sink>& strip, int64_t panel,
    Fetch& fetch, Sink& sink, const Chunk<typename Sink::Product>& chunk) {
    typedef typename Sink::Product In;
    constexpr int64_t SIZE = sizeof(*strip.x);
    const int64_t row_bytes = linear.inputs * SIZE, stride = all.stride * SIZE;
    const int64_t next = all.chunk_stride * SIZE;
    const int64_t steps = chunk.end - chunk.begin;
    const char* weight = static_cast<const char*>(linear.panels) +
                         (panel * row_bytes + chunk.begin * TILE_BYTES) * TILE_PANEL;
    const char* upper = reinterpret_cast<const char*>(strip.x) + chunk.begin * next;
    const char* lower = upper + TILE_ROWS * stride;
    const int written = int((STRIP + steps - 1) / steps);
    Fetch fetching = fetch;
    constexpr int64_t SUMS = sizeof(*chunk.partial);
    const auto earlier = [&](int row, int n) { return &chunk.partial[row][n]; };
    if (chunk.begin == 0) {
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
    if (chunk.end * TILE_BYTES == row_bytes) {
        sink.template store<0>(0);
        sink.template store<2>(TILE_ROWS);
        sink.begin(linear, panel, strip.count, strip.scales, strip.out);
    } else {
        store_tile<0>(earlier(0, 0), SUMS), store_tile<1>(earlier(0, 1), SUMS);
        store_tile<2>(earlier(TILE_ROWS, 0), SUMS), store_tile<3>(earlier(TILE_ROWS, 1), SUMS);
    }
}

// At most TILE_ROWS rows, and PANELS panels side by side: sums wait for their last term.
template <typename Sink, int PANELS>
void multiply_few_tiles(
    const PackedLinear& linear, const Inputs<Sink>& all, const Strip<Sink>& strip, int64_t panel,
    Fetch& fetch, Sink& sink) {
    typedef typename Sink::Product In;
    constexpr int64_t SIZE = sizeof(*strip.x);
    const int64_t row_bytes = linear.inputs * SIZE, stride = all.stride * SIZE;
    const int64_t next = all.chunk_stride * SIZE;
    const int64_t steps = row_bytes / TILE_BYTES, panel_bytes = row_bytes * TILE_PANEL;
    const char* weight = static_cast<const char*>(linear.panels) + panel * panel_bytes;
    const char* row = reinterpret_cast<const char*>(strip.x);
    const int written = int((TILE_ROWS + steps - 1) / steps);
    Fetch fetching = fetch;
    clear_tile<0>(), clear_tile<1>();
    if constexpr (PANELS == 2) clear_tile<2>(), clear_tile<3>();
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
    sink.write(STRIP);
    sink.template store<0>(0);
    sink.begin(linear, panel, strip.count, strip.scales, strip.out);
    if constexpr (PANELS == 2) {
        sink.write(STRIP);
        sink.template store<2>(0);
        sink.begin(linear, panel + 1, strip.count, strip.scales, strip.out);
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
template <typename Sink>
class TileWork {
    typedef typename Sink::Product In;
    typedef typename In::Value Value;
    const PackedLinear& linear;
    const int64_t rows;
    const Inputs<Sink> x;
    const float* const row_scales;
    const Rows<typename Sink::To> out;
    Taken* const taken;  // [MOST_PARTS]
    const int64_t panels, steps, row_bytes, panel_bytes, strips;
    const int64_t threads = omp_get_num_threads();
    Fetch next_strip, next_panels;
    Sink sink;
    alignas(64) typename In::Sums partial[MOST_IN_CHUNKS][STRIP][2];  // of a strip in chunks
    int shaped = 0;

    int rows_of(int64_t strip) const {
        return int(std::min<int64_t>(STRIP, rows - strip * STRIP));
    }
    // To be read in so many steps.
    Fetch fetch_panels(int64_t first, int64_t last, int64_t in_steps) const {
        const char* weight = static_cast<const char*>(linear.panels);
        return {weight + first * panel_bytes, weight + last * panel_bytes, in_steps};
    }
    Fetch fetch_strip(int64_t strip, int64_t in_steps) const {
        const char* from = reinterpret_cast<const char*>(x.row(strip * STRIP));
        return {from, from + rows_of(strip) * row_bytes, in_steps};
    }
    // What `function` and all like it are called with, to multiply a strip and a panel.
    template <typename Function, typename... More>
    INLINE void multiply(
        Function function, int64_t strip, int64_t panel, const More&... more) {
        const int64_t row = strip * STRIP;
        const Strip<Sink> here{rows_of(strip), x.row(row), row_scales + row, out.row(row)};
        if (here.count != shaped) shape_tiles(strip_shape(here.count));
        shaped = here.count;
        Fetch& fetch = next_strip.next < next_strip.end ? next_strip : next_panels;
        function(linear, x, here, panel, fetch, sink, more...);
    }

    // A strip and the panels of a group.
    void multiply_group(int64_t strip, int64_t first, int64_t last) {
        if (rows_of(strip) <= TILE_ROWS) {
            for (int64_t panel = first; panel < last; panel++)
                multiply(multiply_few_tiles<Sink, 1>, strip, panel);
            return;
        }
        const int64_t chunks = (row_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
        for (int64_t c = 0; c < chunks; c++) {
            Chunk<In> chunk{steps * c / chunks, steps * (c + 1) / chunks, partial[0]};
            for (int64_t panel = first; panel < last; panel++) {
                chunk.partial = partial[panel - first];
                multiply(multiply_strip_tiles<Sink, true>, strip, panel, chunk);
            }
        }
    }

    // The groups of a part of the rows that nobody has taken.
    void take_groups(int64_t part, int64_t parts) {
        const int64_t begin = strips * part / parts, end = strips * (part + 1) / parts;
        const int64_t sharing = (threads + parts - 1) / parts;
        const int64_t fitting = (panels * panel_bytes + GROUP_BYTES - 1) / GROUP_BYTES;
        const int64_t wanted = std::max(fitting, 2 * sharing);
        const int64_t groups = std::min(panels, (wanted + sharing - 1) / sharing * sharing);
        const auto first = [&](int64_t group) { return panels * group / groups; };
        const bool rows_stay = (end - begin) * STRIP * row_bytes <= ROWS_BYTES;
        for (int64_t group = taken[part].next(), next; group < groups; group = next) {
            next = taken[part].next();
            const int64_t strip_steps = (first(group + 1) - first(group)) * steps;
            next_panels = next_strip = {};
            if (next < groups)
                next_panels = fetch_panels(
                    first(next), first(next + 1),
                    (end - begin) * strip_steps / (rows_stay ? 1 : 2));
            for (int64_t s = begin; s < end; s++) {
                if (!rows_stay && (s + 1 < end || next < groups))
                    next_strip = fetch_strip(s + 1 < end ? s + 1 : begin, strip_steps / 2);
                multiply_group(s, first(group), first(group + 1));
            }
        }
    }

  public:
    TileWork(
        const PackedLinear& linear, int64_t rows, const Inputs<Sink>& x, const float* row_scales,
        const Rows<typename Sink::To>& out, Taken* taken)
        : linear(linear),
          rows(rows),
          x(x),
          row_scales(row_scales),
          out(out),
          taken(taken),
          panels((linear.outputs + TILE_PANEL - 1) / TILE_PANEL),
          steps(linear.inputs * int64_t(sizeof(Value)) / TILE_BYTES),
          row_bytes(steps * TILE_BYTES),
          panel_bytes(row_bytes * TILE_PANEL),
          strips((rows + STRIP - 1) / STRIP),
          sink(out) {}
    TileWork(const TileWork&) = delete;
    ~TileWork() {
        sink.write(STRIP);
        release_tiles();
    }

    // Whether strips should meet groups of panels: there are rows for several parts, or more than
    // the second-level cache keeps for each panel to meet. Or a panel's outputs are lines of it so
    // far apart that they push each other out.
    bool rows_are_many() const {
        const bool apart = out.stride * int64_t(sizeof(*out.values)) >= WIDE_BYTES;
        return strips >= 2 * PART_STRIPS || (strips > 2 && rows * row_bytes > BLOCK_BYTES) ||
               (strips > 4 && apart);
    }

    // All rows meet a panel. A thread asks for its next panels before it needs them, to fetch them.
    // Pairs first, and as many for each thread: one tile of rows is multiplied by two panels at
    // once, and two of a gated weight put out a line of the cache, which one thread should write.
    void by_panels() {
        const bool together = rows <= TILE_ROWS, in_pairs = together || linear.gated;
        const int64_t pairs = in_pairs ? panels / 2 / threads * threads : 0;
        const int64_t units = panels - pairs;
        const auto first = [&](int64_t unit) { return unit < pairs ? 2 * unit : unit + pairs; };
        for (int64_t unit = taken->next(), next; unit < units; unit = next) {
            next = taken->next();
            const int64_t last = first(unit + 1), step = together ? last - first(unit) : 1;
            for (int64_t panel = first(unit); panel < last; panel += step) {
                const bool more = panel + step < last, none = !more && next >= units;
                const int64_t then = more ? panel + step : first(next);
                next_panels = {};
                if (!none)
                    next_panels = fetch_panels(
                        then, together ? first(next + 1) : then + 1, strips * steps);
                for (int64_t s = 0; s < strips; s++)
                    if (rows_of(s) > TILE_ROWS)
                        multiply(
                            multiply_strip_tiles<Sink, false>, s, panel,
                            Chunk<In>{0, steps, nullptr});
                    else if (step == 2)
                        multiply(multiply_few_tiles<Sink, 2>, s, panel);
                    else
                        multiply(multiply_few_tiles<Sink, 1>, s, panel);
            }
        }
    }

    // Every thread its part of the rows, and what others have not begun; or threads share a part.
    void by_groups() {
        const int64_t most = std::min<int64_t>(threads, MOST_PARTS);
        const int64_t parts = std::clamp<int64_t>(strips / PART_STRIPS, 1, most);
        const int64_t own = omp_get_thread_num() * parts / threads;
        for (int64_t i = 0; i < parts; i++) take_groups((own + i) % parts, parts);
    }
};

// All rows times all panels; called by every thread of a parallel region.
template <typename Sink>
void multiply_tiles(
    const PackedLinear& linear, int64_t rows, const Inputs<Sink>& x, const float* row_scales,
    const Rows<typename Sink::To>& out, Taken* taken) {
    TileWork<Sink> work(linear, rows, x, row_scales, out, taken);
    if (work.rows_are_many())
        work.by_groups();
    else
        work.by_panels();
}
#endif
