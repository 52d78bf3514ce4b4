// SPDX-License-Identifier: Apache-2.0
// Views of storages: permuted, sliced, stepped, expanded and overlapping ones, decoded box by box, against a loop over elements.
#include <dcp/core/strided_tensor.hpp>

#include "support/campaign.hpp"
#include "support/generate.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <vector>

using namespace dcp;
using namespace dcp::test;

namespace {

struct View {
  Extents shape;
  std::vector<std::uint64_t> strides;
  std::size_t span = 0;        // elements of the storage that it reaches
  bool permutation = false;    // of the dimensions of an array without gaps
};

View any_view(Random& random) {
  View view;
  view.shape = any_shape(random, 4, 200);
  int const rank = view.shape.rank();
  std::vector<int> order;
  for (int d = 0; d < rank; ++d) order.push_back(d);
  random.shuffle(order);
  view.strides.assign(static_cast<std::size_t>(rank), 0);
  auto const kind = random.between(0, 3);   // permuted; with gaps and steps; expanded; anything
  view.permutation = kind == 0;
  std::uint64_t stride = kind == 1 ? static_cast<std::uint64_t>(random.between(1, 3)) : 1;
  for (int const d : order) {
    auto& one = view.strides[static_cast<std::size_t>(d)];
    if (kind == 3) {
      one = static_cast<std::uint64_t>(random.between(0, 9));
      continue;
    }
    one = kind == 2 && random.one_in(2) ? 0 : stride;
    if (one == 0) continue;
    stride *= static_cast<std::uint64_t>(std::max<std::int64_t>(1, view.shape[d]));
    if (kind == 1 && random.one_in(2)) stride += static_cast<std::uint64_t>(random.between(0, 5));   // rows of a wider array, or no multiple of anything
    if (kind == 1 && random.one_in(3)) stride *= 2;
  }
  view.span = view.shape.empty() ? 0 : 1;
  if (!view.shape.empty())
    for (int d = 0; d < rank; ++d) view.span += static_cast<std::size_t>(view.shape[d] - 1) * static_cast<std::size_t>(view.strides[static_cast<std::size_t>(d)]);
  return view;
}

Box any_box(Random& random, Extents const& shape) {
  Box box = Box::whole(shape);
  for (int d = 0; d < shape.rank(); ++d) {
    if (shape[d] == 0) continue;
    box.origin[d] = random.between(0, shape[d] - 1);
    box.shape[d] = random.between(1, shape[d] - box.origin[d]);
    if (random.one_in(3)) box.origin[d] = 0, box.shape[d] = shape[d];
  }
  return box;
}

std::size_t bytes_each(DType dtype) { return static_cast<std::size_t>(bits_of(dtype)) / 8; }

// One element as it is looked at, with nothing of the library's.
Bytes transformed(Bytes element, std::size_t number, ElementTransform how) {
  for (std::size_t at = 0; at < element.size(); at += number) {
    if (how.swapped)
      for (std::size_t i = 0; i < number / 2; ++i) std::swap(element[at + i], element[at + number - 1 - i]);
    if (how.negative) element[at + number - 1] ^= std::byte{0x80};
    if (how.conjugate && at > 0) element[at + number - 1] ^= std::byte{0x80};
  }
  return element;
}

// `box` of the view, dense and row-major.
Bytes looked_at(View const& view, Bytes const& storage, DType dtype, Box const& box, ElementTransform how) {
  std::size_t const each = bytes_each(dtype), number = dtype == DType::c32 || dtype == DType::c64 || dtype == DType::c128 ? each / 2 : each;
  Bytes result;
  for_each_element(box, [&](Extents const& index) {
    std::size_t at = 0;
    for (int d = 0; d < index.rank(); ++d) at += static_cast<std::size_t>(index[d]) * static_cast<std::size_t>(view.strides[static_cast<std::size_t>(d)]);
    auto const begin = storage.begin() + static_cast<std::ptrdiff_t>(at * each);
    Bytes const element = transformed({begin, begin + static_cast<std::ptrdiff_t>(each)}, number, how);
    result.insert(result.end(), element.begin(), element.end());
  });
  return result;
}

// The box of the part that `box` needs, as it would be read: the part is an array over the storage from its first element on.
struct Read {
  Box box;
  Bytes bytes;
};
Read read_part(StridedEncoding<> const& encoding, Bytes const& storage, DType dtype, Box const& box) {
  auto const& part = encoding.parts()[0];
  Read read{part.grid.needed(box, encoding.shape(), part.shape), {}};
  std::size_t const each = bytes_each(dtype);
  auto const strides = row_major_strides(part.shape);
  for_each_element(read.box, [&](Extents const& index) {
    auto const at = static_cast<std::size_t>(linear(index, strides)) * each;
    for (std::size_t i = 0; i < each; ++i) read.bytes.push_back(storage.at(at + i));   // nothing behind the storage is wanted
  });
  read.bytes.reserve(1);
  return read;
}

Bytes decoded(StridedEncoding<> const& encoding, Read const& read, Box const& box, DType to, Extents const& strides, std::size_t elements) {
  Bytes memory(std::max<std::size_t>(1, elements * bytes_each(to)), std::byte{0xEE});
  PartBytes const part{read.bytes.data(), read.box};
  encoding.decode(box, {&part, 1}, to, {memory.data(), strides});
  return memory;
}

std::vector<DType> const dtypes{DType::boolean, DType::u8, DType::i8, DType::f8_e4m3, DType::i16, DType::f16, DType::bf16, DType::i32, DType::f32, DType::c32, DType::i64, DType::f64, DType::c64, DType::c128};
bool is_complex(DType dtype) { return dtype == DType::c32 || dtype == DType::c64 || dtype == DType::c128; }
bool has_sign(DType dtype) { return is_complex(dtype) || is_wide_float(dtype); }

}  // namespace

TEST_CASE("law: a box of a view, decoded from the part of the storage that it needs, is that box of the whole, for every dtype and transform") {
  std::uint64_t const base_seed = first_seed();
  std::size_t boxes = 0, empty = 0, overlapping = 0;
  for (int round = 0; round < test::rounds(20'000, 400'000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    View const view = any_view(random);
    DType const dtype = random.any_of(dtypes);
    ElementTransform const how{is_complex(dtype) && random.one_in(3), has_sign(dtype) && random.one_in(3), bytes_each(dtype) > 1 && random.one_in(3)};
    std::uint64_t const stored = view.span + static_cast<std::uint64_t>(random.one_in(2) ? 0 : random.between(0, 20));
    Bytes const storage = random.bytes(static_cast<std::size_t>(stored) * bytes_each(dtype));
    StridedEncoding<> const encoding{"t", dtype, view.shape, view.strides, stored, how};
    Box const box = any_box(random, view.shape);
    Bytes const wanted = looked_at(view, storage, dtype, box, how);
    Read const read = read_part(encoding, storage, dtype, box);
    auto const count = static_cast<std::size_t>(box.empty() ? 0 : box.shape.elements());
    Bytes got = decoded(encoding, read, box, dtype, row_major_strides(box.shape), count);
    got.resize(wanted.size());
    REQUIRE((got == wanted));
    // Into columns first, with nothing between them written.
    Extents strides = Extents::filled(box.rank(), 1);
    std::int64_t stride = 2;
    for (int d = 0; d < box.rank(); ++d) strides[d] = stride, stride *= std::max<std::int64_t>(1, box.shape[d]);
    Bytes const columns = decoded(encoding, read, box, dtype, strides, count == 0 ? 0 : static_cast<std::size_t>(stride));
    std::size_t at = 0, untouched = 0;
    bool same = true;
    for_each_element(Box::whole(box.empty() ? Extents{0} : box.shape), [&](Extents const& index) {
      auto const from = static_cast<std::size_t>(linear(index, strides)) * bytes_each(dtype);
      same = same && std::equal(wanted.begin() + static_cast<std::ptrdiff_t>(at), wanted.begin() + static_cast<std::ptrdiff_t>(at + bytes_each(dtype)), columns.begin() + static_cast<std::ptrdiff_t>(from));
      for (std::size_t i = 0; i < bytes_each(dtype); ++i) untouched += columns[from + bytes_each(dtype) + i % bytes_each(dtype)] == std::byte{0xEE} ? 1 : 0;
      at += bytes_each(dtype);
    });
    REQUIRE(same);
    REQUIRE(untouched == at);
    ++boxes;
    empty += box.empty() ? 1 : 0;
    overlapping += view.span < static_cast<std::size_t>(view.shape.elements()) ? 1 : 0;
  }
  CHECK(empty * 20 < boxes * 3);
  CHECK(empty * 50 > boxes);
  CHECK(overlapping > boxes / 10);
}

TEST_CASE("law: a box of a permuted array needs as many elements of the storage as it has, and no more") {
  std::uint64_t const base_seed = first_seed();
  std::size_t smaller = 0;
  int const all = test::rounds(5'000, 50'000);
  for (int round = 0; round < all; ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    View const view = any_view(random);
    if (view.shape.empty()) continue;
    std::uint64_t const stored = view.span;
    StridedEncoding<> const encoding{"t", DType::f32, view.shape, view.strides, stored, {}};
    auto const& part = encoding.parts()[0];
    Box const box = any_box(random, view.shape);
    Box const needed = part.grid.needed(box, view.shape, part.shape);
    if (view.permutation) {
      REQUIRE(needed.size() == box.size());
      smaller += needed.size() < Box::whole(view.shape).size() ? 1 : 0;
    }
  }
  CHECK(smaller * 20 > static_cast<std::size_t>(all));
}

TEST_CASE("a column of a wide array needs the column's part, and an expanded dimension is stored once") {
  // Columns 2 and 3 of [6, 8], as a transposed view [8, 6].
  StridedEncoding<> const transposed{"t", DType::f32, {8, 6}, {1, 8}, 48, {}};
  CHECK(transposed.parts()[0].shape == Extents{6, 8});
  CHECK(transposed.parts()[0].grid.needed({{2, 0}, {2, 6}}, {8, 6}, {6, 8}) == Box{{0, 2}, {6, 2}});
  // [3, 4] of which every row is the same.
  StridedEncoding<> const expanded{"t", DType::f32, {3, 4}, {0, 1}, 4, {}};
  CHECK(expanded.parts()[0].shape == Extents{4});
  CHECK(expanded.parts()[0].grid.needed({{1, 1}, {2, 2}}, {3, 4}, {4}) == Box{{1}, {2}});
  // Every second element of every second row of [.., 8]: of a row, what is between its first and last element.
  StridedEncoding<> const stepped{"t", DType::f32, {3, 3}, {16, 2}, 38, {}};
  CHECK(stepped.parts()[0].shape == Extents{3, 8, 2});
  CHECK(stepped.parts()[0].grid.needed({{1, 0}, {1, 3}}, {3, 3}, {3, 8, 2}) == Box{{1, 0, 0}, {1, 3, 2}});
  // The same over a storage that ends with the last element, so that nothing may be read behind it: everything.
  StridedEncoding<> const short_one{"t", DType::f32, {3, 3}, {16, 2}, 37, {}};
  CHECK(short_one.parts()[0].shape == Extents{37});
  // A step that does not divide a row: everything.
  StridedEncoding<> const uneven{"t", DType::f32, {3, 3}, {16, 3}, 39, {}};
  CHECK(uneven.parts()[0].shape == Extents{39});
  // Windows that overlap.
  StridedEncoding<> const windows{"t", DType::f32, {4, 3}, {2, 1}, 9, {}};
  CHECK(windows.parts()[0].shape == Extents{9});
  CHECK(windows.parts()[0].grid.needed({{3, 0}, {1, 3}}, {4, 3}, {9}) == Box::whole(Extents{9}));
}

TEST_CASE("law: a view decoded as another dtype is its elements, transformed, and then cast") {
  std::uint64_t const base_seed = first_seed();
  std::vector<DType> const floats{DType::f32, DType::f64, DType::bf16, DType::f16};
  for (int round = 0; round < test::rounds(2'000, 40'000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    View const view = any_view(random);
    DType const from = random.any_of(floats), to = random.any_of(floats);
    ElementTransform const how{false, random.one_in(2), random.one_in(2)};
    std::uint64_t const stored = view.span;
    Bytes const storage = random.bytes(view.span * bytes_each(from));
    StridedEncoding<> const encoding{"t", from, view.shape, view.strides, stored, how};
    Box const box = any_box(random, view.shape);
    auto const count = static_cast<std::size_t>(box.empty() ? 0 : box.shape.elements());
    Bytes const elements = looked_at(view, storage, from, box, how);
    Bytes wanted(count * bytes_each(to));
    if (from == to) wanted = elements;
    else if (count > 0) cast_elements(from, elements.data(), to, wanted.data(), count);
    Bytes got = decoded(encoding, read_part(encoding, storage, from, box), box, to, row_major_strides(box.shape), count);
    got.resize(wanted.size());
    REQUIRE((got == wanted));
  }
}

TEST_CASE("law: is_dense says whether elements lie in row-major order without gaps") {
  std::uint64_t const base_seed = first_seed();
  int dense = 0, other = 0;
  int const all = test::rounds(5'000, 50'000);
  for (int round = 0; round < all; ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    Random random{seed};
    View const view = any_view(random);
    std::int64_t next = 0;
    bool in_order = true;
    for_each_element(Box::whole(view.shape), [&](Extents const& index) {
      std::int64_t at = 0;
      for (int d = 0; d < index.rank(); ++d) at += index[d] * static_cast<std::int64_t>(view.strides[static_cast<std::size_t>(d)]);
      in_order = in_order && at == next++;
    });
    REQUIRE(is_dense(view.shape, view.strides) == in_order);
    (in_order ? dense : other) += 1;
  }
  CHECK(dense * 10 > all);
  CHECK(other * 10 > all);
}

TEST_CASE("transforms: conjugation flips the sign of the imaginary part, negation of both, and swapping turns each number around") {
  std::vector<float> const numbers{1.5f, -2.5f, 0.0f, 3.0f};   // two complex ones
  auto const run = [&](DType dtype, Extents const& shape, ElementTransform how) {
    StridedEncoding<> const encoding{"t", dtype, shape, {1}, 4, how};
    std::vector<float> result(4);
    PartBytes const part{reinterpret_cast<std::byte const*>(numbers.data()), Box::whole(shape)};
    encoding.decode(Box::whole(shape), {&part, 1}, dtype, {reinterpret_cast<std::byte*>(result.data()), {1}});
    return result;
  };
  CHECK(run(DType::c64, {2}, {true, false, false}) == std::vector<float>{1.5f, 2.5f, 0.0f, -3.0f});
  CHECK(run(DType::c64, {2}, {false, true, false}) == std::vector<float>{-1.5f, 2.5f, 0.0f, -3.0f});
  CHECK(run(DType::c64, {2}, {true, true, false}) == std::vector<float>{-1.5f, -2.5f, 0.0f, 3.0f});
  CHECK(run(DType::f32, {4}, {false, true, false}) == std::vector<float>{-1.5f, 2.5f, 0.0f, -3.0f});
  auto const turned = run(DType::c64, {2}, {false, false, true});
  auto const* const was = reinterpret_cast<unsigned char const*>(numbers.data());
  auto const* const is = reinterpret_cast<unsigned char const*>(turned.data());
  for (std::size_t i = 0; i < 16; ++i) CHECK(is[i] == was[i / 4 * 4 + 3 - i % 4]);
}
