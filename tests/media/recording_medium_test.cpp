// SPDX-License-Identifier: Apache-2.0
#include "../support/recording_medium.hpp"

#include "../support/medium_conformance.hpp"

#include <doctest/doctest.h>

#include <random>
#include <set>
#include <string>
#include <thread>

using namespace dcp;
using namespace dcp::test;

namespace {

constexpr DropPolicy drop_all{DropPolicy::Files::as_synced, DropPolicy::Names::drop, 0};
constexpr DropPolicy drop_bytes{DropPolicy::Files::as_synced, DropPolicy::Names::keep, 0};
constexpr DropPolicy zeros{DropPolicy::Files::zero_filled, DropPolicy::Names::keep, 0};
constexpr DropPolicy drop_names{DropPolicy::Files::keep, DropPolicy::Names::drop, 0};

/// Every file below `path` with its text, in one line each.
std::string all(Memory memory, std::string const& path = "") {
  std::string text;
  for (auto const& entry : memory.list(path + "/")) {
    auto const below = path + "/" + entry.name;
    text += entry.kind == EntryKind::directory ? below + "/\n" + all(memory, below) : below + " " + get(memory, below) + "\n";
  }
  return text;
}

std::string end(RecordingMedium const& medium, DropPolicy policy) { return all(medium.replay(medium.length(), policy)); }

/// A save in miniature: an attempt beside the place, its record last, published by rename or exchange.
struct Save {
  bool sync_data = true, sync_attempt = true, sync_parent = true;

  void operator()(RecordingMedium& medium, std::string const& version) const {
    medium.create_directory("/attempt");
    for (int rank = 0; rank < 3; ++rank) {
      auto const file = medium.open_write("/attempt/data" + std::to_string(rank));
      file->write_at(0, as_byte_span(std::string(1000, version.back())));
      if (sync_data) file->sync();
      file->close();
    }
    if (sync_attempt) medium.sync_directory("/attempt");
    MediumModel model{medium};
    write_file_durably(model, "/attempt", "record", as_byte_span(version));
    if (!medium.publish_new("/attempt", "/place")) medium.exchange_directories("/attempt", "/place");
    if (sync_parent) medium.sync_directory("/");
    medium.remove_tree("/attempt");
  }
};

/// The version that a reader of `disk` finds, "" for none, "broken" where a record vouches for what is not there.
std::string version_at(Memory disk, std::string const& place) {
  if (disk.kind(place + "/record") == EntryKind::missing) return "";
  auto const version = get(disk, place + "/record");
  for (int rank = 0; rank < 3; ++rank) {
    auto const file = place + "/data" + std::to_string(rank);
    if (disk.kind(file) == EntryKind::missing || version.empty() || get(disk, file) != std::string(1000, version.back())) return "broken";
  }
  return version;
}

/// What readers may find at "/place" over all crashes while `save` replaces version 1 by version 2; "" is a place without record.
std::set<std::string> versions_found(Save save, bool replace) {
  Memory initial;
  if (replace) {
    RecordingMedium first;
    Save{}(first, "version 1");
    initial = first.memory();
  }
  RecordingMedium medium{initial};
  save(medium, "version 2");
  CHECK(version_at(medium.memory(), "/place") == "version 2");
  std::set<std::string> found;
  auto const seed = std::random_device{}();
  CAPTURE(seed);
  medium.for_each_crash(crash_policies(seed, 50), [&](Memory disk, std::size_t, DropPolicy const&) { found.insert(version_at(disk, "/place")); });
  return found;
}

}  // namespace

TEST_CASE("RecordingMedium keeps the contract of a medium") {
  check_medium([](std::string& directory) {
    Memory memory;
    memory.create_directory(directory = "/place");
    return RecordingMedium{memory};
  });
}

TEST_CASE("recording: bytes that were not synced may be missing or zeros, synced ones stay") {
  RecordingMedium medium;
  auto const file = medium.open_write("/f");
  medium.sync_directory("/");
  file->write_at(0, as_byte_span("safe"));
  file->sync();
  file->write_at(2, as_byte_span("XYZ"));
  CHECK(end(medium, DropPolicy::process_kill()) == "/f saXYZ\n");
  CHECK(end(medium, drop_bytes) == "/f safe\n");
  CHECK(end(medium, zeros) == std::string("/f safe\0\n", 9));
  file->resize(1);
  CHECK(end(medium, drop_bytes) == "/f safe\n");
  CHECK(end(medium, DropPolicy::process_kill()) == "/f s\n");
}

TEST_CASE("recording: names that were not synced may be missing, also of files whose bytes are safe") {
  RecordingMedium medium;
  put(medium, "/f", "abc");
  CHECK(end(medium, drop_all) == "");
  CHECK(end(medium, drop_bytes) == "/f abc\n");
  medium.sync_directory("/");
  CHECK(end(medium, drop_all) == "/f abc\n");
  medium.rename_file("/f", "/g");
  CHECK(end(medium, drop_all) == "/f abc\n");
  CHECK(end(medium, DropPolicy::process_kill()) == "/g abc\n");
  medium.remove_file("/g");
  CHECK(end(medium, drop_names) == "/f abc\n");
  medium.sync_directory("/");
  CHECK(end(medium, drop_all) == "");
}

TEST_CASE("recording: some names means the oldest changes of each directory") {
  RecordingMedium medium;
  for (auto const* name : {"/a", "/b", "/c"}) put(medium, name, "x");
  std::set<std::string> seen;
  for (std::uint64_t seed = 0; seed < 200; ++seed) seen.insert(end(medium, {DropPolicy::Files::keep, DropPolicy::Names::some, seed}));
  CHECK(seen == std::set<std::string>{"", "/a x\n", "/a x\n/b x\n", "/a x\n/b x\n/c x\n"});
}

TEST_CASE("recording: mixed bytes are mixed by sectors") {
  RecordingMedium medium;
  put(medium, "/f", std::string(1024, 'o'));
  auto const file = medium.open_write("/f");
  file->write_at(0, as_byte_span(std::string(1024, 'n')));
  std::set<std::string> seen;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    auto disk = medium.replay(medium.length(), {DropPolicy::Files::mixed, DropPolicy::Names::keep, seed});
    seen.insert(get(disk, "/f"));
  }
  std::string const o(512, 'o'), n(512, 'n');
  CHECK(seen == std::set<std::string>{o + o, o + n, n + o, n + n});
}

TEST_CASE("recording: a directory renamed before its parent is synced is under the old name, the new one, never both") {
  RecordingMedium medium;
  medium.create_directories("/attempt");
  put(medium, "/attempt/f", "abc");
  medium.sync_directory("/attempt");
  REQUIRE(medium.publish_new("/attempt", "/place"));
  std::set<std::string> seen;
  for (std::uint64_t seed = 0; seed < 50; ++seed) seen.insert(end(medium, {DropPolicy::Files::mixed, DropPolicy::Names::some, seed}));
  CHECK(seen == std::set<std::string>{"/attempt/\n/attempt/f abc\n", "/place/\n/place/f abc\n"});
}

TEST_CASE("recording: a rename between directories may be half there, and its loss is possible") {
  RecordingMedium medium;
  medium.create_directories("/a");
  medium.create_directories("/b");
  put(medium, "/a/f", "x");
  medium.sync_directory("/a");
  medium.rename_file("/a/f", "/b/f");
  medium.sync_directory("/a");
  CHECK(end(medium, drop_names) == "/a/\n/b/\n");
  medium.sync_directory("/b");
  CHECK(end(medium, drop_names) == "/a/\n/b/\n/b/f x\n");
}

TEST_CASE("recording: each prefix is what the program had then, and steps have descriptions") {
  RecordingMedium medium;
  put(medium, "/f", "abc");
  medium.create_directories("/x/y");
  medium.remove_tree("/x");
  {
    auto const lease = medium.acquire_lease("/lease");
    CHECK(end(medium, {}) == "/f abc\n/lease \n");
  }
  std::vector<std::string> steps;
  for (std::size_t i = 0; i < medium.length(); ++i) steps.push_back(medium.describe(i));
  CHECK(steps == std::vector<std::string>{"open /f", "write /f [0, 3)", "sync /f", "create_directory /x", "sync_directory /", "create_directory /x/y",
                                          "sync_directory /x", "remove_directory /x/y", "remove_directory /x", "open /lease", "remove /lease"});
  CHECK(all(medium.replay(0, {})) == "");
  CHECK(all(medium.replay(1, {})) == "/f \n");
  CHECK(all(medium.replay(2, {})) == "/f abc\n");
  CHECK(all(medium.replay(6, {})) == "/f abc\n/x/\n/x/y/\n");
  CHECK(end(medium, {}) == all(medium.memory()));
}

TEST_CASE("recording: what was open or unlinked keeps its own bytes") {
  RecordingMedium medium;
  put(medium, "/f", "old");
  auto const open = medium.open_write("/f");
  put(medium, "/g", "new");
  medium.rename_file("/g", "/f");
  open->write_at(0, as_byte_span("OLD"));
  CHECK(end(medium, {}) == "/f new\n");
}

TEST_CASE("recording: threads are ordered, and the end of the tape is what they see") {
  RecordingMedium medium;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([medium, t]() mutable {
      auto const directory = "/" + std::to_string(t);
      medium.create_directories(directory);
      for (int i = 0; i < 10; ++i) put(medium, directory + "/" + std::to_string(i), std::to_string(t * i));
      medium.rename_file(directory + "/0", "/shared");
      if (t % 2 == 0) medium.remove_tree(directory);
    });
  for (auto& thread : threads) thread.join();
  CHECK(end(medium, {}) == all(medium.memory()));
}

TEST_CASE("law: after random calls the whole tape replays to what the program sees") {
  auto const seed = std::random_device{}();
  RecordingMedium medium;
  check_media_agree(medium, "", Memory{}, "", seed, 2000);
  CHECK(end(medium, {}) == all(medium.memory()));
}

TEST_CASE("recording: a file written durably is old or new after every crash, and new once done") {
  Memory initial;
  put(initial, "/record", "old");
  RecordingMedium medium{initial};
  MediumModel model{medium};
  write_file_durably(model, "/", "record", as_byte_span("newer"));
  auto const seed = std::random_device{}();
  CAPTURE(seed);
  std::set<std::string> seen;
  medium.for_each_crash(crash_policies(seed, 20), [&](Memory disk, std::size_t prefix, DropPolicy const& policy) {
    CAPTURE(prefix);
    CAPTURE(policy.text());
    auto const text = get(disk, "/record");
    CHECK((text == "newer" || (text == "old" && prefix < medium.length())));
    seen.insert(text);
  });
  CHECK(seen.size() == 2);
}

TEST_CASE("recording: a save that syncs in order is old or new after every crash, and each missing sync is found") {
  CHECK(versions_found({}, true) == std::set<std::string>{"version 1", "version 2"});
  CHECK(versions_found({}, false) == std::set<std::string>{"", "version 2"});
  CHECK(versions_found({.sync_data = false}, true).count("broken") == 1);
  CHECK(versions_found({.sync_attempt = false}, false).count("broken") == 0);   // the sync behind the record covers the names too
  // Without the last sync the old version may be removed while the exchange is not yet on the disk: nothing is left at the place.
  CHECK((versions_found({.sync_parent = false}, true).count("") == 1 || versions_found({.sync_parent = false}, true).count("broken") == 1));
}
