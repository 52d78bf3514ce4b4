// SPDX-License-Identifier: Apache-2.0
#include <dcp/base/bytes.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <string>

using namespace dcp;

static_assert(round_down(4097, 4096) == 4096 && round_up(4097, 4096) == 8192 && round_up(4096, 4096) == 4096 && round_up(0, 7) == 0);
static_assert(ceil_div(7, 3) == 3 && ceil_div(6, 3) == 2 && ceil_div<std::int64_t>(INT64_MAX, 2) == (INT64_MAX / 2) + 1 && ceil_div<std::uint64_t>(UINT64_MAX, 1) == UINT64_MAX);
static_assert([] {
  std::uint64_t out = 0;
  return checked_multiply(1ull << 32, (1ull << 32) - 1, out) && !checked_multiply(1ull << 32, 1ull << 32, out) && checked_add(UINT64_MAX - 1, 1, out) && !checked_add(UINT64_MAX, 1, out);
}());

TEST_CASE("ByteReader: gives back what ByteWriter was given, in order") {
  ByteWriter out;
  out.number<std::uint8_t>(7).number(-5).number(1.5).text("name").block(as_byte_span("\0x")).raw(as_byte_span("rest"));
  CHECK(out.size() == out.bytes().size());
  Bytes const bytes = out.take();
  ByteReader in{bytes};
  CHECK(in.number<std::uint8_t>() == 7);
  CHECK(in.number<int>() == -5);
  CHECK(in.number<double>() == 1.5);
  CHECK(in.text() == "name");
  CHECK(in.block().size() == 0);
  CHECK_FALSE(in.done());
  CHECK(as_text(in.raw(4)) == "rest");
  CHECK(in.done());
}

TEST_CASE("ByteReader: past the end there are zeros, and ok() stays false") {
  ByteWriter out;
  out.number<std::uint64_t>(UINT64_MAX).number<std::uint16_t>(3);
  Bytes const bytes = out.take();
  ByteReader in{bytes};
  CHECK(in.block().empty());   // a length beyond all memory
  CHECK_FALSE(in.ok());
  CHECK(in.number<std::uint64_t>() == 0);
  CHECK(in.text().empty());
  CHECK_FALSE(in.ok());
  CHECK_FALSE(in.done());
  ByteReader empty{ConstByteSpan{}};
  CHECK(empty.done());
  CHECK(empty.number<int>() == 0);
  CHECK_FALSE(empty.done());
}

TEST_CASE("ByteReader: any byte is a bool") {
  Bytes const bytes{std::byte{0}, std::byte{1}, std::byte{23}};
  ByteReader in{bytes};
  CHECK_FALSE(in.number<bool>());
  CHECK(in.number<bool>());
  CHECK(in.number<bool>());
  CHECK(in.done());
  CHECK_FALSE(in.number<bool>());
  CHECK_FALSE(in.ok());
}

TEST_CASE("load_little_endian: reads at any address") {
  Bytes const bytes{std::byte{9}, std::byte{1}, std::byte{2}, std::byte{3}, std::byte{4}};
  CHECK(load_little_endian<std::uint32_t>(bytes.data() + 1) == 0x04030201);
}
