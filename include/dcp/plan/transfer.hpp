// SPDX-License-Identifier: Apache-2.0
#pragma once
// The unit of planned I/O: a box of a tensor that lies in local memory with one set of strides and in a file with another.

#include <dcp/base/config.hpp>
#include <dcp/base/error.hpp>
#include <dcp/core/box.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/core/layout.hpp>
#include <dcp/core/tensor_view.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

namespace dcp {

/// Bytes of `elements` elements; the planner has checked that they are whole bytes.
constexpr std::uint64_t bytes_of(DType dtype, std::int64_t elements) {
  return static_cast<std::uint64_t>(elements) * static_cast<std::uint64_t>(bits_of(dtype)) / 8;
}

/// Where bytes come from that are in nobody's memory: they are made when they are written.
class ElementSource {
 public:
  virtual ~ElementSource() = default;
  /// Elements [first, first + count) of the box of a transfer, in row-major order, to `out`. Called by several threads at once.
  virtual void produce(std::int64_t first, std::int64_t count, std::byte* out) const = 0;
  /// Whether the state's memory is no longer asked.
  virtual bool copied() const { return false; }
};

/// Elements [begin, end) of a box, in row-major order of the box, between memory and a file.
///
/// Law       the file position of an element rises with its number, so a file window is a range of elements
struct Transfer {
  std::uint32_t tensor = 0;       // index of the entry that it belongs to
  std::uint32_t file = 0;         // index of the file
  DType dtype{};                  // in the file
  DType memory_dtype{};           // in memory; differs only where a load casts
  std::uint64_t offset = 0;       // file position, in bytes, of the box's first element
  Extents shape;                  // of the box
  Extents file_strides;           // in elements, row-major strides of the array that the file holds
  MemoryView memory;              // of the box's first element
  std::int64_t begin = 0, end = 0;
  ElementSource const* source = nullptr;   // of the bytes, instead of memory

  std::uint64_t bytes() const { return bytes_of(dtype, end - begin); }

  /// File position just before element `element`.
  template <class = Deferred>
  std::uint64_t position_of(std::int64_t element) const {
    if (element == 0) return offset;
    std::int64_t at = 0;
    for (int d = shape.rank(); d-- > 0;) {
      at += element % shape[d] * file_strides[d];
      element /= shape[d];
    }
    return offset + bytes_of(dtype, at);
  }
  /// File positions that the elements lie between; both are `offset` if there are none.
  std::uint64_t file_begin() const { return begin == end ? offset : position_of(begin); }
  std::uint64_t file_end() const { return begin == end ? file_begin() : position_of(end - 1) + bytes_of_one(); }

  /// How many elements of the box lie before file position `position`, clamped to [begin, end]. A position inside an element
  /// counts the element as before.
  template <class = Deferred>
  std::int64_t elements_before(std::uint64_t position) const {
    if (position <= offset || begin == end) return begin;
    std::int64_t rest = static_cast<std::int64_t>(ceil_div<std::uint64_t>((position - offset) * 8, static_cast<std::uint64_t>(bits_of(dtype))));
    std::int64_t inner = shape.elements(), count = 0;
    for (int d = 0; d < shape.rank() && rest > 0; ++d) {
      inner /= shape[d];
      std::int64_t const whole = rest / file_strides[d];
      if (whole >= shape[d]) {
        count += shape[d] * inner;
        rest = 0;
        break;
      }
      count += whole * inner;
      rest -= whole * file_strides[d];
    }
    if (shape.rank() == 0 && rest > 0) count = 1;
    return std::clamp(count, begin, end);
  }

  /// Calls visit(file position, memory, bytes) for the longest runs of elements [from, to) that are contiguous in both.
  template <class Visit>
  void for_each_run(std::int64_t from, std::int64_t to, Visit visit) const {
    dcp::for_each_run(shape, file_strides, memory.strides, from, to, [&](std::int64_t, std::int64_t in_file, std::int64_t in_memory, std::int64_t length) {
      visit(offset + bytes_of(dtype, in_file), memory.data + static_cast<std::ptrdiff_t>(bytes_of(memory_dtype, in_memory)), static_cast<std::size_t>(bytes_of(dtype, length)));
    });
  }
  /// Calls visit(number of the first element, file position, elements) for the longest runs of elements [from, to) that are contiguous in the file.
  template <class Visit>
  void for_each_numbered_run(std::int64_t from, std::int64_t to, Visit visit) const {
    dcp::for_each_run(shape, file_strides, file_strides, from, to, [&](std::int64_t element, std::int64_t in_file, std::int64_t, std::int64_t length) { visit(element, offset + bytes_of(dtype, in_file), length); });
  }
  /// Calls visit(file position, bytes) for the longest runs of elements [from, to) that are contiguous in the file.
  template <class Visit>
  void for_each_file_run(std::int64_t from, std::int64_t to, Visit visit) const {
    dcp::for_each_run(shape, file_strides, file_strides, from, to, [&](std::int64_t, std::int64_t in_file, std::int64_t, std::int64_t length) {
      visit(offset + bytes_of(dtype, in_file), bytes_of(dtype, length));
    });
  }

 private:
  std::uint64_t bytes_of_one() const { return std::max<std::uint64_t>(1, static_cast<std::uint64_t>(bits_of(dtype)) / 8); }
};

/// `transfer` in bytes instead of elements smaller than a byte: the dimensions that are contiguous on both sides become one run, which
/// must be whole bytes. Windows and pieces can then end anywhere.
///
/// Throws    Error(misaligned) if a run begins or ends inside a byte
template <class = Deferred>
Transfer in_whole_bytes(Transfer transfer) {
  std::int64_t const bits = bits_of(transfer.dtype);
  int inner = transfer.shape.rank();
  std::int64_t run = 1;
  while (inner > 0 && (transfer.shape[inner - 1] == 1 || (transfer.file_strides[inner - 1] == run && transfer.memory.strides[inner - 1] == run))) run *= transfer.shape[--inner];
  bool whole = run * bits % 8 == 0;
  Extents shape = Extents::filled(inner + 1, 1), file_strides = shape, memory_strides = shape;
  for (int d = 0; d < inner; ++d) {
    whole = whole && transfer.file_strides[d] * bits % 8 == 0 && transfer.memory.strides[d] * bits % 8 == 0;
    shape[d] = transfer.shape[d];
    file_strides[d] = transfer.file_strides[d] * bits / 8;
    memory_strides[d] = transfer.memory.strides[d] * bits / 8;
  }
  if (!whole) throw Error{ErrorCode::misaligned, "a run of " + std::to_string(run) + " elements of " + std::string{to_string(transfer.dtype)} + " does not begin and end on a byte"};
  shape[inner] = run * bits / 8;
  transfer.shape = shape;
  transfer.file_strides = file_strides;
  transfer.memory.strides = memory_strides;
  transfer.dtype = transfer.memory_dtype = DType::u8;
  transfer.begin = transfer.begin * bits / 8;
  transfer.end = transfer.end * bits / 8;
  return transfer;
}

/// The transfer of `part`, a box inside both `held` (what memory holds) and `stored` (what the file holds, densely, at `offset`). Of
/// elements smaller than a byte it is a transfer of bytes.
///
/// Throws    Error(misaligned) as in_whole_bytes
template <class = Deferred>
Transfer make_transfer(DType dtype, DType memory_dtype, Box const& part, Box const& held, MemoryView const& memory, Box const& stored, std::uint64_t offset) {
  Transfer transfer;
  transfer.dtype = dtype;
  transfer.memory_dtype = memory_dtype;
  transfer.shape = part.shape;
  transfer.file_strides = row_major_strides(stored.shape);
  transfer.memory = memory;
  std::int64_t in_file = 0, in_memory = 0;
  std::int64_t const bits = bits_of(dtype);
  for (int d = 0; d < part.rank(); ++d) {
    in_file += (part.origin[d] - stored.origin[d]) * transfer.file_strides[d];
    in_memory += (part.origin[d] - held.origin[d]) * memory.strides[d];
  }
  transfer.offset = offset + bytes_of(dtype, in_file);
  transfer.memory.data += static_cast<std::ptrdiff_t>(bytes_of(memory_dtype, in_memory));
  transfer.end = part.shape.elements();
  if (bits >= 8 || transfer.end == 0) return transfer;
  if (in_file * bits % 8 != 0 || in_memory * bits % 8 != 0) throw Error{ErrorCode::misaligned, "a box of " + std::string{to_string(dtype)} + " elements begins inside a byte"};
  return in_whole_bytes(transfer);
}

/// Elements [begin, end) of a transfer whose box is dense in its "file" at 0, from memory into `out`, which gets their size: for messages.
template <class = Deferred>
void pack(Transfer const& transfer, std::int64_t begin, std::int64_t end, Bytes& out) {
  std::uint64_t const base = bytes_of(transfer.dtype, begin);
  out.resize(static_cast<std::size_t>(bytes_of(transfer.dtype, end - begin)));
  transfer.for_each_run(begin, end, [&](std::uint64_t at, std::byte const* memory, std::size_t size) { std::memcpy(out.data() + (at - base), memory, size); });
}
/// The way back: from `bytes`, which are those of [begin, end), to memory.
template <class = Deferred>
void unpack(Transfer const& transfer, std::int64_t begin, std::int64_t end, ConstByteSpan bytes) {
  std::uint64_t const base = bytes_of(transfer.dtype, begin);
  transfer.for_each_run(begin, end, [&](std::uint64_t at, std::byte* memory, std::size_t size) { std::memcpy(memory, bytes.data() + (at - base), size); });
}

/// Calls visit(box, memory) for the boxes that a part consists of, none of them empty; `memory` is then that of the box's first element.
template <class Visit>
void for_each_held_box(HeldPart const& held, DType memory_dtype, MemoryView const& memory, Visit visit) {
  if (held.empty()) return;
  if (!held.flat) return static_cast<void>(visit(held.box, memory));
  std::int64_t const step = memory.strides[0];
  for_each_box(held.box, held.begin, held.end, [&](Box const& box, std::int64_t first) {
    MemoryView at{memory.data + static_cast<std::ptrdiff_t>(bytes_of(memory_dtype, (first - held.begin) * step)), row_major_strides(held.box.shape)};
    for (int d = 0; d < at.strides.rank(); ++d) at.strides[d] *= step;
    visit(box, at);
  });
}
/// Elements [begin, end) of a part, and their memory.
template <class = Deferred>
std::pair<HeldPart, MemoryView> slice_of(HeldPart held, DType memory_dtype, MemoryView memory, std::int64_t begin, std::int64_t end) {
  memory.data += static_cast<std::ptrdiff_t>(bytes_of(memory_dtype, begin * memory.strides[0]));
  return {HeldPart{held.box, held.begin + begin, held.begin + end, true}, memory};
}

/// Whether every run of `part` starts and ends on a byte in an array of `stored`'s shape: a condition for elements smaller than a byte.
template <class = Deferred>
bool on_byte_boundaries(DType dtype, Box const& part, Box const& stored) {
  int const bits = bits_of(dtype);
  if (bits % 8 == 0 || part.empty()) return true;
  Extents const strides = row_major_strides(stored.shape);
  std::int64_t start = 0;
  for (int d = 0; d < part.rank(); ++d) start += (part.origin[d] - stored.origin[d]) * strides[d];
  bool whole = start * bits % 8 == 0;
  int inner = part.rank();
  std::int64_t run = 1;
  while (inner > 0 && (part.shape[inner - 1] == 1 || strides[inner - 1] == run)) run *= part.shape[--inner];
  whole = whole && run * bits % 8 == 0;
  for (int d = 0; d < inner; ++d) whole = whole && (part.shape[d] == 1 || strides[d] * bits % 8 == 0);
  return whole;
}

}  // namespace dcp
