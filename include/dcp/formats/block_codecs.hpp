// SPDX-License-Identifier: Apache-2.0
#pragma once
// The encodings of quantized checkpoints: codes and scales of any box of a tensor to floats. What is computed, and in which order, is
// what the formats' own tools compute, so that values are theirs bit for bit.

#include <dcp/base/config.hpp>
#include <dcp/core/cast.hpp>
#include <dcp/core/encoding.hpp>
#include <dcp/formats/block_kernels.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace dcp::detail {

/// Puts `count` floats into memory of another float type, neighbours `stride` elements apart.
template <class = Deferred>
void store_floats(float const* values, std::size_t count, DType dtype, std::byte* memory, std::int64_t stride) {
  auto const bytes = static_cast<std::ptrdiff_t>(bits_of(dtype) / 8);
  if (stride == 1 || count == 1) {
    if (dtype == DType::f32) std::memcpy(memory, values, count * sizeof(float));
    else if (dtype == DType::bf16) block_kernels().to_bf16(values, count, memory);
    else if (dtype == DType::f16) block_kernels().to_f16(values, count, memory);
    else cast_elements(DType::f32, reinterpret_cast<std::byte const*>(values), dtype, memory, count);
    return;
  }
  for (std::size_t i = 0; i < count; ++i) cast_elements(DType::f32, reinterpret_cast<std::byte const*>(values + i), dtype, memory + static_cast<std::ptrdiff_t>(i) * stride * bytes, 1);
}

/// Calls fill(index, begin, end, out) for pieces of the rows of `box` (its last dimension), and puts what it has written to `out`, the floats of columns
/// [begin, end), into memory. `index`: of the row in the tensor.
template <class Fill>
void fill_rows(Box const& box, DType dtype, MemoryView const& memory, Fill fill) {
  constexpr std::int64_t piece = 4096;
  int const last = box.rank() - 1;
  std::int64_t const bytes = bits_of(dtype) / 8, columns = last < 0 ? 1 : box.shape[last], stride = last < 0 ? 1 : memory.strides[last];
  bool const straight = dtype == DType::f32 && (stride == 1 || columns == 1) && reinterpret_cast<std::uintptr_t>(memory.data) % alignof(float) == 0;
  std::vector<float> buffer(straight ? 0 : static_cast<std::size_t>(std::min(piece, columns)));
  for_each_index(box, last, [&](Extents const& index) {
    std::int64_t at = 0;
    for (int d = 0; d < last; ++d) at += (index[d] - box.origin[d]) * memory.strides[d];
    for (std::int64_t begin = 0; begin < columns; begin += piece) {
      std::int64_t const end = std::min(columns, begin + piece), origin = last < 0 ? 0 : box.origin[last];
      std::byte* const target = memory.data + (at + begin * stride) * bytes;
      float* const out = straight ? reinterpret_cast<float*>(target) : buffer.data();
      fill(index, origin + begin, origin + end, out);
      if (!straight) store_floats(out, static_cast<std::size_t>(end - begin), dtype, target, stride);
    }
  });
}

/// What scales may be.
struct ScaleRule {
  bool zero = false;       // of a block of zeros
  bool negative = false;
};

/// A part's numbers as floats.
template <class = Deferred>
std::vector<float> numbers_of(EncodedPart const& part, PartBytes const& bytes) {
  std::vector<float> numbers(bytes.box.size());
  switch (part.dtype) {
    case DType::f8_e8m0:
      for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(f8_e8m0::from_bits(static_cast<std::uint8_t>(bytes.data[i])));
      break;
    case DType::f8_e4m3: block_kernels().e4m3(bytes.data, numbers.size(), 1.0f, numbers.data()); break;
    case DType::bf16: block_kernels().from_bf16(bytes.data, numbers.size(), numbers.data()); break;
    case DType::f16: block_kernels().from_f16(bytes.data, numbers.size(), numbers.data()); break;
    default: cast_elements(part.dtype, bytes.data, DType::f32, reinterpret_cast<std::byte*>(numbers.data()), numbers.size());
  }
  return numbers;
}
template <class = Deferred>
std::vector<float> scales_of(EncodedPart const& part, PartBytes const& bytes, ScaleRule rule) {
  std::vector<float> scales = numbers_of(part, bytes);
  float const largest = std::numeric_limits<float>::max(), least = rule.negative ? -largest : 0.0f;
  bool fine = true;   // NaN is not
  for (auto const scale : scales) fine &= (scale >= least) & (scale <= largest) & ((scale != 0.0f) | rule.zero);
  if (fine) return scales;
  for (auto const scale : scales)
    if (!std::isfinite(scale) || (scale == 0 && !rule.zero) || (scale < 0 && !rule.negative))
      throw Error{ErrorCode::quant_mismatch, part.name + ": a scale is " + (std::isfinite(scale) ? std::to_string(scale) : std::isnan(scale) ? "NaN" : "infinite") + ", which this scheme does not have"};
  return scales;   // not reached
}

/// Where in the dense box of a part the elements of one row of the tensor have their numbers.
class RowNumbers {
 public:
  RowNumbers(EncodedPart const& part, Box const& box, int last) : part_{part}, box_{box}, last_{last}, strides_{row_major_strides(box.shape)} {
    for (std::size_t d = 0; d < part.grid.axes.size(); ++d)
      if (part.grid.axes[d].dim == last) each_ = part.grid.axes[d].each, step_ = strides_[static_cast<int>(d)], first_ = box.origin[static_cast<int>(d)];
  }
  /// For the row at `index`.
  void select(Extents const& index) {
    base_ = 0;
    for (std::size_t d = 0; d < part_.grid.axes.size(); ++d)
      if (auto const [dim, each] = part_.grid.axes[d]; dim >= 0 && dim != last_) base_ += (index[dim] / each - box_.origin[static_cast<int>(d)]) * strides_[static_cast<int>(d)];
  }
  /// Of column `column`; and the end of the columns that have the same.
  std::size_t at(std::int64_t column) const { return static_cast<std::size_t>(base_ + (each_ == 0 ? 0 : (column / each_ - first_) * step_)); }
  std::int64_t end_of_same(std::int64_t column) const { return each_ == 0 ? INT64_MAX : (column / each_ + 1) * each_; }
  std::int64_t each() const { return each_; }

 private:
  EncodedPart const& part_;
  Box const& box_;
  int last_;
  Extents strides_;
  std::int64_t each_ = 0, step_ = 0, first_ = 0, base_ = 0;
};

/// Bits [at, at + bits) of little-endian words.
inline std::uint32_t bits_at(std::byte const* data, std::int64_t at, int bits) {
  std::uint32_t value = 0;
  for (int i = 0; i < bits; ++i) value |= ((static_cast<std::uint32_t>(data[(at + i) / 8]) >> ((at + i) % 8)) & 1u) << i;
  return value;
}

/// `count` codes of four bits from number `at` on, the even one of a pair in the low bits, by their values.
template <class = Deferred>
void nibbles(std::byte const* codes, std::int64_t at, std::int64_t count, float const* table, float* out) {
  if (count > 0 && at % 2 != 0) *out++ = table[static_cast<unsigned>(codes[at / 2]) >> 4], ++at, --count;
  block_kernels().nibbles(codes + at / 2, static_cast<std::size_t>(count / 2), table, out);
  if (count % 2 != 0) out[count - 1] = table[static_cast<unsigned>(codes[(at + count) / 2]) & 15u];
}

/// Codes of four bits whose neighbours are in different groups: the values of all codes in each of a row's groups, and where each element's
/// group has its own.
class NibbleTables {
 public:
  /// groups: of the elements; first: the group whose values are set as number 0
  template <class = Deferred>
  NibbleTables(std::span<std::int32_t const> groups, std::int64_t first, std::int64_t count) : values_(static_cast<std::size_t>(16 * count)) {
    tables_.reserve(groups.size());
    for (auto const group : groups) tables_.push_back(static_cast<std::uint32_t>(16 * (group - first)));
  }
  void set(std::int64_t group, float zero, float scale) {
    float* const values = values_.data() + 16 * group;
    for (int c = 0; c < 16; ++c) values[c] = (static_cast<float>(c) - zero) * scale;
  }
  /// Of elements [begin, begin + count), whose first has code number `at` of `codes`.
  template <class = Deferred>
  void look_up(std::byte const* codes, std::int64_t at, std::int64_t begin, std::int64_t count, float* out) const {
    float const* const values = values_.data();
    std::uint32_t const* const table = tables_.data() + begin;
    std::byte const* code = codes + at / 2;
    std::int64_t i = 0;
    if (count > 0 && at % 2 != 0) out[0] = values[table[0] + (static_cast<unsigned>(*code++) >> 4)], ++i;
    for (; i + 2 <= count; i += 2) {
      auto const pair = static_cast<unsigned>(*code++);
      out[i] = values[table[i] + (pair & 15u)], out[i + 1] = values[table[i + 1] + (pair >> 4)];
    }
    if (i < count) out[i] = values[table[i] + (static_cast<unsigned>(*code) & 15u)];
  }

 private:
  std::vector<float> values_;
  std::vector<std::uint32_t> tables_;   // of each element: the first of its values
};

/// What codes of a GroupEncoding are.
enum class Codes : std::uint8_t {
  floats,      // any float type, one per element
  i8,
  e2m1,        // two in a byte, even column low
  packed,      // `bits` bits each, from bit 0 of a row's first word on; unsigned, their zero at 2^(bits - 1) or where the zero points say
  packed_low,  // the same as 32 / bits whole codes in each word of 32 bits
};

/// What a GroupEncoding consists of.
struct GroupSpec {
  std::string scheme;
  Extents shape;                             // of the tensor; codes lie along its last dimension
  Codes kind = Codes::floats;
  int bits = 8;                              // of packed codes
  EncodedPart codes, scales;
  ScaleRule rule{};
  std::optional<EncodedPart> second{};       // one number for the tensor
  SecondScale::Kind second_kind = SecondScale::Kind::none;
  std::optional<EncodedPart> zeros{};        // I8; or packed as the codes are, but along the rows
  std::optional<EncodedPart> group_index{};  // the group of each column, I32: then scales have all groups
  float divisor = 0;                         // that scaled codes are divided by; 0: none
};

/// Codes in rows with a scale for every group of them: (code - zero) * scale, with a second scale in NVFP4.
template <class D = Deferred>
class GroupEncoding final : public Encoding {
 public:
  explicit GroupEncoding(GroupSpec const& spec) : Encoding{spec.scheme, spec.shape, parts_of(spec)}, spec_{spec} {
    if (spec.second) second_ = 2;
    if (spec.zeros) zeros_ = second_ == 0 ? 2 : 3;
    if (spec.group_index) index_ = parts().size() - 1;
  }

  void decode(Box const& box, std::span<PartBytes const> given, DType dtype, MemoryView const& memory) const override {
    StandardArithmetic const standard;
    int const last = box.rank() - 1;
    Tile tile{scales_of(parts()[1], given[1], spec_.rule), {}, {parts()[1], given[1].box, last}};
    if (second_ != 0) tile.second = {spec_.second_kind, scales_of(parts()[second_], given[second_], {})[0]};
    else if (spec_.divisor != 0) tile.second = {SecondScale::Kind::divide, spec_.divisor};
    if (index_ != 0) {
      tile.group_index = groups_of(given[index_]), tile.first_index = given[index_].box.origin[0];
      if (spec_.bits == 4) tile.tables.emplace(tile.group_index, 0, groups());   // packed, or in words of eight: the same
    }
    Extents const strides = row_major_strides(given[0].box.shape);
    std::optional<RowNumbers> zero_rows;
    if (zeros_ != 0) zero_rows.emplace(parts()[zeros_], given[zeros_].box, last), tile.zero_bytes = given[zeros_].data;
    std::int64_t const per = parts()[0].grid.axes.empty() ? 1 : parts()[0].grid.axes[static_cast<std::size_t>(std::max(last, 0))].each;
    std::int64_t const first = last < 0 ? 0 : given[0].box.origin[last] * per;   // the column of a row's first code
    fill_rows(box, dtype, memory, [&](Extents const& index, std::int64_t begin, std::int64_t end, float* out) {
      std::int64_t at = 0;   // of the row in the codes' box
      for (int d = 0; d < last; ++d) at += (index[d] - given[0].box.origin[d]) * strides[d];
      std::byte const* const codes = given[0].data + at * bits_of(parts()[0].dtype) / 8;
      tile.rows.select(index);
      if (zero_rows) zero_rows->select(index);
      row(tile, zero_rows ? &*zero_rows : nullptr, last < 1 ? 0 : index[last - 1], codes, first, begin, end, out);
    });
  }

  ScaledCodes scaled_codes() const override {
    if (second_ != 0 || zeros_ != 0 || index_ != 0 || spec_.divisor != 0 || spec_.rule.zero) return ScaledCodes::none;
    if (spec_.kind == Codes::i8) return ScaledCodes::i8;
    if (spec_.kind == Codes::e2m1) return ScaledCodes::e2m1;
    if (spec_.kind != Codes::floats) return ScaledCodes::none;
    DType const dtype = parts()[0].dtype;
    return dtype == DType::f8_e4m3 ? ScaledCodes::e4m3 : dtype == DType::f8_e5m2 ? ScaledCodes::e5m2 : ScaledCodes::none;
  }
  void check_scales(PartBytes const& scales) const override {
    StandardArithmetic const standard;
    static_cast<void>(scales_of(parts()[1], scales, spec_.rule));
  }

 private:
  struct Tile {
    std::vector<float> scales;
    SecondScale second;
    RowNumbers rows;
    std::vector<std::int32_t> group_index{};   // of the columns from first_index on
    std::int64_t first_index = 0;
    std::optional<NibbleTables> tables{};
    std::byte const* zero_bytes = nullptr;
  };

  static std::vector<EncodedPart> parts_of(GroupSpec const& spec) {
    std::vector<EncodedPart> parts;
    parts.push_back(spec.codes);
    parts.push_back(spec.scales);
    if (spec.second) parts.push_back(*spec.second);
    if (spec.zeros) parts.push_back(*spec.zeros);
    if (spec.group_index) parts.push_back(*spec.group_index);
    return parts;
  }

  std::vector<std::int32_t> groups_of(PartBytes const& bytes) const {
    std::vector<std::int32_t> groups(bytes.box.size());
    std::memcpy(groups.data(), bytes.data, groups.size() * sizeof(std::int32_t));
    for (auto const group : groups)
      if (group < 0 || group >= this->groups()) this->refuse(index_, "a column is in group " + std::to_string(group) + ", and there are " + std::to_string(this->groups()));
    return groups;
  }
  std::int64_t groups() const { return parts()[1].shape[parts()[1].shape.rank() - 1]; }

  // A zero point, as codes are stored: the one at `at` of those of this row.
  float zero_at(Tile const& tile, RowNumbers const* rows, std::int64_t row, std::size_t at) const {
    if (rows == nullptr) return spec_.kind == Codes::packed || spec_.kind == Codes::packed_low ? static_cast<float>(1 << (spec_.bits - 1)) : 0.0f;
    if (spec_.kind == Codes::i8) return static_cast<float>(static_cast<std::int8_t>(tile.zero_bytes[at]));
    std::uint32_t word;
    std::memcpy(&word, tile.zero_bytes + at * 4, 4);
    std::int64_t const per = 32 / spec_.bits;
    return static_cast<float>((word >> (row % per * spec_.bits)) & ((1u << spec_.bits) - 1));
  }

  // Columns [begin, end) of one row.
  void row(Tile& tile, RowNumbers const* zeros, std::int64_t row, std::byte const* codes, std::int64_t first, std::int64_t begin, std::int64_t end, float* out) const {
    BlockKernels const& kernels = block_kernels();
    if (!tile.group_index.empty()) return row_by_index(tile, zeros, row, codes, first, begin, end, out);
    std::int64_t const each = tile.rows.each();
    if (spec_.kind == Codes::e2m1 && each > 0 && each % 2 == 0 && first % 2 == 0) {
      // Whole groups at once.
      std::int64_t const from = ceil_div(begin, each) * each, to = end / each * each;
      if (from < to) {
        run_e2m1(tile, codes, first, begin, std::min(from, end), out);
        kernels.nibble_groups(codes + (from - first) / 2, static_cast<std::size_t>((to - from) / each), static_cast<std::size_t>(each / 2), e2m1_values.data(), tile.scales.data() + tile.rows.at(from), tile.second, out + (from - begin));
        return run_e2m1(tile, codes, first, to, end, out + (to - begin));
      }
    }
    bool const e4m3 = spec_.kind == Codes::floats && parts()[0].dtype == DType::f8_e4m3 && tile.second.kind == SecondScale::Kind::none;
    for (std::int64_t at = begin; at < end;) {
      if (e4m3 && each > 0 && at % each == 0 && end - at >= each) {
        std::int64_t const groups = (end - at) / each;
        kernels.e4m3_groups(codes + (at - first), static_cast<std::size_t>(groups), static_cast<std::size_t>(each), tile.scales.data() + tile.rows.at(at), out + (at - begin));
        at += groups * each;
        continue;
      }
      std::int64_t const stop = std::min(end, tile.rows.end_of_same(at));
      float const scale = tile.scales[tile.rows.at(at)];
      float* const to = out + (at - begin);
      auto const count = static_cast<std::size_t>(stop - at);
      std::size_t const zero = zeros == nullptr ? 0 : zeros->at(at);
      switch (spec_.kind) {
        case Codes::floats: floats(codes, at - first, count, scale, to); break;
        case Codes::i8: kernels.i8(codes + (at - first), count, zero_at(tile, zeros, row, zero), scale, to); break;
        case Codes::e2m1: run_e2m1(tile, codes, first, at, stop, to); break;
        case Codes::packed:
        case Codes::packed_low: packed(codes, at - first, count, zero_at(tile, zeros, row, zero), scale, to); break;
      }
      if (spec_.kind != Codes::e2m1 && tile.second.kind != SecondScale::Kind::none)
        for (std::size_t i = 0; i < count; ++i) to[i] = tile.second(to[i]);
      at = stop;
    }
  }
  // Scales and zeros of the row are there for all groups.
  void row_by_index(Tile& tile, RowNumbers const* zeros, std::int64_t row, std::byte const* codes, std::int64_t first, std::int64_t begin, std::int64_t end, float* out) const {
    if (tile.tables) {
      for (std::int64_t g = 0; g < groups(); ++g) tile.tables->set(g, zero_at(tile, zeros, row, zeros == nullptr ? 0 : zeros->at(0) + static_cast<std::size_t>(g)), tile.scales[tile.rows.at(0) + static_cast<std::size_t>(g)]);
      return tile.tables->look_up(codes, begin - first, begin - tile.first_index, end - begin, out);
    }
    for (std::int64_t column = begin; column < end; ++column) {
      auto const group = static_cast<std::size_t>(tile.group_index[static_cast<std::size_t>(column - tile.first_index)]);
      float const zero = zero_at(tile, zeros, row, zeros == nullptr ? 0 : zeros->at(0) + group);
      packed(codes, column - first, 1, zero, tile.scales[tile.rows.at(0) + group], out + (column - begin));
    }
  }

  void run_e2m1(Tile const& tile, std::byte const* codes, std::int64_t first, std::int64_t begin, std::int64_t end, float* out) const {
    for (std::int64_t at = begin; at < end;) {
      std::int64_t const stop = std::min(end, tile.rows.end_of_same(at));
      float const scale = tile.scales[tile.rows.at(at)];
      std::array<float, 16> table{};
      for (std::size_t c = 0; c < 16; ++c) table[c] = tile.second(rounded(e2m1_values[c] * scale));
      nibbles(codes, at - first, stop - at, table.data(), out + (at - begin));
      at = stop;
    }
  }
  void packed(std::byte const* codes, std::int64_t at, std::size_t count, float zero, float scale, float* out) const {
    if (spec_.bits == 8) return block_kernels().u8(codes + at, count, zero, scale, out);
    if (spec_.bits == 4 && count > 1) {
      std::array<float, 16> table{};
      for (std::size_t c = 0; c < 16; ++c) table[c] = (static_cast<float>(c) - zero) * scale;
      return nibbles(codes, at, static_cast<std::int64_t>(count), table.data(), out);
    }
    std::int64_t const per = 32 / spec_.bits;
    for (std::size_t i = 0; i < count; ++i, ++at) {
      std::int64_t const bit = spec_.kind == Codes::packed ? at * spec_.bits : at / per * 32 + at % per * spec_.bits;
      out[i] = (static_cast<float>(bits_at(codes, bit, spec_.bits)) - zero) * scale;
    }
  }
  void floats(std::byte const* codes, std::int64_t at, std::size_t count, float scale, float* out) const {
    DType const dtype = parts()[0].dtype;
    std::byte const* const from = codes + at * (bits_of(dtype) / 8);
    if (dtype == DType::f8_e4m3) return block_kernels().e4m3(from, count, scale, out);
    if (dtype == DType::f8_e5m2) return block_kernels().e5m2(from, count, scale, out);
    cast_elements(dtype, from, DType::f32, reinterpret_cast<std::byte*>(out), count);
    for (std::size_t i = 0; i < count; ++i) out[i] *= scale;
  }

  GroupSpec spec_;
  std::size_t second_ = 0, zeros_ = 0, index_ = 0;   // among the parts; 0: there is none
};

/// GPTQ and AWQ: [out, in], stored as [in, out].
struct TransposedSpec {
  std::string scheme;
  Extents shape;                              // [out, in]
  int bits = 4;
  bool interleaved = false;                   // AWQ: words hold eight outputs of one input, in its order; else a word holds inputs of one output
  int stored_zero_plus = 0;                   // what is added to a stored zero point
  EncodedPart codes, zeros, scales;
  std::optional<EncodedPart> group_index{};   // of each input
  std::int64_t group = 0;                     // inputs of a group, where there is no index to follow
};

template <class D = Deferred>
class TransposedEncoding final : public Encoding {
 public:
  explicit TransposedEncoding(TransposedSpec const& spec) : Encoding{spec.scheme, spec.shape, parts_of(spec)}, spec_{spec} {}

  // With inputs in any order, all groups of an output are needed for any of them.
  int dimension_to_keep() const override { return parts()[2].grid.axes[0].dim < 0 ? 1 : -1; }

  void decode(Box const& box, std::span<PartBytes const> given, DType dtype, MemoryView const& memory) const override {
    StandardArithmetic const standard;
    Tile tile{box, given, scales_of(parts()[2], given[2], {.zero = true}), {}};
    tile.indexed = spec_.group_index.has_value();
    if (tile.indexed) {
      tile.groups.resize(given[3].box.size());
      std::memcpy(tile.groups.data(), given[3].data, tile.groups.size() * sizeof(std::int32_t));
    }
    std::int64_t const first_group = given[2].box.origin[0], end_group = first_group + given[2].box.shape[0];
    tile.first_group = first_group;
    for (auto const group : tile.groups)
      if (group < first_group || group >= end_group) this->refuse(3, "an input is in group " + std::to_string(group) + ", where only groups " + std::to_string(first_group) + " to " + std::to_string(end_group - 1) + " can be");
    // The runs of inputs in one group.
    for (std::int64_t k = box.origin[1], end = k + box.shape[1]; k < end;) {
      std::int64_t const group = tile.group_of(k, spec_.group);
      std::int64_t stop = k + 1;
      if (!tile.indexed) stop = std::min(end, (k / spec_.group + 1) * spec_.group);
      else
        while (stop < end && tile.group_of(stop, spec_.group) == group) ++stop;
      tile.runs.push_back({k, stop, group - first_group});
      k = stop;
    }
    if (spec_.interleaved) decode_interleaved(tile, dtype, memory);
    else decode_words(tile, dtype, memory);
  }

 private:
  struct Run {
    std::int64_t begin, end, group;   // inputs; group in the box of the scales
  };
  struct Tile {
    Box const& box;
    std::span<PartBytes const> given;
    std::vector<float> scales;
    std::vector<std::int32_t> groups;   // of each input of the tile
    std::vector<Run> runs{};
    bool indexed = false;
    std::int64_t first_group = 0;

    std::int64_t group_of(std::int64_t k, std::int64_t group) const { return indexed ? groups[static_cast<std::size_t>(k - given[3].box.origin[0])] : k / group; }
    float scale(std::int64_t group, std::int64_t n) const { return scales[static_cast<std::size_t>(group * given[2].box.shape[1] + (n - given[2].box.origin[1]))]; }
  };
  static constexpr std::array<int, 8> awq_bits{0, 16, 4, 20, 8, 24, 12, 28};   // where the eight outputs of a word stand

  static std::vector<EncodedPart> parts_of(TransposedSpec const& spec) {
    std::vector<EncodedPart> parts;
    parts.push_back(spec.codes);
    parts.push_back(spec.zeros);
    parts.push_back(spec.scales);
    if (spec.group_index) parts.push_back(*spec.group_index);
    return parts;
  }

  static std::uint32_t word_at(PartBytes const& part, std::int64_t row, std::int64_t column) {
    std::uint32_t word;
    std::memcpy(&word, part.data + ((row - part.box.origin[0]) * part.box.shape[1] + (column - part.box.origin[1])) * 4, 4);
    return word;
  }
  float zero(Tile const& tile, std::int64_t group, std::int64_t n) const {
    std::int64_t const per = 32 / spec_.bits;
    std::uint32_t const word = word_at(tile.given[1], tile.first_group + group, n / per), mask = spec_.bits == 32 ? ~0u : (1u << spec_.bits) - 1;
    int const bit = spec_.interleaved ? awq_bits[static_cast<std::size_t>(n % 8)] : static_cast<int>(n % per) * spec_.bits;
    // As the loaders do: one more than all ones is zero again.
    return static_cast<float>((((word >> bit) & mask) + static_cast<std::uint32_t>(spec_.stored_zero_plus)) & mask);
  }

  // Rows of outputs are made of columns of words: some columns at a time, so that a line of cache is read once.
  void decode_words(Tile const& tile, DType dtype, MemoryView const& memory) const {
    Box const& box = tile.box;
    PartBytes const& codes = tile.given[0];
    constexpr std::int64_t columns = 16;
    std::int64_t const words = codes.box.shape[0], per = 32 / spec_.bits, first = codes.box.origin[0] * per, count = box.shape[1];
    std::vector<std::uint32_t> turned(static_cast<std::size_t>(words * columns));
    std::vector<float> out(static_cast<std::size_t>(count));
    // Where neighbours are in different groups, an output's scales and zeros are made once, and looked up.
    std::int64_t const groups = tile.given[2].box.shape[0];
    bool const scattered = tile.indexed && static_cast<std::int64_t>(tile.runs.size()) > count / 8;
    std::vector<float> scale_of(static_cast<std::size_t>(scattered ? groups : 0)), zero_of(scale_of.size());
    std::uint32_t const mask = (1u << spec_.bits) - 1;
    std::optional<NibbleTables> tables;
    if (scattered && spec_.bits == 4) tables.emplace(tile.groups, tile.first_group, groups);
    for (std::int64_t n = box.origin[0], end = n + box.shape[0]; n < end; n += columns) {
      std::int64_t const here = std::min(columns, end - n);
      for (std::int64_t w = 0; w < words; ++w) {
        std::byte const* const line = codes.data + (w * codes.box.shape[1] + (n - codes.box.origin[1])) * 4;
        for (std::int64_t c = 0; c < here; ++c) std::memcpy(&turned[static_cast<std::size_t>(c * words + w)], line + c * 4, 4);
      }
      for (std::int64_t c = 0; c < here; ++c) {
        auto const* const row = reinterpret_cast<std::byte const*>(turned.data() + c * words);
        if (tables) {
          for (std::int64_t g = 0; g < groups; ++g) tables->set(g, zero(tile, g, n + c), tile.scale(g, n + c));
          tables->look_up(row, box.origin[1] - first, box.origin[1] - tile.given[3].box.origin[0], count, out.data());
          store(tile, n + c, out.data(), dtype, memory);
          continue;
        }
        if (scattered) {
          for (std::int64_t g = 0; g < groups; ++g) scale_of[static_cast<std::size_t>(g)] = tile.scale(g, n + c), zero_of[static_cast<std::size_t>(g)] = zero(tile, g, n + c);
          std::int64_t at = box.origin[1] - first;
          for (std::int64_t k = 0; k < count; ++k, ++at) {
            auto const g = static_cast<std::size_t>(tile.groups[static_cast<std::size_t>(k)] - tile.first_group);
            auto const code = (static_cast<std::uint32_t>(row[at * spec_.bits / 8]) >> static_cast<unsigned>(at * spec_.bits % 8)) & mask;   // stays inside a byte
            out[static_cast<std::size_t>(k)] = (static_cast<float>(code) - zero_of[g]) * scale_of[g];
          }
          store(tile, n + c, out.data(), dtype, memory);
          continue;
        }
        for (auto const& run : tile.runs) unsigned_codes(row, run.begin - first, run.end - run.begin, zero(tile, run.group, n + c), tile.scale(run.group, n + c), out.data() + (run.begin - box.origin[1]));
        store(tile, n + c, out.data(), dtype, memory);
      }
    }
  }
  void unsigned_codes(std::byte const* codes, std::int64_t at, std::int64_t count, float zero, float scale, float* out) const {
    if (spec_.bits == 8) return block_kernels().u8(codes + at, static_cast<std::size_t>(count), zero, scale, out);
    if (spec_.bits == 4 && count >= 8) {
      std::array<float, 16> table{};
      for (std::size_t c = 0; c < 16; ++c) table[c] = (static_cast<float>(c) - zero) * scale;
      return nibbles(codes, at, count, table.data(), out);
    }
    std::uint32_t const mask = (1u << spec_.bits) - 1;
    for (std::int64_t i = 0; i < count; ++i, ++at) {
      auto const bit = static_cast<unsigned>(at * spec_.bits % 8);
      out[i] = (static_cast<float>((static_cast<std::uint32_t>(codes[at * spec_.bits / 8]) >> bit) & mask) - zero) * scale;   // 2 and 4 bits stay inside a byte
    }
  }

  void decode_interleaved(Tile const& tile, DType dtype, MemoryView const& memory) const {
    Box const& box = tile.box;
    PartBytes const& codes = tile.given[0];
    std::int64_t const count = box.shape[1], stride = codes.box.shape[1];
    std::vector<std::uint32_t> words(static_cast<std::size_t>(count));
    std::vector<float> out(static_cast<std::size_t>(count));
    for (std::int64_t n = box.origin[0], end = n + box.shape[0]; n < end;) {
      std::int64_t const stop = std::min(end, (n / 8 + 1) * 8);
      std::byte const* const column = codes.data + (n / 8 - codes.box.origin[1]) * 4;
      for (std::int64_t k = 0; k < count; ++k) std::memcpy(&words[static_cast<std::size_t>(k)], column + k * stride * 4, 4);
      for (; n < stop; ++n) {
        int const bit = awq_bits[static_cast<std::size_t>(n % 8)];
        for (auto const& run : tile.runs)
          block_kernels().nibble_of_words(words.data() + (run.begin - box.origin[1]), static_cast<std::size_t>(run.end - run.begin), bit, zero(tile, run.group, n), tile.scale(run.group, n), out.data() + (run.begin - box.origin[1]));
        store(tile, n, out.data(), dtype, memory);
      }
    }
  }

  static void store(Tile const& tile, std::int64_t n, float const* values, DType dtype, MemoryView const& memory) {
    std::byte* const target = memory.data + (n - tile.box.origin[0]) * memory.strides[0] * (bits_of(dtype) / 8);
    store_floats(values, static_cast<std::size_t>(tile.box.shape[1]), dtype, target, memory.strides[1]);
  }

  TransposedSpec spec_;
};

/// bitsandbytes' codes of four bits: along the elements in row-major order, whatever the shape.
struct FlatSpec {
  std::string scheme;
  Extents shape;
  std::int64_t block = 64;
  EncodedPart codes, scales, table;                                   // scales: F32, or U8 where they are quantized themselves
  std::optional<EncodedPart> nested_scales{}, nested_table{};
  std::int64_t nested_block = 256;
  float nested_offset = 0;
};

template <class D = Deferred>
class FlatEncoding final : public Encoding {
 public:
  explicit FlatEncoding(FlatSpec const& spec) : Encoding{spec.scheme, spec.shape, parts_of(spec)}, spec_{spec}, strides_{row_major_strides(spec.shape)} {}

  void decode(Box const& box, std::span<PartBytes const> given, DType dtype, MemoryView const& memory) const override {
    StandardArithmetic const standard;
    std::vector<float> scales, nested_table, nested;
    if (spec_.nested_scales) {
      nested = numbers_of(parts()[3], given[3]);
      nested_table = numbers_of(parts()[4], given[4]);
    } else {
      scales = numbers_of(parts()[1], given[1]);
    }
    std::vector<float> const base = numbers_of(parts()[2], given[2]);
    std::array<std::vector<float> const*, 4> const lists{&scales, &nested_table, &nested, &base};
    for (auto const* list : lists)
      for (auto const number : *list)
        if (!std::isfinite(number)) throw Error{ErrorCode::quant_mismatch, parts()[0].name + ": a number of its scales or tables is NaN or infinite"};
    int const last = box.rank() - 1;
    fill_rows(box, dtype, memory, [&](Extents const& index, std::int64_t begin, std::int64_t end, float* out) {
      std::int64_t row = 0;
      for (int d = 0; d < last; ++d) row += index[d] * strides_[d];
      std::array<float, 16> table{};
      for (std::int64_t at = row + begin, stop = 0; at < row + end; at = stop) {
        std::int64_t const block = at / spec_.block;
        stop = std::min(row + end, (block + 1) * spec_.block);
        std::size_t const b = position(given[1], 1, index, block, at - row, spec_.block);
        float scale;
        if (spec_.nested_scales) {
          auto const code = static_cast<std::uint8_t>(given[1].data[b]);
          std::int64_t const outer = block / spec_.nested_block - given[3].box.origin[0];
          scale = rounded(nested_table[code] * nested[static_cast<std::size_t>(outer)]) + spec_.nested_offset;
        } else {
          scale = scales[b];
        }
        for (std::size_t c = 0; c < 16; ++c) table[c] = base[c] * scale;
        std::byte const* codes = given[0].data + position(given[0], 0, index, at / 2, at - row, 2);
        float* to = out + (at - row - begin);
        std::int64_t count = stop - at;
        if (at % 2 != 0) *to++ = table[static_cast<unsigned>(*codes++) & 15u], --count;
        block_kernels().nibbles_high_first(codes, static_cast<std::size_t>(count / 2), table.data(), to);
        if (count % 2 != 0) to[count - 1] = table[static_cast<unsigned>(codes[count / 2]) >> 4];
      }
    });
  }

 private:
  static std::vector<EncodedPart> parts_of(FlatSpec const& spec) {
    std::vector<EncodedPart> parts;
    parts.push_back(spec.codes);
    parts.push_back(spec.scales);
    parts.push_back(spec.table);
    if (spec.nested_scales) {
      parts.push_back(*spec.nested_scales);
      parts.push_back(*spec.nested_table);
    }
    return parts;
  }
  // Where an element of a part stands in its box: `flat`, its number; or, where the part is seen in rows as the tensor is, by the row and the column.
  std::size_t position(PartBytes const& bytes, std::size_t part, Extents const& index, std::int64_t flat, std::int64_t column, std::int64_t each) const {
    if (parts()[part].grid.flat_each > 0) return static_cast<std::size_t>(flat - bytes.box.origin[0]);
    int const last = bytes.box.rank() - 1;
    std::int64_t at = column / each - bytes.box.origin[last], stride = bytes.box.shape[last];
    for (int d = last; d-- > 0; stride *= bytes.box.shape[d]) at += (index[d] - bytes.box.origin[d]) * stride;
    return static_cast<std::size_t>(at);
  }

  FlatSpec spec_;
  Extents strides_;
};

}  // namespace dcp::detail
