// SPDX-License-Identifier: Apache-2.0
#pragma once
// dcp diff: what differs between two checkpoints, whatever their formats.

#include <dcp/dcp.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace tool {

/// How two tensors of one shape differ.
struct Difference {
  std::int64_t count = 0, first = 0;   // elements, and the number of the first of them
  double largest = 0;                  // of the absolute differences; NaN where one side alone is NaN
};

/// Elements as doubles; nothing for dtypes that are no numbers of one byte or more.
inline bool to_doubles(dcp::DType dtype, dcp::ConstByteSpan bytes, std::vector<double>& out) {
  std::size_t const each = static_cast<std::size_t>(dcp::bits_of(dtype)) / 8;
  if (each == 0) return false;
  out.resize(bytes.size() / each);
  auto const numbers = [&](auto type) {
    using T = decltype(type);
    for (std::size_t i = 0; i < out.size(); ++i) {
      T x;
      std::memcpy(&x, bytes.data() + i * sizeof x, sizeof x);
      out[i] = static_cast<double>(x);
    }
    return true;
  };
  switch (dtype) {
    case dcp::DType::i64: return numbers(std::int64_t{});
    case dcp::DType::u64: return numbers(std::uint64_t{});
    case dcp::DType::i32: return numbers(std::int32_t{});
    case dcp::DType::u32: return numbers(std::uint32_t{});
    case dcp::DType::boolean: return numbers(std::uint8_t{});
    default:
      if (!dcp::can_cast(dtype, dcp::DType::f64)) return false;
      dcp::cast_elements(dtype, bytes.data(), dcp::DType::f64, reinterpret_cast<std::byte*>(out.data()), out.size());
      return true;
  }
}

/// Reads both in pieces. Nothing if all elements are equal, bit for bit or, where dtypes differ, in value.
inline std::optional<Difference> compare_tensors(dcp::CheckpointReader& a, dcp::CheckpointReader& b, dcp::TensorContents const& left, dcp::TensorContents const& right) {
  // Elements smaller than a byte are not cut.
  std::int64_t const all = left.shape.elements(), each = dcp::bits_of(left.dtype) < 8 ? std::max<std::int64_t>(1, all) : std::int64_t{1} << 20;
  Difference difference;
  dcp::Bytes x, y;
  std::vector<double> p, q;
  auto const compare_box = [&](dcp::Box const& box, std::int64_t first) {
    x.resize(static_cast<std::size_t>(dcp::bytes_of(left.dtype, static_cast<std::int64_t>(box.size()))));
    y.resize(static_cast<std::size_t>(dcp::bytes_of(right.dtype, static_cast<std::int64_t>(box.size()))));
    a.read(left.name, box, x);
    b.read(right.name, box, y);
    if (left.dtype == right.dtype && x == y) return;
    if (!to_doubles(left.dtype, x, p) || !to_doubles(right.dtype, y, q)) {
      // No numbers: bytes are compared.
      std::size_t at = 0;
      while (at < std::min(x.size(), y.size()) && x[at] == y[at]) ++at;
      if (difference.count == 0) difference.first = first + static_cast<std::int64_t>(at * 8 / static_cast<std::size_t>(dcp::bits_of(left.dtype)));
      difference.count = std::max<std::int64_t>(difference.count, 1);
      difference.largest = std::nan("");
      return;
    }
    for (std::size_t i = 0; i < p.size(); ++i) {
      if (p[i] == q[i] || (std::isnan(p[i]) && std::isnan(q[i]) && left.dtype != right.dtype)) continue;
      if (std::isnan(p[i]) && std::isnan(q[i])) {
        std::size_t const bytes = x.size() / p.size();
        if (std::memcmp(x.data() + i * bytes, y.data() + i * bytes, bytes) == 0) continue;
      }
      if (difference.count++ == 0) difference.first = first + static_cast<std::int64_t>(i);
      double const distance = std::abs(p[i] - q[i]);
      if (std::isnan(distance) || distance > difference.largest) difference.largest = distance;
    }
  };
  for (std::int64_t at = 0; at < all; at += each) dcp::for_each_box(dcp::Box::whole(left.shape), at, std::min(all, at + each), compare_box);
  return difference.count > 0 ? std::optional{difference} : std::nullopt;
}

}  // namespace tool
