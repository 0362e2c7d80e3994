// Attention over the paged KV cache: decode and chunks of prompts, one kernel.
//
// An item (schedule.h) goes through its keys in tiles and keeps, per row (a query token's head), the
// running maximum, the sum and the weighted values of the online softmax (Milakov & Gimelshein 2018;
// Dao et al., FlashAttention, 2022). Parts of one context are merged at the end. Slots that hold no
// token of the sequence are never read. Shape suffixes: reference.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <optional>
#include <type_traits>

#include "paged_cache.h"
#include "schedule.h"
#include "tiles.h"

namespace sluice {
namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr float NOTHING_SEEN = -1e30f;  // a maximum below every score, yet finite
constexpr int64_t PARALLEL_COST = 8192;  // below, waking a thread takes longer than the work

// Memory that grows to what is asked and stays; 64-byte aligned.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_) {
      const size_t wanted = rounded_up_64(bytes);
      size_ = 0;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, wanted)));
      TORCH_CHECK(memory_, "no memory for ", wanted, " bytes of scratch");
      size_ = wanted;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static size_t rounded_up_64(size_t n) { return (n + 63) / 64 * 64; }
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

template <class Q, class T>
struct Call {
  using Query = Q;
  using Stored = T;
#if defined(__AVX512BF16__)
  using Dot = std::conditional_t<std::is_same_v<Q, bf16_t>, PairDot, FloatDot>;
#else
  using Dot = FloatDot;
#endif
  const Q* q;  // [T, N, H] with strides
  int64_t q_token_stride, q_head_stride;
  Q* out;  // [T, N, H], contiguous
  Cache<T> cache;
  BatchShape batch;
  const int32_t* block_tables;
  int64_t table_stride;
  float scale;
  float softcap;  // 0: none
  float* partials;  // [parts, rows of a tile, columns + 2]: sums, then maximum and total

  int dim() const { return static_cast<int>(cache.dim); }
  int columns() const { return rounded_up(dim(), LANES); }  // of the sums
  int query_units() const { return rounded_up((dim() + Dot::PAIR - 1) / Dot::PAIR, LANES); }
  int value_units() const { return rounded_up(dim(), LANES * Dot::PAIR); }
  int group() const { return static_cast<int>(batch.group); }
  int tile_rows() const { return std::max(TILE_ROWS, group()); }
};

// One thread's work on one item.
template <class C>
class Worker {
  using Dot = typename C::Dot;
  using T = typename C::Stored;

 public:
  Worker(const C& call, Scratch& scratch) : call_(call) {
    const int rows = call.tile_rows();
    const int64_t key_units = int64_t{call.query_units()} * TILE_KEYS;
    const int64_t value_units = int64_t{TILE_KEYS} * call.value_units();
    const int64_t query_units = int64_t{rows} * call.query_units();
    const int64_t num_sums = int64_t{rows} * call.columns();
    keys_ = scratch.get<uint32_t>(key_units + value_units + query_units + num_sums +
                                  int64_t{rows} * LANES + rows);
    values_ = keys_ + key_units;
    queries_ = values_ + value_units;
    sums_ = reinterpret_cast<float*>(queries_ + query_units);
    totals_ = sums_ + num_sums;
    maxima_ = totals_ + int64_t{rows} * LANES;
  }

  // `probably_next` is what this thread may do next: its first keys are asked for from memory.
  void run(const Item& item, const Item* probably_next) {
    item_ = item;
    num_rows_ = item.num_tokens * call_.group();
    const int start = call_.batch.query_starts[item.sequence];
    const int num_new = call_.batch.query_starts[item.sequence + 1] - start;
    position_ = call_.batch.context_lens[item.sequence] - num_new + item.first_token;
    first_row_ = start + item.first_token;
    load_queries();
    std::fill_n(sums_, int64_t{num_rows_} * call_.columns(), 0.0f);
    std::fill_n(totals_, int64_t{num_rows_} * LANES, 0.0f);
    std::fill_n(maxima_, num_rows_, NOTHING_SEEN);
    int turn = 0;
    SlotWalk walk = open(item);
    int count = fetch(walk, item, item.first_key, tiles_[turn]);
    for (int key = item.first_key; key < item.last_key; turn ^= 1) {
      Tile& upcoming = tiles_[turn ^ 1];
      int next = fetch(walk, item, key + count, upcoming);
      if (next == 0 && probably_next) {
        SlotWalk next_walk = open(*probably_next);
        fetch(next_walk, *probably_next, probably_next->first_key, upcoming);
      }
      ahead_ = {upcoming.rows, upcoming.rows + 2 * upcoming.count,
                call_.dim() * static_cast<int>(sizeof(T))};
      attend(key, tiles_[turn]);
      while (ahead_.next != ahead_.end) ahead_.one();
      key += count;
      count = next;
    }
    item.part < 0 ? write_out() : write_part();
  }

 private:
  struct Tile {
    const void* rows[2 * TILE_KEYS];  // the keys, then the values
    int64_t slots[TILE_KEYS];  // of the scales
    int count;
  };

  SlotWalk open(const Item& item) const {
    return SlotWalk(call_.block_tables + item.sequence * call_.table_stride,
                    call_.cache.block_size, item.first_key);
  }

  // Note where the keys of `item` from `key` on lie; return how many make the tile.
  int fetch(SlotWalk& walk, const Item& item, int key, Tile& tile) const {
    const auto& cache = call_.cache;
    tile.count = std::max(0, std::min(TILE_KEYS, item.last_key - key));
    for (int i = 0; i < tile.count; ++i) {
      tile.slots[i] = walk.next() * cache.num_heads + item.head;
      tile.rows[i] = cache.keys + tile.slots[i] * cache.dim;
      tile.rows[tile.count + i] = cache.values + tile.slots[i] * cache.dim;
    }
    return tile.count;
  }

  void load_queries() {
    const int units = call_.query_units();
    for (int r = 0; r < num_rows_; ++r) {
      const int64_t token = first_row_ + r / call_.group();
      const int64_t head = int64_t{item_.head} * call_.group() + r % call_.group();
      const auto* q = call_.q + token * call_.q_token_stride + head * call_.q_head_stride;
      for (int u = 0; u < units; u += LANES) {
        const int d = u * Dot::PAIR;
        store(queries_ + r * units + u, Dot::load_units(q + d, call_.dim() - d));
      }
    }
  }

  void attend(int key, const Tile& tile) {
    const int count = tile.count;
    pack_keys<Dot, T>(tile.rows, count, call_.dim(), keys_, ahead_);
    pack_values<Dot, T>(tile.rows + count, count, call_.dim(), call_.value_units(), values_,
                        ahead_);
    if constexpr (std::is_same_v<T, int8_t>) {
      std::fill_n(key_scales_, TILE_KEYS, 0.0f);
      std::fill_n(value_scales_, TILE_KEYS, 0.0f);
      for (int i = 0; i < count; ++i) {
        key_scales_[i] = call_.cache.key_scales[tile.slots[i]];
        value_scales_[i] = call_.cache.value_scales[tile.slots[i]];
      }
    }
    const int num_blocks = (num_rows_ + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int b = 0; b < num_blocks; ++b) {  // sizes differ by one at most: 7 rows are 4 and 3
      const int first = b * num_rows_ / num_blocks;
      attend_rows(first, (b + 1) * num_rows_ / num_blocks - first, key, count);
    }
  }

  void attend_rows(int first, int rows, int key, int count) {
    const int group = call_.group();
    const int newest = position_ + (first + rows - 1) / group;  // of the last row
    const int width = std::min(count, newest + 1 - key);
    if (width <= 0) return;
    const int vectors = (width + LANES - 1) / LANES;
    const int units = call_.query_units();
    const int query_depth = (call_.dim() + Dot::PAIR - 1) / Dot::PAIR;
    alignas(64) float scores[BLOCK_ROWS * TILE_KEYS];
    alignas(64) uint32_t chances[BLOCK_ROWS * TILE_KEYS];
    float factors[BLOCK_ROWS];
    product<Dot>(rows, queries_ + first * units, units, keys_, TILE_KEYS, query_depth, vectors,
                 scores, TILE_KEYS, nullptr, ahead_);
    const int full = TILE_KEYS / LANES;
    for (int r = 0, token = first / group, head = first % group; r < rows; ++r, ++head) {
      if (head == group) {
        ++token;
        head = 0;
      }
      float* row = scores + r * TILE_KEYS;
      const Range seen = seen_by(position_ + token, key, count);
      if (vectors == full && seen.first == 0 && seen.last == TILE_KEYS) {
        factors[r] = soften<true>(row, seen, full, first + r);
      } else {
        factors[r] = soften<false>(row, seen, vectors, first + r);
      }
      const int even = rounded_up(vectors, Dot::PAIR);
      for (int v = vectors; v < even; ++v) store(row + v * LANES, all(0.0f));
      Dot::store_probabilities(chances + r * TILE_KEYS, row, even * LANES);
    }
    product<Dot>(rows, chances, TILE_KEYS, values_, call_.value_units(),
                 (width + Dot::PAIR - 1) / Dot::PAIR, call_.columns() / LANES,
                 sums_ + first * call_.columns(), call_.columns(), factors,
                 ahead_);
  }

  struct Range {
    int first, last;  // exclusive end
  };

  // The keys of the tile at `key` that the query at `position` sees.
  Range seen_by(int position, int key, int count) const {
    const int64_t window = call_.batch.window;
    const int64_t oldest = window ? position + 1 - window - key : 0;
    return {static_cast<int>(std::max<int64_t>(0, oldest)), std::min(count, position + 1 - key)};
  }

  // Turn a row's raw scores into exp(score - maximum), zero for keys that are not seen, in place;
  // return the factor that its sums so far take because the maximum grew.
  template <bool IS_ALL_SEEN>
  float soften(float* scores, Range seen, int num_vectors, int row) {
    constexpr bool IS_ROUGH = Dot::PAIR == 2;  // the chances are rounded to bfloat16
    const int vectors = IS_ALL_SEEN ? TILE_KEYS / LANES : num_vectors;
    const auto mask = [&](int v) { return lanes(seen.first - v * LANES, seen.last - v * LANES); };
    Floats x[TILE_KEYS / LANES];
    Floats highest = all(NOTHING_SEEN);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      x[v] = load(scores + v * LANES);
      if constexpr (std::is_same_v<T, int8_t>) x[v] = x[v] * load(key_scales_ + v * LANES);
      if (call_.softcap > 0) {
        x[v] = tanh(x[v] * all(call_.scale / call_.softcap)) * all(call_.softcap * LOG2_E);
      } else {
        x[v] = x[v] * all(call_.scale * LOG2_E);
      }
      if constexpr (!IS_ALL_SEEN) x[v] = where(mask(v), x[v], all(NOTHING_SEEN));
      highest = max(highest, x[v]);
    }
    const float old = maxima_[row];
    const float maximum = std::max(old, max_of(highest));
    Floats total = all(0.0f);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Floats chance = exp2<IS_ROUGH>(x[v] - all(maximum));
      if constexpr (!IS_ALL_SEEN) chance = where(mask(v), chance, all(0.0f));
      total = total + chance;
      if constexpr (std::is_same_v<T, int8_t>) chance = chance * load(value_scales_ + v * LANES);
      store(scores + v * LANES, chance);
    }
    const Floats factor = exp2(all(old - maximum));
    maxima_[row] = maximum;
    store(totals_ + row * LANES, fma(load(totals_ + row * LANES), factor, total));
    return first_of(factor);
  }

  void write_out() const {
    const int columns = call_.columns();
    for (int r = 0; r < num_rows_; ++r) {
      const Floats share = all(1.0f / sum_of(load(totals_ + r * LANES)));
      auto* out = out_row(call_, item_, first_row_, r);
      for (int d = 0; d < call_.dim(); d += LANES) {
        store_floats(out + d, load(sums_ + r * columns + d) * share, call_.dim() - d);
      }
    }
  }

  void write_part() const {
    const int columns = call_.columns();
    float* to = call_.partials + int64_t{item_.part} * call_.tile_rows() * (columns + 2);
    for (int r = 0; r < num_rows_; ++r, to += columns + 2) {
      std::copy_n(sums_ + r * columns, columns, to);
      to[columns] = maxima_[r];
      to[columns + 1] = sum_of(load(totals_ + r * LANES));
    }
  }

 public:
  static typename C::Query* out_row(const C& call, const Item& item, int64_t first_row, int row) {
    const int64_t heads = call.batch.num_kv_heads * call.group();
    const int64_t token = first_row + row / call.group();
    const int64_t head = int64_t{item.head} * call.group() + row % call.group();
    return call.out + (token * heads + head) * call.cache.dim;
  }

 private:
  const C& call_;
  Item item_{};
  int num_rows_ = 0;
  int position_ = 0;  // of the item's first query token
  int64_t first_row_ = 0;  // of the step's tokens
  uint32_t *keys_, *values_, *queries_;
  float *sums_, *totals_, *maxima_;  // totals by lane: summed once, at the end
  Tile tiles_[2];  // the one at work and the one to come
  Prefetch ahead_;
  alignas(64) float key_scales_[TILE_KEYS];
  alignas(64) float value_scales_[TILE_KEYS];
};

// Merge the parts of one item's context: `item` is the first of them.
template <class C>
void merge(const C& call, const Item& item) {
  const int columns = call.columns();
  const int64_t row_size = columns + 2, part_size = call.tile_rows() * row_size;
  const int64_t first_row = call.batch.query_starts[item.sequence] + item.first_token;
  const int rows = item.num_tokens * call.group();
  for (int r = 0; r < rows; ++r) {
    float* first = call.partials + item.part * part_size + r * row_size;
    float maximum = NOTHING_SEEN, total = 0.0f;
    for (int p = 0; p < item.num_parts; ++p) {
      maximum = std::max(maximum, first[p * part_size + columns]);
    }
    for (int p = 0; p < item.num_parts; ++p) {
      float* part = first + p * part_size;
      const float factor = std::exp2(part[columns] - maximum);
      total += factor * part[columns + 1];
      for (int d = 0; d < columns; d += LANES) {
        const Floats so_far = p == 0 ? all(0.0f) : load(first + d);
        store(first + d, fma(load(part + d), all(factor), so_far));
      }
    }
    auto* out = Worker<C>::out_row(call, item, first_row, r);
    for (int d = 0; d < call.dim(); d += LANES) {
      store_floats(out + d, load(first + d) * all(1.0f / total), call.dim() - d);
    }
  }
}

template <class C>
void run(C call) {
  thread_local Schedule schedule;  // kept by the threads: nothing is allocated from step to step
  thread_local Scratch partials;
  plan(call.batch, at::get_num_threads(), schedule);
  auto& items = schedule.items;
  call.partials = partials.get<float>(schedule.num_parts * call.tile_rows() * (call.columns() + 2));
  const bool is_small = schedule.cost < PARALLEL_COST;
  const auto num_items = static_cast<int64_t>(items.size());
  const int64_t threads = is_small ? 1 : std::min<int64_t>(at::get_num_threads(), num_items);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    thread_local Scratch scratch;
    Worker<C> worker(call, scratch);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
      const int64_t free = next.load(std::memory_order_relaxed);
      worker.run(items[i], free < num_items ? &items[free] : nullptr);
    }
  });
  if (!schedule.num_parts) return;
  at::parallel_for(0, num_items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (items[i].part >= 0 && items[i].is_first) merge(call, items[i]);
    }
  });
}

struct Arguments {
  const at::Tensor &q, &keys, &values;
  const std::optional<at::Tensor>&key_scales, &value_scales;
  const at::Tensor &query_starts, &context_lens, &block_tables;
  double scale;
  int64_t window;
  double softcap;
};

template <class Q, class T>
void attend(const Arguments& a, at::Tensor& out) {
  const int64_t num_kv_heads = a.keys.size(2);
  run(Call<Q, T>{
      static_cast<const Q*>(a.q.const_data_ptr()), a.q.stride(0), a.q.stride(1),
      static_cast<Q*>(out.mutable_data_ptr()),
      Cache<T>{static_cast<const T*>(a.keys.const_data_ptr()),
               static_cast<const T*>(a.values.const_data_ptr()),
               a.key_scales ? a.key_scales->const_data_ptr<float>() : nullptr,
               a.value_scales ? a.value_scales->const_data_ptr<float>() : nullptr, a.keys.size(1),
               num_kv_heads, a.keys.size(3)},
      BatchShape{a.query_starts.const_data_ptr<int32_t>(),
                 a.context_lens.const_data_ptr<int32_t>(), a.context_lens.size(0), num_kv_heads,
                 a.q.size(1) / num_kv_heads, a.window},
      a.block_tables.const_data_ptr<int32_t>(), a.block_tables.stride(0),
      static_cast<float>(a.scale), static_cast<float>(a.softcap), nullptr});
}

void check(const Arguments& a) {
  const bool is_int8 = a.keys.scalar_type() == at::kChar;
  TORCH_CHECK(a.q.dim() == 3 && a.keys.dim() == 4, "queries [T, N, H], caches [B, S, K, H]");
  TORCH_CHECK(a.q.stride(2) == 1 && a.q.size(2) == a.keys.size(3) &&
                  a.q.size(1) % a.keys.size(2) == 0,
              "queries ", a.q.sizes(), " do not fit keys ", a.keys.sizes());
  TORCH_CHECK(a.keys.is_contiguous() && a.values.is_contiguous() &&
                  a.keys.sizes() == a.values.sizes(),
              "keys and values have to be contiguous and alike");
  TORCH_CHECK(is_int8 == a.key_scales.has_value() && is_int8 == a.value_scales.has_value(),
              "an int8 cache has scales, no other has");
  TORCH_CHECK(a.values.scalar_type() == a.keys.scalar_type() &&
                  (is_int8 || a.keys.scalar_type() == a.q.scalar_type()),
              "the cache holds the dtype of the queries, or int8");
  TORCH_CHECK(a.query_starts.size(0) == a.context_lens.size(0) + 1 &&
                  a.block_tables.size(0) == a.context_lens.size(0),
              "batch tensors disagree on the number of sequences");
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                           const std::optional<at::Tensor>& key_scales,
                           const std::optional<at::Tensor>& value_scales,
                           const at::Tensor& query_starts, const at::Tensor& context_lens,
                           const at::Tensor& block_tables, double scale, int64_t window,
                           double softcap) {
  const Arguments a{q,            keys,         values,       key_scales, value_scales,
                    query_starts, context_lens, block_tables, scale,      window,
                    softcap};
  check(a);
  auto out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  const bool is_int8 = keys.scalar_type() == at::kChar;
  if (q.scalar_type() == at::kBFloat16) {
    is_int8 ? attend<bf16_t, int8_t>(a, out) : attend<bf16_t, bf16_t>(a, out);
  } else {
    TORCH_CHECK(q.scalar_type() == at::kFloat, "queries of ", q.scalar_type());
    is_int8 ? attend<float, int8_t>(a, out) : attend<float, float>(a, out);
  }
  return out;
}

}  // namespace
}  // namespace sluice

TORCH_LIBRARY_FRAGMENT(sluice, m) {
  m.def(
      "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? "
      "value_scales, Tensor query_starts, Tensor context_lens, Tensor block_tables, float scale, "
      "int window, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(sluice, CPU, m) { m.impl("paged_attention", sluice::paged_attention); }
