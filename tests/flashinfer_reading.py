"""FlashInfer's documentation, read plainly: its calls on a CPU, in float64, one entry at a time.

What is written there (0.6.4 and 0.6.18): shapes and int32, `qo_indptr` and `kv_indptr` from 0 on
without a gap, `1 <= last_page_len <= page_size`, pages [num_pages, page_size, num_kv_heads,
head_dim] of keys and of values, the causal mask with its diagonal at the end, log-sum-exp to base
2. What is not, or was found in the sources only, is made as bad as can be: an entry without pages
puts NaNs where its queries are, and memory that an entry does not name is never read.
"""

import math

import torch

__version__ = "0.6.4"


class _Wrapper:
    """`buffers` are qo_indptr, kv_indptr, kv_indices and last_page_len where calls are recorded.

    Then there are as many entries as they have room for every time, and `run` reads them alone.
    """

    def __init__(self, float_workspace_buffer, kv_layout, buffers=None):
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8
        self._buffers = buffers
        self.calls = 0

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8

    def _read(self, qo_indptr, kv_indptr, kv_indices, last_page_len, heads, page_size, dtypes):
        arrays = qo_indptr, kv_indptr, kv_indices, last_page_len
        for array in arrays:
            assert array.dtype == torch.int32 and array.dim() == 1 and array.is_contiguous()
        count = len(last_page_len)
        assert count and len(qo_indptr) == len(kv_indptr) == count + 1
        num_pages = kv_indptr.diff()
        assert qo_indptr[0] == kv_indptr[0] == 0 and kv_indptr[-1] == len(kv_indices)
        assert (qo_indptr.diff() >= 0).all() and (num_pages >= 0).all()
        some = num_pages > 0
        assert ((last_page_len >= 1) & (last_page_len <= page_size))[some].all()
        assert (last_page_len == 0)[~some].all()
        num_heads, num_kv_heads, _ = heads
        assert num_heads % num_kv_heads == 0
        if self._buffers is not None:
            for buffer, array in zip(self._buffers, arrays, strict=True):
                assert len(array) == len(buffer) or (
                    array is kv_indices and len(array) < len(buffer)
                )
                buffer[: len(array)] = array
            arrays = self._buffers
            unchanging = heads, page_size, dtypes, int(qo_indptr[-1])
            assert getattr(self, "_unchanging", unchanging) == unchanging
            self._unchanging = unchanging
        else:
            assert (qo_indptr.diff() > 0).all()
        self._plan = *arrays, heads, page_size
        self._dtypes = dtypes

    def _run(self, q, pages, out, lse, return_lse, causal):
        qo_indptr, kv_indptr, kv_indices, last_page_len, heads, page_size = self._plan
        num_heads, num_kv_heads, head_dim = heads
        assert q.shape == (int(qo_indptr[-1]), num_heads, head_dim) and q.stride(-1) == 1
        assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
        assert (q.dtype, pages[0].dtype) == self._dtypes
        assert all(c.shape[1:] == (page_size, num_kv_heads, head_dim) for c in pages)
        assert pages[0].stride() == pages[1].stride()
        if return_lse:
            assert lse.shape == q.shape[:2] and lse.dtype == torch.float32 and lse.is_contiguous()
        for i in range(len(last_page_len)):
            begin, end = qo_indptr[i : i + 2].tolist()
            first, last = kv_indptr[i : i + 2].tolist()
            length = max(last - first - 1, 0) * page_size + int(last_page_len[i])
            if length == 0:
                out[begin:end] = torch.nan
                if return_lse:
                    lse[begin:end] = torch.nan
                continue
            key, value = (
                c[kv_indices[first:last].long()].flatten(0, 1)[:length].double() for c in pages
            )
            result, sums = attend(q[begin:end].double(), key, value, causal)
            out[begin:end] = result.to(out.dtype)
            if return_lse:
                lse[begin:end] = (sums / math.log(2)).float()
        self.calls += 1


def attend(q, key, value, causal):
    """Output [n, heads, d] and log-sum-exp [n, heads] of queries over [length, kv_heads, d]."""
    n, length, num_kv_heads = len(q), len(key), key.shape[1]
    grouped = q.view(n, num_kv_heads, -1, q.shape[-1])
    scores = torch.einsum("nhgd,lhd->nhgl", grouped, key) / math.sqrt(q.shape[-1])
    if causal:
        assert length >= n, "queries that see nothing"
        seen = torch.arange(length) <= torch.arange(n)[:, None] + length - n
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    out = torch.einsum("nhgl,lhd->nhgd", scores.softmax(-1), value)
    return out.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        *,
        backend="auto",
    ):
        assert backend in ("auto", "fa2", "fa3")
        buffers = (
            qo_indptr_buf,
            paged_kv_indptr_buf,
            paged_kv_indices_buf,
            paged_kv_last_page_len_buf,
        )
        super().__init__(float_workspace_buffer, kv_layout, buffers if use_cuda_graph else None)

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal=False,
        q_data_type="float16",
        kv_data_type=None,
    ):
        self._causal = causal
        heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._read(*arrays, heads, page_size, (q_data_type, kv_data_type))

    def run(self, q, paged_kv_cache, *, out, lse=None, return_lse=False):
        self._run(q, paged_kv_cache, out, lse, return_lse, self._causal)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
    ):
        buffers = None
        if use_cuda_graph:
            ends = torch.arange(len(paged_kv_indptr_buffer), dtype=torch.int32)
            pages = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
            buffers = (ends, *pages)
        super().__init__(float_workspace_buffer, kv_layout, buffers)
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        q_data_type="float16",
        kv_data_type=None,
    ):
        group = num_qo_heads // num_kv_heads
        assert self.use_tensor_cores or group in (1, 2, 3, 4, 8), "no such kernel"
        assert (indptr.diff() > 0).all(), "decodes see something"
        qo_indptr = torch.arange(len(indptr), dtype=torch.int32)
        heads = (num_qo_heads, num_kv_heads, head_dim)
        arrays = (qo_indptr, indptr, indices, last_page_len)
        self._read(*arrays, heads, page_size, (q_data_type, kv_data_type))

    def run(self, q, paged_kv_cache, *, out, lse=None, return_lse=False):
        self._run(q, paged_kv_cache, out, lse, return_lse, causal=False)


def merge_state_in_place(v, s, v_other, s_other, mask=None):
    assert v.shape == v_other.shape and s.shape == s_other.shape == v.shape[:2]
    assert all(t.is_contiguous() for t in (v, s, v_other, s_other))
    assert s.dtype == s_other.dtype == torch.float32
    rows = slice(None)
    if mask is not None:
        assert mask.dtype == torch.bool and mask.shape == v.shape[:1]
        rows = mask
    sums = torch.stack([s[rows], s_other[rows]]).double()
    total = torch.logsumexp(sums * math.log(2), dim=0) / math.log(2)
    weights = torch.exp2(sums - total)[..., None]
    merged = weights[0] * v[rows].double() + weights[1] * v_other[rows].double()
    v[rows], s[rows] = merged.to(v.dtype), total.float()


def apply_rope_with_cos_sin_cache_inplace(
    positions, query, key, head_size, cos_sin_cache, is_neox=True
):
    assert is_neox and cos_sin_cache.dtype == torch.float32 and positions.dtype == torch.int32
    assert cos_sin_cache.is_contiguous() and positions.is_contiguous()
    cos, sin = cos_sin_cache[positions.long()][:, None].chunk(2, dim=-1)
    for states in (query, key):
        heads = states.view(len(states), -1, head_size)
        left, right = heads.float().chunk(2, dim=-1)
        heads.copy_(torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1))


def append_paged_kv_cache(
    append_key,
    append_value,
    batch_indices,
    positions,
    paged_kv_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
    kv_layout="NHD",
):
    assert kv_layout == "NHD"
    for array in (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len):
        assert array.dtype == torch.int32 and array.dim() == 1 and array.is_contiguous()
    assert len(append_key) == len(append_value) == len(batch_indices) == len(positions)
    page_size = paged_kv_cache[0].shape[1]
    sequence, first = batch_indices.long(), kv_indptr[:-1].long()
    length = (kv_indptr.diff() - 1) * page_size + kv_last_page_len
    assert ((positions >= 0) & (positions < length[sequence])).all()
    page = kv_indices[first[sequence] + positions // page_size].long()
    for cache, states in zip(paged_kv_cache, (append_key, append_value), strict=True):
        cache[page, (positions % page_size).long()] = states


def rmsnorm(x, weight, eps=1e-6):
    assert x.dtype in (torch.bfloat16, torch.float16) and len(x) > 0
    return _normed(x.float(), weight, eps).to(x.dtype)


def fused_add_rmsnorm(delta, residual, weight, eps=1e-6):
    assert delta.dtype in (torch.bfloat16, torch.float16) and len(delta) > 0
    total = delta.float() + residual.float()
    residual.copy_(total)
    delta.copy_(_normed(total, weight, eps))


def _normed(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()


def silu_and_mul(gate_up):
    assert gate_up.dtype in (torch.bfloat16, torch.float16) and len(gate_up) > 0
    assert gate_up.shape[-1] * gate_up.dtype.itemsize % 16 == 0
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def top_k_renorm_probs(probs, top_k):
    assert probs.dtype == torch.float32 and probs.is_contiguous() and not probs.isnan().any()
    assert top_k.shape == probs.shape[:1] and (top_k > 0).all()
    ranked = probs.sort(dim=-1, descending=True).values
    least = ranked.gather(-1, top_k.long().clamp(max=probs.shape[-1])[:, None] - 1)
    return _renorm(probs, least)


def top_p_renorm_probs(probs, top_p, is_deterministic=False):
    """Later versions have the last argument; see `top_p_renorm_probs_of_0_6_4`."""
    assert is_deterministic
    return top_p_renorm_probs_of_0_6_4(probs, top_p)


def top_p_renorm_probs_of_0_6_4(probs, top_p):
    assert probs.dtype == torch.float32 and probs.is_contiguous() and not probs.isnan().any()
    assert top_p.shape == probs.shape[:1] and ((top_p > 0) & (top_p < 1)).all()
    ranked = probs.sort(dim=-1, descending=True).values
    kept = (ranked.cumsum(-1) - ranked < top_p[:, None]).sum(-1, keepdim=True)
    return _renorm(probs, ranked.gather(-1, kept - 1))


def _renorm(probs, least):
    kept = probs.where(probs >= least, 0)
    return kept / kept.sum(-1, keepdim=True)
