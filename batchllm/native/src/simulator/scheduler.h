// From a window to one batch a step: scheduler/scheduler.py, where everyone knows when answers end.
#pragma once

#include "admission.h"
#include "batch.h"

namespace simulator {

class Scheduler {
   public:
    Scheduler(const SimulatedWindow& window, const SimulatedLimits& limits)
        : window_(window),
          limits_(limits),
          state_(window),
          blocks_(limits.num_blocks, limits.block_size, state_.count),
          projection_(state_, limits.block_size),
          unfinished_(state_),
          running_(state_),
          idle_(state_, blocks_),
          longest_(state_.count),
          queue_(fitting()),
          admission_(state_, queue_, running_, idle_, projection_, lengths_, limits) {}

    bool has_unfinished() const { return num_unfinished_ > 0; }
    Int peak_used() const { return blocks_.peak_used; }
    Int output_position(const Chunk& chunk) const { return state_.num_outputs[chunk.segment]; }

    void schedule(Batch& batch) {
        admission_.revise_overdue();
        grow_decodes(batch);
        const Int num_decodes = Int(batch.chunks.size());
        prefill(limits_.step_tokens - num_decodes);
        while (num_decodes == 0 && work_.empty()) {
            preempt_last();
            prefill(limits_.step_tokens);
        }
        batch.assemble(state_, running_.nodes, work_);
        for (Int sequence : running_.decoding) state_.num_computed[sequence]++;
        steps++;
        if (!work_.empty())
            account();
        else if (running_.work.empty())
            repeat(batch);
    }

    void update(const Batch& batch) {
        projection_.advance(batch.num_steps);
        ended_.clear();
        going_on_.resize(batch.num_samples);
        size_t going_on = 0;
        for (const Chunk& chunk : batch.chunks) {
            if (!chunk.samples) continue;
            const Int sequence = chunk.segment;
            const Int num_outputs = state_.num_outputs[sequence] += batch.num_steps;
            going_on_[going_on] = sequence;
            if (num_outputs >= longest_[sequence])
                ended_.push_back(sequence);
            else
                going_on++;
        }
        going_on_.resize(going_on);
        go_on();
        stop();
    }

    Int steps = 0, computed_prompt_tokens = 0, recomputed_tokens = 0, preemptions = 0, failed = 0;

   private:
    Int ends(Int sequence) const { return window_.ends[window_.leaf[sequence]]; }

    // The sequences that can run, alone if need be, in order; the others are given up. Sets how long
    // each one's answer gets.
    Ints fitting() {
        const Int* of_leaf = window_.of_leaf;
        unfinished_.add(Ints(of_leaf, of_leaf + window_.num_leaves));
        Ints above(state_.count), order, not_fitting;
        for (Int segment = 0; segment < state_.count; segment++) {
            const Int parent = state_.parent(segment);  // comes before it
            if (parent != NOBODY) above[segment] = above[parent] + projection_.blocks(parent);
        }
        for (Int i = 0; i < window_.num_leaves; i++) {
            const Int sequence = window_.order[i];
            const Int most = window_.max_tokens[sequence];
            longest_[sequence] =
                window_.ignore_eos[sequence] ? most : std::min(most, ends(sequence));
            const Int tokens = state_.length(sequence) + most - 1;
            const bool fits = above[sequence] + blocks_.of(tokens) <= limits_.num_blocks;
            (fits ? order : not_fitting).push_back(sequence);
        }
        projection_.give_up(not_fitting);
        unfinished_.remove(not_fitting);
        failed = Int(not_fitting.size());
        num_unfinished_ = Int(order.size());
        return order;
    }

    // One step's result

    // These have sampled and decode from now on, and no others.
    void go_on() {
        running_.decoding.swap(going_on_);
        if (projection_.latest_start < projection_.now()) return;
        // The first sample of what took shorter to prefill than expected.
        Ints early;
        for (Int sequence : running_.decoding)
            if (projection_.start[sequence] >= projection_.now()) early.push_back(sequence);
        admission_.revise(early);
    }

    void stop() {
        if (ended_.empty()) return;
        for (Int sequence : ended_) projection_.let_go(sequence);
        release(ended_, running_.finish(ended_));
        const Ints finished = unfinished_.remove(ended_);
        idle_.remove(finished);
        for (Int node : finished) idle_.drop(node);
        for (Int sequence : ended_)
            if (!window_.ignore_eos[sequence])
                lengths_.observe(state_.num_outputs[sequence], window_.max_tokens[sequence]);
        num_unfinished_ -= Int(ended_.size());
    }

    // One step's tokens

    // Give all decodes room for a token, preempting until there is enough.
    void grow_decodes(Batch& batch) {
        const Ints& decoding = running_.decoding;
        do {
            full_.clear();
            for (Int sequence : decoding)
                if (state_.num_computed[sequence] == blocks_.num_held[sequence] * blocks_.size)
                    full_.push_back(sequence);
        } while (!reclaim(Int(full_.size())) && preempt_last());
        for (Int sequence : full_) blocks_.grow(sequence, blocks_.num_held[sequence] + 1);
        batch.chunks.resize(decoding.size());
        for (size_t i = 0; i < decoding.size(); i++)
            batch.chunks[i] = {decoding[i], 1, state_.num_computed[decoding[i]], true};
    }

    // Take up to `room` tokens of prefill as `work_`, admitting for it, and give them blocks.
    void prefill(Int room) {
        Ints& work = running_.work;
        work_.clear();
        Int backlog = 0;
        for (Int segment : work) backlog += state_.pending(segment);
        if (backlog < room) admission_.admit(room - backlog);
        if (room <= 0 || work.empty()) return;
        Int missing = 0;
        for (size_t i = 0; i < work.size() && room > 0; i++) {
            const Int segment = work[i], count = std::min(state_.pending(segment), room);
            const Int offset = state_.num_computed[segment];
            room -= count;
            missing += blocks_.of(offset + count) - blocks_.num_held[segment];
            work_.push_back({segment, count, offset, false});
        }
        if (!reclaim(missing)) {
            size_t taken = 0;
            for (missing = 0; taken < work_.size(); taken++) {
                const Chunk& chunk = work_[taken];
                missing += blocks_.of(chunk.offset + chunk.count) - blocks_.num_held[chunk.segment];
                if (missing > blocks_.num_free) break;
            }
            work_.resize(taken);
        }
        size_t complete = 0;  // all but perhaps the last are
        for (Chunk& chunk : work_) {
            blocks_.grow(chunk.segment, blocks_.of(chunk.offset + chunk.count));
            if (chunk.count < state_.pending(chunk.segment)) continue;
            chunk.samples = state_.is_leaf(chunk.segment);
            complete++;
        }
        work.erase(work.begin(), work.begin() + complete);
    }

    // What is prefilled is computed.
    void account() {
        for (const Chunk& chunk : work_) {
            const Int begin = chunk.offset, end = begin + chunk.count;
            const Int fresh = std::max(begin, state_.high_water[chunk.segment]);
            const Int in_prompt = std::min(end, state_.length(chunk.segment));
            state_.num_computed[chunk.segment] = end;
            computed_prompt_tokens += std::max(in_prompt - begin, Int(0));
            recomputed_tokens += std::min(end, fresh) - begin;
        }
    }

    // Let a batch of decodes stand for as many steps as nothing changes in.
    void repeat(Batch& batch) {
        Int num_steps = INT64_MAX, missing = 0;
        for (const Chunk& chunk : batch.chunks) {
            num_steps = std::min(num_steps, ends(chunk.segment) - output_position(chunk));
            const Int last = projection_.finish[chunk.segment];
            num_steps = std::min(num_steps, last - projection_.now() + 1);
        }
        if (num_steps < 2) return;
        for (const Chunk& chunk : batch.chunks)
            missing += blocks_.of(chunk.offset + num_steps) - blocks_.num_held[chunk.segment];
        if (missing > blocks_.num_free) return;
        for (const Chunk& chunk : batch.chunks) {
            blocks_.grow(chunk.segment, blocks_.of(chunk.offset + num_steps));
            state_.num_computed[chunk.segment] = chunk.offset + num_steps;
        }
        steps += num_steps - 1;
        batch.num_steps = num_steps;
    }

    // Memory

    bool reclaim(Int count) {
        return idle_.reclaim(count, queue_.size() > 0 ? queue_.at(0) : NOBODY);
    }

    bool preempt_last() {
        const Int last = running_.last_admitted();
        expect(running_.size() > 1);
        projection_.preempt(last);
        release({last}, running_.preempt(last));
        queue_.put_back(last);
        admission_.is_open = false;
        preemptions++;
        return true;
    }

    // Sequences stopped: their private blocks go back, and `unneeded` nodes fall idle.
    void release(const Ints& sequences, const Ints& unneeded) {
        for (Int sequence : sequences) idle_.drop(sequence);
        admission_.is_open = true;
        projection_.drop_nodes(unneeded);
        idle_.add(unneeded);
    }

    const SimulatedWindow& window_;
    const SimulatedLimits& limits_;
    Segments state_;
    Blocks blocks_;
    Projection projection_;
    ChildCount unfinished_;
    Running running_;
    IdleNodes idle_;
    LengthEstimator lengths_;
    Int num_unfinished_ = 0;
    Ints longest_;
    AdmissionQueue queue_;
    Admission admission_;
    std::vector<Chunk> work_;
    Ints full_, ended_, going_on_;  // reused from step to step
};

}  // namespace simulator
