// Small kernels that are right or wrong in one way each, to hold the emulation against.
#include "../../cuda/include/batchllm/device.h"

using namespace batchllm;

namespace {

constexpr int kThreads = 64;

struct Arrays {
    Global<int32_t> numbers;
    Global<uint16_t> halves;
};

inline Global<unsigned char> bytes_of(const Arrays& arrays) {
    return {reinterpret_cast<unsigned char*>(arrays.halves.data), 2 * arrays.halves.size};
}

BATCHLLM_KERNEL(kThreads, 1) in_order(Arrays arrays) {
    const Shared<int32_t> cells = shared_memory<int32_t>();
    cells[thread_index()] = thread_index();
    barrier();
    arrays.numbers[block_index() * kThreads + thread_index()] = cells[kThreads - 1 - thread_index()];
}

BATCHLLM_KERNEL(kThreads, 1) no_barrier_before_read(Arrays arrays) {
    const Shared<int32_t> cells = shared_memory<int32_t>();
    cells[thread_index()] = thread_index();
    arrays.numbers[thread_index()] = cells[thread_index() & ~1];
}

BATCHLLM_KERNEL(kThreads, 1) no_barrier_before_write(Arrays arrays) {
    const Shared<int32_t> cells = shared_memory<int32_t>();
    cells[thread_index()] = thread_index();
    barrier();
    arrays.numbers[thread_index()] = cells[(thread_index() + 1) % kThreads];
    cells[thread_index()] = 0;
}

BATCHLLM_KERNEL(kThreads, 1) two_writers(Arrays) {
    shared_memory<int32_t>()[thread_index() / 2] = 1;
}

BATCHLLM_KERNEL(kThreads, 1) behind_shared_memory(Arrays) {
    shared_memory<int32_t>()[kThreads + thread_index()] = 1;
}

BATCHLLM_KERNEL(kThreads, 1) behind_global_memory(Arrays arrays) {
    arrays.numbers[arrays.numbers.size + thread_index()] = 1;
}

BATCHLLM_KERNEL(kThreads, 1) never_written(Arrays arrays) {
    arrays.numbers[thread_index()] = shared_memory<int32_t>()[thread_index()];
}

BATCHLLM_KERNEL(kThreads, 1) copy_not_waited_for(Arrays arrays) {
    const Shared<unsigned char> cells = shared_memory<unsigned char>() + 16 * (thread_index() % 16);
    if (thread_index() < 16) copy_async<16>(cells, bytes_of(arrays), thread_index(), false);
    copy_async_commit();
    copy_async_wait<1>();
    arrays.numbers[thread_index()] = cells.as<uint16_t>()[0];
}

BATCHLLM_KERNEL(kThreads, 1) copy_seen_without_a_barrier(Arrays arrays) {
    const Shared<unsigned char> cells = shared_memory<unsigned char>() + 16 * (thread_index() % 16);
    if (thread_index() < 16) copy_async<16>(cells, bytes_of(arrays), thread_index(), false);
    copy_async_commit();
    copy_async_wait<0>();
    arrays.numbers[thread_index()] = cells.as<uint16_t>()[0];
}

BATCHLLM_KERNEL(kThreads, 1) not_aligned(Arrays arrays) {
    const Global<unsigned char> all = bytes_of(arrays);
    const Global<unsigned char> from{all.data + 2, all.size - 2};
    copy_async<16>(
        shared_memory<unsigned char>() + 16 * thread_index(), from, thread_index(), false
    );
}

BATCHLLM_KERNEL(kThreads, 1) half_a_warp(Arrays arrays) {
    if (thread_index() % 2) arrays.numbers[0] = static_cast<int>(shuffle_xor(1, 1));
}

BATCHLLM_KERNEL(kThreads, 1) two_operations(Arrays) {
    float sum[4] = {};
    const uint32_t a[4] = {};
    if (thread_index() % 2) {
        shuffle_xor(1, 1);
    } else {
        multiply_add(sum, a, 0, 0);
    }
}

BATCHLLM_KERNEL(kThreads, 1) not_all_at_the_barrier(Arrays) {
    if (thread_index()) barrier();
}

// Rows of 64 values: eight of them lie in the same banks.
BATCHLLM_KERNEL(kThreads, 1) bank_conflicts(Arrays arrays) {
    const Shared<uint16_t> rows = shared_memory<uint16_t>();
    for (int i = 0; i < 32; ++i) rows[thread_index() * 32 + i] = static_cast<uint16_t>(i);
    barrier();
    uint32_t out[4];
    load_matrices(out, rows + thread_index() % 32 * 64);
    arrays.halves[thread_index()] = static_cast<uint16_t>(out[0]);
}

struct Case {
    const char* name;
    void (*kernel)(Arrays);
};

#define CASE(name) {#name, name}
const Case kCases[] = {
    CASE(in_order), CASE(no_barrier_before_read), CASE(no_barrier_before_write), CASE(two_writers),
    CASE(behind_shared_memory), CASE(behind_global_memory), CASE(never_written),
    CASE(copy_not_waited_for), CASE(copy_seen_without_a_barrier), CASE(not_aligned),
    CASE(half_a_warp), CASE(two_operations), CASE(not_all_at_the_barrier), CASE(bank_conflicts),
};

}  // namespace

extern "C" const char* run_case(
    const char* name, int shared_bytes, int32_t* numbers, long num_numbers, uint16_t* halves,
    long num_halves
) {
    for (const Case& known : kCases) {
        if (std::string(known.name) == name) {
            Arrays arrays{{numbers, num_numbers}, {halves, num_halves}};
            return launch(known.kernel, 2, kThreads, shared_bytes, nullptr, arrays);
        }
    }
    return "no such case";
}

extern "C" long conflicts_of_last() { return emulation::bank_conflicts(); }

// One multiplication: a [16, 16] by b [16, 8], from shared memory as a kernel would.
BATCHLLM_KERNEL(32, 1) multiply_once(Arrays arrays) {
    const Shared<uint16_t> a = shared_memory<uint16_t>(), b = a + 256;
    for (int i = thread_index(); i < 384; i += 32) a[i] = arrays.halves[i];
    barrier();
    const int lane = thread_index();
    uint32_t left[4], right[4];
    load_matrices(left, a + (lane % 16 * 16 + lane / 16 * 8));
    load_matrices_transposed(right, b + lane % 16 * 8);
    float sum[4] = {};
    multiply_add(sum, left, right[0], right[1]);
    for (int i = 0; i < 4; ++i) {
        arrays.numbers[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = static_cast<int>(sum[i]);
    }
}

extern "C" const char* run_multiply(uint16_t* halves, int32_t* numbers) {
    return launch(multiply_once, 1, 32, 768, nullptr, Arrays{{numbers, 128}, {halves, 384}});
}
