// The run state of a window: scheduler/state.py, cache/block_counts.py and scheduler/idle.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simulate.h"

namespace simulator {

typedef int64_t Int;
typedef std::vector<Int> Ints;

constexpr Int NOBODY = -1;

// One of the scheduler's own rules does not hold.
struct Broken {};

inline void expect(bool holds) {
    if (!holds) throw Broken();
}

inline Int divided_up(Int tokens, Int size) { return (tokens + size - 1) / size; }

struct Segments {
    explicit Segments(const SimulatedWindow& window)
        : fixed(window),
          count(window.num_segments),
          num_computed(count),
          high_water(count),
          num_outputs(count),
          owner(count) {
        for (Int segment = 0; segment < count; segment++) owner[segment] = segment;
    }

    Int parent(Int segment) const { return fixed.parent[segment]; }
    Int length(Int segment) const { return fixed.length[segment]; }
    Int tokens(Int segment) const { return fixed.length[segment] + num_outputs[segment]; }
    Int pending(Int segment) const { return tokens(segment) - num_computed[segment]; }
    bool is_leaf(Int segment) const { return fixed.leaf[segment] != NOBODY; }

    const SimulatedWindow& fixed;
    Int count;
    Ints num_computed, high_water, num_outputs, owner;
};

// ChildCount: how many of a node's children count; a node does as long as one of them does.
class ChildCount {
   public:
    explicit ChildCount(const Segments& state) : parent_(state.fixed.parent), children(state.count) {}

    // Returns nodes that now count too.
    Ints add(const Ints& segments) { return change(segments, 1); }

    // Returns nodes that do not any more, descendants before their ancestors.
    Ints remove(const Ints& segments) { return change(segments, -1); }

   private:
    const Int* parent_;

   public:
    Ints children;

   private:
    Ints change(const Ints& segments, Int by) {
        Ints changed, parents, turned;
        above(segments, parents);
        while (!parents.empty()) {
            turned.clear();
            for (Int parent : parents) {
                if (by > 0 && children[parent] == 0) turned.push_back(parent);
                children[parent] += by;
                if (by < 0 && children[parent] == 0) turned.push_back(parent);
            }
            std::sort(turned.begin(), turned.end());
            changed.insert(changed.end(), turned.begin(), turned.end());
            above(turned, parents);
        }
        return changed;
    }

    void above(const Ints& segments, Ints& parents) const {
        parents.clear();
        for (Int segment : segments)
            if (parent_[segment] != NOBODY) parents.push_back(parent_[segment]);
    }
};

// How many blocks everyone holds, of how many there are.
class Blocks {
   public:
    Blocks(Int num_blocks, Int block_size, Int num_owners)
        : num_blocks(num_blocks), size(block_size), num_held(num_owners), num_free(num_blocks) {}

    void grow(Int owner, Int count) {
        num_free -= count - num_held[owner];
        expect(num_free >= 0);
        num_held[owner] = count;
        peak_used = std::max(peak_used, num_blocks - num_free);
    }

    void release(Int owner) {
        num_free += num_held[owner];
        num_held[owner] = 0;
    }

    Int of(Int tokens) const { return divided_up(tokens, size); }

    const Int num_blocks, size;
    Ints num_held;
    Int num_free, peak_used = 0;
};

// IdleNodes: nodes with KV that only waiting sequences need, the longest unneeded first.
class IdleNodes {
   public:
    IdleNodes(Segments& state, Blocks& blocks)
        : state_(state),
          blocks_(blocks),
          before_(state.count + 1, ABSENT),
          after_(state.count + 1, ABSENT),
          is_spared_(state.count) {
        before_[end()] = after_[end()] = end();
    }

    // Descendants first.
    void add(const Ints& nodes) {
        for (Int node : nodes) {
            if (blocks_.num_held[node] == 0 || before_[node] != ABSENT) continue;
            const Int last = before_[end()];
            before_[node] = last, after_[node] = end();
            after_[last] = before_[end()] = node;
        }
    }

    void remove(const Ints& nodes) {
        for (Int node : nodes) remove(node);
    }

    // `next_up` is the sequence that is next, or NOBODY.
    bool reclaim(Int count, Int next_up) {
        if (blocks_.num_free < count && !empty()) {
            set_spared(next_up, true);
            while (blocks_.num_free < count && !empty()) {
                Int node = after_[end()];
                while (node != end() && is_spared_[node]) node = after_[node];
                if (node == end()) node = after_[end()];
                remove(node);
                drop(node);
            }
            set_spared(next_up, false);
        }
        return blocks_.num_free >= count;
    }

    // The segment's KV is gone: computing it again is repetition.
    void drop(Int segment) {
        blocks_.release(segment);
        state_.high_water[segment] =
            std::max(state_.high_water[segment], state_.num_computed[segment]);
        state_.num_computed[segment] = 0;
    }

   private:
    static constexpr Int ABSENT = -1;

    Int end() const { return state_.count; }
    bool empty() const { return after_[end()] == end(); }

    void remove(Int node) {
        if (before_[node] == ABSENT) return;
        after_[before_[node]] = after_[node];
        before_[after_[node]] = before_[node];
        before_[node] = ABSENT;
    }

    void set_spared(Int sequence, bool spared) {
        if (sequence == NOBODY) return;
        for (Int node = state_.parent(sequence); node != NOBODY; node = state_.parent(node))
            is_spared_[node] = spared;
    }

    Segments& state_;
    Blocks& blocks_;
    Ints before_, after_;  // a ring through `end`
    std::vector<char> is_spared_;
};

}  // namespace simulator
