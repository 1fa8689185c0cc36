// One step's work, without tokens and blocks: scheduler/batch.py and scheduler/assemble.py.
#pragma once

#include "state.h"

namespace simulator {

struct Chunk {
    Int segment, count, offset;
    bool samples;
};

// A segment that the chunks in [begin, end) read.
struct SharedRead {
    Int begin, end, length;
};

struct Batch {
    // `work`: what is computed beside the decodes, in any order; `nodes` above all that run.
    void assemble(const Segments& state, const Ints& nodes, std::vector<Chunk>& work) {
        const auto earlier = [](const Chunk& a, const Chunk& b) { return a.segment < b.segment; };
        num_decodes = Int(chunks.size());
        num_steps = 1;
        std::sort(work.begin(), work.end(), earlier);
        chunks.insert(chunks.end(), work.begin(), work.end());
        std::inplace_merge(chunks.begin(), chunks.begin() + num_decodes, chunks.end(), earlier);
        shared.clear();
        auto begin = chunks.begin();
        for (Int node : nodes) {
            while (begin != chunks.end() && begin->segment <= node) begin++;
            const Chunk behind{state.fixed.subtree_end[node], 0, 0, false};
            const auto end = std::lower_bound(begin, chunks.end(), behind, earlier);
            if (end > begin)
                shared.push_back(
                    {begin - chunks.begin(), end - chunks.begin(), state.length(node)});
        }
        num_tokens = num_samples = num_decodes;
        for (const Chunk& chunk : work) {
            num_tokens += chunk.count;
            num_samples += chunk.samples;
        }
    }

    // One token of each sequence, all of which sample.
    bool is_decode_only() const {
        return num_samples == Int(chunks.size()) && num_tokens == num_samples;
    }

    std::vector<Chunk> chunks;  // by segment; before `assemble` the decodes alone
    std::vector<SharedRead> shared;
    Int num_decodes = 0, num_tokens = 0, num_samples = 0, num_steps = 1;
};

}  // namespace simulator
