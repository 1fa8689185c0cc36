// KV memory, projected to the end of every sequence that is admitted: scheduler/projection.py.
#pragma once

#include "timeline.h"

namespace simulator {

class Projection {
   public:
    Projection(const Segments& state, Int block_size)
        : start(state.count, NEVER),
          finish(state.count, NEVER),
          state_(state),
          block_size_(block_size),
          private_(state.count),
          node_(state.count, ABSENT),
          waiting_(state) {
        const Int* of_leaf = state.fixed.of_leaf;
        waiting_.add(Ints(of_leaf, of_leaf + state.fixed.num_leaves));
    }

    Int now() const { return timeline_.now; }
    void advance(Int num_steps) { timeline_.advance(num_steps); }
    Int blocks(Int node) const { return divided_up(state_.length(node), block_size_); }

    Int how_many_fit(const Demand& demand, const std::vector<double>& spare, Int num_blocks) {
        Int count;
        const Int* held = timeline_.ahead(count);
        return simulator::how_many_fit(
            held, count, now(), demand, spare, num_blocks - forever_, steps_);
    }

    // Whether a sequence overfills the step that is fullest without it.
    bool cannot_fit(
        Int sequence, Int expected, Int blocks_of_nodes, Int num_blocks, bool grows) {
        Int step, held;
        timeline_.fullest(step, held);
        const Int later = step - now();
        if (later >= expected) return false;
        const Int tokens = state_.tokens(sequence) + (grows ? later : 0);
        return held + forever_ + divided_up(tokens, block_size_) + blocks_of_nodes > num_blocks;
    }

    // Nodes that no admitted sequence needed before; then the sequences, with `hold`.
    void admit_nodes(const Ints& nodes) {
        for (Int node : nodes) {
            node_[node] = FOREVER;
            forever_ += blocks(node);
        }
    }

    // A sequence samples from step `from` to step `to`.
    void hold(Int sequence, Int from, Int to) {
        private_[sequence] = state_.tokens(sequence);
        start[sequence] = from;
        finish[sequence] = to;
        latest_start = std::max(latest_start, from);
        apply(sequence, 1);
    }

    // Let the nodes above last as long as these sequences do.
    void raise(const Ints& sequences) {
        for (Int sequence : sequences) {
            const Int last = finish[sequence];
            for (Int node = state_.parent(sequence); node != NOBODY && finish[node] < last;
                 node = state_.parent(node)) {
                // Not freed then, but later; what was freed already is held again.
                if (node_[node] == UNTIL) {
                    timeline_.add(finish[node] + 1, blocks(node));
                    timeline_.add(last + 1, -blocks(node));
                }
                finish[node] = last;
            }
        }
    }

    void let_go(Int sequence) {
        if (finish[sequence] >= now()) apply(sequence, -1);  // else it is through anyway
    }

    void preempt(Int sequence) {
        let_go(sequence);
        for (Int node : waiting_.add({sequence})) {
            if (node_[node] != UNTIL) continue;
            hold_node(node, -blocks(node));
            node_[node] = FOREVER;
            forever_ += blocks(node);
        }
    }

    // No admitted sequence needs the nodes any more.
    void drop_nodes(const Ints& nodes) {
        for (Int node : nodes) {
            if (node_[node] == FOREVER) forever_ -= blocks(node);
            if (node_[node] == UNTIL) hold_node(node, -blocks(node));
            node_[node] = ABSENT;
            finish[node] = NEVER;
        }
    }

    // Sequences wait no longer to be admitted: they are, or never will be.
    void give_up(const Ints& sequences) {
        for (Int node : waiting_.remove(sequences)) {
            if (node_[node] != FOREVER) continue;
            node_[node] = UNTIL;
            forever_ -= blocks(node);
            hold_node(node, blocks(node));
        }
    }

    static constexpr Int NEVER = -1;

    Int latest_start = NEVER;
    Ints start, finish;  // of nodes: the latest

   private:
    enum State : char { ABSENT, FOREVER, UNTIL };

    void apply(Int sequence, Int sign) {
        const Int tokens = private_[sequence];
        timeline_.add(now(), sign * divided_up(tokens, block_size_));
        sequence_events(
            tokens, start[sequence], finish[sequence], block_size_,
            [&](Int step, Int amount) { timeline_.add(step, sign * amount); });
    }

    // Hold `blocks` more from now until the node's latest finish, if that is to come.
    void hold_node(Int node, Int blocks) {
        if (finish[node] < now()) return;
        timeline_.add(now(), blocks);
        timeline_.add(finish[node] + 1, -blocks);
    }

    const Segments& state_;
    const Int block_size_;
    Timeline timeline_;
    Int forever_ = 0;
    Ints private_, steps_;
    std::vector<char> node_;
    ChildCount waiting_;
};

}  // namespace simulator
