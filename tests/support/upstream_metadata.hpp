// SPDX-License-Identifier: Apache-2.0
#pragma once
// The rows of PyTorch's test_restricted_metadata_unpickler.py, for any communicator. Include one of ranks_on_*.hpp before.

#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/storage/torch_dcp.hpp>

#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace dcp::test {

/// A tensor of two chunks in two files, and an object.
inline torch::Metadata some_metadata() {
  torch::Metadata metadata;
  torch::MetadataEntry tensor{"model.weight", true, DType::bf16, {4, 6}};
  tensor.chunks.push_back({{{0, 0}, {2, 6}}, {"__0_0.distcp", 0, 1577}});
  tensor.chunks.push_back({{{2, 0}, {2, 6}}, {"__1_0.distcp", std::uint64_t{5} << 32, 1577}});
  torch::MetadataEntry object{"step", false, {}, {}};
  object.place = {"__0_0.distcp", 1577, 1261};
  metadata.entries = {tensor, object};
  return metadata;
}

// Upstream: metadata that was pickled is read by the restricted unpickler, and is what it was.
TEST_CASE("test_normal_metadata_loads: tensors, their chunks and objects of metadata are read as they were written") {
  on_ranks(1, [](auto&, std::string const&) {
    auto const written = some_metadata();
    auto const read = torch::parse_metadata(torch::write_metadata(written));
    CHECK(read.version == "1.0.0");
    REQUIRE(read.entries.size() == 2);
    CHECK(read.entries[0].name == "model.weight");
    CHECK(read.entries[0].is_tensor);
    CHECK(read.entries[0].dtype == DType::bf16);
    CHECK(read.entries[0].shape == Extents{4, 6});
    REQUIRE(read.entries[0].chunks.size() == 2);
    for (std::size_t i = 0; i < 2; ++i) CHECK(read.entries[0].chunks[i].box == written.entries[0].chunks[i].box);
    CHECK(read.entries[1].name == "step");
    CHECK(!read.entries[1].is_tensor);
  });
}

// Upstream: a pickle whose REDUCE calls os.system raises what matches "Blocked unpickling".
TEST_CASE("test_malicious_payload_blocked: metadata that would call os.system is refused by that name, and nothing is called") {
  on_ranks(4, [](auto& world, std::string const& directory) {
    std::string const marker = directory + "/called", place = directory + "/ckpt";
    if (world.rank() == 0) {
      std::filesystem::create_directory(place);
      std::ofstream{place + "/.metadata", std::ios::binary} << "cos\nsystem\n(S'touch " + marker + "'\ntR.";
    }
    world.barrier();
    std::string refused;
    try {
      load_from_keys<TorchDcp>(world, place);
    } catch (Error const& error) {
      CHECK(error.code() == ErrorCode::unsupported);
      refused = error.what();
    }
    CHECK(refused.find("\"system\" of the module \"os\"") != std::string::npos);
    CHECK(refused.find("not allowed") != std::string::npos);
    CHECK(!std::filesystem::exists(marker));
  });
}

// Upstream: a MetadataIndex (name, offset, index) that was pickled is read, and equals what it was. Here it leads to the place of a chunk.
TEST_CASE("test_metadata_index_loads: name and offset of a chunk lead to the file, offset and length that were written") {
  on_ranks(1, [](auto&, std::string const&) {
    auto const written = some_metadata();
    auto const read = torch::parse_metadata(torch::write_metadata(written));
    auto const same = [](torch::ItemPlace const& a, torch::ItemPlace const& b) { return a.path == b.path && a.offset == b.offset && a.length == b.length && a.transforms == b.transforms; };
    for (std::size_t i = 0; i < 2; ++i) CHECK(same(read.entries.at(0).chunks.at(i).place, written.entries[0].chunks[i].place));
    CHECK(same(read.entries.at(1).place, written.entries[1].place));
  });
}

}  // namespace dcp::test
