// The names of device.h as CUDA and PTX; compute capability 8.0 and later.
#pragma once

#include <cuda_runtime.h>

#define BATCHLLM_DEVICE __device__ __forceinline__
#define BATCHLLM_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace batchllm {

template <typename T>
struct Global {
    T* data;
    int64_t size;

    __device__ __forceinline__ T& operator[](int64_t index) const { return data[index]; }
};

// A pointer into the block's shared memory.
template <typename T>
struct Shared {
    T* data;

    __device__ __forceinline__ T& operator[](int index) const { return data[index]; }
    __device__ __forceinline__ Shared operator+(int index) const { return {data + index}; }
    __device__ __forceinline__ uint32_t address() const {
        return static_cast<uint32_t>(__cvta_generic_to_shared(data));
    }
    template <typename U>
    __device__ __forceinline__ Shared<U> as() const {
        return {reinterpret_cast<U*>(data)};
    }
};

template <typename T>
__device__ __forceinline__ Shared<T> shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return {reinterpret_cast<T*>(memory)};
}

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_index() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int num_blocks() { return static_cast<int>(gridDim.x); }
__device__ __forceinline__ void barrier() { __syncthreads(); }

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ int atomic_add(const Global<int32_t>& array, int64_t index, int value) {
    return atomicAdd(array.data + index, value);
}

// 2 to the power of x; -inf gives 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float log2_fast(float x) {
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Two values rounded to bfloat16, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float value) { return __float_as_uint(value); }

// A T that lies anywhere in an array of smaller values, on a multiple of its size.
template <typename T, typename U>
__device__ __forceinline__ T load(const Global<U>& array, int64_t index) {
    return *reinterpret_cast<const T*>(array.data + index);
}

template <typename T, typename U>
__device__ __forceinline__ void store(const Global<U>& array, int64_t index, T value) {
    *reinterpret_cast<T*>(array.data + index) = value;
}

__device__ __forceinline__ void store2(const Global<float>& array, int64_t index, float a, float b) {
    *reinterpret_cast<float2*>(array.data + index) = make_float2(a, b);
}

// Piece `piece` of `Bytes` bytes (16 or 4) from global to shared memory, or zeros; they have arrived
// when the thread has waited for them.
template <int Bytes>
__device__ __forceinline__ void copy_async(
    Shared<unsigned char> to, const Global<unsigned char>& from, uint32_t piece, bool zeros
) {
    const unsigned char* address = from.data + static_cast<int64_t>(piece) * Bytes;
    const int count = zeros ? 0 : Bytes;
    if constexpr (Bytes == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to.address()),
                     "l"(address), "r"(count)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.address()),
                     "l"(address), "n"(Bytes), "r"(count)
                     : "memory");
    }
}

__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most `Left` of this thread's groups of copies are under way.
template <int Left>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], Shared<uint16_t> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row.address()));
}

__device__ __forceinline__ void load_matrices_transposed(
    uint32_t (&out)[4], Shared<uint16_t> row
) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row.address()));
}

// sum += a x b: [16, 16] x [16, 8], bfloat16 into float32 (PTX ISA, mma.m16n8k16).
__device__ __forceinline__ void multiply_add(
    float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1
) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Runs a kernel on a stream; null, or what went wrong.
template <typename... Args>
const char* launch(
    void (*kernel)(Args...), int blocks, int threads, int shared_bytes, void* stream, Args... args
) {
    cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        shared_bytes
    );
    if (error == cudaSuccess) {
        kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// How many blocks of a kernel the whole device holds at once.
template <typename... Args>
int resident_blocks(void (*kernel)(Args...), int threads, int shared_bytes) {
    int device = 0, processors = 0, each = 0;
    const void* function = reinterpret_cast<const void*>(kernel);
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function, threads, shared_bytes);
    return processors * each;
}

}  // namespace batchllm
