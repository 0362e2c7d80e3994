// Before and after the products: activations in 8 bits, and what is done to the sums.

#pragma once

#include <algorithm>
#include <bit>
#include <memory>

#include "linear_tiles.h"

namespace sluice::linear {

enum class Join : int64_t { kNone = 0, kSiluMul = 1 };

// x / (1 + e^-x).
inline __m512 silu16(__m512 x) {
  const __m512 e = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// Codes of 8 bits, one scale per row (int8) or per row and group (int4): x = code * scale.
struct QuantizedRows {
  std::unique_ptr<int8_t[]> codes;
  std::unique_ptr<float[]> scales;
  std::unique_ptr<float[]> sums;  // scale times the sum of a group's codes
};

template <typename T>
void quantize_group(const T* x, int64_t size, int8_t offset, int8_t* codes, float* scale,
                    float* sum) {
  // As integers, magnitudes are in the same order, and NaN is above all: it becomes the scale.
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < size; i += kLanes) {
    most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(load16(x + i))));
  }
  const float peak = std::bit_cast<float>(_mm512_reduce_max_epu32(most));
  const float step = peak == 0 ? 1.0f : peak / 127.0f;
  const __m512 inverse = _mm512_set1_ps(1.0f / step);
  __m512i total = _mm512_setzero_si512();
  const __m128i shift = _mm_set1_epi8(offset);
  for (int64_t i = 0; i < size; i += kLanes) {
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(load16(x + i), inverse));
    total = _mm512_add_epi32(total, code);
    const __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(code), shift);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes);
  }
  *scale = step;
  *sum = step * static_cast<float>(_mm512_reduce_add_epi32(total));
}

struct Epilogue {
  const float* w_scales = nullptr;  // [O], int8
  const int32_t* w_sums = nullptr;  // [O], int8: 128 times the sum of a row's codes
  const float* x_scales = nullptr;  // [T], int8
  const float* bias = nullptr;      // [O]
  const void* residual = nullptr;   // [T, O] in the dtype of the output
  Join join = Join::kNone;
  int64_t outputs = 0;  // of the weights, padded rows excluded
};

// Writes the sums of one row and `width` outputs from `column` on, those that pad excluded.
template <typename Out>
void write_row(const Epilogue& e, const float* sums, int64_t row, int64_t column, int64_t width,
               Out* out) {
  const __m512 x_scale = _mm512_set1_ps(e.w_scales ? e.x_scales[row] : 0.0f);
  const auto product = [&](int64_t i) __attribute__((always_inline)) {
    __m512 y;
    if (e.w_scales) {
      const __m512i shift = _mm512_loadu_si512(e.w_sums + column + i);
      const __m512i whole = _mm512_sub_epi32(_mm512_loadu_si512(sums + i), shift);
      const __m512 scale = _mm512_mul_ps(load16(e.w_scales + column + i), x_scale);
      y = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale);
    } else {
      y = load16(sums + i);
    }
    return e.bias ? _mm512_add_ps(y, load16(e.bias + column + i)) : y;
  };
  const int64_t valid = std::min(width, e.outputs - column);
  if (e.join == Join::kSiluMul) {
    Out* to = out + row * (e.outputs / 2) + column / 2;
    for (int64_t i = 0; i < valid; i += 2 * kLanes) {
      store16(to + i / 2, _mm512_mul_ps(silu16(product(i)), product(i + kLanes)));
    }
    return;
  }
  Out* to = out + row * e.outputs + column;
  const Out* residual = static_cast<const Out*>(e.residual);
  if (residual) residual += row * e.outputs + column;
  int64_t i = 0;
  for (; i + kLanes <= valid; i += kLanes) {
    __m512 y = product(i);
    if (residual) y = _mm512_add_ps(y, load16(residual + i));
    store16(to + i, y);
  }
  if (i >= valid) return;
  alignas(64) float last[kLanes];
  store16(last, product(i));
  for (int64_t lane = 0; i < valid; ++i, ++lane) {
    to[i] = static_cast<Out>(last[lane] + (residual ? static_cast<float>(residual[i]) : 0.0f));
  }
}

}  // namespace sluice::linear
