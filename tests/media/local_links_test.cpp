// SPDX-License-Identifier: Apache-2.0
#include <dcp/media/local_links.hpp>

#include <dcp/media/local_fs.hpp>

#include "../support/medium_conformance.hpp"
#include "../support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <string>

using namespace dcp;
using namespace dcp::test;

namespace {

std::string read(std::string const& directory, std::string const& name, LinkPolicy policy = LinkPolicy::cache) {
  auto const file = open_inside(directory, name, policy);
  std::string text(static_cast<std::size_t>(file.size()), '\0');
  file.read_at(0, std::as_writable_bytes(std::span{text}));
  return text;
}

ErrorCode refusal(std::string const& directory, std::string const& name, LinkPolicy policy = LinkPolicy::cache) {
  return error_of([&] { open_inside(directory, name, policy); }).code();
}

/// models--org--name as huggingface_hub leaves it, and something outside.
struct Cache {
  TemporaryDirectory root;
  std::string snapshot = root / "hub/models--o--m/snapshots/0a1b";

  Cache() {
    LocalFs medium;
    medium.create_directories(root / "hub/models--o--m/blobs");
    medium.create_directories(root / "hub/models--o--other/blobs");
    medium.create_directories(snapshot + "/text_encoder");
    put(medium, root / "hub/models--o--m/blobs/c0ffee", "weights");
    put(medium, root / "hub/models--o--other/blobs/c0ffee", "another repository's");
    put(medium, root / "secret", "secret");
    put(medium, snapshot + "/plain", "plain");
    std::filesystem::create_symlink("../../blobs/c0ffee", snapshot + "/model.safetensors");
    std::filesystem::create_symlink("../../../blobs/c0ffee", snapshot + "/text_encoder/model.safetensors");
    std::filesystem::create_symlink("plain", snapshot + "/inside");
    std::filesystem::create_symlink("../../../../secret", snapshot + "/leaves");
    std::filesystem::create_symlink(root / "secret", snapshot + "/absolute");
    std::filesystem::create_symlink("../../../models--o--other/blobs/c0ffee", snapshot + "/foreign");
    std::filesystem::create_symlink("../../blobs/none", snapshot + "/missing");
    std::filesystem::create_symlink("loop", snapshot + "/loop");
    std::filesystem::create_directory_symlink(root.path(), snapshot + "/folder");
    std::filesystem::create_directory_symlink("text_encoder", snapshot + "/alias");
  }
};

}  // namespace

TEST_CASE("open_inside: the Hugging Face cache is read, and links that stay inside") {
  Cache cache;
  CHECK(read(cache.snapshot, "plain") == "plain");
  CHECK(read(cache.snapshot, "model.safetensors") == "weights");
  CHECK(read(cache.snapshot, "text_encoder/model.safetensors") == "weights");
  CHECK(read(cache.snapshot + "/text_encoder", "model.safetensors") == "weights");
  CHECK(read(cache.snapshot, "inside") == "plain");
  CHECK(read(cache.snapshot, "alias/model.safetensors") == "weights");
}

TEST_CASE("open_inside: a link that leaves the directory is unsafe_path, and its error says where it leads") {
  Cache cache;
  for (auto const* name : {"leaves", "absolute", "foreign", "folder/secret"}) {
    CAPTURE(name);
    CHECK(refusal(cache.snapshot, name) == ErrorCode::unsafe_path);
  }
  auto const error = error_of([&] { open_inside(cache.snapshot, "leaves"); });
  CHECK(error.message().find(cache.root / "secret") != std::string::npos);
  CHECK(error.path() == cache.snapshot + "/leaves");
}

TEST_CASE("open_inside: outside of a snapshot a link to blobs/ is like any other") {
  TemporaryDirectory directory;
  LocalFs medium;
  medium.create_directories(directory / "m/blobs");
  medium.create_directories(directory / "m/checkpoints/x");
  put(medium, directory / "m/blobs/h", "x");
  std::filesystem::create_symlink("../../blobs/h", directory / "m/checkpoints/x/f");
  CHECK(refusal(directory / "m/checkpoints/x", "f") == ErrorCode::unsafe_path);
}

TEST_CASE("open_inside: refuse takes no link, follow takes them all") {
  Cache cache;
  for (auto const* name : {"model.safetensors", "inside", "leaves", "alias/model.safetensors", "missing"}) {
    CAPTURE(name);
    CHECK(refusal(cache.snapshot, name, LinkPolicy::refuse) == ErrorCode::unsafe_path);
  }
  CHECK(read(cache.snapshot, "plain", LinkPolicy::refuse) == "plain");
  CHECK(read(cache.snapshot, "leaves", LinkPolicy::follow) == "secret");
  CHECK(read(cache.snapshot, "folder/secret", LinkPolicy::follow) == "secret");
}

TEST_CASE("open_inside: a directory that is itself reached by a link is fine") {
  Cache cache;
  std::filesystem::create_directory_symlink(cache.snapshot, cache.root / "latest");
  CHECK(read(cache.root / "latest", "plain", LinkPolicy::refuse) == "plain");
  CHECK(read(cache.root / "latest", "model.safetensors") == "weights");
  CHECK(refusal(cache.root / "latest", "leaves") == ErrorCode::unsafe_path);
}

TEST_CASE("open_inside: links to nothing are missing files, loops and what is no file are io") {
  Cache cache;
  auto const error = error_of([&] { open_inside(cache.snapshot, "missing"); });
  CHECK(error.code() == ErrorCode::missing_file);
  CHECK(error.hint().find("symbolic link") != std::string::npos);
  CHECK(refusal(cache.snapshot, "none") == ErrorCode::missing_file);
  CHECK(error_of([&] { open_inside(cache.snapshot, "loop"); }).system_error() == ELOOP);
  CHECK(error_of([&] { open_inside(cache.snapshot, "text_encoder"); }).system_error() == EISDIR);
  CHECK(error_of([&] { open_inside(cache.snapshot, "plain/x"); }).system_error() == ENOTDIR);
  REQUIRE(::mkfifo((cache.snapshot + "/fifo").c_str(), 0600) == 0);
  CHECK(refusal(cache.snapshot, "fifo") == ErrorCode::io);
}

TEST_CASE("open_inside: names that are not inside by their spelling are unsafe_path") {
  Cache cache;
  for (std::string const name : {"", ".", "..", "../secret", "/etc/passwd", "a//b", "a/", "a/../../x", "./plain"}) {
    CAPTURE(name);
    CHECK(refusal(cache.snapshot, name, LinkPolicy::follow) == ErrorCode::unsafe_path);
  }
  CHECK(refusal(cache.snapshot, std::string("plain\0x", 7)) == ErrorCode::unsafe_path);
}

TEST_CASE("LocalFs: reading keeps the link policy of its options") {
  Cache cache;
  auto const path = cache.snapshot + "/leaves";
  CHECK(error_of([&] { LocalFs{}.open_read(path); }).code() == ErrorCode::unsafe_path);
  CHECK(LocalFs{}.open_read(cache.snapshot + "/model.safetensors")->size() == 7);
  CHECK(LocalFs{{.links = LinkPolicy::follow}}.open_read(path)->size() == 6);
  CHECK(error_of([&] { LocalFs{{.links = LinkPolicy::refuse}}.open_read(cache.snapshot + "/inside"); }).code() == ErrorCode::unsafe_path);
}
