// SPDX-License-Identifier: Apache-2.0
#include <dcp/media/local_fs.hpp>

#include <dcp/media/memory.hpp>

#include "../support/medium_conformance.hpp"
#include "../support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <filesystem>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

using namespace dcp;
using namespace dcp::test;

TEST_CASE("LocalFs keeps the contract of a medium") {
  TemporaryDirectory directory;
  check_medium([&](std::string& root) {
    root = directory.path();
    return LocalFs{};
  });
}

TEST_CASE("law: LocalFs and Memory answer the same to random calls") {
  auto const seed = std::random_device{}();
  for (int round = 0; round < 5; ++round) {
    TemporaryDirectory directory;
    check_media_agree(LocalFs{}, directory.path(), Memory{}, "", seed + static_cast<unsigned>(round), 2000);
  }
}

TEST_CASE("LocalFs: a full device fails the write with ENOSPC, the file and the range") {
  auto const file = LocalFs{}.open_write("/dev/full");
  auto const error = error_of([&] { file->write_at(0, as_byte_span("data")); });
  CHECK(error.code() == ErrorCode::io);
  CHECK(error.system_error() == ENOSPC);
  CHECK(error.path() == "/dev/full");
}

TEST_CASE("LocalFs: a name that appears in time is read and written when the options wait for it") {
  TemporaryDirectory directory;
  LocalFs medium{{.visible_within = std::chrono::seconds{20}}};
  std::thread maker{[&] {
    std::this_thread::sleep_for(std::chrono::milliseconds{20});
    LocalFs other;
    other.create_directory(directory / "d");
    put(other, directory / "d/f.tmp", "late");
    other.rename_file(directory / "d/f.tmp", directory / "d/f");
  }};
  CHECK(medium.open_read(directory / "d/f")->size() == 4);
  maker.join();
  CHECK(error_of([&] { LocalFs{}.open_read(directory / "no"); }).code() == ErrorCode::missing_file);
}

TEST_CASE("LocalFs: links are listed for what they lead to") {
  TemporaryDirectory directory;
  LocalFs medium;
  put(medium, directory / "f", "abc");
  std::filesystem::create_symlink("f", directory / "l");
  std::filesystem::create_symlink(".", directory / "d");
  std::filesystem::create_symlink("nothing", directory / "n");
  std::filesystem::create_symlink("loop", directory / "loop");
  CHECK(listing(medium, directory.path()) == "d d\nf f 3\nf l 3\no loop\no n\n");
  CHECK(medium.kind(directory / "n") == EntryKind::other);
  CHECK(medium.kind(directory / "loop") == EntryKind::other);
  CHECK(medium.kind("/dev/null") == EntryKind::other);
}

TEST_CASE("LocalFs: a directory is not published over a link, and a link is not exchanged") {
  TemporaryDirectory directory;
  LocalFs medium;
  medium.create_directory(directory / "attempt");
  medium.create_directory(directory / "target");
  std::filesystem::create_directory_symlink("target", directory / "place");
  CHECK_FALSE(medium.publish_new(directory / "attempt", directory / "place"));
  CHECK(error_of([&] { medium.exchange_directories(directory / "attempt", directory / "place"); }).system_error() == ENOTDIR);
  CHECK(std::filesystem::is_symlink(directory / "place"));
  std::filesystem::create_directory_symlink("nothing", directory / "dangling");
  CHECK_FALSE(medium.publish_new(directory / "attempt", directory / "dangling"));
}

TEST_CASE("LocalFs: the file system here exchanges directories atomically") {
  TemporaryDirectory directory;
  LocalFs medium;
  for (auto const* name : {"a", "b"}) {
    medium.create_directory(directory / name);
    put(medium, directory / (name + std::string{"/name"}), name);
  }
  REQUIRE(medium.exchange_directories(directory / "a", directory / "b"));
  std::atomic<bool> stop = false;
  std::thread swapper{[&] {
    while (!stop) medium.exchange_directories(directory / "a", directory / "b");
  }};
  for (int i = 0; i < 2000; ++i) {
    auto const text = get(medium, directory / "a/name");   // always there, always whole
    REQUIRE((text == "a" || text == "b"));
  }
  stop = true;
  swapper.join();
}

TEST_CASE("LocalFs: of many threads that publish at one name, one does") {
  TemporaryDirectory directory;
  LocalFs medium;
  for (int round = 0; round < 20; ++round) {
    auto const place = directory / ("place" + std::to_string(round));
    std::atomic<int> published = 0;
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        auto const attempt = place + ".attempt" + std::to_string(t);
        medium.create_directory(attempt);
        put(medium, attempt + "/f", "x");
        if (medium.publish_new(attempt, place)) ++published;
      });
    for (auto& thread : threads) thread.join();
    CHECK(published == 1);
  }
}

TEST_CASE("LocalFs: remove_tree removes links and never what they lead to") {
  TemporaryDirectory directory;
  LocalFs medium;
  medium.create_directories(directory / "keep/sub");
  put(medium, directory / "keep/f", "kept");
  medium.create_directories(directory / "tree/a");
  std::filesystem::create_directory_symlink("../../keep", directory / "tree/a/link");
  std::filesystem::create_symlink("/nothing/at/all", directory / "tree/dangling");
  std::filesystem::create_directory_symlink("keep", directory / "top");
  medium.remove_tree(directory / "tree");
  medium.remove_tree(directory / "top");
  CHECK(listing(medium, directory.path()) == "d keep\n");
  CHECK(listing(medium, directory / "keep") == "f f 4\nd sub\n");
}

TEST_CASE("LocalFs: threads that remove the same tree, and one that still writes into it, all get through") {
  TemporaryDirectory directory;
  LocalFs medium;
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 30; ++i) {
      auto const sub = directory / ("tree/" + std::to_string(i % 6));
      medium.create_directories(sub);
      put(medium, sub + "/" + std::to_string(i), "x");
    }
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) threads.emplace_back([&] { medium.remove_tree(directory / "tree"); });
    threads.emplace_back([&] {
      try {
        for (int i = 0; i < 20; ++i) put(medium, directory / ("tree/0/new" + std::to_string(i)), "x");
      } catch (Error const&) {   // its directory is gone: what a late writer of an abandoned attempt gets
      }
    });
    for (auto& thread : threads) thread.join();
    medium.remove_tree(directory / "tree");
    REQUIRE(medium.list(directory.path()).empty());
  }
}

TEST_CASE("LocalFs: relative paths, also bare names, work from the current directory") {
  TemporaryDirectory directory;
  auto const before = std::filesystem::current_path();
  std::filesystem::current_path(directory.path());
  LocalFs medium;
  medium.create_directories("a/b");
  put(medium, "f", "abc");
  put(medium, "a/b/f", "def");
  medium.sync_directory(".");
  CHECK(get(medium, "f") == "abc");
  CHECK(get(medium, "a/b/f") == "def");
  CHECK(medium.resolve_place("a/c") == directory / "a/c");
  CHECK(medium.acquire_lease("lease") != nullptr);
  std::filesystem::current_path(before);
}
