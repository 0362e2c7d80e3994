// Micro kernels of the linear layers: some rows of activations times some panels of weights.

#pragma once

#include <ATen/core/Tensor.h>
#include <immintrin.h>

#include <cstdint>

#include "simd.h"

namespace sluice::linear {

constexpr int kLanes = 16;       // outputs of a panel
constexpr int kBlockPanels = 4;  // panels that a thread takes at a time
constexpr int kMaxRows = 12;     // of a tile
constexpr int kAhead = 1536;     // bytes that a lone tile prefetches ahead in its own panels
constexpr int kBlock = kBlockPanels * kLanes;

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }

inline __m512 load16(const at::BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store16(float* p, __m512 v) { _mm512_storeu_ps(p, v); }

inline void store16(at::BFloat16* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}

// Rows of activations as 32-bit quanta; `stride` in quanta.
struct Rows {
  const int32_t* data;
  int64_t stride;
};

template <int R, int V>
void tile_bf16(Rows x, const char* w, const char* ahead, int64_t panel_bytes, float* sums) {
  const int64_t quanta = panel_bytes / 64;
  __m512 acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < quanta; ++k) {
    __m512bh b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      b[v] = (__m512bh)_mm512_loadu_si512(w + v * panel_bytes + k * 64);
      if (!ahead) _mm_prefetch(w + v * panel_bytes + k * 64 + kAhead, _MM_HINT_T0);
    }
    if (ahead) _mm_prefetch(ahead + k * 64, _MM_HINT_T1);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(x.data[r * x.stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + r * kBlock + v * kLanes, acc[r][v]);
}

template <int R, int V>
void tile_int8(Rows x, const char* w, const char* ahead, int64_t panel_bytes, float* sums) {
  const int64_t quanta = panel_bytes / 64;
  __m512i acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_si512();
  for (int64_t k = 0; k < quanta; ++k) {
    __m512i b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      b[v] = _mm512_loadu_si512(w + v * panel_bytes + k * 64);
      if (!ahead) _mm_prefetch(w + v * panel_bytes + k * 64 + kAhead, _MM_HINT_T0);
    }
    if (ahead) _mm_prefetch(ahead + k * 64, _MM_HINT_T1);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_set1_epi32(x.data[r * x.stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_si512(sums + r * kBlock + v * kLanes, acc[r][v]);
}

// What the product in groups needs besides the codes.
struct Groups {
  const float* x_scales;         // [rows][count], of the activations
  const float* x_sums;           // [rows][count], scale times the sum of the codes
  const at::BFloat16* w_scales;  // [panel][count][16]
  const uint8_t* w_zeros;        // likewise, the code that means 0
  int64_t count;
  int64_t quanta;  // of a group
};

template <int R, int V>
void tile_int4(Rows x, const char* w, int64_t panel_bytes, const Groups& g, float* sums) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 total[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[r][v] = _mm512_setzero_ps();
  for (int64_t group = 0; group < g.count; ++group) {
    __m512i acc[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_si512();
    const char* codes = w + group * g.quanta * 64;
    const int32_t* activations = x.data + group * g.quanta * 2;
    for (int64_t k = 0; k < g.quanta; ++k) {
      __m512i low[V], high[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const char* at = codes + v * panel_bytes + k * 64;
        const __m512i both = _mm512_loadu_si512(at);
        _mm_prefetch(at + kAhead, _MM_HINT_T0);
        low[v] = _mm512_and_si512(both, nibble);
        high[v] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const int32_t* a = activations + r * x.stride + 2 * k;
        const __m512i first = _mm512_set1_epi32(a[0]), last = _mm512_set1_epi32(a[1]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], low[v], first);
          acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], high[v], last);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = (v * g.count + group) * kLanes;
      const __m512 scale = load16(g.w_scales + at);
      const __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(g.w_zeros + at));
      const __m512 zero = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros)));
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512 scaled = _mm512_mul_ps(scale, _mm512_set1_ps(g.x_scales[r * g.count + group]));
        total[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][v]), scaled, total[r][v]);
        total[r][v] =
            _mm512_fnmadd_ps(zero, _mm512_set1_ps(g.x_sums[r * g.count + group]), total[r][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(sums + r * kBlock + v * kLanes, total[r][v]);
}

using Tile = void (*)(Rows, const char*, const char*, int64_t, float*);
using Int4Tile = void (*)(Rows, const char*, int64_t, const Groups&, float*);

// How many panels a tile of so many rows takes at once, as the 32 registers allow.
constexpr int panels_at_once(int64_t rows) { return rows <= 6 ? 4 : 2; }
constexpr int int4_panels_at_once(int64_t rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

// By rows, of 4 panels and of 2. Tiles of one product differ by one row and share their panels, so
// there are 6 rows of either kind.
#define SLUICE_TILES(kernel)                                               \
  {kernel<1, 4>,  kernel<2, 4>,  kernel<3, 4>, kernel<4, 4>, kernel<5, 4>, \
   kernel<6, 4>,  kernel<6, 2>,  kernel<7, 2>, kernel<8, 2>, kernel<9, 2>, \
   kernel<10, 2>, kernel<11, 2>, kernel<12, 2>}

constexpr Tile kBf16Tiles[kMaxRows + 1] = SLUICE_TILES(tile_bf16);
constexpr Tile kInt8Tiles[kMaxRows + 1] = SLUICE_TILES(tile_int8);

inline Tile tile_of(const Tile* kernels, int64_t rows, int panels) {
  return kernels[panels == 4 ? rows - 1 : rows];
}

constexpr Int4Tile kInt4Tiles[kMaxRows] = {tile_int4<1, 4>,  tile_int4<2, 4>,  tile_int4<3, 4>,
                                           tile_int4<4, 2>,  tile_int4<5, 2>,  tile_int4<6, 2>,
                                           tile_int4<7, 1>,  tile_int4<8, 1>,  tile_int4<9, 1>,
                                           tile_int4<10, 1>, tile_int4<11, 1>, tile_int4<12, 1>};

}  // namespace sluice::linear
