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
// (`by_groups`). Where rows are so long that it could not, only a chunk of its panels does while it
// meets a block of strips, and so do the sums of all of them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "linear_steps.h"

constexpr int MOST_PARTS = 64;  // of a product's rows

// How many of a part's units of work were given out, in a line of the cache.
struct alignas(64) Taken {
    std::atomic<int64_t> count{0};

    int64_t next() { return count.fetch_add(1, std::memory_order_relaxed); }
};

#if defined(BATCHLLM_TILES)
// Of a row, 64 bytes each: so many stay in the first-level cache, strip by strip. Longer rows are
// multiplied in chunks, which leave some of it to the sums.
constexpr int64_t WHOLE_STEPS = 20, CHUNK_STEPS = 16;
// What stays in the second-level cache.
constexpr int64_t GROUP_BYTES = 600 * 1024;   // of panels,
constexpr int64_t ROWS_BYTES = 400 * 1024;    // and of rows beside them;
constexpr int64_t PIECE_BYTES = 300 * 1024;   // or of chunks of panels,
constexpr int64_t MOST_PARTIAL = 256;         // and of sums that wait, 4 KiB each;
constexpr int64_t BLOCK_BYTES = 1536 * 1024;  // or of rows and two panels.
constexpr int64_t FEW_PANELS = 8;             // for a group to be worth its strips' way
constexpr int64_t BLOCK_STRIPS = 16;          // that meet chunks of panels, at most
constexpr int64_t AHEAD_BYTES = 64 * 1024;    // of a long panel, to be fetched
constexpr int64_t WIDE_BYTES = 32 * 1024;     // of a row's outputs
constexpr int64_t MANY_STRIPS = 16;
constexpr int64_t PART_STRIPS = 12;  // for fewer a thread does not read all of a weight

// A thread's memory for sums that wait, which it keeps: [MOST_PARTIAL]. Each library has its own.
template <typename In>
static Partial<In>* partials() {
    static thread_local const std::unique_ptr<Partial<In>[]> kept(new Partial<In>[MOST_PARTIAL]);
    return kept.get();
}

// What a thread takes at once: strips and panels, each from the first to before the last.
struct Unit {
    int64_t first_strip, last_strip, first_panel, last_panel;

    int64_t height() const { return last_strip - first_strip; }
    int64_t width() const { return last_panel - first_panel; }
};

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
    const int64_t panels, steps, row_bytes, panel_bytes, strips, chunks;
    const int64_t threads = omp_get_num_threads();
    Fetches next;
    Sink sink;
    int shaped = 0;

    int rows_of(int64_t strip) const {
        return int(std::min<int64_t>(STRIP, rows - strip * STRIP));
    }
    const char* weight(int64_t panel, int64_t step = 0) const {
        return static_cast<const char*>(linear.panels) + panel * panel_bytes +
               step * TILE_BYTES * TILE_PANEL;
    }
    Chunk<In> chunk(int64_t c) const { return {steps * c / chunks, steps * (c + 1) / chunks}; }
    // To be read in so many steps.
    Fetch fetch_panels(int64_t first, int64_t last, int64_t in_steps) const {
        return {weight(first), (last - first) * panel_bytes, in_steps};
    }
    Fetch fetch_panels(const Unit& unit, const Chunk<In>& chunk, int64_t in_steps) const {
        const int64_t size = (chunk.end - chunk.begin) * TILE_BYTES * TILE_PANEL;
        return {weight(unit.first_panel, chunk.begin), size, panel_bytes, unit.width(), in_steps};
    }
    // The rest of the panel from AHEAD_BYTES on, and as much of panel `then`, if there is one.
    Fetch fetch_ahead(int64_t panel, int64_t then) const {
        const char* from = weight(panel) + AHEAD_BYTES;
        const int64_t size = panel_bytes - AHEAD_BYTES;
        Fetch both(from, size, weight(then) - from, then < panels ? 2 : 1, steps);
        both.lines = int((panel_bytes / 64 + steps - 1) / steps);
        return both;
    }
    Fetch fetch_strip(int64_t strip, int64_t in_steps) const {
        const char* from = reinterpret_cast<const char*>(x.row(strip * STRIP));
        return {from, rows_of(strip) * row_bytes, in_steps};
    }
    Fetch fetch_strip(int64_t strip, const Chunk<In>& chunk, int64_t in_steps) const {
        constexpr int64_t SIZE = sizeof(Value);
        const int64_t next = x.chunk_stride * SIZE, stride = x.stride * SIZE;
        const int64_t length = chunk.end - chunk.begin;
        const char* from =
            reinterpret_cast<const char*>(x.row(strip * STRIP)) + chunk.begin * next;
        if (stride == TILE_BYTES) return {from, length * next, in_steps};
        return {from, length * TILE_BYTES, stride, rows_of(strip), in_steps};
    }
    // What `function` and all like it are called with, to multiply a strip and a panel.
    template <typename Function>
    INLINE void multiply(
        Function function, int64_t strip, int64_t panel, const Chunk<In>& chunk) {
        const int64_t row = strip * STRIP;
        const Strip<Sink> here{rows_of(strip), x.row(row), row_scales + row, out.row(row)};
        if (here.count != shaped) shape_tiles(strip_shape(here.count));
        shaped = here.count;
        function(linear, x, here, panel, next, sink, chunk);
    }

    void multiply_chunk(int64_t strip, int64_t panel, const Chunk<In>& chunk) {
        if (rows_of(strip) <= TILE_ROWS)
            multiply(multiply_few_tiles<Sink, 1>, strip, panel, chunk);
        else if (chunks > 1)
            multiply(multiply_strip_tiles<Sink, true, true>, strip, panel, chunk);
        else
            multiply(multiply_strip_tiles<Sink, true, false>, strip, panel, chunk);
    }

    void multiply_panels(int64_t strip, int64_t panel, int64_t count) {
        const Chunk<In> whole{0, steps};
        if (rows_of(strip) > TILE_ROWS)
            multiply(multiply_strip_tiles<Sink, false, false>, strip, panel, whole);
        else if (count == 2)
            multiply(multiply_few_tiles<Sink, 2>, strip, panel, whole);
        else
            multiply(multiply_few_tiles<Sink, 1>, strip, panel, whole);
    }

    // A group of panels that stays in the second-level cache, and one strip after the other. `then`
    // is next, if it is not empty.
    void by_strips(const Unit& unit, const Unit& then) {
        Partial<In>* const kept = chunks > 1 ? partials<In>() : nullptr;
        const bool rows_stay = unit.height() * STRIP * row_bytes <= ROWS_BYTES;
        const int64_t strip_steps = unit.width() * steps;
        next = {};
        if (then.width() > 0)
            next.panels =
                fetch_panels(then.first_panel, then.last_panel, unit.height() * strip_steps);
        for (int64_t s = unit.first_strip; s < unit.last_strip; s++) {
            if (!rows_stay && (s + 1 < unit.last_strip || then.width() > 0))
                next.strip =
                    fetch_strip(s + 1 < unit.last_strip ? s + 1 : unit.first_strip, strip_steps);
            for (int64_t c = 0; c < chunks; c++) {
                Chunk<In> here = chunk(c);
                for (int64_t panel = unit.first_panel; panel < unit.last_panel; panel++) {
                    if (kept != nullptr) here.partial = kept + panel - unit.first_panel;
                    multiply_chunk(s, panel, here);
                }
            }
        }
    }

    // A block of strips and the panels of a group, one chunk after the other.
    void by_chunks(const Unit& unit, const Unit& then) {
        for (int64_t c = 0; c < chunks; c++) {
            Chunk<In> here = chunk(c);
            here.partial = partials<In>();
            const bool last = c + 1 == chunks;
            const Unit& following = last ? then : unit;
            const Chunk<In> later = chunk(last ? 0 : c + 1);
            const int64_t strip_steps = unit.width() * (here.end - here.begin);
            next = {};
            if (following.width() > 0)
                next.panels = fetch_panels(following, later, unit.height() * strip_steps);
            for (int64_t s = unit.first_strip; s < unit.last_strip; s++) {
                next.strip = {};
                if (s + 1 < unit.last_strip)
                    next.strip = fetch_strip(s + 1, here, strip_steps);
                else if (following.width() > 0)
                    next.strip = fetch_strip(following.first_strip, later, strip_steps);
                for (int64_t panel = unit.first_panel; panel < unit.last_panel; panel++) {
                    multiply_chunk(s, panel, here);
                    here.partial++;
                }
            }
        }
    }

    // The units of a part of the rows that nobody has taken.
    void take_units(int64_t part, int64_t parts) {
        const int64_t begin = strips * part / parts, end = strips * (part + 1) / parts;
        const int64_t sharing = (threads + parts - 1) / parts;
        const bool in_blocks = GROUP_BYTES / panel_bytes < FEW_PANELS;
        const int64_t blocks = in_blocks ? (end - begin + BLOCK_STRIPS - 1) / BLOCK_STRIPS : 1;
        const int64_t height = (end - begin + blocks - 1) / blocks;
        const int64_t chunk_bytes = panel_bytes / chunks;
        const int64_t most = in_blocks ? std::min(PIECE_BYTES / chunk_bytes, MOST_PARTIAL / height)
                                       : GROUP_BYTES / panel_bytes;
        const int64_t wanted = std::max((panels + most - 1) / most, 2 * sharing);
        const int64_t groups = std::min(panels, (wanted + sharing - 1) / sharing * sharing);
        const auto unit = [&](int64_t i) -> Unit {
            if (i >= groups * blocks) return {};
            const int64_t group = i / blocks, block = i % blocks;
            return {begin + (end - begin) * block / blocks,
                    begin + (end - begin) * (block + 1) / blocks, panels * group / groups,
                    panels * (group + 1) / groups};
        };
        for (Unit here = unit(taken[part].next()), then; here.width() > 0; here = then) {
            then = unit(taken[part].next());
            if (in_blocks)
                by_chunks(here, then);
            else
                by_strips(here, then);
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
          chunks(steps <= WHOLE_STEPS ? 1 : (steps + CHUNK_STEPS - 1) / CHUNK_STEPS),
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
        const bool large = rows * row_bytes + 2 * panel_bytes > BLOCK_BYTES;
        return strips >= MANY_STRIPS || (strips > 1 && large) || (strips > 4 && apart);
    }

    // All rows meet a panel. A thread asks for its next panels before it needs them, to fetch them;
    // where few rows meet a long one, it could be too early, and the panel itself is fetched, too.
    // Pairs first, and as many for each thread: one tile of rows is multiplied by two panels at
    // once, and two of a gated weight put out a line of the cache, which one thread should write.
    void by_panels() {
        const bool together = rows <= TILE_ROWS, in_pairs = together || linear.gated;
        const int64_t pairs = in_pairs ? panels / 2 / threads * threads : 0;
        const int64_t units = panels - pairs;
        const auto first = [&](int64_t unit) { return unit < pairs ? 2 * unit : unit + pairs; };
        for (int64_t unit = taken->next(), following; unit < units; unit = following) {
            following = taken->next();
            const int64_t last = first(unit + 1), step = together ? last - first(unit) : 1;
            for (int64_t panel = first(unit); panel < last; panel += step) {
                const int64_t then = panel + step < last ? panel + step
                                     : following < units ? first(following)
                                                         : panels;
                next = {};
                if (panel_bytes >= strips * 2 * AHEAD_BYTES) {
                    next.panels = fetch_ahead(panel, then);
                    if (step == 2) next.strip = fetch_ahead(panel + 1, then + 1);
                } else if (then < panels) {
                    next.panels = fetch_panels(
                        then, together ? first(following + 1) : then + 1, strips * steps);
                }
                for (int64_t s = 0; s < strips; s++) multiply_panels(s, panel, step);
            }
        }
    }

    // Every thread its part of the rows, and what others have not begun; or threads share a part.
    void by_groups() {
        const int64_t most = std::min<int64_t>(threads, MOST_PARTS);
        const int64_t parts = std::clamp<int64_t>(strips / PART_STRIPS, 1, most);
        const int64_t own = omp_get_thread_num() * parts / threads;
        for (int64_t i = 0; i < parts; i++) take_units((own + i) % parts, parts);
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
