// The cache of one layer: where keys and values lie, how a step's get there, how they are read.
//
// They lie as the products want them, so nothing is gathered or packed in a step. Of each KV head,
// [block][block_size / W] parts of W tokens, one after the other:
//   keys   [head_dim / GROUP][W tokens][GROUP]
//   values [W / GROUP][head_dim][GROUP tokens]
// A unit reads one head's, so what it reads of neighbouring blocks lies in order.
//
// In int8 a token's key is multiplied by one float32 scale, and its value by another, which lie
// behind the part's numbers. A part is read as a whole, and a word of two bfloat16 comes from one
// byte in each of two neighbouring vectors:
//   keys   [head_dim][W tokens], scales [W]
//   values [W / GROUP][head_dim / W][GROUP tokens][W], scales [W]
#pragma once

#include "ahead.h"
#include "attention.h"
#include "simd.h"

// A cache of int8 of what is T outside.
template <typename T>
struct Rounded : T {
    typedef int8_t Kept;
    static constexpr bool ROUNDED = true;
};

template <typename T>
struct Layout {
    typedef typename T::Kept Kept;
    int head_dim, block_size;
    int64_t part_size, block_values, head_values;

    explicit Layout(const Step& s)
        : head_dim(s.head_dim),
          block_size(s.block_size),
          part_size(W * (s.head_dim + (T::ROUNDED ? int64_t(sizeof(float)) : 0))),
          block_values(s.block_size / W * part_size),
          head_values(s.num_blocks * block_values) {}

    int part_bytes() const { return int(part_size * sizeof(Kept)); }
    // The part of a block that begins with, or has, its token `offset`.
    int64_t part_place(int64_t offset) const { return offset / W * part_size; }
    // Within a part: the first value of a key, and how far it is to the next GROUP (int8: next).
    int64_t key_place(int64_t offset) const { return offset % W * (T::ROUNDED ? 1 : T::GROUP); }
    // Within a part: the first value of a token's.
    int64_t value_place(int64_t offset) const {
        const int64_t group = offset % W / T::GROUP * head_dim * T::GROUP;
        return group + offset % T::GROUP * (T::ROUNDED ? W : 1);
    }
    // A token's scale in a part.
    float* scale_of(Kept* part, int64_t offset) const {
        return reinterpret_cast<float*>(part + W * head_dim) + offset % W;
    }
};

// The part that a token is written to: its keys or values, of the first head.
template <typename T>
INLINE typename T::Kept* part_of(const Step& s, const Layout<T>& layout, void* cache, int64_t token) {
    return static_cast<typename T::Kept*>(cache) +
           s.slots[token] / s.block_size * layout.block_values +
           layout.part_place(s.slots[token] % s.block_size);
}

// Fetches where a token's keys and values will be written: a key is a word in each of many lines,
// which its neighbours in the block share.
template <typename T>
INLINE void fetch_slot(const Step& s, const Layer& layer, int64_t token) {
    typedef typename T::Kept Kept;
    const Layout<T> layout(s);
    const int64_t offset = s.slots[token] % s.block_size;
    if (token > 0 && s.slots[token] == s.slots[token - 1] + 1 && offset % W != 0) return;
    const Kept* keys = part_of<T>(s, layout, layer.keys, token);
    const Kept* values = part_of<T>(s, layout, layer.values, token);
    constexpr int LINE = 64 / sizeof(Kept);
    for (int h = 0; h < s.num_kv_heads; h++) {
        for (int64_t i = 0; i < layout.part_size; i += LINE) __builtin_prefetch(keys + i, 1);
        const Kept* value = values + offset % W / T::GROUP * s.head_dim * T::GROUP;
        for (int i = 0; i < s.head_dim * T::GROUP; i += LINE) __builtin_prefetch(value + i, 1);
        if (T::ROUNDED) __builtin_prefetch(values + W * s.head_dim, 1);
        keys += layout.head_values, values += layout.head_values;
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

// Writes a token's key and value [head_dim] to their parts.
template <typename T>
INLINE void write_plain(
    const Layout<T>& layout, const typename T::Value* key, const typename T::Value* value,
    int64_t offset, typename T::Kept* keys, typename T::Kept* values) {
    keys += layout.key_place(offset);
    for (int d = 0; d < layout.head_dim; d += T::GROUP, keys += W * T::GROUP)
        std::memcpy(keys, key + d, sizeof(*key) * T::GROUP);
    values += layout.value_place(offset);
    int d = 0;
#if defined(__AVX512BW__)
    if constexpr (T::GROUP == 2)  // to one half of each word
        for (; d + W <= layout.head_dim; d += W)
            _mm512_mask_storeu_epi16(
                values + d * 2 - offset % 2, offset % 2 ? 0xaaaaaaaa : 0x55555555,
                _mm512_slli_epi32(
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(value + d))),
                    offset % 2 * 16));
#endif
    for (; d < layout.head_dim; d++) values[d * T::GROUP] = value[d];
}

// Rounds rows to whole numbers of a byte times a scale.
class Rounding {
    float inverse;

  public:
    float scale;  // none if something in the row is not a number

    Rounding(const float* row, int size) {
        Words most{};
        for (int i = 0; i < size; i += W) {  // the bits of floats that are not negative order, too
            const Words bits = load<Words>(row + i) & 0x7fffffff;
            most = bits > most ? bits : most;
        }
        int32_t bits = 0;
        for (int i = 0; i < W; i++) bits = most[i] > bits ? most[i] : bits;
        float peak;
        std::memcpy(&peak, &bits, sizeof peak);
        inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
        scale = peak / 127.0f + (peak - peak);
    }
    Bytes operator()(const float* row) const {
        const Floats round = broadcast(12582912.0f);  // 1.5 * 2^23: the low byte is the sum
        const Words rounded = (Words)(load<Floats>(row) * inverse + round);
#if defined(__AVX512F__)  // GCC 12 takes the vector apart
        return (Bytes)_mm512_cvtepi32_epi8((__m512i)rounded);
#endif
        return __builtin_convertvector(rounded, Bytes);
    }
};

// The same in int8.
template <typename T>
INLINE void write_rounded(
    const Layout<T>& layout, const float* key, const float* value, int64_t offset, int8_t* keys,
    int8_t* values) {
    const Rounding of_key(key, layout.head_dim), of_value(value, layout.head_dim);
    *layout.scale_of(keys, offset) = of_key.scale;
    *layout.scale_of(values, offset) = of_value.scale;
    keys += layout.key_place(offset);
    values += layout.value_place(offset);
    for (int d = 0; d < layout.head_dim; d += W, keys += W * W) {
        const Bytes rounded = of_key(key + d);
        for (int i = 0; i < W; i++) keys[i * W] = rounded[i];
        store(values + d * T::GROUP, of_value(value + d));
    }
}

// Rotates the queries in place; rotates the keys and writes them and the values to their slot.
// `wide`: memory for a key and a value.
template <typename T>
INLINE void rotate_and_write(const Step& s, const Layer& layer, int64_t token, float* wide) {
    typedef typename T::Value Value;
    const Layout<T> layout(s);
    const int head_dim = s.head_dim, half = head_dim / 2;
    const float* cos = s.cos + token * half;
    const float* sin = s.sin + token * half;
    const int64_t offset = s.slots[token] % s.block_size;
    Value* row =
        static_cast<Value*>(layer.qkv) + token * (s.num_heads + 2 * s.num_kv_heads) * head_dim;
    for (int h = 0; h < s.num_heads; h++, row += head_dim) rotate<T, T>(row, cos, sin, half, row);
    typename T::Kept* keys = part_of<T>(s, layout, layer.keys, token);
    typename T::Kept* values = part_of<T>(s, layout, layer.values, token);
    for (int h = 0; h < s.num_kv_heads; h++, row += head_dim) {
        const Value* value = row + int64_t(s.num_kv_heads) * head_dim;
        if constexpr (T::ROUNDED) {
            rotate<T, Float32>(row, cos, sin, half, wide);
            for (int d = 0; d < head_dim; d += W) store(wide + head_dim + d, T::widen(value + d));
            write_rounded<T>(layout, wide, wide + head_dim, offset, keys, values);
        } else {
            rotate<T, T>(row, cos, sin, half, row);
            write_plain<T>(layout, row, value, offset, keys, values);
        }
        keys += layout.head_values, values += layout.head_values;
    }
}

INLINE Floats floats_of_bytes(const int8_t* from) {
#if defined(__AVX512F__)  // GCC 12 takes the vector apart
    return (Floats)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    return __builtin_convertvector(load<Bytes>(from), Floats);
#endif
}

// The whole numbers of a part, not yet multiplied by their scales, as T lays out a part: a bfloat16
// holds every whole number of a byte.
template <typename T>
INLINE void widen_part(const int8_t* part, int head_dim, Ahead& ahead, typename T::Value* to) {
    constexpr int LINE = 64;
    for (int i = 0; i < W * head_dim; i += LINE) {
        for (int j = i; j < i + LINE; j += W * T::GROUP) {
            const Floats first = floats_of_bytes(part + j);
            if constexpr (T::GROUP == 2)
                store(to + j, ((Words)first >> 16 & 0xffff) | (Words)floats_of_bytes(part + j + W));
            else
                store(to + j, first);
        }
        ahead.fetch(1);
    }
}
