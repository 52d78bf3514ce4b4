// SPDX-License-Identifier: Apache-2.0
#include <dcp/plan/transfer.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace dcp;
using namespace dcp::test;

namespace {

// A part of a stored box and of what memory holds, with bytes in both.
struct Piece {
  DType dtype{};
  Box stored, held, part;
  Bytes file, memory;
  Extents memory_strides;
  std::uint64_t offset = 0;

  Transfer transfer() { return make_transfer(dtype, dtype, part, held, {memory.data(), memory_strides}, stored, offset); }
};

Box box_inside(Random& random, Box const& outer) {
  Box box = outer;
  for (int d = 0; d < box.rank(); ++d) {
    std::int64_t const begin = random.between(0, outer.shape[d]), end = random.between(0, outer.shape[d]);
    box.origin[d] = outer.origin[d] + std::min(begin, end);
    box.shape[d] = std::max(begin, end) - std::min(begin, end);
    if (random.one_in(4)) box.origin[d] = outer.origin[d], box.shape[d] = outer.shape[d];
  }
  return box;
}

Piece any_piece(Random& random, bool sub_byte) {
  static constexpr std::array<DType, 4> wide{DType::u8, DType::bf16, DType::f32, DType::c64};
  static constexpr std::array<DType, 3> narrow{DType::f4, DType::f6_e2m3, DType::f6_e3m2};
  for (;;) {
    Piece piece;
    piece.dtype = sub_byte ? random.any_of(narrow) : random.any_of(wide);
    Box const global = Box::whole(any_shape(random, 4, 800));
    piece.stored = box_inside(random, global);
    piece.held = box_inside(random, global);
    if (global.rank() > 0 && random.one_in(3)) piece.held = piece.stored;
    if (!intersect(piece.stored, piece.held, piece.part)) continue;
    Extents pitch = piece.held.shape;
    if (!sub_byte)
      for (int d = 0; d < pitch.rank(); ++d) pitch[d] += random.between(0, 2);
    piece.memory_strides = row_major_strides(pitch);
    auto const bits = static_cast<std::uint64_t>(bits_of(piece.dtype));
    piece.offset = static_cast<std::uint64_t>(random.between(0, 50));
    piece.file = random.bytes(piece.offset + (static_cast<std::uint64_t>(piece.stored.shape.elements()) * bits + 7) / 8);
    piece.memory = random.bytes((static_cast<std::uint64_t>(pitch.elements()) * bits + 7) / 8);
    if (sub_byte && !(on_byte_boundaries(piece.dtype, piece.part, piece.stored) && on_byte_boundaries(piece.dtype, piece.part, piece.held))) continue;
    return piece;
  }
}

// Element `index` of an array, as a number.
std::uint64_t element(Bytes const& bytes, std::uint64_t first_byte, std::int64_t at, int bits) {
  std::uint64_t value = 0;
  for (std::uint64_t bit = 0; bit < static_cast<std::uint64_t>(bits); ++bit) {
    std::uint64_t const place = first_byte * 8 + static_cast<std::uint64_t>(at) * static_cast<std::uint64_t>(bits) + bit;
    value |= static_cast<std::uint64_t>((bytes[static_cast<std::size_t>(place / 8)] >> static_cast<int>(place % 8)) & std::byte{1}) << bit;
  }
  return value;
}

}  // namespace

TEST_CASE("law: the runs of a transfer move every element of the part from its place in the file to its place in memory, and touch nothing else") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 5000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Piece piece = any_piece(random, random.one_in(3));
    int const bits = bits_of(piece.dtype);
    CAPTURE(piece.dtype);
    CAPTURE(piece.part);
    CAPTURE(piece.stored);
    CAPTURE(piece.held);
    Bytes const before = piece.memory;
    Transfer const transfer = piece.transfer();
    // In pieces, as windows of a file make them.
    std::uint64_t moved = 0;
    std::int64_t from = transfer.begin;
    while (from < transfer.end) {
      std::int64_t const to = random.between(from + 1, transfer.end);
      transfer.for_each_run(from, to, [&](std::uint64_t at, std::byte* memory, std::size_t size) {
        REQUIRE(at >= piece.offset);
        REQUIRE(at + size <= piece.file.size());
        REQUIRE(memory >= piece.memory.data());
        REQUIRE(memory + size <= piece.memory.data() + piece.memory.size());
        std::memcpy(memory, piece.file.data() + at, size);
        moved += size;
      });
      from = to;
    }
    REQUIRE(moved == transfer.bytes());
    REQUIRE(transfer.bytes() == bytes_of(piece.dtype, piece.part.shape.elements()));
    Extents const file_strides = row_major_strides(piece.stored.shape);
    bool right = true;
    Bytes wanted = before;
    for_each_element(piece.part, [&](Extents const& index) {
      Extents in_file = index, in_memory = index;
      for (int d = 0; d < index.rank(); ++d) in_file[d] -= piece.stored.origin[d], in_memory[d] -= piece.held.origin[d];
      std::int64_t const to = linear(in_memory, piece.memory_strides);
      right = right && element(piece.memory, 0, to, bits) == element(piece.file, piece.offset, linear(in_file, file_strides), bits);
      for (int bit = 0; bit < bits; ++bit) {
        auto const place = static_cast<std::size_t>(to * bits + bit);
        wanted[place / 8] &= ~(std::byte{1} << static_cast<int>(place % 8));
        wanted[place / 8] |= piece.memory[place / 8] & (std::byte{1} << static_cast<int>(place % 8));
      }
    });
    REQUIRE(right);
    REQUIRE(piece.memory == wanted);
  }
}

TEST_CASE("law: elements_before counts the elements that begin before a position, and position_of rises") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 3000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Piece piece = any_piece(random, random.one_in(4));
    Transfer transfer = piece.transfer();
    if (random.one_in(2)) {   // a share of the box
      std::int64_t const a = random.between(transfer.begin, transfer.end), b = random.between(transfer.begin, transfer.end);
      transfer.begin = std::min(a, b);
      transfer.end = std::max(a, b);
    }
    CAPTURE(piece.dtype);
    CAPTURE(piece.part);
    CAPTURE(piece.stored);
    std::vector<std::uint64_t> positions;
    for (std::int64_t e = transfer.begin; e < transfer.end; ++e) positions.push_back(transfer.position_of(e));
    REQUIRE(std::is_sorted(positions.begin(), positions.end()));
    REQUIRE(std::adjacent_find(positions.begin(), positions.end()) == positions.end());
    bool right = true;
    for (std::uint64_t position = 0; position <= piece.file.size() + 3; ++position)
      right = right && transfer.elements_before(position) == transfer.begin + (std::lower_bound(positions.begin(), positions.end(), position) - positions.begin());
    REQUIRE(right);
    if (!positions.empty()) {
      REQUIRE(transfer.file_begin() == positions.front());
      REQUIRE(transfer.file_end() == positions.back() + bytes_of(transfer.dtype, 1));
      REQUIRE(transfer.file_end() <= piece.file.size());
    }
  }
}

TEST_CASE("law: file runs are the longest, and hold the same bytes as the runs in both") {
  auto const seed = first_seed();
  for (std::uint64_t round = 0; round < 3000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    Piece piece = any_piece(random, random.one_in(4));
    Transfer const transfer = piece.transfer();
    std::vector<int> in_file(piece.file.size(), 0);
    std::uint64_t end = 0;
    transfer.for_each_file_run(transfer.begin, transfer.end, [&](std::uint64_t at, std::uint64_t size) {
      REQUIRE(size > 0);
      REQUIRE(at >= end);
      if (end > 0 && piece.part.rank() <= 2) REQUIRE(at > end);   // else they would have been one
      end = at + size;
      for (auto i = at; i < end; ++i) ++in_file[static_cast<std::size_t>(i)];
    });
    transfer.for_each_run(transfer.begin, transfer.end, [&](std::uint64_t at, std::byte*, std::size_t size) {
      for (auto i = at; i < at + size; ++i) --in_file[static_cast<std::size_t>(i)];
    });
    REQUIRE(std::count(in_file.begin(), in_file.end(), 0) == static_cast<std::ptrdiff_t>(in_file.size()));
  }
}

TEST_CASE("law: on_byte_boundaries is whether every run of the part begins and ends on a byte") {
  auto const seed = first_seed();
  int refused = 0, allowed = 0;
  for (std::uint64_t round = 0; round < 4000; ++round) {
    INFO("DCP_SEED=", seed + round);
    Random random{seed + round};
    DType const dtype = random.one_in(2) ? DType::f4 : DType::f6_e2m3;
    std::int64_t const bits = bits_of(dtype);
    Box const stored = Box::whole(any_shape(random, 3, 400)), part = box_inside(random, stored);
    CAPTURE(dtype);
    CAPTURE(part);
    CAPTURE(stored);
    if (part.empty()) {
      REQUIRE(on_byte_boundaries(dtype, part, stored));
      continue;
    }
    Extents const strides = row_major_strides(stored.shape);
    std::vector<std::int64_t> places;
    for_each_element(part, [&](Extents const& index) { places.push_back(linear(index, strides)); });
    bool whole = true;
    for (std::size_t i = 0; i < places.size(); ++i) {
      if (i == 0 || places[i - 1] + 1 != places[i]) whole = whole && places[i] * bits % 8 == 0;
      if (i + 1 == places.size() || places[i] + 1 != places[i + 1]) whole = whole && (places[i] + 1) * bits % 8 == 0;
    }
    // What it allows is right; it may refuse only what is wrong.
    REQUIRE(on_byte_boundaries(dtype, part, stored) == whole);
    ++(whole ? allowed : refused);
    Bytes memory((static_cast<std::size_t>(part.shape.elements() * bits) + 7) / 8);
    auto const make = [&] { return make_transfer(dtype, dtype, part, part, {memory.data(), row_major_strides(part.shape)}, stored, 0); };
    if (whole && on_byte_boundaries(dtype, part, part)) CHECK(make().bytes() == bytes_of(dtype, part.shape.elements()));
    if (!whole) CHECK_THROWS_AS(make(), Error);
  }
  CHECK(refused > 100);
  CHECK(allowed > 100);
}

TEST_CASE("Transfer: a scalar is one element") {
  float value = 0;
  Transfer const transfer = make_transfer(DType::f32, DType::f32, Box::whole({}), Box::whole({}), {reinterpret_cast<std::byte*>(&value), {}}, Box::whole({}), 100);
  CHECK(transfer.bytes() == 4);
  CHECK(transfer.elements_before(100) == 0);
  CHECK(transfer.elements_before(101) == 1);
  CHECK(transfer.elements_before(104) == 1);
  CHECK(transfer.file_begin() == 100);
  CHECK(transfer.file_end() == 104);
  int runs = 0;
  transfer.for_each_run(0, 1, [&](std::uint64_t at, std::byte* memory, std::size_t size) {
    ++runs;
    CHECK(at == 100);
    CHECK(memory == reinterpret_cast<std::byte*>(&value));
    CHECK(size == 4);
  });
  CHECK(runs == 1);
}

TEST_CASE("Transfer: a part without elements has no runs, no bytes and a place") {
  for (Extents const& shape : {Extents{0}, Extents{0, 3}, Extents{3, 0}, Extents{2, 0, 2}}) {
    CAPTURE(shape);
    Extents pitch = shape;
    for (int d = 0; d < pitch.rank(); ++d) pitch[d] += 2;
    Transfer const transfer = make_transfer(DType::f32, DType::f32, Box::whole(shape), Box::whole(shape), {nullptr, row_major_strides(pitch)}, Box::whole(pitch), 10);
    CHECK(transfer.bytes() == 0);
    CHECK(transfer.elements_before(1000) == 0);
    CHECK(transfer.file_begin() == 10);
    CHECK(transfer.file_end() == 10);
    transfer.for_each_run(0, 0, [](std::uint64_t, std::byte*, std::size_t) { FAIL("a run"); });
    transfer.for_each_file_run(0, 0, [](std::uint64_t, std::uint64_t) { FAIL("a run"); });
  }
}

TEST_CASE("Transfer: columns of a matrix are one run a row") {
  std::vector<float> memory(6);
  // Columns 2 and 3 of a [3, 10] that lies at byte 100.
  Transfer const transfer = make_transfer(DType::f32, DType::f32, {{0, 2}, {3, 2}}, {{0, 2}, {3, 2}}, {reinterpret_cast<std::byte*>(memory.data()), {2, 1}}, Box::whole({3, 10}), 100);
  std::vector<std::uint64_t> at;
  transfer.for_each_run(0, 6, [&](std::uint64_t position, std::byte* target, std::size_t size) {
    CHECK(size == 8);
    CHECK(target == reinterpret_cast<std::byte*>(memory.data() + 2 * at.size()));
    at.push_back(position);
  });
  CHECK(at == std::vector<std::uint64_t>{108, 148, 188});
  CHECK(transfer.elements_before(108) == 0);
  CHECK(transfer.elements_before(109) == 1);   // a position inside an element counts it
  CHECK(transfer.elements_before(112) == 1);
  CHECK(transfer.elements_before(130) == 2);
  CHECK(transfer.elements_before(148) == 2);
  CHECK(transfer.elements_before(1 << 20) == 6);
}
