// One vocabulary of vectors for AVX-512 and AVX2: `Floats` holds LANES floats, `Mask` says which.
//
// A *unit* is the 32 bits that one lane multiplies: a float, or a pair of bfloat16 where the CPU
// multiplies those (AVX-512 BF16). Matrices that are multiplied are made of units, so one
// micro-kernel serves both.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sluice {

using bf16_t = uint16_t;  // bits of a bfloat16

#if defined(__AVX512F__)
constexpr int LANES = 16;
using Floats = __m512;
using Units = __m512i;
using Mask = __mmask16;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float max_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline Floats where(Mask m, Floats x, Floats otherwise) {
  return _mm512_mask_blend_ps(m, otherwise, x);
}
inline Units load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint32_t* p, Units x) { _mm512_storeu_si512(p, x); }
inline Units all(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Units as_units(Floats x) { return _mm512_castps_si512(x); }
inline Floats as_floats(Units x) { return _mm512_castsi512_ps(x); }

// Lanes first <= i < last; the bounds may lie outside of the vector.
inline Mask lanes(int first, int last) {
  const auto below = [](int n) { return n <= 0 ? 0u : n >= LANES ? 0xffffu : (1u << n) - 1; };
  return static_cast<Mask>(below(last) & ~below(first));
}
#else
constexpr int LANES = 8;
using Floats = __m256;
using Units = __m256i;
using Mask = __m256i;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline float max_of(Floats x) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline float sum_of(Floats x) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline Floats where(Mask m, Floats x, Floats otherwise) {
  return _mm256_blendv_ps(otherwise, x, _mm256_castsi256_ps(m));
}
inline Units load(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store(uint32_t* p, Units x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline Units all(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Units as_units(Floats x) { return _mm256_castps_si256(x); }
inline Floats as_floats(Units x) { return _mm256_castsi256_ps(x); }

inline Mask lanes(int first, int last) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i is_below_last = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane), is_below_last);
}
#endif

inline float first_of(Floats x) { return x[0]; }

// 2^x to 1e-7, or to 1e-4 where bfloat16 comes of it; what underflows is zero or next to it.
// Coefficients: minimax of the relative error on [-1/2, 1/2].
template <bool IS_ROUGH = false>
Floats exp2(Floats x) {
#if defined(__AVX512F__)
  const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = _mm256_min_ps(_mm256_max_ps(x, all(-126.0f)), all(127.0f));
  const Floats whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  const Floats part = x - whole;
  Floats y;
  if constexpr (IS_ROUGH) {
    y = fma(part, all(5.5171669e-2f), all(2.4261113e-1f));
    y = fma(part, y, all(6.9326097e-1f));
    y = fma(part, y, all(9.9992806e-1f));
  } else {
    y = fma(part, all(1.3276472e-3f), all(9.6755419e-3f));
    y = fma(part, y, all(5.5507131e-2f));
    y = fma(part, y, all(2.4022120e-1f));
    y = fma(part, y, all(6.9314694e-1f));
    y = fma(part, y, all(1.0000001f));
  }
#if defined(__AVX512F__)
  return _mm512_scalef_ps(y, whole);
#else
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return y * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
#endif
}

inline Floats tanh(Floats x) {  // absolute error 1e-7
  const Floats e = exp2(x * all(2.0f * 1.44269504f));
  return all(1.0f) - all(2.0f) / (e + all(1.0f));
}

inline bf16_t to_bf16(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return static_cast<bf16_t>(bits >> 16 | 0x40);
  return static_cast<bf16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The LANES numbers at p as floats; of fewer, `count`, the rest is zero and is not read.
inline Floats load_floats(const float* p, int count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(lanes(0, count), p);
#else
  return _mm256_maskload_ps(p, lanes(0, count));
#endif
}

inline Floats load_floats(const bf16_t* p, int count) {
#if defined(__AVX512F__)
  const __m256i x = _mm256_maskz_loadu_epi16(lanes(0, count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
#else
  __m128i x = _mm_setzero_si128();
  if (count >= LANES) x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  else std::memcpy(&x, p, static_cast<size_t>(count) * sizeof(bf16_t));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
#endif
}

inline Floats load_floats(const int8_t* p, int count) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(0, count), p)));
#else
  __m128i x = _mm_setzero_si128();
  if (count >= LANES) x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  else std::memcpy(&x, p, static_cast<size_t>(count));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
#endif
}

// The first `count` lanes of x to p.
inline void store_floats(float* p, Floats x, int count) {
  if (count >= LANES) return store(p, x);
  float lane[LANES];
  store(lane, x);
  std::memcpy(p, lane, static_cast<size_t>(count) * sizeof(float));
}

inline void store_floats(bf16_t* p, Floats x, int count) {
#if defined(__AVX512BF16__)
  const __m256i y = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  _mm256_mask_storeu_epi16(p, lanes(0, count), y);
#else
  float lane[LANES];
  store(lane, x);
  for (int i = 0; i < (count < LANES ? count : LANES); ++i) p[i] = to_bf16(lane[i]);
#endif
}

}  // namespace sluice
