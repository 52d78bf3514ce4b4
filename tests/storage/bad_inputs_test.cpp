// SPDX-License-Identifier: Apache-2.0
// Malformed, hostile and half-written checkpoints through the whole of load: a clear Error, and no more memory than the bytes that
// are there. (S.., I..: numbers in the catalogue of inputs that tests/formats follows too.)
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/storage/safetensors.hpp>

#include "formats/golden.hpp"
#include "support/allocations.hpp"
#include "support/fault_medium.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <functional>
#include <map>
#include <set>

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

namespace fs = std::filesystem;
using dcp::test::TemporaryDirectory;
using golden::file_with;
using golden::outcome;

namespace {

std::uint64_t bytes_below(fs::path const& place) {
  if (fs::is_regular_file(place)) return fs::file_size(place);
  std::uint64_t sum = 0;
  if (fs::is_directory(place))
    for (auto const& entry : fs::recursive_directory_iterator{place, fs::directory_options::skip_permission_denied})
      if (!entry.is_symlink() && entry.is_regular_file()) sum += entry.file_size();
  return sum;
}

struct Loaded {
  std::string code;     // or "ok"
  std::string text;     // of the error
  std::set<std::string> names;
  std::vector<std::string> warnings;
  std::size_t peak = 0; // bytes allocated at once
};

Loaded load(fs::path const& place, dcp::SafeTensorsOptions const& storage = {}) {
  Loaded result;
  dcp::SelfComm self;
  dcp::test::AllocationPeak const peak;
  try {
    auto const state = dcp::load_from_keys<dcp::SafeTensors>(self, place, {}, {.memory_bytes = dcp::least_memory_bytes, .storage = storage});
    result.code = "ok";
    for (auto const& [name, tensor] : state.tensors()) result.names.insert(name);
    result.warnings = state.report().warnings;
  } catch (dcp::Error const& error) {
    result.code = to_string(error.code());
    result.text = error.what();
  }
  result.peak = peak.bytes();
  return result;
}

// 100 bytes for each that is there: a header of many tiny tensors takes the most, and the library holds it twice at times.
std::size_t most_memory(Loaded const& loaded, fs::path const& place) {
  return static_cast<std::size_t>(100 * bytes_below(place)) + (256 << 10) + (loaded.code == "ok" || loaded.code == "corrupt" ? dcp::least_memory_bytes : 0);
}

void write(std::string const& path, std::string const& text) {
  fs::create_directories(fs::path{path}.parent_path());
  std::ofstream{path, std::ios::binary} << text;
}

// A file of U8 tensors of 4 bytes each.
std::string tensors(std::vector<std::string> const& names) {
  std::string json;
  std::size_t at = 0;
  for (auto const& name : names) {
    json += (json.empty() ? "{\"" : ",\"") + name + R"(":{"dtype":"U8","shape":[4],"data_offsets":[)" + std::to_string(at) + ',' + std::to_string(at + 4) + "]}";
    at += 4;
  }
  return file_with(json + '}', at);
}

std::string index_of(std::vector<std::pair<std::string, std::string>> const& map, std::string const& metadata = "{}") {
  std::string json;
  for (auto const& [tensor, file] : map) json += (json.empty() ? "\"" : ",\"") + tensor + "\":\"" + file + '"';
  return R"({"metadata":)" + metadata + R"(,"weight_map":{)" + json + "}}";
}

// A file of PyTorch's sharded layout: one F32 tensor "w", and DCP_SHARDING_INFO as it stands in the header.
std::string shard(std::string const& shape, std::size_t bytes, std::string const& info, std::string const& dtype = "F32") {
  return file_with(R"({"__metadata__":{"DCP_SHARDING_INFO":")" + info + R"("},"w":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":[0,)" + std::to_string(bytes) + "]}}", bytes);
}
std::string at(std::string const& offsets) { return R"({\"w\":{\"saved_offsets\":)" + offsets + "}}"; }

std::string const index_name = "model.safetensors.index.json", one = "model-00001-of-00002.safetensors", two = "model-00002-of-00002.safetensors";

// Two good files and their index.
void write_good(TemporaryDirectory const& directory) {
  write(directory / one, tensors({"a", "b"}));
  write(directory / two, tensors({"c"}));
  write(directory / index_name, index_of({{"a", one}, {"b", one}, {"c", two}}, R"({"total_size":12})"));
}

struct DirectoryCase {
  std::string what;
  std::function<void(TemporaryDirectory const&)> build;
  std::string expected;
  dcp::SafeTensorsOptions options = {};
};

void check(std::vector<DirectoryCase> const& cases) {
  for (auto const& one_case : cases) {
    CAPTURE(one_case.what);
    TemporaryDirectory directory;
    one_case.build(directory);
    auto const loaded = load(directory.path(), one_case.options);
    CHECK(loaded.code == one_case.expected);
    if (loaded.code != "ok") CHECK(loaded.text.find(directory.path()) != std::string::npos);   // the message says where
    if (dcp::test::counts_allocations) CHECK(loaded.peak < most_memory(loaded, directory.path()));
  }
}

}  // namespace

TEST_CASE("golden/bad: what must be refused is refused with the right code, what is odd but good loads, and memory is bounded by what is there") {
  // Where the bytes of one file tell, tests/formats has the code; the rest is decided here.
  std::map<std::string, std::string> const between_files{{"hf_missing_file", "missing_file"},      {"hf_tensor_not_in_shard", "missing_tensor"}, {"hf_tensor_in_two_files", "index_mismatch"},
                                                         {"hf_dcp_hole", "incomplete"},            {"hf_dcp_dtype_differs", "index_mismatch"},   {"hf_dcp_overlap_differs", "corrupt"},
                                                         {"hf_parent_path", "unsafe_path"},        {"hf_absolute_path", "unsafe_path"},          {"hf_backslash_path", "unsafe_path"},
                                                         {"hf_nul_path", "unsafe_path"},           {"hf_duplicate_key", "duplicate_key"},        {"hf_index_not_json", "bad_json"},
                                                         {"hf_index_no_weight_map", "bad_schema"}, {"hf_index_value_not_string", "bad_schema"},  {"hf_dcp_info_not_json", "bad_schema"},
                                                         {"hf_dcp_info_lacks_tensor", "index_mismatch"}, {"hf_dcp_offset_rank", "bad_schema"},    {"hf_dcp_offset_negative", "bad_schema"},
                                                         {"hf_dcp_offset_2_63", "overflow"}};
  std::set<std::string> const of_the_call{"unknown", "invalid_argument", "ranks_disagree", "rank_failed", "timeout", "io", "not_found", "budget"};
  int refused = 0, good = 0, damaged = 0;
  auto const cases = golden::json_of(golden::root() / "bad" / "bad.json");
  for (auto const& entry : cases["cases"]) {
    std::string const name = entry["file"];
    CAPTURE(name);
    fs::path const place = golden::root() / "bad" / name;
    REQUIRE(fs::exists(place));
    auto const loaded = load(place);
    CAPTURE(loaded.text);
    if (dcp::test::counts_allocations) CHECK(loaded.peak < most_memory(loaded, place));
    if (entry["expect"] == "error") {
      CHECK(loaded.code != "ok");
      CHECK_FALSE(of_the_call.contains(loaded.code));
      CHECK(loaded.text.find("golden/bad/" + name) != std::string::npos);
      if (between_files.contains(name)) CHECK(loaded.code == between_files.at(name));
      ++refused;
    } else if (entry["expect"] == "ok") {
      CHECK(loaded.code == "ok");
      ++good;
    } else {
      CHECK(loaded.code != "unknown");
      ++damaged;
    }
    // On two ranks the outcome is the same, on both.
    std::mutex mutex;
    std::multiset<std::string> codes;
    try {
      dcp::run_threads(2, [&](dcp::ThreadComm& world) {
        auto const code = outcome([&] { dcp::load_from_keys<dcp::SafeTensors>(world, place, {}, {.memory_bytes = dcp::least_memory_bytes}); });
        std::lock_guard const lock{mutex};
        codes.insert(code);
      });
    } catch (dcp::Error const& error) {
      FAIL_CHECK(error.what());
    }
    CHECK(codes == std::multiset<std::string>{loaded.code, loaded.code});
  }
  CHECK(refused == 68);
  CHECK(good == 8);
  CHECK(damaged == 8);
}

TEST_CASE("lenient options give up one refusal each") {
  auto const bad = golden::root() / "bad";
  CHECK(load(bad / "st_trailing_byte.safetensors", {.allow_trailing_bytes = true}).code == "ok");
  CHECK(load(bad / "st_trailing_byte.safetensors", {.allow_duplicate_names = true, .ignore_total_size = true}).code == "trailing_data");
  CHECK(load(bad / "st_duplicate_tensor.safetensors", {.allow_duplicate_names = true}).code == "ok");
  CHECK(load(bad / "st_duplicate_tensor.safetensors", {.allow_trailing_bytes = true, .ignore_total_size = true}).code == "duplicate_key");
  CHECK(load(bad / "st_hole.safetensors", {.allow_trailing_bytes = true, .allow_duplicate_names = true, .ignore_total_size = true}).code == "bad_offsets");
}

TEST_CASE("a place without a checkpoint is not_found, and a place that cannot be one is refused (I01, S88)") {
  TemporaryDirectory directory;
  CHECK(load(directory / "absent").code == "not_found");
  CHECK(load(directory.path()).code == "not_found");
  write(directory / "notes.txt", "nothing to load");
  CHECK(load(directory.path()).code == "not_found");
  ::mkfifo((directory / "pipe.safetensors").c_str(), 0600);
  CHECK(load(directory / "pipe.safetensors").code == "not_found");
  CHECK(load("/dev/zero").code == "not_found");
  fs::create_symlink(directory / "loop", directory / "loop");
  CHECK(load(directory / "loop").code == "not_found");
}

TEST_CASE("an index that is none (I02 to I05, I22 to I27, I32)") {
  auto const with_index = [](std::string const& text) {
    return [text](TemporaryDirectory const& directory) {
      write_good(directory);
      write(directory / index_name, text);
    };
  };
  auto const with_metadata = [&](std::string const& metadata) { return with_index(index_of({{"a", one}, {"b", one}, {"c", two}}, metadata)); };
  auto const good = index_of({{"a", one}, {"b", one}, {"c", two}});
  dcp::SafeTensorsOptions ignore;
  ignore.ignore_total_size = true;
  check({
      {"I02 empty", with_index(""), "bad_json"},
      {"I02 text", with_index("model-00001"), "bad_json"},
      {"I02 byte order mark", with_index("\xEF\xBB\xBF" + good), "bad_json"},
      {"I02 not UTF-8", with_index("{\"weight_map\":{\"\xFF\":\"" + one + "\"}}"), "bad_utf8"},
      {"I02 trailing garbage", with_index(good + "x"), "bad_json"},
      {"I03 array", with_index("[]"), "bad_schema"},
      {"I03 string", with_index("\"x\""), "bad_schema"},
      {"I04 no weight_map", with_index("{}"), "bad_schema"},
      {"I04 weight_map is an array", with_index(R"({"weight_map":[]})"), "bad_schema"},
      {"I04 weight_map is null", with_index(R"({"weight_map":null})"), "bad_schema"},
      {"I05 number", with_index(R"({"weight_map":{"a":1}})"), "bad_schema"},
      {"I05 null", with_index(R"({"weight_map":{"a":null}})"), "bad_schema"},
      {"I05 object", with_index(R"({"weight_map":{"a":{}}})"), "bad_schema"},
      {"I20 twice", with_index(R"({"weight_map":{"a":")" + one + R"(","a":")" + two + "\"}}"), "duplicate_key"},
      {"I32 twice, once escaped", with_index(R"({"weight_map":{"a":")" + one + R"(","\u0061":")" + two + "\"}}"), "duplicate_key"},
      {"I21 total_size wrong", with_metadata(R"({"total_size":13})"), "index_mismatch"},
      {"I21 total_size wrong, ignored", with_metadata(R"({"total_size":13})"), "ok", ignore},
      {"I22 negative", with_metadata(R"({"total_size":-1})"), "bad_schema"},
      {"I22 float", with_metadata(R"({"total_size":12.0})"), "bad_schema"},
      {"I22 float, ignored", with_metadata(R"({"total_size":12.0})"), "ok", ignore},
      {"I22 text", with_metadata(R"({"total_size":"12"})"), "bad_schema"},
      {"I22 2^64 - 1", with_metadata(R"({"total_size":18446744073709551615})"), "index_mismatch"},
      {"I22 2^64", with_metadata(R"({"total_size":18446744073709551616})"), "bad_schema"},
      {"I22 null", with_metadata(R"({"total_size":null})"), "bad_schema"},
      {"I23 metadata missing", with_index(R"({"weight_map":{"a":")" + one + R"(","b":")" + one + R"(","c":")" + two + "\"}}"), "ok"},
      {"I23 metadata null", with_metadata("null"), "ok"},
      {"I24 metadata text", with_metadata("\"x\""), "bad_schema"},
      {"I25 empty map", with_index(R"({"weight_map":{}})"), "index_mismatch"},
      {"I26 a sparse gigabyte", [&](TemporaryDirectory const& directory) { write_good(directory), fs::resize_file(directory / index_name, 1 << 30); }, "limit"},
      {"I27 deep nesting", with_index(R"({"weight_map":)" + std::string(10'000, '[')), "limit"},
      {"I27 deep nesting where it is ignored", with_index(R"({"x":)" + std::string(10'000, '[')), "limit"},
  });
}

TEST_CASE("an index names plain files beside it and nothing else (I06 to I12)") {
  std::vector<DirectoryCase> cases;
  for (std::string const name : {"", "../outside.safetensors", "a/../../outside.safetensors", "/etc/passwd", "/tmp/x.safetensors", "C:x.safetensors", "C:\\\\x.safetensors", "\\\\\\\\host\\\\share\\\\x.safetensors",
                                 "\\\\x.safetensors", "..\\\\x.safetensors", "sub/model.safetensors", "x\\u0000.safetensors", "x\\n.safetensors", "file://x.safetensors", "~/x.safetensors", "$HOME/x.safetensors",
                                 ".", "..", "model.bin", "model.safetensors.pkl", "model.SAFETENSORS"})
    cases.push_back({name, [name](TemporaryDirectory const& directory) {
                       write(directory / "sub/model.safetensors", tensors({"a"}));
                       write(directory / "model.bin", tensors({"a"}));
                       write(directory / "model.safetensors.pkl", tensors({"a"}));
                       write(directory / "model.SAFETENSORS", tensors({"a"}));
                       write(directory / index_name, index_of({{"a", name}}));
                     }, "unsafe_path"});
  check(cases);
}

TEST_CASE("links may lead to files of the checkpoint or of its Hugging Face cache, and nowhere else (I13, I14)") {
  auto const link = [](std::string const& target) {
    return [target](TemporaryDirectory const& directory) {
      write_good(directory);
      fs::remove(directory / two);
      fs::create_symlink(target, directory / two);
    };
  };
  TemporaryDirectory elsewhere;
  write(elsewhere / "c.safetensors", tensors({"c"}));
  check({
      {"I13 absolute, outside", link(elsewhere / "c.safetensors"), "unsafe_path"},
      {"I13 relative, outside", [&](TemporaryDirectory const& directory) { link(fs::relative(elsewhere / "c.safetensors", directory.path()))(directory); }, "unsafe_path"},
      {"I13 not a regular file", link("/dev/zero"), "io"},
      {"I14 loop", link(two), "io"},
      {"I16 to nothing", link("absent.safetensors"), "missing_file"},
      {"inside", [&](TemporaryDirectory const& directory) { write(directory / "blob", tensors({"c"})), link("blob")(directory); }, "ok"},
      {"the index leads outside", [&](TemporaryDirectory const& directory) {
         write_good(directory);
         fs::copy_file(directory / index_name, elsewhere / "index.json", fs::copy_options::overwrite_existing);
         fs::remove(directory / index_name);
         fs::create_symlink(elsewhere / "index.json", directory / index_name);
       }, "unsafe_path"},
  });
  TemporaryDirectory cache;
  std::string const snapshot = "models--x/snapshots/0123abcd";
  write(cache / "models--x/blobs/f00d", tensors({"c"}));
  fs::create_directories(cache / snapshot);
  fs::create_symlink("../../blobs/f00d", cache / (snapshot + "/model.safetensors"));
  CHECK(load(cache / snapshot).names == std::set<std::string>{"c"});
  CHECK(load(cache / (snapshot + "/model.safetensors")).names == std::set<std::string>{"c"});
  fs::create_directory_symlink(cache / snapshot, cache / "latest");
  CHECK(load(cache / "latest").code == "ok");
}

TEST_CASE("a shard that is no file is refused without waiting for it (I15, S88)") {
  auto const instead = [](std::function<void(std::string const&)> const& make) {
    return [make](TemporaryDirectory const& directory) {
      write_good(directory);
      fs::remove(directory / two);
      make(directory / two);
    };
  };
  auto const fifo = [](std::string const& path) { REQUIRE(::mkfifo(path.c_str(), 0600) == 0); };
  auto const folder = [](std::string const& path) { fs::create_directory(path); };
  auto const sock = [](std::string const& path) {
    int const descriptor = ::socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    REQUIRE(path.size() < sizeof address.sun_path);
    path.copy(address.sun_path, path.size());
    REQUIRE(::bind(descriptor, reinterpret_cast<sockaddr const*>(&address), sizeof address) == 0);
    ::close(descriptor);
  };
  auto const without_index = [](auto const& build) {
    return [build](TemporaryDirectory const& directory) {
      build(directory);
      fs::remove(directory / index_name);
    };
  };
  check({
      {"FIFO", instead(fifo), "io"},
      {"directory", instead(folder), "io"},
      {"socket", instead(sock), "io"},
      {"FIFO, no index", without_index(instead(fifo)), "io"},
      {"directory, no index", without_index(instead(folder)), "io"},
      {"the index is a FIFO", [&](TemporaryDirectory const& directory) { write_good(directory), fs::remove(directory / index_name), fifo(directory / index_name); }, "io"},
      {"the index is a directory", [&](TemporaryDirectory const& directory) { write_good(directory), fs::remove(directory / index_name), folder(directory / index_name); }, "io"},
  });
}

TEST_CASE("index and files must agree (I16 to I19)") {
  auto const good_but = [](std::function<void(TemporaryDirectory const&)> const& change) {
    return [change](TemporaryDirectory const& directory) {
      write_good(directory);
      change(directory);
    };
  };
  check({
      {"good", [](TemporaryDirectory const& directory) { write_good(directory); }, "ok"},
      {"I16 absent", good_but([](auto const& d) { fs::remove(d / two); }), "missing_file"},
      {"I17 listed, not held", good_but([](auto const& d) { write(d / two, tensors({"d"})), write(d / index_name, index_of({{"a", one}, {"b", one}, {"c", two}, {"d", two}})); }), "missing_tensor"},
      {"I18 held, not listed", good_but([](auto const& d) { write(d / two, tensors({"c", "d"})); }), "index_mismatch"},
      {"I19 in two files", good_but([](auto const& d) { write(d / two, tensors({"a", "c"})); }), "index_mismatch"},
      {"in the other file", good_but([](auto const& d) { write(d / index_name, index_of({{"a", one}, {"b", two}, {"c", two}})); }), "index_mismatch"},
      {"without index, in two files", good_but([](auto const& d) { write(d / two, tensors({"a"})), fs::remove(d / index_name); }), "index_mismatch"},
      {"a file is empty", good_but([](auto const& d) { write(d / two, ""); }), "truncated"},
  });
}

TEST_CASE("an index decides which files count; what it leaves out is a warning (I28, stale files)") {
  TemporaryDirectory directory;
  write_good(directory);
  write(directory / "model-00001-of-00003.safetensors", tensors({"old"}));
  auto loaded = load(directory.path());
  CHECK(loaded.names == std::set<std::string>{"a", "b", "c"});
  CHECK(loaded.warnings == std::vector<std::string>{"model-00001-of-00003.safetensors is not in the index and is left out"});
  fs::remove(directory / index_name);
  CHECK(load(directory.path()).names == std::set<std::string>{"a", "b", "c", "old"});

  // Two of three files, as their names have it.
  TemporaryDirectory partial;
  write(partial / "model-00001-of-00003.safetensors", tensors({"a"}));
  write(partial / "model-00003-of-00003.safetensors", tensors({"c"}));
  write(partial / index_name, index_of({{"a", "model-00001-of-00003.safetensors"}, {"c", "model-00003-of-00003.safetensors"}}));
  loaded = load(partial.path());
  CHECK(loaded.code == "ok");
  CHECK(loaded.warnings == std::vector<std::string>{"the index names 2 files, and their names speak of 3"});
}

TEST_CASE("a single file beside an index: the single file counts, as for transformers (I30)") {
  TemporaryDirectory directory;
  write_good(directory);
  write(directory / "model.safetensors", tensors({"whole"}));
  auto loaded = load(directory.path());
  CHECK(loaded.names == std::set<std::string>{"whole"});
  CHECK(loaded.warnings.size() == 1);
  fs::remove(directory / one);
  fs::remove(directory / two);
  loaded = load(directory.path());
  CHECK(loaded.names == std::set<std::string>{"whole"});
  CHECK(loaded.warnings.size() == 1);
  write(directory / index_name, index_of({{"whole", "model.safetensors"}}));
  loaded = load(directory.path());
  CHECK(loaded.names == std::set<std::string>{"whole"});
  CHECK(loaded.warnings.empty());
}

TEST_CASE("of several indexes the one of the usual name counts; without it there is no telling") {
  TemporaryDirectory directory;
  write_good(directory);
  write(directory / "model.fp16.safetensors", tensors({"half"}));
  write(directory / "model.safetensors.index.fp16.json", index_of({{"half", "model.fp16.safetensors"}}));
  CHECK(load(directory.path()).names == std::set<std::string>{"a", "b", "c"});
  fs::rename(directory / index_name, directory / "model.safetensors.index.fp32.json");
  CHECK(load(directory.path()).code == "index_mismatch");
  fs::remove(directory / "model.safetensors.index.fp32.json");
  CHECK(load(directory.path()).names == std::set<std::string>{"half"});
}

TEST_CASE("pieces must fit together, and what they leave open is named (I33, I34)") {
  std::string const first = "shard-00001-model-00001-of-00001.safetensors", second = "shard-00002-model-00001-of-00001.safetensors";
  auto const both = [&](std::string const& a, std::string const& b) {
    return [=](TemporaryDirectory const& directory) {
      write(directory / first, a);
      if (!b.empty()) write(directory / second, b);
    };
  };
  auto const good = shard("[2,2]", 16, at("[0,0]"));
  check({
      {"good", both(good, shard("[1,2]", 8, at("[2,0]"))), "ok"},
      {"not JSON", both(shard("[2,2]", 16, "x"), ""), "bad_schema"},
      {"an array", both(shard("[2,2]", 16, "[]"), ""), "bad_schema"},
      {"name missing", both(shard("[2,2]", 16, "{}"), ""), "index_mismatch"},
      {"too few offsets", both(shard("[2,2]", 16, at("[0]")), ""), "bad_schema"},
      {"too many offsets", both(shard("[2,2]", 16, at("[0,0,0]")), ""), "bad_schema"},
      {"negative", both(shard("[2,2]", 16, at("[-1,0]")), ""), "bad_schema"},
      {"float", both(shard("[2,2]", 16, at("[0.0,0]")), ""), "bad_schema"},
      {"text", both(shard("[2,2]", 16, at("[\\\"0\\\",0]")), ""), "bad_schema"},
      {"overlap with equal bytes", both(good, shard("[2,2]", 16, at("[1,0]"))), "ok"},
      {"hole", both(good, shard("[2,2]", 16, at("[3,0]"))), "incomplete"},
      {"begins late", both(shard("[2,2]", 16, at("[1,0]")), ""), "incomplete"},
      {"corner missing", both(good, shard("[1,3]", 12, at("[2,0]"))), "incomplete"},
      {"another rank", both(good, shard("[4]", 16, at("[2]"))), "index_mismatch"},
      {"another dtype", both(good, shard("[2,2]", 16, at("[2,0]"), "I32")), "index_mismatch"},
      {"2^63", both(shard("[2,2]", 16, at("[9223372036854775808,0]")), ""), "overflow"},
      {"2^63 - 1", both(good, shard("[2,2]", 16, at("[9223372036854775807,0]"))), "overflow"},
      {"a hole of 2^62 rows", both(good, shard("[2,2]", 16, at("[4611686018427387904,0]"))), "overflow"},
      {"a hole of 2^40 rows", both(good, shard("[2,2]", 16, at("[1099511627776,0]"))), "incomplete"},
      {"an empty piece far away", both(good, shard("[0,2]", 0, at("[1099511627776,0]"))), "incomplete"},
      {"an empty piece at the end", both(good, shard("[0,2]", 0, at("[2,0]"))), "ok"},
      {"a whole tensor beside a piece", both(good, file_with(R"({"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})", 16)), "ok"},
  });
}

TEST_CASE("a file that shrinks or is replaced while it is read is an error, not a crash and not a mixture (S87, I31)") {
  using Faulty = dcp::test::FaultMedium<dcp::LocalFs>;
  TemporaryDirectory directory;
  std::string const file = directory / "model.safetensors";
  auto const load_with = [&](dcp::test::FaultRule rule) {
    write(file, tensors({"a", "b"}));
    Faulty medium{dcp::LocalFs{}};
    medium.add(std::move(rule));
    dcp::SelfComm self;
    return outcome([&] {
      dcp::load_from_keys<dcp::BasicSafeTensors<Faulty>>(self, {medium, directory.path()});
      if (medium.hits() == 0) throw dcp::Error{dcp::ErrorCode::unknown, "the rule did not act"};
    });
  };
  auto const shrink = [&](dcp::test::Call, std::string const&) { fs::resize_file(file, 20); };
  // Headers are read when the place is opened, data after the last opening of the file.
  std::uint64_t reads = 0, opens = 0;
  auto const count_in = [](std::uint64_t& count) { return [&count](dcp::test::Call, std::string const&) { ++count; }; };
  load_with({.call = dcp::test::Call::read, .path = "model.safetensors", .times = dcp::test::forever, .hook = count_in(reads)});
  load_with({.call = dcp::test::Call::open_read, .path = "model.safetensors", .times = dcp::test::forever, .hook = count_in(opens)});
  REQUIRE(reads >= 3);
  REQUIRE(opens >= 2);
  for (std::uint64_t nth = 1; nth <= reads; ++nth) {
    CAPTURE(nth);
    CHECK(load_with({.call = dcp::test::Call::read, .path = "model.safetensors", .nth = nth, .hook = shrink}) == "truncated");
  }
  CHECK(load_with({.call = dcp::test::Call::open_read, .path = "model.safetensors", .nth = opens, .hook = shrink}) == "corrupt");
  auto const replace = [&](dcp::test::Call, std::string const&) {
    write(directory / "new", tensors({"a", "c"}));
    fs::last_write_time(directory / "new", fs::last_write_time(file) + std::chrono::milliseconds{10});
    fs::rename(directory / "new", file);
  };
  CHECK(load_with({.call = dcp::test::Call::open_read, .path = "model.safetensors", .nth = opens, .hook = replace}) == "io");
}

TEST_CASE("a file that ties many names to one tensor does not make many tensors") {
  TemporaryDirectory directory;
  std::string metadata;
  int const names = 20'000;
  for (int i = 0; i < names; ++i) metadata += (i > 0 ? ",\"n" : "\"n") + std::to_string(i) + R"(":"w")";
  write(directory / "model.safetensors", file_with(R"({"__metadata__":{)" + metadata + R"(},"w":{"dtype":"U8","shape":[1000000],"data_offsets":[0,1000000]}})", 1'000'000));
  auto const loaded = load(directory.path());
  CHECK(loaded.code == "ok");
  CHECK(loaded.names.size() == names + 1);
  if (dcp::test::counts_allocations) CHECK(loaded.peak < most_memory(loaded, directory.path()));

  dcp::SelfComm self;
  auto some = dcp::load_from_keys<dcp::SafeTensors>(self, directory.path(), {"n1", "n2"});
  CHECK(some.tensors().size() == 2);
  CHECK(some.tensors().at("n1").bytes().data() == some.tensors().at("n2").bytes().data());
}

TEST_CASE("{\"format\": \"pt\"} is no tie, even where a tensor is called pt") {
  TemporaryDirectory directory;
  write(directory / "model.safetensors", file_with(R"({"__metadata__":{"format":"pt"},"pt":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4));
  CHECK(load(directory.path()).names == std::set<std::string>{"pt"});
}
