// Vectors of W float lanes, and products of bfloat16 pairs or of floats in them.
//
// Written in the vector extensions that GCC and Clang share, so one source serves every processor;
// intrinsics only where a processor multiplies bfloat16 itself. The library is compiled once for
// each kind of processor (setup.py), and native/kernels.py loads the best that the machine runs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;
#elif defined(__AVX2__)
#include <immintrin.h>
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// Registers for the accumulators of a tile: ROWS x COLUMNS of them, and a few to spare.
#if defined(__AVX512F__)
constexpr int ROWS = 6, COLUMNS = 4;
#else
constexpr int ROWS = 4, COLUMNS = 2;
#endif

typedef float Floats __attribute__((vector_size(W * 4)));
typedef int32_t Words __attribute__((vector_size(W * 4)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

#define INLINE inline __attribute__((always_inline))

template <typename V>
INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <typename V>
INLINE void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

INLINE Floats broadcast(float x) { return Floats{} + x; }

INLINE Floats largest(Floats a, Floats b) { return a > b ? a : b; }

INLINE float largest(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float x = v[0];
    for (int i = 1; i < W; i++) x = v[i] > x ? v[i] : x;
    return x;
}

INLINE float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#endif
    float x = 0;
    for (int i = 0; i < W; i++) x += v[i];
    return x;
}

// Numbers in [-127, 127], rounded to the nearest, with 128 added, as W bytes.
INLINE void store_bytes(uint8_t* to, Floats v) {
    const Floats round = broadcast(12582912.0f + 128.0f);  // 1.5 * 2^23: the low byte is the sum
    store(to, __builtin_convertvector((Words)(v + round) & 0xff, Bytes));
}

// 2^x for x <= 0, exact to 2e-7 or, coarsely, 1.4e-4; 0 far below.
template <bool coarse = false>
INLINE Floats exp2_of_negative(Floats x) {
#if defined(__AVX512F__)
    if constexpr (coarse) {  // x is its floor and f
        const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
        const Floats p = ((0.0790208f * f + 0.2241219f) * f + 0.6967501f) * f + 0.9998953f;
        return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
    }
    const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    const Floats f = x - whole;
#else
    const Floats round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = x + round;
    const Floats f = x - (shifted - round);
#endif
    Floats p = (1.5403530e-4f * f + 1.3333558e-3f) * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    const Words exponent = ((Words)shifted - (Words)round) << 23;
    return x < -126.0f ? Floats{} : (Floats)((Words)p + exponent);
#endif
}

INLINE float float_of(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t bfloat16_of(float x) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// How values are stored. GROUP neighbours along the summed axis lie side by side in one 32-bit
// word, so that a vector holds W columns and a broadcast word GROUP values of a row.
struct Bfloat16 {
    typedef uint16_t Value;
    typedef Floats Sums;
    static constexpr int GROUP = 2;
    static constexpr bool SCALED = false;
    static constexpr bool COARSE = true;  // what is rounded to eight bits need not be exact to 24

    static INLINE float get(Value x) { return float_of(x); }
    static INLINE Value put(float x) { return bfloat16_of(x); }
    static INLINE Floats floats(Sums sums) { return sums; }

    static INLINE Floats widen(const Value* from) {
#if defined(__AVX512F__)
        return (Floats)_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
        Floats v;
        for (int i = 0; i < W; i++) v[i] = float_of(from[i]);
        return v;
#endif
    }
    static INLINE void narrow(Value* to, Floats v) {
#if defined(__AVX512BF16__)
        const __m256bh narrowed = _mm512_cvtneps_pbh((__m512)v);
        std::memcpy(to, &narrowed, sizeof narrowed);
#else
        for (int i = 0; i < W; i++) to[i] = bfloat16_of(v[i]);
#endif
    }
    // sum += columns[lane] . row, over one group.
    static INLINE Floats add_product(Floats sum, Words columns, const Value* row) {
#if defined(__AVX512BF16__)
        int32_t word;
        std::memcpy(&word, row, 4);
        return (Floats)_mm512_dpbf16_ps(
            (__m512)sum, (__m512bh)columns, (__m512bh)_mm512_set1_epi32(word));
#else
        sum += (Floats)(columns << 16) * float_of(row[0]);
        return sum + (Floats)(columns & int32_t(0xffff0000u)) * float_of(row[1]);
#endif
    }
    // The words with all but the first `count` values of each group set to zero.
    static INLINE Words first_of_group(Words columns, int count) {
        return count == 1 ? columns & 0xffff : columns;
    }
};

struct Float32 {
    typedef float Value;
    typedef Floats Sums;
    static constexpr int GROUP = 1;
    static constexpr bool SCALED = false;
    static constexpr bool COARSE = false;

    static INLINE float get(Value x) { return x; }
    static INLINE Value put(float x) { return x; }
    static INLINE Floats floats(Sums sums) { return sums; }
    static INLINE Floats widen(const Value* from) { return load<Floats>(from); }
    static INLINE void narrow(Value* to, Floats v) { store(to, v); }
    static INLINE Floats add_product(Floats sum, Words columns, const Value* row) {
        return sum + (Floats)columns * *row;
    }
    static INLINE Words first_of_group(Words columns, int) { return columns; }
};

// Unsigned bytes in a row, signed ones in a word of the columns; sums are whole numbers.
struct Int8 {
    typedef uint8_t Value;
    typedef Words Sums;
    static constexpr int GROUP = 4;
    static constexpr bool SCALED = true;

    static INLINE Floats floats(Sums sums) { return __builtin_convertvector(sums, Floats); }
    static INLINE Words add_product(Words sum, Words columns, const Value* row) {
        int32_t word;
        std::memcpy(&word, row, 4);
#if defined(__AVX512VNNI__)
        // Not the intrinsic: GCC 12 copies its accumulators through the stack.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(Words{} + word), "v"(columns));
        return sum;
#elif defined(__AVX512BW__)
        const __m512i both = _mm512_set1_epi32(word), signs = (__m512i)columns;
        const __m512i low = _mm512_madd_epi16(
            _mm512_and_si512(both, _mm512_set1_epi16(0xff)),
            _mm512_srai_epi16(_mm512_slli_epi16(signs, 8), 8));
        const __m512i high =
            _mm512_madd_epi16(_mm512_srli_epi16(both, 8), _mm512_srai_epi16(signs, 8));
        return sum + (Words)_mm512_add_epi32(low, high);
#elif defined(__AVX2__)
        const __m256i both = _mm256_set1_epi32(word), signs = (__m256i)columns;
        const __m256i low = _mm256_madd_epi16(
            _mm256_and_si256(both, _mm256_set1_epi16(0xff)),
            _mm256_srai_epi16(_mm256_slli_epi16(signs, 8), 8));
        const __m256i high =
            _mm256_madd_epi16(_mm256_srli_epi16(both, 8), _mm256_srai_epi16(signs, 8));
        return sum + (Words)_mm256_add_epi32(low, high);
#else
        sum += (columns << 24 >> 24) * int32_t(row[0]);
        sum += (columns << 16 >> 24) * int32_t(row[1]);
        sum += (columns << 8 >> 24) * int32_t(row[2]);
        return sum + (columns >> 24) * int32_t(row[3]);
#endif
    }
};
