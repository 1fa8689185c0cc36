// A window's run under the scheduler, with costs in the model's place. The fields' order is that of
// simulate/compiled.py.
#pragma once

#include <cstdint>

extern "C" {

// A window's segments, nodes and leaves in depth-first order, as in scheduler/state.py. All but the
// last three are [num_segments]; `of_leaf` and `ends` (after how many tokens each leaf's answer
// ends, >= 1) are [num_leaves], `order` the leaves' segments as they are to be admitted, the same.
struct SimulatedWindow {
    int64_t num_segments;
    int64_t num_leaves;
    const int64_t* parent;
    const int64_t* subtree_end;
    const int64_t* length;
    const int64_t* leaf;
    const int64_t* max_tokens;
    const uint8_t* ignore_eos;
    const int64_t* of_leaf;
    const int64_t* order;
    const int64_t* ends;
};

// What a scheduler may use, as in scheduler/factory.py.
struct SimulatedLimits {
    int64_t num_blocks;
    int64_t block_size;
    int64_t step_tokens;
    int64_t max_num_seqs;
};

// What steps cost, in seconds, as in simulate/cost.py. `body` and `head` are of products of 0, 1, 2,
// ... rows, as many as a step may have tokens.
struct SimulatedCosts {
    double step;
    double token;
    double sample;
    double segment;
    double pair;
    double read;
    double weights;
    double overlap_share;
    double overlap_speed;
    double least_hidden;
    int64_t num_layers;
    int64_t one_attention_launch;
    const double* body;
    const double* head;
};

// What the run came to, as in simulate/simulator.py.
struct SimulatedResult {
    double gemm_seconds;
    double head_seconds;
    double attention_seconds;
    double overhead_seconds;
    double hidden_seconds;
    int64_t steps;
    int64_t computed_prompt_tokens;
    int64_t recomputed_tokens;
    int64_t output_tokens;
    int64_t preemptions;
    int64_t failed;
    int64_t peak_kv_blocks;
};

// Runs the window to its end; returns 0, or 1 where the scheduler broke a rule of its own.
int32_t batchllm_simulate(
    const SimulatedWindow* window, const SimulatedLimits* limits, const SimulatedCosts* costs,
    SimulatedResult* result);

}
