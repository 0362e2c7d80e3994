// How one call's work is cut into items that threads take, the dearest first.
//
//     sequence x KV head x tile of query tokens [x part of the context]
//
// All query heads of a KV head share an item, and so its packed keys and values.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sluice {

struct Item {
  int32_t sequence;
  int32_t head;  // KV head
  int32_t first_token, num_tokens;  // queries, counted in the sequence's part of the step
  int32_t first_key, last_key;  // the part of the context, exclusive end
  int32_t part;  // index of its partial result; -1: the item is the whole context
  int32_t num_parts;
  bool is_first;  // of the parts
  int64_t cost;
};

struct Schedule {
  std::vector<Item> items;
  int64_t num_parts = 0;
  int64_t cost = 0;
};

constexpr int TILE_ROWS = 96;  // (token, query head) pairs of an item: their sums stay in L2
constexpr int MIN_PART_KEYS = 256;  // a shorter part costs more to merge than it gains
constexpr int ITEMS_PER_THREAD = 4;  // a thread that is held up leaves at most a quarter behind
constexpr int PACKING_ROWS = 4;  // packing a key costs as much as this many rows multiplying it

struct BatchShape {
  const int32_t* query_starts;  // [sequences + 1]
  const int32_t* context_lens;
  int64_t num_sequences, num_kv_heads, group;
  int64_t window;  // 0: none
};

// Fill `schedule`, whose memory is used again from call to call.
inline void plan(const BatchShape& batch, int num_threads, Schedule& schedule) {
  auto& items = schedule.items;
  items.clear();
  schedule.num_parts = schedule.cost = 0;
  const int tile = static_cast<int>(std::max<int64_t>(1, TILE_ROWS / batch.group));
  for (int s = 0; s < batch.num_sequences; ++s) {
    const int num_new = batch.query_starts[s + 1] - batch.query_starts[s];
    const int num_computed = batch.context_lens[s] - num_new;
    for (int head = 0; head < batch.num_kv_heads; ++head) {
      for (int first = 0; first < num_new; first += tile) {
        const int count = std::min(tile, num_new - first);
        const int oldest = num_computed + first;
        const int begin = batch.window ? std::max<int>(0, oldest + 1 - batch.window) : 0;
        const int end = oldest + count;
        const int64_t cost = (count * batch.group + PACKING_ROWS) * (end - begin);
        items.push_back({s, head, first, count, begin, end, -1, 1, true, cost});
        schedule.cost += cost;
      }
    }
  }
  if (num_threads == 1) return;
  const int64_t limit = schedule.cost / (num_threads * ITEMS_PER_THREAD) + 1;
  const size_t num_whole = items.size();
  for (size_t i = 0; i < num_whole; ++i) {
    const Item whole = items[i];
    const int num_keys = whole.last_key - whole.first_key;
    const int wanted = static_cast<int>((whole.cost + limit - 1) / limit);
    const int parts = std::min(wanted, num_keys / MIN_PART_KEYS);
    if (parts < 2) continue;
    const int step = (num_keys + parts - 1) / parts;
    for (int p = 0; p < parts; ++p) {
      Item piece = whole;
      piece.first_key = whole.first_key + p * step;
      piece.last_key = std::min(whole.last_key, piece.first_key + step);
      piece.cost = whole.cost / parts;
      piece.part = static_cast<int32_t>(schedule.num_parts++);
      piece.num_parts = parts;
      piece.is_first = p == 0;
      if (p == 0) items[i] = piece;
      else items.push_back(piece);
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

}  // namespace sluice
