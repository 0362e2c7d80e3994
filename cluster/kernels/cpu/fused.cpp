// What a transformer layer does between its products, each in one pass over the activations.
//
// Written as plain loops over floats for the compiler to vectorize: any instruction set, float32
// and bfloat16. Sums are in float32.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>

namespace {

using at::Tensor;

constexpr int64_t kRowsPerTask = 8;  // fewer rows than that are not worth waking a thread

inline float to_float(float x) { return x; }

inline float to_float(at::BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline at::BFloat16 from_float<at::BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // A NaN whose payload lies in the lower half must stay one.
  const uint32_t quiet = (bits >> 16) | 0x40;
  return at::BFloat16(static_cast<uint16_t>(x != x ? quiet : rounded), at::BFloat16::from_bits());
}

template <typename T>
void normalize(const T* x, const T* weight, int64_t size, float eps, T* out) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += to_float(x[i]) * to_float(x[i]);
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    out[i] = from_float<T>(to_float(weight[i]) * (to_float(x[i]) * scale));
  }
}

template <typename T>
void rms_norm_rows(const Tensor& x_TD, const Tensor& weight_D, float eps, Tensor& out_TD) {
  const int64_t size = x_TD.size(1);
  const T* x = x_TD.const_data_ptr<T>();
  const T* weight = weight_D.const_data_ptr<T>();
  T* out = out_TD.mutable_data_ptr<T>();
  at::parallel_for(0, x_TD.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      normalize(x + t * size, weight, size, eps, out + t * size);
  });
}

Tensor rms_norm(const Tensor& x_TD, const Tensor& weight_D, double eps) {
  TORCH_CHECK(x_TD.dim() == 2 && x_TD.is_contiguous() && weight_D.is_contiguous() &&
                  weight_D.numel() == x_TD.size(1) && weight_D.scalar_type() == x_TD.scalar_type(),
              "rms_norm: x [T, D] dense, weight [D] of the same dtype");
  Tensor out_TD = at::empty(x_TD.sizes(), x_TD.options());
  if (x_TD.scalar_type() == at::kFloat) {
    rms_norm_rows<float>(x_TD, weight_D, eps, out_TD);
  } else {
    TORCH_CHECK(x_TD.scalar_type() == at::kBFloat16, "rms_norm: float32 or bfloat16");
    rms_norm_rows<at::BFloat16>(x_TD, weight_D, eps, out_TD);
  }
  return out_TD;
}

// Rotates the pairs (i, i + H / 2) of one head by the angles of its position.
template <typename T>
void rotate(T* head, const T* cos, const T* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(head[i]), b = to_float(head[i + half]);
    head[i] = from_float<T>(a * to_float(cos[i]) - b * to_float(sin[i]));
    head[i + half] = from_float<T>(b * to_float(cos[i + half]) + a * to_float(sin[i + half]));
  }
}

template <typename T>
void rotate_rows(Tensor& qkv, const Tensor& cos_TH, const Tensor& sin_TH, int64_t num_heads,
                 int64_t num_kv_heads, const std::optional<Tensor>& q_norm_H,
                 const std::optional<Tensor>& k_norm_H, float eps) {
  const int64_t head_dim = cos_TH.size(1), stride = qkv.stride(0);
  T* data = qkv.mutable_data_ptr<T>();
  const T* cos = cos_TH.const_data_ptr<T>();
  const T* sin = sin_TH.const_data_ptr<T>();
  const T* q_norm = q_norm_H ? q_norm_H->const_data_ptr<T>() : nullptr;
  const T* k_norm = k_norm_H ? k_norm_H->const_data_ptr<T>() : nullptr;
  at::parallel_for(0, qkv.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t n = 0; n < num_heads + num_kv_heads; ++n) {
        T* head = data + t * stride + n * head_dim;
        const T* norm = n < num_heads ? q_norm : k_norm;
        if (norm) normalize(head, norm, head_dim, eps, head);
        rotate(head, cos + t * head_dim, sin + t * head_dim, head_dim);
      }
    }
  });
}

void rope_(Tensor qkv, const Tensor& cos_TH, const Tensor& sin_TH, int64_t num_heads,
           int64_t num_kv_heads, const std::optional<Tensor>& q_norm_H,
           const std::optional<Tensor>& k_norm_H, double eps) {
  const auto dtype = qkv.scalar_type();
  TORCH_CHECK(qkv.dim() == 2 && qkv.stride(1) == 1 && cos_TH.is_contiguous() &&
                  sin_TH.is_contiguous() && cos_TH.sizes() == sin_TH.sizes() &&
                  cos_TH.size(0) == qkv.size(0) &&
                  (num_heads + num_kv_heads) * cos_TH.size(1) <= qkv.size(1) &&
                  cos_TH.scalar_type() == dtype && sin_TH.scalar_type() == dtype &&
                  (!q_norm_H || q_norm_H->scalar_type() == dtype) &&
                  (!k_norm_H || k_norm_H->scalar_type() == dtype),
              "rope_: rows of queries, keys and values; cos and sin [T, H] of the same dtype");
  if (dtype == at::kFloat) {
    rotate_rows<float>(qkv, cos_TH, sin_TH, num_heads, num_kv_heads, q_norm_H, k_norm_H, eps);
  } else {
    TORCH_CHECK(dtype == at::kBFloat16, "rope_: float32 or bfloat16");
    rotate_rows<at::BFloat16>(qkv, cos_TH, sin_TH, num_heads, num_kv_heads, q_norm_H, k_norm_H,
                              eps);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sluice, m) {
  m.def("rms_norm(Tensor x_TD, Tensor weight_D, float eps) -> Tensor", rms_norm);
  m.def(
      "rope_(Tensor(a!) qkv, Tensor cos_TH, Tensor sin_TH, int num_heads, int num_kv_heads, "
      "Tensor? q_norm_H, Tensor? k_norm_H, float eps) -> ()",
      rope_);
}
