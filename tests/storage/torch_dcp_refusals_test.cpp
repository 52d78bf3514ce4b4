// SPDX-License-Identifier: Apache-2.0
// Checkpoints of torch.distributed.checkpoint that are broken or hostile: a clear Error that says where, on every rank, and no more memory than is there.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include "formats/golden.hpp"
#include "support/allocation_counts.hpp"
#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/python_values.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <functional>
#include <map>
#include <mutex>
#include <set>

namespace fs = std::filesystem;
using dcp::test::TemporaryDirectory;
using V = dcp::test::PythonValue;
using Kind = V::Kind;

namespace {

struct Loaded {
  std::string code;   // or "ok"
  std::string text;   // of the error
  std::map<std::string, std::string> content;
  std::size_t peak = 0;
};

Loaded load(fs::path const& place, dcp::TorchDcpOptions const& storage = {}) {
  Loaded result;
  dcp::SelfComm self;
  dcp::test::AllocationPeak const peak;
  try {
    auto const state = dcp::load_from_keys<dcp::TorchDcp>(self, place, {}, {.memory_bytes = dcp::least_memory_bytes, .storage = storage});
    result.code = "ok";
    for (auto const& [name, tensor] : state.tensors()) result.content[name] = std::string{to_string(tensor.dtype())} + to_string(tensor.shape()) + dcp::hex_text(tensor.bytes());
    for (auto const& [name, value] : state.values()) result.content[name] = std::string{to_string(value.kind)} + ' ' + to_json(value);
  } catch (dcp::Error const& error) {
    result.code = to_string(error.code());
    result.text = error.what();
  }
  result.peak = peak.bytes();
  return result;
}
std::set<std::string> const of_the_call{"unknown", "invalid_argument", "ranks_disagree", "rank_failed", "timeout", "budget"};

// Of a directory of a few KiB.
constexpr std::size_t most_memory = (3 << 20) + dcp::least_memory_bytes;

// On two ranks the outcome is the same, on both.
void check_on_two_ranks(fs::path const& place, std::string const& code) {
  std::mutex mutex;
  std::multiset<std::string> codes;
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    auto const outcome = golden::outcome([&] { dcp::load_from_keys<dcp::TorchDcp>(world, place, {}, {.memory_bytes = dcp::least_memory_bytes}); });
    std::lock_guard const lock{mutex};
    codes.insert(outcome);
  });
  CHECK(codes == std::multiset<std::string>{code, code});
}

void write(std::string const& path, dcp::ConstByteSpan bytes) {
  fs::create_directories(fs::path{path}.parent_path());
  std::ofstream out{path, std::ios::binary};
  out << dcp::as_text(bytes);
  REQUIRE(out.flush().good());
}

// ---- archives

struct Record {
  std::string name;
  dcp::Bytes bytes;
};
dcp::Bytes bytes_of(std::string const& text) {
  auto const span = dcp::as_byte_span(text);
  return {span.begin(), span.end()};
}
std::vector<Record> records_of(V const& pickle, dcp::Bytes const& storage = {}) {
  std::vector<Record> records{{"archive/data.pkl", pickle.pickled()}, {"archive/byteorder", bytes_of("little")}};
  if (!storage.empty()) records.push_back({"archive/data/0", storage});
  records.push_back({"archive/version", bytes_of("3\n")});
  return records;
}
dcp::Bytes archive_of(std::vector<Record> const& records) {
  std::vector<dcp::zip::Record> list;
  for (auto const& record : records) list.push_back({record.name, record.bytes});
  return dcp::zip::write(list);
}
V storage_of(std::string const& name = "FloatStorage", std::int64_t count = 12) {
  return V::persistent(V::tuple({V::of_text("storage"), V::global("torch", name), V::of_text("0"), V::of_text("cpu"), V::number(count)}));
}
// A tensor F32 [2, 6] that is all of its storage.
V tensor_of() {
  return V::call("torch._utils", "_rebuild_tensor_v2",
                 {storage_of(), V::number(0), V::tuple({V::number(2), V::number(6)}), V::tuple({V::number(6), V::number(1)}), V::boolean(false), V::call("collections", "OrderedDict")});
}
dcp::Bytes floats(int begin, int count) {
  dcp::Bytes bytes;
  for (int i = 0; i < count; ++i) {
    auto const x = static_cast<float>(begin + i);
    auto const span = std::as_bytes(std::span{&x, 1});
    bytes.insert(bytes.end(), span.begin(), span.end());
  }
  return bytes;
}
dcp::Bytes const upper_rows = archive_of(records_of(tensor_of(), floats(0, 12))), lower_rows = archive_of(records_of(tensor_of(), floats(12, 12))), number_three = archive_of(records_of(V::number(3)));

// ---- .metadata

std::string const module = "torch.distributed.checkpoint.metadata", files_module = "torch.distributed.checkpoint.filesystem";
V size_of(std::vector<std::int64_t> const& sizes) {
  std::vector<V> parts;
  for (auto const size : sizes) parts.push_back(V::number(size));
  return V::call("torch", "Size", {V::tuple(std::move(parts))});
}
V index_of(std::string const& name, std::vector<std::int64_t> const* offset = nullptr) {
  V state = V::dict({{"fqn", V::of_text(name)}, {"index", V::none()}});
  if (offset != nullptr) state.parts.push_back(V::of_text("offset")), state.parts.push_back(size_of(*offset));
  return V::made(module, "MetadataIndex", {state});
}
V place_of(std::string const& path, std::int64_t offset, std::size_t length) {
  return V::made(files_module, "_StorageInfo", {V::dict({{"relative_path", V::of_text(path)}, {"offset", V::number(offset)}, {"length", V::number(static_cast<std::int64_t>(length))}})});
}
V chunk_of(std::vector<std::int64_t> const& offsets, std::vector<std::int64_t> const& sizes) {
  return V::made(module, "ChunkStorageMetadata", {V::dict({{"offsets", size_of(offsets)}, {"sizes", size_of(sizes)}})});
}
V properties() {
  return V::made(module, "TensorProperties", {V::tuple({V::global("torch", "float32"), V::call("torch.serialization", "_get_layout", {V::of_text("torch.strided")}), V::boolean(false), V::call(module, "_MEM_FORMAT_ENCODING", {V::number(0)}), V::boolean(false)})});
}
V tensor_metadata(std::vector<std::int64_t> const& size, std::vector<V> chunks) {
  return V::made(module, "TensorStorageMetadata", {V::dict({{"properties", properties()}, {"size", size_of(size)}, {"chunks", V::list(std::move(chunks))}})});
}

// A tensor w F32 [4, 6], its rows in two files, and an object n behind the rows of the first.
std::vector<std::int64_t> const upper{0, 0}, lower{2, 0};
V good_metadata() {
  V places{.kind = Kind::dict};
  places.parts = {index_of("n"), place_of("__0_0.distcp", static_cast<std::int64_t>(upper_rows.size()), number_three.size()), index_of("w", &upper), place_of("__0_0.distcp", 0, upper_rows.size()),
                  index_of("w", &lower), place_of("__1_0.distcp", 0, lower_rows.size())};
  return V::made(module, "Metadata",
                 {V::dict({{"state_dict_metadata", V::dict({{"n", V::made(module, "BytesStorageMetadata")}, {"w", tensor_metadata({4, 6}, {chunk_of(upper, {2, 6}), chunk_of(lower, {2, 6})})}})},
                           {"planner_data", V::dict({{"n", V::tuple({V::of_text("n")})}, {"w", V::tuple({V::of_text("w")})}})},
                           {"storage_data", places},
                           {"storage_meta", V::made(module, "StorageMeta", {V::dict({{"checkpoint_id", V::of_text("x")}, {"modules", V::list()}})})},
                           {"version", V::of_text("1.0.0")}})});
}

struct Checkpoint {
  V metadata = good_metadata();
  std::map<std::string, dcp::Bytes> files{{"__0_0.distcp", joined(upper_rows, number_three)}, {"__1_0.distcp", lower_rows}};

  static dcp::Bytes joined(dcp::Bytes first, dcp::Bytes const& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
  }
  V& tensor() { return metadata["state_dict_metadata"]["w"]; }
  V& chunk(std::size_t i) { return tensor()["chunks"].parts.at(i); }
  V& place(std::size_t i) { return metadata["storage_data"].parts.at(2 * i + 1); }   // 0: of n, 1: of the upper rows, 2: of the lower
  V& index(std::size_t i) { return metadata["storage_data"].parts.at(2 * i); }
  /// Another archive in the place of the lower rows.
  void lower_is(dcp::Bytes const& archive) {
    files["__1_0.distcp"] = archive;
    place(2)["length"] = V::number(static_cast<std::int64_t>(archive.size()));
  }
  /// Another archive in the place of n.
  void object_is(dcp::Bytes const& archive) {
    files["__0_0.distcp"] = joined(upper_rows, archive);
    place(0)["length"] = V::number(static_cast<std::int64_t>(archive.size()));
  }
  void write_to(TemporaryDirectory const& directory) const {
    write(directory / ".metadata", metadata.pickled());
    for (auto const& [name, bytes] : files) write(directory / name, bytes);
  }
};

struct Case {
  std::string what;
  std::function<void(Checkpoint&)> change;
  std::string code;
  std::string said;   // in the message
  dcp::TorchDcpOptions options = {};
  std::size_t memory = most_memory;
};
void check(std::vector<Case> const& cases) {
  for (auto const& one : cases) {
    CAPTURE(one.what);
    TemporaryDirectory directory;
    Checkpoint checkpoint;
    one.change(checkpoint);
    checkpoint.write_to(directory);
    auto const loaded = load(directory.path(), one.options);
    CAPTURE(loaded.text);
    CHECK(loaded.code == one.code);
    CHECK(loaded.text.find(one.said) != std::string::npos);
    if (loaded.code != "ok") CHECK(loaded.text.find(directory.path()) != std::string::npos);   // the message says where
    if (dcp::test::counts_allocations) CHECK(loaded.peak < one.memory);
  }
}

// Whether what lies there is looked at when a checkpoint is loaded.
bool matters(std::string const& where) {
  for (char const* const free : {".planner_data", ".storage_meta", ".index", ".version"})
    if (where.find(free) != std::string::npos) return false;
  if (auto const at = where.find(".properties["); at != std::string::npos) return where.substr(at + 11) == "[0]";
  return true;
}
std::vector<V> const others{V::none(), V::boolean(true), V::number(-1), V::number(std::int64_t{1} << 40), V::number(INT64_MAX), V::of_real(1.5), V::of_text("no such"), V::list(), V::tuple(), V::dict(), V::global("torch", "int8"), V::call("torch", "Size", {V::tuple()}), V::made(module, "StorageMeta")};

}  // namespace

TEST_CASE("golden/bad_torch: what must be refused is refused with a fitting code that says where, damage does no harm, and memory is bounded by what is there") {
  std::map<std::string, std::string> const codes{
      {"dcp_pickle_reduce_print", "unsupported"}, {"dcp_pickle_reduce_print_p2", "unsupported"}, {"dcp_pickle_only_print", "unsupported"}, {"dcp_pickle_stack_global", "unsupported"}, {"dcp_pickle_inst", "unsupported"},
      {"dcp_pickle_obj", "unsupported"}, {"dcp_pickle_dotted", "unsupported"}, {"dcp_blob_reduce_print", "unsupported"}, {"dcp_metadata_empty", "truncated"}, {"dcp_metadata_truncated", "truncated"},
      {"dcp_metadata_no_stop", "truncated"}, {"dcp_metadata_missing", "not_found"}, {"dcp_data_truncated", "truncated"}, {"dcp_data_empty", "truncated"}, {"dcp_path_parent", "unsafe_path"}, {"dcp_path_absolute", "unsafe_path"},
      {"dcp_offset_past_end", "truncated"}, {"dcp_offset_negative", "bad_schema"}, {"dcp_chunk_out_of_bounds", "index_mismatch"}, {"dcp_chunk_hole", "incomplete"}, {"dcp_chunk_rank", "index_mismatch"},
      {"dcp_chunk_negative", "bad_schema"}, {"dcp_blob_shape_differs", "index_mismatch"}, {"dcp_blob_dtype_differs", "index_mismatch"}, {"dcp_no_storage_entry", "incomplete"}, {"dcp_metadata_wrong_type", "bad_schema"},
      {"dcp_crc_flip", "corrupt"}, {"dcp_storage_too_short", "corrupt"}};
  int refused = 0, good = 0, damaged = 0;
  auto const cases = golden::json_of(golden::root() / "bad_torch" / "bad.json");
  for (auto const& entry : cases["cases"]) {
    std::string const name = entry["file"];
    CAPTURE(name);
    if (entry["kind"] != "torch_dcp") continue;
    fs::path const place = golden::root() / "bad_torch" / name;
    REQUIRE(fs::exists(place));
    auto const loaded = load(place);
    CAPTURE(loaded.text);
    if (dcp::test::counts_allocations) CHECK(loaded.peak < most_memory);
    if (entry["expect"] == "error") {
      CHECK(loaded.code != "ok");
      CHECK(!of_the_call.contains(loaded.code));
      CHECK(loaded.text.find("bad_torch/" + name) != std::string::npos);
      if (codes.contains(name)) CHECK(loaded.code == codes.at(name));
      ++refused;
    } else if (entry["expect"] == "ok") {
      CHECK(loaded.code == "ok");
      ++good;
    } else {
      CHECK(!of_the_call.contains(loaded.code));
      ++damaged;
    }
    check_on_two_ranks(place, loaded.code);
  }
  CHECK(refused == 32);
  CHECK(good == 1);
  CHECK(damaged == 4);
}

TEST_CASE("the checkpoint that all others here are made from loads") {
  TemporaryDirectory directory;
  Checkpoint{}.write_to(directory);
  auto const loaded = load(directory.path());
  CAPTURE(loaded.text);
  CHECK(loaded.code == "ok");
  CHECK(loaded.content == std::map<std::string, std::string>{{"n", "number 3"}, {"w", "F32[4, 6]" + dcp::hex_text(floats(0, 24))}});
  check_on_two_ranks(directory.path(), "ok");
}

TEST_CASE("law: .metadata with anything else in any one place is refused with a code of the file, or the place says nothing of the content, which is then whole") {
  TemporaryDirectory directory;
  Checkpoint checkpoint;
  checkpoint.write_to(directory);
  auto const good = load(directory.path()).content;
  int places = 0, refused = 0, whole = 0;
  checkpoint.metadata.each([&](V& value, std::string const& where) {
    ++places;
    V const before = value;
    for (V const& other : others) {
      if (other.kind == before.kind && other.kind != Kind::integer && other.kind != Kind::text && other.kind != Kind::global) continue;
      value = other;
      write(directory / ".metadata", checkpoint.metadata.pickled());
      auto const loaded = load(directory.path());
      CAPTURE(where);
      CAPTURE(dcp::hex_text(other.pickled()));
      CAPTURE(loaded.text);
      if (dcp::test::counts_allocations) CHECK(loaded.peak < most_memory);
      if (loaded.code == "ok") {
        CHECK_FALSE(matters(where));
        CHECK(loaded.content == good);
        ++whole;
      } else {
        CHECK(!of_the_call.contains(loaded.code));
        CHECK(loaded.code != "io");
        CHECK(loaded.text.find(directory.path()) != std::string::npos);
        ++refused;
      }
    }
    value = before;
  });
  CHECK(places > 120);
  CHECK(refused > 900);
  CHECK(whole > 300);
}

TEST_CASE("law: .metadata that lacks any one field is refused, unless it is one that says nothing of the content") {
  TemporaryDirectory directory;
  Checkpoint checkpoint;
  checkpoint.write_to(directory);
  auto const good = load(directory.path()).content;
  int refused = 0, whole = 0;
  checkpoint.metadata.each([&](V& value, std::string const& where) {
    if (value.kind != Kind::dict || where == ".state_dict_metadata") return;   // without an entry it is a smaller checkpoint
    for (std::size_t i = 0; i + 1 < value.parts.size(); i += 2) {
      V const before = value;
      std::string const key = value.parts[i].kind == Kind::text ? "." + value.parts[i].text : ".0";
      value.parts.erase(value.parts.begin() + static_cast<std::ptrdiff_t>(i), value.parts.begin() + static_cast<std::ptrdiff_t>(i) + 2);
      write(directory / ".metadata", checkpoint.metadata.pickled());
      auto const loaded = load(directory.path());
      value = before;
      CAPTURE(where);
      CAPTURE(key);
      CAPTURE(loaded.text);
      if (loaded.code == "ok") {
        CHECK_FALSE(matters(where + key));
        CHECK(loaded.content == good);
        ++whole;
      } else {
        CHECK((loaded.code == "bad_schema" || loaded.code == "incomplete"));
        ++refused;
      }
    }
  });
  CHECK(refused >= 20);
  CHECK(whole >= 8);
}

TEST_CASE("law: .metadata that names any other class, anywhere, is refused, and the message names the class") {
  TemporaryDirectory directory;
  Checkpoint checkpoint;
  checkpoint.write_to(directory);
  int classes = 0;
  checkpoint.metadata.each([&](V& value, std::string const&) {
    if (value.kind != Kind::made && value.kind != Kind::call && value.kind != Kind::global) return;
    V const before = value;
    for (auto const& [other_module, name] : std::vector<std::pair<std::string, std::string>>{{"builtins", "eval"}, {"os", "system"}, {module, "Metadat"}, {"torch.distributed.checkpoint", before.name}, {"torch.hub", "load"}, {"pickle", "loads"}, {"builtins", "getattr.__call__"}}) {
      value.text = other_module, value.name = name;
      write(directory / ".metadata", checkpoint.metadata.pickled());
      auto const loaded = load(directory.path());
      CAPTURE(loaded.text);
      CHECK(loaded.code == "unsupported");
      CHECK(loaded.text.find(name) != std::string::npos);
      CHECK(loaded.text.find(other_module) != std::string::npos);
      CHECK(loaded.text.find("/.metadata") != std::string::npos);
      ++classes;
    }
    value = before;
  });
  CHECK(classes > 150);
}

TEST_CASE(".metadata that contradicts itself or the files is refused with the code of what is wrong") {
  auto const size = [](V& of, std::vector<std::int64_t> const& sizes) { of = size_of(sizes); };
  check({
      {"version 2", [](Checkpoint& c) { c.metadata["version"] = V::of_text("2.0.0"); }, "bad_version", "2.0.0"},
      {"version of text", [](Checkpoint& c) { c.metadata["version"] = V::of_text("latest"); }, "bad_version", "latest"},
      {"version of a later minor", [](Checkpoint& c) { c.metadata["version"] = V::of_text("1.7.3"); }, "ok", ""},
      {"no version", [](Checkpoint& c) { c.metadata.remove("version"); }, "ok", ""},
      {"no storage_meta", [](Checkpoint& c) { c.metadata.remove("storage_meta"); }, "ok", ""},
      {"planner_data is None", [](Checkpoint& c) { c.metadata["planner_data"] = V::none(); }, "ok", ""},
      {"not a Metadata", [](Checkpoint& c) { c.metadata = V::dict(); }, "bad_schema", "Metadata"},
      {"a negative size", [&](Checkpoint& c) { size(c.tensor()["size"], {-4, 6}); }, "bad_schema", "w: "},
      {"a negative chunk size", [&](Checkpoint& c) { size(c.chunk(0)["sizes"], {2, -6}); }, "bad_schema", "w: "},
      {"a negative chunk offset", [&](Checkpoint& c) { size(c.chunk(0)["offsets"], {-1, 0}); }, "bad_schema", "w: "},
      {"the tensor is larger than its chunks", [&](Checkpoint& c) { size(c.tensor()["size"], {5, 6}); }, "incomplete", "w"},
      {"the tensor is smaller than its chunks", [&](Checkpoint& c) { size(c.tensor()["size"], {3, 6}); }, "index_mismatch", "w: a chunk of [2, 6] at [2, 0] is no part of [3, 6]"},
      {"2^62 rows", [&](Checkpoint& c) { size(c.tensor()["size"], {std::int64_t{1} << 62, 6}); }, "incomplete", "w"},
      {"2^63 - 1 rows", [&](Checkpoint& c) { size(c.tensor()["size"], {INT64_MAX, INT64_MAX}); }, "incomplete", "w"},
      {"another rank", [&](Checkpoint& c) { size(c.tensor()["size"], {4, 6, 1}); }, "index_mismatch", "w"},
      {"seventeen dimensions", [&](Checkpoint& c) { size(c.tensor()["size"], std::vector<std::int64_t>(17, 1)); }, "unsupported", "17 dimensions"},
      {"a hole", [](Checkpoint& c) { c.tensor()["chunks"].parts.pop_back(); }, "incomplete", "w"},
      {"no chunks", [](Checkpoint& c) { c.tensor()["chunks"] = V::list(); }, "incomplete", "w"},
      {"one chunk twice instead of both", [](Checkpoint& c) { c.chunk(1) = c.chunk(0); }, "incomplete", "w"},
      {"chunks that overlap by an offset", [&](Checkpoint& c) { size(c.chunk(1)["offsets"], {1, 0}), size(c.index(2)["offset"], {1, 0}); }, "incomplete", "w"},
      {"a chunk beyond the end", [&](Checkpoint& c) { size(c.chunk(1)["offsets"], {3, 0}); }, "index_mismatch", "w"},
      {"a chunk at 2^62", [&](Checkpoint& c) { size(c.chunk(1)["offsets"], {std::int64_t{1} << 62, 0}); }, "index_mismatch", "w"},
      {"a chunk that the storage does not know", [&](Checkpoint& c) { size(c.index(2)["offset"], {2, 1}); }, "incomplete", "[2, 0]"},
      {"an object that the storage does not know", [](Checkpoint& c) { c.index(0)["fqn"] = V::of_text("m"); }, "incomplete", "n: "},
      {"an object in the place of a tensor", [](Checkpoint& c) { c.metadata["state_dict_metadata"]["w"] = V::made(module, "BytesStorageMetadata"); }, "incomplete", "w: "},
      {"a tensor in the place of an object", [](Checkpoint& c) { c.metadata["state_dict_metadata"]["n"] = tensor_metadata({}, {chunk_of({}, {})}); }, "incomplete", "n: "},
      {"another dtype than that of the archives", [](Checkpoint& c) { c.tensor()["properties"].parts[0].parts[0] = V::global("torch", "int8"); }, "index_mismatch", "w"},
      {"a sparse layout", [](Checkpoint& c) { c.tensor()["properties"].parts[0].parts[1].parts[0] = V::of_text("torch.sparse_coo"); }, "unsupported", "torch.sparse_coo"},
      {"pairs of F4 without a dimension", [&](Checkpoint& c) { c.tensor()["properties"].parts[0].parts[0] = V::global("torch", "float4_e2m1fn_x2"), size(c.tensor()["size"], {}); }, "unsupported", "w: "},
      {"2^63 - 1 pairs", [&](Checkpoint& c) { c.tensor()["properties"].parts[0].parts[0] = V::global("torch", "float4_e2m1fn_x2"), size(c.tensor()["size"], {4, INT64_MAX}); }, "unsupported", "w: "},
      {"the offset is negative", [](Checkpoint& c) { c.place(1)["offset"] = V::number(-1); }, "bad_schema", "w: "},
      {"the offset is 2^62", [](Checkpoint& c) { c.place(1)["offset"] = V::number(std::int64_t{1} << 62); }, "truncated", "w: "},
      {"offset and length together wrap", [](Checkpoint& c) { c.place(1)["offset"] = V::number(INT64_MAX), c.place(1)["length"] = V::number(INT64_MAX); }, "truncated", "w: "},
      {"the length is negative", [](Checkpoint& c) { c.place(2)["length"] = V::number(-5); }, "bad_schema", "w: "},
      {"the length ends behind the file", [](Checkpoint& c) { c.place(2)["length"] = V::number(static_cast<std::int64_t>(lower_rows.size()) + 1); }, "truncated", "w: "},
      {"the length of an object ends behind the file", [](Checkpoint& c) { c.place(0)["length"] = V::number(static_cast<std::int64_t>(number_three.size()) + 1); }, "truncated", "n: "},
      {"the length of an object is 2^40", [](Checkpoint& c) { c.place(0)["length"] = V::number(std::int64_t{1} << 40); }, "truncated", "n: "},
      {"a float for an offset", [](Checkpoint& c) { c.place(2)["offset"] = V::of_real(0); }, "bad_schema", "w: "},
      {"True for an offset", [](Checkpoint& c) { c.place(2)["offset"] = V::boolean(false); }, "bad_schema", "w: "},
      {"a file that is not there", [](Checkpoint& c) { c.place(2)["relative_path"] = V::of_text("__7_0.distcp"); }, "missing_file", "__7_0.distcp"},
      {"a file that is gone", [](Checkpoint& c) { c.files.erase("__1_0.distcp"); }, "missing_file", "__1_0.distcp"},
      {"a file of another rank's content", [](Checkpoint& c) { c.files["__1_0.distcp"] = c.files["__0_0.distcp"]; }, "ok", ""},
      {"a name that is no text", [](Checkpoint& c) { c.metadata["state_dict_metadata"].parts[0] = V::number(1); }, "bad_schema", ""},
      {"a transform that nobody knows", [](Checkpoint& c) { c.place(2).parts[0].parts.push_back(V::of_text("transform_descriptors")), c.place(2).parts[0].parts.push_back(V::list({V::of_text("rot13@example.com/1")})); }, "unsupported", "rot13@example.com/1"},
      {"a later version of zstd's", [](Checkpoint& c) { c.place(2).parts[0].parts.push_back(V::of_text("transform_descriptors")), c.place(2).parts[0].parts.push_back(V::list({V::of_text("stream.zstd/2")})); }, "unsupported", "stream.zstd/2"},
      {"an object through a transform that nobody knows", [](Checkpoint& c) { c.place(0).parts[0].parts.push_back(V::of_text("transform_descriptors")), c.place(0).parts[0].parts.push_back(V::list({V::of_text("x/1")})); }, "unsupported", "x/1"},
      {"transforms that are no list", [](Checkpoint& c) { c.place(2).parts[0].parts.push_back(V::of_text("transform_descriptors")), c.place(2).parts[0].parts.push_back(V::number(1)); }, "bad_schema", "w: "},
      {"no transforms", [](Checkpoint& c) { c.place(2).parts[0].parts.push_back(V::of_text("transform_descriptors")), c.place(2).parts[0].parts.push_back(V::list()); }, "ok", ""},
  });
}

TEST_CASE(".metadata names files inside the checkpoint and nothing else") {
  std::vector<Case> cases;
  for (std::string const path : {"", "..", ".", "../__1_0.distcp", "a/../../b", "a/..", "/etc/passwd", "/tmp/__1_0.distcp", "./__1_0.distcp", "a//b", "a/", "__1_0.distcp\\", "..\\__1_0.distcp", "C:\\x.distcp"})
    cases.push_back({path, [path](Checkpoint& c) { c.place(2)["relative_path"] = V::of_text(path); }, "unsafe_path", "stay inside"});
  cases.push_back({"a NUL", [](Checkpoint& c) { c.place(2)["relative_path"] = V::of_text(std::string{"__1_0.distcp\0x", 14}); }, "unsafe_path", "stay inside"});
  cases.push_back({"of an object", [](Checkpoint& c) { c.place(0)["relative_path"] = V::of_text("../n"); }, "unsafe_path", "stay inside"});
  cases.push_back({"a directory of its own", [](Checkpoint& c) { c.place(2)["relative_path"] = V::of_text("rank1/a.distcp"), c.files["rank1/a.distcp"] = c.files["__1_0.distcp"]; }, "ok", ""});
  check(cases);

  // A symbolic link is the file that it leads to, as long as that is in the checkpoint.
  TemporaryDirectory directory, elsewhere;
  Checkpoint{}.write_to(directory);
  fs::rename(directory / "__1_0.distcp", directory / "data");
  fs::create_symlink("data", directory / "__1_0.distcp");
  CHECK(load(directory.path()).code == "ok");
  fs::remove(directory / "__1_0.distcp");
  fs::rename(directory / "data", elsewhere / "data");
  fs::create_symlink(elsewhere / "data", directory / "__1_0.distcp");
  CHECK(load(directory.path()).code == "unsafe_path");
}

TEST_CASE("a place without .metadata is no checkpoint, and one of ranks that wrote their own is one only when all are there") {
  TemporaryDirectory directory;
  CHECK(load(directory / "absent").code == "not_found");
  CHECK(load(directory.path()).code == "not_found");
  Checkpoint checkpoint;
  checkpoint.write_to(directory);
  CHECK(load(directory / "__0_0.distcp").text.find("TorchFile") != std::string::npos);
  fs::rename(directory / ".metadata", directory / ".metadata.tmp");
  auto const unfinished = load(directory.path());
  CHECK(unfinished.code == "not_found");
  CHECK(unfinished.text.find("this save did not end") != std::string::npos);

  // Each rank for itself: rank 0 has the upper rows and n, rank 1 the lower ones.
  checkpoint.metadata["state_dict_metadata"]["w"]["chunks"].parts.pop_back();
  write(directory / "__0.metadata", checkpoint.metadata.pickled());
  CHECK(load(directory.path()).code == "incomplete");
  Checkpoint other;
  other.metadata["state_dict_metadata"].remove("n");
  other.tensor()["chunks"].parts.erase(other.tensor()["chunks"].parts.begin());
  write(directory / "__1.metadata", other.metadata.pickled());
  auto const whole = load(directory.path());
  CHECK(whole.code == "ok");
  CHECK(whole.content.at("w") == "F32[4, 6]" + dcp::hex_text(floats(0, 24)));
  check_on_two_ranks(directory.path(), "ok");
  fs::rename(directory / "__0.metadata", directory / "__2.metadata");
  auto const missing = load(directory.path());
  CHECK(missing.code == "missing_file");
  CHECK(missing.text.find("rank 0") != std::string::npos);
  fs::rename(directory / "__2.metadata", directory / "__0.metadata");
  other.tensor()["size"] = size_of({5, 6});
  write(directory / "__1.metadata", other.metadata.pickled());
  CHECK(load(directory.path()).code == "index_mismatch");
}

TEST_CASE("law: the pickle of a tensor with anything else in any one place is refused, or the place says nothing of the content") {
  TemporaryDirectory directory;
  Checkpoint checkpoint;
  checkpoint.write_to(directory);
  auto const good = load(directory.path()).content;
  int refused = 0, whole = 0;
  V tensor = tensor_of();
  tensor.each([&](V& value, std::string const& where) {
    V const before = value;
    // requires_grad, the hooks, where the memory was
    bool const counts = !where.starts_with("[4]") && !where.starts_with("[5]") && where != "[0][0][3]";
    for (V const& other : others) {
      if (other.kind == before.kind && other.kind != Kind::integer && other.kind != Kind::text) continue;
      value = other;
      checkpoint.lower_is(archive_of(records_of(tensor, floats(12, 12))));
      checkpoint.write_to(directory);
      auto const loaded = load(directory.path());
      CAPTURE(where);
      CAPTURE(loaded.text);
      if (dcp::test::counts_allocations) CHECK(loaded.peak < most_memory);
      if (loaded.code == "ok") {
        CHECK_FALSE(counts);
        CHECK(loaded.content == good);
        ++whole;
      } else {
        CHECK(!of_the_call.contains(loaded.code));
        CHECK(loaded.text.find("w: ") != std::string::npos);
        CHECK(loaded.text.find("__1_0.distcp") != std::string::npos);
        ++refused;
      }
    }
    value = before;
  });
  CHECK(refused > 150);
  CHECK(whole > 20);
}

TEST_CASE("a broken archive of a tensor is refused with the code of what is wrong, and the message names tensor and file") {
  auto const pickle = [](std::function<void(V&)> const& change) {
    return [change](Checkpoint& c) {
      V tensor = tensor_of();
      change(tensor);
      c.lower_is(archive_of(records_of(tensor, floats(12, 12))));
    };
  };
  auto const records = [](std::function<void(std::vector<Record>&)> const& change) {
    return [change](Checkpoint& c) {
      auto list = records_of(tensor_of(), floats(12, 12));
      change(list);
      c.lower_is(archive_of(list));
    };
  };
  auto const storage = [](V& tensor) -> V& { return tensor.parts[0].parts[0]; };
  auto const bits = [](std::string const& name, V set) { return [name, set](V& tensor) { tensor.parts.push_back(V::dict({{name, set}})); }; };
  check({
      {"another dtype", pickle([&](V& t) { storage(t).parts[1] = V::global("torch", "IntStorage"); }), "index_mismatch", "w"},
      {"a dtype of half the size", pickle([&](V& t) { storage(t).parts[1] = V::global("torch", "HalfStorage"); }), "index_mismatch", "w"},
      {"a dtype of twice the size", pickle([&](V& t) { storage(t).parts[1] = V::global("torch", "DoubleStorage"); }), "size_mismatch", "w"},
      {"an unknown storage class", pickle([&](V& t) { storage(t).parts[1] = V::global("torch", "QInt8Storage"); }), "unsupported", "QInt8Storage"},
      {"a storage that is another class", pickle([&](V& t) { storage(t).parts[1] = V::global("torch", "Size"); }), "unsupported_dtype", "torch.Size"},
      {"an untyped storage without a dtype", pickle([&](V& t) { storage(t).parts[1] = V::global("torch.storage", "UntypedStorage"); }), "unsupported_dtype", "UntypedStorage"},
      {"another shape", pickle([](V& t) { t.parts[2] = V::tuple({V::number(3), V::number(4)}), t.parts[3] = V::tuple({V::number(4), V::number(1)}); }), "index_mismatch", "w"},
      {"another rank", pickle([](V& t) { t.parts[2] = V::tuple({V::number(12)}), t.parts[3] = V::tuple({V::number(1)}); }), "index_mismatch", "w"},
      {"fewer strides", pickle([](V& t) { t.parts[3] = V::tuple({V::number(1)}); }), "bad_schema", "1 strides"},
      {"strides out of the storage", pickle([](V& t) { t.parts[3] = V::tuple({V::number(7), V::number(1)}); }), "size_mismatch", "beyond its storage"},
      {"strides that overflow", pickle([](V& t) { t.parts[3] = V::tuple({V::number(INT64_MAX), V::number(INT64_MAX)}); }), "size_mismatch", "beyond its storage"},
      {"negative strides", pickle([](V& t) { t.parts[3] = V::tuple({V::number(-6), V::number(1)}); }), "bad_schema", "w"},
      {"it begins behind the storage", pickle([](V& t) { t.parts[1] = V::number(1); }), "size_mismatch", "beyond its storage"},
      {"it begins at 2^62", pickle([](V& t) { t.parts[1] = V::number(std::int64_t{1} << 62); }), "size_mismatch", "beyond its storage"},
      {"a storage of 2^61 floats", pickle([&](V& t) { storage(t).parts[4] = V::number(std::int64_t{1} << 61); }), "size_mismatch", "has a record of 48"},
      {"a storage of 2^63 - 1 floats", pickle([&](V& t) { storage(t).parts[4] = V::number(INT64_MAX); }), "overflow", "w"},
      {"a storage of one float more", pickle([&](V& t) { storage(t).parts[4] = V::number(13); }), "size_mismatch", "has a record of 48"},
      {"a storage with another key", pickle([&](V& t) { storage(t).parts[2] = V::of_text("1"); }), "missing_tensor", "storage \"1\""},
      {"a key that climbs", pickle([&](V& t) { storage(t).parts[2] = V::of_text("../data.pkl"); }), "missing_tensor", "w"},
      {"a dict instead of a tensor", [](Checkpoint& c) { c.lower_is(archive_of(records_of(V::dict({{"w", tensor_of()}}), floats(12, 12)))); }, "bad_schema", "no tensor"},
      {"a number instead of a tensor", [](Checkpoint& c) { c.lower_is(number_three); }, "bad_schema", "no tensor"},
      {"a call of print", pickle([](V& t) { t.parts[5] = V::call("builtins", "print", {V::of_text("x")}); }), "unsupported", "print"},
      {"a property that is unknown", pickle(bits("zero", V::boolean(true))), "unsupported", "zero"},
      {"a property that is no bool", pickle(bits("conj", V::number(1))), "bad_schema", "w"},
      {"no storage", records([](auto& r) { r.erase(r.begin() + 2); }), "missing_tensor", "storage \"0\""},
      {"no pickle", records([](auto& r) { r.erase(r.begin()); }), "bad_schema", "data.pkl"},
      {"a pickle two levels down", records([](auto& r) { r[0].name = "archive/x/data.pkl"; }), "bad_schema", "data.pkl"},
      {"a storage that is too short", records([](auto& r) { r[2].bytes.resize(44); }), "size_mismatch", "has a record of 44"},
      {"a storage that is empty", records([](auto& r) { r[2].bytes.clear(); }), "size_mismatch", "has a record of 0"},
      {"an unknown byte order", records([](auto& r) { r[1].bytes = bytes_of("middle"); }), "bad_schema", "middle"},
      {"no byte order", records([](auto& r) { r.erase(r.begin() + 1); }), "ok", ""},
      {"no version", records([](auto& r) { r.pop_back(); }), "ok", ""},
      {"a longer storage", [](Checkpoint& c) { c.lower_is(archive_of(records_of(tensor_of(), floats(12, 14)))); }, "ok", ""},
      {"a pickle that ends early", records([](auto& r) { r[0].bytes.resize(r[0].bytes.size() - 4); }), "truncated", "w"},
      {"a pickle with more behind it", records([](auto& r) { r[0].bytes.push_back(std::byte{0}); }), "trailing_data", "w"},
      {"an empty pickle", records([](auto& r) { r[0].bytes.clear(); }), "truncated", "w"},
      {"a bit of the data flipped", [](Checkpoint& c) {
         auto archive = lower_rows;
         auto const wanted = floats(12, 12);
         auto const found = std::search(archive.begin(), archive.end(), wanted.begin(), wanted.end());
         *(found + 17) ^= std::byte{4};
         c.lower_is(archive);
       }, "corrupt", "w"},
      {"a bit of the pickle flipped", [](Checkpoint& c) {
         auto archive = lower_rows;
         auto const wanted = bytes_of("FloatStorage");
         *std::search(archive.begin(), archive.end(), wanted.begin(), wanted.end()) ^= std::byte{1};
         c.lower_is(archive);
       }, "corrupt", "data.pkl"},
      {"not an archive", [](Checkpoint& c) { c.lower_is(dcp::Bytes(lower_rows.size(), std::byte{'x'})); }, "truncated", "w"},
      {"an empty archive", [](Checkpoint& c) { c.place(2)["length"] = V::number(0); }, "truncated", "w"},
      {"an archive cut in the middle", [](Checkpoint& c) { c.place(2)["length"] = V::number(700); }, "truncated", "w"},
  });
}

TEST_CASE("archives with the most significant byte first, conjugate and negative views load as what they stand for, in one rank and in rows of two") {
  auto const pattern = [](std::string const& storage_class, std::string const& dtype, std::int64_t count, dcp::Bytes const& data, std::string const& order, std::string const& property) {
    Checkpoint c;
    V tensor = tensor_of();
    tensor.parts[0] = storage_of(storage_class, count);
    if (!property.empty()) tensor.parts.push_back(V::dict({{property, V::boolean(true)}}));
    auto list = records_of(tensor, data);
    list[1].bytes = bytes_of(order);
    c.tensor() = tensor_metadata({2, 6}, {chunk_of(upper, {2, 6})});
    c.tensor()["properties"].parts[0].parts[0] = V::global("torch", dtype);
    auto const archive = archive_of(list);
    c.place(1) = place_of("__1_0.distcp", 0, archive.size());
    c.files["__1_0.distcp"] = archive;
    return c;
  };
  struct Form {
    std::string storage_class, dtype;
    dcp::DType of;
    std::size_t number, element;   // bytes
  };
  for (auto const& form : std::vector<Form>{{"FloatStorage", "float32", dcp::DType::f32, 4, 4}, {"ShortStorage", "int16", dcp::DType::i16, 2, 2}, {"DoubleStorage", "float64", dcp::DType::f64, 8, 8}, {"ByteStorage", "uint8", dcp::DType::u8, 1, 1},
                                            {"ComplexFloatStorage", "complex64", dcp::DType::c64, 4, 8}, {"ComplexDoubleStorage", "complex128", dcp::DType::c128, 8, 16}}) {
    CAPTURE(form.dtype);
    dcp::Bytes data(12 * form.element);
    for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i * 7 + 1);
    for (std::string const property : {"", "conj", "neg"})
      for (std::string const order : {"little", "big"}) {
        if (property == "conj" && form.number == form.element) continue;
        if (property == "neg" && form.number < 4) continue;   // integers have no such views
        CAPTURE(property);
        CAPTURE(order);
        dcp::Bytes wanted = data;
        for (std::size_t at = 0; at < wanted.size(); at += form.number) {
          if (order == "big") std::reverse(wanted.begin() + static_cast<std::ptrdiff_t>(at), wanted.begin() + static_cast<std::ptrdiff_t>(at + form.number));
          bool const imaginary = form.number != form.element && at % form.element != 0;
          if (property == "neg" || (property == "conj" && imaginary)) wanted[at + form.number - 1] ^= std::byte{0x80};
        }
        TemporaryDirectory directory;
        pattern(form.storage_class, form.dtype, 12, data, order, property).write_to(directory);
        dcp::SelfComm self;
        auto const state = dcp::load_from_keys<dcp::TorchDcp>(self, directory.path());
        CHECK(state.tensors().at("w").dtype() == form.of);
        auto const bytes = state.tensors().at("w").bytes();
        CHECK(dcp::Bytes(bytes.begin(), bytes.end()) == wanted);
        // Rows of two ranks.
        dcp::run_threads(2, [&](dcp::ThreadComm& world) {
          dcp::Layout layout;
          layout.shape = layout.split_shape = {2, 6};
          layout.mesh.world = layout.mesh.extents[0] = 2;
          layout.mesh.axes = 1, layout.mesh.strides[0] = 1;
          layout.rules[0] = {dcp::RuleKind::shard, 0, -1};
          dcp::Bytes row(6 * form.element, std::byte{0xEE});
          dcp::StateDict half;
          half.add_tensor("w", form.of, layout, {row.data(), dcp::Extents{6, 1}});
          dcp::load<dcp::TorchDcp>(world, directory.path(), half, {.on_unexpected = dcp::OnUnexpected::ignore});
          auto const begin = wanted.begin() + static_cast<std::ptrdiff_t>(row.size()) * world.rank();
          CHECK(std::equal(row.begin(), row.end(), begin));
        });
      }
  }
}

TEST_CASE("law: views at any strides, over a storage that ends with their last element or goes on, load whole, in boxes of two ranks, and cast") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(400, 8000); ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    CAPTURE(seed);
    dcp::test::Random random{seed};
    std::vector<std::int64_t> shape, strides;
    std::int64_t const first = random.between(0, 3);
    std::int64_t last = first;
    for (auto rank = random.between(1, 3); rank > 0; --rank) {
      shape.push_back(random.between(1, 5));
      strides.push_back(random.any_of(std::vector<std::int64_t>{0, 1, 2, 3, 5, 8, 16, 40, 1000}));
      last += (shape.back() - 1) * strides.back();
    }
    std::int64_t const count = last + 1 + (random.one_in(2) ? 0 : random.between(0, 50));
    auto const data = floats(0, static_cast<int>(count));
    V tensor = tensor_of();
    tensor.parts[0] = storage_of("FloatStorage", count);
    tensor.parts[1] = V::number(first);
    tensor.parts[2] = tensor.parts[3] = V::tuple();
    for (auto const size : shape) tensor.parts[2].parts.push_back(V::number(size));
    for (auto const stride : strides) tensor.parts[3].parts.push_back(V::number(stride));
    std::vector<std::int64_t> const zeros(shape.size(), 0);
    auto const archive = archive_of(records_of(tensor, data));
    V places{.kind = Kind::dict};
    places.parts = {index_of("w", &zeros), place_of("__0_0.distcp", 0, archive.size())};
    V metadata = good_metadata();
    metadata["state_dict_metadata"] = V::dict({{"w", tensor_metadata(shape, {chunk_of(zeros, shape)})}});
    metadata["storage_data"] = places;
    TemporaryDirectory directory;
    write(directory / ".metadata", metadata.pickled());
    write(directory / "__0_0.distcp", archive);
    std::vector<float> wanted;
    dcp::Extents const extents{shape};
    dcp::test::for_each_element(dcp::Box::whole(extents), [&](dcp::Extents const& index) {
      std::int64_t at = first;
      for (int d = 0; d < index.rank(); ++d) at += index[d] * strides[static_cast<std::size_t>(d)];
      wanted.push_back(static_cast<float>(at));
    });
    int const ranks = static_cast<int>(random.between(1, 2)), dim = static_cast<int>(random.between(0, extents.rank() - 1));
    bool const cast = random.one_in(3), full = random.one_in(2);
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      dcp::Layout layout;
      layout.shape = layout.split_shape = extents;
      layout.mesh = dcp::test::mesh_of({ranks});
      layout.rules[0] = {dcp::RuleKind::shard, dim, -1};
      auto const box = dcp::box_of_rank(layout, world.rank()).value();
      auto const dtype = cast ? dcp::DType::f64 : dcp::DType::f32;
      std::vector<double> wide(box.size() + 1, -1);
      std::vector<float> narrow(box.size() + 1, -1);
      dcp::StateDict state;
      state.add_tensor("w", dtype, layout, {cast ? reinterpret_cast<std::byte*>(wide.data()) : reinterpret_cast<std::byte*>(narrow.data()), dcp::row_major_strides(box.shape)});
      dcp::load<dcp::TorchDcp>(world, directory.path(), state, {.on_dtype = dcp::OnDType::cast, .verify = full ? dcp::Verify::full : dcp::Verify::standard});
      bool same = true;
      std::size_t i = 0;
      dcp::test::for_each_element(box, [&](dcp::Extents const& index) {
        float const value = wanted[static_cast<std::size_t>(dcp::test::linear(index, dcp::row_major_strides(extents)))];
        same = same && (cast ? static_cast<float>(wide[i]) == value : narrow[i] == value);
        ++i;
      });
      CHECK(same);
    });
  }
}

TEST_CASE("objects: classes that are unknown are refused by name or listed as opaque, and what is too deep or too wide is refused") {
  auto const object = [](V value) {
    return [value](Checkpoint& c) { c.object_is(archive_of(records_of(value))); };
  };
  auto const deep = [](int levels) {
    V value = V::number(1);
    for (int i = 0; i < levels; ++i) value = V::list({value});
    return value;
  };
  V const unknown = V::call("my.module", "Thing", {V::number(1)});
  V const opaque_dict = V::dict({{"a", unknown}, {"b", V::number(2)}});
  // A list of ten lists of ten lists ...: each level is written once and recalled, so that a few bytes stand for 10^k values.
  auto const wide = [](int levels) {
    return [levels](Checkpoint& c) {
      std::string pickle = "\x80\x02]q";
      pickle += '\0';
      for (int i = 0; i < levels; ++i) {
        pickle += "0](";
        for (int k = 0; k < 10; ++k) pickle += std::string{"h"} + static_cast<char>(i);
        pickle += std::string{"eq"} + static_cast<char>(i + 1);
      }
      pickle += '.';
      c.object_is(archive_of({{"archive/data.pkl", bytes_of(pickle)}, {"archive/version", bytes_of("3\n")}}));
    };
  };
  dcp::TorchDcpOptions const opaque{.opaque_objects = true};
  constexpr std::size_t text_of_all = 64 << 20;   // of as many values as are allowed, as JSON
  check({
      {"an object of an unknown class", object(unknown), "unsupported", "my.module"},
      {"an object of an unknown class, with the option that lists it", object(unknown), "unsupported", "opaque_objects"},
      {"an unknown class in a dict", object(opaque_dict), "unsupported", "n: "},
      {"an object of an unknown class, opaque", object(unknown), "ok", "", opaque},
      {"an unknown class in a dict, opaque", object(opaque_dict), "ok", "", opaque},
      {"a class, not an object", object(V::global("my.module", "Thing")), "unsupported", "my.module"},
      {"199 levels", object(deep(199)), "ok", ""},
      {"202 levels", object(deep(202)), "limit", "n: "},
      {"a wide list of 10^4", wide(4), "ok", ""},
      {"a wide list of 10^9", wide(9), "limit", "n: ", {}, text_of_all},
      {"a wide list of 10^200", wide(200), "limit", "n: ", {}, text_of_all},
      {"an object of 100,000 numbers", object(V::list(std::vector<V>(100'000, V::number(7)))), "ok", ""},
      {"a storage without a tensor", object(V::tuple({storage_of()})), "bad_schema", "n: "},
      {"a tensor without its storage", object(V::tuple({tensor_of()})), "missing_tensor", "n: "},
      {"bytes of characters beyond 255", object(V::call("_codecs", "encode", {V::of_text("\u0101"), V::of_text("latin1")})), "bad_schema", "n: "},
      {"bytes in another encoding", object(V::call("_codecs", "encode", {V::of_text("a"), V::of_text("rot13")})), "bad_schema", "n: "},
      {"a complex number of three parts", object(V::call("__builtin__", "complex", {V::of_real(1), V::of_real(2), V::of_real(3)})), "bad_schema", "n: "},
      {"an eval", object(V::call("builtins", "eval", {V::of_text("1")})), "unsupported", "builtins"},
  });

  TemporaryDirectory directory;
  Checkpoint checkpoint;
  checkpoint.object_is(archive_of(records_of(opaque_dict)));
  checkpoint.write_to(directory);
  auto const listed = load(directory.path(), opaque);
  CHECK(listed.content.at("n") == R"(json {"a":{"__type__":"opaque","class":"my.module.Thing"},"b":2})");
}
