// Matrix tiles (AMX): eight registers of 16 rows of 64 bytes, and products between them.
//
// Not the intrinsics: GCC 12's do not tell the compiler that a tile is read from memory.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) || defined(BATCHLLM_EMULATED_TILES)
#define BATCHLLM_TILES 1

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;
static_assert(TILE_BYTES / 4 == W, "a tile's row is a vector");

// How many rows tiles have: sums 0 and 1, sums 2 and 3, operands 4 and 5; 6 and 7 have all sixteen.
struct alignas(64) TileShape {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileShape(int first_sums, int second_sums, int fourth, int fifth) {
        const int all[8] = {first_sums, first_sums, second_sums, second_sums,
                            fourth,     fifth,      TILE_ROWS,   TILE_ROWS};
        for (int t = 0; t < 8; t++) {
            row_bytes[t] = TILE_BYTES;
            rows[t] = uint8_t(all[t]);
        }
    }
};

#if defined(BATCHLLM_EMULATED_TILES)
#include "tiles_emulated.h"
#else
#include <sys/syscall.h>
#include <unistd.h>

// Sets the tiles of this thread to zero and gives them their shape.
INLINE void shape_tiles(const TileShape& shape) { asm volatile("ldtilecfg %0" ::"m"(shape)); }

INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int T>
INLINE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// `stride`: bytes from row to row.
template <int T>
INLINE void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

// The same where what is read should not displace what else is in the first-level cache.
template <int T>
INLINE void load_tile_once(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
INLINE void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// Tile SUM += tile A . tile B, pairs of bfloat16 in each word.
template <int SUM, int A, int B>
INLINE void multiply_bfloat16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

// Four unsigned bytes in each word of A, four signed in each of B.
template <int SUM, int A, int B>
INLINE void multiply_bytes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

// Four signed bytes in each word of A and of B.
template <int SUM, int A, int B>
INLINE void multiply_signed_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

// Linux lets a process use tiles once it has asked (since 5.16); its threads may, too.
inline bool may_use_tiles() {
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#endif
#else
inline bool may_use_tiles() { return true; }  // there are none to be used
#endif
