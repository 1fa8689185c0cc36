// What Python hands over; the fields' order is that of native/attention.py.
#pragma once

#include <cstdint>

extern "C" {

// One step. Items are those of runner/model_input.py; a tile is at most `tile_size` neighbouring
// queries, `tile_begin[t]` to `tile_begin[t + 1]`, and `tile_items[tile_offsets[t] :
// tile_offsets[t + 1]]` are the items that any of them reads.
// `pass_keys` are attended to at a time, at most 256, a multiple of 64 and a power of two.
// `num_blocks` are all that the cache has, which is of int8 with scales or of what qkv is.
// `tile_order` [num_tiles] names the dearest tiles first; cos and sin are
// [num_tokens, head_dim / 2].
struct Step {
    int64_t num_tokens;
    int64_t num_tiles;
    int64_t num_blocks;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t block_size;
    int32_t tile_size;
    int32_t is_bfloat16;
    int32_t pass_keys;
    int32_t kv_is_int8;
    const int64_t* slots;
    const float* cos;
    const float* sin;
    const int64_t* query_begin;
    const int64_t* query_end;
    const int64_t* kv_len;
    const uint8_t* own;
    const int64_t* block_offsets;
    const int64_t* block_ids;
    const int64_t* tile_begin;
    const int64_t* tile_order;
    const int64_t* tile_offsets;
    const int64_t* tile_items;
};

// One layer of it: qkv [num_tokens, heads + 2 kv_heads, head_dim], queries and keys not yet
// rotated (the queries and keys are rotated in place), its cache, and out [num_tokens, heads,
// head_dim], maybe in strips (strips.h).
struct Layer {
    void* qkv;
    void* keys;
    void* values;
    void* out;
    int64_t out_in_strips;
};

void batchllm_attention(const Step* step, const Layer* layer);

}
