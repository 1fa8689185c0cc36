// A weight's rows to the panels that products read (panels.h), for int8 rounded, a scale each.
#include <algorithm>
#include <cmath>
#include <utility>

#include "linear.h"
#include "panels.h"
#include "rounding.h"

namespace {

constexpr int LINE_WORDS = 16;  // of a line of the cache
constexpr int GROUP = Int8Product::GROUP;

// The weight's row that an output is: of a gated weight a panel takes gates, and then as many ups.
int64_t row_of(const PackedLinear& linear, int64_t output) {
    if (!linear.gated) return output;
    constexpr int HALF = PANEL / 2;
    const int64_t place = output % PANEL, gate = output / PANEL * HALF + place % HALF;
    return place < HALF ? gate : linear.outputs / 2 + gate;
}

// Rows of words side by side in a panel; zeros where there is no row.
void lay_out(const void* const (&rows)[PANEL], int64_t words, int32_t* panel) {
    for (int64_t line = 0; line < words; line += LINE_WORDS, panel += LINE_WORDS * PANEL) {
        const int64_t count = std::min<int64_t>(LINE_WORDS, words - line);
        for (int j = 0; j < PANEL; j++) {
            int32_t row[LINE_WORDS] = {};
            if (rows[j] != nullptr)
                std::memcpy(row, static_cast<const int32_t*>(rows[j]) + line, count * sizeof *row);
            for (int64_t i = 0; i < count; i++) panel[i * PANEL + j] = row[i];
        }
    }
}

// Rounds a row to [-127, 127], in the order of a word, and tells its scale and its sum. The same to
// the last bit as models/linear.py does, whatever the processor: nothing is fused with a product.
template <typename T>
void round_weights(
    const typename T::Value* row, int64_t inputs, int8_t* to, float* scale, int32_t* sum) {
    const float peak = peak_of<T>(Rows<const typename T::Value>(row, inputs, false), row, 0);
    const float inverse = peak > 0.0f ? 1.0f / peak * 127.0f : 0.0f;
    *scale = peak / 127.0f;
    *sum = 0;
    if (std::isnan(peak)) {
        std::fill_n(to, inputs, int8_t(0));
        return;
    }
    for (int64_t k = 0; k < inputs; k++) to[k] = int8_t(int(std::rint(T::get(row[k]) * inverse)));
    for (int64_t k = 0; k < inputs; k++) *sum += to[k];
    if (sizeof(Int8Product::Value) == 2)  // see batchllm_rounded_bytes
        for (int64_t k = 0; k < inputs; k += GROUP) std::swap(to[k + 1], to[k + 2]);
}

template <typename T>
void pack(const PackedLinear& linear, const typename T::Value* weight) {
    typedef typename T::Value Value;
    const bool is_int8 = linear.scales != nullptr;
    const int64_t inputs = linear.inputs, panels = (linear.outputs + PANEL - 1) / PANEL;
    const int64_t words = inputs / (is_int8 ? GROUP : T::GROUP);
#pragma omp parallel
    {
        Lines<int8_t> rounded(is_int8 ? PANEL * inputs : 0);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; panel++) {
            const void* rows[PANEL] = {};
            for (int j = 0; j < PANEL; j++) {
                const int64_t output = panel * PANEL + j;
                if (is_int8) linear.scales[output] = 0.0f, linear.starts[output] = 0;
                if (output >= linear.outputs) continue;
                const Value* from = weight + row_of(linear, output) * inputs;
                rows[j] = from;
                if (!is_int8) continue;
                int8_t* to = rounded.data() + j * inputs;
                int32_t sum;
                round_weights<T>(from, inputs, to, &linear.scales[output], &sum);
                linear.starts[output] = -128 * sum;
                rows[j] = to;
            }
            lay_out(rows, words, static_cast<int32_t*>(linear.panels) + panel * words * PANEL);
        }
    }
}

}  // namespace

extern "C" void batchllm_pack(
    int32_t is_bfloat16, const PackedLinear* linear, const void* weight) {
    if (is_bfloat16)
        pack<Bfloat16>(*linear, static_cast<const uint16_t*>(weight));
    else
        pack<Float32>(*linear, static_cast<const float*>(weight));
}
