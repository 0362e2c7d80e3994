// Puts a step's keys and values into their slots of the paged cache, quantized where it is int8.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "simd.h"

namespace sluice {
namespace {

constexpr int64_t GRAIN_NUMBERS = 1 << 14;  // fewer per thread are not worth waking it

template <class T>
Floats magnitude(const T* x, int64_t count) {
  const Floats value = load_floats(x, static_cast<int>(std::min<int64_t>(count, LANES)));
  return max(value, all(0.0f) - value);
}

// Symmetric: scale = max|x| / 127, code = x / scale to nearest, ties to even. Zeros keep scale 0;
// what is not finite makes the scale NaN, so that it shows.
template <class T>
float quantize(const T* x, int64_t dim, int8_t* codes) {
  Floats highest = all(0.0f), poison = all(0.0f);  // x - x is 0 or NaN
  for (int64_t d = 0; d < dim; d += LANES) {
    const Floats value = magnitude(x + d, dim - d);
    highest = max(highest, value);
    poison = poison + (value - value);
  }
  const float scale = max_of(highest) / 127.0f + sum_of(poison);
  if (!(scale > 0)) {
    std::fill_n(codes, dim, int8_t{0});
    return scale;
  }
  for (int64_t d = 0; d < dim; d += LANES) {
    const int count = static_cast<int>(std::min<int64_t>(dim - d, LANES));
    float code[LANES];
    store(code, load_floats(x + d, count) / all(scale));
    for (int i = 0; i < count; ++i) codes[d + i] = static_cast<int8_t>(std::nearbyint(code[i]));
  }
  return scale;
}

template <class T>
void write(const at::Tensor& cache, const std::optional<at::Tensor>& scales, const at::Tensor& x,
           const at::Tensor& slots_T) {
  const int64_t heads = cache.size(2), dim = cache.size(3);
  const int64_t token_stride = x.stride(0), head_stride = x.stride(1);
  const int64_t* slots = slots_T.const_data_ptr<int64_t>();
  const T* from = static_cast<const T*>(x.const_data_ptr());
  void* const to = cache.mutable_data_ptr();
  float* const to_scales = scales ? scales->mutable_data_ptr<float>() : nullptr;
  const int64_t grain = std::max<int64_t>(1, GRAIN_NUMBERS / (heads * dim));
  at::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t head = 0; head < heads; ++head) {
        const T* row = from + t * token_stride + head * head_stride;
        const int64_t target = slots[t] * heads + head;
        if (to_scales) {
          to_scales[target] = quantize(row, dim, static_cast<int8_t*>(to) + target * dim);
        } else {
          std::copy_n(row, dim, static_cast<T*>(to) + target * dim);
        }
      }
    }
  });
}

void write_one(const at::Tensor& cache, const std::optional<at::Tensor>& scales,
               const at::Tensor& x, const at::Tensor& slots) {
  TORCH_CHECK(cache.is_contiguous() && x.dim() == 3 && x.stride(2) == 1 &&
                  x.size(0) == slots.size(0) && x.size(1) == cache.size(2) &&
                  x.size(2) == cache.size(3),
              "rows ", x.sizes(), " do not fit a cache ", cache.sizes());
  TORCH_CHECK(cache.scalar_type() == (scales ? at::kChar : x.scalar_type()),
              "the cache holds the dtype of the rows, or int8 with scales");
  if (x.scalar_type() == at::kBFloat16) {
    write<bf16_t>(cache, scales, x, slots);
  } else {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "rows of ", x.scalar_type());
    write<float>(cache, scales, x, slots);
  }
}

void write_kv(const at::Tensor& keys, const at::Tensor& values,
              const std::optional<at::Tensor>& key_scales,
              const std::optional<at::Tensor>& value_scales, const at::Tensor& k,
              const at::Tensor& v, const at::Tensor& slots) {
  write_one(keys, key_scales, k, slots);
  write_one(values, value_scales, v, slots);
}

}  // namespace
}  // namespace sluice

TORCH_LIBRARY_FRAGMENT(sluice, m) {
  m.def(
      "write_kv(Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? key_scales, Tensor(d!)? "
      "value_scales, Tensor k, Tensor v, Tensor slots) -> ()");
}

TORCH_LIBRARY_IMPL(sluice, CPU, m) { m.impl("write_kv", sluice::write_kv); }
