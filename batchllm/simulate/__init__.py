"""What a run costs on a machine, without running it: cost model, bound, simulator."""
