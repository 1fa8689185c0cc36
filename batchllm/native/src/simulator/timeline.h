// Blocks held in every step to come: scheduler/timeline.py and scheduler/fitting.py.
#pragma once

#include "state.h"

namespace simulator {

// Calls add(step, amount) for each change in the private blocks of a sequence, from its admission
// (not among the changes) to its end; see `sequence_events`.
template <typename Add>
void sequence_events(Int private_tokens, Int start, Int finish, Int block_size, Add add) {
    const Int first = divided_up(private_tokens, block_size);
    const Int last = divided_up(private_tokens + finish - start, block_size);
    for (Int block = first; block < last; block++)
        add(start - private_tokens + block * block_size + 1, Int(1));
    add(finish + 1, -last);
}

class Timeline {
   public:
    Timeline() : change_(1024) {}

    void add(Int step, Int amount) {
        step = std::max(step, now);
        reserve(step + 1);
        change_[step - origin_] += amount;
        end_ = std::max(end_, step + 1);
        is_summed_ = false;
    }

    void advance(Int num_steps) {
        for (Int step = now; step < std::min(now + num_steps, end_); step++)
            held_ += change_[step - origin_];
        now += num_steps;
    }

    // Blocks held in the steps from `now` on, at least one; after the last, as in it.
    const Int* ahead(Int& count) {
        sum();
        // Between two sums, steps pass and what is held in the rest stays the same.
        const Int begin = std::min(now - summed_at_, Int(ahead_.size()) - 1);
        count = Int(ahead_.size()) - begin;
        return ahead_.data() + begin;
    }

    // The first of the steps to come in which most is held, and how much.
    void fullest(Int& step, Int& held) {
        Int count;
        if (!is_summed_ || fullest_ < now) {
            const Int* known = ahead(count);
            const Int* most = std::max_element(known, known + count);
            fullest_ = now + (most - known);
            fullest_held_ = *most;
        }
        step = fullest_, held = fullest_held_;
    }

    Int now = 0;

   private:
    void sum() {
        if (is_summed_) return;
        ahead_.clear();
        Int held = held_;
        for (Int step = now; step < end_; step++) ahead_.push_back(held += change_[step - origin_]);
        if (ahead_.empty()) ahead_.push_back(held_);
        summed_at_ = now;
        fullest_ = NOBODY;
        is_summed_ = true;
    }

    // Make room for changes before step `end`, forgetting the past.
    void reserve(Int end) {
        if (end - origin_ <= Int(change_.size())) return;
        Ints future(std::max(Int(change_.size()), 2 * (end - now)));
        for (Int step = now; step < end_; step++) future[step - now] = change_[step - origin_];
        change_.swap(future);
        origin_ = now;
    }

    Int held_ = 0;   // in the step before `now`
    Ints change_;    // from step `origin_` on
    Int origin_ = 0;
    Int end_ = 0;    // no change from this step on
    Ints ahead_;     // from step `summed_at_` on
    Int summed_at_ = 0, fullest_ = NOBODY, fullest_held_ = 0;
    bool is_summed_ = false;
};

// The blocks that sequences in a row would hold; see `Demand`.
struct Demand {
    struct One {
        Int private_tokens, start, finish, lasting;
    };

    Int at_most() const {
        Int blocks = 0;
        for (const One& one : all)
            blocks += divided_up(one.private_tokens + one.finish - one.start, block_size) +
                      one.lasting;
        return blocks;
    }

    // Blocks that one holds in a step.
    Int in_step(const One& one, Int step) const {
        if (one.finish < step) return one.lasting;
        const Int grown = std::max(step - one.start, Int(0));
        return divided_up(one.private_tokens + grown, block_size) + one.lasting;
    }

    // Blocks that the first `count` hold in the steps from `now` on, until all have ended.
    void in_steps(Int now, Int count, Ints& steps) const {
        steps.assign(1, 0);
        const auto add = [&](Int step, Int amount) {
            const Int place = std::max(step - now, Int(0));
            if (place >= Int(steps.size())) steps.resize(place + 1);
            steps[place] += amount;
        };
        for (Int i = 0; i < count; i++) {
            const One& one = all[i];
            add(now, divided_up(one.private_tokens, block_size) + one.lasting);
            sequence_events(one.private_tokens, one.start, one.finish, block_size, add);
        }
        for (size_t step = 1; step < steps.size(); step++) steps[step] += steps[step - 1];
    }

    std::vector<One> all;
    Int block_size;
};

// The most sequences, from the first on, that fit in every step beside what is held; see
// `how_many_fit`. `held` [num_held] in the steps from `now` on, `spare` to be left free with 1, 2, ...
inline Int how_many_fit(
    const Int* held, Int num_held, Int now, const Demand& demand, const std::vector<double>& spare,
    Int num_blocks, Ints& steps) {
    Int count = Int(demand.all.size());
    Int fullest = std::max_element(held, held + num_held) - held;
    if (double(held[fullest] + demand.at_most()) + spare[count - 1] <= double(num_blocks))
        return count;
    while (true) {
        Int with_them = held[std::min(fullest, num_held - 1)];
        Int fit = 0;
        for (; fit < count; fit++) {
            with_them += demand.in_step(demand.all[fit], now + fullest);
            if (double(with_them) + spare[fit] > double(num_blocks)) break;
        }
        count = fit;
        if (count == 0) return 0;
        demand.in_steps(now, count, steps);
        const Int num_steps = std::max(num_held, Int(steps.size()));
        Int most = 0;
        for (Int step = 0; step < num_steps; step++) {
            const Int total = held[std::min(step, num_held - 1)] +
                              steps[std::min(step, Int(steps.size()) - 1)];
            if (step == 0 || total > most) most = total, fullest = step;
        }
        if (double(most) + spare[count - 1] <= double(num_blocks)) return count;
    }
}

// The step in which a prefill ends that has what step `now` leaves over to itself; see
// `first_sample_step`. `finishes` are sorted here.
inline Int first_sample_step(Int tokens, Ints& finishes, Int budget, Int now) {
    std::sort(finishes.begin(), finishes.end());
    const Int count = Int(finishes.size());
    const Int horizon = count ? std::max(finishes.back() - now, Int(0)) : 0;
    Int room = 0, over = 0;  // how many are over before a step
    for (Int step = now + 1; step <= now + horizon; step++) {
        while (over < count && finishes[over] < step) over++;
        room += std::max(budget - (count - over), Int(0));
        if (room >= tokens) return step;
    }
    return now + horizon + divided_up(tokens - room, budget);
}

}  // namespace simulator
