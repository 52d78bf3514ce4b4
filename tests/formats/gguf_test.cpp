// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/gguf.hpp>

#include "golden.hpp"
#include "support/sha256.hpp"

#include <doctest/doctest.h>

#include <map>

using namespace dcp;
using namespace dcp::gguf;
using golden::outcome;

namespace {

template <class T>
std::string raw(T number) { return {reinterpret_cast<char const*>(&number), sizeof number}; }
std::string u32(std::uint64_t n) { return raw(static_cast<std::uint32_t>(n)); }
std::string u64(std::uint64_t n) { return raw(n); }
std::string text(std::string const& s) { return u64(s.size()) + s; }
constexpr std::uint64_t big = std::uint64_t{1} << 63;

std::string key(std::string const& name, std::uint64_t type, std::string const& value) { return text(name) + u32(type) + value; }
std::string array(std::uint64_t type, std::uint64_t count, std::string const& elements) { return u32(type) + u64(count) + elements; }
std::string tensor(std::string const& name, std::vector<std::uint64_t> const& sizes, std::uint64_t type, std::uint64_t offset) {
  std::string out = text(name) + u32(sizes.size());
  for (auto const size : sizes) out += u64(size);
  return out + u32(type) + u64(offset);
}
std::string const architecture = key("general.architecture", 8, text("llama"));
std::string const t8 = tensor("t", {8}, types::f32, 0);

/// A file of these keys and tensors, each a string, and so many bytes of data; the counts are those of the lists unless given.
struct File {
  std::vector<std::string> keys{architecture}, tensors{t8};
  std::size_t data = 32;
  std::uint64_t version = 3, alignment = 32;

  std::string bytes() const { return with_counts(tensors.size(), keys.size()); }
  std::string with_counts(std::uint64_t tensor_count, std::uint64_t key_count) const {
    std::string out = "GGUF" + u32(version) + u64(tensor_count) + u64(key_count);
    for (auto const& one : keys) out += one;
    for (auto const& one : tensors) out += one;
    if (!tensors.empty()) out.resize(static_cast<std::size_t>(round_up(out.size(), alignment)));
    return out + std::string(data, '\0');
  }
};

Header read(std::string const& file, ParseOptions const& options = {}) { return parse_header(as_byte_span(file), options); }
std::string outcome_of(std::string const& file, ParseOptions const& options = {}) {
  return outcome([&] { read(file, options); });
}
std::string outcome_of_key(std::string const& one, ParseOptions const& options = {}) { return outcome_of(File{.keys = {architecture, one}}.bytes(), options); }
std::string outcome_of_tensor(std::string const& one, std::size_t data = 32) { return outcome_of(File{.tensors = {one}, .data = data}.bytes()); }

Value number(DType dtype, std::string const& bytes) { return {ValueKind::number, dtype, Bytes(as_byte_span(bytes).begin(), as_byte_span(bytes).end()), {}}; }
Value value_of(ValueKind kind, std::string const& bytes) { return {kind, DType::u8, Bytes(as_byte_span(bytes).begin(), as_byte_span(bytes).end()), {}}; }

/// A number of expected.json.
template <class T>
T expected_number(nlohmann::json const& json) {
  if (json.is_object()) {
    std::string const decimal = json.at("decimal");
    if constexpr (std::is_signed_v<T>) return static_cast<T>(std::stoll(decimal));
    else return static_cast<T>(std::stoull(decimal));
  }
  return json.get<T>();
}

Value expected_value(nlohmann::json const& json) {
  std::map<std::string, DType> const dtypes{{"UINT8", DType::u8}, {"INT8", DType::i8}, {"UINT16", DType::u16}, {"INT16", DType::i16}, {"UINT32", DType::u32}, {"INT32", DType::i32},
                                            {"FLOAT32", DType::f32}, {"UINT64", DType::u64}, {"INT64", DType::i64}, {"FLOAT64", DType::f64}, {"BOOL", DType::boolean}};
  std::string const type = json.at("type");
  if (type == "STRING") return value_of(ValueKind::text, json.at("value"));
  bool const is_array = type == "ARRAY";
  std::string const element = is_array ? json.at("item").get<std::string>() : type;
  if (element == "STRING") return value_of(ValueKind::json, json.at("value").dump());
  Value value{is_array ? ValueKind::array : ValueKind::number, dtypes.at(element), {}, {}};
  auto const add = [&](nlohmann::json const& one) {
    dcp::detail::with_number_type(value.dtype, [&](auto t) {
      auto const n = expected_number<decltype(t)>(one);
      dcp::detail::append(value.payload, std::as_bytes(std::span{&n, 1}));
    });
  };
  if (is_array) {
    for (auto const& one : json.at("value")) add(one);
  } else {
    add(json.at("value"));
  }
  return value;
}

}  // namespace

TEST_CASE("parse_header: every golden file has the keys and tensors that its expected.json lists, and lay_out gives its bytes again") {
  int files = 0, tensors = 0;
  for (auto const& directory : std::filesystem::directory_iterator{golden::root() / "gguf"}) {
    auto const expected = golden::json_of(directory.path() / "expected.json");
    for (std::string const name : expected["files"]) {
      auto const path = directory.path() / name;
      CAPTURE(path.string());
      std::string const file = golden::text_of(path);
      Header const header = read(file);
      CHECK(header.version == 3);
      CHECK(header.alignment == expected["alignment"].get<std::uint64_t>());
      if (name == expected["files"][0]) {   // the first part of a split model
        CHECK(header.metadata.size() == expected["kv"].size());
        for (auto const& entry : expected["kv"].items()) {
          CAPTURE(entry.key());
          Value const* const value = header.find_metadata(entry.key());
          REQUIRE(value != nullptr);
          CHECK(*value == expected_value(entry.value()));
        }
      }
      for (auto const& tensor : header.tensors) {
        CAPTURE(tensor.name);
        auto const& wanted = expected["tensors"].at(tensor.name);
        CHECK(wanted["file"] == name);
        CHECK(tensor.type == wanted["ggml_type_id"].get<std::uint32_t>());
        CHECK(type_facts(tensor.type)->name == wanted["ggml_type"].get<std::string>());
        CHECK(tensor.shape == Extents{wanted["shape"].get<std::vector<std::int64_t>>()});
        CHECK(tensor.offset == wanted["absolute_offset"].get<std::uint64_t>());
        CHECK(tensor.bytes == wanted["nbytes"].get<std::uint64_t>());
        CHECK(tensor.bytes == tensor_bytes(tensor.type, tensor.shape));
        CHECK(test::sha256(as_byte_span(file).subspan(static_cast<std::size_t>(tensor.offset), static_cast<std::size_t>(tensor.bytes))) == wanted["sha256"].get<std::string>());
        ++tensors;
      }
      Layout const layout = lay_out(header.tensors, header.metadata, header.alignment);
      CHECK(as_text(layout.header) == std::string_view{file}.substr(0, static_cast<std::size_t>(header.data_begin)));
      CHECK(layout.file_size == file.size());
      std::uint64_t covered = layout.data_begin;
      for (auto const& padding : layout.paddings) covered += padding.bytes;
      for (std::size_t i = 0; i < header.tensors.size(); ++i) {
        CHECK(layout.offsets[i] == header.tensors[i].offset);
        covered += header.tensors[i].bytes;
      }
      CHECK(covered == file.size());
      ++files;
    }
  }
  CHECK(files == 7);
  CHECK(tensors == 22 + 12 + 4 + 5);
}

TEST_CASE("parse_header: each malformed golden file is refused with its code, and random damage does no harm") {
  std::map<std::string, std::string> const codes{
      {"gguf_ok", "ok"}, {"gguf_bad_magic", "bad_magic"}, {"gguf_version_1", "bad_version"}, {"gguf_version_99", "bad_version"}, {"gguf_big_endian_version", "bad_version"},
      {"gguf_tensor_count_huge", "limit"}, {"gguf_tensor_count_1e9", "limit"}, {"gguf_kv_count_huge", "limit"}, {"gguf_key_length_huge", "limit"}, {"gguf_array_count_huge", "limit"},
      {"gguf_value_type_13", "bad_schema"}, {"gguf_duplicate_key", "duplicate_key"}, {"gguf_duplicate_tensor", "duplicate_key"}, {"gguf_overlapping_tensors", "bad_offsets"},
      {"gguf_offset_misaligned", "bad_offsets"}, {"gguf_offset_past_end", "bad_offsets"}, {"gguf_offset_2_63", "bad_offsets"}, {"gguf_data_truncated", "truncated"},
      {"gguf_n_dims_5", "limit"}, {"gguf_n_dims_huge", "limit"}, {"gguf_dims_overflow", "overflow"}, {"gguf_dims_overflow_q8", "overflow"}, {"gguf_dim_negative", "overflow"},
      {"gguf_type_unknown", "unsupported_dtype"}, {"gguf_type_removed", "unsupported_dtype"}, {"gguf_q4_0_not_block", "misaligned"}, {"gguf_alignment_3", "bad_schema"},
      {"gguf_alignment_0", "bad_schema"}, {"gguf_string_not_utf8", "bad_utf8"}, {"gguf_header_only_half", "truncated"}};
  std::size_t files = 0, damaged = 0;
  auto const cases = golden::json_of(golden::root() / "bad_gguf" / "bad.json");
  for (auto const& entry : cases["cases"]) {
    std::filesystem::path const name = entry["file"].get<std::string>();
    CAPTURE(name.string());
    std::string const got = outcome_of(golden::text_of(golden::root() / "bad_gguf" / name));
    if (entry["expect"] == "any") {
      ++damaged;   // it is enough that we came back
    } else {
      CHECK(got == codes.at(name.stem()));
      CHECK((got == "ok") == (entry["expect"] == "ok"));
      ++files;
    }
  }
  CHECK(files == codes.size());
  CHECK(damaged == 4);
}

TEST_CASE("parse_header: the smallest useful file is read, in both versions, and none of its proper prefixes is") {
  std::string const file = File{}.bytes();
  CHECK(file.size() == 160);
  Header const header = read(file);
  CHECK(header.data_begin == 128);
  CHECK(header.metadata == Metadata{{"general.architecture", value_of(ValueKind::text, "llama")}});
  CHECK(header.tensors == std::vector<TensorInfo>{{"t", types::f32, Extents{8}, 128, 32}});
  CHECK(outcome_of(File{.version = 2}.bytes()) == "ok");
  for (std::size_t n = 0; n < file.size(); ++n) {
    CAPTURE(n);
    CHECK(outcome_of(file.substr(0, n)) == "truncated");
  }
}

TEST_CASE("parse_header: no proper prefix of a file with all kinds of values is accepted") {
  std::string const file = golden::text_of(golden::root() / "gguf" / "all_types" / "model.gguf");
  for (std::size_t n = 0; n < file.size(); ++n) {
    CAPTURE(n);
    REQUIRE(outcome_of(file.substr(0, n)) == "truncated");
  }
}

TEST_CASE("parse_header: files that begin with something else") {
  CHECK(outcome_of("") == "truncated");
  CHECK(outcome_of("GGU") == "truncated");
  CHECK(outcome_of("GGML" + std::string(200, '\0')) == "bad_magic");
  CHECK(outcome_of("GGJT") == "bad_magic");
  for (std::uint64_t const version : {0u, 1u, 4u, 0x03000000u}) {
    CAPTURE(version);
    CHECK(outcome_of(File{.version = version}.bytes()) == "bad_version");
  }
  try {
    read(File{.version = 0x03000000}.bytes());
  } catch (Error const& error) {
    CHECK(error.hint().find("big-endian") != std::string::npos);
  }
}

TEST_CASE("parse_header: counts and lengths beyond the file are refused without being believed") {
  for (std::uint64_t const count : {~std::uint64_t{0}, std::uint64_t{1} << 62, std::uint64_t{1'000'000'000}}) {
    CAPTURE(count);
    CHECK(outcome_of(File{}.with_counts(count, 1)) == "limit");
    CHECK(outcome_of(File{}.with_counts(1, count)) == "limit");
  }
  CHECK(outcome_of(File{}.with_counts(1'000'000, 1)) == "truncated");
  CHECK(outcome_of(File{}.with_counts(1, 1'000'000)) == "truncated");
  CHECK(outcome_of(File{}.with_counts(3, 0)) != "ok");   // the key is read as tensors
  CHECK(outcome_of(File{}.with_counts(1, 0)) != "ok");
  CHECK(outcome_of(File{}.with_counts(0, 0)) == "trailing_data");
  for (std::uint64_t const length : {big, (std::uint64_t{1} << 30) + 1, std::uint64_t{65536}}) {
    CAPTURE(length);
    CHECK(outcome_of_key(u64(length) + "key" + u32(4) + u32(1)) == "limit");
  }
  CHECK(outcome_of_key(u64(1000) + "key") == "truncated");
  CHECK(outcome_of_key(key("a", 8, u64(big))) == "limit");
  CHECK(outcome_of_key(key("a", 8, u64(1000))) == "truncated");
  CHECK(outcome_of_key(key("a", 9, array(4, std::uint64_t{1} << 62, ""))) == "limit");
  CHECK(outcome_of_key(key("a", 9, array(0, (1u << 30) + 1, ""))) == "limit");
  CHECK(outcome_of_key(key("a", 9, array(8, 1u << 29, ""))) == "truncated");
  CHECK(outcome_of_key(key("a", 9, array(0, 1u << 29, ""))) == "truncated");
  CHECK(outcome_of(File{}.bytes(), {.max_tensors = 0}) == "limit");
  CHECK(outcome_of(File{}.bytes(), {.max_keys = 0}) == "limit");
  CHECK(outcome_of(File{}.bytes(), {.max_text_bytes = 4}) == "limit");
  CHECK(outcome_of_key(key("a", 9, array(0, 2, "ab")), {.max_array_elements = 1}) == "limit");
}

TEST_CASE("parse_header: keys are printable ASCII, of 1 to 65535 bytes, and there once") {
  CHECK(outcome_of_key(key("", 4, u32(1))) == "bad_schema");
  CHECK(outcome_of_key(key("a", 4, u32(1))) == "ok");
  CHECK(outcome_of_key(key("general.architecture", 4, u32(1))) == "duplicate_key");
  CHECK(outcome_of_key(key("\xc3\xbc", 4, u32(1))) == "bad_schema");
  CHECK(outcome_of_key(key(std::string("a\0b", 3), 4, u32(1))) == "bad_schema");
  CHECK(outcome_of_key(key(std::string(65535, 'a'), 4, u32(1))) == "ok");
  CHECK(outcome_of_key(key(std::string(65536, 'a'), 4, u32(1))) == "limit");
}

TEST_CASE("parse_header: values have a known type, booleans are 0 or 1, texts are UTF-8") {
  CHECK(outcome_of_key(key("a", 13, "")) == "bad_schema");
  CHECK(outcome_of_key(key("a", 0xFFFFFFFF, "")) == "bad_schema");
  CHECK(outcome_of_key(key("a", 9, array(13, 1, "a"))) == "bad_schema");
  CHECK(outcome_of_key(key("a", 7, "\x01")) == "ok");
  CHECK(outcome_of_key(key("a", 7, "\x02")) == "bad_schema");
  CHECK(outcome_of_key(key("a", 9, array(7, 2, "\x01\x02"))) == "bad_schema");
  CHECK(outcome_of_key(key("a", 8, text("\xff"))) == "bad_utf8");
  CHECK(outcome_of_key(key("a", 9, array(8, 2, text("a") + text("\xff")))) == "bad_utf8");
  CHECK(outcome_of_key(key("a", 9, array(4, 0, ""))) == "ok");
  CHECK(outcome_of_key(key("a", 9, array(8, 0, ""))) == "ok");
}

TEST_CASE("parse_header: arrays of arrays become JSON, four deep and no deeper") {
  auto const nested = [](int depth) {
    std::string value = array(4, 1, u32(7));
    for (int i = 1; i < depth; ++i) value = array(9, 1, value);
    return key("a", 9, value);
  };
  CHECK(outcome_of_key(nested(4)) == "ok");
  CHECK(outcome_of_key(nested(5)) == "limit");
  CHECK(outcome_of_key(nested(10'000)) == "limit");
  std::string const mixed = array(9, 5, array(1, 2, "\xff\x02") + array(8, 2, text("\"\n") + text("")) + array(6, 1, raw(0.5f)) + array(9, 1, array(10, 1, u64(~std::uint64_t{0}))) + array(7, 1, "\x01"));
  Header const header = read(File{.keys = {key("a", 9, mixed)}}.bytes());
  CHECK(header.metadata.at(0).second == value_of(ValueKind::json, R"([[-1,2],["\"\n",""],[0.5],[[18446744073709551615]],[true]])"));
}

TEST_CASE("parse_header: the alignment is a 32-bit power of two up to 2^20") {
  for (std::uint64_t const bad : {0u, 3u}) CHECK(outcome_of_key(key("general.alignment", 4, u32(bad))) == "bad_schema");
  for (std::uint64_t const bad : {1u << 31, 1u << 21}) CHECK(outcome_of_key(key("general.alignment", 4, u32(bad))) == "limit");
  CHECK(outcome_of_key(key("general.alignment", 10, u64(32))) == "bad_schema");
  CHECK(outcome_of_key(key("general.alignment", 9, array(4, 1, u32(32)))) == "bad_schema");
  for (std::uint64_t const good : {4u, 1u << 20}) {
    Header const header = read(File{.keys = {key("general.alignment", 4, u32(good))}, .data = static_cast<std::size_t>(round_up(32, good)), .alignment = good}.bytes());
    CHECK(header.alignment == good);
    CHECK(header.data_begin % good == 0);
  }
}

TEST_CASE("parse_header: names of tensors are UTF-8 without NUL, of 1 to 63 bytes, and there once") {
  CHECK(outcome_of_tensor(tensor(std::string(63, 'n'), {8}, 0, 0)) == "ok");
  CHECK(outcome_of_tensor(tensor(std::string(64, 'n'), {8}, 0, 0)) == "limit");
  CHECK(outcome_of_tensor(tensor("", {8}, 0, 0)) == "bad_schema");
  CHECK(outcome_of_tensor(tensor("\xc3\xbc", {8}, 0, 0)) == "ok");
  CHECK(outcome_of_tensor(tensor("\xc3", {8}, 0, 0)) == "bad_utf8");
  CHECK(outcome_of(File{.tensors = {t8, tensor("t", {8}, 0, 32)}, .data = 64}.bytes()) == "duplicate_key");
  CHECK(outcome_of(File{.tensors = {tensor(std::string("a\0b", 3), {8}, 0, 0), tensor(std::string("a\0c", 3), {8}, 0, 32)}, .data = 64}.bytes()) == "bad_schema");
}

TEST_CASE("parse_header: sizes that wrap around are refused, whatever stands beside them") {
  using Sizes = std::vector<std::uint64_t>;
  CHECK(outcome_of_tensor(tensor("t", {2, 2, 2, 1}, 0, 0)) == "ok");
  CHECK(outcome_of_tensor(tensor("t", {2, 2, 2, 1, 1}, 0, 0)) == "limit");
  CHECK(outcome_of_tensor(text("t") + u32(0xFFFFFFFF) + std::string(64, '\0')) == "limit");
  CHECK(read(File{.tensors = {tensor("t", {}, 0, 0)}}.bytes()).tensors.at(0).shape == Extents{});
  CHECK(read(File{.tensors = {tensor("t", {3, 0, 5}, 0, 0)}, .data = 0}.bytes()).tensors.at(0).shape == Extents{5, 0, 3});
  constexpr std::uint64_t p20 = 1 << 20, p32 = std::uint64_t{1} << 32, p62 = std::uint64_t{1} << 62;
  for (Sizes const& sizes : std::vector<Sizes>{Sizes{~std::uint64_t{0}}, Sizes{big}, Sizes{2 * p32, big / p32 + 1}, Sizes{p32, p32}, Sizes{p20, p20, p20, p20}, Sizes{0, p62, p62}, Sizes{p62, 0, p62}, Sizes{0, big}}) {
    CHECK(outcome_of_tensor(tensor("t", sizes, types::f32, 0)) == "overflow");
    CHECK(outcome_of_tensor(tensor("t", sizes, types::f64, 0)) == "overflow");
  }
  CHECK(outcome_of_tensor(tensor("t", {p32, p32}, types::q8_0, 0)) == "overflow");
  CHECK(outcome_of_tensor(tensor("t", {std::uint64_t{1} << 61}, types::f64, 0)) == "overflow");
  CHECK(outcome_of(File{.tensors = {tensor("t", {p62}, types::i8, 0), tensor("u", {p62}, types::i8, p62)}}.bytes()) == "overflow");
}

TEST_CASE("parse_header: types are known and rows whole blocks") {
  for (std::uint64_t const type : {43u, 4u, 5u, 31u, 38u, 0xFFFFFFFFu}) CHECK(outcome_of_tensor(tensor("t", {8}, type, 0)) == "unsupported_dtype");
  CHECK(outcome_of_tensor(tensor("t", {33}, types::q4_0, 0)) == "misaligned");
  CHECK(outcome_of_tensor(tensor("t", {128}, types::q4_k, 0)) == "misaligned");
  CHECK(outcome_of_tensor(tensor("t", {8, 32}, types::q4_0, 0)) == "misaligned");   // the innermost dimension is the first
  CHECK(outcome_of_tensor(tensor("t", {}, types::q4_0, 0)) == "misaligned");
  CHECK(read(File{.tensors = {tensor("t", {32, 3}, types::q4_0, 0)}, .data = 64}.bytes()).tensors.at(0).bytes == 54);
}

TEST_CASE("parse_header: each tensor begins where the padding of the one before it ends") {
  for (std::uint64_t const offset : {std::uint64_t{1}, std::uint64_t{64}, big, ~std::uint64_t{0} - 31}) CHECK(outcome_of_tensor(tensor("t", {8}, 0, offset), 256) == "bad_offsets");
  CHECK(outcome_of(File{.tensors = {t8, tensor("u", {8}, 0, 0)}, .data = 64}.bytes()) == "bad_offsets");
  CHECK(outcome_of(File{.tensors = {tensor("u", {8}, 0, 32), t8}, .data = 64}.bytes()) == "bad_offsets");
  CHECK(outcome_of(File{.tensors = {t8, tensor("u", {1}, 0, 32), tensor("v", {1}, 0, 64)}, .data = 96}.bytes()) == "ok");
}

TEST_CASE("parse_header: the file has the data, its final padding, and nothing more, unless asked otherwise") {
  CHECK(outcome_of(File{.data = 31}.bytes()) == "truncated");
  CHECK(outcome_of(File{.data = 0}.bytes()) == "truncated");
  CHECK(outcome_of(File{.data = 0}.bytes().substr(0, 102)) == "truncated");
  File const one{.tensors = {tensor("t", {1}, 0, 0)}, .data = 4};
  CHECK(outcome_of(one.bytes()) == "truncated");
  CHECK(outcome_of(one.bytes(), {.allow_missing_final_padding = true}) == "ok");
  CHECK(outcome_of(one.bytes() + std::string(28, '\x01')) == "ok");   // padding need not be zeros
  CHECK(outcome_of(File{.tensors = one.tensors, .data = 3}.bytes(), {.allow_missing_final_padding = true}) == "truncated");
  CHECK(outcome_of(File{.data = 33}.bytes()) == "trailing_data");
  CHECK(outcome_of(File{.data = 33}.bytes(), {.allow_trailing_bytes = true}) == "ok");
  File const none{.tensors = {}, .data = 0};
  CHECK(outcome_of(none.bytes()) == "ok");
  CHECK(outcome_of(none.bytes() + std::string(round_up(none.bytes().size(), 32) - none.bytes().size(), '\0')) == "ok");
  CHECK(outcome_of(none.bytes() + '\0') == "trailing_data");
  CHECK(outcome_of(none.bytes() + '\0', {.allow_trailing_bytes = true}) == "ok");
}

TEST_CASE("parse_header: errors say where and of what") {
  try {
    read(File{.tensors = {t8, tensor("second", {8}, 77, 32)}, .data = 64}.bytes());
    FAIL("accepted");
  } catch (Error const& error) {
    CHECK(error.message() == "tensor \"second\", at byte 102: ggml type 77 is unknown or has been removed");
  }
  try {
    read(File{.keys = {architecture, key("tokenizer.x", 7, "\x05")}}.bytes());
    FAIL("accepted");
  } catch (Error const& error) {
    CHECK(error.message() == "key \"tokenizer.x\", at byte 69: a boolean that is neither 0 nor 1");
  }
}

TEST_CASE("parse_header: 100,000 tensors take linear time, and long values pass through the window") {
  std::vector<TensorInfo> tensors;
  for (int i = 0; i < 100'000; ++i) tensors.push_back({"blk." + std::to_string(i * 7919 % 100'000) + ".weight", types::q8_0, Extents{2, 32}, 0, 0});
  Metadata metadata{{"long", value_of(ValueKind::text, std::string(700'000, 'x'))}, {"numbers", {ValueKind::array, DType::u32, Bytes(1'200'000, std::byte{3}), {}}}};
  std::string words = "[";
  for (int i = 0; i < 150'000; ++i) words += (i > 0 ? ",\"word" : "\"word") + std::to_string(i) + '"';
  metadata.emplace_back("words", value_of(ValueKind::json, words + ']'));
  Layout const layout = lay_out(tensors, metadata);
  std::uint64_t reads = 0, bytes = 0;
  Header const header = parse_header(   // a quadratic one takes hours
      [&](std::uint64_t position, ByteSpan to) {
        ++reads, bytes += to.size();
        REQUIRE(position + to.size() <= layout.file_size);
        for (std::size_t i = 0; i < to.size(); ++i) to[i] = position + i < layout.header.size() ? layout.header[static_cast<std::size_t>(position) + i] : std::byte{0};
      },
      layout.file_size);
  CHECK(header.metadata == metadata);
  CHECK(header.tensors.size() == 100'000);
  CHECK(header.tensors.back().offset == layout.offsets.back());
  CHECK(bytes <= layout.header.size() + (512 << 10));
  CHECK(reads < 2 * layout.header.size() / (256 << 10) + 10);
}

TEST_CASE("parse_header: an error of the reader passes through as it is") {
  CHECK_THROWS_WITH_AS(parse_header([](std::uint64_t, ByteSpan) { throw Error{ErrorCode::io, "no"}.with_errno(5); }, 1000), doctest::Contains("errno 5"), Error);
}

TEST_CASE("split_of: the parts of a split model say which they are, and contradictions are refused") {
  auto const u16 = [](std::uint64_t n) { return raw(static_cast<std::uint16_t>(n)); };
  auto const split = [&](std::vector<std::string> const& keys) { return split_of(read(File{.keys = keys}.bytes())); };
  auto const keys = [&](std::uint64_t no, std::uint64_t count, std::uint64_t total) {
    return std::vector<std::string>{key("split.no", 2, u16(no)), key("split.count", 2, u16(count)), key("split.tensors.count", 5, u32(total))};
  };
  CHECK(!split({architecture}));
  CHECK(split(keys(2, 3, 9)) == Split{2, 3, 9});
  CHECK(!split(keys(0, 0, 9)));
  CHECK(outcome([&] { split(keys(7, 3, 9)); }) == "index_mismatch");
  CHECK(outcome([&] { split(keys(3, 3, 9)); }) == "index_mismatch");
  CHECK(outcome([&] { split(keys(0, 3, 0)); }) == "index_mismatch");
  CHECK(outcome([&] { split(keys(0, 3, 0xFFFFFFFF)); }) == "index_mismatch");
  CHECK(outcome([&] { split({key("split.no", 2, u16(0)), key("split.count", 2, u16(2))}); }) == "bad_schema");
  CHECK(outcome([&] { split({key("split.no", 4, u32(0)), key("split.count", 2, u16(2)), key("split.tensors.count", 5, u32(1))}); }) == "bad_schema");
  int part = 0;
  for (auto const& path : golden::files_below(golden::root() / "gguf" / "split", ".gguf")) {
    CHECK(split_of(read(golden::text_of(path))) == Split{part, 3, 5});
    CHECK(split_file_name("model", ++part, 3) == path.filename().string());
    CHECK(parse_split_file_name(path.filename().string()) == SplitName{"model", part, 3});
  }
  CHECK(part == 3);
}

TEST_CASE("split_file_name: names of parts are read as they are written, and others are none") {
  CHECK(split_file_name("a%s", 3, 9) == "a%s-00003-of-00009.gguf");
  CHECK(parse_split_file_name("Grok-100B-v1.0-Q4_0-00003-of-00009.gguf") == SplitName{"Grok-100B-v1.0-Q4_0", 3, 9});
  for (char const* const name : {"", "model.gguf", "-00001-of-00002.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-0001-of-00002.gguf", "m-0000a-of-00002.gguf", "m-00001-of-00002.ggu"})
    CHECK(!parse_split_file_name(name));
  for (int const number : {0, 4}) CHECK(outcome([&] { split_file_name("m", number, 3); }) == "invalid_argument");
  CHECK(outcome([&] { split_file_name("m", 1, 100'000); }) == "invalid_argument");
}

TEST_CASE("lay_out: what it writes is read again as it was, with every kind of value and any alignment") {
  Metadata metadata;
  for (DType const dtype : {DType::boolean, DType::u8, DType::i8, DType::u16, DType::i16, DType::u32, DType::i32, DType::f32, DType::u64, DType::i64, DType::f64}) {
    auto const size = static_cast<std::size_t>(bits_of(dtype) / 8);
    metadata.emplace_back("one." + std::string{to_string(dtype)}, number(dtype, std::string(size, '\x01')));
    metadata.emplace_back("many." + std::string{to_string(dtype)}, Value{ValueKind::array, dtype, Bytes(3 * size, std::byte{1}), {}});
    metadata.emplace_back("none." + std::string{to_string(dtype)}, Value{ValueKind::array, dtype, {}, {}});
  }
  metadata.emplace_back("text", value_of(ValueKind::text, std::string("\xc3\xbc \0 \"", 7)));
  metadata.emplace_back("words", value_of(ValueKind::json, R"(["a","\"\\","","ü","\n\u0001"])"));
  metadata.emplace_back("no words", value_of(ValueKind::json, "[]"));
  std::vector<TensorInfo> tensors;
  for (std::uint32_t type = 0; type < 50; ++type)
    if (TypeFacts const* const facts = type_facts(type)) {
      std::uint32_t again = 99;
      CHECK(parse_type(facts->name, again));
      CHECK(again == type);
      tensors.push_back({"t" + std::to_string(type), type, Extents{3, 2 * facts->elements}, 0, 0});
    }
  CHECK(tensors.size() == 43 - 2 - 6);
  tensors.push_back({"scalar", types::f32, Extents{}, 0, 0});
  tensors.push_back({"empty", types::q4_k, Extents{0, 256}, 0, 0});
  tensors.push_back({"four", types::i8, Extents{1, 2, 3, 4}, 0, 0});
  for (std::uint64_t const alignment : {1u, 4u, 32u, 64u, 4096u, 1u << 20}) {
    CAPTURE(alignment);
    Layout const layout = lay_out(tensors, metadata, alignment);
    CHECK(layout.header.size() == layout.data_begin);
    Layout const sizes = lay_out(tensors, metadata, alignment, LayoutParts::sizes_only);
    CHECK(sizes.header.empty());
    CHECK(sizes.data_begin == layout.data_begin);
    CHECK(sizes.offsets == layout.offsets);
    CHECK(sizes.paddings == layout.paddings);
    CHECK(sizes.file_size == layout.file_size);
    std::string file{as_text(layout.header)};
    file.resize(static_cast<std::size_t>(layout.file_size));
    Header const header = read(file);
    CHECK(header.alignment == alignment);
    CHECK(header.data_begin == layout.data_begin);
    Metadata wanted = metadata;
    if (alignment != 32) wanted.emplace_back("general.alignment", number(DType::u32, u32(alignment)));
    CHECK(header.metadata == wanted);
    REQUIRE(header.tensors.size() == tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      TensorInfo expected = tensors[i];
      expected.offset = layout.offsets[i];
      expected.bytes = tensor_bytes(expected.type, expected.shape);
      CHECK(header.tensors[i] == expected);
      CHECK(expected.offset % alignment == 0);
    }
    CHECK(lay_out(header.tensors, header.metadata, alignment).header == layout.header);   // the alignment is there once
  }
}

TEST_CASE("can_hold: the kinds of values that lay_out takes, and no others") {
  for (DType const dtype : {DType::boolean, DType::u8, DType::i64, DType::f32, DType::f64}) {
    auto const size = static_cast<std::size_t>(bits_of(dtype) / 8);
    CHECK(can_hold(Value{ValueKind::number, dtype, Bytes(size), {}}));
    CHECK(can_hold(Value{ValueKind::array, dtype, Bytes(3 * size), {}}));
  }
  for (DType const dtype : {DType::f16, DType::bf16, DType::f8_e4m3, DType::c64, DType::f4}) CHECK_FALSE(can_hold(Value{ValueKind::number, dtype, Bytes(8), {}}));
  CHECK(can_hold(value_of(ValueKind::text, "a")));
  for (char const* const json : {"[]", R"(["a","\u00fc"])"}) CHECK(can_hold(value_of(ValueKind::json, json)));
  for (char const* const json : {"{}", "\"a\"", "[1]", "[\"a\",[\"b\"]]", "[null]", "3", "["}) CHECK_FALSE(can_hold(value_of(ValueKind::json, json)));
  CHECK_FALSE(can_hold(value_of(ValueKind::bytes, "a")));
  CHECK_FALSE(can_hold(Value{ValueKind::per_rank, DType::u8, {}, {number(DType::u32, u32(1))}}));
}

TEST_CASE("lay_out: keys, names and values that no reader takes are refused") {
  auto const of = [](Metadata const& metadata, std::vector<TensorInfo> const& tensors = {}, std::uint64_t alignment = 32) {
    std::string const all = outcome([&] { lay_out(tensors, metadata, alignment); });
    CHECK(outcome([&] { lay_out(tensors, metadata, alignment, LayoutParts::sizes_only); }) == all);
    return all;
  };
  Value const one = number(DType::u32, u32(1));
  CHECK(of({{"a", one}}) == "ok");
  CHECK(of({{"", one}}) == "bad_schema");
  CHECK(of({{"\xc3\xbc", one}}) == "bad_schema");
  CHECK(of({{std::string(65536, 'a'), one}}) == "limit");
  CHECK(of({{"a", one}, {"b", one}, {"a", one}}) == "duplicate_key");
  for (DType const dtype : {DType::f16, DType::bf16, DType::f8_e4m3, DType::c64, DType::f4}) CHECK(of({{"a", {ValueKind::number, dtype, Bytes(8), {}}}}) == "unsupported");
  CHECK(of({{"a", {ValueKind::array, DType::f16, Bytes(4), {}}}}) == "unsupported");
  CHECK(of({{"a", {ValueKind::number, DType::u32, Bytes(3), {}}}}) == "invalid_argument");
  CHECK(of({{"a", {ValueKind::array, DType::u32, Bytes(7), {}}}}) == "invalid_argument");
  CHECK(of({{"a", {ValueKind::number, DType::boolean, Bytes(1, std::byte{2}), {}}}}) == "bad_schema");
  CHECK(of({{"a", value_of(ValueKind::bytes, "a")}}) == "unsupported");
  CHECK(of({{"a", {ValueKind::per_rank, DType::u8, {}, {one}}}}) == "unsupported");
  CHECK(of({{"a", value_of(ValueKind::text, "\xff")}}) == "bad_utf8");
  for (char const* const json : {"{}", "\"a\"", "[1]", "[\"a\",[\"b\"]]", "[null]", "3"}) CHECK(of({{"a", value_of(ValueKind::json, json)}}) == "unsupported");
  CHECK(of({{"a", value_of(ValueKind::json, "[")}}) == "bad_json");
  CHECK(of({}, {{"t", types::f32, {8}, 0, 0}, {"t", types::f32, {8}, 0, 0}}) == "duplicate_key");
  CHECK(of({}, {{"", types::f32, {8}, 0, 0}}) == "bad_schema");
  CHECK(of({}, {{std::string("a\0b", 3), types::f32, {8}, 0, 0}}) == "bad_schema");
  CHECK(of({}, {{std::string(64, 'n'), types::f32, {8}, 0, 0}}) == "limit");
  CHECK(of({}, {{"\xff", types::f32, {8}, 0, 0}}) == "bad_utf8");
  CHECK(of({}, {{"t", types::f32, {1, 1, 1, 1, 1}, 0, 0}}) == "limit");
  CHECK(of({}, {{"t", 4, {8}, 0, 0}}) == "unsupported_dtype");
  CHECK(of({}, {{"t", types::q8_0, {32, 8}, 0, 0}}) == "misaligned");
  CHECK(of({}, {{"t", types::f32, {INT64_MAX}, 0, 0}}) == "overflow");
  CHECK(of({}, {{"t", types::i8, {INT64_MAX / 2}, 0, 0}, {"u", types::i8, {INT64_MAX / 2}, 0, 0}}) == "overflow");
  for (std::uint64_t const alignment : {0u, 3u, 1u << 21}) CHECK(of({}, {}, alignment) == "invalid_argument");
  CHECK(of({{"general.alignment", number(DType::u32, u32(64))}}) == "invalid_argument");
  CHECK(of({{"general.alignment", number(DType::u64, u64(64))}}, {}, 64) == "invalid_argument");
  CHECK(of({{"general.alignment", number(DType::u32, u32(64))}}, {}, 64) == "ok");
}

TEST_CASE("plain_dtype: the types that are no blocks have dtypes, and the reverse") {
  int plain = 0;
  for (std::uint32_t type = 0; type < 50; ++type) {
    DType dtype{};
    if (!plain_dtype(type, dtype)) continue;
    CAPTURE(type);
    std::uint32_t again = 99;
    CHECK(plain_type(dtype, again));
    CHECK(again == type);
    CHECK(type_facts(type)->name == to_string(dtype));
    CHECK(type_facts(type)->elements == 1);
    CHECK(type_facts(type)->bytes * 8 == bits_of(dtype));
    ++plain;
  }
  CHECK(plain == 8);
  std::uint32_t type = 0;
  CHECK(!plain_type(DType::u8, type));
  CHECK(!parse_type("Q4_2", type));
  CHECK(type_facts(4) == nullptr);
  CHECK(type_facts(43) == nullptr);
}
