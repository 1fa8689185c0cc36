// Attention of all queries of a step over the prefix tree, in one launch.
//
// A block takes one unit after the other (step.h): a tile of queries, with the heads of a group as
// further rows, against a piece of a context. What shared segments are read together by many rows,
// what private ones by few, and where a long one is cut in pieces is planned on the host; here a
// shared segment, a row's own tokens and a prefill chunk are the same thing.
//
// Keys and values come 64 tokens at a time (kv_tiles.h); the scales of int8 are multiplied with
// scores and weights. A large unit has up to 64 rows, 16 to a warp, and each warp multiplies them
// with all 64 keys. A small one has 16 rows, which all four warps share, each with 16 of the keys;
// their results are joined at the end. Softmax is online, in base 2 (FlashAttention-2, arXiv 2307.08691); sums are float32.
#pragma once

#include "kv_tiles.h"

namespace batchllm {

// One block's work on one unit.
template <int HeadDim, KvType Type>
class UnitAttention {
    using Layout = AttentionLayout<HeadDim, Type>;
    static constexpr int kDepths = HeadDim / 16;  // of a product with a row of a head
    static constexpr int kOutTiles = HeadDim / 8;

public:
    BATCHLLM_DEVICE UnitAttention(
        const AttentionStep& step, const AttentionLayer& layer, const Unit& unit, int kv_head
    )
        : step_(step), layer_(layer), unit_(unit), kv_head_(kv_head),
          group_(step.num_heads / step.num_kv_heads), num_rows_(unit.num_queries * group_),
          thread_(thread_index()), warp_(thread_ / kWarpSize), lane_(thread_ % kWarpSize),
          tiles_(step, layer, unit, kv_head) {}

    // All threads have met since another unit's memory was read.
    BATCHLLM_DEVICE void run() {
        const int first_row = unit_.is_small ? 0 : warp_ * kWarpRows;
        load_queries(first_row);
        for (int i = 0; i < 2; ++i) {
            row_[i] = first_row + lane_ / 4 + 8 * i;
            const int query = row_[i] / group_;
            limit_[i] = min(unit_.key_end, unit_.visible + query * unit_.causal);
        }
        tiles_.start();
        for (int tile = 0; tile < tiles_.count(); ++tile) {
            tiles_.next(tile);
            if (unit_.is_small) {
                attend<kTileKeys / kWarps>(tile, warp_ * (kTileKeys / kWarps));
            } else if (first_row < num_rows_) {
                attend<kTileKeys>(tile, 0);
            }
        }
        for (int i = 0; i < 2; ++i) {
            sum_[i] += shuffle_xor(sum_[i], 1);
            sum_[i] += shuffle_xor(sum_[i], 2);
        }
        if (unit_.is_small) {
            join_warps();
        } else {
            write_rows();
        }
    }

private:
    // The fragments of 16 rows for all depths (see load_matrices for where a lane's values lie).
    BATCHLLM_DEVICE void load_queries(int first_row) {
        const auto& qkv = layer_.qkv;
        const int width = step_.num_heads + 2 * step_.num_kv_heads;
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + lane_ / 4 + 8 * i;
            const bool is_there = row < num_rows_;
            const int64_t query = unit_.query + (is_there ? row / group_ : 0);
            const int head = kv_head_ * group_ + (is_there ? row % group_ : 0);
            const int64_t at = (query * width + head) * HeadDim + 2 * (lane_ % 4);
#pragma unroll
            for (int depth = 0; depth < kDepths; ++depth) {
                queries_[depth][i] = is_there ? load<uint32_t>(qkv, at + 16 * depth) : 0;
                queries_[depth][i + 2] = is_there ? load<uint32_t>(qkv, at + 16 * depth + 8) : 0;
            }
        }
    }

    // This warp's rows over `Keys` keys of a tile.
    template <int Keys>
    BATCHLLM_DEVICE void attend(int tile, int first_key) {
        float scores[Keys / 8][4] = {};
        const Shared<uint16_t> keys = tiles_.keys(tile, first_key);
        const int key_row = lane_ % 8 + lane_ / 16 * 8, key_column = lane_ / 8 % 2 * 8;
#pragma unroll
        for (int depth = 0; depth < kDepths; ++depth) {
#pragma unroll
            for (int pair = 0; pair < Keys / 16; ++pair) {
                uint32_t b[4];
                load_matrices(
                    b, keys + ((16 * pair + key_row) * Layout::kRow + 16 * depth + key_column)
                );
                multiply_add(scores[2 * pair], queries_[depth], b[0], b[1]);
                multiply_add(scores[2 * pair + 1], queries_[depth], b[2], b[3]);
            }
        }
        constexpr bool kHasScales = KvLayout<HeadDim, Type>::kHasScales;
        if constexpr (kHasScales) multiply(scores, tiles_.key_scales(tile, first_key));
        const int first = unit_.key_begin + tile * kTileKeys + first_key;
        if (first + Keys > min(unit_.visible, unit_.key_end)) hide(scores, first);
        uint32_t weights[Keys / 16][4];
        soften(scores);
        if constexpr (kHasScales) multiply(scores, tiles_.value_scales(tile, first_key));
#pragma unroll
        for (int i = 0; i < Keys / 4; ++i) {  // the fragments of a sum become those of a factor
            const float* const pair = &scores[i / 2][i % 2 * 2];
            weights[i / 4][i % 4] = pack_bfloat16(pair[0], pair[1]);
        }
        const Shared<uint16_t> values = tiles_.values(tile, first_key);
        const int value_row = lane_ % 16, value_column = lane_ / 16 * 8;
#pragma unroll
        for (int depth = 0; depth < Keys / 16; ++depth) {
#pragma unroll
            for (int pair = 0; pair < kOutTiles / 2; ++pair) {
                uint32_t b[4];
                load_matrices_transposed(
                    b, values + ((16 * depth + value_row) * Layout::kRow + 16 * pair + value_column)
                );
                multiply_add(out_[2 * pair], weights[depth], b[0], b[1]);
                multiply_add(out_[2 * pair + 1], weights[depth], b[2], b[3]);
            }
        }
    }

    // Keys from `first` on that a row does not see.
    template <int Tiles>
    BATCHLLM_DEVICE void hide(float (&scores)[Tiles][4], int first) {
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = first + 8 * tile + 2 * (lane_ % 4) + i % 2;
                if (key >= limit_[i / 2]) scores[tile][i] = kMinusInfinity;
            }
        }
    }

    // Each key's column times its scale.
    template <int Tiles>
    BATCHLLM_DEVICE void multiply(float (&scores)[Tiles][4], Shared<float> scales) const {
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[tile][i] *= scales[8 * tile + 2 * (lane_ % 4) + i % 2];
        }
    }

    // Scores to weights, and the state moved on.
    template <int Tiles>
    BATCHLLM_DEVICE void soften(float (&scores)[Tiles][4]) {
        const float scale = 1.44269504f / sqrtf(static_cast<float>(HeadDim));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = most_[i];
#pragma unroll
            for (int tile = 0; tile < Tiles; ++tile) {
                most = fmaxf(most, fmaxf(scores[tile][2 * i], scores[tile][2 * i + 1]));
            }
            most = fmaxf(most, shuffle_xor(most, 1));
            most = fmaxf(most, shuffle_xor(most, 2));
            const float base = most == kMinusInfinity ? 0.0f : most * scale;
            const float shrink = exp2_fast(most_[i] * scale - base);
            most_[i] = most;
            sum_[i] *= shrink;
#pragma unroll
            for (int tile = 0; tile < kOutTiles; ++tile) {
                out_[tile][2 * i] *= shrink;
                out_[tile][2 * i + 1] *= shrink;
            }
#pragma unroll
            for (int tile = 0; tile < Tiles; ++tile) {
                float* const pair = &scores[tile][2 * i];
                pair[0] = exp2_fast(pair[0] * scale - base);
                pair[1] = exp2_fast(pair[1] * scale - base);
                sum_[i] += pair[0] + pair[1];
            }
        }
    }

    BATCHLLM_DEVICE float log_sum(float most, float sum) const {
        const float scale = 1.44269504f / sqrtf(static_cast<float>(HeadDim));
        return most == kMinusInfinity ? kMinusInfinity : most * scale + log2_fast(sum);
    }

    BATCHLLM_DEVICE void write_rows() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (row_[i] >= num_rows_) continue;
            const float inverse = sum_[i] == 0 ? 0.0f : 1 / sum_[i];
#pragma unroll
            for (int tile = 0; tile < kOutTiles; ++tile) {
                write_two(
                    row_[i], 8 * tile + 2 * (lane_ % 4), out_[tile][2 * i] * inverse,
                    out_[tile][2 * i + 1] * inverse
                );
            }
            if (lane_ % 4 == 0) write_log_sum(row_[i], log_sum(most_[i], sum_[i]));
        }
    }

    // The four warps' states of the same rows become one, through shared memory.
    BATCHLLM_DEVICE void join_warps() {
        const Shared<float> outs = shared_memory<float>();
        const Shared<float> sums = outs + kWarps * kWarpRows * Layout::kJoinRow;
        barrier();  // nobody reads keys and values any more
        for (int i = 0; i < 2; ++i) {
            const int row = warp_ * kWarpRows + row_[i];
#pragma unroll
            for (int tile = 0; tile < kOutTiles; ++tile) {
                const int at = row * Layout::kJoinRow + 8 * tile + 2 * (lane_ % 4);
                outs[at] = out_[tile][2 * i];
                outs[at + 1] = out_[tile][2 * i + 1];
            }
            if (lane_ % 4 == 0) {
                sums[2 * row] = most_[i];
                sums[2 * row + 1] = sum_[i];
            }
        }
        barrier();
        constexpr int kThreadsARow = kThreads / kWarpRows;
        const int row = thread_ / kThreadsARow, part = thread_ % kThreadsARow;
        if (row >= num_rows_) return;
        const float scale = 1.44269504f / sqrtf(static_cast<float>(HeadDim));
        float most = kMinusInfinity, sum = 0, factors[kWarps];
        for (int warp = 0; warp < kWarps; ++warp) {
            most = fmaxf(most, sums[2 * (warp * kWarpRows + row)]);
        }
        const float base = most == kMinusInfinity ? 0.0f : most;
        for (int warp = 0; warp < kWarps; ++warp) {
            const int at = 2 * (warp * kWarpRows + row);
            factors[warp] = exp2_fast((sums[at] - base) * scale);
            sum += factors[warp] * sums[at + 1];
        }
        const float inverse = sum == 0 ? 0.0f : 1 / sum;
        for (int column = 2 * part; column < HeadDim; column += 2 * kThreadsARow) {
            float a = 0, b = 0;
            for (int warp = 0; warp < kWarps; ++warp) {
                const int at = (warp * kWarpRows + row) * Layout::kJoinRow + column;
                a += factors[warp] * outs[at];
                b += factors[warp] * outs[at + 1];
            }
            write_two(row, column, a * inverse, b * inverse);
        }
        if (part == 0) write_log_sum(row, log_sum(most, sum));
    }

    BATCHLLM_DEVICE void write_two(int row, int column, float a, float b) const {
        if (unit_.partial >= 0) {
            const int64_t at =
                (static_cast<int64_t>(unit_.partial) + row) * step_.num_kv_heads + kv_head_;
            store2(step_.partial_out, at * HeadDim + column, a, b);
        } else {
            const int64_t query = unit_.query + row / group_;
            const int64_t at = query * step_.num_heads + kv_head_ * group_ + row % group_;
            store<uint32_t>(layer_.out, at * HeadDim + column, pack_bfloat16(a, b));
        }
    }

    BATCHLLM_DEVICE void write_log_sum(int row, float value) const {
        if (unit_.partial < 0) return;
        step_.partial_lse[(static_cast<int64_t>(unit_.partial) + row) * step_.num_kv_heads +
                          kv_head_] = value;
    }

    const AttentionStep& step_;
    const AttentionLayer& layer_;
    const Unit unit_;
    const int kv_head_, group_, num_rows_, thread_, warp_, lane_;
    KvTiles<HeadDim, Type> tiles_;
    int row_[2], limit_[2];
    uint32_t queries_[kDepths][4];
    float out_[kOutTiles][4] = {};
    float most_[2] = {kMinusInfinity, kMinusInfinity};
    float sum_[2] = {0, 0};
};

// Blocks take units until there are none left; the dearest come first.
template <int HeadDim, KvType Type>
BATCHLLM_KERNEL(kThreads, 3)
attention_kernel(AttentionStep step, AttentionLayer layer) {
    using Layout = AttentionLayout<HeadDim, Type>;
    const Shared<int32_t> taken =
        (shared_memory<unsigned char>() + Layout::kTakenAt).template as<int32_t>();
    const int total = step.counts[1] * step.num_kv_heads;
    while (true) {
        barrier();  // all have read the number before
        if (thread_index() == 0) taken[0] = atomic_add(step.next_unit, 0, 1);
        barrier();
        const int next = taken[0];
        if (next >= total) return;
        const Unit unit = load_unit(step, next / step.num_kv_heads);
        UnitAttention<HeadDim, Type>(step, layer, unit, next % step.num_kv_heads).run();
    }
}

}  // namespace batchllm
