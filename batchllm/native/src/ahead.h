// Fetching keys and values into the caches before they are multiplied.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

// What a tile will read and the thread's next one, fetched while it multiplies: private segments,
// which many a decoding query has, are read once each, so they cost the way from memory and little
// else. A part is the keys and the values of W tokens.
template <typename T>
class Ahead {
    typedef typename T::Value Value;
    struct Part {
        const Value *keys, *values;
    };
    std::vector<Part> parts;
    size_t next = 0, used = 0;
    static constexpr size_t MOST = 96;  // of them: they must stay in the second-level cache

  public:
    // Parts that were used are forgotten; more may be added.
    void forget() {
        parts.erase(parts.begin(), parts.begin() + used);
        next -= used;
        used = 0;
    }
    void add(const Value* keys, const Value* values) { parts.push_back({keys, values}); }
    // That many more parts are read from now on, and need not be fetched.
    void use(size_t count) {
        used += count;
        next = std::max(next, used);
    }
    // What to fetch next; `idle` if there is nothing.
    Part take(const Value* idle) {
        return next < std::min(parts.size(), used + MOST) ? parts[next++] : Part{idle, idle};
    }
};
