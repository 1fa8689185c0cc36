// The kernels under C names, for Python to call (attention/cuda_library.py). Each is null when all
// went well, or says what did not; `stream` is a CUDA stream, and of no use in the emulation.
#include "../include/batchllm/around.h"

using namespace batchllm;

namespace {

template <int HeadDim>
const char* run(const AttentionStep& step, const AttentionLayer& layer, int blocks, void* stream) {
    const char* error = launch(rotate_kernel<HeadDim>, blocks, kThreads, 0, stream, step, layer);
    if (error) return error;
    error = launch(attention_kernel<HeadDim>, blocks, kThreads, attention_shared_bytes<HeadDim>(),
                   stream, step, layer);
    if (error) return error;
    return launch(merge_kernel<HeadDim>, blocks, kThreads, 0, stream, step, layer);
}

template <int HeadDim>
int blocks() {
    return resident_blocks(attention_kernel<HeadDim>, kThreads, attention_shared_bytes<HeadDim>());
}

}  // namespace

extern "C" {

const char* batchllm_attention(
    const AttentionStep* step, const AttentionLayer* layer, int head_dim, int blocks, void* stream
) {
    switch (head_dim) {
        case 64: return run<64>(*step, *layer, blocks, stream);
        case 96: return run<96>(*step, *layer, blocks, stream);
        case 128: return run<128>(*step, *layer, blocks, stream);
        default: return "head_dim must be 64, 96 or 128";
    }
}

// Blocks of the attention kernel that the device holds at once; 0 where it does not run.
int batchllm_resident_blocks(int head_dim) {
    switch (head_dim) {
        case 64: return blocks<64>();
        case 96: return blocks<96>();
        case 128: return blocks<128>();
        default: return 0;
    }
}

#ifndef __CUDACC__
// Of the last call: how often rows of a matrix had to be read one after the other.
long batchllm_bank_conflicts() { return emulation::bank_conflicts(); }
#endif

}
