// What comes before and after attention: rotation and the cache, and the merge of partial results.
#pragma once

#include "attention.h"

namespace batchllm {

// Queries are rotated in place, keys on their way to the cache, values copied there. A warp takes
// one head of one token; pairs are (i, i + head_dim / 2), in float32, rounded once.
template <int HeadDim>
BATCHLLM_KERNEL(kThreads, 1)
rotate_kernel(AttentionStep step, AttentionLayer layer) {
    constexpr int kHalf = HeadDim / 2;
    if (block_index() == 0 && thread_index() == 0) step.next_unit[0] = 0;
    const Global<const uint16_t> qkv{layer.qkv.data, layer.qkv.size};
    const int lane = thread_index() % kWarpSize;
    const int keys_at = step.num_heads, values_at = step.num_heads + step.num_kv_heads;
    const int width = values_at + step.num_kv_heads;
    const int total = step.counts[0] * width;
    const int warps = num_blocks() * kWarps;
    for (int i = block_index() * kWarps + thread_index() / kWarpSize; i < total; i += warps) {
        const int64_t token = i / width;
        const int head = i % width;
        const int64_t from = static_cast<int64_t>(i) * HeadDim;
        for (int pair = 2 * lane; pair < kHalf; pair += 2 * kWarpSize) {
            uint32_t left = load<uint32_t>(qkv, from + pair);
            uint32_t right = load<uint32_t>(qkv, from + kHalf + pair);
            if (head < values_at) {
                float turned[2][2];
                for (int j = 0; j < 2; ++j) {
                    const float cos = step.cos[token * kHalf + pair + j];
                    const float sin = step.sin[token * kHalf + pair + j];
                    const float a = float_of_bits(j ? left & 0xffff0000u : left << 16);
                    const float b = float_of_bits(j ? right & 0xffff0000u : right << 16);
                    turned[0][j] = a * cos - b * sin;
                    turned[1][j] = b * cos + a * sin;
                }
                left = pack_bfloat16(turned[0][0], turned[0][1]);
                right = pack_bfloat16(turned[1][0], turned[1][1]);
            }
            if (head < keys_at) {
                store(layer.qkv, from + pair, left);
                store(layer.qkv, from + kHalf + pair, right);
                continue;
            }
            const bool is_key = head < values_at;
            const int kv_head = head - (is_key ? keys_at : values_at);
            const int64_t to = (step.slots[token] * step.num_kv_heads + kv_head) * HeadDim + pair;
            const Global<uint16_t>& cache = is_key ? layer.keys : layer.values;
            store(cache, to, left);
            store(cache, to + kHalf, right);
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
