// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/commit_record.hpp>

#include "golden.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

using namespace dcp;
using golden::outcome;

namespace {

template <class T>
Value number(T value) {
  return {ValueKind::number, dtype_of<T>, Bytes(std::as_bytes(std::span{&value, 1}).begin(), std::as_bytes(std::span{&value, 1}).end()), {}};
}
template <class T>
Value array(std::vector<T> const& values) {
  auto const bytes = std::as_bytes(std::span{values});
  return {ValueKind::array, dtype_of<T>, Bytes(bytes.begin(), bytes.end()), {}};
}
Value plain(ValueKind kind, std::string_view payload) {
  auto const bytes = as_byte_span(payload);
  return {kind, DType::u8, Bytes(bytes.begin(), bytes.end()), {}};
}

bool same(CommitRecord const& a, CommitRecord const& b) {
  auto const files = [](RecordFile const& x, RecordFile const& y) {
    return x.path == y.path && x.size == y.size && x.crc == y.crc && x.table_crc == y.table_crc && x.data == y.data;
  };
  auto const tensors = [](RecordTensor const& x, RecordTensor const& y) { return x.name == y.name && x.dtype == y.dtype && x.shape == y.shape; };
  return a.id == b.id && a.sequence == b.sequence && a.committed == b.committed && a.storage == b.storage && a.file_layout == b.file_layout &&
         std::equal(a.files.begin(), a.files.end(), b.files.begin(), b.files.end(), files) && a.groups == b.groups &&
         std::equal(a.tensors.begin(), a.tensors.end(), b.tensors.begin(), b.tensors.end(), tensors) && a.values == b.values && a.ties == b.ties;
}

CommitRecord small_record() {
  CommitRecord record;
  record.id = "0123456789abcdef";
  record.sequence = UINT64_MAX;
  record.committed = true;
  record.storage = "safetensors";
  record.file_layout = "final";
  record.files = {{"model.safetensors", UINT64_MAX, 0xfedcba9876543210, 1, true}, {"sub/\xc3\xa9 \"x\".json", 0, 0, 0, false}};
  record.groups = {{"optimizer", "optim", true}, {"", "", false}};
  record.tensors = {{"w", DType::bf16, Extents{4096, 0, INT64_MAX}}, {"scalar\n", DType::f32, Extents{}}, {"sixteen", DType::u8, Extents::filled(16, 1)}};
  record.values = {{"step", number<std::int64_t>(INT64_MIN)}, {"name", plain(ValueKind::text, "\xf0\x9f\x9a\x80 \"\\\x01\x7f")}};
  record.ties = {{"lm_head.weight", "embed.weight"}};
  return record;
}

std::string text_of(CommitRecord const& record) {
  Bytes large;
  return std::string{as_text(write_record(record, large))};
}

/// `text` with the checksum that it should have.
std::string resigned(std::string text) {
  auto const line = text.find('\n');
  REQUIRE(line == 33);
  return text.replace(15, 16, hex16(crc64(as_byte_span(std::string_view{text}.substr(line + 1)))));
}
std::string replaced(std::string text, std::string_view what, std::string_view by) {
  auto const at = text.find(what);
  REQUIRE(at != std::string::npos);
  return text.replace(at, what.size(), by);
}
std::string outcome_of(std::string_view text, ConstByteSpan large = {}) {
  return outcome([&] { parse_record(as_byte_span(text), large); });
}
/// The record comes back, and writes the same bytes again.
void check_round_trip(CommitRecord const& record) {
  Bytes large, again_large;
  Bytes const bytes = write_record(record, large);
  CAPTURE(as_text(bytes));
  CommitRecord const again = parse_record(bytes, large);
  CHECK(same(again, record));
  CHECK(write_record(again, again_large) == bytes);
  CHECK(again_large == large);
}

}  // namespace

TEST_CASE("commit record: every field comes back") {
  check_round_trip({});
  check_round_trip(small_record());
}

TEST_CASE("commit record: the bytes are those of the format") {
  CommitRecord record;
  record.id = "00000000000000ff";
  record.sequence = 3;
  record.committed = true;
  record.storage = "safetensors";
  record.file_layout = "final";
  record.files = {{"m.safetensors", 10, 1, 2, true}};
  record.groups = {{"p", "d", false}};
  record.tensors = {{"w", DType::bf16, Extents{2, 3}}};
  record.values = {{"f", number(0.1f)}, {"n", number(std::numeric_limits<double>::infinity())}, {"t", plain(ValueKind::text, "a")}, {"b", plain(ValueKind::bytes, "\x01\xff")}, {"r", {ValueKind::per_rank, DType::u8, {}, {number<std::uint8_t>(7), number(true)}}}};
  record.ties = {{"x", "w"}};
  std::string const rest = R"( "format": 1,
 "id": "00000000000000ff",
 "sequence": 3,
 "state": "committed",
 "storage": "safetensors",
 "file_layout": "final",
 "chunk_bytes": 1048576,
 "files": [
  {"path":"m.safetensors","size":10,"crc64":"0000000000000001","chunks_crc64":"0000000000000002","data":true}
 ],
 "groups": [
  {"prefix":"p","directory":"d","strip":false}
 ],
 "tensors": [
  {"name":"w","dtype":"BF16","shape":[2,3]}
 ],
 "values": [
  {"name":"f","kind":"number","dtype":"F32","value":0.10000000149011612},
  {"name":"n","kind":"number","dtype":"F64","value":"0x7ff0000000000000"},
  {"name":"t","kind":"text","value":"a"},
  {"name":"b","kind":"bytes","value":"01ff"},
  {"name":"r","kind":"per_rank","ranks":[{"kind":"number","dtype":"U8","value":7},{"kind":"number","dtype":"BOOL","value":true}]}
 ],
 "ties": [
  ["x","w"]
 ]
}
)";
  CHECK(text_of(record) == "{\"dcp_crc64\": \"" + hex16(crc64(as_byte_span(rest))) + "\",\n" + rest);
}

TEST_CASE("commit record: numbers of every type keep their bits at the ends of their range") {
  CommitRecord record;
  auto const add = [&](auto... values) { (record.values.emplace_back("v" + std::to_string(record.values.size()), number(values)), ...); };
  add(true, false);
  [&]<class... T>(std::vector<T>... list) {
    (add(std::numeric_limits<T>::min(), std::numeric_limits<T>::max(), T{0}, static_cast<T>(-1)), ...);
    (record.values.emplace_back("a" + std::to_string(record.values.size()), array(std::vector<T>{std::numeric_limits<T>::max(), 0, 1})), ...);
    (record.values.emplace_back("e" + std::to_string(record.values.size()), array(list)), ...);
  }(std::vector<std::int8_t>{}, std::vector<std::uint8_t>{}, std::vector<std::int16_t>{}, std::vector<std::uint16_t>{}, std::vector<std::int32_t>{}, std::vector<std::uint32_t>{}, std::vector<std::int64_t>{},
    std::vector<std::uint64_t>{});
  [&]<class... T>(T...) {
    using std::numeric_limits;
    (add(T{0}, -T{0}, T(0.1), numeric_limits<T>::max(), numeric_limits<T>::lowest(), numeric_limits<T>::min(), numeric_limits<T>::denorm_min(), -numeric_limits<T>::denorm_min(), numeric_limits<T>::infinity(),
         -numeric_limits<T>::infinity(), numeric_limits<T>::quiet_NaN(), numeric_limits<T>::signaling_NaN()),
     ...);
  }(float{}, double{});
  add(std::bit_cast<float>(0xffc12345u), std::bit_cast<double>(std::uint64_t{0x7ff0000000000001}), std::bit_cast<double>(std::uint64_t{0xffffffffffffffff}));
  record.values.emplace_back("mixed", array<double>({1e300, -0.0, std::numeric_limits<double>::quiet_NaN(), 5e-324, 3}));
  check_round_trip(record);
}

TEST_CASE("law: any bits of a float or double come back") {
  std::uint64_t const seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937_64 random{seed};
  CommitRecord record;
  std::vector<float> floats(1000);
  std::vector<double> doubles(1000);
  for (auto& x : floats) x = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
  for (auto& x : doubles) x = std::bit_cast<double>(random());
  record.values = {{"f", array(floats)}, {"d", array(doubles)}};
  check_round_trip(record);
}

TEST_CASE("commit record: texts, bytes, JSON and per-rank values come back, the large ones from dcp.values") {
  std::string every_byte;
  for (int i = 0; i < 256; ++i) every_byte += static_cast<char>(i);
  std::string const long_text(inline_value_bytes + 1, 'x');
  CommitRecord record;
  record.values = {{"empty", plain(ValueKind::text, "")},
                   {"escapes", plain(ValueKind::text, std::string_view{"\0\x1f\"\\/\xe2\x82\xac\xf4\x8f\xbf\xbf", 12})},
                   {"no bytes", plain(ValueKind::bytes, "")},
                   {"bytes", plain(ValueKind::bytes, every_byte)},
                   {"json", plain(ValueKind::json, R"({"b": 1.0, "a" : [ 1e2 ]})")},
                   {"limit", plain(ValueKind::text, std::string(inline_value_bytes, 'y'))},
                   {"long", plain(ValueKind::text, long_text)},
                   {"long array", array(std::vector<double>(inline_value_bytes, 0.5))},
                   {"long bytes", plain(ValueKind::bytes, long_text + every_byte)},
                   {"nobody", {ValueKind::per_rank, DType::u8, {}, {}}},
                   {"ranks", {ValueKind::per_rank, DType::u8, {}, {number<std::uint64_t>(UINT64_MAX), plain(ValueKind::text, long_text), array<float>({})}}}};
  check_round_trip(record);
  Bytes large;
  auto const bytes = write_record(record, large);
  CHECK(large.size() == 2 * long_text.size() + 8 * inline_value_bytes + long_text.size() + every_byte.size());
  CHECK(parse_record(bytes, {}, false).values.empty());
  CHECK(outcome_of(as_text(bytes)) == "bad_schema");
  CHECK(outcome_of(as_text(bytes), ConstByteSpan{large}.first(large.size() - 1)) == "bad_schema");
}

TEST_CASE("commit record: bools from dcp.values are 0 or 1") {
  auto record = small_record();
  record.values = {{"flags", {ValueKind::array, DType::boolean, Bytes(inline_value_bytes + 1, std::byte{1}), {}}}};
  Bytes large;
  auto const bytes = write_record(record, large);
  REQUIRE(large.size() == inline_value_bytes + 1);
  CHECK(parse_record(bytes, large).values == record.values);
  large.back() = std::byte{2};
  CHECK(outcome_of(as_text(bytes), large) == "bad_schema");
}

TEST_CASE("commit record: one whose files lie in a directory below it says so, in a format that older readers refuse; others stay as they were") {
  CommitRecord record = small_record();
  CHECK(text_of(record).find("\"format\": 1,") != std::string::npos);
  record.directory = "dcp-0123456789abcdef";
  auto const text = text_of(record);
  CHECK(text.find("\"format\": 2,") != std::string::npos);
  CHECK(parse_record(as_byte_span(text), {}).directory == record.directory);
  for (std::string const directory : {"..", "/etc", "a/../..", ""}) CHECK(outcome_of(resigned(replaced(text, record.directory, directory))) == "unsafe_path");
}

TEST_CASE("commit record: a record of a later format is refused in words, whatever else it holds") {
  for (std::string_view const format : {"3", "1000", "9223372036854775807"}) {
    auto const text = replaced(text_of(small_record()), "\"format\": 1", "\"format\": " + std::string{format});
    CHECK(outcome_of(text) == "bad_version");
    CHECK(outcome_of(resigned(text)) == "bad_version");
    CHECK(outcome_of("{\"dcp_crc64\":\"of another kind\",\"format\":" + std::string{format} + "}") == "bad_version");
  }
}

TEST_CASE("commit record: values of the wrong type are refused, checksum or not") {
  auto const text = text_of(small_record());
  CHECK(outcome_of(resigned(text)) == "ok");
  struct Change {
    std::string_view what, by;
  };
  for (auto const& change : std::vector<Change>{
           {"\"format\": 1", "\"format\": \"1\""}, {"\"format\": 1", "\"format\": 1.0"}, {"\"format\": 1", "\"forma\": 1"}, {"\"id\": \"0123456789abcdef\"", "\"id\": 7"},
           {"\"sequence\": 1844", "\"sequence\": 9844"}, {"\"sequence\": 1844", "\"sequence\": -1844"}, {"\"state\": \"committed\"", "\"state\": true"}, {"\"storage\"", "\"store\""},
           {"\"chunk_bytes\": 1048576", "\"chunk_bytes\": 1048575"}, {"\"files\": [", "\"files\": [7,"}, {"\"size\":1844", "\"size\":18.44"}, {"\"size\":0", "\"size\":\"0\""},
           {"fedcba9876543210", "FEDCBA9876543210"}, {"fedcba9876543210", "fedcba987654321"}, {"\"data\":true", "\"data\":1"}, {"\"strip\":true", "\"strip\":null"}, {"BF16", "BF17"},
           {"[4096,", "[-4096,"}, {"[4096,", "[4096.0,"}, {"[4096,", "[9223372036854775808,"}, {"[1,1,", "[1,1,1,"}, {"\"shape\":[]", "\"shape\":{}"}, {"\"kind\":\"number\"", "\"kind\":\"numbers\""},
           {"\"dtype\":\"I64\"", "\"dtype\":\"I32\""}, {"\"dtype\":\"I64\"", "\"dtype\":\"U64\""}, {"\"dtype\":\"I64\"", "\"dtype\":\"BOOL\""}, {"\"dtype\":\"I64\"", "\"dtype\":\"BF16\""},
           {"\"value\":-92", "\"at\":[0,8],\"value\":-92"}, {"\"value\":\"", "\"at\":[0,1],\"value\":\""}, {"\"value\":\"", "\"at\":[0],\"value\":\""}, {"\"kind\":\"text\"", "\"kind\":\"bytes\""},
           {"\"kind\":\"text\"", "\"kind\":\"per_rank\""}, {"\"kind\":\"text\"", "\"kind\":\"array\",\"dtype\":\"U8\""}, {"\"embed.weight\"", "1"}, {"\"embed.weight\"", "\"a\",\"b\""}, {"\"ties\"", "\"tie\""}}) {
    CAPTURE(change.by);
    CHECK(outcome_of(resigned(replaced(text, change.what, change.by))) == "bad_schema");
  }
  for (std::string_view const json : {"[]", "1", "\"\"", "null", "{}", "{\"format\":1}", "{\"dcp_crc64\":\"0000000000000000\"}", "{\"dcp_crc64\":\"0000000000000000\",\"format\":1}"})
    CHECK(outcome_of(json) == "bad_schema");
  CHECK(outcome_of("") == "bad_json");
  CHECK(outcome_of("\xef\xbb\xbf" + text) == "bad_json");
  CHECK(outcome_of(std::string(17, '[')) == "limit");
}

TEST_CASE("commit record: files outside of the checkpoint are refused, and files listed twice or out of order") {
  for (std::string_view const path : {"", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/.", "a/", "a\\\\b", "a\\u0000b"})
    CHECK_MESSAGE(outcome_of(resigned(replaced(text_of(small_record()), "model.safetensors", path))) == "unsafe_path", path);
  for (std::string_view const path : {"z", "sub/\xc3\xa9 \\\"x\\\".json"})
    CHECK_MESSAGE(outcome_of(resigned(replaced(text_of(small_record()), "model.safetensors", path))) == "bad_schema", path);
  for (std::string_view const path : {"a..b", "..a/b", "a/...", "a b"}) CHECK_MESSAGE(outcome_of(resigned(replaced(text_of(small_record()), "model.safetensors", path))) == "ok", path);
}

TEST_CASE("commit record: a truncated record is refused, wherever it ends") {
  auto const text = text_of(small_record());
  for (std::size_t size = 0; size + 1 < text.size(); ++size) CHECK_MESSAGE(outcome_of(text.substr(0, size)) != "ok", size);
  CHECK(outcome_of(text.substr(0, text.size() - 1)) == "corrupt");   // all but the last line feed: good JSON
}

TEST_CASE("commit record: any one changed bit is noticed") {
  auto const text = text_of(small_record());
  for (std::size_t at = 0; at < text.size(); ++at)
    for (int bit = 0; bit < 8; ++bit) {
      std::string changed = text;
      changed[at] = static_cast<char>(changed[at] ^ (1 << bit));
      CHECK_MESSAGE(outcome_of(changed) != "ok", at << '.' << bit);
    }
  CHECK(outcome_of(replaced(text, "{\"dcp", "{ \"dcp")) == "bad_schema");          // blanks in the first line, which no checksum covers
  CHECK(outcome_of(replaced(text, "\",\n", "\",\"id\":\"x\",\n")) == "bad_schema");   // a second id there
  CHECK(outcome_of(replaced(text, "0123456789abcdef", "0123456789abcdee")) == "corrupt");
}
