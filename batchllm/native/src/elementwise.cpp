// What lies between the products: one pass over memory each, sums in float32.
#include "elementwise.h"

#include <cmath>

#include "simd.h"
#include "strips.h"

namespace {

// A line of the cache, in vectors: what they are stored as is next to each other.
template <typename T>
struct Line {
    typedef typename T::Value Value;
    static constexpr int64_t SIZE = Rows<Value>::CHUNK;
    static constexpr int COUNT = SIZE / W;
    Floats values[COUNT];

    explicit Line(const Value* from) {
        for (int n = 0; n < COUNT; n++) values[n] = T::widen(from + n * W);
    }
    INLINE void put(Value* to) const {
        if constexpr (COUNT == 1)
            T::narrow(to, values[0]);
        else
            for (int n = 0; n < COUNT; n += 2) T::narrow(to + n * W, values[n], values[n + 1]);
    }
};

// hidden += delta (where there is one), then normed = hidden / rms(hidden) * weight (the same).
// delta and normed may be in strips.
template <typename T>
void add_rms_norm(
    int64_t rows, int64_t size, float epsilon, void* hidden, const void* delta, const void* weight,
    void* normed, bool strips) {
    typedef typename T::Value Value;
    constexpr int64_t LINE = Line<T>::SIZE;
    constexpr int COUNT = Line<T>::COUNT;
    const int64_t whole = size - size % LINE;
    const Value* scale = static_cast<const Value*>(weight);
    const Rows<const Value> deltas(static_cast<const Value*>(delta), size, strips);
    const Rows<Value> outs(static_cast<Value*>(normed), size, strips);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        Value* row = static_cast<Value*>(hidden) + i * size;
        if (delta != nullptr) {
            const Value* more = deltas.row(i);
            for (int64_t j = 0; j < whole; j += LINE) {
                Line<T> x(row + j);
                const Line<T> added(more + deltas.place(j));
                for (int n = 0; n < COUNT; n++) x.values[n] += added.values[n];
                x.put(row + j);
            }
            for (int64_t j = whole; j < size; j++)
                row[j] = T::put(T::get(row[j]) + T::get(more[deltas.place(j)]));
        }
        if (weight == nullptr) continue;
        Value* to = outs.row(i);
        Floats squares[COUNT] = {};  // sums that do not wait for each other
        for (int64_t j = 0; j < whole; j += LINE) {
            const Line<T> x(row + j);
            for (int n = 0; n < COUNT; n++) squares[n] += x.values[n] * x.values[n];
        }
        float total = 0.0f;
        for (int n = 0; n < COUNT; n++) total += sum(squares[n]);
        for (int64_t j = whole; j < size; j++) total += T::get(row[j]) * T::get(row[j]);
        const float inverse = 1.0f / std::sqrt(total / float(size) + epsilon);
        for (int64_t j = 0; j < whole; j += LINE) {
            Line<T> x(row + j);
            const Line<T> scales(scale + j);
            for (int n = 0; n < COUNT; n++)
                x.values[n] = x.values[n] * inverse * scales.values[n];
            x.put(to + outs.place(j));
        }
        for (int64_t j = whole; j < size; j++)
            to[outs.place(j)] = T::put(T::get(row[j]) * inverse * T::get(scale[j]));
    }
}

// out[., j] = silu(gate_up[., j]) * gate_up[., size + j].
template <typename T>
void silu_and_multiply(int64_t rows, int64_t size, const void* gate_up, void* out) {
    typedef typename T::Value Value;
    const int64_t whole = size - size % W;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const Value* gate = static_cast<const Value*>(gate_up) + i * 2 * size;
        const Value* up = gate + size;
        Value* to = static_cast<Value*>(out) + i * size;
        for (int64_t j = 0; j < whole; j += W)
            T::narrow(to + j, silu<T::COARSE>(T::widen(gate + j)) * T::widen(up + j));
        for (int64_t j = whole; j < size; j++)
            to[j] = T::put(silu<T::COARSE>(broadcast(T::get(gate[j])))[0] * T::get(up[j]));
    }
}

// The first of each row's largest values; -1 where there is a NaN, or the largest is infinite.
template <typename T>
void argmax(int64_t rows, int64_t size, const void* values, int32_t* out) {
    typedef typename T::Value Value;
    const int64_t whole = size - size % W;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const Value* row = static_cast<const Value*>(values) + i * size;
        Floats best = broadcast(-INFINITY);
        Words where{}, lane, unordered{};
        for (int j = 0; j < W; j++) lane[j] = j;
        for (int64_t j = 0; j < whole; j += W) {
            const Floats x = T::widen(row + j);
            const Words more = x > best;
            best = more ? x : best;
            where = more ? lane + int32_t(j) : where;
            unordered |= x != x;
        }
        float most = best[0];
        int32_t first = where[0];
        for (int j = 1; j < W; j++)
            if (best[j] > most || (best[j] == most && where[j] < first)) {
                most = best[j];
                first = where[j];
            }
        for (int64_t j = whole; j < size; j++)
            if (T::get(row[j]) > most) {
                most = T::get(row[j]);
                first = int32_t(j);
            }
        bool has_nan = false;
        for (int j = 0; j < W; j++) has_nan |= unordered[j] != 0;
        for (int64_t j = whole; j < size; j++) has_nan |= std::isnan(T::get(row[j]));
        out[i] = has_nan || std::isinf(most) ? -1 : first;
    }
}

}  // namespace

extern "C" {

void batchllm_add_rms_norm(
    int32_t is_bfloat16, int64_t rows, int64_t size, float epsilon, void* hidden,
    const void* delta, const void* weight, void* normed, int32_t strips) {
    (is_bfloat16 ? add_rms_norm<Bfloat16> : add_rms_norm<Float32>)(
        rows, size, epsilon, hidden, delta, weight, normed, strips != 0);
}

void batchllm_silu_and_multiply(
    int32_t is_bfloat16, int64_t rows, int64_t size, const void* gate_up, void* out) {
    (is_bfloat16 ? silu_and_multiply<Bfloat16> : silu_and_multiply<Float32>)(
        rows, size, gate_up, out);
}

void batchllm_argmax(
    int32_t is_bfloat16, int64_t rows, int64_t size, const void* values, int32_t* out) {
    (is_bfloat16 ? argmax<Bfloat16> : argmax<Float32>)(rows, size, values, out);
}

}
