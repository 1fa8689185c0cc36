// What a product multiplies: rows, as Value, by columns, in vectors of W words.
//
// A word of a column holds GROUP of its neighbours along the summed axis. A processor multiplies it
// whole, or takes it apart into PARTS; each is multiplied by GROUP / PARTS neighbours of a row.
#pragma once

#include "simd.h"

// Without this GCC multiplies all before it adds, and runs out of registers where there are 16.
template <typename V>
INLINE V in_order(V sum) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    asm volatile("" : "+x"(sum));
#endif
    return sum;
}

// sums[r][n] += the words at columns[n] . the row at rows(r), over one group, for R rows.
template <typename P, int R, int N, typename Columns, typename Rows>
INLINE void add_products(typename P::Sums (&sums)[R][N], Columns columns, Rows rows) {
#pragma GCC unroll 8
    for (int p = 0; p < P::PARTS; p++) {
        decltype(P::part(Words{}, 0)) part[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) part[n] = P::part(columns(n), p);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++)
                sums[r][n] = in_order(
                    P::add_product(sums[r][n], part[n], rows(r) + p * (P::GROUP / P::PARTS)));
    }
}

struct Float32Product {
    typedef float Value;
    typedef Floats Sums;
    static constexpr int GROUP = 1, PARTS = 1;
    static constexpr bool SCALED = false;

    static INLINE void put(Value* to, Floats v) { store(to, v); }
    static INLINE void put(Value* to, Floats v, Floats next) { put(to, v), put(to + W, next); }
    static INLINE Floats floats(Sums sums) { return sums; }
    static INLINE Floats part(Words column, int) { return (Floats)column; }
    static INLINE Sums add_product(Sums sum, Floats part, const Value* row) {
        return sum + part * *row;
    }
};

#if defined(__AVX512BF16__) || defined(BATCHLLM_EMULATED_TILES)
struct Bfloat16Product {
    typedef uint16_t Value;
    typedef Floats Sums;
    static constexpr int GROUP = 2, PARTS = 1;
    static constexpr bool SCALED = false;

    static INLINE void put(Value* to, Floats v) { Bfloat16::narrow(to, v); }
    static INLINE void put(Value* to, Floats v, Floats next) { Bfloat16::narrow(to, v, next); }
    static INLINE Floats floats(Sums sums) { return sums; }
    static INLINE Words part(Words column, int) { return column; }
    static INLINE Sums add_product(Sums sum, Words part, const Value* row) {
#if defined(__AVX512BF16__)
        int32_t word;
        std::memcpy(&word, row, 4);
        return (Floats)_mm512_dpbf16_ps(
            (__m512)sum, (__m512bh)part, (__m512bh)_mm512_set1_epi32(word));
#else
        return sum + (Floats)(part << 16) * float_of(row[0]) +
               (Floats)(part & int32_t(0xffff0000u)) * float_of(row[1]);
#endif
    }
};
#else
// Columns are bfloat16 and what is computed with is float: rows are widened before.
struct Bfloat16Product : Float32Product {
    static constexpr int GROUP = 2, PARTS = 2;

    static INLINE Floats part(Words column, int p) {
        return (Floats)(p == 0 ? column << 16 : column & int32_t(0xffff0000u));
    }
};
#endif

// Rows are whole numbers with 128 added, as VNNI multiplies unsigned by signed bytes; sums are
// exact. Other processors multiply pairs of 16 bits: they take a word's odd and its even bytes.
struct Int8Product {
    typedef Words Sums;
    static constexpr int GROUP = 4;
    static constexpr bool SCALED = true;
#if defined(__AVX512VNNI__)
    typedef uint8_t Value;
    static constexpr int PARTS = 1;
#elif defined(__AVX2__)
    typedef int16_t Value;
    static constexpr int PARTS = 2;
#else
    typedef uint8_t Value;
    static constexpr int PARTS = 4;
#endif

    static INLINE Floats floats(Sums sums) { return __builtin_convertvector(sums, Floats); }

    // 1.5 * 2^23 and 128: added to a number, the low byte is the number rounded, 128 added.
    static constexpr float ROUND = 12582912.0f + 128.0f;

    // Stores W numbers in [-127, 127], rounded to the nearest.
    static INLINE void put(Value* to, Floats v) {
        typedef Value Values __attribute__((vector_size(W * sizeof(Value))));
        store(to, __builtin_convertvector((Words)(v + ROUND) & 0xff, Values));
    }

    static INLINE Words part(Words column, int p) {
#if defined(__AVX512VNNI__)
        return column;
#elif defined(__AVX512F__)
        const __m512i w = (__m512i)column;
        return (Words)_mm512_srai_epi16(p == 0 ? _mm512_slli_epi16(w, 8) : w, 8);
#elif defined(__AVX2__)
        const __m256i w = (__m256i)column;
        return (Words)_mm256_srai_epi16(p == 0 ? _mm256_slli_epi16(w, 8) : w, 8);
#else
        return column << (24 - 8 * p) >> 24;
#endif
    }

    static INLINE Words add_product(Words sum, Words part, const Value* row) {
#if defined(__AVX2__)
        int32_t word;
        std::memcpy(&word, row, 4);
#endif
#if defined(__AVX512VNNI__)
        // Not the intrinsic: GCC 12 copies its accumulators through the stack.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(Words{} + word), "v"(part));
        return sum;
#elif defined(__AVX512F__)
        return sum + (Words)_mm512_madd_epi16((__m512i)part, _mm512_set1_epi32(word));
#elif defined(__AVX2__)
        return sum + (Words)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi32(word));
#else
        return sum + part * int32_t(*row);
#endif
    }
};
