// How one tensor is cut into units, by its shape alone.
#ifndef ADAFACTOR_PLAN_H
#define ADAFACTOR_PLAN_H

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace adafactor {

constexpr int64_t kGrain = 64 * 1024;         // elements below which a piece is not worth a turn of its own
constexpr int64_t kPart = 256 * 1024;         // elements of one block in one part
// Each part of a matrix has column sums of its own. Of 512 rows they are 0.4 % of the matrix; a short matrix is cut
// finer, up to four ways, so that it does not keep one thread busy while the others wait.
constexpr int64_t kMostParts = 16;
inline int64_t most_parts(int64_t rows) {
  return std::min(kMostParts, std::max(rows / 512, std::min<int64_t>(4, rows / 128)));
}

constexpr int64_t kColumnPart = 1024;  // columns below which a part of them is not worth its row sums

struct Plan {
  int64_t parts = 1;            // of one block
  int64_t part_length = 0;      // rows, or elements if not factored
  int64_t sum_parts = 1;        // of one block, each with sums of its own
  int64_t column_length = 0;    // columns that a part measures, where they come first
  int64_t blocks_per_unit = 1;
  int64_t blocks_per_slice = 0;
  int64_t units_per_slice = 0;
  int64_t units = 0;
  int64_t units_per_chunk = 1;  // what a thread takes at a time
  int64_t chunks = 0;

  explicit Plan(const adafactor_tensor& t) {
    const bool factored = t.flags & ADAFACTOR_FACTORED;
    const int64_t block = t.rows * t.inner * t.columns, length = factored ? t.rows : t.columns;
    if (block == 0 || t.outer == 0) return;
    const int64_t most = factored ? most_parts(t.rows) : kMostParts;
    parts = std::max<int64_t>(1, std::min(most, block / kPart));
    part_length = (length + parts - 1) / parts;
    if (parts > 1) part_length = (part_length + 15) / 16 * 16;
    parts = (length + part_length - 1) / part_length;
    sum_parts = parts;
    if (t.flags & ADAFACTOR_COLUMNS_FIRST) {
      const int64_t most_columns = std::max<int64_t>(1, std::min(parts, t.columns / kColumnPart));
      column_length = ((t.columns + most_columns - 1) / most_columns + 63) / 64 * 64;
      sum_parts = (t.columns + column_length - 1) / column_length;
    }

    blocks_per_slice = t.outer / t.slices;
    if (parts == 1) blocks_per_unit = std::max<int64_t>(1, std::min(blocks_per_slice, kGrain / block));
    units_per_slice = (blocks_per_slice + blocks_per_unit - 1) / blocks_per_unit * parts;
    units = t.slices * units_per_slice;
    const int64_t unit = block / parts * blocks_per_unit;
    units_per_chunk = std::max<int64_t>(1, kGrain / std::max<int64_t>(unit, 1));
    chunks = (units + units_per_chunk - 1) / units_per_chunk;
  }

  Unit unit(int64_t index, const adafactor_tensor& t) const {
    const int64_t length = (t.flags & ADAFACTOR_FACTORED) ? t.rows : t.columns;
    Unit u;
    u.index = index;
    u.slice = index / units_per_slice;
    u.part = index % parts;
    const int64_t group = index % units_per_slice / parts;
    u.b = u.slice * blocks_per_slice + group * blocks_per_unit;
    u.b_end = std::min(u.b + blocks_per_unit, (u.slice + 1) * blocks_per_slice);
    u.begin = u.part * part_length;
    u.end = std::min(u.begin + part_length, length);
    u.column = std::min(u.part * column_length, t.columns);
    u.column_end = std::min(u.column + column_length, t.columns);
    return u;
  }
};

}  // namespace adafactor
#endif
