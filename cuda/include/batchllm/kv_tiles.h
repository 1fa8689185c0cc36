// A context's keys and values, 64 tokens after the other, from the cache to where they are multiplied.
//
// Tiles come through two buffers in shared memory: one is copied while the other is read. Those of
// eight bits are widened to bfloat16 there, which is exact.
#pragma once

#include "kv_types.h"

namespace batchllm {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTileKeys = 64;
constexpr int kWarpRows = 16;
constexpr int32_t kNowhere = -1;
constexpr float kMinusInfinity = -__builtin_inff();

// Shared memory, in bytes.
template <int HeadDim, KvType Type>
struct AttentionLayout {
    static constexpr bool kIsWide = Type == KvType::kBfloat16;
    static constexpr int kRow = HeadDim + 8;  // an odd number of 16-byte pieces: no bank conflicts
    static constexpr int kTile = 2 * kTileKeys * kRow;
    static constexpr int kCopiedRow = kIsWide ? 2 * kRow : HeadDim;  // bytes
    static constexpr int kCopied = kTileKeys * kCopiedRow;
    // Tiles as they are multiplied; as they are copied, two each of keys and values; slots; scales.
    static constexpr int kCopiedAt = kIsWide ? 0 : 2 * kTile;
    static constexpr int kStages = 3;  // tiles whose slots are known
    static constexpr int kSlotsAt = kCopiedAt + 4 * kCopied;
    static constexpr int kScalesAt = kSlotsAt + 4 * kStages * kTileKeys;
    static constexpr int kScales = 4 * kStages * kTileKeys;  // of keys; those of values follow
    static constexpr int kTakenAt = kScalesAt + (Type == KvType::kInt8 ? 2 * kScales : 0);
    static constexpr int kBytes = kTakenAt + 16;
    static constexpr int kJoinRow = HeadDim + 2;
    static_assert(HeadDim % 16 == 0 && kTileKeys * HeadDim / 16 % kThreads == 0);
    static_assert(4 * kWarps * kWarpRows * (kJoinRow + 2) <= kSlotsAt);
};

// All threads of a block go through a unit's tiles together.
template <int HeadDim, KvType Type>
class KvTiles {
    using Layout = AttentionLayout<HeadDim, Type>;
    using Cache = KvLayout<HeadDim, Type>;

public:
    BATCHLLM_DEVICE KvTiles(
        const AttentionStep& step, const AttentionLayer& layer, const Unit& unit, int kv_head
    )
        : step_(step), layer_(layer), cache_{step.num_kv_heads, step.block_shift},
          key_begin_(unit.key_begin), key_end_(unit.key_end), read_end_(unit.read_end),
          kv_head_(kv_head), thread_(thread_index()), memory_(shared_memory<unsigned char>()),
          slots_((memory_ + Layout::kSlotsAt).template as<int32_t>()),
          scales_((memory_ + Layout::kScalesAt).template as<float>()), read_(unit.read_begin) {}

    BATCHLLM_DEVICE int count() const {
        return (key_end_ - key_begin_ + kTileKeys - 1) / kTileKeys;
    }

    // The first tile is on its way.
    BATCHLLM_DEVICE void start() {
        find_slot(0);
        if (count() > 1) find_slot(1);
        barrier();
        fetch(0);
    }

    // Wait for a tile and send for the next; tiles are taken in order.
    BATCHLLM_DEVICE void next(int tile) {
        copy_async_wait<0>();
        barrier();  // this tile is there, and nobody reads the one before any more
        if (tile + 1 < count()) fetch(tile + 1);
        if (tile + 2 < count()) find_slot(tile + 2);
        if constexpr (!Layout::kIsWide) {
            widen_tile(tile);
            barrier();
        }
    }

    // Rows of the tile that came last, kRow values apart, and their scales, from its key `first` on.
    BATCHLLM_DEVICE Shared<uint16_t> keys(int tile, int first) const { return rows(0, tile, first); }
    BATCHLLM_DEVICE Shared<uint16_t> values(int tile, int first) const {
        return rows(1, tile, first);
    }
    BATCHLLM_DEVICE Shared<float> key_scales(int tile, int first) const {
        return scales_ + (tile % Layout::kStages * kTileKeys + first);
    }
    BATCHLLM_DEVICE Shared<float> value_scales(int tile, int first) const {
        return key_scales(tile, first) + Layout::kStages * kTileKeys;
    }

private:
    // Where a tile's keys lie in the cache, in pieces of 16 bytes, which for up to 64 GiB a layer
    // takes 32 bits; kNowhere behind the last one. Each of the first threads follows one key of
    // every tile, and so never goes back in the reads.
    BATCHLLM_DEVICE void find_slot(int tile) {
        if (thread_ >= kTileKeys) return;
        const int key = key_begin_ + tile * kTileKeys + thread_;
        const int at = tile % Layout::kStages * kTileKeys + thread_;
        const bool is_there = key < key_end_;
        int64_t block = 0;
        int place = 0;
        if (is_there) {
            while (read_ + 1 < read_end_ && key >= step_.read_key[read_ + 1]) ++read_;
            const int index = key - step_.read_key[read_];
            block = step_.block_ids[step_.read_block[read_] + (index >> step_.block_shift)];
            place = index & ((1 << step_.block_shift) - 1);
        }
        slots_[at] = is_there ? static_cast<int32_t>(cache_.row(block, place) / 16) : kNowhere;
        if constexpr (Cache::kHasScales) {  // they arrive with their tile
            const uint32_t from = static_cast<uint32_t>(cache_.scale(block, place) / 4) + kv_head_;
            const int to = Layout::kScalesAt + 4 * at;
            copy_async<4>(memory_ + to, layer_.keys, from, !is_there);
            copy_async<4>(memory_ + (to + Layout::kScales), layer_.values, from, !is_there);
        }
    }

    // Start copying a tile. Nothing is read for keys that are not there: a NaN times 0 is a NaN.
    BATCHLLM_DEVICE void fetch(int tile) {
        constexpr int kPieces = Cache::kRowBytes / 16;
        const int buffer = Layout::kCopiedAt + tile % 2 * Layout::kCopied;
#pragma unroll 4
        for (int turn = 0; turn < kTileKeys * kPieces / kThreads; ++turn) {
            const int i = turn * kThreads + thread_;
            const int key = i / kPieces, piece = i % kPieces;
            const int slot = slots_[tile % Layout::kStages * kTileKeys + key];
            const bool is_there = slot != kNowhere;
            const uint32_t from =
                is_there ? static_cast<uint32_t>(slot) + kv_head_ * kPieces + piece : 0;
            const int to = buffer + key * Layout::kCopiedRow + 16 * piece;
            copy_async<16>(memory_ + to, layer_.keys, from, !is_there);
            copy_async<16>(memory_ + (to + 2 * Layout::kCopied), layer_.values, from, !is_there);
        }
        copy_async_commit();
    }

    // From eight bits to what is multiplied, keys and values.
    BATCHLLM_DEVICE void widen_tile(int tile) {
        constexpr int kPieces = HeadDim / 16;
#pragma unroll
        for (int kind = 0; kind < 2; ++kind) {
            const Shared<unsigned char> from =
                memory_ + (Layout::kCopiedAt + (2 * kind + tile % 2) * Layout::kCopied);
            const Shared<unsigned char> to = memory_ + kind * Layout::kTile;
#pragma unroll 2
            for (int turn = 0; turn < kTileKeys * kPieces / kThreads; ++turn) {
                const int i = turn * kThreads + thread_;
                const int key = i / kPieces, piece = i % kPieces;
                const FourWords bytes = (from + 16 * i).template as<FourWords>()[0];
                FourWords wide[2];
                widen<Type>(bytes, wide);
                const Shared<FourWords> row =
                    (to + (2 * key * Layout::kRow + 32 * piece)).template as<FourWords>();
                row[0] = wide[0];
                row[1] = wide[1];
            }
        }
    }

    // Keys (kind 0) or values (1).
    BATCHLLM_DEVICE Shared<uint16_t> rows(int kind, int tile, int first) const {
        const int buffer = Layout::kIsWide ? 2 * kind + tile % 2 : kind;
        return (memory_ + buffer * Layout::kTile).template as<uint16_t>() + first * Layout::kRow;
    }

    const AttentionStep& step_;
    const AttentionLayer& layer_;
    const Cache cache_;
    const int key_begin_, key_end_, read_end_, kv_head_, thread_;
    const Shared<unsigned char> memory_;
    const Shared<int32_t> slots_;
    const Shared<float> scales_;
    int read_;
};

}  // namespace batchllm
