// SPDX-License-Identifier: Apache-2.0
#pragma once
// What every medium must do, as one suite. A medium passes when it does this in an empty directory of its own.

#include <dcp/media/medium.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace dcp::test {

/// The Error that `action` throws; fails the test if it throws none.
template <class Action>
Error error_of(Action action) {
  try {
    action();
  } catch (Error const& error) {
    return error;
  }
  FAIL("no Error was thrown");
  return Error{ErrorCode::unknown, ""};
}

template <class M>
void put(M& medium, std::string const& path, std::string const& text) {
  medium.remove_file(path);
  auto const file = medium.open_write(path);
  file->write_at(0, as_byte_span(text));
  file->sync();
  file->close();
}

template <class M>
std::string get(M& medium, std::string const& path) {
  auto const file = medium.open_read(path);
  std::string text(static_cast<std::size_t>(file->size()), '\0');
  file->read_at(0, std::as_writable_bytes(std::span{text}));
  return text;
}

/// "kind name size" of each entry, for comparison in one line.
template <class M>
std::string listing(M& medium, std::string const& directory) {
  std::string text;
  for (auto const& entry : medium.list(directory)) {
    text += entry.kind == EntryKind::directory ? "d " : entry.kind == EntryKind::file ? "f " : "o ";
    text += entry.name + (entry.kind == EntryKind::file ? " " + std::to_string(entry.size) : "") + "\n";
  }
  return text;
}

/// Checks a medium. `make(directory)` returns a medium and sets the path of an empty directory in it. Called once per case.
///
/// Example   TEST_CASE("Memory keeps the contract of a medium") { check_medium([](std::string& d) { d = "/d"; Memory m; m.create_directory(d); return m; }); }
template <class Make>
void check_medium(Make make) {
  std::string root;
  auto medium = make(root);
  static_assert(Medium<decltype(medium)>);
  auto const at = [&](std::string const& name) { return root + "/" + name; };
  auto const missing = [](Error const& error) { return error.code() == ErrorCode::missing_file && error.system_error() == ENOENT && !error.path().empty(); };
  auto const refused = [](Error const& error, int code) { return error.code() == ErrorCode::io && error.system_error() == code && !error.path().empty(); };

  SUBCASE("bytes come back as written, at any offset, and gaps are zeros") {
    auto const file = medium.open_write(at("f"));
    file->write_at(5, as_byte_span("world"));
    file->write_at(0, as_byte_span("hi"));
    file->write_at(100, {});
    file->sync();
    file->close();
    CHECK(get(medium, at("f")) == std::string("hi\0\0\0world", 10));
    auto const read = medium.open_read(at("f"));
    std::string part(3, ' ');
    read->read_at(6, std::as_writable_bytes(std::span{part}));
    CHECK(part == "orl");
    CHECK(read->size() == 10);
  }

  SUBCASE("open_write does not cut a file, and two writers share it") {
    put(medium, at("f"), "0123456789");
    auto const first = medium.open_write(at("f")), second = medium.open_write(at("f"));
    first->write_at(0, as_byte_span("ab"));
    second->write_at(8, as_byte_span("yz"));
    first->close();
    second->close();
    CHECK(get(medium, at("f")) == "ab234567yz");
  }

  SUBCASE("resize cuts and extends with zeros") {
    auto const file = medium.open_write(at("f"));
    file->write_at(0, as_byte_span("abcdef"));
    file->resize(2);
    file->resize(4);
    file->close();
    CHECK(get(medium, at("f")) == std::string("ab\0\0", 4));
  }

  SUBCASE("a read past the end is truncated, with the range, and a read of nothing is fine") {
    put(medium, at("f"), "abc");
    auto const file = medium.open_read(at("f"));
    std::string buffer(3, ' ');
    auto const error = error_of([&] { file->read_at(1, std::as_writable_bytes(std::span{buffer})); });
    CHECK(error.code() == ErrorCode::truncated);
    CHECK(std::string{error.what()}.find("bytes [1, 4)") != std::string::npos);
    CHECK(error_of([&] { file->read_at(~std::uint64_t{0} - 1, std::as_writable_bytes(std::span{buffer})); }).code() == ErrorCode::truncated);
    file->read_at(3, {});
    file->read_at(1000, {});
  }

  SUBCASE("a write where no file can reach is refused") {
    auto const file = medium.open_write(at("f"));
    CHECK(refused(error_of([&] { file->write_at(~std::uint64_t{0} - 1, as_byte_span("abcd")); }), EFBIG));
    CHECK(refused(error_of([&] { file->resize(~std::uint64_t{0}); }), EFBIG));
  }

  SUBCASE("a closed file takes no more bytes") {
    auto const file = medium.open_write(at("f"));
    file->close();
    file->close();
    CHECK(refused(error_of([&] { file->write_at(0, as_byte_span("x")); }), EBADF));
    CHECK(refused(error_of([&] { file->sync(); }), EBADF));
  }

  SUBCASE("what is not there is missing_file, and its removal is no error") {
    CHECK(missing(error_of([&] { medium.open_read(at("no")); })));
    CHECK(missing(error_of([&] { medium.open_write(at("no/file")); })));
    CHECK(missing(error_of([&] { medium.list(at("no")); })));
    CHECK(missing(error_of([&] { medium.create_directory(at("no/directory")); })));
    CHECK(missing(error_of([&] { medium.sync_directory(at("no")); })));
    CHECK(missing(error_of([&] { medium.rename_file(at("no"), at("to")); })));
    CHECK(missing(error_of([&] { medium.publish_new(at("no"), at("to")); })));
    CHECK(missing(error_of([&] { medium.exchange_directories(at("no"), root); })));
    CHECK(missing(error_of([&] { medium.block_bytes(at("no")); })));
    CHECK(missing(error_of([&] { medium.acquire_lease(at("no/lease")); })));
    medium.remove_file(at("no"));
    medium.remove_tree(at("no"));
    medium.remove_file(at("no/file"));
    medium.remove_tree(at("no/tree"));
    CHECK(medium.list(root).empty());
  }

  SUBCASE("a directory is not read, written or removed as a file, and a file is not a directory") {
    medium.create_directory(at("d"));
    put(medium, at("f"), "abc");
    CHECK(refused(error_of([&] { medium.open_read(at("d")); }), EISDIR));
    CHECK(refused(error_of([&] { medium.open_write(at("d")); }), EISDIR));
    CHECK(error_of([&] { medium.remove_file(at("d")); }).code() == ErrorCode::io);
    CHECK(refused(error_of([&] { medium.rename_file(at("f"), at("d")); }), EISDIR));
    CHECK(refused(error_of([&] { medium.list(at("f")); }), ENOTDIR));
    CHECK(refused(error_of([&] { medium.sync_directory(at("f")); }), ENOTDIR));
    CHECK(refused(error_of([&] { medium.create_directory(at("f")); }), EEXIST));
    CHECK(error_of([&] { medium.create_directories(at("f")); }).code() == ErrorCode::io);
    CHECK(refused(error_of([&] { medium.open_read(at("f/x")); }), ENOTDIR));
    CHECK(refused(error_of([&] { medium.open_write(at("f/x")); }), ENOTDIR));
    CHECK(refused(error_of([&] { medium.create_directory(at("f/x")); }), ENOTDIR));
    CHECK(refused(error_of([&] { medium.publish_new(at("f"), at("to")); }), ENOTDIR));
    CHECK(refused(error_of([&] { medium.exchange_directories(at("f"), at("d")); }), ENOTDIR));
    CHECK(medium.kind(at("f/x")) == EntryKind::missing);
    medium.remove_file(at("f/x"));
    medium.remove_tree(at("f/x"));
    CHECK(listing(medium, root) == "d d\nf f 3\n");
  }

  SUBCASE("kind and list say what is there, sorted") {
    CHECK(medium.kind(root) == EntryKind::directory);
    CHECK(medium.kind(at("b")) == EntryKind::missing);
    put(medium, at("b"), "four");
    medium.create_directory(at("c"));
    put(medium, at("a"), "");
    put(medium, at("c/inside"), "x");
    CHECK(medium.kind(at("b")) == EntryKind::file);
    CHECK(medium.kind(at("c")) == EntryKind::directory);
    CHECK(listing(medium, root) == "f a 0\nf b 4\nd c\n");
  }

  SUBCASE("create_directory makes one and says whether it did; create_directories makes all") {
    CHECK(medium.create_directory(at("d")));
    CHECK_FALSE(medium.create_directory(at("d")));
    medium.create_directories(at("x/y/z"));
    medium.create_directories(at("x/y/z"));
    CHECK(medium.kind(at("x/y/z")) == EntryKind::directory);
    medium.sync_directory(at("x/y"));
  }

  SUBCASE("rename_file replaces, and open files stay with their bytes") {
    put(medium, at("old"), "old");
    put(medium, at("new"), "newer");
    auto const reader = medium.open_read(at("old"));
    auto const writer = medium.open_write(at("new"));
    medium.rename_file(at("new"), at("old"));
    writer->write_at(0, as_byte_span("N"));
    CHECK(get(medium, at("old")) == "Newer");
    CHECK(reader->size() == 3);
    CHECK(listing(medium, root) == "f old 5\n");
    medium.rename_file(at("old"), at("old"));
    medium.remove_file(at("old"));
    writer->write_at(0, as_byte_span("still open"));
    CHECK(medium.list(root).empty());
  }

  SUBCASE("publish_new takes a free name or an empty directory and nothing else") {
    medium.create_directory(at("attempt"));
    put(medium, at("attempt/f"), "abc");
    CHECK(medium.publish_new(at("attempt"), at("place")));
    CHECK(get(medium, at("place/f")) == "abc");
    CHECK(medium.kind(at("attempt")) == EntryKind::missing);

    medium.create_directory(at("empty"));
    CHECK(medium.publish_new(at("place"), at("empty")));
    CHECK(listing(medium, root) == "d empty\n");

    medium.create_directory(at("second"));
    put(medium, at("file"), "x");
    CHECK_FALSE(medium.publish_new(at("second"), at("empty")));
    CHECK_FALSE(medium.publish_new(at("second"), at("file")));
    CHECK(get(medium, at("empty/f")) == "abc");
    CHECK(listing(medium, root) == "d empty\nf file 1\nd second\n");
    CHECK(missing(error_of([&] { medium.publish_new(at("second"), at("no/second")); })));
    CHECK(refused(error_of([&] { medium.publish_new(at("empty"), at("empty/inside")); }), EINVAL));
  }

  SUBCASE("exchange_directories swaps two directories, or says that it cannot") {
    medium.create_directory(at("a"));
    medium.create_directory(at("b"));
    put(medium, at("a/f"), "from a");
    put(medium, at("b/g"), "from b");
    bool const swapped = medium.exchange_directories(at("a"), at("b"));
    CHECK(get(medium, at(swapped ? "b/f" : "a/f")) == "from a");
    CHECK(get(medium, at(swapped ? "a/g" : "b/g")) == "from b");
    CHECK(listing(medium, root) == "d a\nd b\n");
  }

  SUBCASE("remove_tree removes everything below, or a file") {
    medium.create_directories(at("t/a/b"));
    put(medium, at("t/a/b/f"), "x");
    put(medium, at("t/g"), "y");
    put(medium, at("f"), "z");
    auto const open = medium.open_write(at("t/g"));
    medium.remove_tree(at("t"));
    medium.remove_tree(at("f"));
    CHECK(medium.list(root).empty());
    open->write_at(0, as_byte_span("gone, but still open"));
  }

  SUBCASE("a lease has one holder until it is released, and release removes its file") {
    auto lease = medium.acquire_lease(at("lease"));
    REQUIRE(lease != nullptr);
    CHECK(medium.kind(at("lease")) == EntryKind::file);
    CHECK(medium.acquire_lease(at("lease")) == nullptr);
    CHECK(medium.acquire_lease(at("other")) != nullptr);
    lease.reset();
    CHECK(medium.list(root).empty());
    lease = medium.acquire_lease(at("lease"));
    CHECK(lease != nullptr);
  }

  SUBCASE("a lease whose file another has taken away leaves the next holder's alone") {
    auto first = medium.acquire_lease(at("lease"));
    medium.remove_file(at("lease"));
    auto const second = medium.acquire_lease(at("lease"));
    REQUIRE(second != nullptr);
    first.reset();
    CHECK(medium.kind(at("lease")) == EntryKind::file);
    CHECK(medium.acquire_lease(at("lease")) == nullptr);
  }

  SUBCASE("of many threads one gets the lease") {
    std::vector<std::unique_ptr<Lease>> held(8);
    std::vector<std::thread> threads;
    for (auto& mine : held) threads.emplace_back([&] { mine = medium.acquire_lease(at("lease")); });
    for (auto& thread : threads) thread.join();
    int holders = 0;
    for (auto const& mine : held) holders += mine != nullptr ? 1 : 0;
    CHECK(holders == 1);
  }

  SUBCASE("a place is absolute, need not exist, and cannot be a root or a dot") {
    auto const place = medium.resolve_place(at("not/there/yet"));
    CHECK(place.front() == '/');
    CHECK(place.ends_with("/not/there/yet"));
    medium.create_directories(place);
    CHECK(medium.resolve_place(at("not/there/../there/yet/")) == place);
    for (auto const* bad : {"", "/", "//", ".", "..", "./", "/.", "x/..", "/.."}) {
      CAPTURE(bad);
      CHECK(error_of([&] { medium.resolve_place(bad); }).code() == ErrorCode::invalid_argument);
    }
  }

  SUBCASE("block_bytes is a power of two from 4 KiB to 1 MiB") {
    auto const block = medium.block_bytes(root);
    CHECK(block >= 4096);
    CHECK(block <= (std::uint64_t{1} << 20));
    CHECK((block & (block - 1)) == 0);
  }

  SUBCASE("threads write disjoint ranges of one open file") {
    auto const file = medium.open_write(at("f"));
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        for (int i = t; i < 64; i += 4) file->write_at(static_cast<std::uint64_t>(i) * 100, as_byte_span(std::string(100, static_cast<char>('0' + i))));
      });
    for (auto& thread : threads) thread.join();
    file->sync();
    file->close();
    auto const text = get(medium, at("f"));
    REQUIRE(text.size() == 6400);
    for (std::size_t i = 0; i < 64; ++i) CHECK(text.substr(i * 100, 100) == std::string(100, static_cast<char>('0' + i)));
  }

  SUBCASE("the helpers over any medium: a durable small file, read back under a limit") {
    MediumModel model{medium};
    CHECK(model.renames_directories() == decltype(medium)::renames_directories);
    write_file_durably(model, root, "record", as_byte_span("first version"));
    write_file_durably(model, root, "record", as_byte_span("second"));
    CHECK(as_text(read_file(model, at("record"), 6)) == "second");
    CHECK(error_of([&] { read_file(model, at("record"), 5); }).code() == ErrorCode::limit);
    CHECK(listing(medium, root) == "f record 6\n");
  }
}

/// Checks a medium that renames nothing. `make(directory)` returns a medium and sets the path of a directory in it where nothing is. Called once per case.
template <class Make>
void check_object_medium(Make make) {
  std::string root;
  auto medium = make(root);
  using M = decltype(medium);
  static_assert(Medium<M> && !M::renames_directories);
  auto const at = [&](std::string const& name) { return root + "/" + name; };
  auto const missing = [](Error const& error) { return error.code() == ErrorCode::missing_file && error.system_error() == ENOENT && !error.path().empty(); };
  auto const refused = [](Error const& error, int code) { return error.code() == ErrorCode::io && error.system_error() == code && !error.path().empty(); };

  SUBCASE("an object appears, whole, when it is synced or closed; bytes at any offset, gaps as zeros") {
    auto const file = medium.open_write(at("f"));
    file->write_at(5, as_byte_span("world"));
    file->write_at(0, as_byte_span("hi"));
    file->write_at(100, {});
    CHECK(medium.kind(at("f")) == EntryKind::missing);
    file->sync();
    CHECK(get(medium, at("f")) == std::string("hi\0\0\0world", 10));
    file->close();
    file->close();
    CHECK(refused(error_of([&] { file->write_at(0, as_byte_span("x")); }), EBADF));
    CHECK(refused(error_of([&] { file->sync(); }), EBADF));
    auto const other = medium.open_write(at("g"));
    other->resize(3);
    other->write_at(0, as_byte_span("ab"));
    other->close();
    CHECK(get(medium, at("g")) == std::string("ab\0", 3));
    static_cast<void>(medium.open_write(at("never")));
    medium.open_write(at("empty"))->close();
    CHECK(listing(medium, root) == "f empty 0\nf f 10\nf g 3\n");
  }

  SUBCASE("an object that is written again is another one, and who has the old one open is told so") {
    put(medium, at("f"), "0123456789");
    auto const reader = medium.open_read(at("f"));
    std::string part(3, ' ');
    reader->read_at(6, std::as_writable_bytes(std::span{part}));
    CHECK(part == "678");
    auto const version = reader->version();
    put(medium, at("f"), "abcdefghij");
    CHECK(refused(error_of([&] { reader->read_at(0, std::as_writable_bytes(std::span{part})); }), ESTALE));
    CHECK(medium.open_read(at("f"))->version() != version);
    CHECK(get(medium, at("f")) == "abcdefghij");
  }

  SUBCASE("a small file that is replaced again and again is read as one of those that were there") {
    MediumModel model{medium};
    medium.put_file(at("f"), as_byte_span("0"), {});
    std::atomic<bool> done{false};
    std::jthread const writer{[&] {   // joined whatever is thrown here
      for (int i = 0; i < 200; ++i) medium.put_file(at("f"), as_byte_span(std::string(static_cast<std::size_t>(1 + i % 7), static_cast<char>('0' + i % 7))), {});
      done = true;
    }};
    int mixed = 0;
    for (int reads = 0; !done || reads < 10; ++reads) {
      auto const bytes = read_file(model, at("f"), 100);
      std::string const text{as_text(bytes)};
      mixed += text == std::string(text.size(), static_cast<char>('0' + static_cast<int>(text.size()) - 1)) ? 0 : 1;
    }
    CHECK(mixed == 0);
  }

  SUBCASE("a read past the end is truncated, with the range, and a read of nothing is fine") {
    put(medium, at("f"), "abc");
    auto const file = medium.open_read(at("f"));
    std::string buffer(3, ' ');
    auto const error = error_of([&] { file->read_at(1, std::as_writable_bytes(std::span{buffer})); });
    CHECK(error.code() == ErrorCode::truncated);
    CHECK(std::string{error.what()}.find("bytes [1, 4)") != std::string::npos);
    file->read_at(3, {});
    file->read_at(1000, {});
  }

  SUBCASE("pieces that lie one after the other are read in one go") {
    put(medium, at("f"), "0123456789");
    std::string a(2, ' '), b(3, ' ');
    std::array<ByteSpan, 3> const pieces{std::as_writable_bytes(std::span{a}), ByteSpan{}, std::as_writable_bytes(std::span{b})};
    medium.open_read(at("f"))->read_pieces(4, pieces);
    CHECK(a + b == "45678");
  }

  SUBCASE("what is not there is missing_file, its removal is no error, and every directory is there") {
    CHECK(missing(error_of([&] { medium.open_read(at("no")); })));
    medium.remove_file(at("no"));
    medium.remove_tree(at("no"));
    CHECK(medium.list(root).empty());
    CHECK(medium.list(at("no")).empty());
    medium.create_directories(at("a/b"));
    medium.sync_directory(at("a/b"));
    CHECK(medium.kind(at("a")) == EntryKind::missing);
    put(medium, at("a/b/f"), "x");
    CHECK(medium.kind(at("a")) == EntryKind::directory);
    CHECK(medium.kind(at("a/b")) == EntryKind::directory);
    CHECK(medium.kind(at("a/b/f")) == EntryKind::file);
    CHECK(medium.kind(at("a/b/f/g")) == EntryKind::missing);
    CHECK(medium.kind(at("a/")) == EntryKind::directory);
  }

  SUBCASE("lists are of one level, sorted, and not fooled by names that begin alike") {
    put(medium, at("b"), "four");
    put(medium, at("c/inside"), "x");
    put(medium, at("c/deep/er"), "x");
    put(medium, at("c-d"), "x");
    put(medium, at("a b+c&d=%25.txt"), "");
    put(medium, at("\xc3\xa9"), "e");
    CHECK(listing(medium, root) == "f a b+c&d=%25.txt 0\nf b 4\nd c\nf c-d 1\nf \xc3\xa9 1\n");
    CHECK(listing(medium, at("c")) == "d deep\nf inside 1\n");
    CHECK(get(medium, at("a b+c&d=%25.txt")) == "");
    medium.remove_tree(at("c"));
    CHECK(listing(medium, root) == "f a b+c&d=%25.txt 0\nf b 4\nf c-d 1\nf \xc3\xa9 1\n");
    medium.remove_tree(at("b"));
    medium.remove_file(at("a b+c&d=%25.txt"));
    CHECK(listing(medium, root) == "f c-d 1\nf \xc3\xa9 1\n");
  }

  SUBCASE("put_file puts where what is there is as expected, and nowhere else") {
    CHECK_FALSE(medium.put_file(at("f"), as_byte_span("no"), Expected::these(as_byte_span("other"))));
    CHECK(medium.kind(at("f")) == EntryKind::missing);
    CHECK(medium.put_file(at("f"), as_byte_span("one"), Expected::nothing()));
    CHECK_FALSE(medium.put_file(at("f"), as_byte_span("no"), Expected::nothing()));
    CHECK_FALSE(medium.put_file(at("f"), as_byte_span("no"), Expected::these(as_byte_span("on"))));
    CHECK(get(medium, at("f")) == "one");
    CHECK(medium.put_file(at("f"), as_byte_span("two"), Expected::these(as_byte_span("one"))));
    CHECK(medium.put_file(at("f"), as_byte_span(""), {}));
    CHECK(medium.put_file(at("f"), as_byte_span("three"), Expected::these({})));
    CHECK(get(medium, at("f")) == "three");
  }

  SUBCASE("of many threads that put on condition one succeeds") {
    for (auto const& expected : {Expected::nothing(), Expected::these(as_byte_span("old"))}) {
      medium.remove_file(at("f"));
      if (expected.what == Expected::What::bytes) medium.put_file(at("f"), expected.bytes, {});
      std::array<bool, 8> done{};
      std::vector<std::thread> threads;
      for (std::size_t i = 0; i < done.size(); ++i) threads.emplace_back([&, i] { done[i] = medium.put_file(at("f"), as_byte_span("by " + std::to_string(i)), expected); });
      for (auto& thread : threads) thread.join();
      std::size_t winners = 0;
      for (std::size_t i = 0; i < done.size(); ++i)
        if (done[i] && get(medium, at("f")) == "by " + std::to_string(i)) ++winners;
      CHECK(winners == 1);
      CHECK(std::count(done.begin(), done.end(), true) == 1);
    }
  }

  SUBCASE("a lease has one holder until it is released, and release removes its file") {
    auto lease = medium.acquire_lease(at("lease"));
    REQUIRE(lease != nullptr);
    CHECK(medium.kind(at("lease")) == EntryKind::file);
    CHECK(medium.acquire_lease(at("lease")) == nullptr);
    CHECK(medium.acquire_lease(at("other")) != nullptr);
    lease.reset();
    CHECK(medium.list(root).empty());
    lease = medium.acquire_lease(at("lease"));
    CHECK(lease != nullptr);
  }

  SUBCASE("a lease whose file another has taken away leaves the next holder's alone") {
    auto first = medium.acquire_lease(at("lease"));
    medium.remove_file(at("lease"));
    auto const second = medium.acquire_lease(at("lease"));
    REQUIRE(second != nullptr);
    first.reset();
    CHECK(medium.kind(at("lease")) == EntryKind::file);
    CHECK(medium.acquire_lease(at("lease")) == nullptr);
  }

  SUBCASE("of many threads one gets the lease") {
    std::vector<std::unique_ptr<Lease>> held(8);
    std::vector<std::thread> threads;
    for (auto& mine : held) threads.emplace_back([&] { mine = medium.acquire_lease(at("lease")); });
    for (auto& thread : threads) thread.join();
    int holders = 0;
    for (auto const& mine : held) holders += mine != nullptr ? 1 : 0;
    CHECK(holders == 1);
  }

  SUBCASE("a place is absolute, need not exist, and cannot be a root or a dot") {
    auto const place = medium.resolve_place(at("not/there/yet"));
    CHECK(place.front() == '/');
    CHECK(place.ends_with("/not/there/yet"));
    CHECK(medium.resolve_place(at("not/there/../there/yet/")) == place);
    for (auto const* bad : {"", "/", "//", ".", "..", "./", "/.", "x/..", "/.."}) {
      CAPTURE(bad);
      CHECK(error_of([&] { medium.resolve_place(bad); }).code() == ErrorCode::invalid_argument);
    }
  }

  SUBCASE("threads write disjoint ranges of one open file") {
    auto const file = medium.open_write(at("f"));
    file->resize(6400);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        for (int i = t; i < 64; i += 4) file->write_at(static_cast<std::uint64_t>(i) * 100, as_byte_span(std::string(100, static_cast<char>('0' + i))));
      });
    for (auto& thread : threads) thread.join();
    file->sync();
    file->close();
    auto const text = get(medium, at("f"));
    REQUIRE(text.size() == 6400);
    for (std::size_t i = 0; i < 64; ++i) CHECK(text.substr(i * 100, 100) == std::string(100, static_cast<char>('0' + i)));
  }

  SUBCASE("the helpers over any medium: a durable small file, read back under a limit; and what cannot be is refused in words") {
    MediumModel model{medium};
    CHECK(!model.renames_directories());
    write_file_durably(model, root, "record", as_byte_span("first version"));
    write_file_durably(model, root, "record", as_byte_span("second"));
    CHECK(as_text(read_file(model, at("record"), 6)) == "second");
    CHECK(error_of([&] { read_file(model, at("record"), 5); }).code() == ErrorCode::limit);
    CHECK(listing(medium, root) == "f record 6\n");
    CHECK(error_of([&] { model.rename_file(at("record"), at("other")); }).code() == ErrorCode::unsupported);
    CHECK(error_of([&] { model.publish_new(root, at("other")); }).code() == ErrorCode::unsupported);
  }
}

/// Law: `a` and `b` answer the same to the same random calls, in the empty directories given.
template <class A, class B>
void check_media_agree(A a, std::string const& a_root, B b, std::string const& b_root, std::uint64_t seed, int calls) {
  std::mt19937_64 random{seed};
  CAPTURE(seed);
  auto const pick = [&](std::uint64_t n) { return random() % n; };
  auto const name = [&] {
    std::string path;
    for (auto depth = 1 + pick(3); depth > 0; --depth) path += "/" + std::string(1, static_cast<char>('a' + pick(3)));
    return path;
  };
  auto const outcome = [](bool two_paths, auto action) {
    try {
      return action();
    } catch (Error const& error) {
      if (two_paths) return std::string{"refused"};   // of the reasons on two paths either may be named
      return std::string{to_string(error.code())} + " " + std::to_string(error.system_error());
    }
  };
  for (int i = 0; i < calls; ++i) {
    auto const call = pick(9), x = pick(200), y = pick(50);
    auto const from = name(), to = name();
    auto const apply = [&](auto& medium, std::string const& root) -> std::string {
      auto const p = root + from, q = root + to;
      switch (call) {
        case 0: return medium.create_directory(p) ? "made" : "was there";
        case 1: return medium.open_write(p)->write_at(x, as_byte_span(std::string(y, 'w'))), "written";
        case 2: return get(medium, p);
        case 3: return listing(medium, p);
        case 4: return medium.remove_file(p), "removed";
        case 5: return medium.kind(p) != EntryKind::directory ? medium.rename_file(p, q), "renamed" : "not a file";
        case 6: return p != q && medium.publish_new(p, q) ? "published" : "not published";
        case 7: return pick(4) == 0 ? medium.remove_tree(p), "removed" : "kept";
        default: return medium.open_write(p)->resize(x), "resized";
      }
    };
    auto saved = random;   // both see the same random numbers
    auto const one = outcome(call == 5 || call == 6, [&] { return apply(a, a_root); });
    random = saved;
    auto const two = outcome(call == 5 || call == 6, [&] { return apply(b, b_root); });
    CAPTURE(i);
    CAPTURE(call);
    CAPTURE(from);
    CAPTURE(to);
    REQUIRE(one == two);
  }
}

}  // namespace dcp::test
