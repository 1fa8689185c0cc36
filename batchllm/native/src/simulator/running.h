// Who waits and who runs: scheduler/queue.py, scheduler/candidates.py and scheduler/running.py.
#pragma once

#include "state.h"

namespace simulator {

class AdmissionQueue {
   public:
    explicit AdmissionQueue(Ints order) : order_(std::move(order)) {}

    Int size() const { return Int(returned_.size() + order_.size()) - next_; }

    // The sequence at a place from the head on.
    Int at(Int place) const {
        const Int returned = Int(returned_.size());
        return place < returned ? returned_[returned - 1 - place]
                                : order_[next_ + place - returned];
    }

    void pop(Int count) {
        const Int returned = std::min(count, Int(returned_.size()));
        returned_.resize(returned_.size() - returned);
        next_ += count - returned;
    }

    void put_back(Int sequence) { returned_.push_back(sequence); }

   private:
    Ints order_, returned_;  // the last one returned is the head
    Int next_ = 0;
};

// Sequences in order of admission, and what each adds to those before it; `nodes` are those above
// them that no admitted sequence needs, by the first candidate that does, from the top down.
struct Candidates {
    struct One {
        Int sequence;
        Int tokens;       // its own pending ones, and its first nodes'
        size_t num_nodes;  // of it and those before it
    };

    size_t nodes_before(size_t candidate) const {
        return candidate == 0 ? 0 : all[candidate - 1].num_nodes;
    }

    void take(size_t count) {
        all.resize(count);
        nodes.resize(nodes_before(count));
    }

    std::vector<One> all;
    Ints nodes;
    Int tokens;  // of all
};

class Running {
   public:
    explicit Running(Segments& state)
        : below(state), state_(state), turn_(state.count), is_new_(state.count) {}

    Int size() const { return count_; }

    // Calls each(sequence): the decoding ones, then those in the work.
    template <typename Each>
    void for_each(Each each) const {
        for (Int sequence : decoding) each(sequence);
        for (Int segment : work)
            if (state_.is_leaf(segment)) each(segment);
    }

    Int last_admitted() const {
        Int last = NOBODY;
        for_each([&](Int sequence) {
            if (last == NOBODY || turn_[sequence] > turn_[last]) last = sequence;
        });
        return last;
    }

    // As many of the queue's first `most` sequences as a step with `room` tokens has a use for.
    void find_candidates(const AdmissionQueue& queue, Int most, Int room, Candidates& found) {
        found.all.clear();
        found.nodes.clear();
        found.tokens = 0;
        most = std::min(most, queue.size());
        for (Int place = 0; place < most && found.tokens < room; place++) {
            const Int sequence = queue.at(place);
            const size_t begin = found.nodes.size();
            Int tokens = state_.pending(sequence);
            for (Int node = state_.parent(sequence);
                 node != NOBODY && below.children[node] == 0 && !is_new_[node];
                 node = state_.parent(node)) {
                is_new_[node] = true;
                tokens += state_.pending(node);
                found.nodes.push_back(node);
            }
            std::reverse(found.nodes.begin() + begin, found.nodes.end());
            found.all.push_back({sequence, tokens, found.nodes.size()});
            found.tokens += tokens;
        }
        for (Int node : found.nodes) is_new_[node] = false;
    }

    void admit(const Candidates& admitted) {
        Ints sequences;
        for (size_t i = 0; i < admitted.all.size(); i++) {
            const Int sequence = admitted.all[i].sequence;
            for (size_t n = admitted.nodes_before(i); n < admitted.all[i].num_nodes; n++) {
                const Int node = admitted.nodes[n];
                state_.owner[node] = sequence;
                if (state_.pending(node) > 0) work.push_back(node);
            }
            work.push_back(sequence);
            turn_[sequence] = turns_++;
            sequences.push_back(sequence);
        }
        count_ += Int(sequences.size());
        const Ints needed = below.add(sequences);
        expect(needed.size() == admitted.nodes.size());
        const size_t before = nodes.size();
        nodes.insert(nodes.end(), needed.begin(), needed.end());
        std::sort(nodes.begin() + before, nodes.end());
        std::inplace_merge(nodes.begin(), nodes.begin() + before, nodes.end());
    }

    // Sequences, no longer among the decoding, are through; returns nodes nobody needs now.
    Ints finish(const Ints& sequences) {
        count_ -= Int(sequences.size());
        Ints unneeded = below.remove(sequences);
        if (!unneeded.empty()) drop(nodes, [&](Int node) { return below.children[node] == 0; });
        return unneeded;
    }

    // A sequence stops, and the nodes that were computed on its way; returns as `finish`.
    Ints preempt(Int sequence) {
        drop(decoding, [&](Int other) { return other == sequence; });
        drop(work, [&](Int segment) { return state_.owner[segment] == sequence; });
        return finish({sequence});
    }

    Ints decoding;  // sequences, ascending
    Ints work;      // segments, in order
    Ints nodes;     // those above running sequences, ascending
    ChildCount below;

   private:
    template <typename Which>
    static void drop(Ints& from, Which which) {
        from.erase(std::remove_if(from.begin(), from.end(), which), from.end());
    }

    Segments& state_;
    Int count_ = 0, turns_ = 0;
    Ints turn_;
    std::vector<char> is_new_;
};

}  // namespace simulator
