// What Python hands over; the fields' order is that of attention/cuda_library.py.
#pragma once

#include "device.h"

namespace batchllm {

// A step for the kernels. All arrays are on the device, and so are the counts, so that a recorded
// graph can be replayed for another step.
//
// A unit is what one block computes for one kv head: the queries [query, query + num_queries)
// over the keys [key_begin, key_end) of a context, which is the concatenation of the reads
// [read_begin, read_end). Read r begins at key read_key[r] of that context and holds the tokens of
// the blocks block_ids[read_block[r]] and following. The i-th query sees the first
// visible + i * causal keys of the context. With partial < 0 the unit covers all that its queries
// see and writes their results; else it writes those of its rows (a query's heads one behind the
// other) to the partial rows from `partial` on.
//
// Query merge_query[m] is merged from the partial results merge_origins[merge_offsets[m] :
// merge_offsets[m + 1]]: an origin is the partial row that the first head of query 0 would have.
struct AttentionStep {
    Global<const int32_t> counts;  // tokens, units, queries to merge
    Global<const int64_t> slots;   // [num_tokens]
    Global<const float> cos;       // [num_tokens, head_dim / 2]
    Global<const float> sin;
    Global<const int32_t> units;   // [num_units, kUnitFields]
    Global<const int32_t> read_key;
    Global<const int32_t> read_block;
    Global<const int32_t> block_ids;
    Global<const int32_t> merge_query;
    Global<const int32_t> merge_offsets;
    Global<const int32_t> merge_origins;
    Global<int32_t> next_unit;     // [1]; the rotation sets it to 0
    Global<float> partial_out;     // [num_partial_rows, num_kv_heads, head_dim]
    Global<float> partial_lse;     // [num_partial_rows, num_kv_heads]; base 2
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t block_shift;           // log2 of the block size
    int32_t kv_type;               // a KvType
};

// How keys and values are stored, [num_blocks, block_size, kv_heads, head_dim]: as bfloat16; as
// float8, which is e4m3 without a scale, as FlashInfer has it; or as int8, where a row of a head has
// a scale, and the block's scales, float32 [block_size, kv_heads], lie behind its values.
enum class KvType { kBfloat16, kFloat8, kInt8 };

// One layer of it: qkv bfloat16 [num_tokens, heads + 2 kv_heads, head_dim], of which the queries are
// rotated in place; its cache; out bfloat16 [num_tokens, heads, head_dim].
struct AttentionLayer {
    Global<uint16_t> qkv;
    Global<unsigned char> keys;
    Global<unsigned char> values;
    Global<uint16_t> out;
};

struct Unit {
    int32_t query, num_queries, read_begin, read_end, key_begin, key_end, visible, causal, partial;
    int32_t is_small;
};
constexpr int kUnitFields = 10;

BATCHLLM_DEVICE Unit load_unit(const AttentionStep& step, int index) {
    const int64_t at = static_cast<int64_t>(index) * kUnitFields;
    const auto& u = step.units;
    return {u[at], u[at + 1], u[at + 2], u[at + 3], u[at + 4],
            u[at + 5], u[at + 6], u[at + 7], u[at + 8], u[at + 9]};
}

}  // namespace batchllm
