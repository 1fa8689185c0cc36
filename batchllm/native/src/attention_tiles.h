// Attention in matrix tiles: up to 32 rows of queries with a pass of keys and values, in bfloat16.
//
// A panel of keys is a tile for each 32 values of a head, and 32 tokens' values are one for each
// 16. Where these lie in blocks that are no neighbours, or are not all there, they are copied
// together, zeros behind the last.
#pragma once

#include "attention_state.h"

#if defined(BATCHLLM_TILES)
constexpr int TILE_VALUES = TILE_BYTES / 2;  // of bfloat16: a tile's summed axis
static_assert(W == 16 && KEYS % TILE_VALUES == 0, "whole tiles of keys");

constexpr int FETCHED_LINES = 12;  // beside four products of tiles

// Scores of TILES * 16 rows of queries from `first` on with `num_panels` panels of keys, stored
// from row `at` on; up to three more panels may be written.
template <int TILES, typename T>
INLINE void multiply_keys_tiles(
    Scratch<T>& scratch, const Pass<T>& pass, int first, int at, int num_panels) {
    constexpr int AT_ONCE = TILES == 2 ? 2 : 4, ROW = KEYS * sizeof(float);
    const int head_dim = pass.head_dim, row_bytes = head_dim * 2;
    const uint16_t* queries = scratch.copied.data() + int64_t(first) * head_dim;
    for (int n = 0; n < num_panels; n += AT_ONCE) {
        const uint16_t* panels[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) panels[i] = pass.panels[std::min(n + i, num_panels - 1)];
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        for (int d = 0; d < head_dim; d += TILE_VALUES) {
            load_tile<4>(queries + d, row_bytes);
            load_tile<6>(panels[0] + d * W, TILE_BYTES);
            load_tile<7>(panels[1] + d * W, TILE_BYTES);
            multiply_bfloat16<0, 4, 6>();
            multiply_bfloat16<1, 4, 7>();
            if constexpr (TILES == 2) {
                load_tile<5>(queries + TILE_ROWS * head_dim + d, row_bytes);
                multiply_bfloat16<2, 5, 6>();
                multiply_bfloat16<3, 5, 7>();
            } else {
                load_tile<5>(panels[2] + d * W, TILE_BYTES);
                load_tile<6>(panels[3] + d * W, TILE_BYTES);
                multiply_bfloat16<2, 4, 5>();
                multiply_bfloat16<3, 4, 6>();
            }
            scratch.ahead.fetch(FETCHED_LINES);
        }
        float* scores = scratch.scores.data() + at * KEYS + n * W;
        float* others = TILES == 2 ? scores + TILE_ROWS * KEYS : scores + 2 * W;
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
    constexpr int AT_ONCE = TILES == 2 ? 2 : 4, ROW = KEYS * 2;
    const int head_dim = pass.head_dim, out_bytes = head_dim * sizeof(float);
    const int value_bytes = head_dim * 4;  // a pair of tokens'
    for (int d = 0; d < head_dim; d += AT_ONCE * W) {
        const bool whole = d + AT_ONCE * W <= head_dim;  // with four at once there may be two left
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        for (int key = 0; key < count; key += TILE_VALUES) {
            const uint16_t* values = scratch.groups[key / TILE_VALUES] + d * 2;
            const uint16_t* weights = scratch.weights.data() + at * KEYS + key;
            load_tile<4>(weights, ROW);
            load_tile<6>(values, value_bytes);
            load_tile<7>(values + W * 2, value_bytes);
            multiply_bfloat16<0, 4, 6>();
            multiply_bfloat16<1, 4, 7>();
            if constexpr (TILES == 2) {
                load_tile<5>(weights + TILE_ROWS * KEYS, ROW);
                multiply_bfloat16<2, 5, 6>();
                multiply_bfloat16<3, 5, 7>();
            } else if (whole) {
                load_tile<5>(values + 2 * W * 2, value_bytes);
                load_tile<6>(values + 3 * W * 2, value_bytes);
                multiply_bfloat16<2, 4, 5>();
                multiply_bfloat16<3, 4, 6>();
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

INLINE int whole_tiles(int count) {  // panels of W keys in the tiles that `count` keys fill
    return (count + TILE_VALUES - 1) / TILE_VALUES * (TILE_VALUES / W);
}

// Weighs `rows` rows of scores from `first` on and, once `multiply` has put their sums there, adds
// these to what the rows have.
template <typename T, typename Passes, typename Multiply>
INLINE void weigh_and_add(
    Scratch<T>& scratch, int rows, int first, int head_dim, const int* seen, int num_panels,
    Passes pass_of, Multiply multiply) {
    Floats keep[MOST_ROWS / TILE_ROWS];
    for (int t = 0; t * TILE_ROWS < rows; t++)
        keep[t] = weigh_rows<T>(
            scratch, first + t * TILE_ROWS, t * TILE_ROWS,
            std::min(TILE_ROWS, rows - t * TILE_ROWS), seen + t * TILE_ROWS, num_panels,
            [&](int r) -> const Pass<T>& { return pass_of(t * TILE_ROWS + r); });
    multiply();
    float* out = scratch.out.data() + int64_t(first) * head_dim;
    const float* sums = scratch.sums.data();
    for (int r = 0; r < rows; r++, out += head_dim, sums += head_dim) {
        const float kept = keep[r / TILE_ROWS][r % TILE_ROWS];
        for (int d = 0; d < head_dim; d += W)
            store(out + d, load<Floats>(out + d) * kept + load<Floats>(sums + d));
    }
}

template <int TILES, typename T>
void attend_tiles(
    int rows, Scratch<T>& scratch, const Pass<T>& pass, int first, int count,
    const int* seen) {
    multiply_keys_tiles<TILES>(scratch, pass, first, 0, (count + W - 1) / W);
    weigh_and_add(
        scratch, rows, first, pass.head_dim, seen, whole_tiles(count),
        [&](int) -> const Pass<T>& { return pass; }, [&] { multiply_values_tiles<TILES>(scratch, pass, 0, count); });
}

// See InVectors.
template <typename T>
struct InTiles {
    static constexpr int MOST = 2 * TILE_ROWS;
    static constexpr bool COPIES = true;
    static constexpr int FEW = TILE_ROWS;  // rows that are better attended with others

    static bool fit(int head_dim) { return head_dim % TILE_VALUES == 0; }
    static void begin_thread() {
        shape_tiles(TileShape(TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS));
    }
    static void end_thread() { release_tiles(); }

    static void begin_values(Scratch<T>& scratch, const Pass<T>& pass) {
        if constexpr (T::ROUNDED)
            widen_values(scratch, pass), fill_last_tile(scratch, pass);
        else
            copy_parted(scratch, pass);
    }
    static void fill_last_tile(Scratch<T>& scratch, const Pass<T>& pass) {
        const int panels = pass.num_panels();
        uint16_t* values = scratch.values.data();
        for (int p = 0; p < panels; p += TILE_VALUES / W)
            scratch.groups[p * W / TILE_VALUES] = values + p * W * pass.head_dim;
        if (panels < whole_tiles(pass.count))
            std::fill_n(values + panels * W * pass.head_dim, W * pass.head_dim, uint16_t(0));
    }
    static void copy_parted(Scratch<T>& scratch, const Pass<T>& pass) {
        const int words = pass.head_dim;  // a pair of tokens'
        for (int key = 0; key < pass.count; key += TILE_VALUES) {
            uint16_t* to = scratch.values.data() + key * pass.head_dim;
            bool whole = key + TILE_VALUES <= pass.count;
            for (int k = key + pass.step; whole && k < key + TILE_VALUES; k += pass.step)
                whole = pass.values_of(k) == pass.values_of(key) + (k - key) * pass.head_dim;
            scratch.groups[key / TILE_VALUES] = whole ? pass.values_of(key) : to;
            for (int k = key; !whole && k < key + TILE_VALUES; k += 2, to += words * 2) {
                const uint16_t* from = k < pass.count ? pass.values_of(k) : nullptr;
                for (int d = 0; d < words; d += W) {
                    Words pairs{};
                    if (from != nullptr) pairs = load<Words>(from + d * 2);
                    if (k + 1 == pass.count) pairs = Bfloat16::first_of_group(pairs, 1);
                    store(to + d * 2, pairs);
                }
            }
        }
    }

    // Few rows with one pass each, `rows[i]` with `passes[i]`, next to each other from `first` on:
    // what waits for one of them is the others' time. A tile of rows has others' behind its own,
    // which the next one stores again.
    static void attend_each(
        Scratch<T>& scratch, const Pass<T>* passes, const int* rows, int count,
        int first, const int* seen) {
        int all = 0, most = 0;
        const Pass<T>* pass_of[MOST];
        for (int i = 0; i < count; all += rows[i++]) {
            scratch.ahead.use(passes[i].num_panels());
            widen_keys(scratch, passes[i]);
            multiply_keys_tiles<1>(scratch, passes[i], first + all, all, passes[i].num_panels());
            std::fill_n(pass_of + all, rows[i], &passes[i]);
            most = std::max(most, passes[i].count);
        }
        weigh_and_add(
            scratch, all, first, passes[0].head_dim, seen, whole_tiles(most),
            [&](int r) -> const Pass<T>& { return *pass_of[r]; }, [&] {
                for (int i = 0, at = 0; i < count; at += rows[i++]) {
                    begin_values(scratch, passes[i]);
                    multiply_values_tiles<1>(scratch, passes[i], at, passes[i].count);
                }
            });
    }

    static void attend(
        int rows, Scratch<T>& scratch, const Pass<T>& pass, int first, int count,
        const int* seen) {
        (rows > TILE_ROWS ? attend_tiles<2, T> : attend_tiles<1, T>)(
            rows, scratch, pass, first, count, seen);
    }
};
#endif
