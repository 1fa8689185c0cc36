// The kernels under C names, for Python to call (attention/cuda_library.py). Each is null when all
// went well, or says what did not; `stream` is a CUDA stream, and of no use in the emulation.
#include "../include/batchllm/around.h"

using namespace batchllm;

namespace {

template <int HeadDim, KvType Type>
struct Kernels {
    static constexpr int kBytes = AttentionLayout<HeadDim, Type>::kBytes;

    static const char* run(
        const AttentionStep& step, const AttentionLayer& layer, int blocks, void* stream
    ) {
        const char* error =
            launch(rotate_kernel<HeadDim, Type>, blocks, kThreads, 0, stream, step, layer);
        if (error) return error;
        error = launch(
            attention_kernel<HeadDim, Type>, blocks, kThreads, kBytes, stream, step, layer
        );
        if (error) return error;
        return launch(merge_kernel<HeadDim>, blocks, kThreads, 0, stream, step, layer);
    }

    static int blocks() {
        return resident_blocks(attention_kernel<HeadDim, Type>, kThreads, kBytes);
    }
};

// `use` with the kernels for these sizes; `otherwise` where there are none.
template <typename Result, typename Use>
Result with_kernels(int head_dim, int kv_type, Result otherwise, Use use) {
    const auto with_type = [&](auto dim) -> Result {
        constexpr int kDim = decltype(dim)::value;
        switch (static_cast<KvType>(kv_type)) {
            case KvType::kBfloat16: return use(Kernels<kDim, KvType::kBfloat16>());
            case KvType::kFloat8: return use(Kernels<kDim, KvType::kFloat8>());
            case KvType::kInt8: return use(Kernels<kDim, KvType::kInt8>());
        }
        return otherwise;
    };
    switch (head_dim) {
        case 64: return with_type(std::integral_constant<int, 64>());
        case 96: return with_type(std::integral_constant<int, 96>());
        case 128: return with_type(std::integral_constant<int, 128>());
        default: return otherwise;
    }
}

}  // namespace

extern "C" {

const char* batchllm_attention(
    const AttentionStep* step, const AttentionLayer* layer, int head_dim, int blocks, void* stream
) {
    const char* unknown = "not compiled for these sizes";
    return with_kernels(head_dim, step->kv_type, unknown, [&](auto kernels) {
        return kernels.run(*step, *layer, blocks, stream);
    });
}

// Blocks of the attention kernel that the device holds at once; 0 where it does not run.
int batchllm_resident_blocks(int head_dim, int kv_type) {
    return with_kernels(head_dim, kv_type, 0, [](auto kernels) { return kernels.blocks(); });
}

#ifndef __CUDACC__
// Of the last call: how often rows of a matrix had to be read one after the other.
long batchllm_bank_conflicts() { return emulation::bank_conflicts(); }
#endif

}
