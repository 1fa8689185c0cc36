// What lies between two layers' attention in one call; the fields' order is that of
// models/native_blocks.py.
#pragma once

#include <cstdint>

#include "attention.h"
#include "linear.h"

extern "C" {

// Products are of int8 weights or of the activations' type; `gate_up` may be gated. `qkv` and
// `input_norm` are the next layer's, and null behind the last one.
struct Block {
    int64_t hidden_size;
    float epsilon;
    int32_t is_bfloat16;
    int32_t is_int8;
    const PackedLinear* output;
    const void* post_norm;
    const PackedLinear* gate_up;
    const PackedLinear* down;
    const void* input_norm;
    const PackedLinear* qkv;
};

// A step's activations, [rows, size] each: hidden, normed and delta of the hidden size, gate_up of
// both gates and what is up unless the weight is gated, inner of what comes of them. `scratch` is as
// large as the largest product wants, `row_scales` [rows]. All but hidden and qkv may be in strips,
// and are as large as whole ones.
struct BlockMemory {
    void* hidden;
    void* normed;
    void* delta;
    void* gate_up;
    void* inner;
    void* qkv;
    void* scratch;
    float* row_scales;
};

// From `attended` [rows, heads * head_dim] to the next layer's queries, keys and values, if there
// is one; `hidden` is updated in place.
void batchllm_block(
    const Block* block, const BlockMemory* memory, int64_t rows, const void* attended);

// The first `count` layers, attention and what follows it. The first layer's `qkv` was computed,
// the others' is the memory's, and so is what the last of these blocks leaves. What attention puts
// out may be in strips, and has memory for whole ones.
void batchllm_layers(
    const Step* step, const Layer* layers, const Block* blocks, const BlockMemory* memory,
    int64_t count);

}
