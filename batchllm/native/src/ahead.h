// Fetching keys and values into the caches before they are multiplied.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "simd.h"

// What a tile will read and the thread's next one, fetched while it multiplies: private segments,
// which many a decoding query has, are read once each, so they cost the way from memory and little
// else. A part is the keys and the values of W tokens.
class Ahead {
    struct Part {
        const char *keys, *values, *key_scales, *value_scales;
    };
    std::vector<Part> parts;
    size_t next = 0, used = 0;
    const int half, lines;  // of the cache: those that the keys of a part are; keys, values, scales
    int line = 0;           // of the next part, if some of it was fetched
    static constexpr int LINE_BYTES = 64;
    static constexpr size_t MOST = 96;  // of them: they must stay in the second-level cache

  public:
    Ahead(int part_bytes, bool scaled)
        : half((part_bytes + LINE_BYTES - 1) / LINE_BYTES), lines(2 * half + (scaled ? 2 : 0)) {}
    void clear() {
        parts.clear();
        next = used = 0, line = 0;
    }
    // Parts that were used are forgotten; more may be added.
    void forget() {
        parts.erase(parts.begin(), parts.begin() + used);
        next -= used;
        used = 0;
    }
    void add(
        const void* keys, const void* values, const float* key_scales, const float* value_scales) {
        parts.push_back(
            {static_cast<const char*>(keys), static_cast<const char*>(values),
             reinterpret_cast<const char*>(key_scales),
             reinterpret_cast<const char*>(value_scales)});
    }
    // That many more parts are read from now on, and need not be fetched.
    void use(size_t count) {
        used += count;
        if (next < used) next = used, line = 0;
    }
    // Fetches the next `count` lines into the second-level cache. Many at once wait for each other,
    // and what is multiplied waits behind them: a few are to be fetched beside everything else.
    void fetch(int count) {
        for (; count > 0 && next < std::min(parts.size(), used + MOST); count--) {
            const Part& part = parts[next];
            const char* from = line < half       ? part.keys + line * LINE_BYTES
                               : line < 2 * half ? part.values + (line - half) * LINE_BYTES
                               : line == 2 * half ? part.key_scales
                                                  : part.value_scales;
            __builtin_prefetch(from, 0, 2);
            if (++line == lines) next++, line = 0;
        }
    }
    // The keys and values to fetch next, if there are any.
    void take(const char*& keys, const char*& values) {
        if (next >= std::min(parts.size(), used + MOST)) return;
        keys = parts[next].keys, values = parts[next].values;
        next++;
    }
};
