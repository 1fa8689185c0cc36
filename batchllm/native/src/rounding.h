// Rows rounded to eight bits, a scale each, as int8 weights are multiplied by them.
#pragma once

#include <algorithm>
#include <cmath>

#include "products.h"
#include "strips.h"

// 64 bytes of a row in bfloat16 at once, without what it takes to widen them in order: every other
// value is already the upper half of a word.
template <typename T>
struct RoundedChunks {
    static constexpr bool CAN = false;
};

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
template <>
struct RoundedChunks<Bfloat16> {
    static constexpr bool CAN = true;
    __m512i most = _mm512_setzero_si512();

    INLINE void meet(const uint16_t* from) {
        const __m512i bits = _mm512_and_si512(load<__m512i>(from), _mm512_set1_epi16(0x7fff));
        most = _mm512_max_epu16(most, bits);
    }
    // The largest magnitude, or what is not a number: its bits are larger still.
    float peak() const {
        const __m512i low = _mm512_and_si512(most, _mm512_set1_epi32(0xffff));
        const __m512i all = _mm512_max_epu32(low, _mm512_srli_epi32(most, 16));
        return float_of(uint16_t(_mm512_reduce_max_epu32(all)));
    }
    static INLINE void put(uint8_t* to, const uint16_t* from, float inverse) {
        const Words pairs = load<Words>(from);
        const auto rounded = [&](Words upper) {
            return (Words)((Floats)upper * inverse + Int8Product::ROUND);
        };
        const Words even = rounded(pairs << 16), odd = rounded(pairs & int32_t(0xffff0000u));
        const Words both = (even & 0xff) | (odd << 8);
        store(to, _mm512_cvtepi32_epi16((__m512i)both));
    }
};
#endif

// The largest magnitude of a row from `begin` on, or not a number where one there is not finite.
template <typename T>
INLINE float peak_of(
    const Rows<const typename T::Value>& all, const typename T::Value* row, int64_t begin) {
    const int64_t size = all.size, whole = size - size % W;
    Floats most{}, sums{};
    for (int64_t j = begin; j < whole; j += W) {
        const Floats v = T::widen(row + all.place(j));
        most = largest(v < 0.0f ? -v : v, most);
        sums += v - v;  // 0, or not a number
    }
    float peak = largest(most), nothing = sum(sums);
    for (int64_t j = whole; j < size; j++) {
        const float v = T::get(row[all.place(j)]);
        peak = std::max(peak, std::fabs(v));
        nothing += v - v;
    }
    return peak + nothing;
}

// Rounds a row to 128 + [-127, 127]; returns its scale. Not a number anywhere: the scale is none.
template <typename T>
float round_row(
    const Rows<const typename T::Value>& all, int64_t i, const Rows<Int8Product::Value>& rounded) {
    typedef RoundedChunks<T> Chunks;
    constexpr int64_t CHUNK = Rows<const typename T::Value>::CHUNK;
    const typename T::Value* row = all.row(i);
    Int8Product::Value* to = rounded.row(i);
    const int64_t size = all.size, chunked = Chunks::CAN ? size - size % CHUNK : 0;
    const int64_t whole = size - size % W;
    float peak = peak_of<T>(all, row, chunked);
    if constexpr (Chunks::CAN) {
        Chunks chunks;
        for (int64_t c = 0; c < chunked / CHUNK; c++) chunks.meet(row + c * all.chunk_stride);
        const float first = chunks.peak();
        peak = std::max(first, peak) + (first - first) + (peak - peak);  // 0, or not a number
    }
    const float inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
    if constexpr (Chunks::CAN)
        for (int64_t c = 0; c < chunked / CHUNK; c++)
            Chunks::put(to + rounded.place(c * CHUNK), row + c * all.chunk_stride, inverse);
    for (int64_t j = chunked; j < whole; j += W)
        Int8Product::put(to + rounded.place(j), T::widen(row + all.place(j)) * inverse);
    for (int64_t j = whole; j < size; j++)
        to[rounded.place(j)] = Int8Product::Value(
            int(std::nearbyint(T::get(row[all.place(j)]) * inverse)) + 128);
    return peak / 127.0f;
}
