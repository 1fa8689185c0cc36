// A block's shared memory and the books that are kept on it.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

namespace batchllm {
namespace emulation {

[[noreturn]] void fail(const std::string& what);

inline void check_aligned(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) {
        fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
    }
}

// Bytes to come from global memory, or zeros where `from` is null.
struct Copy {
    int offset, bytes;
    const void* from;
};

// A thread, and how often it has met the others: what two threads did is ordered if a barrier of
// the block lies between.
struct Thread {
    int thread = 0;
    int block_epoch = 0;
    std::vector<Copy> open_copies;
    std::deque<std::vector<Copy>> groups;

    int warp() const { return thread / 32; }
    void commit_copies() {
        groups.push_back(std::move(open_copies));
        open_copies.clear();
    }
};

constexpr int kCellBytes = 2;

// Who touched a cell last, and since which barrier. `kMany` readers are two or more.
struct Cell {
    static constexpr int kNobody = -1, kMany = -2;
    int writer = kNobody, write_epoch = -1;
    int reader = kNobody, read_epoch = -1;
    int copier = kNobody;  // whose copy is under way
};

class SharedMemory {
public:
    explicit SharedMemory(int bytes)
        : bytes_((bytes + 127) / 128 * 128 + 128), cells_((bytes + kCellBytes - 1) / kCellBytes),
          size_(bytes) {}

    unsigned char* data(int offset) {
        auto start = reinterpret_cast<uintptr_t>(bytes_.data());
        return bytes_.data() + (128 - start % 128) % 128 + offset;
    }

    void read(const Thread& thread, int offset, int count) {
        for (Cell& cell : cells("read", offset, count)) {
            if (cell.copier != Cell::kNobody) fail("read before the copy was waited for" + at(offset));
            if (cell.writer == Cell::kNobody) fail("read, but never written" + at(offset));
            if (cell.write_epoch == thread.block_epoch && cell.writer != thread.thread) {
                fail("read and written by thread " + std::to_string(cell.writer) +
                     " with no barrier between" + at(offset));
            }
            bool others = cell.read_epoch == thread.block_epoch && cell.reader != thread.thread;
            cell.reader = others ? Cell::kMany : thread.thread;
            cell.read_epoch = thread.block_epoch;
        }
    }

    void write(const Thread& thread, int offset, int count) {
        for (Cell& cell : cells("written", offset, count)) {
            if (cell.copier != Cell::kNobody) fail("written while a copy is under way" + at(offset));
            claim(cell, thread, offset);
        }
    }

    void begin_copy(Thread& thread, Copy copy) {
        check_aligned(data(copy.offset), copy.bytes);
        for (Cell& cell : cells("copied to", copy.offset, copy.bytes)) {
            if (cell.copier != Cell::kNobody) fail("two copies under way" + at(copy.offset));
            claim(cell, thread, copy.offset);
            cell.copier = thread.thread;
        }
        thread.open_copies.push_back(copy);
    }

    void end_copies(Thread& thread, size_t left) {
        for (; thread.groups.size() > left; thread.groups.pop_front()) {
            for (const Copy& copy : thread.groups.front()) {
                for (Cell& cell : cells("copied to", copy.offset, copy.bytes)) {
                    cell.copier = Cell::kNobody;
                    claim(cell, thread, copy.offset);
                }
                if (copy.from) {
                    std::memcpy(data(copy.offset), copy.from, copy.bytes);
                } else {
                    std::memset(data(copy.offset), 0, copy.bytes);
                }
            }
        }
    }

    // Eight rows of 16 bytes are read at once if no two lie in the same banks.
    template <typename Row>
    void count_conflicts(const Row& row) {
        uint32_t taken = 0;
        for (int i = 0; i < 8; ++i) {
            uint32_t bank = 1u << (reinterpret_cast<uintptr_t>(row(i)) / 16 % 8);
            conflicts += (taken & bank) != 0;
            taken |= bank;
        }
    }

    long conflicts = 0;

private:
    struct Range {
        Cell *first, *last;
        Cell* begin() const { return first; }
        Cell* end() const { return last; }
    };

    Range cells(const char* what, int offset, int count) {
        if (offset < 0 || offset + count > size_) {
            fail(std::string("shared memory ") + what + " out of bounds" + at(offset));
        }
        return {&cells_[offset / kCellBytes], &cells_[(offset + count - 1) / kCellBytes] + 1};
    }

    void claim(Cell& cell, const Thread& thread, int offset) {
        bool written = cell.write_epoch == thread.block_epoch && cell.writer != thread.thread;
        bool seen = cell.read_epoch == thread.block_epoch && cell.reader != thread.thread;
        if (written || seen) {
            fail("written, and " + std::string(written ? "written" : "read") +
                 " by another thread with no barrier between" + at(offset));
        }
        cell.writer = thread.thread;
        cell.write_epoch = thread.block_epoch;
    }

    static std::string at(int offset) { return ", shared byte " + std::to_string(offset); }

    std::vector<unsigned char> bytes_;
    std::vector<Cell> cells_;
    int size_;
};

}  // namespace emulation
}  // namespace batchllm
