"""What is loaded and what it runs on, in words."""

from typing import TYPE_CHECKING

from batchllm.models.dummy_checkpoint import DummyCheckpoint

if TYPE_CHECKING:
    from batchllm.api import LLM


def loaded_text(llm: "LLM") -> str:
    """What is loaded and what it runs on, in a line; each warning is a line of its own."""
    loaded = llm.loaded
    kind = " ".join([llm.dtype, *filter(None, [llm.config.quantization])])
    line = (
        f"{llm.checkpoint.path.name} in {kind} (loaded in {llm.load_seconds:.1f}s), "
        f"{loaded.hardware or llm.threads}{_processes(llm)}, "
        f"{llm.kv_memory / 2**30:,.2f} GiB KV memory = {llm.num_kv_tokens:,} tokens, "
        f"attention {llm.attention}{' beside products' if loaded.overlap else ''}"
    )
    warnings = [
        isinstance(llm.checkpoint, DummyCheckpoint) and llm.checkpoint.about,
        llm.threads.warning,
        loaded.slower and f"much slower than need be: {loaded.slower}",
        llm.num_kv_blocks < loaded.wanted_blocks
        and f"the system gave {llm.num_kv_blocks / loaded.wanted_blocks:.0%} of what was to "
        "be KV memory; a limit may be set for the process (ulimit -v)",
    ]
    return "\n".join([line, *(f"warning: {warning}" for warning in warnings if warning)])


def _processes(llm: "LLM") -> str:
    """In which processes the model runs, if not in this one alone."""
    replicas, size = llm.config.data_parallel_size, llm.config.tensor_parallel_size
    text = f" in {replicas} replicas" if replicas > 1 else ""
    if size > 1:
        text += f" in {size} processes{' each' if text else ''}"
    return text
