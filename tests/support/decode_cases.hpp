// SPDX-License-Identifier: Apache-2.0
#pragma once
// Encodings whose elements are codes times scales, with any codes and scales, any boxes of them, and memory to decode to.

#include <dcp/core/encoding.hpp>
#include <dcp/formats/block_codecs.hpp>

#include "support/generate.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace dcp::test::decode {

using detail::GroupSpec;

inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

struct Case {
  GroupSpec spec;
  Bytes codes, scales;   // of the whole tensor
};

/// A scale that formats have: positive, and any other that is finite where `negative`.
inline float some_scale(Random& random, bool negative) {
  constexpr std::array<float, 8> edges{1.0f, 0x1p-149f, 0x1p-126f, 0x1.8p-140f, 0x1.fffffep127f, 1.0f / 448, 0x1p-24f, 3.0f};
  float scale = random.one_in(4) ? random.any_of(edges) : random.one_in(3) ? float_of(static_cast<std::uint32_t>(random.between(1, 0x7F7F'FFFF))) : static_cast<float>(random.between(1, 1 << 24)) * 0x1p-20f;
  return negative && random.one_in(2) ? -scale : scale;
}

inline Case any_case(Random& random) {
  Case made;
  GroupSpec& spec = made.spec;
  spec.scheme = "any";
  int const rank = static_cast<int>(random.between(0, 5));
  Extents shape = Extents::filled(rank, 1);
  for (int d = 0; d < rank; ++d) shape[d] = random.one_in(4) ? 1 : random.between(1, d == rank - 1 ? 150 : d == rank - 2 ? 20 : 4);
  auto const kind = random.between(0, 3);
  bool const nibbles = kind == 3 && rank > 0, blocks = nibbles && random.one_in(2);
  if (nibbles) shape[rank - 1] = ceil_div(shape[rank - 1], std::int64_t{blocks ? 32 : 2}) * (blocks ? 32 : 2);
  spec.shape = shape;
  spec.kind = nibbles ? detail::Codes::e2m1 : kind == 1 || kind == 3 ? detail::Codes::i8 : detail::Codes::floats;
  Extents stored = shape;
  PartGrid grid = PartGrid::rows(rank, blocks ? 32 : nibbles ? 2 : 1);
  if (nibbles && !blocks) stored[rank - 1] /= 2;
  if (blocks) {
    std::vector<std::int64_t> sizes{shape.begin(), shape.end()};
    sizes.back() /= 32;
    sizes.push_back(16);
    stored = Extents{sizes};
    grid.axes.push_back({});
  }
  DType const code = nibbles ? (random.one_in(2) ? DType::u8 : DType::i8) : spec.kind == detail::Codes::i8 ? DType::i8 : kind == 0 ? DType::f8_e4m3 : DType::f8_e5m2;
  spec.codes = {"codes", code, stored, grid};
  // Scales along any of the dimensions.
  constexpr std::array<std::int64_t, 8> eaches{1, 2, 3, 5, 8, 16, 32, 128};
  std::vector<PartAxis> axes;
  std::vector<std::int64_t> sizes;
  bool const leading_alone = random.one_in(2);
  for (int d = 0; d < rank; ++d) {
    if (random.one_in(4)) {
      if (random.one_in(2)) axes.push_back({}), sizes.push_back(1);
      continue;
    }
    std::int64_t const each = d < rank - 2 && leading_alone ? 1 : random.any_of(eaches);
    axes.push_back({d, each});
    sizes.push_back(ceil_div(shape[d], each));
  }
  constexpr std::array<DType, 4> dtypes{DType::f32, DType::bf16, DType::f16, DType::f8_e8m0};
  DType const scale = random.any_of(dtypes);
  spec.scales = {"scales", scale, Extents{sizes}, PartGrid::along(axes)};
  spec.rule.negative = random.one_in(3);
  made.codes = random.bytes(static_cast<std::size_t>(bytes_of(code, stored.elements())));
  made.scales.resize(static_cast<std::size_t>(bytes_of(scale, Extents{sizes}.elements())));
  std::size_t const width = static_cast<std::size_t>(bits_of(scale)) / 8;
  for (std::size_t at = 0; at < made.scales.size(); at += width) {
    if (scale == DType::f8_e8m0) {
      made.scales[at] = static_cast<std::byte>(random.one_in(4) ? random.any_of(std::array{0, 1, 254, 127}) : random.between(0, 254));
      continue;
    }
    for (float value = 0; value == 0 || !std::isfinite(value);) {   // it may round to these
      value = some_scale(random, spec.rule.negative);
      if (scale == DType::f16 && random.one_in(2)) value = static_cast<float>(f16::from_bits(static_cast<std::uint16_t>(random.between(1, 0x7BFF))));
      cast_elements(DType::f32, reinterpret_cast<std::byte const*>(&value), scale, made.scales.data() + at, 1);
      cast_elements(scale, made.scales.data() + at, DType::f32, reinterpret_cast<std::byte*>(&value), 1);
    }
  }
  return made;
}

inline Box any_box(Random& random, Extents const& shape) {
  Box box = Box::whole(shape);
  for (int d = 0; d < shape.rank(); ++d) {
    box.origin[d] = random.one_in(2) ? 0 : random.between(0, shape[d] - 1);
    box.shape[d] = random.one_in(2) ? shape[d] - box.origin[d] : random.between(1, shape[d] - box.origin[d]);
  }
  return box;
}

/// The bytes of a box of a part, aligned as the reader gives them.
inline Bytes part_of(EncodedPart const& part, Bytes const& whole, Box const& box) {
  std::size_t const width = static_cast<std::size_t>(bits_of(part.dtype)) / 8;
  Extents const strides = row_major_strides(part.shape);
  Bytes bytes;
  for_each_index(box, box.rank(), [&](Extents const& index) {
    std::int64_t at = 0;
    for (int d = 0; d < box.rank(); ++d) at += index[d] * strides[d];
    auto const from = whole.begin() + at * static_cast<std::int64_t>(width);
    bytes.insert(bytes.end(), from, from + static_cast<std::int64_t>(width));
  });
  return bytes;
}

/// Memory of any strides, without overlaps, and where in it the first element lies.
struct Target {
  Extents strides;
  std::int64_t first = 0, elements = 0;
};
inline Target any_target(Random& random, Extents const& shape) {
  Target target{row_major_strides(shape)};
  std::vector<int> order;
  for (int d = 0; d < shape.rank(); ++d) order.push_back(d);
  if (random.one_in(4)) random.shuffle(order);
  std::int64_t step = random.one_in(6) ? 2 : 1;
  for (std::size_t i = order.size(); i-- > 0;) {
    int const d = order[i];
    target.strides[d] = step;
    step = step * shape[d] + (random.one_in(3) ? random.between(0, 9) : 0);
    if (random.one_in(12)) {
      target.first += (shape[d] - 1) * target.strides[d];
      target.strides[d] = -target.strides[d];
    }
  }
  std::int64_t const before = random.one_in(2) ? 0 : random.between(0, 9);
  target.first += before;
  target.elements = step + before + 16;
  return target;
}

}  // namespace dcp::test::decode
