// Linear layers on weights packed once: bf16, int8 and int4, for AVX-512 with BF16 and VNNI.
//
//   y[T, O] = x[T, I] w[O, I]^T          one packed layout for one token and for a thousand
//
// Packed weights are panels of 16 outputs. Within a panel lie, for one quantum of inputs after the
// other, the 16 outputs side by side: one 64-byte load feeds one dot-product instruction.
//
//   bf16   [panel][I / 2][16][2]      vdpbf16ps    2 inputs in a quantum
//   int8   [panel][I / 4][16][4]      vpdpbusd     4 inputs
//   int4   [panel][I / 8][16][4]      vpdpbusd     low nibbles: the first 4 of 8 inputs, high: the
//   last
//
// A micro kernel multiplies a tile of R rows with V panels and leaves fp32 sums in a small buffer;
// the epilogue scales, adds bias and residual, or joins gate and up, and writes. Threads share the
// panels. Memory is read once: where several tiles follow each other on the same panels, the second
// finds them in L2, and each prefetches a part of the next panels, so that memory never idles (INT4
// has a quarter of the bytes, and only prefetches within a panel).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "linear_rows.h"

namespace {

using at::Tensor;
using namespace sluice::linear;

// ---- the loop over panels ---------------------------------------------------------------------

// The rows of a product, cut into as few tiles as possible that differ by one row at most. Tiles of
// 12 rows read each panel least often, tiles of 6 come closest to the peak: many rows take those.
struct Tiling {
  int64_t rows;
  int64_t tiles;

  Tiling(int64_t rows, int64_t most) : rows(rows), tiles((rows + most - 1) / most) {}
  int64_t begin(int64_t tile) const { return rows / tiles * tile + std::min(tile, rows % tiles); }
};

// Calls body(first panel, panels, first panel of this thread's next turn) for every block of
// panels.
template <typename Body>
void for_each_block(int64_t panels, const Body& body) {
  const int64_t blocks = panels / kBlockPanels;
  std::atomic<int64_t> next{0};
  const int threads = static_cast<int>(std::min<int64_t>(at::get_num_threads(), blocks));
#pragma omp parallel num_threads(threads)
  {
    for (int64_t block = next++; block < blocks;) {
      const int64_t following = next++;
      body(block * kBlockPanels, std::min(following, blocks - 1) * kBlockPanels);
      block = following;
    }
  }
}

template <typename Out>
void multiply(const Tile* kernels, Rows x, int64_t rows, const Tensor& packed,
              const Epilogue& epilogue, Out* out) {
  const char* w = static_cast<const char*>(packed.const_data_ptr());
  const int64_t panel_bytes = packed.size(1) * 64;
  const Tiling tiling(rows, rows <= 2 * kMaxRows ? kMaxRows : kMaxRows / 2);
  const int at_once = panels_at_once(tiling.begin(1));
  for_each_block(packed.size(0), [&](int64_t first, int64_t following) {
    alignas(64) float sums[kMaxRows * kBlock];
    for (int64_t p = 0; p < kBlockPanels; p += at_once) {
      const char* panel = w + (first + p) * panel_bytes;
      const char* after =
          p + at_once < kBlockPanels ? panel + at_once * panel_bytes : w + following * panel_bytes;
      for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
        const int64_t begin = tiling.begin(tile), count = tiling.begin(tile + 1) - begin;
        const char* ahead = tiling.tiles == 1
                                ? nullptr
                                : after + std::min<int64_t>(tile, at_once - 1) * panel_bytes;
        tile_of(kernels, count, at_once)(Rows{x.data + begin * x.stride, x.stride}, panel, ahead,
                                         panel_bytes, sums);
        for (int64_t r = 0; r < count; ++r) {
          write_row(epilogue, sums + r * kBlock, begin + r, (first + p) * kLanes, at_once * kLanes,
                    out);
        }
      }
    }
  });
}

template <typename Out>
void multiply_int4(Rows x, int64_t rows, const Tensor& packed, const Groups& groups,
                   const Epilogue& epilogue, Out* out) {
  const char* w = static_cast<const char*>(packed.const_data_ptr());
  const int64_t panel_bytes = groups.count * groups.quanta * 64;
  const Tiling tiling(rows, kMaxRows);
  for_each_block(packed.size(0), [&](int64_t first, int64_t) {
    alignas(64) float sums[kMaxRows * kBlock];
    for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
      const int64_t begin = tiling.begin(tile), count = tiling.begin(tile + 1) - begin;
      for (int64_t p = 0; p < kBlockPanels; p += int4_panels_at_once(count)) {
        Groups mine = groups;
        mine.x_scales += begin * groups.count;
        mine.x_sums += begin * groups.count;
        mine.w_scales += (first + p) * groups.count * kLanes;
        mine.w_zeros += (first + p) * groups.count * kLanes;
        kInt4Tiles[count - 1](Rows{x.data + begin * x.stride, x.stride},
                              w + (first + p) * panel_bytes, panel_bytes, mine, sums + p * kLanes);
      }
      for (int64_t r = 0; r < count; ++r) {
        write_row(epilogue, sums + r * kBlock, begin + r, first * kLanes, kBlock, out);
      }
    }
  });
}

// ---- operators --------------------------------------------------------------------------------

// Large pages for what is read as one long stream: fewer page walks, about 7 % at one token.
void advise_large_pages(const Tensor& tensor) {
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + tensor.nbytes()) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

int64_t padded_panels(int64_t outputs) { return (outputs + kBlock - 1) / kBlock * kBlockPanels; }

// [O, I] of `quantum` elements of T in 4 bytes -> [panels][I / quantum][16][quantum]; padding is 0.
template <typename T, int quantum>
Tensor pack(const Tensor& w_OI) {
  TORCH_CHECK(w_OI.dim() == 2 && w_OI.stride(1) == 1,
              "weights must be [outputs, inputs], rows dense");
  const int64_t outputs = w_OI.size(0), quanta = w_OI.size(1) / quantum;
  TORCH_CHECK(w_OI.size(1) % kLanes == 0, "inputs=", w_OI.size(1), " must be a multiple of 16");
  const int64_t panels = padded_panels(outputs);
  Tensor packed = at::empty({panels, quanta, kLanes, quantum}, w_OI.options());
  advise_large_pages(packed);
  const char* from = static_cast<const char*>(w_OI.const_data_ptr());
  int32_t* to = static_cast<int32_t*>(packed.mutable_data_ptr());
  const int64_t row_bytes = w_OI.stride(0) * sizeof(T);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t row = panel * kLanes + lane;
        int32_t* column = to + panel * quanta * kLanes + lane;
        const int32_t* source = reinterpret_cast<const int32_t*>(from + row * row_bytes);
        for (int64_t k = 0; k < quanta; ++k) column[k * kLanes] = row < outputs ? source[k] : 0;
      }
    }
  });
  return packed;
}

Tensor pack_bf16(const Tensor& w_OI) {
  TORCH_CHECK(w_OI.scalar_type() == at::kBFloat16, "weights must be bfloat16");
  return pack<at::BFloat16, 2>(w_OI);
}

Tensor pack_int8(const Tensor& codes_OI) {
  TORCH_CHECK(codes_OI.scalar_type() == at::kChar, "codes must be int8");
  return pack<int8_t, 4>(codes_OI);
}

// Codes 0 to 15, one in a byte: two quanta of 4 share the bytes of one.
Tensor pack_int4(const Tensor& codes_OI) {
  TORCH_CHECK(codes_OI.scalar_type() == at::kByte, "codes must be uint8");
  const Tensor wide = pack<uint8_t, 4>(codes_OI);
  const int64_t panels = wide.size(0), quanta = wide.size(1) / 2;
  Tensor packed = at::empty({panels, quanta, kLanes, 4}, wide.options());
  advise_large_pages(packed);
  const uint8_t* from = wide.const_data_ptr<uint8_t>();
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, panels * quanta, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t byte = 0; byte < 64; ++byte) {
        to[i * 64 + byte] = from[i * 128 + byte] | from[i * 128 + 64 + byte] << 4;
      }
    }
  });
  return packed;
}

struct Call {
  int64_t rows;
  int64_t inputs;
  Epilogue epilogue;
  Tensor out;
};

Call begin_call(const Tensor& x_TI, const Tensor& packed, int64_t inputs, int64_t outputs,
                const std::optional<Tensor>& bias_O, const std::optional<Tensor>& residual_TO,
                int64_t join) {
  TORCH_CHECK(x_TI.dim() == 2 && x_TI.size(1) == inputs && x_TI.stride(1) == 1,
              "activations must be [tokens, ", inputs, "], rows dense, not ", x_TI.sizes());
  TORCH_CHECK(packed.is_contiguous() && packed.size(0) == padded_panels(outputs),
              "foreign weights");
  Call call{x_TI.size(0), inputs, {}, {}};
  Epilogue& e = call.epilogue;
  e.outputs = outputs;
  e.join = static_cast<Join>(join);
  const int64_t width = e.join == Join::kSiluMul ? outputs / 2 : outputs;
  TORCH_CHECK(e.join == Join::kNone || (outputs % 32 == 0 && !residual_TO), "join of a bad width");
  call.out = at::empty({call.rows, width}, x_TI.options());
  if (bias_O) {
    TORCH_CHECK(bias_O->scalar_type() == at::kFloat && bias_O->is_contiguous() &&
                    bias_O->numel() == packed.size(0) * kLanes,
                "bias must be float32, padded as the weights are");
    e.bias = bias_O->const_data_ptr<float>();
  }
  if (residual_TO) {
    TORCH_CHECK(residual_TO->sizes() == call.out.sizes() && residual_TO->is_contiguous() &&
                    residual_TO->scalar_type() == x_TI.scalar_type(),
                "residual must be like the output");
    e.residual = residual_TO->const_data_ptr();
  }
  return call;
}

Tensor linear_bf16(const Tensor& x_TI, const Tensor& packed, int64_t outputs,
                   const std::optional<Tensor>& bias_O, const std::optional<Tensor>& residual_TO,
                   int64_t join) {
  const int64_t quanta = packed.size(1);
  TORCH_CHECK(x_TI.scalar_type() == at::kBFloat16 && x_TI.stride(0) % 2 == 0, "bfloat16 only");
  Call call = begin_call(x_TI, packed, quanta * 2, outputs, bias_O, residual_TO, join);
  if (call.rows == 0) return call.out;
  const Rows x{static_cast<const int32_t*>(x_TI.const_data_ptr()), x_TI.stride(0) / 2};
  multiply(kBf16Tiles, x, call.rows, packed, call.epilogue,
           call.out.mutable_data_ptr<at::BFloat16>());
  return call.out;
}

template <typename T>
QuantizedRows quantize_rows(const Tensor& x_TI, int64_t group, int8_t offset) {
  const int64_t rows = x_TI.size(0), inputs = x_TI.size(1), groups = inputs / group;
  QuantizedRows q;
  q.codes = std::make_unique_for_overwrite<int8_t[]>(rows * inputs);
  q.scales = std::make_unique_for_overwrite<float[]>(rows * groups);
  q.sums = std::make_unique_for_overwrite<float[]>(rows * groups);
  const T* x = x_TI.const_data_ptr<T>();
  const int64_t stride = x_TI.stride(0);
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        quantize_group(x + row * stride + g * group, group, offset,
                       &q.codes[row * inputs + g * group], &q.scales[row * groups + g],
                       &q.sums[row * groups + g]);
      }
    }
  });
  return q;
}

QuantizedRows quantize_activations(const Tensor& x_TI, int64_t group, int8_t offset) {
  if (x_TI.scalar_type() == at::kFloat) return quantize_rows<float>(x_TI, group, offset);
  TORCH_CHECK(x_TI.scalar_type() == at::kBFloat16, "activations must be float32 or bfloat16");
  return quantize_rows<at::BFloat16>(x_TI, group, offset);
}

Rows rows_of(const QuantizedRows& q, int64_t inputs) {
  return {reinterpret_cast<const int32_t*>(q.codes.get()), inputs / 4};
}

Tensor linear_int8(const Tensor& x_TI, const Tensor& packed, const Tensor& scales_O,
                   const Tensor& sums_O, int64_t outputs, const std::optional<Tensor>& bias_O,
                   const std::optional<Tensor>& residual_TO, int64_t join) {
  const int64_t quanta = packed.size(1);
  Call call = begin_call(x_TI, packed, quanta * 4, outputs, bias_O, residual_TO, join);
  if (call.rows == 0) return call.out;
  TORCH_CHECK(scales_O.numel() == packed.size(0) * kLanes && sums_O.numel() == scales_O.numel(),
              "scales and sums must be padded as the weights are");
  // vpdpbusd takes unsigned by signed: activations move up by 128, the epilogue takes it off again.
  const QuantizedRows q = quantize_activations(x_TI, call.inputs, -128);
  call.epilogue.w_scales = scales_O.const_data_ptr<float>();
  call.epilogue.w_sums = sums_O.const_data_ptr<int32_t>();
  call.epilogue.x_scales = q.scales.get();
  const Rows x = rows_of(q, call.inputs);
  if (x_TI.scalar_type() == at::kFloat) {
    multiply(kInt8Tiles, x, call.rows, packed, call.epilogue, call.out.mutable_data_ptr<float>());
  } else {
    multiply(kInt8Tiles, x, call.rows, packed, call.epilogue,
             call.out.mutable_data_ptr<at::BFloat16>());
  }
  return call.out;
}

Tensor linear_int4(const Tensor& x_TI, const Tensor& packed, const Tensor& scales_PG16,
                   const Tensor& zeros_PG16, int64_t outputs, const std::optional<Tensor>& bias_O,
                   const std::optional<Tensor>& residual_TO, int64_t join) {
  const int64_t inputs = packed.size(1) * 8, count = scales_PG16.size(1);
  Call call = begin_call(x_TI, packed, inputs, outputs, bias_O, residual_TO, join);
  if (call.rows == 0) return call.out;
  TORCH_CHECK(scales_PG16.is_contiguous() && scales_PG16.size(0) == packed.size(0) &&
                  scales_PG16.size(2) == kLanes && zeros_PG16.sizes() == scales_PG16.sizes() &&
                  zeros_PG16.is_contiguous() && inputs % count == 0 && inputs / count % 16 == 0,
              "scales and zeros must be [panels, groups, 16], bfloat16 and uint8");
  const int64_t group = inputs / count;
  const QuantizedRows q = quantize_activations(x_TI, group, 0);
  const Groups groups{q.scales.get(),
                      q.sums.get(),
                      scales_PG16.const_data_ptr<at::BFloat16>(),
                      zeros_PG16.const_data_ptr<uint8_t>(),
                      count,
                      group / 8};
  const Rows x = rows_of(q, inputs);
  if (x_TI.scalar_type() == at::kFloat) {
    multiply_int4(x, call.rows, packed, groups, call.epilogue, call.out.mutable_data_ptr<float>());
  } else {
    multiply_int4(x, call.rows, packed, groups, call.epilogue,
                  call.out.mutable_data_ptr<at::BFloat16>());
  }
  return call.out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sluice, m) {
  m.def("pack_bf16(Tensor w_OI) -> Tensor", pack_bf16);
  m.def("pack_int8(Tensor codes_OI) -> Tensor", pack_int8);
  m.def("pack_int4(Tensor codes_OI) -> Tensor", pack_int4);
  m.def(
      "linear_bf16(Tensor x_TI, Tensor packed, int outputs, Tensor? bias_O, Tensor? residual_TO, "
      "int join) -> Tensor",
      linear_bf16);
  m.def(
      "linear_int8(Tensor x_TI, Tensor packed, Tensor scales_O, Tensor sums_O, int outputs, "
      "Tensor? bias_O, Tensor? residual_TO, int join) -> Tensor",
      linear_int8);
  m.def(
      "linear_int4(Tensor x_TI, Tensor packed, Tensor scales_PG16, Tensor zeros_PG16, "
      "int outputs, Tensor? bias_O, Tensor? residual_TO, int join) -> Tensor",
      linear_int4);
}

#endif
