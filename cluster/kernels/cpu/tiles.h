// Tiles of keys, values and queries as units, and the product of two of them.
//
// `Dot` says what a unit is. With FloatDot (PAIR = 1) it is one float; with PairDot (PAIR = 2) two
// bfloat16 that vdpbf16ps multiplies and adds to a float.
//
//     keys     K_packed[dim / PAIR][key]   lane = key, so that a score needs no horizontal sum
//     values   V_packed[key / PAIR][dim]   lane = dim
//     queries  [row][dim / PAIR], probabilities [row][key / PAIR]

#pragma once

#include "simd.h"

namespace sluice {

constexpr int TILE_KEYS = 64;  // keys that are packed at once: with their values half of L1
constexpr int BLOCK_ROWS = 6;  // rows of a register block
#if defined(__AVX512F__)
constexpr int BLOCK_VECTORS = 4;  // columns of a register block: 24 of 32 registers accumulate
#else
constexpr int BLOCK_VECTORS = 2;  // 12 of 16
#endif

// Rows of the tile to come, asked for from memory one by one while this tile is computed: in a burst
// they would hold the core up. `next` may stand behind the last one.
struct Prefetch {
  const void** next = nullptr;
  const void** end = nullptr;
  int row_bytes = 0;

  void one() {
    if (next == end) return;
    const char* row = static_cast<const char*>(*next++);
    for (int b = 0; b < row_bytes; b += 64) _mm_prefetch(row + b, _MM_HINT_T0);
  }
};

inline int rounded_up(int n, int step) { return (n + step - 1) / step * step; }

struct FloatDot {
  static constexpr int PAIR = 1;
  static Floats add(Floats sum, Units a, Units b) { return fma(as_floats(a), as_floats(b), sum); }
  template <class T>
  static Units load_units(const T* p, int count) {
    return as_units(load_floats(p, count));
  }
  static void store_probabilities(uint32_t* p, const float* x, int count) {
    for (int i = 0; i < count; i += LANES) store(p + i, as_units(load(x + i)));
  }
  // Units of up to LANES dims of one key (PAIR = 1): `odd` does not exist.
  static void store_values(uint32_t* p, Units even, Units) { store(p, even); }
};

#if defined(__AVX512BF16__)
struct PairDot {
  static constexpr int PAIR = 2;
  static Floats add(Floats sum, Units a, Units b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static Units load_units(const bf16_t* p, int count) {
    return _mm512_maskz_loadu_epi16(below(count), p);
  }
  static Units load_units(const int8_t* p, int count) {  // every int8 is a bfloat16
    const __m256i x = _mm256_maskz_loadu_epi8(below(count), p);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(x)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1)));
    return reinterpret_cast<Units>(_mm512_cvtne2ps_pbh(high, low));
  }
  static void store_probabilities(uint32_t* p, const float* x, int count) {
    for (int i = 0; i < count; i += 2 * LANES) {
      const auto pairs = _mm512_cvtne2ps_pbh(load(x + i + LANES), load(x + i));
      store(p + i / 2, reinterpret_cast<Units>(pairs));
    }
  }
  // 32 dims of two keys, one key after the other, become 32 pairs of keys.
  static void store_values(uint32_t* p, Units even, Units odd) {
    const __m512i step = _mm512_set1_epi32(0x00010001);
    const __m512i first = _mm512_set_epi32(
        0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a, 0x00290009,
        0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004, 0x00230003, 0x00220002,
        0x00210001, 0x00200000);
    const __m512i second = _mm512_add_epi16(first, _mm512_slli_epi16(step, 4));
    store(p, _mm512_permutex2var_epi16(even, first, odd));
    store(p + LANES, _mm512_permutex2var_epi16(even, second, odd));
  }

 private:
  static __mmask32 below(int count) {
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1;
  }
};
#endif

// Rows of units become columns: x[i] lane j and x[j] lane i change places.
inline void transpose(Units x[LANES]) {
#if defined(__AVX512F__)
  Units t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
#else
  Units t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) x[i] = t[i];
#endif
}

template <class T>
const T* row(const void* const* rows, int i) {
  return static_cast<const T*>(rows[i]);
}

// Pack `count` keys of `dim` numbers at rows[i]; what is beyond `count` is zero and is not read.
template <class Dot, class T>
void pack_keys(const void* const* rows, int count, int dim, uint32_t* packed, Prefetch& ahead) {
  constexpr int STEP = LANES * Dot::PAIR;
  for (int key = 0; key < count; key += LANES) {
    for (int d = 0; d < dim; d += STEP) {
      Units x[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        x[i] = key + i < count ? Dot::load_units(row<T>(rows, key + i) + d, dim - d) : all(0u);
      }
      for (int i = 0; i < 4; ++i) ahead.one();
      transpose(x);
      uint32_t* to = packed + d / Dot::PAIR * TILE_KEYS + key;
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(to + i * TILE_KEYS, x[i]);
    }
  }
}

template <class Dot, class T>
void pack_values(const void* const* rows, int count, int dim, int row_units, uint32_t* packed,
                 Prefetch& ahead) {
  constexpr int STEP = LANES * Dot::PAIR;
  for (int key = 0; key < count; key += Dot::PAIR, packed += row_units) {
    ahead.one();
    for (int d = 0; d < dim; d += STEP) {
      const Units even = Dot::load_units(row<T>(rows, key) + d, dim - d);
      const bool has_odd = Dot::PAIR == 2 && key + 1 < count;
      const Units odd = has_odd ? Dot::load_units(row<T>(rows, key + 1) + d, dim - d) : all(0u);
      Dot::store_values(packed + d, even, odd);
    }
  }
}

template <class Dot, int ROWS, int VECTORS>
void product_block(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
                   float* c, int c_stride, const float* factors, Prefetch& prefetch) {
  Prefetch ahead = prefetch;  // in registers
  Floats sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      sum[r][v] = factors ? load(c + r * c_stride + v * LANES) * all(factors[r]) : all(0.0f);
    }
  }
  for (int d = 0; d < depth; ++d) {
    ahead.one();
    Units column[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) column[v] = load(b + d * b_stride + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Units x = all(a[r * a_stride + d]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = Dot::add(sum[r][v], x, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(c + r * c_stride + v * LANES, sum[r][v]);
  }
  prefetch = ahead;
}

// c = c * factors (per row; zero without) + a b, for ROWS rows and `vectors` * LANES columns.
template <class Dot, int ROWS>
void product_rows(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
                  int vectors, float* c, int c_stride, const float* factors, Prefetch& ahead) {
  int v = 0;
  const auto run = [&](auto size) {
    constexpr int SIZE = decltype(size)::value;
    for (; v + SIZE <= vectors; v += SIZE) {
      product_block<Dot, ROWS, SIZE>(a, a_stride, b + v * LANES, b_stride, depth, c + v * LANES,
                                     c_stride, factors, ahead);
    }
  };
  if constexpr (BLOCK_VECTORS == 4) run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

template <class Dot>
void product(int rows, const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
             int vectors, float* c, int c_stride, const float* factors, Prefetch& ahead) {
  switch (rows) {
#define SLUICE_ROWS(N)                                                                       \
  case N:                                                                                    \
    return product_rows<Dot, N>(a, a_stride, b, b_stride, depth, vectors, c, c_stride, factors, \
                                ahead);
    SLUICE_ROWS(1)
    SLUICE_ROWS(2)
    SLUICE_ROWS(3)
    SLUICE_ROWS(4)
    SLUICE_ROWS(5)
    SLUICE_ROWS(6)
#undef SLUICE_ROWS
  }
}

}  // namespace sluice
