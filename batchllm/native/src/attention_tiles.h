// Attention in matrix tiles: up to 32 rows of queries with a pass of keys and values.
//
// A panel of keys is a tile for each 64 bytes of a head, and as many tokens as have 64 bytes of
// weights are one for each 16 values. Where these lie in blocks that are no neighbours, or are not
// all there, they are copied together, zeros behind the last.
//
// A cache in int8 is multiplied as it is: a query, and what values are weighed by, are whole
// numbers of two bytes, and each byte has a row in the tiles (attention_split.h).
#pragma once

#include "attention_split.h"

#if defined(BATCHLLM_TILES)
template <typename T>
struct Tiles {
    typedef uint16_t Value;
    typedef float Sum;
    static constexpr int VALUES = TILE_BYTES / sizeof(Value);  // a tile's summed axis
    static constexpr int SPLIT = 1;                            // rows of a query

    template <int SUM, int A, int B>
    static INLINE void multiply() {
        multiply_bfloat16<SUM, A, B>();
    }
};

template <typename T>
struct Tiles<Rounded<T>> {
    typedef int8_t Value;
    typedef int32_t Sum;
    static constexpr int VALUES = TILE_BYTES, SPLIT = 2;

    template <int SUM, int A, int B>
    static INLINE void multiply() {
        multiply_signed_bytes<SUM, A, B>();
    }
};

constexpr int FETCHED_LINES = 12;  // beside four products of tiles

// Scores of TILES * 16 rows from `first` on with `num_panels` panels of keys, stored from row `at`
// on; up to three more panels may be written.
template <int TILES, typename T>
INLINE void multiply_keys_tiles(
    Scratch<T>& scratch, const Pass<T>& pass, int first, int at, int num_panels) {
    typedef Tiles<T> P;
    constexpr int AT_ONCE = TILES == 2 ? 2 : 4, ROW = KEYS<T> * sizeof(float);
    const int head_dim = pass.head_dim, row_bytes = head_dim * sizeof(typename P::Value);
    const auto* queries = reinterpret_cast<const typename P::Value*>(scratch.copied.data()) +
                          int64_t(first) * head_dim;
    for (int n = 0; n < num_panels; n += AT_ONCE) {
        const typename T::Kept* panels[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++)
            panels[i] = pass.keys[std::min(n + i, num_panels - 1)];
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        for (int d = 0; d < head_dim; d += P::VALUES) {
            load_tile<4>(queries + d, row_bytes);
            load_tile<6>(panels[0] + d * W, TILE_BYTES);
            load_tile<7>(panels[1] + d * W, TILE_BYTES);
            P::template multiply<0, 4, 6>();
            P::template multiply<1, 4, 7>();
            if constexpr (TILES == 2) {
                load_tile<5>(queries + TILE_ROWS * head_dim + d, row_bytes);
                P::template multiply<2, 5, 6>();
                P::template multiply<3, 5, 7>();
            } else {
                load_tile<5>(panels[2] + d * W, TILE_BYTES);
                load_tile<6>(panels[3] + d * W, TILE_BYTES);
                P::template multiply<2, 4, 5>();
                P::template multiply<3, 4, 6>();
            }
            scratch.ahead.fetch(FETCHED_LINES);
        }
        float* scores = scratch.scores.data() + at * KEYS<T> + n * W;
        float* others = TILES == 2 ? scores + TILE_ROWS * KEYS<T> : scores + 2 * W;
        store_tile<0>(scores, ROW);
        store_tile<1>(scores + W, ROW);
        store_tile<2>(others, ROW);
        store_tile<3>(others + W, ROW);
    }
}

// sums[row] = weights[row] . values, of TILES * 16 rows from `at` on over `count` keys.
template <int TILES, typename T>
INLINE void multiply_values_tiles(
    Scratch<T>& scratch, const Pass<T>& pass, int at, int count) {
    typedef Tiles<T> P;
    constexpr int AT_ONCE = TILES == 2 ? 2 : 4, ROW = KEYS<T> * sizeof(typename P::Value);
    constexpr int GROUP = 4 / sizeof(typename P::Value);
    const int head_dim = pass.head_dim, out_bytes = head_dim * sizeof(float);
    const int value_bytes = head_dim * 4;  // a group of tokens'
    const auto* all =
        reinterpret_cast<const typename P::Value*>(scratch.weights.data()) + at * KEYS<T>;
    for (int d = 0; d < head_dim; d += AT_ONCE * W) {
        const bool whole = d + AT_ONCE * W <= head_dim;  // with four at once there may be two left
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        for (int key = 0; key < count; key += P::VALUES) {
            const auto* values = scratch.groups[key / P::VALUES] + d * GROUP;
            const auto* weights = all + key;
            load_tile<4>(weights, ROW);
            load_tile<6>(values, value_bytes);
            load_tile<7>(values + W * GROUP, value_bytes);
            P::template multiply<0, 4, 6>();
            P::template multiply<1, 4, 7>();
            if constexpr (TILES == 2) {
                load_tile<5>(weights + TILE_ROWS * KEYS<T>, ROW);
                P::template multiply<2, 5, 6>();
                P::template multiply<3, 5, 7>();
            } else if (whole) {
                load_tile<5>(values + 2 * W * GROUP, value_bytes);
                load_tile<6>(values + 3 * W * GROUP, value_bytes);
                P::template multiply<2, 4, 5>();
                P::template multiply<3, 4, 6>();
            }
            scratch.ahead.fetch(FETCHED_LINES);
        }
        float* sums = scratch.sums.data() + at * head_dim + d;
        store_tile<0>(sums, out_bytes);
        store_tile<1>(sums + W, out_bytes);
        if (TILES == 2 || whole) {
            float* others = TILES == 2 ? sums + TILE_ROWS * head_dim : sums + 2 * W;
            store_tile<2>(others, out_bytes);
            store_tile<3>(others + W, out_bytes);
        }
    }
}

// See InVectors.
template <typename T>
struct InTiles {
    typedef Tiles<T> P;
    typedef typename P::Value Value;
    static constexpr int MOST = 2 * TILE_ROWS / P::SPLIT;
    static constexpr int FEW = TILE_ROWS / P::SPLIT;  // rows that are better attended with others

    static bool fit(int head_dim) {
        return head_dim % P::VALUES == 0 && (!T::ROUNDED || head_dim <= MOST_SPLIT);
    }
    static void begin_thread() {
        shape_tiles(TileShape(TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS));
    }
    static void end_thread() { release_tiles(); }

    static void put_query(
        Scratch<T>& scratch, int row, const typename T::Value* query, int head_dim) {
        Row<T>* to = scratch.copied.data() + int64_t(row) * head_dim;
        if constexpr (T::ROUNDED)
            scratch.query_scales[row] =
                split_row<T>(query, head_dim, reinterpret_cast<int8_t*>(to));
        else
            for (int d = 0; d < head_dim; d += W) store(to + d, load<Halves>(query + d));
    }

    static void open(Scratch<T>& scratch, const Pass<T>& pass) {
        constexpr int GROUP = 4 / sizeof(Value), TOKENS = P::VALUES;
        const int part = W * pass.head_dim;
        for (int key = 0; key < pass.count; key += TOKENS) {
            const typename T::Kept* const* parts = pass.values + key / W;
            Value* to = scratch.parted.data() + key * pass.head_dim;
            bool whole = key + TOKENS <= pass.count;
            for (int p = 1; whole && p < TOKENS / W; p++) whole = parts[p] == parts[p - 1] + part;
            scratch.groups[key / TOKENS] = whole ? parts[0] : to;
            for (int k = 0; !whole && k < TOKENS; k += GROUP, to += GROUP * pass.head_dim) {
                const int left = pass.count - key - k;
                const Value* from = left > 0 ? parts[k / W] + k % W * pass.head_dim : nullptr;
                for (int d = 0; d < pass.head_dim * GROUP; d += W * GROUP) {
                    Words group{};
                    if (from != nullptr) group = load<Words>(from + d);
                    if (!T::ROUNDED && left == 1) group = T::first_of_group(group, 1);
                    store(to + d, group);  // whole numbers are numbers, whatever they are
                }
            }
        }
    }

    // Few rows with one pass each, `rows[i]` with `passes[i]`, next to each other from `first` on:
    // what waits for one of them is the others' time. A tile of rows has others' behind its own,
    // which the next one stores again.
    static void attend_each(
        Scratch<T>& scratch, const Pass<T>* passes, const int* rows, int count, int first,
        const int* seen) {
        int all = 0;
        for (int i = 0; i < count; all += rows[i++]) {
            scratch.ahead.use(passes[i].num_panels());
            multiply_keys<1>(scratch, passes[i], first + all, all, passes[i].count);
        }
        for (int i = 0, at = 0; i < count; at += rows[i++])
            weigh(scratch, passes[i], first + at, at, rows[i], seen + at, passes[i].count);
        for (int i = 0, at = 0; i < count; at += rows[i++]) {
            open(scratch, passes[i]);
            multiply_values_tiles<1>(scratch, passes[i], at * P::SPLIT, passes[i].count);
        }
        add(scratch, first, all, passes[0].head_dim);
    }

    static void attend(
        int rows, Scratch<T>& scratch, const Pass<T>& pass, int first, int count,
        const int* seen) {
        (rows > FEW ? attend_tiles<2> : attend_tiles<1>)(rows, scratch, pass, first, count, seen);
    }

  private:
    template <int TILES>
    static void attend_tiles(
        int rows, Scratch<T>& scratch, const Pass<T>& pass, int first, int count,
        const int* seen) {
        multiply_keys<TILES>(scratch, pass, first, 0, count);
        weigh(scratch, pass, first, 0, rows, seen, count);
        multiply_values_tiles<TILES>(scratch, pass, 0, count);
        add(scratch, first, rows, pass.head_dim);
    }

    template <int TILES>
    static INLINE void multiply_keys(
        Scratch<T>& scratch, const Pass<T>& pass, int first, int at, int count) {
        multiply_keys_tiles<TILES>(
            scratch, pass, first * P::SPLIT, at * P::SPLIT, (count + W - 1) / W);
    }

    // Scores to weights, which fill tiles.
    static INLINE void weigh(
        Scratch<T>& scratch, const Pass<T>& pass, int first, int at, int rows, const int* seen,
        int count) {
        const int num_panels = (count + P::VALUES - 1) / P::VALUES * (P::VALUES / W);
        for (int r = 0; r < rows; r += W) {
            const int some = std::min(W, rows - r);
            if constexpr (T::ROUNDED)
                weigh_split(scratch, pass, first + r, at + r, some, seen + r, num_panels);
            else
                store(
                    scratch.kept.data() + at + r,
                    weigh_rows(scratch, pass, first + r, at + r, some, seen + r, num_panels));
        }
    }

    // Adds a pass's sums to what the rows from `first` on have.
    static INLINE void add(Scratch<T>& scratch, int first, int rows, int head_dim) {
        float* out = scratch.out.data() + int64_t(first) * head_dim;
        const float* sums = scratch.sums.data();
        for (int r = 0; r < rows; r++, out += head_dim, sums += P::SPLIT * head_dim)
            for (int d = 0; d < head_dim; d += W) {
                Floats sum;
                if constexpr (T::ROUNDED)
                    sum = joined(sums + d, sums + head_dim + d) * scratch.units[r];
                else
                    sum = load<Floats>(sums + d);
                store(out + d, load<Floats>(out + d) * scratch.kept[r] + sum);
            }
    }
};
#endif
