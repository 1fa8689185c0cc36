from functools import partial

import pytest

from batchllm.config import EngineConfig, parse_size
from batchllm.errors import UsageError
from batchllm.metrics import Metrics
from batchllm.native.kernels import usable_targets
from batchllm.request import SamplingParams
from batchllm.runner import choose_device
from batchllm.runner.dtype import choose_dtype, has_fast_bfloat16, has_kernels


def test_an_unknown_option_names_the_nearest_known():
    with pytest.raises(UsageError, match="did you mean 'kv_memory'"):
        EngineConfig.from_options(kv_memroy=1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("512M", 512 << 20), ("4GiB", 4 << 30), ("1.5g", 3 << 29), ("2 kb", 2048)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "4 potatoes", "-1G", "1e9"])
def test_not_a_size(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
    ],
)
def test_sampling_params_out_of_range(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "values",
    [
        *({"dtype": "float64"}, {"block_size": 0}, {"kv_memory": 0}, {"max_model_len": -1}),
        *({"threads": 0}, {"device": "tpu"}, {"max_num_seqs": 0}),
    ],
)
def test_engine_config_out_of_range(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        EngineConfig(**values)


def test_a_step_is_as_large_as_suits_the_device_unless_told():
    small, large = (EngineConfig().step_limits(device) for device in ("cpu", "cuda"))
    assert small.max_num_batched_tokens < large.max_num_batched_tokens
    assert small.max_num_seqs < large.max_num_seqs
    told = EngineConfig(max_num_seqs=3, max_num_batched_tokens=5).step_limits("cuda")
    assert (told.max_num_seqs, told.max_num_batched_tokens) == (3, 5)


def chosen(stored, **options):
    return choose_dtype(EngineConfig(device="cpu", **options), stored)


def test_auto_dtype_follows_weights_processor_and_kernels(monkeypatch):
    monkeypatch.setattr("batchllm.runner.dtype.has_fast_bfloat16", lambda: False)
    monkeypatch.setattr("batchllm.runner.dtype.has_kernels", lambda: True)
    assert chosen("bfloat16") == "bfloat16"
    assert chosen("float16", attention_backend="native") == "bfloat16"
    assert chosen("bfloat16", attention_backend="torch") == "float32"
    monkeypatch.setattr("batchllm.runner.dtype.has_kernels", lambda: False)
    assert chosen("bfloat16") == "float32"
    monkeypatch.setattr("batchllm.runner.dtype.has_fast_bfloat16", lambda: True)
    assert chosen("bfloat16", attention_backend="torch") == "bfloat16"
    assert chosen("float32") == "float32"
    assert chosen("float32", dtype="bfloat16") == "bfloat16"


def test_a_gpu_computes_in_bfloat16(monkeypatch):
    monkeypatch.setattr("batchllm.runner.dtype.choose_device", lambda asked: "cuda")
    assert chosen("float32") == "bfloat16"
    assert chosen("float32", dtype="float32") == "float32"


@pytest.mark.parametrize("torch_has", [False, True])
def test_auto_is_a_gpu_where_torch_can_use_one(tmp_path, monkeypatch, torch_has):
    asked = []
    monkeypatch.setattr(
        choose_device, "_torch_has_cuda", lambda: bool(asked.append(1)) or torch_has
    )
    driver = tmp_path / "driver"
    choose = partial(choose_device.choose_device, signs=(driver,))
    assert choose("auto") == choose("cpu") == "cpu"
    assert not asked, "torch was imported for nothing"
    driver.touch()
    assert (choose("auto"), choose("cpu")) == ("cuda" if torch_has else "cpu", "cpu")
    if torch_has:
        assert choose("cuda") == "cuda"
    else:
        with pytest.raises(UsageError, match="torch can use no GPU"):
            choose("cuda")


def test_processors_that_are_fast_in_bfloat16(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : sse avx2 fma\n")
    assert not has_fast_bfloat16(cpuinfo)
    assert has_kernels(cpuinfo) == ("avx2" in usable_targets(cpuinfo))
    cpuinfo.write_text("flags : sse\n")
    assert not has_kernels(cpuinfo)
    cpuinfo.write_text("flags : avx512f avx512_bf16\n")
    assert has_fast_bfloat16(cpuinfo)


def test_metrics_add_up_but_peaks_do_not():
    windows = [
        Metrics(rows=2, prompt_tokens=10, computed_prompt_tokens=5, peak_kv_blocks=7).as_dict(),
        Metrics(rows=3, prompt_tokens=10, computed_prompt_tokens=5, peak_kv_blocks=4).as_dict(),
    ]
    total = Metrics.total([*windows, {"unheard_of": 1}])
    assert (total.rows, total.peak_kv_blocks, total.saved_share) == (5, 7, 0.5)
