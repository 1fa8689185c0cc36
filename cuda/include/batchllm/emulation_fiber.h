// A block's threads as fibers, and where they meet.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulation_memory.h"

namespace batchllm {
namespace emulation {

constexpr size_t kStackBytes = 128 << 10;

struct Fiber {
    Thread thread;
    ucontext_t context;
    jmp_buf jump;
    bool started = false, done = false;
    const char* waits_for = nullptr;  // a barrier or an operation of the warp; null: it can run
};

// A thread's stack. Blocks run one after the other, so they take turns with them.
inline char* stack(size_t thread) {
    static thread_local std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
    return stacks[thread].get();
}

// What the lanes of a warp bring to an operation, and where its results go.
struct WarpMeeting {
    int arrived = 0;
    const char* name = nullptr;
    std::vector<const void*> in = std::vector<const void*>(kWarpSize);
    std::vector<void*> out = std::vector<void*>(kWarpSize);
};

class Block {
public:
    Block(int index, int num_blocks, int threads, int shared_bytes, std::function<void()> body)
        : index(index), num_blocks(num_blocks), memory(shared_bytes), fibers_(threads),
          meetings_(threads / kWarpSize), body_(std::move(body)) {
        for (int i = 0; i < threads; ++i) fibers_[i].thread.thread = i;
    }

    const int index;
    const int num_blocks;
    SharedMemory memory;

    Thread& running() { return current_->thread; }

    // Each thread in turn until it waits, over and over until all are done.
    void run() {
        while (error.empty()) {
            bool all_done = true, moved = false;
            for (Fiber& fiber : fibers_) {
                all_done = all_done && fiber.done;
                if (fiber.done || fiber.waits_for) continue;
                moved = true;
                resume(fiber);
                if (!error.empty()) return;
            }
            if (all_done) return;
            if (!moved) describe_deadlock();
        }
    }

    void barrier() {
        wait("barrier");
        if (++at_barrier_ == static_cast<int>(fibers_.size())) {
            at_barrier_ = 0;
            for (Fiber& fiber : fibers_) {
                fiber.waits_for = nullptr;
                ++fiber.thread.block_epoch;
            }
        } else {
            leave();
        }
    }

    // An operation that all lanes of a warp enter together; the last one does it for all.
    template <typename Operation>
    void with_warp(const char* name, const void* in, void* out, const Operation& operation) {
        Fiber& self = *current_;
        WarpMeeting& meeting = meetings_[self.thread.warp()];
        if (meeting.arrived && std::strcmp(meeting.name, name) != 0) {
            fail(std::string("a warp meets in ") + meeting.name + " and in " + name);
        }
        int lane = self.thread.thread % kWarpSize;
        meeting.name = name;
        meeting.in[lane] = in;
        meeting.out[lane] = out;
        wait(name);
        if (++meeting.arrived == kWarpSize) {
            meeting.arrived = 0;
            operation(meeting.in, meeting.out);
            for (int i = 0; i < kWarpSize; ++i) {
                fibers_[self.thread.warp() * kWarpSize + i].waits_for = nullptr;
            }
        } else {
            leave();
        }
    }

    // Ends the whole block; the running fiber is never resumed.
    [[noreturn]] void stop(const std::string& what) {
        error = "block " + std::to_string(index) + ", thread " +
                std::to_string(current_->thread.thread) + ": " + what;
        _longjmp(home_, 1);
    }

    std::string error;

private:
    void wait(const char* what) { current_->waits_for = what; }

    void leave() {
        if (_setjmp(current_->jump) == 0) _longjmp(home_, 1);
    }

    void resume(Fiber& fiber) {
        current_ = &fiber;
        if (_setjmp(home_) != 0) return;
        if (fiber.started) _longjmp(fiber.jump, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stack(fiber.thread.thread);
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Block::enter, 0);
        setcontext(&fiber.context);
    }

    static void enter();

    void describe_deadlock() {
        for (Fiber& fiber : fibers_) {
            if (!fiber.done) {
                current_ = &fiber;
                error = "block " + std::to_string(index) + ", thread " +
                        std::to_string(fiber.thread.thread) + " waits for ever in " +
                        fiber.waits_for;
                return;
            }
        }
    }

    std::vector<Fiber> fibers_;
    std::vector<WarpMeeting> meetings_;
    std::function<void()> body_;
    Fiber* current_ = nullptr;
    jmp_buf home_;
    int at_barrier_ = 0;
};

inline Block*& current_block() {
    static thread_local Block* block = nullptr;
    return block;
}

inline Block& block() { return *current_block(); }
inline Thread& self() { return block().running(); }
[[noreturn]] inline void fail(const std::string& what) { block().stop(what); }

inline void Block::enter() {
    Block& here = block();
    here.body_();
    here.current_->done = true;
    _longjmp(here.home_, 1);
}

// What went wrong, or null; `conflicts` of the last grid can be asked for.
inline long& bank_conflicts() {
    static thread_local long count = 0;
    return count;
}

inline const char* run_grid(int blocks, int threads, int shared_bytes, std::function<void()> body) {
    static thread_local std::string error;
    bank_conflicts() = 0;
    for (int index = 0; index < blocks; ++index) {
        auto block = std::make_unique<Block>(index, blocks, threads, shared_bytes, body);
        current_block() = block.get();
        block->run();
        current_block() = nullptr;
        bank_conflicts() += block->memory.conflicts;
        if (!block->error.empty()) {
            error = block->error;
            return error.c_str();
        }
    }
    return nullptr;
}

}  // namespace emulation
}  // namespace batchllm
