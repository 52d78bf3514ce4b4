// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/safetensors_header.hpp>

#include "golden.hpp"

#include <doctest/doctest.h>

#include <random>

using namespace dcp;
using namespace dcp::safetensors;
using golden::file_with;
using golden::outcome;
using Limits = std::numeric_limits<std::uint64_t>;

namespace {

std::string const one_i32 = R"({"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}})";

Header read(std::string const& file, ParseOptions options = {}) {
  ConstByteSpan const bytes = as_byte_span(file);
  auto const n = static_cast<std::size_t>(header_bytes(bytes.first(std::min<std::size_t>(8, bytes.size())), bytes.size()));
  return parse_header(bytes.subspan(8, n), bytes.size(), options);
}
std::string outcome_of(std::string const& file, ParseOptions options = {}) {
  return outcome([&] { read(file, options); });
}
std::string outcome_of_json(std::string const& json, std::size_t data_bytes = 0, ParseOptions options = {}) {
  return outcome_of(file_with(json, data_bytes), options);
}

std::string tensor(std::string const& dtype, std::string const& shape, std::string const& offsets) {
  return R"({"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}
std::string u8(std::string const& shape, std::string const& offsets) { return tensor(R"("U8")", shape, offsets); }
/// A header of one tensor "a".
std::string one(std::string const& dtype, std::string const& shape, std::string const& offsets) { return R"({"a":)" + tensor(dtype, shape, offsets) + "}"; }

TensorInfo info(std::string name, DType dtype, Extents shape) { return {std::move(name), dtype, shape, 0, 0}; }
std::string written(std::vector<TensorInfo> tensors, Metadata metadata = {}, std::uint64_t alignment = 8) {
  assign_offsets(tensors);
  return std::string{as_text(write_header(tensors, std::move(metadata), alignment))};
}
std::string little_endian(std::uint64_t n) { return {reinterpret_cast<char const*>(&n), sizeof n}; }

std::string sample() {
  std::string const json =
      R"({"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},)"
      R"("q":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[12,15]}} )";
  constexpr std::string_view data{"\x00\x00\x80\x3f\x00\x00\x00\xc0\x80\x3f\x00\xc0\x38\x7e\x01", 15};
  return file_with(json) + std::string{data};
}

}  // namespace

TEST_CASE("parse_header: every golden file has the tensors that its expected.json lists") {
  int files = 0;
  for (auto const& directory : std::filesystem::directory_iterator{golden::root() / "safetensors"}) {
    CAPTURE(directory.path().filename().string());
    auto const expected = golden::json_of(directory.path() / "expected.json");
    std::string const file = golden::text_of(directory.path() / "model.safetensors");
    Header const header = read(file, {.refuse_unknown_fields = true});
    REQUIRE(header.tensors.size() == expected["tensors"].size());
    std::uint64_t cursor = 0;
    for (auto const& tensor : header.tensors) {
      CAPTURE(tensor.name);
      auto const& wanted = expected["tensors"].at(tensor.name);
      CHECK(to_string(tensor.dtype) == wanted["dtype"].get<std::string>());
      CHECK(tensor.shape == Extents{wanted["shape"].get<std::vector<std::int64_t>>()});
      CHECK(tensor.begin == cursor);
      CHECK(tensor.end - tensor.begin == tensor_bytes(tensor.dtype, tensor.shape));
      cursor = tensor.end;
    }
    CHECK(header.data_begin + cursor == file.size());
    if (expected.contains("metadata")) {
      CHECK(header.metadata.size() == expected["metadata"].size());
      for (auto const& entry : expected["metadata"].items()) {
        CAPTURE(entry.key());
        auto const found = header.find_metadata(entry.key());
        REQUIRE(found);
        CHECK(*found == entry.value().get<std::string>());
      }
    }
    ++files;
  }
  CHECK(files == 10);
}

TEST_CASE("write_header: the headers of golden files come back byte for byte, metadata keys sorted") {
  int same = 0;
  for (auto const& path : golden::files_below(golden::root(), ".safetensors")) {
    std::string const file = golden::text_of(path);
    bool const by_reference = path.string().find("/bad/") == std::string::npos && path.string().find("consolidated") == std::string::npos &&
                              path.string().find("unaligned") == std::string::npos;
    if (!by_reference) continue;   // packed by hand, or by the consolidation that writes JSON of its own
    CAPTURE(path.string());
    Header header = read(file);
    // Ours begin their data at a page, which the format allows and the reference does not do.
    std::string const again = written(header.tensors, header.metadata, path.string().find("/own/") == std::string::npos ? 8 : 4096);
    std::string const original = file.substr(0, static_cast<std::size_t>(header.data_begin));
    CHECK(again.size() == original.size());
    auto const tensors_of = [](std::string const& text) {
      return text.substr(text.find("\"__metadata__\"") == std::string::npos ? 8 : text.find("\"},\"") + 2);
    };
    if (header.metadata.size() < 2) CHECK(again == original);
    else CHECK(tensors_of(again) == tensors_of(original));   // the order of two metadata keys is random in the reference
    Header const reread = parse_header(as_byte_span(std::string_view{again}.substr(8)), file.size());
    CHECK(reread.tensors == header.tensors);
    CHECK(reread.metadata == header.metadata);
    ++same;
  }
  CHECK(same > 30);
}

TEST_CASE("write_header: the golden byte strings of the reference's own tests") {
  CHECK(written({}) == little_endian(8) + "{}      ");
  CHECK(written({}, {{"framework", "pt"}}) == little_endian(0x28) + R"({"__metadata__":{"framework":"pt"}}     )");
  CHECK(written({info("attn.0", DType::f32, {1, 2, 3})}) == little_endian(0x40) + R"({"attn.0":{"dtype":"F32","shape":[1,2,3],"data_offsets":[0,24]}})");
  CHECK(written({info("attn0", DType::f32, {1, 1, 2, 3})}) ==
        little_endian(0x48) + R"({"attn0":{"dtype":"F32","shape":[1,1,2,3],"data_offsets":[0,24]}}       )");
  CHECK(written({info("attn.0", DType::f4, {1, 2})}) == little_endian(0x40) + R"({"attn.0":{"dtype":"F4","shape":[1,2],"data_offsets":[0,1]}}    )");
  CHECK(written({info("test2", DType::f16, {2, 2}), info("test1", DType::i32, {2, 2})}) ==
        little_endian(0x80) + R"({"test1":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]},"test2":{"dtype":"F16","shape":[2,2],"data_offsets":[16,24]}})" +
            "      ");
  std::string const file = sample();
  CHECK(file.size() == 223);
  CHECK(file.substr(0, 208) == written({info("q", DType::f8_e4m3, {3}), info("b", DType::bf16, {2}), info("w", DType::f32, {2})}, {{"format", "pt"}}));
}

TEST_CASE("write_header: the worked example of a sharded file of torch.distributed.checkpoint") {
  std::string const expected =
      R"({"__metadata__":{"DCP_SHARDING_INFO":"{\"dtensor\": {\"saved_offsets\": [2, 0]}}","DCP_VERSION":"1.0","format":"pt"},)"
      R"("dtensor":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]}}     )";
  CHECK(expected.size() == 184);
  CHECK(written({info("dtensor", DType::f32, {2, 4})},
                {{"format", "pt"}, {"DCP_VERSION", "1.0"}, {"DCP_SHARDING_INFO", write_sharding_info({{"dtensor", {2, 0}}})}}) ==
        little_endian(184) + expected);
}

TEST_CASE("write_header: strings are escaped as the reference escapes them") {
  std::string const name{"\"\\\b\f\n\r\t\0\x1f\x7f/\xe2\x80\xa8\xc3\xa9", 16};
  std::string const text = written({info(name, DType::u8, {0})});
  CHECK(text.find(R"({"\"\\\b\f\n\r\t\u0000\u001f)" "\x7f/\xe2\x80\xa8\xc3\xa9\":") == 8);
  CHECK(read(text).tensors.at(0).name == name);
}

TEST_CASE("write_header: the data section starts at a multiple of data_alignment") {
  for (std::uint64_t const alignment : {8u, 16u, 64u, 512u, 4096u}) {
    for (std::size_t extra = 0; extra < 20; ++extra) {
      std::string const text = written({info(std::string(extra, 'x'), DType::u8, {0})}, {}, alignment);
      CHECK(text.size() % alignment == 0);
      CHECK(read(text).data_begin == text.size());
      CHECK(text.size() < read(written({info(std::string(extra, 'x'), DType::u8, {0})})).data_begin + alignment);
    }
  }
  for (std::uint64_t const alignment : {0u, 1u, 4u, 12u, 24u}) CHECK(outcome([&] { written({}, {}, alignment); }) == "invalid_argument");
}

TEST_CASE("write_header refuses what no reader could read (S90)") {
  auto const write = [](std::vector<TensorInfo> const& tensors, Metadata const& metadata = {}) { return outcome([&] { write_header(tensors, metadata); }); };
  TensorInfo const a{"a", DType::u8, {2}, 0, 2};
  CHECK(write({a}) == "ok");
  CHECK(write({a, {"a", DType::u8, {2}, 2, 4}}) == "duplicate_key");
  CHECK(write({{"__metadata__", DType::u8, {2}, 0, 2}}) == "bad_schema");
  CHECK(write({{"a", DType::u8, {2}, 0, 3}}) == "size_mismatch");
  CHECK(write({{"a", DType::i32, {2}, 0, 2}}) == "size_mismatch");
  CHECK(write({{"a", DType::u8, {2}, 1, 3}}) == "bad_offsets");
  CHECK(write({a, {"b", DType::u8, {2}, 3, 5}}) == "bad_offsets");
  CHECK(write({a, {"b", DType::u8, {2}, 1, 3}}) == "bad_offsets");
  CHECK(write({{"a", DType::u8, {2}, 2, 0}}) == "bad_offsets");
  CHECK(write({{"a", DType::f4, {3}, 0, 2}}) == "misaligned");
  CHECK(write({{"a", DType::i32, {INT64_MAX, 2}, 0, 2}}) == "overflow");
  CHECK(write({{"\xff", DType::u8, {2}, 0, 2}}) == "bad_utf8");
  CHECK(write({a}, {{"k", "\xed\xa0\x80"}}) == "bad_utf8");
  CHECK(write({a}, {{"k", "1"}, {"j", "2"}, {"k", "1"}}) == "duplicate_key");
  // {"__metadata__":{"k":"..."}} is 25 bytes around the value
  auto const with_value = [](std::size_t bytes) { return Metadata{{"k", std::string(bytes, 'v')}}; };
  CHECK(outcome([&] { write_header({}, with_value(100'000'000 - 25 + 1)); }) == "limit");
  Bytes const longest = write_header({}, with_value(100'000'000 - 25));
  CHECK(longest.size() == 100'000'008);
  CHECK(header_bytes(longest, longest.size()) == max_header_bytes);
}

TEST_CASE("assign_offsets: widest dtype first, then names by bytes, without gaps") {
  std::vector<TensorInfo> tensors;
  for (char const* name : {"aa", "a", "_", "Z", "B", "9", "10"}) tensors.push_back(info(name, DType::u8, {2}));
  assign_offsets(tensors);
  std::string order;
  for (auto const& tensor : tensors) order += tensor.name + ' ';
  CHECK(order == "10 9 B Z _ a aa ");
  tensors.clear();
  for (int i = 0; i < safetensors_dtype_count; ++i) tensors.push_back(info("x" + std::to_string(i), static_cast<DType>(i), {4, 2}));
  assign_offsets(tensors);
  order.clear();
  for (auto const& tensor : tensors) {
    (order += to_string(tensor.dtype)) += ' ';
    CHECK(tensor.begin % std::max<std::uint64_t>(1, static_cast<std::uint64_t>(bits_of(tensor.dtype)) / 8) == 0);
  }
  CHECK(order == "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 F6_E3M2 F6_E2M3 F4 BOOL ");
  CHECK(outcome([] { written({info("a", DType::f6_e2m3, {3})}); }) == "misaligned");
  std::vector<TensorInfo> huge(9, info("x", DType::u8, {(std::int64_t{1} << 61) - 1}));
  auto const before = huge;
  CHECK(outcome([&] { assign_offsets(huge); }) == "overflow");
  CHECK(huge == before);
}

TEST_CASE("tensor_bytes: checked in every order of the dimensions") {
  CHECK(tensor_bytes(DType::f32, {}) == 4);
  CHECK(tensor_bytes(DType::f32, {3, 0}) == 0);
  CHECK(tensor_bytes(DType::f4, {2, 3}) == 3);
  CHECK(tensor_bytes(DType::f6_e3m2, {4}) == 3);
  CHECK(tensor_bytes(DType::c64, {2, 2}) == 32);
  CHECK(tensor_bytes(DType::u8, {(std::int64_t{1} << 61) - 1}) == (std::uint64_t{1} << 61) - 1);
  auto const of = [](DType dtype, Extents const& shape) { return outcome([&] { tensor_bytes(dtype, shape); }); };
  CHECK(of(DType::f4, {3}) == "misaligned");
  CHECK(of(DType::f4, {3, 0}) == "ok");
  CHECK(of(DType::u8, {std::int64_t{1} << 61}) == "overflow");
  CHECK(of(DType::u8, {0, std::int64_t{1} << 62, 4}) == "overflow");
  CHECK(of(DType::u8, {std::int64_t{1} << 62, 4, 0}) == "overflow");
}

TEST_CASE("law: what write_header writes, parse_header reads") {
  std::uint64_t const seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937_64 random{seed};
  auto const below = [&](std::uint64_t n) { return static_cast<int>(random() % n); };
  constexpr std::array<std::string_view, 8> pieces{"w", ".", "\"", "\\", "\n", "\xc3\xa9", "\xf0\x9f\x9a\x80", "7"};
  for (int round = 0; round < 200; ++round) {
    std::vector<TensorInfo> tensors;
    for (int t = below(8); t > 0; --t) {
      TensorInfo tensor = info(std::to_string(t), static_cast<DType>(below(safetensors_dtype_count)), {});
      for (int k = below(6); k > 0; --k) tensor.name += pieces[static_cast<std::size_t>(below(pieces.size()))];
      std::vector<std::int64_t> sizes{8};   // whole bytes for every dtype
      for (int d = below(7); d > 0; --d) sizes.push_back(below(8));
      tensor.shape = sizes;
      tensors.push_back(tensor);
    }
    assign_offsets(tensors);
    Metadata const metadata = round % 2 == 0 ? Metadata{} : Metadata{{"a", "\x01"}, {"b\"", ""}};
    Bytes const bytes = write_header(tensors, metadata, std::uint64_t{8} << below(8));
    std::uint64_t const file_size = bytes.size() + (tensors.empty() ? 0 : tensors.back().end);
    CHECK(header_bytes(bytes, file_size) == bytes.size() - 8);
    Header const header = parse_header(ConstByteSpan{bytes}.subspan(8), file_size);
    CHECK(header.tensors == tensors);
    CHECK(header.metadata == metadata);
    CHECK(header.data_begin == bytes.size());
  }
}

TEST_CASE("header_bytes: lengths that a file cannot have (S01 to S11)") {
  CHECK(outcome_of("") == "truncated");
  CHECK(outcome_of("1234567") == "truncated");
  CHECK(outcome_of(std::string(8, '\0')) == "bad_json");
  std::string const rest = one_i32 + std::string(16, '\0');
  CHECK(outcome_of(little_endian(std::uint64_t{1} << 63) + rest) == "limit");
  CHECK(outcome_of(little_endian(Limits::max()) + rest) == "limit");
  CHECK(outcome_of(little_endian(100'000'001) + rest) == "limit");
  CHECK(outcome_of(little_endian(100'000'000) + rest) == "bad_header_length");
  CHECK(outcome_of(little_endian(one_i32.size() + 1) + one_i32) == "bad_header_length");
  CHECK(outcome_of(little_endian(one_i32.size() - 1) + rest) == "bad_json");
  CHECK(outcome_of(little_endian(one_i32.size() + 1) + rest) == "bad_json");
  std::string big_endian = little_endian(one_i32.size());
  std::reverse(big_endian.begin(), big_endian.end());
  CHECK(outcome_of(big_endian + rest) == "limit");
  CHECK(outcome_of(little_endian(one_i32.size()) + rest) == "ok");
  CHECK(outcome_of(little_endian(64'000'000'000) + rest) == "limit");                                                        // S82
  CHECK(outcome([&] { header_bytes(as_byte_span("1234"), 100); }) == "invalid_argument");
  CHECK(outcome([&] { parse_header(as_byte_span(one_i32), 60); }) == "bad_header_length");
}

TEST_CASE("header_bytes: a file of another format is named in the hint (S84)") {
  auto const hint = [](std::string const& file) {
    try {
      read(file);
    } catch (Error const& error) {
      CHECK((error.code() == ErrorCode::limit || error.code() == ErrorCode::bad_header_length));
      return error.hint();
    }
    return std::string{"accepted"};
  };
  using namespace std::string_literals;
  CHECK(hint("\x80\x04\x95\x10\0\0\0\0\0\0\0}"s).find("pickle") != std::string::npos);
  CHECK(hint("GGUF\3\0\0\0\0\0\0\0"s).find("GGUF") != std::string::npos);
  CHECK(hint("<!DOCTYPE html><html>").find("HTML") != std::string::npos);
  CHECK(hint("version https://git-lfs.github.com/spec/v1\n").find("git-lfs") != std::string::npos);
  CHECK(hint("PK\3\4\0\0\0\0\0\0\0\0"s).find("zip") != std::string::npos);
  CHECK(hint("PK\3\4\x14\0\x08\x08\0\0\0\0"s).find("zip") != std::string::npos);
  CHECK(hint(std::string(16, '\xff')).empty());
}

TEST_CASE("parse_header: text that is no UTF-8 or no JSON (S12 to S22, S69)") {
  using namespace std::string_literals;
  CHECK(outcome_of_json("{\"\xff\":1}") == "bad_utf8");
  CHECK(outcome_of_json("{\"a\xc0\x80\":1}") == "bad_utf8");
  CHECK(outcome_of_json("{\"a\xed\xa0\x80\":1}") == "bad_utf8");
  CHECK(outcome_of_json("{\"aaaaaaaaaaaaaaaaaaaaaa\":\"\xe2\x82\"}") == "bad_utf8");
  CHECK(outcome_of_json("\xEF\xBB\xBF{}") == "bad_json");
  CHECK(outcome_of_json("{") == "bad_json");
  for (char const* root : {"[]", "\"x\"", "null", "1", "true", "-1", "1.5"}) CHECK(outcome_of_json(root) == "bad_schema");
  CHECK(outcome_of_json("\0{}"s) == "bad_json");
  CHECK(outcome_of_json("{}\0\0\0"s) == "bad_json");
  CHECK(outcome_of_json("{\"a\0\":1}"s) == "bad_json");
  for (char const* json : {"{}x", "{}{}", R"({"a":1,})", "{}//", "/**/{}", "{'a':1}", "", "   ", "\v{}", "\xC2\xA0{}", "{\"a\"}", "{\"\xE2\x82\xAC\":}"})
    CHECK(outcome_of_json(json) == "bad_json");
  CHECK(outcome_of_json(one(R"("U8")", "[1,]", "[0,1]"), 1) == "bad_json");
  CHECK(outcome_of_json(one(R"("U8")", "[NaN]", "[0,1]"), 1) == "bad_json");
  CHECK(outcome_of_json(one(R"("U8")", "[Infinity]", "[0,1]"), 1) == "bad_json");
  CHECK(outcome_of_json("{\"a\nb\":" + u8("[1]", "[0,1]") + "}", 1) == "bad_json");
  CHECK(outcome_of_json(R"({"\x41":)" + u8("[1]", "[0,1]") + "}", 1) == "bad_json");
  CHECK(outcome_of_json(R"({"\ud800":)" + u8("[1]", "[0,1]") + "}", 1) == "bad_json");
  CHECK(outcome_of_json(R"({"\udc00":)" + u8("[1]", "[0,1]") + "}", 1) == "bad_json");
  CHECK(outcome_of_json(" \t\r\n{} \t\r\n") == "ok");
  try {
    read(file_with("{}\0\0\0\0"s));
    FAIL("accepted");
  } catch (Error const& error) {
    CHECK(error.hint().find("NUL") != std::string::npos);   // S19
  }
}

TEST_CASE("parse_header: numbers are plain unsigned integers (S23 to S29, S37 to S40, S83)") {
  for (char const* size : {"-1", "-0", "1.0", "1e0", "\"1\"", "true", "null", "[1]", "{}", "18446744073709551616", "-9223372036854775809", "-0.0"}) {
    CAPTURE(size);
    CHECK(outcome_of_json(one(R"("U8")", std::string{"["} + size + "]", "[0,1]"), 1) == "bad_schema");
    CHECK(outcome_of_json(one(R"("U8")", "[1]", std::string{"["} + size + ",1]"), 1) == "bad_schema");
    CHECK(outcome_of_json(one(R"("U8")", "[1]", std::string{"[0,"} + size + "]"), 1) == "bad_schema");
  }
  for (char const* size : {"01", "+1", "0x1", ".5", "1.", "1e", "-", "1e400", "-1e400"}) {
    CAPTURE(size);
    CHECK(outcome_of_json(one(R"("U8")", std::string{"["} + size + "]", "[0,1]"), 1) == "bad_json");
  }
  for (char const* shape : {"null", "1", "{}", "\"[1]\"", "false"}) CHECK(outcome_of_json(one(R"("U8")", shape, "[0,1]"), 1) == "bad_schema");
  for (char const* offsets : {"[1]", "[]", "[0,1,2]", "{}", "{\"begin\":0,\"end\":1}", "null", "0", "[false,true]", "[0.0,1.0]"})
    CHECK(outcome_of_json(one(R"("U8")", "[1]", offsets), 1) == "bad_schema");
  CHECK(outcome_of_json(one(R"("U8")", "[1]", "[1,0]"), 1) == "bad_offsets");
  CHECK(outcome_of_json(R"({"a":{"x":1e400,)" + u8("[1]", "[0,1]").substr(1) + "}", 1) == "bad_json");
  CHECK(outcome_of_json(R"({"a":{"x":)" + std::string(10'000'000, '9') + "," + u8("[1]", "[0,1]").substr(1) + "}", 1) == "bad_json");
}

TEST_CASE("parse_header: a tensor is an object of dtype, shape and data_offsets (S30 to S36)") {
  CHECK(outcome_of_json(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1) == "bad_schema");
  CHECK(outcome_of_json(R"({"a":{"dtype":"U8","shape":[1]}})", 1) == "bad_schema");
  CHECK(outcome_of_json(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1) == "bad_schema");
  CHECK(outcome_of_json(R"({"a":{}})") == "bad_schema");
  for (char const* dtype : {"u8", "F128", "", " U8", "U8 ", "C128"})
    CHECK(outcome_of_json(one('"' + std::string{dtype} + '"', "[1]", "[0,1]"), 1) == "unsupported_dtype");
  for (char const* dtype : {"4", "{\"U8\":null}", "null", "[\"U8\"]"}) CHECK(outcome_of_json(one(dtype, "[1]", "[0,1]"), 1) == "bad_schema");
  CHECK(outcome_of_json(one(R"("\u00558")", "[1]", "[0,1]"), 1) == "ok");
  for (char const* value : {R"(["U8",[1],[0,1]])", "null", "\"x\"", "1", "true"})
    CHECK(outcome_of_json(std::string{R"({"a":)"} + value + "}", 1) == "bad_schema");
  CHECK(outcome_of_json(R"({"a":{"b":)" + u8("[1]", "[0,1]") + "}}", 1) == "bad_schema");
  for (char const* extra : {"1", "\"s\"", "null", "{\"deep\":[{}]}", "[[],{}]"}) {
    std::string const json = std::string{R"({"a":{"extra":)"} + extra + "," + u8("[1]", "[0,1]").substr(1) + "}";
    CHECK(outcome_of_json(json, 1) == "ok");
    CHECK(outcome_of_json(json, 1, {.refuse_unknown_fields = true}) == "bad_schema");
  }
}

TEST_CASE("parse_header: tensors lie back to back and fill the file (S41 to S50, S74 to S76)") {
  auto const two = [](std::string const& a, std::string const& b) { return R"({"a":)" + a + R"(,"b":)" + b + "}"; };
  CHECK(outcome_of_json(one(R"("U8")", "[1]", "[1,2]"), 2) == "bad_offsets");
  CHECK(outcome_of_json(two(u8("[1]", "[0,1]"), u8("[1]", "[2,3]")), 3) == "bad_offsets");
  CHECK(outcome_of_json(two(u8("[1]", "[0,1]"), u8("[1]", "[0,1]")), 1) == "bad_offsets");
  CHECK(outcome_of_json(two(u8("[2]", "[0,2]"), u8("[2]", "[1,3]")), 3) == "bad_offsets");
  CHECK(outcome_of_json(two(u8("[1]", "[1,2]"), u8("[1]", "[0,1]")), 2) == "ok");
  CHECK(outcome_of_json(one(R"("U8")", "[8]", "[0,8]"), 4) == "truncated");
  CHECK(outcome_of(file_with(one_i32, 17)) == "trailing_data");
  CHECK(outcome_of(file_with(one_i32, 17), {.allow_trailing_bytes = true}) == "ok");
  CHECK(outcome_of(file_with(one_i32, 16) + "PK\5\6" + std::string(18, '\0')) == "trailing_data");
  CHECK(outcome_of(file_with("{}", 1)) == "trailing_data");
  CHECK(outcome_of(file_with(one_i32, 15)) == "truncated");
  CHECK(outcome_of(file_with(one_i32, 15), {.allow_trailing_bytes = true}) == "truncated");
  CHECK(outcome_of(file_with(one_i32)) == "truncated");
  CHECK(outcome_of_json(one(R"("I32")", "[2,2]", "[0,4]"), 4) == "size_mismatch");
  CHECK(outcome_of_json(one(R"("U8")", "[2]", "[0,4]"), 4) == "size_mismatch");
  CHECK(outcome_of_json(two(u8("[0]", "[4,4]"), u8("[2]", "[0,2]")), 2) == "bad_offsets");
  CHECK(outcome_of_json(two(u8("[0]", "[1,1]"), u8("[2]", "[0,2]")), 2) == "bad_offsets");
  CHECK(outcome_of_json(two(u8("[2]", "[0,2]"), u8("[0,7]", "[0,0]")), 2) == "ok");
  CHECK(outcome_of_json(two(u8("[2]", "[0,2]"), u8("[0,7]", "[2,2]")), 2) == "ok");
  CHECK(outcome_of_json(one(R"("F32")", "[]", "[0,0]")) == "size_mismatch");
  CHECK(outcome_of_json(one(R"("F32")", "[]", "[0,4]"), 4) == "ok");
  CHECK(outcome_of_json(two(u8("[1]", "[0,1]"), tensor(R"("F32")", "[2]", "[1,9]")), 9) == "ok");                            // S77
  CHECK(outcome_of_json(one(R"("BOOL")", "[1]", "[0,1]"), 1) == "ok");                                                       // S78
  // rules 7 to 11 run tensor by tensor, in the order of the bytes
  CHECK(outcome_of_json(two(u8("[1]", "[5,6]"), u8("[3]", "[0,2]")), 2) == "size_mismatch");
}

TEST_CASE("parse_header: sizes that do not fit (S51 to S60, S79, S89)") {
  CHECK(outcome_of_json(one(R"("I32")", "[2,18446744073709551614]", "[0,16]"), 16) == "overflow");
  CHECK(outcome_of_json(one(R"("I32")", "[2,9223372036854775807]", "[0,16]"), 16) == "overflow");
  CHECK(outcome_of_json(one(R"("U8")", "[2305843009213693952]", "[0,16]"), 16) == "overflow");
  CHECK(outcome_of_json(one(R"("U8")", "[2305843009213693951]", "[0,2305843009213693951]"), 16) == "truncated");
  std::string nine{'{'};
  constexpr std::uint64_t most = (std::uint64_t{1} << 61) - 1;   // bytes of one U8 tensor; 8 of them and 7 bytes make 2^64 - 1
  for (std::uint64_t i = 0; i < 9; ++i) {
    std::uint64_t const begin = i * most, size = i < 8 ? most : 7;
    nine += (i > 0 ? ",\"" : "\"") + std::to_string(i) +
            "\":" + u8('[' + std::to_string(size) + ']', '[' + std::to_string(begin) + ',' + std::to_string(begin + size) + ']');
  }
  CHECK(nine.find(std::to_string(Limits::max())) != std::string::npos);
  CHECK(outcome_of_json(nine + "}", 16) == "truncated");
  CHECK(outcome_of_json(one(R"("U8")", "[9223372036854775808,4,0]", "[0,0]")) == "overflow");
  CHECK(outcome_of_json(one(R"("U8")", "[0,9223372036854775808,4]", "[0,0]")) == "overflow");
  CHECK(outcome_of_json(one(R"("U8")", "[0,4611686018427387904,4]", "[0,0]")) == "overflow");
  CHECK(outcome_of_json(one(R"("U8")", "[9223372036854775808]", "[1,0]")) == "bad_offsets");   // rule 7 comes before rule 8
  CHECK(outcome_of_json(one(R"("F4")", "[3]", "[0,2]"), 2) == "misaligned");
  CHECK(outcome_of_json(one(R"("F6_E2M3")", "[3]", "[0,3]"), 3) == "misaligned");
  CHECK(outcome_of_json(one(R"("F6_E3M2")", "[4]", "[0,3]"), 3) == "ok");
  CHECK(outcome_of_json(one(R"("F4")", "[2,3]", "[0,3]"), 3) == "ok");
  std::string ones = "1";
  for (int d = 1; d < 1000; ++d) ones += ",1";
  CHECK(outcome_of_json(one(R"("U8")", "[" + ones + "]", "[0,1]"), 1) == "limit");
  CHECK(outcome_of_json(one(R"("U8")", "[" + ones.substr(0, 31) + "]", "[0,1]"), 1) == "ok");      // 16 dimensions
  CHECK(outcome_of_json(one(R"("U8")", "[" + ones.substr(0, 33) + "]", "[0,1]"), 1) == "limit");   // 17
  CHECK(outcome_of_json(one(R"("U8")", "[1152921504606846976]", "[0,1152921504606846976]"), 4096) == "truncated");
}

TEST_CASE("parse_header: nothing is there twice (S61 to S66)") {
  auto const twice = [](std::string const& key, std::string const& a, std::string const& b) { return R"({"a":)" + a + ",\"" + key + "\":" + b + "}"; };
  CHECK(outcome_of_json(twice("a", u8("[1]", "[0,1]"), u8("[1]", "[0,1]")), 1) == "duplicate_key");
  CHECK(outcome_of_json(twice("a", u8("[2]", "[0,2]"), tensor(R"("I8")", "[1]", "[0,1]")), 2) == "duplicate_key");
  CHECK(outcome_of_json(twice("\\u0061", u8("[1]", "[0,1]"), u8("[1]", "[0,1]")), 1) == "duplicate_key");
  CHECK(outcome_of_json(twice("a", u8("[1]", "[0,1]"), u8("[1]", "[1,2]")), 2) == "duplicate_key");
  CHECK(outcome_of_json(R"({"__metadata__":{},"__metadata__":{}})") == "duplicate_key");
  CHECK(outcome_of_json(R"({"__metadata__":null,"\u005f_metadata__":{}})") == "duplicate_key");
  for (char const* field : {R"("dtype":"U8")", R"("shape":[1])", R"("data_offsets":[0,1])"})
    CHECK(outcome_of_json(std::string{R"({"a":{)"} + field + "," + u8("[1]", "[0,1]").substr(1) + "}", 1) == "duplicate_key");
  CHECK(outcome_of_json(R"({"__metadata__":{"k":"1","j":"","k":"2"}})") == "duplicate_key");

  ParseOptions const lenient{.allow_duplicate_names = true};
  Header const last = read(file_with(R"({"__metadata__":{"k":"1","\u006b":"2"},"a":)" + u8("[2]", "[0,2]") + R"(,"b":)" + u8("[1]", "[1,2]") + R"(,"a":)" +
                                         tensor(R"("I8")", "[1]", "[0,1]") + "}",
                                     2),
                           lenient);
  CHECK(last.metadata == Metadata{{"k", "2"}});
  REQUIRE(last.tensors.size() == 2);
  CHECK(last.tensors[0] == TensorInfo{"a", DType::i8, {1}, 0, 1});
  CHECK(last.tensors[1].name == "b");
  CHECK(outcome_of_json(R"({"__metadata__":{},"__metadata__":{}})", 0, lenient) == "duplicate_key");
  CHECK(outcome_of_json(twice("a", u8("[1]", "[0,1]"), u8("[1]", "[1,2]")), 2, lenient) == "bad_offsets");
}

TEST_CASE("parse_header: metadata maps texts to texts (S67, S68)") {
  for (char const* metadata :
       {R"({"a":1})", R"({"a":null})", R"({"a":{}})", R"({"a":[]})", R"({"a":true})", "[]", "\"x\"", "1", R"({"dtype":"U8","shape":[1],"data_offsets":[0,1]})"})
    CHECK(outcome_of_json(std::string{R"({"__metadata__":)"} + metadata + "}") == "bad_schema");
  CHECK(outcome_of_json(R"({"__metadata__":null})") == "ok");
  Header const header = read(file_with(R"({"b":)" + u8("[1]", "[0,1]") + R"(,"__metadata__":{"z":"1","":"\u0000","a":"\ud83d\ude80"}})", 1));
  CHECK(header.metadata == Metadata{{"", std::string(1, '\0')}, {"a", "\xf0\x9f\x9a\x80"}, {"z", "1"}});
  CHECK(header.find_metadata("z") == std::string_view{"1"});
  CHECK(!header.find_metadata("y"));
}

TEST_CASE("parse_header: any UTF-8 is a name (S70, S71)") {
  for (std::string const& name :
       {std::string{}, std::string{"\\u0000"}, std::string{"\\ud83d\\ude80"}, std::string{"../../x"}, std::string{"/etc/passwd"}, std::string(1'000'000, 'n')})
    CHECK(outcome_of_json("{\"" + name + "\":" + u8("[1]", "[0,1]") + "}", 1) == "ok");
  CHECK(read(file_with(R"({"\ud83d\ude80":)" + u8("[1]", "[0,1]") + "}", 1)).tensors.at(0).name == "\xf0\x9f\x9a\x80");
}

TEST_CASE("parse_header: an ignored field may nest 16 levels deep and no deeper (S72, S73)") {
  auto const nested = [](int levels) {   // two levels are the header and the tensor
    auto const depth = static_cast<std::size_t>(levels - 2);
    return R"({"a":{"x":)" + std::string(depth, '[') + std::string(depth, ']') + "," + u8("[1]", "[0,1]").substr(1) + "}";
  };
  CHECK(outcome_of_json(nested(16), 1) == "ok");
  CHECK(outcome_of_json(nested(17), 1) == "limit");
  CHECK(outcome_of_json(nested(120), 1) == "limit");
  CHECK(outcome_of_json(nested(130), 1) == "limit");
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += R"({"a":)";
  CHECK(outcome_of_json(objects) == "limit");
  CHECK(outcome_of_json(std::string(1'000'000, '[')) == "limit");
}

TEST_CASE("parse_header: every proper prefix of the sample is refused (S85)") {
  std::string const file = sample();
  CHECK(outcome_of(file) == "ok");
  for (std::size_t length = 0; length < file.size(); ++length) {
    CAPTURE(length);
    CHECK(outcome_of(file.substr(0, length)) == (length < 8 ? "truncated" : length < 208 ? "bad_header_length" : "truncated"));
  }
}

TEST_CASE("parse_header: a flipped bit gives an error or a header that still agrees with itself (S86)") {
  std::string const file = sample();
  int accepted = 0;
  for (std::size_t bit = 0; bit < 208 * 8; ++bit) {
    std::string damaged = file;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    try {
      Header const header = read(damaged);
      std::uint64_t cursor = 0;
      for (auto const& tensor : header.tensors) {
        CHECK(tensor.begin == cursor);
        CHECK(tensor.end - tensor.begin == tensor_bytes(tensor.dtype, tensor.shape));
        cursor = tensor.end;
      }
      CHECK(header.data_begin + cursor == file.size());
      ++accepted;
    } catch (Error const& error) {
      CHECK(!error.message().empty());
    }
  }
  CHECK(accepted > 0);   // a changed letter of a name is no error
  CHECK(accepted < 300);
}

TEST_CASE("parse_header: a million tensors (S80), or one range claimed a million times (S81)") {
  constexpr int count = 1'000'000;
  std::string one_by_one{'{'}, all_the_same{'{'};
  for (int i = count - 1; i >= 0; --i) {   // backwards, so that the reader must sort
    std::string const key = (i == count - 1 ? "\"t." : ",\"t.") + std::to_string(i) + "\":";
    one_by_one += key + u8("[1]", "[" + std::to_string(i) + "," + std::to_string(i + 1) + "]");
    all_the_same += key + u8("[16]", "[0,16]");
  }
  Header const header = read(file_with(one_by_one + "}", count));
  REQUIRE(header.tensors.size() == count);
  bool right = true;
  for (std::size_t i = 0; i < count; ++i) right &= header.tensors[i].begin == i && header.tensors[i].name == "t." + std::to_string(i);
  CHECK(right);
  CHECK(outcome_of(file_with(all_the_same + "}", 16)) == "bad_offsets");
}

TEST_CASE("parse_header: an error names the tensor and the place") {
  try {
    read(file_with(R"({"layer\n1":)" + u8("[3]", "[0,2]") + "}", 2));
    FAIL("accepted");
  } catch (Error const& error) {
    CHECK(error.message() == R"(tensor "layer\n1" at data offsets [0, 2): shape and dtype make 3 bytes, the offsets 2)");
  }
  try {
    read(file_with(R"({"a":nope})"));
    FAIL("accepted");
  } catch (Error& error) {
    CHECK(error.message() == "the header is not JSON (byte 6 of 10)");
    CHECK(std::string{error.with_path("x.safetensors").what()}.find("x.safetensors, bytes [14, 15)") != std::string::npos);
  }
}

TEST_CASE("bad/st_*: malformed files are refused with the right code, odd but good ones are read") {
  std::map<std::string, std::string> const codes{{"st_empty", "truncated"},
                                                 {"st_seven_bytes", "truncated"},
                                                 {"st_header_len_zero", "bad_json"},
                                                 {"st_header_len_past_file", "bad_header_length"},
                                                 {"st_header_len_2_63", "limit"},
                                                 {"st_header_len_wraps", "limit"},
                                                 {"st_header_len_100MB", "bad_header_length"},
                                                 {"st_header_len_big_endian", "limit"},
                                                 {"st_truncated_header", "bad_header_length"},
                                                 {"st_truncated_data", "truncated"},
                                                 {"st_no_data", "truncated"},
                                                 {"st_trailing_byte", "trailing_data"},
                                                 {"st_zip_appended", "trailing_data"},
                                                 {"st_overlap_exact", "bad_offsets"},
                                                 {"st_overlap_partial", "bad_offsets"},
                                                 {"st_hole", "bad_offsets"},
                                                 {"st_first_offset_not_zero", "bad_offsets"},
                                                 {"st_offsets_reversed", "bad_offsets"},
                                                 {"st_offsets_past_end", "truncated"},
                                                 {"st_offsets_three", "bad_schema"},
                                                 {"st_size_mismatch", "size_mismatch"},
                                                 {"st_scalar_without_bytes", "size_mismatch"},
                                                 {"st_non_utf8", "bad_utf8"},
                                                 {"st_overlong_utf8", "bad_utf8"},
                                                 {"st_duplicate_tensor", "duplicate_key"},
                                                 {"st_duplicate_escaped", "duplicate_key"},
                                                 {"st_duplicate_field", "duplicate_key"},
                                                 {"st_duplicate_metadata_key", "duplicate_key"},
                                                 {"st_negative_shape", "bad_schema"},
                                                 {"st_float_shape", "bad_schema"},
                                                 {"st_string_shape", "bad_schema"},
                                                 {"st_shape_overflow", "overflow"},
                                                 {"st_shape_wraps_to_16", "overflow"},
                                                 {"st_overflow_before_zero", "overflow"},
                                                 {"st_overflow_after_zero", "overflow"},
                                                 {"st_unknown_dtype", "unsupported_dtype"},
                                                 {"st_lowercase_dtype", "unsupported_dtype"},
                                                 {"st_f4_odd", "misaligned"},
                                                 {"st_nested_130", "limit"},
                                                 {"st_nested_8000", "limit"},
                                                 {"st_metadata_number", "bad_schema"},
                                                 {"st_metadata_nested", "bad_schema"},
                                                 {"st_metadata_is_tensor", "bad_schema"},
                                                 {"st_nul_padding", "bad_json"},
                                                 {"st_bom", "bad_json"},
                                                 {"st_root_array", "bad_schema"},
                                                 {"st_tensor_as_array", "bad_schema"},
                                                 {"st_pickle_renamed", "limit"},
                                                 {"st_gguf_renamed", "limit"}};
  std::size_t refused = 0, read_well = 0, damaged = 0;
  auto const cases = golden::json_of(golden::root() / "bad" / "bad.json");
  for (auto const& entry : cases["cases"]) {
    if (entry["kind"] != "safetensors") continue;
    std::string const name = entry["file"];
    CAPTURE(name);
    std::string const got = outcome_of(golden::text_of(golden::root() / "bad" / name));
    if (entry["expect"] == "any") {
      ++damaged;   // it is enough that we came back
    } else if (entry["expect"] == "ok") {
      CHECK(got == "ok");
      ++read_well;
    } else {
      CHECK(got == codes.at(name.substr(0, name.find('.'))));
      ++refused;
    }
  }
  CHECK(refused == codes.size());
  CHECK(read_well == 7);
  CHECK(damaged == 4);
}

TEST_CASE("sharding info: golden files agree with themselves, and are written again as Python wrote them") {
  int files = 0;
  for (auto const& path : golden::files_below(golden::root() / "hf", ".safetensors")) {
    CAPTURE(path.string());
    Header const header = read(golden::text_of(path));
    auto const text = header.find_metadata(sharding_info_key);
    if (!text) continue;
    ShardingInfo const info = parse_sharding_info(*text);
    CHECK(info.size() == header.tensors.size());
    auto const reference = nlohmann::json::parse(*text);
    for (auto const& tensor : header.tensors) CHECK(saved_offsets(info, tensor) == reference[tensor.name]["saved_offsets"].get<std::vector<std::int64_t>>());
    std::string const again = write_sharding_info(info);
    CHECK(nlohmann::json::parse(again) == reference);
    CHECK(again.size() == text->size());   // the order of the names is that of the state there, sorted here
    if (info.size() == 1) CHECK(again == *text);
    ++files;
  }
  CHECK(files > 30);
}

TEST_CASE("write_sharding_info: ASCII as json.dumps makes it") {
  CHECK(write_sharding_info({}) == "{}");
  CHECK(write_sharding_info({{"b", {2, 0}}, {"a", {}}}) == R"({"a": {"saved_offsets": []}, "b": {"saved_offsets": [2, 0]}})");
  CHECK(write_sharding_info({{"\xc3\xa9\xf0\x9f\x9a\x80\x7f\"\n/", {INT64_MAX}}}) ==
        R"({"\u00e9\ud83d\ude80\u007f\"\n/": {"saved_offsets": [9223372036854775807]}})");
  CHECK(outcome([] { write_sharding_info({{"\xff", {}}}); }) == "bad_utf8");
  ShardingInfo const info{{"\xc3\xa9\xf0\x9f\x9a\x80\x7f\"\n", {3, 4}}, {"", {}}};
  CHECK(parse_sharding_info(write_sharding_info(info)) == info);
}

TEST_CASE("parse_sharding_info is strict (I33, I34)") {
  auto const of = [](std::string const& json) { return outcome([&] { parse_sharding_info(json); }); };
  for (char const* json : {"",
                           "not JSON",
                           "{",
                           "{}x",
                           "[]",
                           "null",
                           "1",
                           "\"x\"",
                           R"({"a":[0]})",
                           R"({"a":null})",
                           R"({"a":{}})",
                           R"({"a":{"other":[0]}})",
                           R"({"a":{"saved_offsets":0}})",
                           R"({"a":{"saved_offsets":{}}})",
                           R"({"a":{"saved_offsets":null}})",
                           R"({"a":{"saved_offsets":[-1]}})",
                           R"({"a":{"saved_offsets":[-0]}})",
                           R"({"a":{"saved_offsets":[0.0]}})",
                           R"({"a":{"saved_offsets":["0"]}})",
                           R"({"a":{"saved_offsets":[[0]]}})",
                           R"({"a":{"saved_offsets":[{}]}})",
                           R"({"a":{"saved_offsets":[18446744073709551616]}})",
                           "\xff"}) {
    CAPTURE(json);
    CHECK(of(json) == "bad_schema");
  }
  CHECK(of(R"({"a":{"saved_offsets":[0]},"\u0061":{"saved_offsets":[0]}})") == "duplicate_key");
  CHECK(of(R"({"a":{"saved_offsets":[0],"saved_offsets":[0]}})") == "duplicate_key");
  CHECK(of(R"({"a":{"saved_offsets":[9223372036854775808]}})") == "overflow");
  CHECK(of(R"({"a":{"saved_offsets":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]}})") == "limit");
  CHECK(of("{\"a\":" + std::string(1000, '[')) == "limit");
  CHECK(parse_sharding_info(R"( {"a":{"new":{"x":[1]},"saved_offsets":[1,2],"more":3},"b":{"saved_offsets":[]}} )") == ShardingInfo{{"a", {1, 2}}, {"b", {}}});

  ShardingInfo const info{{"a", {1, INT64_MAX - 2}}};
  auto const at = [&](TensorInfo const& tensor) { return outcome([&] { saved_offsets(info, tensor); }); };
  CHECK(at({"a", DType::u8, {5, 2}, 0, 10}) == "ok");
  CHECK(at({"a", DType::u8, {5, 3}, 0, 15}) == "overflow");
  CHECK(at({"a", DType::u8, {5}, 0, 5}) == "bad_schema");
  CHECK(at({"b", DType::u8, {5, 2}, 0, 10}) == "index_mismatch");
}
