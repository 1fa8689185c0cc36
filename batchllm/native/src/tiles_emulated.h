// What tiles.h has of the processor, in plain C++: for tests on processors without.
//
// A tile is as large as its shape says, and what lies beyond it must not be asked for: memory is
// touched exactly where the instructions would.
#pragma once

#include <cassert>

struct Tile {
    int rows = 0, bytes = 0;
    alignas(64) unsigned char memory[TILE_ROWS][TILE_BYTES] = {};
};

inline thread_local Tile emulated_tiles[8];

inline void shape_tiles(const TileShape& shape) {
    for (int t = 0; t < 8; t++) {
        emulated_tiles[t] = Tile{};
        emulated_tiles[t].rows = shape.rows[t];
        emulated_tiles[t].bytes = shape.row_bytes[t];
    }
}

inline void release_tiles() {
    for (Tile& tile : emulated_tiles) tile = Tile{};
}

template <int T>
void clear_tile() {
    std::memset(emulated_tiles[T].memory, 0, sizeof emulated_tiles[T].memory);
}

template <int T>
void load_tile(const void* from, int64_t stride) {
    Tile& tile = emulated_tiles[T];
    assert(tile.rows > 0);  // a processor faults where no shape was given
    clear_tile<T>();
    for (int r = 0; r < tile.rows; r++)
        std::memcpy(tile.memory[r], static_cast<const char*>(from) + r * stride, tile.bytes);
}

template <int T>
void load_tile_once(const void* from, int64_t stride) {
    load_tile<T>(from, stride);
}

template <int T>
void store_tile(void* to, int64_t stride) {
    const Tile& tile = emulated_tiles[T];
    assert(tile.rows > 0);
    for (int r = 0; r < tile.rows; r++)
        std::memcpy(static_cast<char*>(to) + r * stride, tile.memory[r], tile.bytes);
}

// sum[r][n] += dot(word of A at [r][k], word of B at [k][n]) over the words k of A's rows.
template <int SUM, int A, int B, typename Value, typename Dot>
void multiply_tiles_by(Dot dot) {
    const Tile &a = emulated_tiles[A], &b = emulated_tiles[B];
    Tile& sum = emulated_tiles[SUM];
    assert(sum.rows == a.rows && sum.bytes == b.bytes && a.bytes == b.rows * 4);
    for (int r = 0; r < sum.rows; r++)
        for (int n = 0; n < sum.bytes / 4; n++) {
            Value value;
            std::memcpy(&value, sum.memory[r] + n * 4, 4);
            for (int k = 0; k < b.rows; k++) dot(value, a.memory[r] + k * 4, b.memory[k] + n * 4);
            std::memcpy(sum.memory[r] + n * 4, &value, 4);
        }
}

template <int SUM, int A, int B>
void multiply_bfloat16() {
    multiply_tiles_by<SUM, A, B, float>([](float& sum, const void* a, const void* b) {
        uint16_t left[2], right[2];
        std::memcpy(left, a, 4);
        std::memcpy(right, b, 4);
        for (int i = 0; i < 2; i++) sum += float_of(left[i]) * float_of(right[i]);
    });
}

template <int SUM, int A, int B, typename Left>
void multiply_bytes_of() {
    multiply_tiles_by<SUM, A, B, int32_t>([](int32_t& sum, const void* a, const void* b) {
        for (int i = 0; i < 4; i++)
            sum += int32_t(static_cast<const Left*>(a)[i]) * static_cast<const int8_t*>(b)[i];
    });
}

template <int SUM, int A, int B>
void multiply_bytes() {
    multiply_bytes_of<SUM, A, B, uint8_t>();
}

template <int SUM, int A, int B>
void multiply_signed_bytes() {
    multiply_bytes_of<SUM, A, B, int8_t>();
}

inline bool may_use_tiles() { return true; }
