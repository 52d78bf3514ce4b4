// SPDX-License-Identifier: Apache-2.0
#include <dcp/core/value.hpp>

#include "../support/generate.hpp"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

using namespace dcp;

namespace {
template <class T>
Value encoded(T const& object) {
  return detail::value_ops<T>()->encode(&object);
}
template <class T>
T decoded(Value const& value) {
  T object{};
  detail::value_ops<T>()->decode(&object, value);
  return object;
}
template <class T>
std::string json(T const& object) {
  return to_json(encoded(object));
}

static_assert(!detail::is_value<long double> && !detail::is_value<void*> && !detail::is_value<std::vector<std::string>> && detail::is_value<std::vector<bool>>);
static_assert(detail::value_ops<std::vector<std::byte>>()->kind == ValueKind::bytes && detail::value_ops<std::vector<char>>()->kind == ValueKind::array);
static_assert(detail::value_ops<char16_t>()->dtype == DType::u16 && detail::value_ops<long long>()->dtype == DType::i64);
}  // namespace

TEST_CASE("values: numbers keep their bits, and their JSON is the shortest that reads back") {
  CHECK(json(true) == "true");
  CHECK(json(std::int8_t{-128}) == "-128");
  CHECK(json(std::uint8_t{255}) == "255");
  CHECK(json(std::numeric_limits<std::int64_t>::min()) == "-9223372036854775808");
  CHECK(json(std::numeric_limits<std::uint64_t>::max()) == "18446744073709551615");
  CHECK(json(0.1) == "0.1");
  CHECK(json(0.1f) == "0.1");
  CHECK(json(3.0) == "3.0");
  CHECK(json(-0.0) == "-0.0");
  CHECK(json(1e300) == "1e+300");
  CHECK(json(5e-324) == "5e-324");
  CHECK(encoded(std::int32_t{-2}).payload == Bytes{std::byte{0xFE}, std::byte{0xFF}, std::byte{0xFF}, std::byte{0xFF}});
  CHECK(encoded(true).payload == Bytes{std::byte{1}});
}

TEST_CASE("values: infinities and NaNs are strings of their bits, because JSON has no such numbers") {
  CHECK(json(std::numeric_limits<double>::infinity()) == "\"0x7ff0000000000000\"");
  CHECK(json(-std::numeric_limits<float>::infinity()) == "\"0xff800000\"");
  double const payload = std::bit_cast<double>(std::uint64_t{0x7FF8000000000123});
  CHECK(json(payload) == "\"0x7ff8000000000123\"");
  CHECK(std::bit_cast<std::uint64_t>(decoded<double>(encoded(payload))) == 0x7FF8000000000123);
}

TEST_CASE("law: the JSON of a double or float, read by another parser, is the same number") {
  auto const seed = test::first_seed();
  for (std::uint64_t round = 0; round < 3000; ++round) {
    INFO("DCP_SEED=", seed + round);
    test::Random random{seed + round};
    double const x = std::bit_cast<double>(load_little_endian<std::uint64_t>(random.bytes(8).data()));
    float const y = std::bit_cast<float>(load_little_endian<std::uint32_t>(random.bytes(4).data()));
    if (std::isfinite(x)) REQUIRE(nlohmann::json::parse(json(x)).get<double>() == x);
    if (std::isfinite(y)) REQUIRE(nlohmann::json::parse(json(y)).get<float>() == y);
    REQUIRE(std::bit_cast<std::uint64_t>(decoded<double>(encoded(x))) == std::bit_cast<std::uint64_t>(x));
  }
}

TEST_CASE("values: arrays, of bool too, keep every element") {
  std::vector<bool> const flags{true, false, true, true};
  CHECK(json(flags) == "[true,false,true,true]");
  CHECK(encoded(flags).payload.size() == 4);
  CHECK(encoded(flags).dtype == DType::boolean);
  CHECK(decoded<std::vector<bool>>(encoded(flags)) == flags);
  std::vector<float> const numbers{1.5f, -0.0f, std::numeric_limits<float>::infinity()};
  CHECK(json(numbers) == "[1.5,-0.0,\"0x7f800000\"]");
  CHECK(decoded<std::vector<float>>(encoded(numbers)) == numbers);
  CHECK(json(std::vector<int>{}) == "[]");
  CHECK(decoded<std::vector<int>>(encoded(std::vector<int>{})).empty());
  CHECK(json(std::vector<std::int8_t>{-1, 2}) == "[-1,2]");
}

TEST_CASE("values: loading an array replaces it, whatever its length was") {
  std::vector<int> list{9, 9, 9, 9, 9};
  detail::value_ops<std::vector<int>>()->decode(&list, encoded(std::vector<int>{1, 2}));
  CHECK(list == std::vector<int>{1, 2});
  std::vector<bool> flags{true};
  detail::value_ops<std::vector<bool>>()->decode(&flags, encoded(std::vector<bool>{false, false, true}));
  CHECK(flags == std::vector<bool>{false, false, true});
}

TEST_CASE("values: text is escaped, with quotes, control characters, zeros and Unicode in it") {
  std::string const text{"a\"b\\c\n\x01\0d\xC3\xA9\xF0\x9F\x98\x80", 15};
  CHECK(json(text) == std::string{"\"a\\\"b\\\\c\\n\\u0001\\u0000d\xC3\xA9\xF0\x9F\x98\x80\""});
  CHECK(nlohmann::json::parse(json(text)).get<std::string>() == text);
  CHECK(decoded<std::string>(encoded(text)) == text);
  CHECK(json(std::string{}) == "\"\"");
}

TEST_CASE("values: bytes are hexadecimal, JSON is itself, per-rank values an array") {
  Bytes const bytes{std::byte{0}, std::byte{0x7F}, std::byte{0xFF}};
  CHECK(json(bytes) == "\"007fff\"");
  CHECK(decoded<Bytes>(encoded(bytes)) == bytes);
  Value document{ValueKind::json, DType::u8, {}, {}};
  for (char const c : std::string{"{\"a\": [1, 2]}"}) document.payload.push_back(static_cast<std::byte>(c));
  CHECK(to_json(document) == "{\"a\": [1, 2]}");
  Value ranks{ValueKind::per_rank, DType::u8, {}, {encoded(1), encoded(std::string{"x"}), encoded(std::vector<int>{2, 3})}};
  CHECK(to_json(ranks) == "[1,\"x\",[2,3]]");
  CHECK(to_json(Value{ValueKind::per_rank, DType::u8, {}, {}}) == "[]");
  std::ostringstream out;
  out << ranks;
  CHECK(out.str() == to_json(ranks));
}

TEST_CASE("values: a payload of the wrong size is refused, and changes nothing") {
  Value value = encoded(std::int32_t{5});
  value.payload.pop_back();
  std::int32_t number = 7;
  CHECK_THROWS_AS(detail::value_ops<std::int32_t>()->decode(&number, value), Error);
  CHECK(number == 7);
  value = encoded(std::vector<double>{1, 2});
  value.payload.pop_back();
  std::vector<double> list{3};
  CHECK_THROWS_AS(detail::value_ops<std::vector<double>>()->decode(&list, value), Error);
  CHECK(list == std::vector<double>{3});
  bool flag = true;
  CHECK_THROWS_AS(detail::value_ops<bool>()->decode(&flag, Value{ValueKind::number, DType::boolean, {}, {}}), Error);
}

TEST_CASE("values: kinds have names") {
  CHECK(to_string(ValueKind::number) == "number");
  CHECK(to_string(ValueKind::per_rank) == "per_rank");
}
