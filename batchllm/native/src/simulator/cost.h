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
        double apart = costs_.step + costs_.token * double(batch.num_tokens);
        apart += costs_.sample * double(batch.num_samples);
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
        result.overhead_seconds += num_steps * apart;
        result.hidden_seconds += num_steps * hidden;
    }

   private:
    // Pairs of query and key, and tokens read.
    struct Reads {
        double pairs, reads;
    };

    double attention(const Batch& batch) {
        // In each next step every decode has a token more to read; with several, all are decodes.
        const double grown = double(batch.num_steps - 1) / 2;
        Int pairs = 0, decode_reads = 0, reads = 0, num_segments = Int(batch.shared.size());
        double one_by_one = 0;
        for (const Chunk& chunk : batch.chunks) {
            const Int all = chunk.offset + chunk.count;
            reads += all;
            if (chunk.count == 1) {
                decode_reads += all;
                one_by_one += costs_.read * (double(all) + grown);
            } else {
                // A chunk's own tokens see half of each other, and all of what was there before.
                pairs += chunk.count * chunk.offset + triangle(chunk.count);
                num_segments++;
                one_by_one += slower(own_pairs(chunk), double(all));
            }
        }
        count_before(batch);
        for (const SharedRead& shared : batch.shared) {
            const Int queries = before_[shared.end] - before_[shared.begin];
            pairs += queries * shared.length;
            reads += shared.length;
            one_by_one += slower(double(queries * shared.length), double(shared.length));
        }
        const double segments = costs_.segment * double(num_segments);
        if (!costs_.one_attention_launch) return segments + one_by_one;
        const double all = grown * double(batch.chunks.size());
        return segments + slower(double(pairs + decode_reads) + all, double(reads) + all);
    }

    static Int triangle(Int count) { return (count * count + count) / 2; }

    static double own_pairs(const Chunk& chunk) {
        return double(chunk.count * chunk.offset + triangle(chunk.count));
    }

    // The slower of arithmetic and reading hides the other.
    double slower(double pairs, double reads) const {
        return std::max(costs_.pair * pairs, costs_.read * reads);
    }

    // Tokens before each chunk.
    void count_before(const Batch& batch) {
        before_.assign(1, 0);
        for (const Chunk& chunk : batch.chunks) before_.push_back(before_.back() + chunk.count);
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
        const double apart = products[0] + products[1] +
                             (slower(attention[0].pairs, attention[0].reads) +
                              slower(attention[1].pairs, attention[1].reads));
        const double together =
            beside(products[0], attention[1]) + beside(products[1], attention[0]);
        // Nothing is beside the first products and the last attention: about a layer's.
        return together + (apart - together) / double(costs_.num_layers);
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
        before_.assign(1, 0);
        for (size_t i = 0; i < batch.chunks.size(); i++) {
            const Chunk& chunk = batch.chunks[i];
            const Int count = half == 0 ? taken_[i] : chunk.count - taken_[i];
            const Int offset = half == 0 ? chunk.offset : chunk.offset + taken_[i];
            before_.push_back(before_.back() + count);
            if (count == 0) continue;
            pairs += count * offset + triangle(count);
            reads += offset + count;
            num_chunks++;
        }
        for (const SharedRead& shared : batch.shared) {
            const Int queries = before_[shared.end] - before_[shared.begin];
            pairs += queries * shared.length;
            if (queries > 0) reads += shared.length;
        }
        const double grown = double(num_chunks) * double(batch.num_steps - 1) / 2;
        products = costs_.body[before_.back()];
        attention = {double(pairs) + grown, double(reads) + grown};
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
        reads_.clear();
        for (const Chunk& chunk : batch.chunks) reads_.push_back(double(chunk.offset + chunk.count));
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
