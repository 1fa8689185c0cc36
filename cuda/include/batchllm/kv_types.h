// Values of eight bits from and to floats, and where a cache has them.
#pragma once

#include "step.h"

namespace batchllm {

struct alignas(16) FourWords {
    uint32_t word[4];
};

// Where the row of a token's kv head is in its layer's cache, in bytes, and its scale (int8).
template <int HeadDim, KvType Type>
struct KvLayout {
    static constexpr int kValueBytes = Type == KvType::kBfloat16 ? 2 : 1;
    static constexpr int kRowBytes = HeadDim * kValueBytes;
    static constexpr bool kHasScales = Type == KvType::kInt8;

    int num_kv_heads, block_shift;

    BATCHLLM_DEVICE int64_t block_bytes() const {
        return static_cast<int64_t>(num_kv_heads * (kRowBytes + (kHasScales ? 4 : 0)))
               << block_shift;
    }
    BATCHLLM_DEVICE int64_t row(int64_t block, int place) const {
        return block * block_bytes() + static_cast<int64_t>(place) * num_kv_heads * kRowBytes;
    }
    BATCHLLM_DEVICE int64_t scale(int64_t block, int place) const {
        const int64_t values = static_cast<int64_t>(num_kv_heads * kRowBytes) << block_shift;
        return block * block_bytes() + values + static_cast<int64_t>(place) * num_kv_heads * 4;
    }
};

// e4m3 is what bits 20 to 26 of a float 2^120 times smaller are, subnormals too.
BATCHLLM_DEVICE float float_of_float8(uint32_t byte) {
    const float value = float_of_bits((byte & 0x7f) << 20) * 0x1p120f;
    const uint32_t bits = (byte & 0x7f) == 0x7f ? 0x7fc00000u : bits_of_float(value);
    return float_of_bits(bits | (byte & 0x80) << 24);
}

// Rounded to nearest, ties to even; beyond 448 it stays there, a NaN a NaN.
BATCHLLM_DEVICE uint32_t float8_of_float(float value) {
    const uint32_t sign = bits_of_float(value) >> 24 & 0x80;
    if (value != value) return sign | 0x7f;
    const float size = fminf(fabsf(value), 448.0f) * 0x1p-120f;
    const uint32_t bits = bits_of_float(size);
    return sign | (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
}

BATCHLLM_DEVICE float float_of_int8(uint32_t byte) {
    return static_cast<float>(static_cast<int8_t>(byte & 0xff));
}

template <KvType Type>
BATCHLLM_DEVICE float float_of_byte(uint32_t byte) {
    return Type == KvType::kInt8 ? float_of_int8(byte) : float_of_float8(byte & 0xff);
}

// Sixteen bytes to as many bfloat16, which is exact.
template <KvType Type>
BATCHLLM_DEVICE void widen(const FourWords& from, FourWords (&to)[2]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t bytes = from.word[i / 2] >> (i % 2 * 16);
        to[i / 4].word[i % 4] =
            pack_bfloat16(float_of_byte<Type>(bytes), float_of_byte<Type>(bytes >> 8));
    }
}

}  // namespace batchllm
