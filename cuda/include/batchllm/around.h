// What comes before and after attention: rotation and the cache, and the merge of partial results.
#pragma once

#include "attention.h"

namespace batchllm {

// The larger of two, or a NaN.
BATCHLLM_DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

// Four values of a row: a lane's pairs in both halves.
struct RowPart {
    float left[2], right[2];

    BATCHLLM_DEVICE float most() const {
        return larger(larger(fabsf(left[0]), fabsf(left[1])),
                      larger(fabsf(right[0]), fabsf(right[1])));
    }
};

template <int HeadDim, KvType Type>
BATCHLLM_DEVICE void store_row(
    const Global<unsigned char>& cache, const KvLayout<HeadDim, Type>& layout, int64_t slot,
    int kv_head, RowPart part, bool has_part
) {
    using Layout = KvLayout<HeadDim, Type>;
    const int lane = thread_index() % kWarpSize;
    const int64_t block = slot >> layout.block_shift;
    const int place = static_cast<int>(slot & ((1 << layout.block_shift) - 1));
    const int64_t to = layout.row(block, place) + kv_head * Layout::kRowBytes;
    const int left = 2 * lane, right = HeadDim / 2 + 2 * lane;
    if constexpr (Type == KvType::kBfloat16) {
        if (!has_part) return;
        store(cache, to + 2 * left, pack_bfloat16(part.left[0], part.left[1]));
        store(cache, to + 2 * right, pack_bfloat16(part.right[0], part.right[1]));
        return;
    }
    float inverse = 1;
    if constexpr (Layout::kHasScales) {
        float most = part.most();
        for (int mask = kWarpSize / 2; mask; mask /= 2) most = larger(most, shuffle_xor(most, mask));
        inverse = most > 0 ? 127 / most : 0.0f;
        if (lane == 0) store(cache, layout.scale(block, place) + 4 * kv_head, most / 127);
    }
    const auto rounded = [inverse](float value) {
        return Layout::kHasScales ? static_cast<uint32_t>(static_cast<int>(rintf(value * inverse))) & 0xff
                                  : float8_of_float(value);
    };
    const auto both = [&](const float (&pair)[2]) {
        return static_cast<uint16_t>(rounded(pair[0]) | rounded(pair[1]) << 8);
    };
    if (!has_part) return;
    store(cache, to + left, both(part.left));
    store(cache, to + right, both(part.right));
}

// Queries are rotated in place, keys on their way to the cache, values copied there. A warp takes
// one head of one token; pairs are (i, i + head_dim / 2), in float32, rounded once, and once more
// to a cache of eight bits.
template <int HeadDim, KvType Type>
BATCHLLM_KERNEL(kThreads, 1)
rotate_kernel(AttentionStep step, AttentionLayer layer) {
    constexpr int kHalf = HeadDim / 2;
    static_assert(kHalf <= 2 * kWarpSize);
    if (block_index() == 0 && thread_index() == 0) step.next_unit[0] = 0;
    const KvLayout<HeadDim, Type> cache{step.num_kv_heads, step.block_shift};
    const int pair = 2 * (thread_index() % kWarpSize);
    const bool has_part = pair < kHalf;
    const int keys_at = step.num_heads, values_at = step.num_heads + step.num_kv_heads;
    const int width = values_at + step.num_kv_heads;
    const int total = step.counts[0] * width;
    const int warps = num_blocks() * kWarps;
    for (int i = block_index() * kWarps + thread_index() / kWarpSize; i < total; i += warps) {
        const int64_t token = i / width;
        const int head = i % width;
        const int64_t from = static_cast<int64_t>(i) * HeadDim + pair;
        RowPart part = {};
        if (has_part) {
            const uint32_t left = load<uint32_t>(layer.qkv, from);
            const uint32_t right = load<uint32_t>(layer.qkv, from + kHalf);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float a = float_of_bits(j ? left & 0xffff0000u : left << 16);
                const float b = float_of_bits(j ? right & 0xffff0000u : right << 16);
                const bool turns = head < values_at;
                const float cos = turns ? step.cos[token * kHalf + pair + j] : 1.0f;
                const float sin = turns ? step.sin[token * kHalf + pair + j] : 0.0f;
                part.left[j] = turns ? a * cos - b * sin : a;
                part.right[j] = turns ? b * cos + a * sin : b;
            }
        }
        if (head >= keys_at) {
            const bool is_key = head < values_at;
            const int kv_head = head - (is_key ? keys_at : values_at);
            const Global<unsigned char> to = is_key ? layer.keys : layer.values;
            store_row(to, cache, step.slots[token], kv_head, part, has_part);
        } else if (has_part) {
            store(layer.qkv, from, pack_bfloat16(part.left[0], part.left[1]));
            store(layer.qkv, from + kHalf, pack_bfloat16(part.right[0], part.right[1]));
        }
    }
}

// Partial results of a query's head become one, weighted by their sums (FlashDecoding). A warp
// takes one head of one query.
template <int HeadDim>
BATCHLLM_KERNEL(kThreads, 1)
merge_kernel(AttentionStep step, AttentionLayer layer) {
    const int lane = thread_index() % kWarpSize;
    const int group = step.num_heads / step.num_kv_heads;
    const int total = step.counts[2] * step.num_heads;
    const int warps = num_blocks() * kWarps;
    for (int i = block_index() * kWarps + thread_index() / kWarpSize; i < total; i += warps) {
        const int merge = i / step.num_heads, head = i % step.num_heads;
        const int64_t query = step.merge_query[merge];
        const int first = step.merge_offsets[merge], last = step.merge_offsets[merge + 1];
        const int64_t row = query * group + head % group;
        const auto partial = [&](int part) {
            return (step.merge_origins[part] + row) * step.num_kv_heads + head / group;
        };
        float most = kMinusInfinity, sum = 0;
        for (int part = first; part < last; ++part) {
            most = fmaxf(most, step.partial_lse[partial(part)]);
        }
        for (int part = first; part < last; ++part) {
            sum += exp2_fast(step.partial_lse[partial(part)] - most);
        }
        for (int column = 2 * lane; column < HeadDim; column += 2 * kWarpSize) {
            float a = 0, b = 0;
            for (int part = first; part < last; ++part) {
                const float weight = exp2_fast(step.partial_lse[partial(part)] - most) / sum;
                a += weight * step.partial_out[partial(part) * HeadDim + column];
                b += weight * step.partial_out[partial(part) * HeadDim + column + 1];
            }
            const int64_t to = (query * step.num_heads + head) * HeadDim + column;
            store<uint32_t>(layer.out, to, pack_bfloat16(a, b));
        }
    }
}

}  // namespace batchllm
