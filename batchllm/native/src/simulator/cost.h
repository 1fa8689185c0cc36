// How long a step takes: simulate/cost.py, and which half of it is computed first, as
// scheduler/split.py has it.
#pragma once

#include "batch.h"

namespace simulator {

class CostModel {
   public:
    explicit CostModel(const SimulatedCosts& costs) : costs_(costs) {}

    // Adds the batch's cost, over all the steps it stands for.
    void add(const Batch& batch, SimulatedResult& result) {
        const double num_steps = double(batch.num_steps);
        double overhead = costs_.step + costs_.token * double(batch.num_tokens);
        overhead += costs_.sample * double(batch.num_samples);
        const double gemm = costs_.body[batch.num_tokens];
        const double attention = this->attention(batch);
        const double least = costs_.least_hidden * (gemm + attention);
        double hidden = 0;
        if (batch.num_tokens > 1 && most_hidden(gemm, attention) >= least)
            hidden = gemm + attention - overlapped(batch);
        if (hidden < least) hidden = 0;
        result.gemm_seconds += num_steps * gemm;
        result.head_seconds += num_steps * costs_.head[batch.num_samples];
        result.attention_seconds += num_steps * attention;
        result.overhead_seconds += num_steps * overhead;
        result.hidden_seconds += num_steps * hidden;
    }

   private:
    // Pairs of query and key, and tokens read.
    struct Reads {
        double pairs, reads;
    };

    // In each next step every decode has a token more to read; with several, all are decodes.
    static double grown(const Batch& batch) { return double(batch.num_steps - 1) / 2; }

    double attention(const Batch& batch) {
        count_before(batch);
        Int num_segments = Int(batch.shared.size());
        for (const Chunk& chunk : batch.chunks) num_segments += chunk.count > 1;
        return costs_.segment * double(num_segments) +
               (costs_.one_attention_launch ? at_once(batch) : apart(batch));
    }

    double at_once(const Batch& batch) const {
        Int pairs = 0, reads = 0;
        for (const Chunk& chunk : batch.chunks) {
            pairs += own_pairs(chunk);
            reads += chunk.offset + chunk.count;
        }
        for (const SharedRead& shared : batch.shared) {
            pairs += queries(shared) * shared.length;
            reads += shared.length;
        }
        const double more = grown(batch) * double(batch.chunks.size());
        return slower(double(pairs) + more, double(reads) + more);
    }

    double apart(const Batch& batch) const {
        double seconds = 0;
        for (const Chunk& chunk : batch.chunks) {
            const double read = double(chunk.offset + chunk.count);
            // A decode of its own is bound by reading, whatever its arithmetic would take alone.
            seconds += chunk.count == 1 ? costs_.read * (read + grown(batch))
                                        : slower(double(own_pairs(chunk)), read);
        }
        for (const SharedRead& shared : batch.shared)
            seconds += slower(double(queries(shared) * shared.length), double(shared.length));
        return seconds;
    }

    // Tokens that attend to a shared segment.
    Int queries(const SharedRead& shared) const {
        return before_[shared.end] - before_[shared.begin];
    }

    static Int triangle(Int count) { return (count * count + count) / 2; }

    // A chunk's own tokens see half of each other, and all of what was there before.
    static Int own_pairs(const Chunk& chunk) {
        return chunk.count * chunk.offset + triangle(chunk.count);
    }

    // The slower of arithmetic and reading hides the other.
    double slower(double pairs, double reads) const {
        return std::max(costs_.pair * pairs, costs_.read * reads);
    }

    // Tokens before each chunk.
    void count_before(const Batch& batch) {
        before_.assign(batch.chunks.size() + 1, 0);
        for (size_t i = 0; i < batch.chunks.size(); i++)
            before_[i + 1] = before_[i] + batch.chunks[i].count;
    }

    double most_hidden(double products, double attention) const {
        const double share = costs_.overlap_share, speed = costs_.overlap_speed;
        if (share == 0) return 0;
        const double halves = std::max(products, 2 * costs_.weights);
        const double first = halves + attention * share / speed;
        const double second = attention + halves * (1 - speed) / (1 - share);
        return products + attention - std::max(first, second);
    }

    // Seconds of products and attention, those of either half beside the other's.
    double overlapped(const Batch& batch) {
        first_half(batch);
        double products[2];
        Reads attention[2];
        for (int half = 0; half < 2; half++) halved(batch, half, products[half], attention[half]);
        const double one_by_one = products[0] + products[1] +
                             (slower(attention[0].pairs, attention[0].reads) +
                              slower(attention[1].pairs, attention[1].reads));
        const double together =
            beside(products[0], attention[1]) + beside(products[1], attention[0]);
        // Nothing is beside the first products and the last attention: about a layer's.
        return together + (one_by_one - together) / double(costs_.num_layers);
    }

    // Seconds of both, side by side; until either ends, each has its share of the machine.
    double beside(double products, const Reads& attention) const {
        const double share = costs_.overlap_share;
        const double arithmetic = costs_.pair * attention.pairs;
        const double reading = costs_.read * attention.reads;
        const double shared = std::max(arithmetic / share, reading / costs_.overlap_speed);
        if (shared * (1 - share) <= products) return products + shared * share;
        const double until = products / (1 - share);
        return until + (1 - until / shared) * std::max(arithmetic, reading);
    }

    // One half's products and attention; its tokens are those of `taken_`, or all others.
    void halved(const Batch& batch, int half, double& products, Reads& attention) {
        Int pairs = 0, reads = 0, num_chunks = 0;
        before_.assign(batch.chunks.size() + 1, 0);
        for (size_t i = 0; i < batch.chunks.size(); i++) {
            const Chunk& chunk = batch.chunks[i];
            const Int count = half == 0 ? taken_[i] : chunk.count - taken_[i];
            const Int offset = half == 0 ? chunk.offset : chunk.offset + taken_[i];
            before_[i + 1] = before_[i] + count;
            if (count == 0) continue;
            pairs += count * offset + triangle(count);
            reads += offset + count;
            num_chunks++;
        }
        for (const SharedRead& shared : batch.shared) {
            pairs += queries(shared) * shared.length;
            if (queries(shared) > 0) reads += shared.length;
        }
        const double more = double(num_chunks) * grown(batch);
        products = costs_.body[before_.back()];
        attention = {double(pairs) + more, double(reads) + more};
    }

    // How many tokens of each chunk are the first half's: `taken_`.
    void first_half(const Batch& batch) {
        const Int num_chunks = Int(batch.chunks.size());
        taken_.assign(num_chunks, 0);
        if (batch.is_decode_only()) {
            std::fill(taken_.begin(), taken_.begin() + num_chunks / 2, 1);
            return;
        }
        Int of_prompts = 0;
        for (const Chunk& chunk : batch.chunks)
            if (!is_decode(chunk)) of_prompts += chunk.count;
        Int left = (of_prompts + 1) / 2;
        for (Int i = 0; i < num_chunks; i++) {
            if (is_decode(batch.chunks[i])) continue;
            taken_[i] = std::min(batch.chunks[i].count, left);
            left -= taken_[i];
        }
        take_decodes(batch);
    }

    // One token of a sequence, of which there were some before, so all above it is there.
    static bool is_decode(const Chunk& chunk) {
        return chunk.samples && chunk.count == 1 && chunk.offset > 0;
    }

    // In front of the middle there are as many of the tokens as there are of the reads behind it.
    void take_decodes(const Batch& batch) {
        double all_reads = 0;
        reads_.resize(batch.chunks.size());
        for (size_t i = 0; i < reads_.size(); i++)
            reads_[i] = double(batch.chunks[i].offset + batch.chunks[i].count);
        for (const SharedRead& shared : batch.shared) reads_[shared.begin] += double(shared.length);
        for (double reads : reads_) all_reads += reads;
        double before = 0;
        for (const bool decodes : {false, true})
            for (size_t i = 0; i < batch.chunks.size(); i++) {
                const Chunk& chunk = batch.chunks[i];
                if (is_decode(chunk) != decodes) continue;
                const double taken = decodes ? 1 : double(taken_[i]);
                double share = taken / double(batch.num_tokens);
                share += taken / double(chunk.count) * reads_[i] / all_reads;
                before += share;
                if (decodes) taken_[i] = before <= 1.0;
            }
    }

    const SimulatedCosts& costs_;
    Ints before_, taken_;
    std::vector<double> reads_;
};

}  // namespace simulator
