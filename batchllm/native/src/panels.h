// How a weight lies for its products: in panels of PANEL outputs, of each [inputs / GROUP][PANEL]
// words of GROUP inputs, zeros behind the last output.
#pragma once

#include "simd.h"
#include "tiles.h"

#if !defined(BATCHLLM_TILES) && defined(__AVX512F__)
constexpr int LINEAR_COLUMNS = 3;  // vectors of a panel
#else
constexpr int LINEAR_COLUMNS = 2;
#endif
constexpr int PANEL = LINEAR_COLUMNS * W;
