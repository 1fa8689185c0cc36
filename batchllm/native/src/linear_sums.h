// The sums of a strip and a panel, and what becomes of them while the next is multiplied: outputs,
// or only the largest of a row. What was stored from tiles is not read at once, and the vectors'
// work hides behind the tiles'.
#pragma once

#include <algorithm>
#include <cmath>

#include "linear.h"
#include "products.h"
#include "strips.h"
#include "tiles.h"

#if defined(BATCHLLM_TILES)
static_assert(STRIP == 2 * TILE_ROWS, "a strip is two tiles of rows");
constexpr int TILE_PANEL = 2 * W;  // outputs

// As they were stored from tiles.
template <typename In>
class StoredSums {
    typedef typename In::Sums Sums;
    alignas(64) Sums sums[STRIP][2];
    Sums start[2]{};
    Floats scale[2]{}, bias[2]{};
    const float* row_scales = nullptr;

  public:
    // Tiles FIRST and its neighbour are the sums of the rows from `at` on.
    template <int FIRST>
    INLINE void store(int at) {
        store_tile<FIRST>(sums[at], sizeof sums[0]);
        store_tile<FIRST + 1>(&sums[at][1], sizeof sums[0]);
    }

  protected:
    int row = 0, rows = 0;  // next, and so many in all
    int64_t first = 0;      // output

    INLINE void start_rows(
        const PackedLinear& linear, int64_t panel, int count, const float* scales) {
        first = panel * TILE_PANEL;
        for (int n = 0; n < 2; n++) {
            if constexpr (In::SCALED) {
                start[n] = load<Sums>(linear.starts + first + n * W);
                scale[n] = load<Floats>(linear.scales + first + n * W);
            }
            if (linear.bias != nullptr) bias[n] = load<Floats>(linear.bias + first + n * W);
        }
        row_scales = scales;
        row = 0;
        rows = count;
    }
    INLINE Floats value(int n) const {
        if constexpr (In::SCALED)
            return In::floats(sums[row][n] + start[n]) * (scale[n] * row_scales[row]) + bias[n];
        else
            return sums[row][n] + bias[n];
    }
};

// Writes what they come to.
template <typename In, typename Out>
class Outputs : public StoredSums<In> {
    using StoredSums<In>::row;
    using StoredSums<In>::rows;
    using StoredSums<In>::value;
    const Rows<typename Out::Value> all;
    typename Out::Value* out = nullptr;
    int64_t second = 0;  // vector, so far behind the first where a panel is several chunks
    int64_t left = 0;
    bool gated = false;

    // Of the last panel there may be less than a panel's outputs, not in strips.
    __attribute__((noinline)) void write_first(typename Out::Value* to) const {
        for (int64_t i = 0; i < left; i++) to[i] = Out::put(value(int(i / W))[i % W]);
    }

  public:
    typedef In Product;
    typedef typename Out::Value To;

    explicit Outputs(const Rows<To>& all) : all(all) {}

    // What was stored is this: `count` rows of x, `scales` and `to` being theirs.
    INLINE void begin(
        const PackedLinear& linear, int64_t panel, int count, const float* scales, To* to) {
        this->start_rows(linear, panel, count, scales);
        gated = linear.gated != 0;
        const int64_t output = gated ? this->first / 2 : this->first;
        out = to + all.place(output);
        second = all.place(output + W) - all.place(output);
        left = linear.outputs - this->first;
    }

    // The next `count` rows that wait, if there are.
    INLINE void write(int count) {
        for (const int end = std::min(row + count, rows); row < end; row++) {
            To* to = out + row * all.stride;
            if (gated)
                Out::narrow(to, silu<Out::COARSE>(value(0)) * value(1));
            else if (left < TILE_PANEL)
                write_first(to);
            else if constexpr (Rows<To>::CHUNK >= TILE_PANEL)
                Out::narrow(to, value(0), value(1));
            else
                Out::narrow(to, value(0)), Out::narrow(to + second, value(1));
        }
    }
};

// A row's largest output so far, and the first that is so large. Nothing is larger than what is no
// number.
struct Largest {
    float value = -INFINITY;
    int32_t index = -1;

    void meet(float other, int64_t at) {
        if (other > value || (other == value && at < index) || std::isnan(other))
            *this = {other, int32_t(at)};
    }
};

INLINE bool all_at_most(Floats a, Floats b, float most) {
#if defined(__AVX512F__)
    const __m512 limit = (__m512)broadcast(most);
    return (_mm512_cmp_ps_mask((__m512)a, limit, _CMP_LE_OQ) &
            _mm512_cmp_ps_mask((__m512)b, limit, _CMP_LE_OQ)) == 0xffff;
#else
    bool all = true;
    for (int i = 0; i < W; i++) all = all && a[i] <= most && b[i] <= most;
    return all;
#endif
}

// Only finds the largest of what they come to, as Out holds it. Panels must come in order.
template <typename In, typename Out>
class LargestOutputs : public StoredSums<In> {
    using StoredSums<In>::row;
    using StoredSums<In>::rows;
    using StoredSums<In>::value;
    Largest* largest = nullptr;  // of each row
    int64_t outputs = 0;

    // Seldom: a row's largest is not often surpassed.
    __attribute__((noinline)) void look() {
        for (int n = 0; n < 2; n++) {
            const Floats values = value(n);
            for (int i = 0; i < W; i++) {
                const int64_t output = this->first + n * W + i;
                if (output < outputs) largest[row].meet(Out::get(Out::put(values[i])), output);
            }
        }
    }

  public:
    typedef In Product;
    typedef Largest To;

    explicit LargestOutputs(const Rows<To>&) {}

    INLINE void begin(
        const PackedLinear& linear, int64_t panel, int count, const float* scales, To* to) {
        this->start_rows(linear, panel, count, scales);
        largest = to;
        outputs = linear.outputs;
    }

    INLINE void write(int count) {
        for (const int end = std::min(row + count, rows); row < end; row++)
            if (!all_at_most(value(0), value(1), largest[row].value)) look();
    }
};
#endif
