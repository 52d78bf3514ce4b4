// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/hf_index.hpp>
#include <dcp/formats/safetensors_header.hpp>

#include "golden.hpp"

#include <doctest/doctest.h>

#include <map>
#include <set>

using namespace dcp;
using namespace dcp::hf;
using golden::outcome;

namespace {

Index parse(std::string const& json, IndexOptions options = {}) { return parse_index(as_byte_span(json), options); }
std::string outcome_of(std::string const& json, IndexOptions options = {}) {
  return outcome([&] { parse(json, options); });
}
std::string with_map(std::string const& map) { return R"({"metadata":{"total_size":1},"weight_map":)" + map + "}"; }
std::string with_file(std::string const& file) { return with_map(R"({"a":)" + nlohmann::json(file).dump() + "}"); }
std::string with_metadata(std::string const& metadata) { return R"({"metadata":)" + metadata + R"(,"weight_map":{"a":"x.safetensors"}})"; }

}  // namespace

TEST_CASE("parse_index: every golden index lists exactly the tensors of its files") {
  int indexes = 0;
  for (auto const& path : golden::files_below(golden::root() / "hf", ".json")) {
    if (path.filename() != index_file_name) continue;
    CAPTURE(path.string());
    Index const index = parse(golden::text_of(path));
    std::set<std::string> files;
    std::uint64_t bytes = 0;
    for (auto const& [tensor, file] : index.weight_map) files.insert(file);
    std::size_t tensors = 0;
    for (auto const& file : files) {
      std::string const content = golden::text_of(path.parent_path() / file);
      ConstByteSpan const span = as_byte_span(content);
      auto const n = static_cast<std::size_t>(safetensors::header_bytes(span.first(8), span.size()));
      auto const header = safetensors::parse_header(span.subspan(8, n), span.size());
      for (auto const& tensor : header.tensors) {
        CHECK(index.find_file(tensor.name) == file);
        bytes += tensor.end - tensor.begin;
        ++tensors;
      }
    }
    CHECK(tensors == index.weight_map.size());
    CHECK(index.total_size == bytes);
    CHECK(!index.find_file("no such tensor"));
    ++indexes;
  }
  CHECK(indexes == 7);
}

TEST_CASE("write_index: golden indexes are written again with the same lines") {
  for (auto const& path : golden::files_below(golden::root() / "hf", ".json")) {
    if (path.filename() != index_file_name) continue;
    CAPTURE(path.string());
    std::string const original = golden::text_of(path);
    Index const index = parse(original);
    std::string const again = write_index(index);
    CHECK(parse(again) == index);
    auto const lines = [](std::string const& text) {   // the writers order names in their own ways; the last name has no comma
      std::multiset<std::string> all;
      std::istringstream in{text};
      for (std::string line; std::getline(in, line);) all.insert(line.ends_with(',') ? line.substr(0, line.size() - 1) : line);
      return all;
    };
    CHECK(lines(again) == lines(original));
  }
}

TEST_CASE("write_index: indented by two, sorted, ASCII, with a final newline") {
  Index const index{64,
                    {{"b", "model-00002-of-00002.safetensors"}, {"\xc3\xa9", "model-00001-of-00002.safetensors"}, {"a\"", "model-00001-of-00002.safetensors"}},
                    {{"z", "a\""}, {"lm_head.weight", "b"}}};
  std::string const expected = R"({
  "metadata": {
    "lm_head.weight": "b",
    "total_size": 64,
    "z": "a\""
  },
  "weight_map": {
    "a\"": "model-00001-of-00002.safetensors",
    "b": "model-00002-of-00002.safetensors",
    "\u00e9": "model-00001-of-00002.safetensors"
  }
}
)";
  CHECK(write_index(index) == expected);
  Index const again = parse(expected);
  CHECK(again.weight_map.front().first == "a\"");
  CHECK(again.metadata.front().first == "lm_head.weight");
  CHECK(again.total_size == 64u);
  CHECK(write_index({std::nullopt, {{"a", "x.safetensors"}}, {}}) == "{\n  \"metadata\": {},\n  \"weight_map\": {\n    \"a\": \"x.safetensors\"\n  }\n}\n");
}

TEST_CASE("write_index refuses what parse_index would refuse") {
  auto const write = [](Index const& index) { return outcome([&] { write_index(index); }); };
  CHECK(write({1, {{"a", "x.safetensors"}}, {}}) == "ok");
  CHECK(write({1, {{"a", "x.safetensors"}, {"a", "y.safetensors"}}, {}}) == "duplicate_key");
  CHECK(write({1, {{"a", "x.safetensors"}}, {{"k", "1"}, {"k", "1"}}}) == "duplicate_key");
  CHECK(write({1, {{"a", "../x.safetensors"}}, {}}) == "unsafe_path");
  CHECK(write({1, {{"\xff", "x.safetensors"}}, {}}) == "bad_utf8");
  CHECK(write({1, {}, {}}) == "invalid_argument");
  CHECK(write({1, {{"a", "x.safetensors"}}, {{"total_size", "1"}}}) == "invalid_argument");
}

TEST_CASE("parse_index: text that is no index (I02 to I05, I25 to I27)") {
  using namespace std::string_literals;
  std::string const good = with_file("x.safetensors");
  CHECK(outcome_of(good) == "ok");
  for (std::string const& json :
       {""s, "  "s, "not JSON"s, "\xEF\xBB\xBF"s + good, good + "x", good + "{}", good + '\0', "{"s, R"({"weight_map":{"a":"x.safetensors",}})"s})
    CHECK(outcome_of(json) == "bad_json");
  CHECK(outcome_of(with_file("x.safetensors") + "\xff") == "bad_utf8");
  CHECK(outcome_of("{\"weight_map\":{\"\xc0\x80\":\"x.safetensors\"}}") == "bad_utf8");
  for (char const* root : {"[]", "\"x\"", "null", "1"}) CHECK(outcome_of(root) == "bad_schema");
  CHECK(outcome_of("{}") == "bad_schema");
  CHECK(outcome_of(R"({"metadata":{}})") == "bad_schema");
  for (char const* map : {"[]", "null", "\"x\"", "1", R"(["a"])"}) CHECK(outcome_of(with_map(map)) == "bad_schema");
  for (char const* file : {"1", "null", "[\"x.safetensors\"]", "{}", "true"}) CHECK(outcome_of(with_map(std::string{R"({"a":)"} + file + "}")) == "bad_schema");
  CHECK(outcome_of(with_map("{}")) == "index_mismatch");
  CHECK(outcome_of(R"({"weight_map":)" + std::string(10'000, '[')) == "limit");
  CHECK(outcome_of(R"({"other":)" + std::string(10'000, '[')) == "limit");
  CHECK(outcome_of(std::string(10'000, '[')) == "limit");
  CHECK(outcome_of(good, {.max_bytes = good.size()}) == "ok");
  CHECK(outcome_of(good, {.max_bytes = good.size() - 1}) == "limit");
  std::string const two = with_map(R"({"a":"x.safetensors","b":"x.safetensors"})");
  CHECK(outcome_of(two, {.max_entries = 2}) == "ok");
  CHECK(outcome_of(two, {.max_entries = 1}) == "limit");
  std::string many{"{\"weight_map\":{"};
  for (int i = 0; i < 5'000'000; ++i) many += (i > 0 ? ",\"" : "\"") + std::to_string(i) + "\":\"m.safetensors\"";
  CHECK(outcome_of(many + "}}") == "limit");
  CHECK(outcome_of(std::string((256u << 20) + 1, ' ')) == "limit");
}

TEST_CASE("parse_index: file names that are more than a file name (I06 to I12)") {
  using namespace std::string_literals;
  for (std::string const& file : {""s,
                                  "../model.safetensors"s,
                                  "a/../../b.safetensors"s,
                                  "/etc/passwd"s,
                                  "/tmp/x.safetensors"s,
                                  "C:x.safetensors"s,
                                  "C:\\x"s,
                                  "C:\\x.safetensors"s,
                                  "\\\\host\\share\\x.safetensors"s,
                                  "\\x.safetensors"s,
                                  "..\\x.safetensors"s,
                                  "sub/model.safetensors"s,
                                  "a\0.safetensors"s,
                                  "\0x.safetensors"s,
                                  "x.safetensors\0"s,
                                  "a\n.safetensors"s,
                                  "file://x"s,
                                  "file://x.safetensors"s,
                                  "~/.x"s,
                                  "~/x.safetensors"s,
                                  "$HOME/x"s,
                                  "$HOME.safetensors"s,
                                  "model.bin"s,
                                  "model.safetensors.pkl"s,
                                  "model.SAFETENSORS"s,
                                  ".."s,
                                  "."s,
                                  ".safetensors"s,
                                  "..safetensors"s,
                                  "x.safetensors/"s,
                                  "x.safetensors "s,
                                  "a\x7f.safetensors"s,
                                  std::string(250, 'x') + ".safetensors"}) {
    CAPTURE(file);
    CHECK(outcome_of(with_file(file)) == "unsafe_path");
    CHECK(outcome([&] { check_file_name(file); }) == "unsafe_path");
    if (file != "sub/model.safetensors") CHECK(outcome([&] { check_file_name(file, true); }) == "unsafe_path");
  }
  CHECK(outcome([] { check_file_name("\xff.safetensors"); }) == "unsafe_path");
  for (std::string const& file : {"model.safetensors"s, "model-00001-of-00002.safetensors"s, "model.fp16-00001-of-00002.safetensors"s,
                                  "\xc3\xa9 x.safetensors"s, "a..b.safetensors"s, std::string(243, 'x') + ".safetensors"}) {
    CAPTURE(file);
    CHECK(outcome_of(with_file(file)) == "ok");
  }
  IndexOptions const deep{.allow_subdirectories = true};
  CHECK(outcome_of(with_file("sub/model.safetensors"), deep) == "ok");
  CHECK(outcome_of(with_file("a/b/c.safetensors"), deep) == "ok");
  for (char const* file : {"/sub/x.safetensors", "sub//x.safetensors", "sub/../x.safetensors", "./x.safetensors", "sub/.x.safetensors", "sub\\x.safetensors",
                           "sub/~x.safetensors"})
    CHECK(outcome_of(with_file(file), deep) == "unsafe_path");
  CHECK(write_index({1, {{"a", "s/x.safetensors"}}, {}}, deep).find("s/x.safetensors") != std::string::npos);
}

TEST_CASE("parse_index: nothing is there twice (I20, I32)") {
  CHECK(outcome_of(with_map(R"({"a":"x.safetensors","b":"z.safetensors","a":"y.safetensors"})")) == "duplicate_key");
  CHECK(outcome_of(with_map(R"({"a":"x.safetensors","a":"x.safetensors"})")) == "duplicate_key");
  CHECK(outcome_of(with_map(R"({"a":"x.safetensors","\u0061":"y.safetensors"})")) == "duplicate_key");
  CHECK(outcome_of(R"({"weight_map":{"a":"x.safetensors"},"weight_map":{"b":"x.safetensors"}})") == "duplicate_key");
  CHECK(outcome_of(R"({"metadata":null,"metadata":{},"weight_map":{"b":"x.safetensors"}})") == "duplicate_key");
  CHECK(outcome_of(with_metadata(R"({"total_size":1,"total_size":2})")) == "duplicate_key");
  CHECK(outcome_of(with_metadata(R"({"k":"1","k":2})")) == "duplicate_key");
}

TEST_CASE("parse_index: metadata (I22 to I24)") {
  for (char const* size : {"-1", "-0", "1.5", "1.0", "\"1\"", "18446744073709551616", "null", "true", "{}", "[1]"}) {
    CAPTURE(size);
    std::string const json = with_metadata(std::string{R"({"total_size":)"} + size + "}");
    CHECK(outcome_of(json) == "bad_schema");
    CHECK(!parse(json, {.ignore_bad_total_size = true}).total_size);
  }
  CHECK(outcome_of(with_metadata(R"({"total_size":1e400})")) == "bad_json");
  CHECK(parse(with_metadata(R"({"total_size":18446744073709551615})")).total_size == UINT64_MAX);
  CHECK(!parse(with_metadata("null")).total_size);
  CHECK(!parse(with_metadata("{}")).total_size);
  CHECK(outcome_of(R"({"weight_map":{"a":"x.safetensors"}})") == "ok");
  for (char const* metadata : {"[]", "\"x\"", "1", "false"}) CHECK(outcome_of(with_metadata(metadata)) == "bad_schema");
  Index const index = parse(
      R"({"x":[{}],"weight_map":{"b":"x.safetensors","a":"y.safetensors"},"metadata":{"total_parameters":7,"tied":"a",)"
      R"("more":{"total_size":3},"also":"b"},"y":null})");
  CHECK(index == Index{std::nullopt, {{"a", "y.safetensors"}, {"b", "x.safetensors"}}, {{"also", "b"}, {"tied", "a"}}});
}

TEST_CASE("file names: five digits at least, counted from one") {
  CHECK(model_file_name(1, 3) == "model-00001-of-00003.safetensors");
  CHECK(model_file_name(99'999, 123'456) == "model-99999-of-123456.safetensors");
  CHECK(shard_file_name(3, 1, 5) == "shard-00003-model-00001-of-00005.safetensors");
  CHECK(shard_file_name(INT32_MAX, INT32_MAX, INT32_MAX) == "shard-2147483647-model-2147483647-of-2147483647.safetensors");
  CHECK(index_file_name == "model.safetensors.index.json");
  for (std::string const& name : {model_file_name(1, 1), shard_file_name(8, 2, 2), std::string{single_file_name}})
    CHECK(outcome([&] { check_file_name(name); }) == "ok");
  CHECK(outcome([] { model_file_name(0, 3); }) == "invalid_argument");
  CHECK(outcome([] { model_file_name(4, 3); }) == "invalid_argument");
  CHECK(outcome([] { shard_file_name(0, 1, 1); }) == "invalid_argument");
  CHECK(outcome([] { shard_file_name(1, 2, 1); }) == "invalid_argument");
}

TEST_CASE("bad/hf_*: what the bytes alone tell is refused, the rest is left to the storage") {
  std::map<std::string, std::string> const codes{{"hf_parent_path", "unsafe_path"},
                                                 {"hf_absolute_path", "unsafe_path"},
                                                 {"hf_backslash_path", "unsafe_path"},
                                                 {"hf_nul_path", "unsafe_path"},
                                                 {"hf_duplicate_key", "duplicate_key"},
                                                 {"hf_index_not_json", "bad_json"},
                                                 {"hf_index_no_weight_map", "bad_schema"},
                                                 {"hf_index_value_not_string", "bad_schema"},
                                                 {"hf_dcp_info_not_json", "bad_schema"},
                                                 {"hf_dcp_info_lacks_tensor", "index_mismatch"},
                                                 {"hf_dcp_offset_rank", "bad_schema"},
                                                 {"hf_dcp_offset_negative", "bad_schema"},
                                                 {"hf_dcp_offset_2_63", "overflow"},
                                                 // between files: absent files, tensors in none or two of them, holes, overlaps, differing dtypes
                                                 {"hf_missing_file", "ok"},
                                                 {"hf_tensor_not_in_shard", "ok"},
                                                 {"hf_tensor_in_two_files", "ok"},
                                                 {"hf_dcp_overlap_differs", "ok"},
                                                 {"hf_dcp_hole", "ok"},
                                                 {"hf_dcp_dtype_differs", "ok"},
                                                 {"hf_dcp_ok", "ok"}};
  std::size_t folders = 0, damaged = 0;
  auto const cases = golden::json_of(golden::root() / "bad" / "bad.json");
  for (auto const& entry : cases["cases"]) {
    if (entry["kind"] != "hf") continue;
    std::string const name = entry["file"];
    CAPTURE(name);
    auto const folder = golden::root() / "bad" / name;
    std::string const got = outcome([&] {
      if (std::filesystem::exists(folder / index_file_name)) parse(golden::text_of(folder / index_file_name));
      for (auto const& path : golden::files_below(folder, ".safetensors")) {
        std::string const file = golden::text_of(path);
        ConstByteSpan const bytes = as_byte_span(file);
        auto const n = static_cast<std::size_t>(safetensors::header_bytes(bytes.first(std::min<std::size_t>(8, bytes.size())), bytes.size()));
        auto const header = safetensors::parse_header(bytes.subspan(8, n), bytes.size());
        auto const text = header.find_metadata(safetensors::sharding_info_key);
        if (!text) continue;
        auto const info = safetensors::parse_sharding_info(*text);
        for (auto const& tensor : header.tensors) safetensors::saved_offsets(info, tensor);
      }
    });
    if (entry["expect"] == "any") {
      ++damaged;   // it is enough that we came back
    } else {
      CHECK(got == codes.at(name));
      ++folders;
    }
  }
  CHECK(folders == codes.size());
  CHECK(damaged == 4);
}
