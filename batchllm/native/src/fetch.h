// Fetching what a product will read into the second-level cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

// What is read next, fetched while something is multiplied: pieces, each `stride` behind the one
// before, so many lines in each step.
//
// A line that is asked for waits in one of few places for memory, and tiles from the second-level
// cache wait for these, too. But what follows in a page the processor fetches by itself, into the
// second-level cache alone. So every fourth line another one opens the next page, whose lines are
// then there before they are asked for.
struct Fetch {
    static constexpr uintptr_t PAGE = 4096;
    const char *next = nullptr, *end = nullptr;
    int64_t stride = 0, size = 0, pieces = 0;  // those left, this one too
    int lines = 0;

    Fetch() = default;
    Fetch(const char* from, int64_t size, int64_t steps) : Fetch(from, size, 0, 1, steps) {}
    Fetch(const char* from, int64_t size, int64_t stride, int64_t pieces, int64_t steps)
        : next(from), end(from + size), stride(stride), size(size), pieces(pieces) {
        steps = std::max<int64_t>(steps, 1);
        lines = int((pieces * ((size + 63) / 64) + steps - 1) / steps);
    }

    INLINE void some() {
        if (lines == 0) return;
        for (int i = 0; i < lines && next < end; i++, next += 64) {
            __builtin_prefetch(next, 0, 2);
            const uintptr_t in_page = reinterpret_cast<uintptr_t>(next) % PAGE;
            if (in_page % 256 == 0)
                __builtin_prefetch(next - in_page + PAGE + in_page / 4, 0, 2);
        }
        if (__builtin_expect(next >= end, 0)) turn();
    }

  private:
    INLINE void turn() {
        if (--pieces > 0)
            next = end - size + stride, end += stride;
        else
            lines = 0;
    }
};

// Both evenly, all the time: many lines at once would take all of those places.
struct Fetches {
    Fetch strip, panels;

    INLINE void some() { strip.some(), panels.some(); }
};
