// The names of device.h on a CPU, one block after the other, to hold a kernel's own lines against
// a reference where there is no GPU, and to find what a GPU would not tell: an access out of
// bounds, two threads at one cell of shared memory with no barrier between them, a read of what was
// never written or whose copy has not arrived, a warp that does not act as one.
//
// The threads of a block are fibers. One runs until it meets the others, at a barrier or in an
// operation of the whole warp, so the order in which they run is fixed, and what could go otherwise
// on a GPU is found by the books on shared memory (emulation_memory.h) and not by chance.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "emulation_fiber.h"
#include "emulation_memory.h"

#define BATCHLLM_DEVICE inline
#define BATCHLLM_KERNEL(threads, blocks) void

namespace batchllm {

template <typename T>
struct Global {
    T* data;
    int64_t size;

    T& operator[](int64_t index) const {
        check(index, 1);
        return data[index];
    }
    void check(int64_t index, int64_t count) const {
        if (index < 0 || index + count > size) {
            emulation::fail(
                "global memory: [" + std::to_string(index) + ", " + std::to_string(index + count) +
                ") of " + std::to_string(size)
            );
        }
    }
};

// A reference into shared memory: reads and writes go through the books.
template <typename T>
struct SharedCell {
    int offset;

    operator T() const {
        T value;
        emulation::block().memory.read(emulation::self(), offset, sizeof(T));
        std::memcpy(&value, emulation::block().memory.data(offset), sizeof(T));
        return value;
    }
    const SharedCell& operator=(T value) const {
        emulation::block().memory.write(emulation::self(), offset, sizeof(T));
        std::memcpy(emulation::block().memory.data(offset), &value, sizeof(T));
        return *this;
    }
    const SharedCell& operator=(const SharedCell& other) const {
        return *this = static_cast<T>(other);
    }
};

template <typename T>
struct Shared {
    int offset;

    SharedCell<T> operator[](int index) const {
        return {offset + index * static_cast<int>(sizeof(T))};
    }
    Shared operator+(int index) const { return {offset + index * static_cast<int>(sizeof(T))}; }
    template <typename U>
    Shared<U> as() const {
        return {offset};
    }
};

template <typename T>
Shared<T> shared_memory() {
    return {0};
}

inline int thread_index() { return emulation::self().thread; }
inline int block_index() { return emulation::block().index; }
inline int num_blocks() { return emulation::block().num_blocks; }
inline void barrier() { emulation::block().barrier(); }

inline float shuffle_xor(float value, int mask) {
    float result;
    emulation::block().with_warp("shuffle_xor", &value, &result, [mask](auto& in, auto& out) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
            *static_cast<float*>(out[lane]) = *static_cast<const float*>(in[lane ^ mask]);
        }
    });
    return result;
}

inline int atomic_add(const Global<int32_t>& array, int64_t index, int value) {
    int before = array[index];
    array[index] = before + value;
    return before;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Rounded to nearest, ties to even.
inline uint32_t bfloat16_bits(float value) {
    const uint32_t bits = bits_of_float(value);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline uint32_t pack_bfloat16(float low, float high) {
    return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}

template <typename T, typename U>
T load(const Global<U>& array, int64_t index) {
    array.check(index, sizeof(T) / sizeof(U));
    emulation::check_aligned(array.data + index, sizeof(T));
    T value;
    std::memcpy(&value, array.data + index, sizeof(T));
    return value;
}

template <typename T, typename U>
void store(const Global<U>& array, int64_t index, T value) {
    array.check(index, sizeof(T) / sizeof(U));
    emulation::check_aligned(array.data + index, sizeof(T));
    std::memcpy(array.data + index, &value, sizeof(T));
}

inline void store2(const Global<float>& array, int64_t index, float a, float b) {
    array.check(index, 2);
    emulation::check_aligned(array.data + index, 8);
    array.data[index] = a;
    array.data[index + 1] = b;
}

// Copied when it is waited for: nobody may rely on it before.
template <int Bytes>
void copy_async(
    Shared<unsigned char> to, const Global<unsigned char>& from, uint32_t piece, bool zeros
) {
    const int64_t index = static_cast<int64_t>(piece) * Bytes;
    if (!zeros) {
        from.check(index, Bytes);
        emulation::check_aligned(from.data + index, Bytes);
    }
    emulation::block().memory.begin_copy(
        emulation::self(), {to.offset, Bytes, zeros ? nullptr : from.data + index}
    );
}

inline void copy_async_commit() { emulation::self().commit_copies(); }

template <int Left>
void copy_async_wait() {
    emulation::block().memory.end_copies(emulation::self(), Left);
}

namespace emulation {

// The fragments of ldmatrix: lane i holds columns 2 (i % 4) and the next of row i / 4 of each
// matrix, transposed its rows and columns exchanged.
inline void load_matrices(uint32_t (&out)[4], Shared<uint16_t> row, bool transposed) {
    Block& here = block();
    here.memory.read(self(), row.offset, 16);
    check_aligned(here.memory.data(row.offset), 16);
    const uint16_t* address = reinterpret_cast<const uint16_t*>(here.memory.data(row.offset));
    const char* name = transposed ? "load_matrices_transposed" : "load_matrices";
    here.with_warp(name, &address, out, [transposed, &here](auto& in, auto& all) {
        const auto rows = [&](int matrix, int index) {
            return *static_cast<const uint16_t* const*>(in[8 * matrix + index]);
        };
        for (int matrix = 0; matrix < 4; ++matrix) {
            here.memory.count_conflicts([&](int i) { return rows(matrix, i); });
            for (int lane = 0; lane < kWarpSize; ++lane) {
                int major = lane / 4, minor = 2 * (lane % 4);
                uint32_t low = transposed ? rows(matrix, minor)[major] : rows(matrix, major)[minor];
                uint32_t high =
                    transposed ? rows(matrix, minor + 1)[major] : rows(matrix, major)[minor + 1];
                static_cast<uint32_t*>(all[lane])[matrix] = low | high << 16;
            }
        }
    });
}

struct MultiplyOperands {
    float sum[4];
    uint32_t a[4];
    uint32_t b[2];
};

inline float half(const uint32_t* registers, int index) {
    return float_of_bits(index % 2 ? registers[index / 2] & 0xffff0000u : registers[index / 2] << 16);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": with group = lane / 4 and
// pair = 2 (lane % 4), element i of a lies in row group + 8 (i / 2 % 2) and column pair + i % 2 +
// 8 (i / 4); of b in row pair + i % 2 + 8 (i / 2) and column group; of the sum in row
// group + 8 (i / 2) and column pair + i % 2.
inline void multiply_add(const std::vector<const void*>& in, const std::vector<void*>& out) {
    float a[16][16], b[16][8], sum[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const auto& mine = *static_cast<const MultiplyOperands*>(in[lane]);
        int group = lane / 4, pair = 2 * (lane % 4);
        for (int i = 0; i < 8; ++i) {
            a[group + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] = half(mine.a, i);
        }
        for (int i = 0; i < 4; ++i) b[pair + i % 2 + 8 * (i / 2)][group] = half(mine.b, i);
        for (int i = 0; i < 4; ++i) sum[group + 8 * (i / 2)][pair + i % 2] = mine.sum[i];
    }
    for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) sum[m][n] += a[m][k] * b[k][n];
        }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        for (int i = 0; i < 4; ++i) {
            static_cast<float*>(out[lane])[i] = sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
        }
    }
}

}  // namespace emulation

inline void load_matrices(uint32_t (&out)[4], Shared<uint16_t> row) {
    emulation::load_matrices(out, row, false);
}

inline void load_matrices_transposed(uint32_t (&out)[4], Shared<uint16_t> row) {
    emulation::load_matrices(out, row, true);
}

inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::MultiplyOperands operands{
        {sum[0], sum[1], sum[2], sum[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}
    };
    emulation::block().with_warp("multiply_add", &operands, sum, emulation::multiply_add);
}

// Runs a kernel's blocks one after the other; null, or what went wrong first.
template <typename... Args>
const char* launch(
    void (*kernel)(Args...), int blocks, int threads, int shared_bytes, void*, Args... args
) {
    return emulation::run_grid(blocks, threads, shared_bytes, [&] { kernel(args...); });
}

template <typename... Args>
int resident_blocks(void (*)(Args...), int, int) {
    return 6;  // of a small device
}

}  // namespace batchllm
