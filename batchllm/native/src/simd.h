// Vectors of W float lanes, and how values are stored.
//
// Written in the vector extensions that GCC and Clang share, so one source serves every processor;
// intrinsics only where these do not come to one instruction. The library is compiled once for
// each kind of processor (setup.py), and native/kernels.py loads the best that the machine runs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;
#elif defined(__AVX2__)
#include <immintrin.h>
constexpr int W = 8;
#elif defined(BATCHLLM_EMULATED_TILES)
constexpr int W = 16;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(W * 4)));
typedef int32_t Words __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));
typedef int8_t Bytes __attribute__((vector_size(W)));

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

// Memory that begins with a line of the cache, so that no vector lies in two; not set to anything.
template <typename V>
class Lines {
    struct Free {
        void operator()(V* memory) const { std::free(memory); }
    };
    std::unique_ptr<V[], Free> memory;

  public:
    explicit Lines(size_t size)
        : memory(static_cast<V*>(std::aligned_alloc(64, (size * sizeof(V) / 64 + 1) * 64))) {}
    V* data() { return memory.get(); }
    const V* data() const { return memory.get(); }
    V& operator[](size_t i) { return memory[i]; }
};

INLINE Floats broadcast(float x) { return Floats{} + x; }

INLINE Floats largest(Floats a, Floats b) { return a > b ? a : b; }
INLINE Words largest(Words a, Words b) { return a > b ? a : b; }

template <typename V>
INLINE auto largest_in_turn(V v) {
    auto x = v[0];
    for (int i = 1; i < W; i++) x = v[i] > x ? v[i] : x;
    return x;
}

INLINE float largest(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#endif
    return largest_in_turn(v);
}

INLINE int32_t largest(Words v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)v);
#endif
    return largest_in_turn(v);
}

INLINE float float_of_bits(int32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#endif
    float x = 0;
    for (int i = 0; i < W; i++) x += v[i];
    return x;
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

// 1 / x for x in [1, 2], exact or, coarsely, to 6e-5.
template <bool coarse = false>
INLINE Floats inverse(Floats x) {
#if defined(__AVX512F__)
    if constexpr (coarse) return (Floats)_mm512_rcp14_ps((__m512)x);
#endif
    return 1.0f / x;
}

// x / (1 + e^-x), by the exponential of -|x|, which is never large.
template <bool coarse = false>
INLINE Floats silu(Floats x) {
    const Floats small = exp2_of_negative<coarse>((x < 0.0f ? x : -x) * float(M_LOG2E));
    return (x < 0.0f ? x * small : x) * inverse<coarse>(1.0f + small);
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

// How values are stored. GROUP neighbours along the summed axis of a product lie side by side in
// one 32-bit word, so that a vector holds W columns of them (products.h).
struct Bfloat16 {
    typedef uint16_t Value, Kept;  // what the cache of keys and values keeps
    static constexpr int GROUP = 2, KEPT_GROUP = 2;
    static constexpr bool ROUNDED = false;  // the cache to whole numbers
    static constexpr bool COARSE = true;  // what is rounded to eight bits need not be exact to 24

    static INLINE float get(Value x) { return float_of(x); }
    static INLINE Value put(float x) { return bfloat16_of(x); }
    static INLINE Floats widen(const Value* from) {
#if defined(__AVX512F__)
        return (Floats)_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(__AVX2__)
        return (Floats)_mm256_slli_epi32(
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
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
    // Two vectors side by side, in the time of one.
    static INLINE void narrow(Value* to, Floats v, Floats next) {
#if defined(__AVX512BF16__)
        const __m512bh narrowed = _mm512_cvtne2ps_pbh((__m512)next, (__m512)v);
        std::memcpy(to, &narrowed, sizeof narrowed);
#else
        narrow(to, v), narrow(to + W, next);
#endif
    }
    // The words with all but the first `count` values of each group set to zero.
    static INLINE Words first_of_group(Words columns, int count) {
        return count == 1 ? columns & 0xffff : columns;
    }
};

struct Float32 {
    typedef float Value, Kept;
    static constexpr int GROUP = 1, KEPT_GROUP = 1;
    static constexpr bool ROUNDED = false;
    static constexpr bool COARSE = false;

    static INLINE float get(Value x) { return x; }
    static INLINE Value put(float x) { return x; }
    static INLINE Floats widen(const Value* from) { return load<Floats>(from); }
    static INLINE void narrow(Value* to, Floats v) { store(to, v); }
    static INLINE void narrow(Value* to, Floats v, Floats next) { store(to, v), store(to + W, next); }
    static INLINE Words first_of_group(Words columns, int) { return columns; }
};
