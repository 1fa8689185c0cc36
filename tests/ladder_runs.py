"""Made-up runs of the bench ladder."""

from yardstick import load_ladder

contract = load_ladder("bench_engines.contract")
results = load_ladder("bench_engines.results")


def run(workload, engine, seconds, *, number=1, order="shuffled", load=1.0, shared=True, **other):
    """One run; T_opt is 2 s, and all workloads have one size."""
    report = contract.EngineReport(
        engine=engine,
        order=order,
        load_seconds=load,
        engine_seconds=seconds,
        rows=10,
        prompt_tokens=900,
        output_tokens=100,
        settings=other,
    )
    return results.Run(
        workload=workload,
        in_shared_mean=shared,
        round=number,
        report=report,
        distinct_tokens=300,
        bound_overlap=2.0,
        bound_total=3.0,
        flops=4e11,
        int8_flops=8e11,
        bandwidth=4e10,
    )
