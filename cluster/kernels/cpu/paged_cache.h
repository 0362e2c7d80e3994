// Where the keys and values of a layer lie, as plain pointers.

#pragma once

#include <cstdint>

namespace sluice {

// One layer's cache: [blocks, slots, heads, dim] of T, and for int8 [blocks, slots, heads] scales.
template <class T>
struct Cache {
  const T* keys;
  const T* values;
  const float* key_scales;  // null where T is no int8
  const float* value_scales;
  int64_t block_size;
  int64_t num_heads;
  int64_t dim;
};

// Walks the tokens of one sequence, block by block, for one head.
class SlotWalk {
 public:
  SlotWalk(const int32_t* table, int64_t block_size, int64_t first)
      : table_(table + first / block_size), block_size_(block_size), offset_(first % block_size) {}

  int64_t next() {
    if (offset_ == block_size_) {
      ++table_;
      offset_ = 0;
    }
    return *table_ * block_size_ + offset_++;
  }

 private:
  const int32_t* table_;
  int64_t block_size_;
  int64_t offset_;
};

}  // namespace sluice
