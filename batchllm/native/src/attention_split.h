// Whole numbers of two bytes, each of which is multiplied by itself: what meets a cache of int8.
//
// A number is 256 times its upper byte and its lower one, both signed; their sums are joined again.
// So a query is exact to 2^-15 of its largest value, and so are weights: products of int8 alone
// would be to 2^-8, and those of bfloat16 are not much better.
#pragma once

#include "attention_state.h"

#if defined(BATCHLLM_TILES)
constexpr int MOST_SPLIT = 256;  // numbers a sum, for which 32 bits are enough
static_assert(KEYS<Rounded<Bfloat16>> <= MOST_SPLIT, "sums over a pass");

// Four vectors of numbers, in the low halves of words, to their upper and their lower bytes.
INLINE void put_split(const Words (&x)[4], int8_t* upper, int8_t* lower) {
#if defined(__AVX512BW__)
    const auto halves = [](Words low, Words high) {
        return _mm512_mask_blend_epi16(
            0xaaaaaaaa, (__m512i)low, _mm512_slli_epi32((__m512i)high, 16));
    };
    const __m512i first = halves(x[0], x[1]), second = halves(x[2], x[3]);
    // In a word are now a byte each of the first, the third, the second and the fourth.
    const auto put = [](int8_t* to, __m512i low, __m512i high) {
        const __m512i bytes = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, low, high);
        const __m512i in_lane = _mm512_shuffle_epi8(
            bytes, _mm512_broadcast_i32x4(
                       _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15)));
        const __m512i lanes =
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        store(to, _mm512_permutexvar_epi32(lanes, in_lane));
    };
    const __m512i half = _mm512_set1_epi16(128);  // the lower byte is signed
    put(lower, first, _mm512_slli_epi16(second, 8));
    put(upper, _mm512_srli_epi16(_mm512_add_epi16(first, half), 8),
        _mm512_add_epi16(second, half));
#else
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < W; j++) {
            const int16_t number = int16_t(x[i][j]);
            lower[i * W + j] = int8_t(number);
            upper[i * W + j] = int8_t((number + 128) >> 8);
        }
#endif
}

// Sums over upper bytes and over lower ones, as floats.
INLINE Floats joined(const void* upper, const void* lower) {
    return __builtin_convertvector((load<Words>(upper) << 8) + load<Words>(lower), Floats);
}

// Words with whole numbers in their low halves.
INLINE Words rounded_words(Floats x) { return (Words)(x + 12582912.0f); }  // 1.5 * 2^23

// A query [head_dim] to its upper and then its lower bytes; returns the scale of its numbers.
template <typename T>
INLINE float split_row(const typename T::Value* query, int head_dim, int8_t* to) {
    constexpr float MOST = 127 * 256 + 127;
    Floats row[MOST_SPLIT / W];
    Words most{};
    for (int i = 0; i * W < head_dim; i++) {
        row[i] = T::widen(query + i * W);
        most = largest((Words)row[i] & 0x7fffffff, most);
    }
    const float peak = float_of_bits(largest(most));
    const float inverse = peak > 0.0f ? MOST / peak : 0.0f;
    for (int i = 0; i * W < head_dim; i += 4) {
        const Words words[] = {
            rounded_words(row[i] * inverse), rounded_words(row[i + 1] * inverse),
            rounded_words(row[i + 2] * inverse), rounded_words(row[i + 3] * inverse)};
        put_split(words, to + i * W, to + head_dim + i * W);
    }
    return peak / MOST;
}

// The bits of the largest scale of the values that are seen; they order as the floats do.
template <typename T>
INLINE int32_t largest_scale(const Pass<T>& pass, int seen) {
    Words lane, most{};
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int p = 0; p * W < seen; p++) {
        const Words scales = load<Words>(pass.value_scales[p]);
        most = lane + p * W < seen ? largest(scales, most) : most;
    }
    return largest(most);
}

// As `weigh_rows`; a row of scores is two of products, and one of weights is two of their bytes.
// Values' scales are in the weights; what is left to multiply sums by is each row's unit, not a
// number if a value's scale that it sees is not finite.
template <typename T>
INLINE void weigh_split(
    Scratch<T>& scratch, const Pass<T>& pass, int first, int at, int rows, const int* seen,
    int num_panels) {
    Words lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    float* products = scratch.scores.data() + 2 * at * KEYS<T>;
    Floats old{}, peak{}, scale{};
    Words largest_value{};
    for (int r = 0; r < rows; r++) {
        float* row = products + 2 * r * KEYS<T>;
        const int whole = seen[r] / W;
        const auto join = [&](int p) {
            const Floats score = joined(row + p * W, row + KEYS<T> + p * W) *
                                 load<Floats>(pass.key_scales[p]);
            store(row + p * W, score);
            return score;
        };
        Floats most = broadcast(-INFINITY);
        for (int p = 0; p < whole; p++) most = largest(most, join(p));
        if (whole * W < seen[r])
            most = lane + whole * W < seen[r] ? largest(most, join(whole)) : most;
        scale[r] = scratch.query_scales[first + r] * pass.scale;
        old[r] = scratch.peak[first + r];
        peak[r] = std::max(old[r], largest(most) * scale[r]);
        scratch.peak[first + r] = peak[r];
        largest_value[r] = r > 0 && seen[r] == seen[r - 1] ? largest_value[r - 1]
                                                           : largest_scale(pass, seen[r]);
    }
    // Weights are multiplied by a power of two, so that the largest there may be, with the largest
    // of the values' scales, is a number of 14 bits.
    const Words exponent = largest_value >> 23;
    const Words power = 127 + 13 - (exponent > 27 ? exponent : Words{} + 27);
    const Floats value_peak = (Floats)largest_value;
    const Floats whole = (Floats)((127 - power) << 23);
    store(scratch.units.data() + at, whole + (value_peak - value_peak));
    store(scratch.kept.data() + at, exp2_of_negative(old - peak));
    const Floats raised = peak - __builtin_convertvector(power, Floats);
    for (int r = 0; r < rows; r++) {
        const float* row = products + 2 * r * KEYS<T>;
        int8_t* weights =
            reinterpret_cast<int8_t*>(scratch.weights.data()) + 2 * (at + r) * KEYS<T>;
        float* sums = scratch.total.data() + (first + r) * W;
        Floats total{};
        for (int p = 0; p < num_panels; p += 4) {
            Words numbers[4];
            const auto weigh = [&](int q) {
                return exp2_of_negative<true>(load<Floats>(row + q * W) * scale[r] - raised[r]);
            };
            const auto put = [&](int i, Floats weight) {
                numbers[i] = rounded_words(weight * load<Floats>(pass.value_scales[p + i]));
            };
            if ((p + 4) * W <= seen[r]) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const Floats weight = weigh(p + i);
                    total += weight;
                    put(i, weight);
                }
            } else {
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    numbers[i] = Words{};
                    if ((p + i) * W >= seen[r]) continue;
                    const Words sees = lane + (p + i) * W < seen[r];
                    const Floats weight = sees ? weigh(p + i) : Floats{};
                    total += weight;
                    put(i, weight);
                    numbers[i] = sees ? numbers[i] : Words{};
                }
            }
            put_split(numbers, weights + p * W, weights + KEYS<T> + p * W);
        }
        store(sums, load<Floats>(sums) * scratch.kept[at + r] + total * whole[r]);
        scratch.ahead.fetch(LINES_A_ROW);
    }
}
#endif
