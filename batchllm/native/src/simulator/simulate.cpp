// The scheduler once more, compiled, for runs that only cost time: `auto` asks for a dozen of them
// before a window begins, and each is thousands of steps.
//
// It makes the very steps that scheduler/scheduler.py makes and costs them as simulate/cost.py does;
// a test compares what both say of random windows. Where the Python has operations on arrays here are
// loops; names are the same, and each file says whose twin it is: whoever changes one changes the
// other. Nothing is here that a simulation has no use for: tokens, blocks by name, results that come
// late.
#include "simulate.h"

#include "cost.h"
#include "scheduler.h"

extern "C" int32_t batchllm_simulate(
    const SimulatedWindow* window, const SimulatedLimits* limits, const SimulatedCosts* costs,
    SimulatedResult* result) try {
    simulator::Scheduler scheduler(*window, *limits);
    simulator::CostModel model(*costs);
    simulator::Batch batch;
    *result = {};
    while (scheduler.has_unfinished()) {
        scheduler.schedule(batch);
        model.add(batch, *result);
        scheduler.update(batch);
        result->output_tokens += batch.num_samples * batch.num_steps;
    }
    result->steps = scheduler.steps;
    result->computed_prompt_tokens = scheduler.computed_prompt_tokens;
    result->recomputed_tokens = scheduler.recomputed_tokens;
    result->preemptions = scheduler.preemptions;
    result->failed = scheduler.failed;
    result->peak_kv_blocks = scheduler.peak_used();
    return 0;
} catch (const simulator::Broken&) {
    return 1;
}
