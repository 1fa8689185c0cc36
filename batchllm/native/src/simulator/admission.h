// Who is admitted, and until when everyone is expected to run: scheduler/admission.py.
#pragma once

#include "lengths.h"
#include "projection.h"
#include "running.h"

namespace simulator {

class Admission {
   public:
    Admission(
        const Segments& state, AdmissionQueue& queue, Running& running, IdleNodes& idle,
        Projection& projection, LengthEstimator& lengths, const SimulatedLimits& limits)
        : state_(state),
          queue_(queue),
          running_(running),
          idle_(idle),
          projection_(projection),
          lengths_(lengths),
          limits_(limits),
          deviation_(state.count) {
        demand_.block_size = limits.block_size;
    }

    // Admit for a step that has `room` tokens left.
    void admit(Int room) {
        while (room > 0 && is_open && queue_.size() > 0) {
            const Int places = limits_.max_num_seqs - running_.size();
            if (places <= 0) return;
            if (is_tight_ && head_cannot_fit(room)) {
                is_open = false;
                return;
            }
            running_.find_candidates(queue_, std::min(places, room), room, candidates_);
            size_t count = how_many_fit(room);
            is_tight_ = count < candidates_.all.size();
            if (is_tight_) is_open = false;
            if (count == 0 && running_.size() == 0) count = 1;  // alone, the head fits the pool
            if (count == 0) continue;
            candidates_.take(count);
            start();
            for (const Candidates::One& one : candidates_.all) room -= one.tokens;
        }
    }

    // Expect more of decodes that should have finished by now.
    void revise_overdue() {
        Ints overdue;
        for (Int sequence : running_.decoding)
            if (projection_.finish[sequence] < projection_.now()) overdue.push_back(sequence);
        revise(overdue);
    }

    // Expect of decodes what their next token in the coming step suggests.
    void revise(const Ints& sequences) {
        const Int now = projection_.now();
        for (Int sequence : sequences) projection_.let_go(sequence);
        for (Int sequence : sequences) {
            const Expectation expected = remaining(sequence);
            note_deviation(sequence, expected.deviation);
            projection_.hold(sequence, now, now + expected.tokens - 1);
        }
        projection_.raise(sequences);
    }

    bool is_open = true;  // something changed since the queue's head did not fit

   private:
    // A quick look at the head alone: what `how_many_fit` would find, or nothing.
    bool head_cannot_fit(Int room) {
        if (running_.size() == 0) return false;
        const Int sequence = queue_.at(0);
        Int tokens = state_.pending(sequence), blocks = 0;
        for (Int node = state_.parent(sequence);
             node != NOBODY && running_.below.children[node] == 0; node = state_.parent(node)) {
            tokens += state_.length(node) - state_.num_computed[node];
            blocks += projection_.blocks(node);
        }
        return projection_.cannot_fit(
            sequence, remaining(sequence).tokens, blocks, limits_.num_blocks, tokens <= room);
    }

    size_t how_many_fit(Int room) {
        const size_t count = candidates_.all.size();
        const Int now = projection_.now();
        expected_.clear();
        demand_.all.clear();
        for (size_t i = 0; i < count; i++) {
            const Int sequence = candidates_.all[i].sequence;
            expected_.push_back(remaining(sequence));
            Int lasting = 0;
            for (size_t n = candidates_.nodes_before(i); n < candidates_.all[i].num_nodes; n++)
                lasting += projection_.blocks(candidates_.nodes[n]);
            const Int last = now + expected_[i].tokens - 1;
            demand_.all.push_back({state_.tokens(sequence), now, last, lasting});
        }
        const Int over = candidates_.tokens - room;
        if (over > 0) begin_later(over);
        set_spare();
        return size_t(projection_.how_many_fit(demand_, spare_, limits_.num_blocks));
    }

    // The last one takes more than this step: the next, if that will do even if nobody finishes.
    void begin_later(Int over) {
        Demand::One& last = demand_.all.back();
        const Int now = projection_.now(), budget = limits_.step_tokens;
        Int start = now + 1;
        if (over > budget - (running_.size() + Int(demand_.all.size()) - 1)) {
            finishes_.clear();
            running_.for_each([&](Int s) { finishes_.push_back(projection_.finish[s]); });
            for (size_t i = 0; i + 1 < demand_.all.size(); i++)
                finishes_.push_back(demand_.all[i].finish);
            start = first_sample_step(over, finishes_, budget, now);
        }
        last.finish += start - last.start;
        last.start = start;
    }

    // Blocks to leave free with the first 1, 2, ... candidates.
    void set_spare() {
        spare_.assign(expected_.size(), 0.0);
        bool known = all_known_;
        for (const Expectation& expected : expected_) known = known && expected.deviation == 0;
        if (known) return;
        double running = 0, variance = 0;
        running_.for_each([&](Int s) { running += deviation_[s] * deviation_[s]; });
        for (size_t i = 0; i < expected_.size(); i++) {
            variance += expected_[i].deviation * expected_[i].deviation;
            spare_[i] = 2 * std::sqrt(variance + running) / double(limits_.block_size);
        }
    }

    // The candidates are admitted.
    void start() {
        Ints sequences;
        projection_.admit_nodes(candidates_.nodes);
        for (size_t i = 0; i < candidates_.all.size(); i++) {
            const Int sequence = candidates_.all[i].sequence;
            note_deviation(sequence, expected_[i].deviation);
            projection_.hold(sequence, demand_.all[i].start, demand_.all[i].finish);
            sequences.push_back(sequence);
        }
        projection_.raise(sequences);
        projection_.give_up(sequences);
        queue_.pop(Int(sequences.size()));
        running_.admit(candidates_);
        idle_.remove(candidates_.nodes);
    }

    Expectation remaining(Int sequence) {
        return lengths_.remaining(
            state_.num_outputs[sequence], state_.fixed.max_tokens[sequence],
            state_.fixed.ignore_eos[sequence]);
    }

    void note_deviation(Int sequence, double deviation) {
        deviation_[sequence] = deviation;
        all_known_ = all_known_ && deviation == 0;
    }

    const Segments& state_;
    AdmissionQueue& queue_;
    Running& running_;
    IdleNodes& idle_;
    Projection& projection_;
    LengthEstimator& lengths_;
    const SimulatedLimits& limits_;
    std::vector<double> deviation_;  // of the expected lengths
    bool all_known_ = true;          // no deviation yet
    bool is_tight_ = false;          // not all fitted that a step had a use for, last time
    // Reused from step to step:
    Candidates candidates_;
    Demand demand_;
    std::vector<Expectation> expected_;
    std::vector<double> spare_;
    Ints finishes_;
};

}  // namespace simulator
