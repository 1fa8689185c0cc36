"""A batch in two nano-batches (NanoFlow, arXiv 2408.12757), to be computed side by side."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchllm.scheduler.batch import Batch, Carried, Chunks, SharedReads

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NanoBatch:
    """Some of a batch's work, as a batch of its own; `sample` are its samples in the whole one."""

    batch: Batch
    sample: Ints


def split_batch(batch: Batch) -> tuple[NanoBatch, NanoBatch]:
    """Halve a batch of two tokens or more, decodes and prompts each.

    In every layer the first half must write its KV before the second reads any: it may need it. The
    first needs nothing of the second's. Segments that both read are read by each.
    """
    return _split(batch, first_half(batch))


def split_rows(batch: Batch, first: int) -> tuple[NanoBatch, NanoBatch]:
    """The first chunks of a batch in which none needs another, and the rest; neither is empty."""
    count = batch.chunks.count
    return _split(batch, np.where(np.arange(len(count)) < first, count, 0))


def first_half(batch: Batch) -> Ints:
    """How many tokens of each chunk are the first half's, [num_chunks].

    Attention of one half is to run beside products of the other. They fit each other best where the
    first half's share of the tokens is as large as the second's of the KV that is read.
    """
    chunks = batch.chunks
    taken: Ints
    if batch.is_decode_only:
        taken = (np.arange(len(chunks)) < len(chunks) // 2).astype(np.int64)
        return taken
    decode = _decodes(batch)
    count = np.where(decode, 0, chunks.count)
    end = count.cumsum()
    half_of_prompts = (int(end[-1]) + 1) // 2
    taken = np.clip(half_of_prompts - (end - count), 0, count)
    taken[decode] = _middle(batch, decode, taken)
    return taken


def _decodes(batch: Batch) -> NDArray[np.bool_]:
    """Chunks that need nothing and are needed by nobody in this step, [num_chunks].

    One token of a sequence, of which there were some before, so all above it is there.
    """
    chunks = batch.chunks
    sampled = np.zeros(len(chunks), dtype=np.bool_)
    sampled[batch.samples.chunk] = True
    decodes: NDArray[np.bool_] = sampled & (chunks.count == 1) & (chunks.offset > 0)
    return decodes


def _middle(batch: Batch, decode: NDArray[np.bool_], taken: Ints) -> Ints:
    """Which decodes are the first half's, beside `taken` tokens of each other chunk: 1s, then 0s.

    In front of the middle there are as many of the tokens as there are of the reads behind it.
    """
    chunks, shared = batch.chunks, batch.shared
    reads = chunks.offset + chunks.count
    if len(shared):
        reads = reads + np.bincount(shared.chunk_begin, shared.length, len(chunks))
    shares = np.where(decode, 1, taken) / chunks.count.sum()
    shares += np.where(decode, 1, taken / chunks.count) * reads / reads.sum()
    # One after the other, as the compiled simulator adds them, so that both round alike.
    before = np.concatenate([shares[~decode], shares[decode]]).cumsum()
    first: Ints = (before[len(shares) - int(decode.sum()) :] <= 1.0).astype(np.int64)
    return first


def _split(batch: Batch, taken: Ints) -> tuple[NanoBatch, NanoBatch]:
    return _part(batch, taken * 0, taken), _part(batch, taken, batch.chunks.count)


def _part(batch: Batch, begin: Ints, end: Ints) -> NanoBatch:
    """Tokens [begin, end) of each chunk; both [num_chunks]."""
    chunks, shared, samples, tables = batch.chunks, batch.shared, batch.samples, batch.tables
    here = (end > begin).nonzero()[0]
    skipped, count = begin[here], (end - begin)[here]
    chunk_begin, chunk_end = (
        here.searchsorted(at) for at in (shared.chunk_begin, shared.chunk_end)
    )
    read = chunk_end > chunk_begin
    sample = (end > begin)[samples.chunk] & (end == chunks.count)[samples.chunk]
    where = sample.nonzero()[0]
    token = _positions(chunks.count.cumsum()[here] - chunks.count[here] + skipped, count)
    carried = batch.carried
    place = token.searchsorted(carried.token)
    is_here = np.append(token, -1)[place] == carried.token
    if len(tables):
        tables = tables[np.concatenate([here, len(chunks) + read.nonzero()[0]])]
    part = Batch(
        token_ids=batch.token_ids[token] if len(batch.token_ids) else batch.token_ids,
        chunks=Chunks(count, chunks.start[here] + skipped, chunks.offset[here] + skipped),
        shared=SharedReads(
            chunk_begin[read], chunk_end[read], shared.start[read], shared.length[read]
        ),
        tables=tables,
        samples=replace(samples.take(where), chunk=here.searchsorted(samples.chunk[where])),
        num_decodes=len(here) if batch.is_decode_only else int(_decodes(batch)[here].sum()),
        num_steps=batch.num_steps,
        carried=Carried(place[is_here], carried.sample[is_here]),
    )
    return NanoBatch(part, where)


def _positions(begin: Ints, count: Ints) -> Ints:
    """All of [begin[i], begin[i] + count[i]), one behind the other."""
    ends = count.cumsum()
    within: Ints = np.arange(int(ends[-1]) if len(ends) else 0)
    return within + np.repeat(begin - (ends - count), count)
