// Seven operations in one call, and all layers' in one. Each of them reads and writes so much that
// the caller's code is no longer in any cache after it, and would take several times as long as it
// takes by itself.
#include "block.h"

#include <initializer_list>

#include "elementwise.h"

namespace {

void multiply(
    const Block& block, const BlockMemory& memory, int64_t rows, const PackedLinear* linear,
    const void* x, void* out, int32_t strips) {
    if (block.is_int8)
        batchllm_linear_int8(
            block.is_bfloat16, rows, linear, x, memory.scratch, memory.row_scales, out, strips);
    else
        batchllm_linear(block.is_bfloat16, rows, linear, x, memory.scratch, out, strips);
}

}  // namespace

extern "C" void batchllm_block(
    const Block* block, const BlockMemory* memory, int64_t rows, const void* attended) {
    const Block& b = *block;
    const BlockMemory& m = *memory;
    // Where all products can, what lies between them is in strips: normed, inner and delta.
    int32_t strips = b.gate_up->gated ? IN_STRIPS | OUT_STRIPS : 0;
    for (const PackedLinear* linear : {b.output, b.gate_up, b.down, b.qkv})
        if (linear && !batchllm_takes_strips(b.is_bfloat16, b.is_int8, linear)) strips = 0;
    const auto norm = [&](const void* weight) {
        batchllm_add_rms_norm(
            b.is_bfloat16, rows, b.hidden_size, b.epsilon, m.hidden, m.delta, weight, m.normed,
            strips);
    };
    multiply(b, m, rows, b.output, attended, m.delta, strips & OUT_STRIPS);
    norm(b.post_norm);
    if (b.gate_up->gated) {
        multiply(b, m, rows, b.gate_up, m.normed, m.inner, strips);
    } else {
        multiply(b, m, rows, b.gate_up, m.normed, m.gate_up, 0);
        batchllm_silu_and_multiply(
            b.is_bfloat16, rows, b.gate_up->outputs / 2, m.gate_up, m.inner);
    }
    multiply(b, m, rows, b.down, m.inner, m.delta, strips);
    norm(b.input_norm);
    if (b.qkv) multiply(b, m, rows, b.qkv, m.normed, m.qkv, strips & IN_STRIPS);
}

extern "C" void batchllm_layers(
    const Step* step, const Layer* layers, const Block* blocks, const BlockMemory* memory,
    int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        batchllm_attention(step, &layers[i]);
        batchllm_block(&blocks[i], memory, step->num_tokens, layers[i].out);
    }
}
