// Output lengths, learned: scheduler/lengths.py.
#pragma once

#include <cmath>

#include "state.h"

namespace simulator {

// Tokens that a row will sample still, and the deviation of that.
struct Expectation {
    Int tokens;
    double deviation;
};

class LengthEstimator {
   public:
    LengthEstimator() : recent_(WINDOW), sums_(WINDOW + 1), squares_(WINDOW + 1) {
        sorted_.reserve(WINDOW + 1);
    }

    void observe(Int num_outputs, Int max_tokens) {
        const double share = double(num_outputs) / double(max_tokens);
        double& place = recent_[count_ % WINDOW];
        if (count_ >= WINDOW)
            sorted_.erase(std::lower_bound(sorted_.begin(), sorted_.end(), place));
        place = share;
        count_++;
        sorted_.insert(std::upper_bound(sorted_.begin(), sorted_.end(), share), share);
        is_summed_ = false;
    }

    Expectation remaining(Int num_outputs, Int max_tokens, bool known) {
        const Int left = std::max(max_tokens - num_outputs, Int(1));
        if (known || count_ < ENOUGH) return {left, 0.0};
        if (!is_summed_) sum();
        const double share = double(num_outputs) / double(max_tokens);
        const Int place =
            std::upper_bound(sorted_.begin(), sorted_.end(), share) - sorted_.begin();
        const Int num_longer = Int(sorted_.size()) - place;
        const double longer = double(std::max(num_longer, Int(1)));
        const double mean = sums_[place] / longer;
        const double deviation = std::sqrt(std::max(squares_[place] / longer - mean * mean, 0.0));
        Int total = Int(std::nearbyint((mean + MARGIN * deviation) * double(max_tokens)));
        if (num_longer == 0) total = 2 * num_outputs;
        const Int tokens = std::min(std::max(total - num_outputs, Int(1)), left);
        return {tokens, deviation * double(max_tokens)};
    }

   private:
    static constexpr Int WINDOW = 2048, ENOUGH = 16;
    static constexpr double MARGIN = 0.25;

    // Of each share and all longer ones, the longest first.
    void sum() {
        double sums = 0, squares = 0;
        sums_[sorted_.size()] = squares_[sorted_.size()] = 0;
        for (size_t i = sorted_.size(); i-- > 0;) {
            sums_[i] = sums += sorted_[i];
            squares_[i] = squares += sorted_[i] * sorted_[i];
        }
        is_summed_ = true;
    }

    std::vector<double> recent_, sorted_, sums_, squares_;
    Int count_ = 0;
    bool is_summed_ = false;
};

}  // namespace simulator
