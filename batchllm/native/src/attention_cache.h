// The cache of one layer: where keys and values lie, how a step's get there, how they are widened.
//
// They lie as the products want them, so nothing is gathered or packed in a step. Of each KV head,
// [block][block_size / W] parts of W tokens, one after the other:
//   keys   [head_dim / GROUP][W tokens][GROUP]
//   values [W / GROUP][head_dim][GROUP tokens]
// A unit reads one head's, so what it reads of neighbouring blocks lies in order. In int8, with a
// GROUP of four, a token's key and its value are each multiplied by a scale; those of a head's
// blocks [block][block_size], float32, lie behind its last block.
#pragma once

#include <type_traits>

#include "ahead.h"
#include "attention.h"
#include "simd.h"

// A cache of int8 of what is T outside.
template <typename T>
struct Rounded : T {
    typedef int8_t Kept;
    static constexpr int KEPT_GROUP = 4;
    static constexpr bool ROUNDED = true;
};

template <typename T>
struct Layout {
    typedef typename T::Kept Kept;
    static constexpr int GROUP = T::KEPT_GROUP;
    const int head_dim, block_size;
    const int64_t numbers, head_values;  // of a head: those that are no scales; all, in Kept

    explicit Layout(const Step& s)
        : head_dim(s.head_dim),
          block_size(s.block_size),
          numbers(s.num_blocks * s.block_size * s.head_dim),
          head_values(
              numbers + (T::ROUNDED ? s.num_blocks * s.block_size * int64_t(sizeof(float)) : 0)) {}

    // The part that a block's token `offset` is in.
    int64_t part_place(int64_t block, int64_t offset) const {
        return (block * block_size + offset / W * W) * head_dim;
    }
    // Within a part: the first GROUP of a token's key, the others W * GROUP further each.
    static int64_t key_place(int64_t offset) { return offset % W * GROUP; }
    // Within a part: the first of a token's values, the others GROUP further each.
    int64_t value_place(int64_t offset) const {
        return offset % W / GROUP * GROUP * head_dim + offset % GROUP;
    }
    // The scale of a block's token in a head's memory; the next tokens' are behind it.
    template <typename Memory>
    auto* scales(Memory* head, int64_t block, int64_t offset) const {
        typedef std::conditional_t<std::is_const_v<Memory>, const float, float> Scale;
        return reinterpret_cast<Scale*>(head + numbers) + block * block_size + offset;
    }
};

// Fetches where a token's keys and values will be written: a key is a word in each of many lines,
// which its neighbours in the block share.
template <typename T>
INLINE void fetch_slot(const Step& s, const Layer& layer, int64_t token) {
    typedef typename T::Kept Kept;
    constexpr int LINE = 64 / sizeof(Kept);
    const Layout<T> layout(s);
    const int64_t block = s.slots[token] / s.block_size, offset = s.slots[token] % s.block_size;
    if (token > 0 && s.slots[token] == s.slots[token - 1] + 1 && offset % W != 0) return;
    for (int h = 0; h < s.num_kv_heads; h++) {
        const Kept* keys = static_cast<const Kept*>(layer.keys) + h * layout.head_values;
        const Kept* values = static_cast<const Kept*>(layer.values) + h * layout.head_values;
        const Kept* key = keys + layout.part_place(block, offset);
        const Kept* value = values + layout.part_place(block, offset) + layout.value_place(offset);
        for (int i = 0; i < W * s.head_dim; i += LINE) __builtin_prefetch(key + i, 1);
        for (int i = 0; i < T::KEPT_GROUP * s.head_dim; i += LINE) __builtin_prefetch(value + i, 1);
        if (T::ROUNDED) {
            __builtin_prefetch(layout.scales(keys, block, offset), 1);
            __builtin_prefetch(layout.scales(values, block, offset), 1);
        }
    }
}

// Rotates a query or a key, from what T stores to what To does; both may be in the same place.
template <typename T, typename To>
INLINE void rotate(
    const typename T::Value* from, const float* cos, const float* sin, int half,
    typename To::Value* to) {
    int d = 0;
    for (; d + W <= half; d += W) {
        const Floats a = T::widen(from + d), b = T::widen(from + half + d);
        const Floats c = load<Floats>(cos + d), i = load<Floats>(sin + d);
        To::narrow(to + d, a * c - b * i);
        To::narrow(to + half + d, b * c + a * i);
    }
    for (; d < half; d++) {
        const float a = T::get(from[d]), b = T::get(from[half + d]);
        to[d] = To::put(a * cos[d] - b * sin[d]);
        to[half + d] = To::put(b * cos[d] + a * sin[d]);
    }
}

// Writes a key [head_dim] to its part.
template <typename T>
INLINE void write_key(
    const Layout<T>& layout, const typename T::Kept* key, int64_t offset,
    typename T::Kept* part) {
    constexpr int GROUP = T::KEPT_GROUP;
    part += layout.key_place(offset);
    for (int d = 0; d < layout.head_dim; d += GROUP, part += W * GROUP)
        std::memcpy(part, key + d, sizeof(*key) * GROUP);
}

#if defined(__AVX512BW__)
INLINE __m512i words_of(const uint16_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
}
INLINE __m512i words_of(const int8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}
#endif

// The same of a value.
template <typename T>
INLINE void write_value(
    const Layout<T>& layout, const typename T::Kept* value, int64_t offset,
    typename T::Kept* part) {
    constexpr int GROUP = T::KEPT_GROUP;
    part += layout.value_place(offset);
    int d = 0;
#if defined(__AVX512BW__)  // to one place of each word
    if constexpr (GROUP > 1) {
        const int bits = 32 / GROUP, place = int(offset % GROUP);
        const __mmask64 there = (GROUP == 2 ? 0x3333333333333333 : 0x1111111111111111)
                                << (place * bits / 8);
        for (; d + W <= layout.head_dim; d += W)
            _mm512_mask_storeu_epi8(
                part + d * GROUP - place, there,
                _mm512_slli_epi32(words_of(value + d), place * bits));
    }
#endif
    for (; d < layout.head_dim; d++) part[d * GROUP] = value[d];
}

// Rounds a row to whole numbers of a byte; returns the scale to multiply them by, never negative,
// and not finite where one of the row's numbers is not.
INLINE float round_to_bytes(const float* row, int size, int8_t* rounded) {
    Words most{};
    for (int i = 0; i < size; i += W)  // the bits of floats that are not negative order as they do
        most = largest(load<Words>(row + i) & 0x7fffffff, most);
    const float peak = float_of_bits(largest(most));
    const Floats inverse = broadcast(peak > 0.0f ? 127.0f / peak : 0.0f);
    const Floats round = broadcast(12582912.0f);  // 1.5 * 2^23: the low byte is the sum
    for (int i = 0; i < size; i += W) {
        const Words word = (Words)(load<Floats>(row + i) * inverse + round);
#if defined(__AVX512F__)  // GCC 12 takes the vector apart
        store(rounded + i, _mm512_cvtepi32_epi8((__m512i)word));
#else
        store(rounded + i, __builtin_convertvector(word, Bytes));
#endif
    }
    return peak / 127.0f;
}

// Rotates the queries in place; rotates the keys and writes them and the values to their slot.
// `wide` is memory for a head's floats, `narrow` for its whole numbers.
template <typename T>
INLINE void rotate_and_write(
    const Step& s, const Layer& layer, int64_t token, float* wide, int8_t* narrow) {
    typedef typename T::Value Value;
    typedef typename T::Kept Kept;
    const Layout<T> layout(s);
    const int head_dim = s.head_dim, half = head_dim / 2;
    const float* cos = s.cos + token * half;
    const float* sin = s.sin + token * half;
    const int64_t block = s.slots[token] / s.block_size, offset = s.slots[token] % s.block_size;
    const int64_t part = layout.part_place(block, offset);
    Kept* keys = static_cast<Kept*>(layer.keys);
    Kept* values = static_cast<Kept*>(layer.values);
    Value* row =
        static_cast<Value*>(layer.qkv) + token * (s.num_heads + 2 * s.num_kv_heads) * head_dim;
    for (int h = 0; h < s.num_heads; h++, row += head_dim) rotate<T, T>(row, cos, sin, half, row);
    for (int h = 0; h < s.num_kv_heads; h++, row += head_dim) {
        const Value* value = row + int64_t(s.num_kv_heads) * head_dim;
        if constexpr (T::ROUNDED) {
            rotate<T, Float32>(row, cos, sin, half, wide);
            *layout.scales(keys, block, offset) = round_to_bytes(wide, head_dim, narrow);
            write_key<T>(layout, narrow, offset, keys + part);
            for (int d = 0; d < head_dim; d += W) store(wide + d, T::widen(value + d));
            *layout.scales(values, block, offset) = round_to_bytes(wide, head_dim, narrow);
            write_value<T>(layout, narrow, offset, values + part);
        } else {
            rotate<T, T>(row, cos, sin, half, row);
            write_key<T>(layout, row, offset, keys + part);
            write_value<T>(layout, value, offset, values + part);
        }
        keys += layout.head_values, values += layout.head_values;
    }
}

// A part of int8 as T lays out a part, the whole numbers not yet multiplied by their scales: a
// bfloat16 holds each of them. A row of the part has `width` words: W of keys, head_dim of values.
template <typename T>
INLINE void widen_part(
    const int8_t* part, int rows, int width, Ahead& ahead, typename T::Value* to) {
    const auto number = [](Words word, int i) {
        return __builtin_convertvector(word << (24 - 8 * i) >> 24, Floats);
    };
    for (int row = 0; row < rows; row++, to += width * 4)
        for (int i = 0; i < width; i += W, part += W * 4) {
            const Words word = load<Words>(part);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j += T::GROUP) {
                Words wide = (Words)number(word, j);
                if constexpr (T::GROUP == 2)
                    wide = (wide >> 16 & 0xffff) | (Words)number(word, j + 1);
                store(to + j * width + i * T::GROUP, wide);
            }
            if (i % (64 / 4) == 0) ahead.fetch(1);  // a line for each that is read
        }
}
