// Where rows of values lie: one behind the other, or in strips, as matrix tiles read them: of each
// of 32 rows the first 64 bytes, then the next 64 of each. So what a strip's product reads and
// writes is in order, and not in many pages and in few places of a cache.
#pragma once

#include <cstdint>

constexpr int STRIP = 32;  // rows; in strips there is memory for all of the last one's

template <typename Value>
struct Rows {
    static constexpr int64_t CHUNK = 64 / int64_t(sizeof(Value));  // values of a row side by side

    Value* const values;
    const int64_t size;
    const int64_t stride, chunk_stride;  // from row to row of a strip, and from chunk to chunk

    Rows(Value* values, int64_t size, bool in_strips)
        : values(values),
          size(size),
          stride(in_strips ? CHUNK : size),
          chunk_stride(in_strips ? STRIP * CHUNK : CHUNK) {}

    // The first value of a row.
    Value* row(int64_t i) const { return values + i / STRIP * STRIP * size + i % STRIP * stride; }
    // How far behind it value `j` is.
    int64_t place(int64_t j) const { return j / CHUNK * chunk_stride + j % CHUNK; }
};
