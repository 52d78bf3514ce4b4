// SPDX-License-Identifier: Apache-2.0
#include "../support/fault_medium.hpp"

#include <dcp/media/local_fs.hpp>
#include <dcp/media/memory.hpp>

#include "../support/medium_conformance.hpp"
#include "../support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <string>

using namespace dcp;
using namespace dcp::test;

TEST_CASE("FaultMedium without rules keeps the contract of a medium") {
  check_medium([](std::string& directory) {
    Memory memory;
    memory.create_directory(directory = "/place");
    return FaultMedium{memory};
  });
}

TEST_CASE("faults: the k-th matching call fails, with the errno asked for, and only that one") {
  FaultMedium medium{Memory{}};
  medium.add({.call = Call::sync, .path = "model-2", .nth = 2, .system_error = EIO});
  auto const one = medium.open_write("/model-1"), two = medium.open_write("/model-2");
  one->sync();
  one->sync();
  two->sync();
  auto const error = error_of([&] { two->sync(); });
  CHECK(error.code() == ErrorCode::io);
  CHECK(error.system_error() == EIO);
  CHECK(error.path() == "/model-2");
  two->sync();
  CHECK(medium.calls(Call::sync) == 5);
  CHECK(medium.hits() == 1);
}

TEST_CASE("faults: every call of the contract can fail, and then does nothing") {
  Memory memory;
  FaultMedium medium{memory};
  put(medium, "/f", "abc");
  auto const writer = medium.open_write("/f");
  auto const reader = medium.open_read("/f");
  auto const lease = medium.acquire_lease("/lease");
  auto const before = listing(memory, "/");
  std::string buffer(1, ' ');
  medium.add({.times = forever, .system_error = EROFS});
  auto const fails = [&](auto call) { CHECK(error_of(call).system_error() == EROFS); };
  fails([&] { medium.open_write("/new"); });
  fails([&] { medium.open_read("/f"); });
  fails([&] { writer->write_at(0, as_byte_span("xyz")); });
  fails([&] { writer->resize(0); });
  fails([&] { writer->sync(); });
  fails([&] { writer->close(); });
  fails([&] { reader->read_at(0, std::as_writable_bytes(std::span{buffer})); });
  fails([&] { medium.rename_file("/f", "/g"); });
  fails([&] { medium.remove_file("/f"); });
  fails([&] { medium.kind("/f"); });
  fails([&] { medium.list("/"); });
  fails([&] { medium.create_directory("/d"); });
  fails([&] { medium.create_directories("/d/e"); });
  fails([&] { medium.sync_directory("/"); });
  fails([&] { medium.publish_new("/f", "/g"); });
  fails([&] { medium.exchange_directories("/f", "/g"); });
  fails([&] { medium.remove_tree("/f"); });
  fails([&] { medium.acquire_lease("/other"); });
  fails([&] { medium.resolve_place("/p"); });
  fails([&] { medium.block_bytes("/"); });
  CHECK(listing(memory, "/") == before);
  CHECK(get(memory, "/f") == "abc");
  medium.clear();
  CHECK(get(medium, "/f") == "abc");
}

TEST_CASE("faults: ENOENT is missing_file, as a medium says it") {
  FaultMedium medium{Memory{}};
  put(medium, "/f", "abc");
  medium.add({.call = Call::open_read, .times = 2, .system_error = ENOENT});
  int calls = 0;
  CHECK(retry_visible(std::chrono::seconds{20}, [&] { return ++calls, medium.open_read("/f"); })->size() == 3);
  CHECK(calls == 3);
}

TEST_CASE("faults: a disk that fills up takes some bytes and says so with the range") {
  FaultMedium medium{Memory{}};
  medium.add({.call = Call::write, .nth = 2, .times = forever, .system_error = ENOSPC, .bytes = 2});
  auto const file = medium.open_write("/f");
  file->write_at(0, as_byte_span("0123"));
  auto const error = error_of([&] { file->write_at(4, as_byte_span("4567")); });
  CHECK(error.system_error() == ENOSPC);
  CHECK(std::string{error.what()}.find("bytes [4, 8)") != std::string::npos);
  CHECK(get(medium, "/f") == "012345");
}

TEST_CASE("faults: a write may lose bytes silently, and a read may end early") {
  FaultMedium medium{Memory{}};
  medium.add({.call = Call::write, .bytes = 1});
  put(medium, "/f", "abc");
  CHECK(get(medium.inner(), "/f") == "a");
  put(medium, "/g", "abc");
  medium.add({.call = Call::read, .bytes = 1});
  CHECK(error_of([&] { get(medium, "/g"); }).code() == ErrorCode::truncated);
  CHECK(get(medium, "/g") == "abc");
}

TEST_CASE("faults: a call may be done and still fail") {
  FaultMedium medium{Memory{}};
  put(medium, "/f", "abc");
  medium.add({.call = Call::rename_file, .path = "/g", .system_error = EIO, .after = true});
  CHECK(error_of([&] { medium.rename_file("/f", "/g"); }).system_error() == EIO);
  CHECK(get(medium, "/g") == "abc");
}

TEST_CASE("faults: a directory vanishes under a save") {
  TemporaryDirectory directory;
  FaultMedium medium{LocalFs{}};
  medium.create_directory(directory / "attempt");
  medium.add({.call = Call::open_write, .path = "second", .vanish = directory / "attempt"});
  put(medium, directory / "attempt/first", "x");
  CHECK(error_of([&] { medium.open_write(directory / "attempt/second"); }).code() == ErrorCode::missing_file);
}

TEST_CASE("faults: hooks and delays come before the call, in the caller's thread") {
  FaultMedium medium{Memory{}};
  std::string seen;
  auto copy = medium;
  copy.add({.path = "/f", .times = forever, .delay = std::chrono::milliseconds{5}, .hook = [&](Call call, std::string const& path) {
              seen += to_string(call) + " " + path + " " + (medium.inner().kind("/f") == EntryKind::missing ? "absent" : "there") + "\n";
            }});
  auto const begin = std::chrono::steady_clock::now();
  medium.open_write("/f")->sync();
  CHECK(std::chrono::steady_clock::now() - begin >= std::chrono::milliseconds{10});
  CHECK(seen == "open_write /f absent\nsync /f there\n");
}

TEST_CASE("faults: failing each call in turn, a durable small file is old or new") {
  for (std::uint64_t k = 1;; ++k) {
    CAPTURE(k);
    Memory memory;
    put(memory, "/record", "old");
    FaultMedium medium{memory};
    medium.add({.nth = k, .system_error = EIO});
    MediumModel model{medium};
    bool failed = false;
    try {
      write_file_durably(model, "/", "record", as_byte_span("new"));
    } catch (Error const&) {
      failed = true;
    }
    auto const text = get(memory, "/record");
    CHECK((text == "new" || (failed && text == "old")));
    CHECK(failed == (medium.hits() == 1));
    if (!failed) {
      CHECK(k == medium.calls() + 1);
      break;
    }
  }
}
