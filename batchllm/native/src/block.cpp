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

// Where all products can, what lies between them is in strips: normed, inner and delta.
int32_t strips_of(const Block& b) {
    if (!b.gate_up->gated) return 0;
    for (const PackedLinear* linear : {b.output, b.gate_up, b.down, b.qkv})
        if (linear && !batchllm_takes_strips(b.is_bfloat16, b.is_int8, linear)) return 0;
    return IN_STRIPS | OUT_STRIPS;
}

void run(
    const Block& b, const BlockMemory& m, int64_t rows, const void* attended,
    bool attended_in_strips) {
    const int32_t strips = strips_of(b);
    const auto norm = [&](const void* weight) {
        batchllm_add_rms_norm(
            b.is_bfloat16, rows, b.hidden_size, b.epsilon, m.hidden, m.delta, weight, m.normed,
            strips);
    };
    const int32_t output_strips = attended_in_strips ? strips : strips & OUT_STRIPS;
    multiply(b, m, rows, b.output, attended, m.delta, output_strips);
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

}  // namespace

extern "C" void batchllm_block(
    const Block* block, const BlockMemory* memory, int64_t rows, const void* attended) {
    run(*block, *memory, rows, attended, false);
}

extern "C" void batchllm_layers(
    const Step* step, const Layer* layers, const Block* blocks, const BlockMemory* memory,
    int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        Layer layer = layers[i];
        layer.out_in_strips = strips_of(blocks[i]) != 0;
        batchllm_attention(step, &layer);
        run(blocks[i], *memory, step->num_tokens, layer.out, layer.out_in_strips);
    }
}
